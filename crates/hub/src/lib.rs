//! The streams that are live on this node: sources push tags in, sinks read them out.
//!
//! A stream is one bounded log of tags. Every sink reads it with its own cursor, so the log is the GOP
//! cache, the slow-viewer policy and the memory bound in one, and the publisher never waits: a reader
//! that falls off the log's tail resumes at a key frame, and the skip is counted.
//!
//! ```text
//!            Admission                  Hub                         sinks
//! RTMP … ──► publish() ─► Publication ─► stream: taps, then log ─┬─► Tap: RTP fan-out
//! upstream ─────────────► Publisher ───►                         └─► Reader: recorder, viewers
//! viewers ◄─ play() ◄──── Playback ◄──── log
//! ```
//!
//! - [`Admission`] decides who may publish and play, whatever the protocol, and can revoke it.
//! - [`Sink`] and [`Tap`] are where an output is added, [`OnDemand`] where a source that starts on
//!   demand is.

pub mod admission;
mod claims;
mod counters;
mod log;
mod on_demand;
mod reader;
mod sink;
mod stream;

use std::{
    collections::HashMap,
    fmt,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::RwLock;
use tokio::sync::watch;

pub use admission::Admission;
pub use counters::Counters;
pub use log::AUDIO_JOIN_MS;
pub use on_demand::{OnDemand, Wanted};
pub use reader::{Ended, MaxLag, Position, ReadCount, ReadOutcome, Reader};
pub use sink::{Sink, Tap};
pub use stream::{NextPush, Publisher, Stream, ViewerGuard};

use claims::Claims;
use downpour_media::{PublicationId, StreamKey, flv::Headers};
use on_demand::Demand;

/// All streams that are live, by key. Cloning shares them.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
}

struct Shared {
    streams: RwLock<HashMap<StreamKey, Arc<Stream>>>,
    claims: Arc<Claims>,
    sinks: RwLock<Vec<Arc<dyn Sink>>>,
    demand: Arc<Demand>,
    limits: LogLimits,
    /// Changes whenever a stream comes up.
    ups: watch::Sender<()>,
}

/// How much of its newest media a stream keeps for its readers.
///
/// A stream that nobody reads keeps its newest group of pictures only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of memory, each tag's bookkeeping included. The newest tag is always kept.
    pub max_bytes: usize,
    /// Media time from the oldest to the newest tag, in milliseconds.
    pub max_age: u32,
}

/// What a publication is when it begins.
#[derive(Debug, Clone)]
pub struct PublicationInfo {
    /// Its identity, the same at each node that it passes.
    pub id: PublicationId,
    /// Unix time of media time 0, in milliseconds.
    pub start_unix_ms: u64,
    /// Headers that are known before the first tag.
    pub headers: Headers,
}

impl PublicationInfo {
    /// A new publication with a random id whose media time 0 is at `start_unix_ms`.
    pub fn starting_at(start_unix_ms: u64) -> Self {
        Self { id: PublicationId(rand::random()), start_unix_ms, headers: Headers::default() }
    }
}

