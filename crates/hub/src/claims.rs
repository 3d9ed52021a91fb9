//! The source that holds each stream key: at most one, whatever its protocol.
//!
//! ```text
//!        claim_for                     dropped, or ended by end() and end_all()
//! free ─────────────► held by a source ──────────────────────────────────────► free
//!                        │      ▲
//!                        └──────┘ claim_for, once the holder yields: it is replaced
//! ```
//!
//! Invariants: no source is ended behind the lock of the map, and no publication's lock is taken
//! there; a source that lost its key cannot free it for the next holder.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use downpour_media::StreamKey;
use parking_lot::Mutex;

use crate::{AlreadyLive, Publisher};

/// Keys that are claimed, by encoders and by sources that the node runs.
#[derive(Default)]
pub(crate) struct Claims {
    held: Mutex<HashMap<StreamKey, Held>>,
    next_id: AtomicU64,
}

struct Held {
    id: u64,
    /// `None` for a source that can be neither taken over nor ended.
    holder: Option<Arc<dyn Holder>>,
}

/// A source that can lose its key to another one.
pub(crate) trait Holder: Send + Sync {
    /// How long it has sent nothing, if it yields its key to `rival`, and `None` if it does not. A source
    /// that has been silent for `silence` yields to every rival. Called behind the lock of all claims:
    /// takes no lock.
    fn yields_to(&self, rival: &Rival, silence: Duration) -> Option<Duration>;

    /// Ends the source, but not its stream: returns the stream's publisher, if there is one.
    fn hand_over(&self) -> Option<Publisher>;

    /// The address of the source.
    fn peer(&self) -> SocketAddr;

    /// Ends the source. Once this returns, its stream is over, even if another thread ended it.
    fn end(&self, reason: EndReason);
}

/// Another encoder that asks for a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rival {
    pub(crate) address: IpAddr,
    /// The query of its URL, which has its credentials.
    pub(crate) query: String,
}

impl Rival {
    /// `true` if this is most likely the encoder `other`, which came back: from the same address, or
    /// with the same credentials from another one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.address == other.address || (!self.query.is_empty() && self.query == other.query)
    }
}

/// Why a source loses its key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndReason {
    /// It was silent, and another encoder asked for the key.
    TakenOver,
    /// An operator ended it, or the node stops.
    Revoked,
}

/// A source that yielded its key.
pub(crate) struct Replaced {
    pub(crate) holder: Arc<dyn Holder>,
    /// How long it has sent nothing.
    pub(crate) silent: Duration,
}

/// Why a key cannot be claimed.
pub(crate) enum ClaimError {
    /// Another source holds the key and is not silent.
    AlreadyLive(AlreadyLive),
    /// The limit of claimed keys is reached.
    Full,
}

impl Claims {
    /// Claims a key for a source that cannot be taken over.
    pub(crate) fn claim(self: &Arc<Self>, key: &StreamKey) -> Result<Claim, AlreadyLive> {
        match self.claim_for(key, None, usize::MAX) {
            Ok((claim, _)) => Ok(claim),
            Err(ClaimError::AlreadyLive(error)) => Err(error),
            // Memory cannot hold `usize::MAX` keys.
            Err(ClaimError::Full) => Err(AlreadyLive(key.clone())),
        }
    }

    /// Claims a key for `holder`, while fewer than `max` are claimed. If another source yields the key,
    /// it is returned with the time that it was silent; the caller must end it.
    pub(crate) fn claim_for(
        self: &Arc<Self>,
        key: &StreamKey,
        holder: Option<(Arc<dyn Holder>, &Rival, Duration)>,
        max: usize,
    ) -> Result<(Claim, Option<Replaced>), ClaimError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut held = self.held.lock();
        let replaced = match held.get(key) {
            None if held.len() >= max => return Err(ClaimError::Full),
            None => None,
            Some(Held { holder: previous, .. }) => {
                let yielded = previous.as_ref().zip(holder.as_ref()).and_then(
                    |(previous, (_, rival, silence))| {
                        let silent = previous.yields_to(rival, *silence)?;
                        Some(Replaced { holder: previous.clone(), silent })
                    },
                );
                Some(yielded.ok_or_else(|| ClaimError::AlreadyLive(AlreadyLive(key.clone())))?)
            }
        };
        held.insert(key.clone(), Held { id, holder: holder.map(|(holder, ..)| holder) });
        drop(held);
        Ok((Claim { claims: self.clone(), key: key.clone(), id }, replaced))
    }

    /// Ends the source that holds `key` and frees the key. Returns `false` if no source holds it, or
    /// one that cannot be ended.
    pub(crate) fn end(self: &Arc<Self>, key: &StreamKey) -> bool {
        let held = self.held.lock();
        let holder = held.get(key).and_then(|held| Some((held.id, held.holder.clone()?)));
        drop(held);
        let Some((id, holder)) = holder else { return false };
        holder.end(EndReason::Revoked);
        self.free(key, id);
        true
    }

    /// Ends all sources that can be ended and frees their keys. Returns their number.
    pub(crate) fn end_all(self: &Arc<Self>) -> usize {
        let held = self.held.lock();
        let keys: Vec<_> = held
            .iter()
            .filter(|(_, held)| held.holder.is_some())
            .map(|(key, _)| key.clone())
            .collect();
        drop(held);
        keys.iter().filter(|key| self.end(key)).count()
    }

    /// Frees the key, unless another source has claimed it since.
    fn free(&self, key: &StreamKey, id: u64) {
        let mut held = self.held.lock();
        if held.get(key).is_some_and(|held| held.id == id) {
            let freed = held.remove(key);
            drop(held);
            drop(freed);
        }
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
        self.claims.free(&self.key, self.id);
    }
}
