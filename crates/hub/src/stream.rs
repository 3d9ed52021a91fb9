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
    Hub, LogLimits, PublicationInfo, Reader, Sink, Tap,
    claims::Claim,
    counters::{Counters, Rates},
    cursors::Cursors,
    log::{Entry, TagLog},
    splice::Splice,
};
use downpour_media::{
    PublicationId, StreamKey,
    flv::{Headers, Tag},
    timestamps::TimestampRepair,
};
use downpour_sys::{LogLimit, prefetch};

/// Addresses of the memory that the next push to a stream will use. Prefetching them for a batch of
/// packets takes 5 % from an edge's processor time (`scripts/bench edge`).
#[derive(Debug, Clone, Copy)]
pub struct NextPush {
    stream: usize,
    entry: usize,
}

impl NextPush {
    /// Prefetches the memory: a tag will be pushed soon.
    #[inline]
    pub fn expect(self) {
        prefetch(self.stream, HOT_BYTES);
        prefetch(self.entry, size_of::<Entry>());
    }
}

/// The one source of a stream. Dropping it ends the stream: readers drain what the log holds and
/// then see the end, and the key is free again.
pub struct Publisher {
    stream: Arc<Stream>,
    taps: Vec<Box<dyn Tap>>,
    /// Address of the log entry that the next tag will most likely have.
    next_entry: usize,
    hub: Hub,
    splice: Splice,
    /// `None` if the timestamps are those of a node that repairs them.
    repair: Option<Box<(TimestampRepair, LogLimit)>>,
    /// `None` if the [`Publication`](crate::admission::Publication) holds the claim.
    _claim: Option<Claim>,
}

impl Publisher {
    pub(crate) fn new(stream: Arc<Stream>, hub: Hub, claim: Option<Claim>) -> Self {
        Self {
            stream,
            taps: Vec::new(),
            next_entry: 0,
            hub,
            splice: Splice::default(),
            repair: None,
            _claim: claim,
        }
    }

    /// Keeps the timestamps of audio and video continuous from now on, see [`TimestampRepair`].
    pub fn with_timestamp_repair(mut self) -> Self {
        self.repair = Some(Box::default());
        self
    }

    pub(crate) fn add_tap_of(&mut self, sink: &dyn Sink) {
        self.taps.extend(sink.stream_up(&self.stream));
    }

    /// Passes the next tag to the taps, appends it to the log and wakes readers. Does not wait for
    /// them.
    pub fn push(&mut self, tag: Tag) {
        self.push_at(Instant::now(), tag);
    }

    /// Like [`Publisher::push`], with the time of arrival: no clock is read.
    pub fn push_at(&mut self, now: Instant, tag: Tag) {
        let tag = self.splice.apply(tag);
        self.stream.counters.count(&tag);
        self.stream.rates.count(now, &tag);
        let tag = self.repair_timestamp(now, tag);
        self.forward(now, tag);
    }

    fn repair_timestamp(&mut self, now: Instant, tag: Tag) -> Tag {
        let Some((repair, log_limit)) = self.repair.as_deref_mut() else { return tag };
        let jumps = repair.jumps();
        let timestamp = repair.repair(now, &tag);
        if repair.jumps() > jumps
            && let Some(missed) = log_limit.due(now)
        {
            let (from, stream) = (tag.timestamp(), self.stream.key());
            tracing::warn!(%stream, from, to = timestamp, missed, "timestamps jumped; continued");
        }
        tag.with_timestamp(timestamp)
    }

    fn forward(&mut self, now: Instant, tag: Tag) {
        for tap in &mut self.taps {
            tap.push(now, &tag);
        }
        let cursors = &self.stream.cursors;
        self.stream.append(|log| {
            // Behind the lock: a reader that has read from the log has stored its cursor, and one that
            // has not starts at the newest start point, which stays.
            log.push(tag, || cursors.lowest());
            self.next_entry = log.next_entry().addr();
        });
    }

    /// The memory that the next push will most likely use.
    #[inline]
    pub fn next_push(&self) -> NextPush {
        NextPush { stream: Arc::as_ptr(&self.stream).addr(), entry: self.next_entry }
    }

