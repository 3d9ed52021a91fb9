//! The log of a stream's newest tags, bounded by bytes and by media time.

use std::collections::VecDeque;

use super::{LogLimits, reader::MaxLag};
use downpour_media::flv::{Headers, Tag, TagKind};

/// The newest tags of a stream, and the newest point where a reader can start.
///
/// The fields that every push uses come first, up to [`TagLog::HOT_BYTES`]:
/// [`NextPush`](crate::NextPush) prefetches them.
#[repr(C)]
pub(super) struct TagLog {
    pub(super) entries: VecDeque<Entry>,
    /// Index of the oldest entry, counted from the publication's first tag.
    pub(super) first: u64,
    /// Sum of [`Entry::cost`].
    pub(super) bytes: usize,
    /// [`Entry::at`] of the oldest entry, whose own memory is cold.
    oldest_at: u64,
    /// Sum of [`Entry::cost`] of all tags ever pushed.
    total: u64,
    limits: LogLimits,
    clock: MediaClock,
    /// Media time of the newest video tag or header.
    last_video: Option<u64>,
    /// Media time when readers that wake with video were last woken.
    woken_at: u64,
    /// `true` if readers that wake with video must be woken.
    wake: bool,
    headers_version: u64,
    /// The newest start point, the only one that readers use; `None` once it has left the log.
    pub(super) start_point: Option<StartPoint>,
    pub(super) headers: Headers,
}

pub(super) struct Entry {
    pub(super) tag: Tag,
    /// [`TagLog::total`] before this tag.
    offset: u64,
    /// Media time, see [`MediaClock`].
    at: u64,
    /// The headers in effect once this tag has been read.
    pub(super) headers_version: u64,
}

/// A tag where a reader can start: a key frame, or an audio tag in a stream without video.
pub(super) struct StartPoint {
    pub(super) index: u64,
    at: u64,
    pub(super) key_frame: bool,
    /// The headers in effect, with the timestamp of the tag at `index`. Made once for all readers.
    pub(super) headers: Headers,
    pub(super) headers_version: u64,
}

impl TagLog {
    /// The bytes of a log that the push of a tag uses, unless the tag is a start point.
    pub(super) const HOT_BYTES: usize = std::mem::offset_of!(Self, start_point);

    pub(super) fn new(limits: LogLimits) -> Self {
        Self {
            entries: VecDeque::new(),
            first: 0,
            bytes: 0,
            oldest_at: 0,
            total: 0,
            limits,
            clock: MediaClock::default(),
            last_video: None,
            woken_at: 0,
            wake: false,
            headers_version: 0,
            start_point: None,
            headers: Headers::default(),
        }
    }

    /// Adds a tag. At a start point, drops the tags before it that no reader has still to read: `lowest`
    /// returns the index of the first one of those.
    pub(super) fn push(&mut self, tag: Tag, lowest: impl FnOnce() -> u64) {
        let at = self.clock.advance(tag.timestamp());
        if tag.kind() == TagKind::Video {
            self.saw_video(at);
        }
        let header = tag.is_header();
        if header || tag.kind() == TagKind::Video || !self.may_wait(at) {
            (self.wake, self.woken_at) = (true, at);
        }
        if header {
            self.learn(&tag);
        } else if tag.is_key_frame() || self.starts_audio(&tag, at) {
            self.start_here(&tag, at);
        }
        let entry = Entry { offset: self.total, at, headers_version: self.headers_version, tag };
        self.bytes += entry.cost();
        self.total += entry.cost() as u64;
        if self.entries.is_empty() {
            self.oldest_at = at;
        }
        self.entries.push_back(entry);
        if let Some(start) = &self.start_point
            && start.index + 1 == self.next()
        {
            self.drop_before(lowest().min(start.index));
        }
        self.trim(at);
    }

    /// The address that the next tag's entry will most likely have.
    pub(super) fn next_entry(&self) -> *const Entry {
        let (front, back) = self.entries.as_slices();
        let newest = if back.is_empty() { front } else { back };
        newest.as_ptr_range().end
    }

    /// Sets headers before the first tag. Later, returns the headers that are new as tags to push.
    pub(super) fn set_headers(&mut self, headers: Headers) -> Vec<Tag> {
        let Headers { metadata, video, audio } = headers;
        let Some(newest) = self.entries.back() else {
            if video.is_some() {
                self.saw_video(self.clock.now);
            }
            for tag in [metadata, video, audio].into_iter().flatten() {
                self.learn(&tag);
            }
            return Vec::new();
        };
        let timestamp = newest.tag.timestamp();
        let changed = |known: &Option<Tag>, tag: &Tag| {
            known.as_ref().is_none_or(|known| known.body() != tag.body())
        };
        let metadata = metadata.filter(|tag| changed(&self.headers.metadata, tag));
        let video = video.filter(|_| self.headers.video.is_none());
        let audio = audio.filter(|_| self.headers.audio.is_none());
        let news = [metadata, video, audio].into_iter().flatten();
        news.map(|tag| tag.with_timestamp(timestamp)).collect()
    }

    /// `true` if readers that wake with video must be woken. Clears the flag.
    pub(super) fn take_wake(&mut self) -> bool {
        std::mem::take(&mut self.wake)
    }

