//! Who holds each stream key: at most one source, whatever its protocol.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use downpour_media::StreamKey;
use parking_lot::Mutex;

use crate::AlreadyLive;

/// Keys that are claimed, by encoders and by sources of the node itself.
#[derive(Default)]
pub(crate) struct Claims {
    held: Mutex<HashMap<StreamKey, Held>>,
    next_id: AtomicU64,
}

struct Held {
    id: u64,
    /// `None`: nobody may take it over.
    holder: Option<Arc<dyn Holder>>,
}

/// A source whose key another one may take over.
pub(crate) trait Holder: Send + Sync {
    /// For how long it has sent nothing.
    fn silent_for(&self) -> Duration;

    /// Ends it, here and now.
    fn end(&self, reason: EndReason);
}

/// Why a source loses its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// It was silent, and another encoder came.
    TakenOver,
    /// An operator, or the end of the node.
    Revoked,
}

/// Why a key cannot be claimed.
pub(crate) enum ClaimError {
    AlreadyLive(AlreadyLive),
    /// As many keys are claimed as may be.
    Full,
}

impl Claims {
    /// Claims a key for a source that nobody may take over.
    pub(crate) fn claim(self: &Arc<Self>, key: &StreamKey) -> Result<Claim, AlreadyLive> {
        match self.claim_for(key, None, Duration::MAX, usize::MAX) {
            Ok((claim, _)) => Ok(claim),
            Err(ClaimError::AlreadyLive(error)) => Err(error),
            // There are not as many keys.
            Err(ClaimError::Full) => Err(AlreadyLive(key.clone())),
        }
    }

    /// Claims a key for `holder`, while fewer than `max` are claimed. A source that has been silent for
    /// `silence` loses the key and is ended; for how long it was silent is returned then.
    pub(crate) fn claim_for(
        self: &Arc<Self>,
        key: &StreamKey,
        holder: Option<Arc<dyn Holder>>,
        silence: Duration,
        max: usize,
    ) -> Result<(Claim, Option<Duration>), ClaimError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut held = self.held.lock();
        let previous = match held.get(key) {
            None if held.len() >= max => return Err(ClaimError::Full),
            None => None,
            Some(Held { holder: Some(holder), .. }) if holder.silent_for() >= silence => {
                Some((holder.clone(), holder.silent_for()))
            }
            Some(_) => return Err(ClaimError::AlreadyLive(AlreadyLive(key.clone()))),
        };
        held.insert(key.clone(), Held { id, holder });
        // The old publication is dropped outside the lock: that may take a while.
        drop(held);
        let silent = previous.map(|(holder, silent)| {
            holder.end(EndReason::TakenOver);
            silent
        });
        Ok((Claim { claims: self.clone(), key: key.clone(), id }, silent))
    }

    /// Ends the source that holds `key`, if it can be ended. Returns `false` if there is none.
    pub(crate) fn end(&self, key: &StreamKey) -> bool {
        let holder = self.held.lock().get(key).and_then(|held| held.holder.clone());
        holder.map(|holder| holder.end(EndReason::Revoked)).is_some()
    }

    /// Ends all sources that can be ended, and returns how many those were.
    pub(crate) fn end_all(&self) -> usize {
        let holders: Vec<_> =
            self.held.lock().values().filter_map(|held| held.holder.clone()).collect();
        holders.iter().for_each(|holder| holder.end(EndReason::Revoked));
        holders.len()
    }
}

/// A claimed key. Dropping it frees the key, unless another source has taken it over.
pub(crate) struct Claim {
    claims: Arc<Claims>,
    key: StreamKey,
    id: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut held = self.claims.held.lock();
        if held.get(&self.key).is_some_and(|held| held.id == self.id) {
            held.remove(&self.key);
        }
    }
}
