//! The newest tags of a stream.

use std::collections::VecDeque;

use super::{LogLimits, reader::MaxLag};
use downpour_media::flv::{Headers, Tag, TagKind};
use downpour_sys::prefetch;

/// The newest tags of a stream, and where in them a reader can begin.
///
/// What each tag needs is in front and together, up to [`TagLog::HOT_BYTES`]: few lines of the cache.
#[repr(C)]
pub(super) struct TagLog {
    pub(super) entries: VecDeque<Entry>,
    /// Index of the oldest entry, counted from the publication's first tag.
    pub(super) first: u64,
    /// Sum of [`Entry::cost`].
    pub(super) bytes: usize,
    /// [`Entry::at`] of the oldest entry: its own memory is cold.
    oldest_at: u64,
    /// Sum of [`Entry::cost`] of all tags ever pushed.
    total: u64,
    limits: LogLimits,
    clock: MediaClock,
    /// Media time of the newest sign of video.
    last_video: Option<u64>,
    /// Media time of the last wake.
    woken_at: u64,
    /// Whether those are to be woken who read with the video.
    wake: bool,
    headers_version: u64,
    /// Readers only ever go to the newest place; `None` once that has left the log.
    pub(super) join: Option<StartPoint>,
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

/// A place where a reader can begin: a key frame, or an audio tag in a stream without video.
#[repr(C)]
pub(super) struct StartPoint {
    pub(super) index: u64,
    at: u64,
    pub(super) key_frame: bool,
    /// The headers in effect, at the time of the tag at `index`: made once for all readers.
    pub(super) headers: Headers,
    pub(super) headers_version: u64,
}

impl TagLog {
    /// Of a log, what a tag needs that is no place to begin.
    pub(super) const HOT_BYTES: usize = std::mem::offset_of!(Self, join);

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
            join: None,
            headers: Headers::default(),
        }
    }

    /// Adds a tag. Of a stream that nobody reads, what lies before the newest start point is dropped.
    pub(super) fn push(&mut self, tag: Tag, watched: bool) {
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
        } else if tag.is_key_frame() || self.starts_audio_join(&tag, at) {
            self.join_here(&tag, at);
        }
        let entry = Entry { offset: self.total, at, headers_version: self.headers_version, tag };
        self.bytes += entry.cost();
        self.total += entry.cost() as u64;
        if self.entries.is_empty() {
            self.oldest_at = at;
        }
        self.entries.push_back(entry);
        if !watched {
            self.drop_before_start_point();
        }
        self.trim(at);
    }

    /// Where in memory the next tag's entry will be, most of the time.
    pub(super) fn next_place(&self) -> *const Entry {
        let (front, back) = self.entries.as_slices();
        let newest = if back.is_empty() { front } else { back };
        newest.as_ptr_range().end
    }

    /// Learns headers before the first tag. Later, returns those that are news, as tags to push.
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

    /// Whether those are to be woken who read with the video; asked once after each change.
    pub(super) fn take_wake(&mut self) -> bool {
        std::mem::take(&mut self.wake)
    }

    /// Whether what is not video may wait for the next frame.
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
            // It stays, and the block that it shares need not.
            *slot = Some(tag.detached());
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
        self.join = Some(StartPoint {
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

    /// Drops the oldest tags once a limit is passed, and then some more: they lie side by side, and
    /// each time the memory of the oldest ones is cold. No more than it must of what a reader begins
    /// with.
    fn trim(&mut self, now: u64) {
        let LogLimits { max_bytes, max_age } = self.limits;
        if !self.exceeds(now, self.limits) {
            return;
        }
        let (oldest, _) = self.entries.as_slices();
        prefetch(oldest.as_ptr().addr(), TRIMMED_TOGETHER * size_of::<Entry>());
        let some_less = LogLimits {
            max_bytes: max_bytes - max_bytes / TRIMMED_SHARE,
            max_age: max_age - max_age / TRIMMED_SHARE as u32,
        };
        while self.entries.len() > 1
            && (self.exceeds(now, self.limits)
                || self.exceeds(now, some_less)
                    && self.join.as_ref().is_none_or(|join| self.first < join.index))
        {
            if let Some(oldest) = self.entries.pop_front() {
                self.bytes -= oldest.cost();
                self.first += 1;
            }
            if let Some(oldest) = self.entries.front() {
                self.oldest_at = oldest.at;
            }
        }
        if self.join.as_ref().is_some_and(|join| join.index < self.first) {
            self.join = None;
        }
    }

    /// Drops what no reader would begin with: they only ever go to the newest start point.
    fn drop_before_start_point(&mut self) {
        let Some(first) = self.join.as_ref().map(|join| join.index) else { return };
        while self.first < first
            && let Some(oldest) = self.entries.pop_front()
        {
            self.bytes -= oldest.cost();
            self.first += 1;
        }
        if let Some(oldest) = self.entries.front() {
            self.oldest_at = oldest.at;
        }
    }

    fn exceeds(&self, now: u64, limits: LogLimits) -> bool {
        self.bytes > limits.max_bytes || now - self.oldest_at > u64::from(limits.max_age)
    }

    /// Index of the tag that will be pushed next.
    pub(super) fn next(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    /// Whether more lies between `cursor`, which the log holds, and the newest tag.
    pub(super) fn backlog_exceeds(&self, cursor: u64, backlog: MaxLag) -> bool {
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

/// How much media time since the last wake has what is not video wake those who wait for video: one
/// frame at 20 a second, so that at 25 and more audio rides along with every frame.
const AUDIO_WAIT_MS: u64 = 50;
/// A stream that sent video before counts as one without after this much media time.
pub(super) const AUDIO_ONLY_AFTER_MS: u64 = 10_000;
/// Of the limits, this part is what is dropped at a time.
const TRIMMED_SHARE: usize = 32;
/// Tags of as much, most often.
const TRIMMED_TOGETHER: usize = 16;
/// The most that one tag moves the media clock.
const MAX_CLOCK_STEP_MS: u64 = 10_000;
/// How far audio and video may be apart in the order of arrival.
const MAX_INTERLEAVE_MS: i32 = 5_000;
/// An entry, its tag's reference count and the allocator's share, about.
pub(super) const ENTRY_OVERHEAD: usize = 128;