    /// Adds headers that do not come from the stream's tags.
    ///
    /// Before the first tag, they become the headers of the stream. Later, new metadata goes to taps
    /// and readers as a tag, and so does a codec header of a kind that was missing. A codec header
    /// that differs from the one in effect is ignored: the tags say where it changes.
    pub fn set_headers(&mut self, headers: Headers) {
        let now = Instant::now();
        let news = self.stream.log.write().set_headers(headers);
        news.into_iter().for_each(|tag| self.forward(now, tag));
    }

    /// The tags that follow come from another source: an encoder or a node above that came back. Their
    /// timestamps continue those of the stream, for all readers and taps.
    pub fn splice(&mut self) {
        self.splice.begin();
    }

    /// As [`Publisher::splice`], with the headers of the new source, of which those that differ are
    /// pushed.
    pub fn splice_with(&mut self, headers: Headers) {
        self.splice.begin();
        let now = Instant::now();
        let held = self.stream.headers();
        let is_news = |new: &&Tag| held.like(new).is_none_or(|held| held.body() != new.body());
        for new in headers.iter().filter(is_news) {
            self.push_at(now, new.clone());
        }
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
        // After the flag: a reader that saw it unset is woken by these.
        self.stream.tags.send_replace(());
        self.stream.frames.send_replace(());
        self.stream.over.notify_waiters();
    }
}

/// One publication under one key.
///
/// The fields that every push uses come first: [`NextPush`] prefetches them.
/// The alignment saves the edge 4 % (`scripts/bench edge`).
#[repr(C, align(64))]
pub struct Stream {
    /// Mirrors `TagLog::next`, so that a reader with nothing to read takes no lock.
    pub(crate) next: AtomicU64,
    /// Number of readers. With 0, a push wakes none.
    pub(crate) readers: AtomicUsize,
    rates: Rates,
    pub(crate) counters: Counters,
    log: RwLock<TagLog>,
    /// Changes with each tag.
    pub(crate) tags: watch::Sender<()>,
    /// Changes with the tags that wake readers of [`Reader::waking_with_video`].
    pub(crate) frames: watch::Sender<()>,
    ended: AtomicBool,
    over: Notify,
    pub(crate) cursors: Cursors,
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
            cursors: Cursors::default(),
            key,
            id,
            start_unix_ms,
        }
    }

    /// A reader that starts at the newest group of pictures and may lag as far as the log reaches.
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

    /// `true` once the publication is over. Readers may still have tags to drain.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Waits until the publication is over.
    pub async fn over(&self) {
        let over = self.over.notified();
        let mut over = std::pin::pin!(over);
        // Enabled before the flag is read, so that an end between the two is not lost.
        over.as_mut().enable();
        if !self.ended() {
            over.await;
        }
    }

    /// Counters of the stream.
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
        // A reader is counted, subscribes and then loads `next`. With a full fence here and one in
        // `changes_of`, either it sees the new tag, or it is seen here. A stream without readers
        // returns here.
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

    /// Subscribes to later changes; earlier ones are seen in the log.
    pub(crate) fn changes_of(&self, sender: &watch::Sender<()>) -> watch::Receiver<()> {
        let receiver = sender.subscribe();
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

/// Counts one viewer of a stream while it lives.
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

/// The bytes of a stream that a push uses: up to [`TagLog::HOT_BYTES`] in the log, which lies behind
/// the two words of its lock.
const HOT_BYTES: usize =
    std::mem::offset_of!(Stream, log) + 2 * size_of::<usize>() + TagLog::HOT_BYTES;

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use downpour_media::flv::TagKind;

    use super::*;

    #[test]
    fn a_reader_that_comes_while_a_key_frame_waits_for_the_lock_starts_at_it() {
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 60_000 });
        let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
        let key_frame = Tag::new(TagKind::Video, 0, &[0x17, 1, 0, 0, 0, 1]).unwrap();
        publisher.push(key_frame.clone());
        let stream = publisher.stream().clone();
        let log = stream.read_log();
        let newest = key_frame.with_timestamp(40);
        let pushed = newest.clone();
        let pushing = thread::spawn(move || {
            publisher.push(pushed);
            publisher
        });
        // A writer that waits keeps new readers out.
        let deadline = Instant::now() + Duration::from_secs(20);
        while stream.log.try_read().is_some() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        let mut reader = stream.subscribe();
        drop(log);
        let _publisher = pushing.join().unwrap();
        let mut read = Vec::new();
        assert!(matches!(reader.try_read(&mut read, usize::MAX), crate::ReadOutcome::Read(_)));
        assert_eq!(read, [newest]);
    }
}
