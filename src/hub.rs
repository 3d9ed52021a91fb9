//! The streams that are live on this node: sources push tags in, sinks read them out.
//!
//! A stream is one bounded log of tags. Every sink reads it with a cursor of its own, so the log is
//! the GOP cache, the slow-viewer policy and the memory bound in one, and the publisher waits for
//! nobody: a reader that falls off the log's tail resumes at a key frame, and the skip is counted.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    sync::{
        Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::watch;

use crate::{
    StreamKey,
    flv::{Headers, Tag, TagKind},
};

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
        Ok(Publisher { stream, hub: self.clone() })
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

/// The one source of a stream. Dropping it ends the stream: readers drain what the log holds and
/// then see the end, and the key is free again.
#[derive(Debug)]
pub struct Publisher {
    stream: Arc<Stream>,
    hub: Hub,
}

impl Publisher {
    /// Adds the next tag to the log and wakes the readers that wait for one. Never waits for them.
    pub fn push(&mut self, tag: Tag) {
        self.stream.counters.count(&tag);
        self.stream.rates.count(&tag);
        self.stream.append(|log| log.push(tag));
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
        self.stream.wake.send_replace(());
    }
}

/// One publication under one key.
pub struct Stream {
    key: StreamKey,
    start_unix_ms: u64,
    log: RwLock<Log>,
    /// Mirrors `Log::next`, so that a reader with nothing to read takes no lock.
    next: AtomicU64,
    ended: AtomicBool,
    wake: watch::Sender<()>,
    counters: Counters,
    rates: Rates,
}

impl Stream {
    fn new(key: StreamKey, start_unix_ms: u64, limits: LogLimits) -> Self {
        Self {
            key,
            start_unix_ms,
            log: RwLock::new(Log::new(limits)),
            next: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            wake: watch::Sender::new(()),
            counters: Counters::default(),
            rates: Rates::new(),
        }
    }

    /// Reads the stream from its newest group of pictures on, with any backlog that the log holds.
    pub fn subscribe(self: &Arc<Self>) -> Reader {
        Reader {
            wake: self.wake.subscribe(),
            stream: self.clone(),
            backlog: Backlog::UNLIMITED,
            cursor: 0,
            phase: Phase::Joining,
            headers_version: 0,
        }
    }

