//! The streams that are live on this node: sources push tags in, sinks read them out.
//!
//! A stream is one bounded log of tags. Every sink reads it with a cursor of its own, so the log is
//! the GOP cache, the slow-viewer policy and the memory bound in one, and the publisher waits for
//! nobody: a reader that falls off the log's tail resumes at a key frame, and the skip is counted.

pub mod admission;
mod counters;
mod log;
mod reader;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::{Notify, watch};

pub use counters::Counters;
pub use log::AUDIO_JOIN_MS;
pub use reader::{Ended, MaxLag, Position, ReadCount, ReadOutcome, Reader};

use counters::Rates;
use downpour_media::{
    StreamKey,
    flv::{Headers, Tag},
};
use downpour_sys::prefetch;
use log::{Entry, TagLog};

/// All streams that are live, by key. Cloning shares them.
///
/// How many there may be is the business of whoever admits publishers; see [`Hub::len`].
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
}

struct Shared {
    streams: RwLock<HashMap<StreamKey, Arc<Stream>>>,
    limits: LogLimits,
    /// Changes whenever a stream comes up.
    ups: watch::Sender<()>,
}

/// How much of its newest media a stream keeps for those who read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// Bytes of memory, each tag's bookkeeping included. The newest tag is always kept.
    pub max_bytes: usize,
    /// Media time from the oldest to the newest tag, in milliseconds.
    pub max_age: u32,
}

impl Hub {
    /// A hub without streams, each of which will be bounded by `limits`.
    pub fn new(limits: LogLimits) -> Self {
        let shared = Shared { streams: RwLock::default(), limits, ups: watch::Sender::new(()) };
        Self { shared: Arc::new(shared) }
    }

    /// Brings a stream up whose media time 0 is now.
    ///
    /// # Errors
    /// If there is a live publisher on the key.
    pub fn publish(&self, key: StreamKey) -> Result<Publisher, AlreadyLive> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.publish_at(key, u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
    }

    /// Brings a stream up whose media time 0 was, or will be, at `start_unix_ms`.
    ///
    /// # Errors
    /// If there is a live publisher on the key.
    pub fn publish_at(&self, key: StreamKey, start_unix_ms: u64) -> Result<Publisher, AlreadyLive> {
        let stream = Arc::new(Stream::new(key.clone(), start_unix_ms, self.shared.limits));
        {
            let mut streams = self.shared.streams.write().unwrap_or_else(PoisonError::into_inner);
            if streams.contains_key(&key) {
                return Err(AlreadyLive(key));
            }
            streams.insert(key, stream.clone());
        }
        self.shared.ups.send_replace(());
        Ok(Publisher { stream, next_place: 0, hub: self.clone() })
    }

    /// The live stream of this name; takes a [`StreamKey`] or a `str`.
    pub fn stream<K: AsStreamKey + ?Sized>(&self, key: &K) -> Option<Arc<Stream>> {
        self.read().get(key.as_stream_key()).cloned()
    }

    /// All live streams, in no order.
    pub fn streams(&self) -> Vec<Arc<Stream>> {
        self.read().values().cloned().collect()
    }

