//! The streams that are live on this node: sources push tags in, sinks read them out.
//!
//! A stream is one bounded log of tags. Every output reads it with its own cursor: the log is the GOP
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
//! - [`Sink`] and [`Tap`] add an output, [`OnDemand`] adds a source that starts on demand.
//!
//! A sink that counts streams, and a reader:
//!
//! ```
//! use std::sync::{
//!     Arc,
//!     atomic::{AtomicU64, Ordering},
//! };
//!
//! use downpour_hub::{Hub, LogLimits, ReadOutcome, Sink, Stream, Tap};
//! use downpour_media::flv::{Tag, TagKind};
//!
//! #[derive(Default)]
//! struct StreamCounter(AtomicU64);
//!
//! impl Sink for StreamCounter {
//!     fn stream_up(&self, _stream: &Arc<Stream>) -> Option<Box<dyn Tap>> {
//!         self.0.fetch_add(1, Ordering::Relaxed);
//!         None
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let hub = Hub::new(LogLimits { max_bytes: 16 << 20, max_age: 10_000 });
//! let counter = Arc::new(StreamCounter::default());
//! hub.add_sink(counter.clone());
//!
//! let mut publisher = hub.publish("live/a".parse()?)?;
//! let key_frame = Tag::new(TagKind::Video, 0, &[0x17, 1, 0, 0, 0, 9])?;
//! publisher.push(key_frame.clone());
//! assert_eq!(counter.0.load(Ordering::Relaxed), 1);
//!
//! let mut reader = hub.subscribe("live/a").ok_or("not live")?;
//! let mut tags = Vec::new();
//! assert!(matches!(reader.try_read(&mut tags, usize::MAX), ReadOutcome::Read(_)));
//! assert_eq!(tags, [key_frame]);
//!
//! drop(publisher);
//! assert_eq!(reader.try_read(&mut tags, usize::MAX), ReadOutcome::Ended);
//! # Ok(())
//! # }
//! ```

pub mod admission;
mod claims;
mod counters;
mod cursors;
mod log;
mod on_demand;
mod reader;
mod sink;
mod splice;
mod stream;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
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
    /// Changes when a stream starts.
    ups: watch::Sender<()>,
    ended: AtomicU64,
}

/// How much of its newest media a stream keeps for its readers.
///
/// These are limits for slow readers. A stream whose readers keep up, or that has none, keeps its newest
/// group of pictures only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of memory, each tag's bookkeeping included. The newest tag is always kept.
    pub max_bytes: usize,
    /// Media time from the oldest to the newest tag, in milliseconds.
    pub max_age: u32,
}

/// Identity, start time and headers of a publication when it starts.
#[derive(Debug, Clone)]
pub struct PublicationInfo {
    /// Its id, the same at each node that it passes.
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
            ended: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Registers an output for the streams that start from now on. Taps get each tag in the order in
    /// which their sinks were added.
    pub fn add_sink(&self, sink: Arc<dyn Sink>) {
        self.shared.sinks.write().push(sink);
    }

    /// Registers a source that starts when a stream is asked for. It is called for the streams that are
    /// wanted already.
    pub fn add_on_demand(&self, source: Arc<dyn OnDemand>) {
        self.shared.demand.add(source);
    }

    /// Asks sources that start on demand for the stream, until the guard is dropped.
    pub fn want(&self, key: &StreamKey) -> Wanted {
        self.shared.demand.want(key)
    }

    /// Starts a stream whose media time 0 is now.
    ///
    /// # Errors
    /// If the key is taken.
    pub fn publish(&self, key: StreamKey) -> Result<Publisher, AlreadyLive> {
        self.publish_with(key, PublicationInfo::starting_at(unix_ms()))
    }

    /// Starts a stream without admission. Encoders publish through [`Admission`].
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
        // The publisher comes first: should a sink panic, dropping it takes the stream out again.
        let mut publisher = Publisher::new(stream, self.clone(), claim);
        let sinks = self.shared.sinks.read().clone();
        sinks.iter().for_each(|sink| publisher.add_tap_of(&**sink));
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

    /// Number of live streams.
    pub fn len(&self) -> usize {
        self.shared.streams.read().len()
    }

    /// `true` if no stream is live.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of streams that have ended since the start.
    pub fn streams_ended(&self) -> u64 {
        self.shared.ended.load(Ordering::Relaxed)
    }

    /// A reader of the live stream of this name, from its newest group of pictures on.
    pub fn subscribe<K: AsStreamKey + ?Sized>(&self, key: &K) -> Option<Reader> {
        self.stream(key).map(|stream| stream.subscribe())
    }

    /// Waits for a stream of this name to start; `None` if it has not by `deadline`.
    pub async fn wait_for<K: AsStreamKey + ?Sized>(
        &self,
        key: &K,
        deadline: tokio::time::Instant,
    ) -> Option<Arc<Stream>> {
        // Subscribed before the look-up, so that a stream that starts between the two is not missed.
        let mut ups = self.shared.ups.subscribe();
        loop {
            if let Some(stream) = self.stream(key) {
                return Some(stream);
            }
            tokio::time::timeout_at(deadline, ups.changed()).await.ok()?.ok()?;
        }
    }

    fn forget(&self, stream: &Arc<Stream>) {
        self.shared.ended.fetch_add(1, Ordering::Relaxed);
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

/// A type that names a stream in a look-up.
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