    /// Counts a viewer until the guard is dropped.
    pub fn viewer(self: &Arc<Self>) -> ViewerGuard {
        self.counters.viewers.fetch_add(1, Ordering::Relaxed);
        ViewerGuard(self.clone())
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

    fn append(&self, change: impl FnOnce(&mut Log)) {
        {
            let mut log = self.write_log();
            change(&mut log);
            self.next.store(log.next(), Ordering::Release);
        }
        self.wake.send_replace(());
    }

    fn read_log(&self) -> RwLockReadGuard<'_, Log> {
        self.log.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_log(&self) -> RwLockWriteGuard<'_, Log> {
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

impl Drop for ViewerGuard {
    fn drop(&mut self) {
        self.0.counters.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What went through a stream. Bytes are those of tag bodies.
#[derive(Debug, Default)]
pub struct Counters {
    /// Video tags pushed, headers included.
    pub video_tags: AtomicU64,
    /// Bytes of video.
    pub video_bytes: AtomicU64,
    /// Audio tags pushed, headers included.
    pub audio_tags: AtomicU64,
    /// Bytes of audio.
    pub audio_bytes: AtomicU64,
    /// Script tags pushed.
    pub script_tags: AtomicU64,
    /// Key frames pushed.
    pub key_frames: AtomicU64,
    /// Viewers now.
    pub viewers: AtomicU64,
    /// Tags that readers skipped because they were too slow, summed over all readers.
    pub skipped_tags: AtomicU64,
}

impl Counters {
    fn count(&self, tag: &Tag) {
        let (tags, bytes) = match tag.kind() {
            TagKind::Video => (&self.video_tags, &self.video_bytes),
            TagKind::Audio => (&self.audio_tags, &self.audio_bytes),
            TagKind::Script => {
                self.script_tags.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
        tags.fetch_add(1, Ordering::Relaxed);
        bytes.fetch_add(tag.body().len() as u64, Ordering::Relaxed);
        if tag.is_key_frame() {
            self.key_frames.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Bytes per millisecond over windows of [`RATE_WINDOW_MS`]. Only the publisher writes.
struct Rates {
    epoch: Instant,
    /// When the window that is being filled began, in milliseconds since `epoch`.
    window_start: AtomicU64,
    video: Rate,
    audio: Rate,
}

#[derive(Default)]
struct Rate {
    window_bytes: AtomicU64,
    speed: AtomicU64,
}

impl Rates {
    fn new() -> Self {
        Self {
            epoch: Instant::now(),
            window_start: AtomicU64::new(0),
            video: Rate::default(),
            audio: Rate::default(),
        }
    }

    fn count(&self, tag: &Tag) {
        let rate = match tag.kind() {
            TagKind::Video => &self.video,
            TagKind::Audio => &self.audio,
            TagKind::Script => return,
        };
        let now = self.now();
        let elapsed = now.saturating_sub(self.window_start.load(Ordering::Relaxed));
        if elapsed >= RATE_WINDOW_MS {
            for rate in [&self.video, &self.audio] {
                let bytes = rate.window_bytes.swap(0, Ordering::Relaxed);
                rate.speed.store(bytes / elapsed, Ordering::Relaxed);
            }
            self.window_start.store(now, Ordering::Relaxed);
        }
        rate.window_bytes.fetch_add(tag.body().len() as u64, Ordering::Relaxed);
    }

    fn speed(&self, rate: &Rate) -> u64 {
        let elapsed = self.now().saturating_sub(self.window_start.load(Ordering::Relaxed));
        if elapsed > RATE_STALE_MS { 0 } else { rate.speed.load(Ordering::Relaxed) }
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_millis() as u64
    }
}

/// How far a reader may fall behind the newest tag before it skips to the newest key frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Bytes between the reader and the newest tag, bookkeeping included.
    pub max_bytes: u64,
    /// Media time between the reader and the newest tag, in milliseconds.
    pub max_ms: u64,
}

impl Backlog {
    /// As far as the log reaches.
    pub const UNLIMITED: Self = Self { max_bytes: u64::MAX, max_ms: u64::MAX };
}

/// A sink's cursor in a stream's log.
///
/// It starts at the newest group of pictures with the headers in effect there in front of it
/// (metadata, video, audio; at the time of the group's first tag). A stream that has video but no
/// key frame in the log is waited for; a stream without video is joined at most
/// [`AUDIO_JOIN_MS`] back.
#[derive(Debug)]
pub struct Reader {
    stream: Arc<Stream>,
    wake: watch::Receiver<()>,
    backlog: Backlog,
    /// Index in the log of the next tag to read.
    cursor: u64,
    phase: Phase,
    /// Which headers this reader has been given last.
    headers_version: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Has not read anything yet.
    Joining,
    /// Lost its place; resumes at the first join point that is not behind the cursor.
    Resuming,
    /// Reads on. Without a key frame before the cursor, other video frames are left out.
    Reading { key_frame_seen: bool },
}

/// What one call of [`Reader::try_read`] came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOutcome {
    /// At least one tag was appended.
    Read(ReadCount),
    /// Nothing to read now.
    Pending,
    /// The stream is over and everything has been read.
    Ended,
}

/// What one read appended, and what it had to leave out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadCount {
    /// Tags appended, headers included.
    pub tags: usize,
    /// Their bytes, framed.
    pub bytes: usize,
    /// Tags that were skipped before them, because this reader was too slow.
    pub skipped: u64,
}

/// The stream is over and everything has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream has ended")]
pub struct Ended;

impl Reader {
    /// Sets how far this reader may fall behind.
    pub fn with_backlog(mut self, backlog: Backlog) -> Self {
        self.backlog = backlog;
        self
    }

    /// Appends the next tags to `out`: headers and one tag at least, then on while `out` has
    /// gained less than `max_bytes` bytes. A skip appends the headers again if they have changed.
    pub fn try_read(&mut self, out: &mut impl Extend<Tag>, max_bytes: usize) -> ReadOutcome {
        // Read before the log is: an end that is seen here has all tags in front of it.
        let ended = self.stream.ended();
        if !ended && self.stream.next.load(Ordering::Acquire) == self.cursor {
            return ReadOutcome::Pending;
        }
        let log = self.stream.read_log();
        let mut count = ReadCount::default();
        let mut emit = |tag: &Tag, count: &mut ReadCount| {
            count.tags += 1;
            count.bytes += tag.framed().len();
            out.extend(std::iter::once(tag.clone()));
        };

        if self.cursor < log.first && self.phase != Phase::Joining {
            self.phase = Phase::Resuming;
        }
        let join = log.join.as_ref().filter(|join| match self.phase {
            Phase::Joining => true,
            Phase::Resuming => join.index >= self.cursor,
            Phase::Reading { .. } => {
                join.index > self.cursor && log.backlog_exceeds(self.cursor, self.backlog)
            }
        });
        if let Some(join) = join {
            if self.phase != Phase::Joining {
                count.skipped = join.index - self.cursor;
            }
            if self.phase == Phase::Joining || self.headers_version != join.headers_version {
                let headers = &join.headers;
                for tag in [&headers.metadata, &headers.video, &headers.audio].into_iter().flatten()
                {
                    emit(tag, &mut count);
                }
            }
            self.cursor = join.index;
            self.phase = Phase::Reading { key_frame_seen: join.key_frame };
        }
        if let Phase::Reading { mut key_frame_seen } = self.phase {
            let start = usize::try_from(self.cursor - log.first).unwrap_or(usize::MAX);
            let mut tags = 0;
            for entry in log.entries.range(start.min(log.entries.len())..) {
                if tags > 0 && count.bytes >= max_bytes {
                    break;
                }
                self.cursor += 1;
                self.headers_version = entry.headers_version;
                if !key_frame_seen && entry.tag.kind() == TagKind::Video {
                    key_frame_seen = entry.tag.is_key_frame();
                    if !key_frame_seen && !entry.tag.is_sequence_header() {
                        continue;
                    }
                }
                emit(&entry.tag, &mut count);
                tags += 1;
            }
            self.phase = Phase::Reading { key_frame_seen };
        } else if ended {
            // It will not resume any more.
            if self.phase == Phase::Resuming {
                count.skipped = log.next() - self.cursor;
            }
            self.cursor = log.next();
        }
        if count.skipped > 0 {
            self.stream.counters.skipped_tags.fetch_add(count.skipped, Ordering::Relaxed);
        }
        match (count.tags, ended) {
            (0, true) => ReadOutcome::Ended,
            (0, false) => ReadOutcome::Pending,
            _ => ReadOutcome::Read(count),
        }
    }

    /// Waits until there is something to read and then reads it as [`Reader::try_read`] does.
    /// Cancel-safe: a future that is dropped has taken nothing.
    ///
    /// # Errors
    /// [`Ended`] once the stream is over and everything has been read.
    pub async fn read(
        &mut self,
        out: &mut impl Extend<Tag>,
        max_bytes: usize,
    ) -> Result<ReadCount, Ended> {
        loop {
            match self.try_read(out, max_bytes) {
                ReadOutcome::Read(count) => return Ok(count),
                ReadOutcome::Ended => return Err(Ended),
                // The sender lives in the stream that this reader holds.
                ReadOutcome::Pending => self.wake.changed().await.map_err(|_| Ended)?,
            }
        }
    }

    /// The stream that is read.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }
}

/// The newest tags of a stream, and where in them a reader can begin.
struct Log {
    limits: LogLimits,
    entries: VecDeque<Entry>,
    /// Index of the oldest entry, counted from the publication's first tag.
    first: u64,
    /// Sum of [`Entry::cost`].
    bytes: usize,
    /// Sum of [`Entry::cost`] of all tags ever pushed.
    total: u64,
    /// Readers only ever go to the newest place; `None` once that has left the log.
    join: Option<Join>,
    headers: Headers,
    headers_version: u64,
    clock: MediaClock,
    /// Media time of the newest sign of video.
    last_video: Option<u64>,
}

struct Entry {
    tag: Tag,
    /// [`Log::total`] before this tag.
    offset: u64,
    /// Media time, see [`MediaClock`].
    at: u64,
    /// The headers in effect once this tag has been read.
    headers_version: u64,
}

/// A place where a reader can begin: a key frame, or an audio tag in a stream without video.
struct Join {
    index: u64,
    at: u64,
    key_frame: bool,
    /// The headers in effect, at the time of the tag at `index`: made once for all readers.
    headers: Headers,
    headers_version: u64,
}

impl Log {
    fn new(limits: LogLimits) -> Self {
        Self {
            limits,
            entries: VecDeque::new(),
            first: 0,
            bytes: 0,
            total: 0,
            join: None,
            headers: Headers::default(),
            headers_version: 0,
            clock: MediaClock::default(),
            last_video: None,
        }
    }

    fn push(&mut self, tag: Tag) {
        let at = self.clock.advance(tag.timestamp());
        if tag.kind() == TagKind::Video {
            self.saw_video(at);
        }
        if tag.is_header() {
            self.learn(&tag);
        } else if tag.is_key_frame() || self.starts_audio_join(&tag, at) {
            self.join_here(&tag, at);
        }
        let entry = Entry { offset: self.total, at, headers_version: self.headers_version, tag };
        self.bytes += entry.cost();
        self.total += entry.cost() as u64;
        self.entries.push_back(entry);
        self.trim(at);
    }

    fn set_headers(&mut self, metadata: Option<Tag>, video: Option<Tag>, audio: Option<Tag>) {
        let Some(newest) = self.entries.back() else {
            if video.is_some() {
                self.saw_video(self.clock.now);
            }
            for tag in [metadata, video, audio].into_iter().flatten() {
                self.learn(&tag);
            }
            return;
        };
        let timestamp = newest.tag.timestamp();
        let changed = |known: &Option<Tag>, tag: &Tag| {
            known.as_ref().is_none_or(|known| known.body() != tag.body())
        };
        let metadata = metadata.filter(|tag| changed(&self.headers.metadata, tag));
        let video = video.filter(|_| self.headers.video.is_none());
        let audio = audio.filter(|_| self.headers.audio.is_none());
        for tag in [metadata, video, audio].into_iter().flatten() {
            self.push(tag.with_timestamp(timestamp));
        }
    }

    /// Makes `tag` the header of its kind.
    fn learn(&mut self, tag: &Tag) {
        let slot = match tag.kind() {
            TagKind::Video => &mut self.headers.video,
            TagKind::Audio => &mut self.headers.audio,
            TagKind::Script => &mut self.headers.metadata,
        };
        // Many encoders repeat their headers in front of each key frame.
        if slot.as_ref().is_none_or(|known| known.body() != tag.body()) {
            *slot = Some(tag.clone());
            self.headers_version += 1;
        }
    }

    fn saw_video(&mut self, at: u64) {
        if !self.has_video(at) {
            // From here on, only a key frame is a place to begin.
            self.join = None;
        }
        self.last_video = Some(at);
    }

    fn has_video(&self, at: u64) -> bool {
        self.last_video.is_some_and(|last| at - last <= AUDIO_ONLY_AFTER_MS)
    }

    fn starts_audio_join(&self, tag: &Tag, at: u64) -> bool {
        tag.kind() == TagKind::Audio
            && !self.has_video(at)
            && self.join.as_ref().is_none_or(|join| at - join.at >= AUDIO_JOIN_MS)
    }

    fn join_here(&mut self, tag: &Tag, at: u64) {
        let timed = |header: &Option<Tag>| {
            header.as_ref().map(|header| header.with_timestamp(tag.timestamp()))
        };
        self.join = Some(Join {
            index: self.next(),
            at,
            key_frame: tag.kind() == TagKind::Video,
            headers: Headers {
                metadata: timed(&self.headers.metadata),
                video: timed(&self.headers.video),
                audio: timed(&self.headers.audio),
            },
            headers_version: self.headers_version,
        });
    }

    fn trim(&mut self, now: u64) {
        while self.entries.len() > 1
            && self.entries.front().is_some_and(|oldest| {
                self.bytes > self.limits.max_bytes
                    || now - oldest.at > u64::from(self.limits.max_age)
            })
        {
            if let Some(oldest) = self.entries.pop_front() {
                self.bytes -= oldest.cost();
                self.first += 1;
            }
        }
        if self.join.as_ref().is_some_and(|join| join.index < self.first) {
            self.join = None;
        }
    }

    /// Index of the tag that will be pushed next.
    fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Whether more lies between `cursor`, which the log holds, and the newest tag.
    fn backlog_exceeds(&self, cursor: u64, backlog: Backlog) -> bool {
        let index = usize::try_from(cursor.saturating_sub(self.first)).unwrap_or(usize::MAX);
        self.entries.get(index).is_some_and(|entry| {
            self.total - entry.offset > backlog.max_bytes
                || self.clock.now - entry.at > backlog.max_ms
        })
    }
}

impl Entry {
    /// Bytes charged against the log's bound: a peer that sends empty tags fills memory, too.
    fn cost(&self) -> usize {
        self.tag.framed().len() + ENTRY_OVERHEAD
    }
}

/// Media time that only grows: milliseconds from the first tag on, whatever the timestamps do.
///
/// Audio and video interleave a little out of order, timestamps wrap at 2³², and encoders restart
/// or jump; none of that may make a log forget everything, or nothing.
#[derive(Default)]
struct MediaClock {
    newest: Option<u32>,
    now: u64,
}

impl MediaClock {
    fn advance(&mut self, timestamp: u32) -> u64 {
        let newest = *self.newest.get_or_insert(timestamp);
        let step = timestamp.wrapping_sub(newest) as i32;
        if step > 0 {
            self.now += u64::from(step.unsigned_abs()).min(MAX_CLOCK_STEP_MS);
        }
        // A little backwards is interleaving; far backwards is a new start.
        if !(-MAX_INTERLEAVE_MS..=0).contains(&step) {
            self.newest = Some(timestamp);
        }
        self.now
    }
}

/// How far back a stream without video is joined, in milliseconds of media time.
pub const AUDIO_JOIN_MS: u64 = 500;

/// A stream that sent video before counts as one without after this much media time.
const AUDIO_ONLY_AFTER_MS: u64 = 10_000;
/// The most that one tag moves the media clock.
const MAX_CLOCK_STEP_MS: u64 = 10_000;
/// How far audio and video may be apart in the order of arrival.
const MAX_INTERLEAVE_MS: i32 = 5_000;
/// An entry, its tag's reference count and the allocator's share, about.
const ENTRY_OVERHEAD: usize = 128;
const RATE_WINDOW_MS: u64 = 1_000;
const RATE_STALE_MS: u64 = 5_000;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn a_reader_starts_at_the_newest_gop_with_the_headers_in_effect_there() {
        let hub = hub();
        let mut publisher = hub.publish(key()).unwrap();
        for tag in [
            script(0, 1),
            video_header(0, 1),
            audio_header(0, 1),
            key_frame(0, 1),
            inter(40, 2),
            video_header(80, 2),
            key_frame(80, 3),
            audio(90, 4),
            video_header(120, 3),
            inter(120, 5),
        ] {
            publisher.push(tag);
        }
        let mut reader = hub.subscribe("live/movie").unwrap();
        assert_eq!(
            drain(&mut reader),
            [
                script(80, 1),
                video_header(80, 2),
                audio_header(80, 1),
                key_frame(80, 3),
                audio(90, 4),
                video_header(120, 3),
                inter(120, 5),
            ]
        );
        assert_eq!(reader.try_read(&mut Vec::new(), 1), ReadOutcome::Pending);
    }

    #[test]
    fn video_without_a_key_frame_is_waited_for() {
        let hub = hub();
        let mut publisher = hub.publish(key()).unwrap();
        let mut early = hub.subscribe(&key()).unwrap();
        publisher.set_headers(None, Some(video_header(0, 1)), Some(audio_header(0, 1)));
        publisher.push(audio(0, 1));
        publisher.push(inter(5, 2));
        assert_eq!(early.try_read(&mut Vec::new(), 1), ReadOutcome::Pending);
        publisher.push(key_frame(10, 3));
        let expected = [video_header(10, 1), audio_header(10, 1), key_frame(10, 3)];
        assert_eq!(drain(&mut early), expected);
        assert_eq!(drain(&mut hub.subscribe(&key()).unwrap()), expected);
    }

    #[test]
    fn a_stream_without_video_is_joined_a_little_back() {
        let hub = hub();
        let mut publisher = hub.publish(key()).unwrap();
        publisher.push(audio_header(0, 1));
        for i in 0..100 {
            publisher.push(audio(i * 23, i as u8));
        }
        let tags = drain(&mut hub.subscribe(&key()).unwrap());
        assert_eq!(tags[0], audio_header(tags[1].timestamp(), 1));
        assert!((1..=500).contains(&(99 * 23 - tags[1].timestamp())), "{tags:?}");
        assert_eq!(tags.last(), Some(&audio(99 * 23, 99)));
    }

    #[test]
    fn a_reader_that_began_with_audio_gets_no_frames_before_a_key_frame() {
        let hub = hub();
        let mut publisher = hub.publish(key()).unwrap();
        let mut reader = hub.subscribe(&key()).unwrap();
        publisher.push(audio(0, 1));
        assert_eq!(drain(&mut reader), [audio(0, 1)]);
        publisher.push(inter(10, 2));
        publisher.push(video_header(20, 1));
        publisher.push(inter(30, 3));
        publisher.push(key_frame(40, 4));
        publisher.push(inter(50, 5));
        assert_eq!(drain(&mut reader), [video_header(20, 1), key_frame(40, 4), inter(50, 5)]);
    }

    #[test]
    fn a_reader_over_its_backlog_skips_to_the_newest_key_frame_and_is_counted() {
        let hub = hub();
        let mut publisher = hub.publish(key()).unwrap();
        publisher.push(video_header(0, 1));
        publisher.push(key_frame(0, 0));
        let limit = Backlog { max_ms: 100, ..Backlog::UNLIMITED };
        let mut reader = hub.subscribe(&key()).unwrap().with_backlog(limit);
        assert_eq!(drain(&mut reader).len(), 2);
        for i in 1..=4 {
            publisher.push(inter(i * 40, i as u8));
        }
        // Over the limit, but there is no key frame ahead to skip to.
        assert!(matches!(
            reader.try_read(&mut Vec::new(), 1),
            ReadOutcome::Read(ReadCount { tags: 1, skipped: 0, .. })
        ));
        publisher.push(key_frame(200, 9));
        let mut out = Vec::new();
        let outcome = reader.try_read(&mut out, usize::MAX);
        assert!(matches!(outcome, ReadOutcome::Read(ReadCount { skipped: 3, tags: 1, .. })));
        assert_eq!(out, [key_frame(200, 9)]);
        assert_eq!(publisher.stream().counters().skipped_tags.load(Ordering::Relaxed), 3);
    }

    #[test]
    fn a_gop_longer_than_the_log_leaves_readers_waiting_for_the_next_key_frame() {
        let hub = Hub::new(LogLimits { max_bytes: 10 * (ENTRY_OVERHEAD + 22), max_age: 60_000 });
        let mut publisher = hub.publish(key()).unwrap();
        publisher.push(key_frame(0, 0));
        let (mut fast, mut slow) = (hub.subscribe(&key()).unwrap(), hub.subscribe(&key()).unwrap());
        drain(&mut fast);
        drain(&mut slow);
        for i in 1..=50 {
            publisher.push(inter(i * 40, i as u8));
            assert_eq!(drain(&mut fast), [inter(i * 40, i as u8)]);
        }
        let (tags, bytes) = publisher.stream().held();
        assert!(tags <= 10 && bytes <= 10 * (ENTRY_OVERHEAD + 22));
        let mut late = hub.subscribe(&key()).unwrap();
        assert_eq!(drain(&mut late), []);
        assert_eq!(drain(&mut slow), []);
        publisher.push(key_frame(3000, 51));
        for reader in [&mut fast, &mut slow, &mut late] {
            assert_eq!(drain(reader), [key_frame(3000, 51)]);
        }
        assert_eq!(publisher.stream().counters().skipped_tags.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn age_is_media_time_across_the_wrap_and_across_jumps() {
        let hub = Hub::new(LogLimits { max_bytes: usize::MAX, max_age: 1_000 });
        let mut publisher = hub.publish(key()).unwrap();
        let start = u32::MAX - 990;
        for i in 0..100 {
            publisher.push(audio(start.wrapping_add(i * 20), 0));
        }
        assert_eq!(publisher.stream().held().0, 51);
        // An encoder that starts over from 0 and one whose clock jumps forget at most the past.
        publisher.push(audio(0, 1));
        publisher.push(audio(20, 2));
        assert_eq!(publisher.stream().held().0, 53);
        publisher.push(audio(4_000_000, 3));
        publisher.push(audio(4_000_020, 4));
        assert_eq!(publisher.stream().held().0, 2);
    }

    #[test]
    fn one_publisher_at_a_time_and_readers_drain_before_the_end() {
        let hub = hub();
        let mut publisher = hub.publish(key()).unwrap();
        assert_eq!(hub.publish(key()).err(), Some(AlreadyLive(key())));
        publisher.push(key_frame(0, 1));
        let mut reader = hub.subscribe(&key()).unwrap();
        let mut late = publisher.stream().subscribe();
        drop(publisher);
        assert!(hub.stream(&key()).is_none());
        let _second = hub.publish(key()).unwrap();
        for reader in [&mut reader, &mut late] {
            assert_eq!(drain(reader), [key_frame(0, 1)]);
            assert_eq!(reader.try_read(&mut Vec::new(), 1), ReadOutcome::Ended);
        }
        assert_eq!(hub.len(), 1);
    }

    #[test]
    fn headers_told_after_the_first_tag_go_to_running_readers() {
        let hub = hub();
        let mut publisher = hub.publish(key()).unwrap();
        publisher.push(video_header(0, 1));
        publisher.push(key_frame(7, 1));
        let mut reader = hub.subscribe(&key()).unwrap();
        drain(&mut reader);
        publisher.set_headers(
            Some(script(0, 1)),
            Some(video_header(0, 2)),
            Some(audio_header(0, 1)),
        );
        publisher.set_headers(Some(script(0, 1)), None, None);
        assert_eq!(drain(&mut reader), [script(7, 1), audio_header(7, 1)]);
        assert_eq!(publisher.stream().headers().video, Some(video_header(0, 1)));
    }

    #[tokio::test]
    async fn readers_and_early_viewers_are_woken() {
        let hub = hub();
        let soon = tokio::time::Instant::now() + Duration::from_millis(20);
        assert!(hub.wait_for("live/movie", soon).await.is_none());
        let far = tokio::time::Instant::now() + Duration::from_secs(20);
        let waiting = tokio::spawn({
            let hub = hub.clone();
            async move {
                let mut reader = hub.wait_for("live/movie", far).await.unwrap().subscribe();
                let mut out = Vec::new();
                while reader.read(&mut out, usize::MAX).await.is_ok() {}
                out
            }
        });
        let mut publisher = hub.publish(key()).unwrap();
        publisher.push(key_frame(0, 1));
        tokio::task::yield_now().await;
        publisher.push(inter(40, 2));
        let holds_it = publisher.stream().clone();
        while Arc::strong_count(&holds_it) < 3 {
            tokio::task::yield_now().await;
        }
        drop(publisher);
        assert_eq!(waiting.await.unwrap(), [key_frame(0, 1), inter(40, 2)]);
    }

    proptest! {
        /// Whatever is pushed and however slowly it is read: tags come in order, gaps are reported
        /// exactly and end at a key frame, and a decoder always has the headers in effect.
        #[test]
        fn a_reader_sees_a_decodable_subsequence(
            ops in vec(op(), 1..300),
            max_tags in 4usize..40,
            max_ms in 50u64..4_000,
            start in any::<u32>(),
        ) {
            let limits =
                LogLimits { max_bytes: max_tags * (ENTRY_OVERHEAD + 24), max_age: 3_000 };
            let hub = Hub::new(limits);
            let mut publisher = Some(hub.publish(key()).unwrap());
            let mut slow = Model::new(
                hub.subscribe(&key()).unwrap()
                    .with_backlog(Backlog { max_ms, ..Backlog::UNLIMITED }),
            );
            let mut fast = Model::new(hub.subscribe(&key()).unwrap());
            let mut pushed = Vec::new();
            let mut timestamp = start;
            for op in ops {
                match op {
                    Op::Push(what, step) => {
                        timestamp = timestamp.wrapping_add(step);
                        let tag = match what {
                            0 => video_header(timestamp, (step % 3) as u8),
                            1 => audio_header(timestamp, (step % 3) as u8),
                            2 => script(timestamp, (step % 3) as u8),
                            3 | 4 => key_frame(timestamp, 0),
                            5..9 => audio(timestamp, 0),
                            _ => inter(timestamp, 0),
                        };
                        pushed.push(tag.clone());
                        if let Some(publisher) = &mut publisher {
                            publisher.push(tag);
                        }
                        fast.read(&pushed, usize::MAX);
                        prop_assert_eq!(fast.skipped, 0);
                    }
                    Op::Read(bytes) => slow.read(&pushed, bytes),
                }
            }
            drop(publisher.take());
            for model in [&mut slow, &mut fast] {
                model.read(&pushed, usize::MAX);
                prop_assert_eq!(model.reader.try_read(&mut Vec::new(), 1), ReadOutcome::Ended);
                prop_assert_eq!(model.reader.cursor as usize, pushed.len());
                if !model.lost {
                    model.read(&pushed, 1);
                }
            }
        }
    }

    /// Follows a reader in the list of all tags that were pushed.
    struct Model {
        reader: Reader,
        next: Option<usize>,
        key_frame_seen: bool,
        given: Headers,
        skipped: u64,
        /// Lost its place and found none until the end.
        lost: bool,
    }

    impl Model {
        fn new(reader: Reader) -> Self {
            Self {
                reader,
                next: None,
                key_frame_seen: false,
                given: Headers::default(),
                skipped: 0,
                lost: false,
            }
        }

        fn read(&mut self, pushed: &[Tag], max_bytes: usize) {
            // Frames that nothing can decode may have followed the last tag that was given.
            let cursor = self.reader.cursor as usize;
            if let Some(next) = &mut self.next {
                assert!(pushed[*next..cursor].iter().all(|tag| {
                    !self.key_frame_seen && tag.kind() == TagKind::Video && !is_header(tag)
                }));
                *next = cursor;
            }
            let before = self.reader.stream.counters.skipped_tags.load(Ordering::Relaxed);
            let mut out = VecDeque::new();
            let ReadOutcome::Read(count) = self.reader.try_read(&mut out, max_bytes) else {
                let after = self.reader.stream.counters.skipped_tags.load(Ordering::Relaxed);
                self.lost |= after > before;
                return;
            };
            assert_eq!(count.tags, out.len());
            assert_eq!(count.bytes, out.iter().map(|tag| tag.framed().len()).sum::<usize>());
            self.skipped += count.skipped;
            if self.next.is_none() || count.skipped > 0 {
                while out.front().is_some_and(is_header) {
                    note(&mut self.given, &out.pop_front().unwrap());
                }
                let resume = out.front().expect("headers never come alone");
                self.key_frame_seen = resume.is_key_frame();
                let index = pushed.iter().rposition(|tag| same(tag, resume)).unwrap();
                if let Some(next) = self.next {
                    assert_eq!(index as u64, next as u64 + count.skipped);
                }
                assert!(
                    resume.is_key_frame()
                        || pushed[..index].iter().all(|tag| tag.kind() != TagKind::Video)
                        || video_is_long_ago(&pushed[..=index])
                );
                self.next = Some(index);
            }
            let mut next = self.next.unwrap();
            for tag in out {
                while !same(&pushed[next], &tag) {
                    assert!(!self.key_frame_seen, "{tag:?} where {:?} was due", pushed[next]);
                    assert!(pushed[next].kind() == TagKind::Video && !is_header(&pushed[next]));
                    next += 1;
                }
                self.key_frame_seen |= tag.is_key_frame();
                if is_header(&tag) {
                    note(&mut self.given, &tag);
                } else {
                    let mut due = Headers::default();
                    pushed[..next].iter().filter(|tag| is_header(tag)).for_each(|tag| {
                        note(&mut due, tag);
                    });
                    for (given, due) in [
                        (&self.given.video, due.video),
                        (&self.given.audio, due.audio),
                        (&self.given.metadata, due.metadata),
                    ] {
                        assert_eq!(
                            given.as_ref().map(|tag| tag.body()),
                            due.as_ref().map(|tag| tag.body())
                        );
                    }
                }
                next += 1;
            }
            self.next = Some(next);
        }
    }

    #[derive(Debug, Clone)]
    enum Op {
        Push(u8, u32),
        Read(usize),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0u8..16, 0u32..200).prop_map(|(what, step)| Op::Push(what, step)),
            1 => (1usize..400).prop_map(Op::Read),
        ]
    }

    /// The same tag, not an equal one: the log shares memory with what was pushed.
    fn same(a: &Tag, b: &Tag) -> bool {
        a.framed().as_ptr() == b.framed().as_ptr()
    }

    fn is_header(tag: &Tag) -> bool {
        tag.is_header()
    }

    fn video_is_long_ago(tags: &[Tag]) -> bool {
        let at = tags.last().map_or(0, Tag::timestamp);
        tags.iter()
            .rfind(|tag| tag.kind() == TagKind::Video)
            .is_some_and(|tag| u64::from(at.wrapping_sub(tag.timestamp())) > AUDIO_ONLY_AFTER_MS)
    }

    fn note(headers: &mut Headers, tag: &Tag) {
        match tag.kind() {
            TagKind::Video => headers.video = Some(tag.clone()),
            TagKind::Audio => headers.audio = Some(tag.clone()),
            TagKind::Script => headers.metadata = Some(tag.clone()),
        }
    }

    fn drain(reader: &mut Reader) -> Vec<Tag> {
        let mut out = Vec::new();
        while let ReadOutcome::Read(_) = reader.try_read(&mut out, 1) {}
        out
    }

    fn hub() -> Hub {
        Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 60_000 })
    }

    fn key() -> StreamKey {
        "live/movie".parse().unwrap()
    }

    fn video_header(timestamp: u32, id: u8) -> Tag {
        Tag::new(TagKind::Video, timestamp, &[0x17, 0, 0, 0, 0, id]).unwrap()
    }

    fn audio_header(timestamp: u32, id: u8) -> Tag {
        Tag::new(TagKind::Audio, timestamp, &[0xaf, 0, id]).unwrap()
    }

    fn script(timestamp: u32, id: u8) -> Tag {
        let body = [&b"\x02\x00\x0aonMetaData"[..], &[id]].concat();
        Tag::new(TagKind::Script, timestamp, &body).unwrap()
    }

    fn key_frame(timestamp: u32, id: u8) -> Tag {
        Tag::new(TagKind::Video, timestamp, &[0x17, 1, 0, 0, 0, id]).unwrap()
    }

    fn inter(timestamp: u32, id: u8) -> Tag {
        Tag::new(TagKind::Video, timestamp, &[0x27, 1, 0, 0, 0, id]).unwrap()
    }

    fn audio(timestamp: u32, id: u8) -> Tag {
        Tag::new(TagKind::Audio, timestamp, &[0xaf, 1, id]).unwrap()
    }
}