    /// How many streams are live.
    pub fn len(&self) -> usize {
        self.read().len()
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
        let mut streams = self.shared.streams.write().unwrap_or_else(PoisonError::into_inner);
        if streams.get(&stream.key).is_some_and(|live| Arc::ptr_eq(live, stream)) {
            streams.remove(&stream.key);
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, HashMap<StreamKey, Arc<Stream>>> {
        self.shared.streams.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.streams().iter().map(|s| s.key.clone())).finish()
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

/// Where in memory a stream and the place of its next tag are.
#[derive(Debug, Clone, Copy)]
pub struct NextPush {
    stream: usize,
    place: usize,
}

impl NextPush {
    /// Says that a tag will be pushed there in a moment.
    #[inline]
    pub fn expect(self) {
        prefetch(self.stream, HOT_BYTES);
        prefetch(self.place, size_of::<Entry>());
    }
}

/// The one source of a stream. Dropping it ends the stream: readers drain what the log holds and
/// then see the end, and the key is free again.
#[derive(Debug)]
pub struct Publisher {
    stream: Arc<Stream>,
    /// Address of the place in the log that the next tag will have, so far as one can tell.
    next_place: usize,
    hub: Hub,
}

impl Publisher {
    /// Adds the next tag to the log and wakes the readers that wait for one. Never waits for them.
    pub fn push(&mut self, tag: Tag) {
        self.push_at(Instant::now(), tag);
    }

    /// The same, for a caller that knows what time it is: a clock is not read then.
    pub fn push_at(&mut self, now: Instant, tag: Tag) {
        self.stream.counters.count(&tag);
        self.stream.rates.count(now, &tag);
        self.stream.append(|log| {
            log.push(tag);
            self.next_place = log.next_place().addr();
        });
    }

    /// What of memory the next tag will need, so far as one can tell.
    #[inline]
    pub fn next_push(&self) -> NextPush {
        NextPush { stream: Arc::as_ptr(&self.stream).addr(), place: self.next_place }
    }

    /// Tells headers that were learned from elsewhere than the stream's tags.
    ///
    /// Before the first tag, they are what readers start with. Later, the metadata goes to the
    /// readers as a tag, and so does a codec header of a kind that was still missing; a codec
    /// header that differs from the one in effect is left to the tags, which say where it changes.
    pub fn set_headers(&mut self, metadata: Option<Tag>, video: Option<Tag>, audio: Option<Tag>) {
        self.stream.append(|log| log.set_headers(metadata, video, audio));
    }

    /// The stream that is published.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.hub.forget(&self.stream);
        self.stream.ended.store(true, Ordering::Release);
        // Whoever read the flag before it was set has this change still to see.
        self.stream.tags.send_replace(());
        self.stream.frames.send_replace(());
        self.stream.over.notify_waiters();
    }
}

/// One publication under one key.
///
/// What each tag needs is in front and together: few lines of the cache.
#[repr(C, align(64))]
pub struct Stream {
    /// Mirrors `TagLog::next`, so that a reader with nothing to read takes no lock.
    next: AtomicU64,
    /// How many read it, so that what nobody reads need not look who is to be woken.
    readers: AtomicUsize,
    rates: Rates,
    counters: Counters,
    log: RwLock<TagLog>,
    /// Changes with each tag.
    tags: watch::Sender<()>,
    /// Changes with the tags that are worth a wake of many, see [`Reader::waking_with_video`].
    frames: watch::Sender<()>,
    ended: AtomicBool,
    over: Notify,
    key: StreamKey,
    start_unix_ms: u64,
}

impl Stream {
    fn new(key: StreamKey, start_unix_ms: u64, limits: LogLimits) -> Self {
        Self {
            next: AtomicU64::new(0),
            readers: AtomicUsize::new(0),
            rates: Rates::new(),
            counters: Counters::default(),
            log: RwLock::new(TagLog::new(limits)),
            tags: watch::Sender::new(()),
            frames: watch::Sender::new(()),
            ended: AtomicBool::new(false),
            over: Notify::new(),
            key,
            start_unix_ms,
        }
    }

    /// Reads the stream from its newest group of pictures on, with any backlog that the log holds.
    pub fn subscribe(self: &Arc<Self>) -> Reader {
        Reader::new(self.clone())
    }

    /// Counts a viewer until the guard is dropped.
    pub fn viewer(self: &Arc<Self>) -> ViewerGuard {
        self.counters.viewers.fetch_add(1, Ordering::Relaxed);
        ViewerGuard(self.clone())
    }

    /// Counts tags that readers skipped, see [`Reader::try_read_each`].
    pub fn count_skipped(&self, tags: u64) {
        if tags > 0 {
            self.counters.skipped_tags.fetch_add(tags, Ordering::Relaxed);
        }
    }

    /// The stream's name.
    pub fn key(&self) -> &StreamKey {
        &self.key
    }

    /// Unix time of media time 0, in milliseconds.
    pub fn start_unix_ms(&self) -> u64 {
        self.start_unix_ms
    }

    /// Whether the publication is over; its readers may still have tags to drain.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Waits until the publication is over.
    pub async fn over(&self) {
        let over = self.over.notified();
        let mut over = std::pin::pin!(over);
        // From here on it is heard, and what came before is in the flag.
        over.as_mut().enable();
        if !self.ended() {
            over.await;
        }
    }

    /// What went through so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Bytes of video per millisecond in the last second or so; 0 when the source has stalled.
    pub fn video_speed(&self) -> u64 {
        self.rates.speed(&self.rates.video)
    }

    /// Bytes of audio per millisecond in the last second or so; 0 when the source has stalled.
    pub fn audio_speed(&self) -> u64 {
        self.rates.speed(&self.rates.audio)
    }

    /// The newest metadata and codec headers.
    pub fn headers(&self) -> Headers {
        self.read_log().headers.clone()
    }

    /// Tags and bytes that the log holds.
    pub fn held(&self) -> (usize, usize) {
        let log = self.read_log();
        (log.entries.len(), log.bytes)
    }

    fn append(&self, change: impl FnOnce(&mut TagLog)) {
        let frame = {
            let mut log = self.write_log();
            change(&mut log);
            self.next.store(log.next(), Ordering::Release);
            log.take_wake()
        };
        // A reader is counted, subscribes and then looks at `next`. With a full fence here and one
        // there, either it sees the new tag, or it is seen here. What nobody waits for costs no more
        // than this.
        fence(Ordering::SeqCst);
        if self.readers.load(Ordering::Relaxed) == 0 {
            return;
        }
        if self.tags.receiver_count() > 0 {
            self.tags.send_replace(());
        }
        if frame && self.frames.receiver_count() > 0 {
            self.frames.send_replace(());
        }
    }

    /// Hears of changes to come; what has changed before is seen in the log.
    fn hear(&self, what: &watch::Sender<()>) -> watch::Receiver<()> {
        let receiver = what.subscribe();
        // See `append`.
        fence(Ordering::SeqCst);
        receiver
    }

    fn read_log(&self) -> RwLockReadGuard<'_, TagLog> {
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_log(&self) -> RwLockWriteGuard<'_, TagLog> {
        self.log.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stream").field("key", &self.key).finish_non_exhaustive()
    }
}

/// Counts one viewer of a stream as long as it lives.
#[derive(Debug)]
pub struct ViewerGuard(Arc<Stream>);

impl ViewerGuard {
    /// The stream that is watched.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.0
    }
}

impl Drop for ViewerGuard {
    fn drop(&mut self) {
        self.0.counters.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Of a stream, what a tag needs: up to there in the log, behind the lock's two words.
const HOT_BYTES: usize =
    std::mem::offset_of!(Stream, log) + 2 * size_of::<usize>() + TagLog::HOT_BYTES;

#[cfg(test)]
mod tests;
