//! Admitted players.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::Admission;
#[cfg(doc)]
use super::Request;
use crate::{Stream, Wanted};
use downpour_media::StreamKey;

/// One admitted player. Dropping it frees its share of the limit.
pub struct Playback {
    pub(super) playing: Arc<Playing>,
    pub(super) id: u64,
    pub(super) admission: Admission,
    pub(super) _permit: OwnedSemaphorePermit,
    pub(super) _wanted: Wanted,
}

impl Playback {
    /// The stream to play.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.playing.stream
    }

    /// Its id in [`Admission::playbacks`].
    pub fn id(&self) -> u64 {
        self.id
    }

    /// `true` once [`Admission::revoke_playback`] was called. For tasks that serve many players; others
    /// wait for [`Request::revoked`].
    pub fn is_revoked(&self) -> bool {
        self.playing.is_revoked.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Playback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Playback").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Drop for Playback {
    fn drop(&mut self) {
        self.admission.shared.playbacks.lock().remove(&self.id);
        self.admission.shared.counters.playbacks_ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// One playback in [`Admission::playbacks`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlaybackInfo {
    /// Its id, for [`Admission::revoke_playback`].
    pub id: u64,
    /// The stream.
    pub key: StreamKey,
    /// The player's address.
    pub peer: SocketAddr,
    /// The protocol, as in [`Request::protocol`].
    pub protocol: &'static str,
}

/// The part of a playback that its player and [`Admission::playbacks`] share.
pub(super) struct Playing {
    pub(super) stream: Arc<Stream>,
    pub(super) peer: SocketAddr,
    pub(super) protocol: &'static str,
    pub(super) revoked: Option<CancellationToken>,
    pub(super) is_revoked: AtomicBool,
}