impl Hub {
    /// A hub without streams, each of which will be bounded by `limits`.
    pub fn new(limits: LogLimits) -> Self {
        let shared = Shared {
            streams: RwLock::default(),
            claims: Arc::default(),
            sinks: RwLock::default(),
            demand: Arc::default(),
            limits,
            ups: watch::Sender::new(()),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Registers an output: it sees the streams that come up from now on. Taps get each tag in the
    /// order in which their sinks were added.
    pub fn add_sink(&self, sink: Arc<dyn Sink>) {
        self.shared.sinks.write().push(sink);
    }

    /// Registers a source that starts when a stream is asked for.
    pub fn add_on_demand(&self, source: Arc<dyn OnDemand>) {
        self.shared.demand.add(source);
    }

    /// Says that somebody wants the stream, until the guard is dropped; `None` where no source starts
    /// on demand.
    pub fn want(&self, key: &StreamKey) -> Option<Wanted> {
        self.shared.demand.want(key)
    }

    /// Starts a stream whose media time 0 is now.
    ///
    /// # Errors
    /// If the key is taken.
    pub fn publish(&self, key: StreamKey) -> Result<Publisher, AlreadyLive> {
        self.publish_with(key, PublicationInfo::starting_at(unix_ms()))
    }

    /// Starts a stream: for sources that need no admission. Encoders publish by [`Admission`].
    ///
    /// # Errors
    /// If the key is taken, by an encoder or by another source.
    pub fn publish_with(
        &self,
        key: StreamKey,
        info: PublicationInfo,
    ) -> Result<Publisher, AlreadyLive> {
        let claim = self.shared.claims.claim(&key)?;
        Ok(self.start(key, info, Some(claim)))
    }

    /// Starts a stream on a key that is claimed.
    fn start(
        &self,
        key: StreamKey,
        info: PublicationInfo,
        claim: Option<claims::Claim>,
    ) -> Publisher {
        let stream = Arc::new(Stream::new(key.clone(), info, self.shared.limits));
        self.shared.streams.write().insert(key, stream.clone());
        // Before the sinks are called: if one panics, dropping this takes the stream out again.
        let mut publisher = Publisher::new(stream.clone(), self.clone(), claim);
        let sinks = self.shared.sinks.read().clone();
        publisher.set_taps(sinks.iter().filter_map(|sink| sink.stream_up(&stream)).collect());
        self.shared.ups.send_replace(());
        publisher
    }

    /// The live stream of this name; takes a [`StreamKey`] or a `str`.
    pub fn stream<K: AsStreamKey + ?Sized>(&self, key: &K) -> Option<Arc<Stream>> {
        self.shared.streams.read().get(key.as_stream_key()).cloned()
    }

    /// All live streams, in no order.
    pub fn streams(&self) -> Vec<Arc<Stream>> {
        self.shared.streams.read().values().cloned().collect()
    }

    /// How many streams are live.
    pub fn len(&self) -> usize {
        self.shared.streams.read().len()
    }

    /// Whether no stream is live.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the live stream of this name from its newest group of pictures on.
    pub fn subscribe<K: AsStreamKey + ?Sized>(&self, key: &K) -> Option<Reader> {
        self.stream(key).map(|stream| stream.subscribe())
    }

    /// Waits for a stream of this name to come up; `None` if it did not until `deadline`.
    pub async fn wait_for<K: AsStreamKey + ?Sized>(
        &self,
        key: &K,
        deadline: tokio::time::Instant,
    ) -> Option<Arc<Stream>> {
        // Subscribed before the look-up, so that no stream comes up between the two unseen.
        let mut ups = self.shared.ups.subscribe();
        loop {
            if let Some(stream) = self.stream(key) {
                return Some(stream);
            }
            tokio::time::timeout_at(deadline, ups.changed()).await.ok()?.ok()?;
        }
    }

    fn forget(&self, stream: &Arc<Stream>) {
        let mut streams = self.shared.streams.write();
        if streams.get(stream.key()).is_some_and(|live| Arc::ptr_eq(live, stream)) {
            streams.remove(stream.key());
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.streams().iter().map(|s| s.key().clone())).finish()
    }
}

/// What names a stream in a look-up.
pub trait AsStreamKey {
    /// The whole key, `app/name`.
    fn as_stream_key(&self) -> &str;
}

impl AsStreamKey for StreamKey {
    fn as_stream_key(&self) -> &str {
        self.as_str()
    }
}

impl AsStreamKey for str {
    fn as_stream_key(&self) -> &str {
        self
    }
}

/// Another publisher is live on the key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} already has a live publisher")]
pub struct AlreadyLive(pub StreamKey);

/// The wall clock in milliseconds since 1970.
fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
