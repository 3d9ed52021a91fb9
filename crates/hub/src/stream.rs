//! One live stream, and the publisher that feeds it.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    },
    time::Instant,
};

use parking_lot::{RwLock, RwLockReadGuard};
use tokio::sync::{Notify, watch};

use crate::{
    Hub, LogLimits, PublicationInfo, Reader, Tap,
    claims::Claim,
    counters::{Counters, Rates},
    log::{Entry, TagLog},
};
use downpour_media::{
    PublicationId, StreamKey,
    flv::{Headers, Tag},
};
use downpour_sys::prefetch;

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
pub struct Publisher {
    stream: Arc<Stream>,
    taps: Vec<Box<dyn Tap>>,
    /// Address of the log entry that the next tag will most likely have.
    next_place: usize,
    hub: Hub,
    /// `None` where the publication holds the claim.
    _claim: Option<Claim>,
}

impl Publisher {
    pub(crate) fn new(stream: Arc<Stream>, hub: Hub, claim: Option<Claim>) -> Self {
        Self { stream, taps: Vec::new(), next_place: 0, hub, _claim: claim }
    }

    pub(crate) fn set_taps(&mut self, taps: Vec<Box<dyn Tap>>) {
        self.taps = taps;
    }

    /// Hands the next tag to the taps, adds it to the log and wakes the readers that wait for one.
    /// Never waits for them.
    pub fn push(&mut self, tag: Tag) {
        self.push_at(Instant::now(), tag);
    }

    /// The same, for a caller that knows the time: no clock is read.
    pub fn push_at(&mut self, now: Instant, tag: Tag) {
        self.stream.counters.count(&tag);
        self.stream.rates.count(now, &tag);
        self.forward(now, tag);
    }

    fn forward(&mut self, now: Instant, tag: Tag) {
        for tap in &mut self.taps {
            tap.push(now, &tag);
        }
        let watched = self.stream.readers.load(Ordering::Relaxed) > 0;
        self.stream.append(|log| {
            log.push(tag, watched);
            self.next_place = log.next_place().addr();
        });
    }

    /// What of memory the next tag will need, so far as one can tell.
    #[inline]
    pub fn next_push(&self) -> NextPush {
        NextPush { stream: Arc::as_ptr(&self.stream).addr(), place: self.next_place }
    }

    /// Adds headers that were learned from elsewhere than the stream's tags.
    ///
    /// Before the first tag, they are what readers start with. Later, the metadata goes to taps and
    /// readers as a tag, and so does a codec header of a kind that was still missing; a codec header
    /// that differs from the one in effect is left to the tags, which say where it changes.
    pub fn set_headers(&mut self, headers: Headers) {
        let now = Instant::now();
        let news = self.stream.log.write().set_headers(headers);
        news.into_iter().for_each(|tag| self.forward(now, tag));
    }

    /// The stream that is published.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publisher").field("stream", &self.stream).finish_non_exhaustive()
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.taps.clear();
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
    pub(crate) next: AtomicU64,
    /// How many read it, so that what nobody reads need not look who is to be woken.
    pub(crate) readers: AtomicUsize,
    rates: Rates,
    pub(crate) counters: Counters,
    log: RwLock<TagLog>,
    /// Changes with each tag.
    pub(crate) tags: watch::Sender<()>,
    /// Changes with the tags that are worth a wake of many, see [`Reader::waking_with_video`].
    pub(crate) frames: watch::Sender<()>,
    ended: AtomicBool,
    over: Notify,
    key: StreamKey,
    id: PublicationId,
    start_unix_ms: u64,
}

impl Stream {
    pub(crate) fn new(key: StreamKey, info: PublicationInfo, limits: LogLimits) -> Self {
        let PublicationInfo { id, start_unix_ms, headers } = info;
        let mut log = TagLog::new(limits);
        log.set_headers(headers);
        Self {
            next: AtomicU64::new(0),
            readers: AtomicUsize::new(0),
            rates: Rates::new(),
            counters: Counters::default(),
            log: RwLock::new(log),
            tags: watch::Sender::new(()),
            frames: watch::Sender::new(()),
            ended: AtomicBool::new(false),
            over: Notify::new(),
            key,
            id,
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

    /// The identity of the publication, the same at each node that it passes.
    pub fn id(&self) -> PublicationId {
        self.id
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
            let mut log = self.log.write();
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
    pub(crate) fn hear(&self, what: &watch::Sender<()>) -> watch::Receiver<()> {
        let receiver = what.subscribe();
        // See `append`.
        fence(Ordering::SeqCst);
        receiver
    }

    pub(crate) fn read_log(&self) -> RwLockReadGuard<'_, TagLog> {
        self.log.read()
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