    /// `true` if readers that wake with video may get audio with the next frame.
    fn may_wait(&self, at: u64) -> bool {
        self.has_video(at) && at - self.woken_at < AUDIO_WAIT_MS
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
            // Copied: a header that lives long must not hold the buffer that it shares.
            *slot = Some(tag.detached());
            self.headers_version += 1;
        }
    }

    fn saw_video(&mut self, at: u64) {
        if !self.has_video(at) {
            // From here on, only a key frame is a start point.
            self.start_point = None;
        }
        self.last_video = Some(at);
    }

    fn has_video(&self, at: u64) -> bool {
        self.last_video.is_some_and(|last| at - last <= AUDIO_ONLY_AFTER_MS)
    }

    fn starts_audio(&self, tag: &Tag, at: u64) -> bool {
        tag.kind() == TagKind::Audio
            && !self.has_video(at)
            && self.start_point.as_ref().is_none_or(|start| at - start.at >= AUDIO_JOIN_MS)
    }

    fn start_here(&mut self, tag: &Tag, at: u64) {
        let timed = |header: &Option<Tag>| {
            header.as_ref().map(|header| header.with_timestamp(tag.timestamp()))
        };
        self.start_point = Some(StartPoint {
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

    /// Drops the oldest tags once a limit is exceeded. Their memory is cold, so several are dropped at
    /// a time; tags from the start point on only as far as the limits demand.
    fn trim(&mut self, now: u64) {
        let LogLimits { max_bytes, max_age } = self.limits;
        if !self.exceeds(now, self.limits) {
            return;
        }
        let low_water = LogLimits {
            max_bytes: max_bytes - max_bytes / TRIMMED_SHARE,
            max_age: max_age - max_age / TRIMMED_SHARE as u32,
        };
        while self.entries.len() > 1
            && (self.exceeds(now, self.limits)
                || self.exceeds(now, low_water)
                    && self.start_point.as_ref().is_none_or(|start| self.first < start.index))
        {
            if let Some(oldest) = self.entries.pop_front() {
                self.bytes -= oldest.cost();
                self.first += 1;
            }
            if let Some(oldest) = self.entries.front() {
                self.oldest_at = oldest.at;
            }
        }
        if self.start_point.as_ref().is_some_and(|start| start.index < self.first) {
            self.start_point = None;
        }
    }

    /// Drops the tags before index `first`.
    fn drop_before(&mut self, first: u64) {
        while self.first < first
            && let Some(oldest) = self.entries.pop_front()
        {
            self.bytes -= oldest.cost();
            self.first += 1;
        }
        if let Some(oldest) = self.entries.front() {
            self.oldest_at = oldest.at;
        }
        // Of a slow reader that has left or caught up.
        if self.entries.capacity() > 4 * self.entries.len().max(KEPT_ENTRIES) {
            self.entries.shrink_to(2 * self.entries.len());
        }
    }

    fn exceeds(&self, now: u64, limits: LogLimits) -> bool {
        self.bytes > limits.max_bytes || now - self.oldest_at > u64::from(limits.max_age)
    }

    /// Index of the tag that will be pushed next.
    pub(super) fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// `true` if a reader at `cursor`, which the log holds, is further behind the newest tag than
    /// `max_lag`.
    pub(super) fn lag_exceeds(&self, cursor: u64, max_lag: MaxLag) -> bool {
        let index = usize::try_from(cursor.saturating_sub(self.first)).unwrap_or(usize::MAX);
        self.entries.get(index).is_some_and(|entry| {
            self.total - entry.offset > max_lag.max_bytes
                || self.clock.now - entry.at > max_lag.max_ms
        })
    }
}

impl Entry {
    /// Bytes charged against the log's limit. The overhead counts, since empty tags fill memory, too.
    fn cost(&self) -> usize {
        self.tag.framed().len() + ENTRY_OVERHEAD
    }
}

/// Monotonic media time: milliseconds since the first tag.
///
/// Audio and video interleave out of order, timestamps wrap at 2³², and encoders restart or jump.
/// None of that may empty a log or keep it from being trimmed.
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
        // A small step back is interleaving; a large one is a restart.
        if !(-MAX_INTERLEAVE_MS..=0).contains(&step) {
            self.newest = Some(timestamp);
        }
        self.now
    }
}

/// How far back readers of a stream without video start at most, in milliseconds of media time.
pub const AUDIO_JOIN_MS: u64 = 500;

/// Audio wakes readers that wake with video after this much media time without a wake, in
/// milliseconds: one frame at 20 frames per second, so that at 25 and more audio never does.
const AUDIO_WAIT_MS: u64 = 50;
/// After this much media time without video, in milliseconds, a stream counts as one of audio only.
pub(super) const AUDIO_ONLY_AFTER_MS: u64 = 10_000;
/// Entries whose memory is kept in any case.
const KEPT_ENTRIES: usize = 64;
/// A trim drops one part in this many of the limits.
const TRIMMED_SHARE: usize = 32;
/// The most that one tag advances the media clock, in milliseconds.
const MAX_CLOCK_STEP_MS: u64 = 10_000;
/// How far a timestamp may step back before it counts as a restart, in milliseconds.
const MAX_INTERLEAVE_MS: i32 = 5_000;
/// Bytes of an entry, its tag's reference count and the allocator's share, approximately.
pub(super) const ENTRY_OVERHEAD: usize = 128;
