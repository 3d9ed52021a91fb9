//! The log of a stream's newest tags, bounded by bytes and by media time.

use std::collections::VecDeque;

use super::{LogLimits, reader::MaxLag};
use downpour_media::flv::{Headers, Tag, TagKind, Tracks};

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
    pub(super) headers_version: u64,
    /// The kinds of media of which a tag or a header has come.
    tracks: Tracks,
    /// The newest start point, the only one that readers use; `None` once it has left the log.
    pub(super) start_point: Option<StartPoint>,
    pub(super) headers: Headers,
    /// The newest video tag, if it is a key frame: the picture of a stream that stands still.
    still: Option<Tag>,
}

pub(super) struct Entry {
    pub(super) tag: Tag,
    /// [`TagLog::total`] before this tag.
    offset: u64,
    /// Media time, see [`MediaClock`].
    pub(super) at: u64,
    /// The headers in effect once this tag has been read.
    pub(super) headers_version: u64,
}

/// A tag where a reader can start.
pub(super) struct StartPoint {
    pub(super) index: u64,
    at: u64,
    pub(super) kind: StartKind,
    /// The headers in effect, with the timestamp of the tag at `index`. Made once for all readers.
    pub(super) headers: Headers,
    /// The picture that a decoder shows here, with the same timestamp, if it stands still.
    pub(super) still: Option<Tag>,
    pub(super) headers_version: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StartKind {
    /// A key frame.
    KeyFrame,
    /// Audio in a stream without video, or whose video pauses.
    Audio,
    /// Audio in a stream with video, of which the log has no key frame.
    AudioBeforeVideo,
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
            tracks: Tracks::default(),
            start_point: None,
            headers: Headers::default(),
            still: None,
        }
    }

    /// Adds a tag. At a start point, drops the tags before it that no reader has still to read: `lowest`
    /// returns the index of the first one of those.
    pub(super) fn push(&mut self, tag: Tag, lowest: impl FnOnce() -> u64) {
        let header = tag.is_header();
        let at = match header {
            // Headers may have timestamps of their own.
            true => self.clock.now,
            false => self.clock.advance(&tag),
        };
        self.tracks.add(tag.kind());
        if tag.kind() == TagKind::Video {
            self.saw_video(at);
        }
        if header || tag.kind() == TagKind::Video || !self.may_wait(at) {
            (self.wake, self.woken_at) = (true, at);
        }
        if header {
            self.learn(&tag);
        } else if tag.is_key_frame() {
            self.still = None;
            self.start_here(&tag, at, StartKind::KeyFrame);
            self.still = Some(tag.clone());
        } else if tag.kind() == TagKind::Video {
            self.still = None;
        } else if tag.kind() == TagKind::Audio
            && let Some(kind) = self.audio_start(at)
        {
            self.start_here(&tag, at, kind);
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
        let Some(newest) = self.entries.back() else {
            if headers.video().is_some() {
                self.saw_video(self.clock.now);
            }
            headers.iter().for_each(|tag| {
                self.tracks.add(tag.kind());
                self.learn(tag);
            });
            return Vec::new();
        };
        let timestamp = newest.tag.timestamp();
        let is_news = |tag: &&Tag| match self.headers.like(tag) {
            Some(known) => tag.kind() == TagKind::Script && known.body() != tag.body(),
            None => true,
        };
        headers.iter().filter(is_news).map(|tag| tag.with_timestamp(timestamp)).collect()
    }

    /// `true` if readers that wake with video must be woken. Clears the flag.
    pub(super) fn take_wake(&mut self) -> bool {
        std::mem::take(&mut self.wake)
    }

    /// `true` if readers that wake with video may get audio with the next frame.
    fn may_wait(&self, at: u64) -> bool {
        self.has_video(at) && at - self.woken_at < AUDIO_WAIT_MS
    }

    fn learn(&mut self, tag: &Tag) {
        self.headers_version += u64::from(self.headers.learn(tag));
    }

    /// The kinds of media that the stream has, once all that there are have had the time to come.
    pub(super) fn settled_tracks(&self) -> Option<Tracks> {
        let settled = self.tracks == Tracks::BOTH
            || !self.tracks.is_empty() && self.clock.now >= TRACKS_SETTLE_MS;
        settled.then_some(self.tracks)
    }

    /// The kinds of media that the stream has so far.
    pub(super) fn tracks(&self) -> Tracks {
        self.tracks
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

    /// The kind of start point that a tag of audio is, if it is one.
    fn audio_start(&self, at: u64) -> Option<StartKind> {
        let newest = self.start_point.as_ref();
        let kind = match newest {
            _ if !self.has_video(at) => StartKind::Audio,
            Some(StartPoint { kind: StartKind::KeyFrame, .. }) => return None,
            // The first key frame is due.
            _ if at < KEY_FRAME_WAIT_MS => return None,
            _ => StartKind::AudioBeforeVideo,
        };
        newest.is_none_or(|start| at - start.at >= AUDIO_JOIN_MS).then_some(kind)
    }

    fn start_here(&mut self, tag: &Tag, at: u64, kind: StartKind) {
        let timestamp = tag.timestamp();
        self.start_point = Some(StartPoint {
            index: self.next(),
            at,
            kind,
            headers: self.headers.at(timestamp),
            still: self.still.as_ref().map(|frame| frame.with_timestamp(timestamp)),
            headers_version: self.headers_version,
        });
    }

    /// Index of the newest frame of video, with the headers for it: a start for readers that have
    /// waited for a key frame in vain. `None` if it lies before `first`, or headers came after it.
    pub(super) fn newest_frame(&self, first: u64) -> Option<(u64, Headers)> {
        let is_frame = |entry: &Entry| entry.tag.kind() == TagKind::Video && !entry.tag.is_header();
        let position = self.entries.iter().rposition(is_frame)?;
        let (index, frame) = (self.first + position as u64, self.entries.get(position)?);
        (index >= first && frame.headers_version == self.headers_version)
            .then(|| (index, self.headers.at(frame.tag.timestamp())))
    }

    /// Media time of the newest tag.
    pub(super) fn now(&self) -> u64 {
        self.clock.now
    }

    /// Drops the oldest tags once a limit is exceeded. Their memory is cold, so several are dropped at
    /// a time; tags from the start point on only as far as the limits demand. A group of pictures is
    /// kept however long it lasts, while its bytes fit.
    fn trim(&mut self, now: u64) {
        let LogLimits { max_bytes, max_age } = self.limits;
        if !self.exceeds(now, self.limits) {
            return;
        }
        let low_water = LogLimits {
            max_bytes: max_bytes - max_bytes / TRIMMED_SHARE,
            max_age: max_age - max_age / TRIMMED_SHARE as u32,
        };
        while self.entries.len() > 1 && self.oldest_is_over(now, low_water) {
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

    fn oldest_is_over(&self, now: u64, low_water: LogLimits) -> bool {
        match &self.start_point {
            Some(start) if self.first >= start.index => match start.kind {
                StartKind::KeyFrame => self.bytes > self.limits.max_bytes,
                StartKind::Audio | StartKind::AudioBeforeVideo => self.exceeds(now, self.limits),
            },
            _ => self.exceeds(now, low_water),
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
/// Timestamps step back a little, wrap at 2³², and jump, and those of audio and video may be far
/// apart. None of that may empty a log or keep it from being trimmed. So each kind has its clock,
/// which starts at the media time of its first tag, and the media time is that of the faster one.
#[derive(Default)]
struct MediaClock {
    audio: KindClock,
    video: KindClock,
    now: u64,
}

#[derive(Default)]
struct KindClock {
    /// The newest timestamp.
    newest: Option<u32>,
    now: u64,
}

impl MediaClock {
    fn advance(&mut self, tag: &Tag) -> u64 {
        let (clock, other) = match tag.kind() {
            TagKind::Audio => (&mut self.audio, &self.video),
            TagKind::Video => (&mut self.video, &self.audio),
            TagKind::Script => return self.now,
        };
        let timestamp = tag.timestamp();
        match clock.newest {
            Some(newest) => {
                // A kind that has paused does not stop the media time when the other one pauses.
                clock.now = clock.now.max(self.now.saturating_sub(MAX_INTERLEAVE_MS as u64));
                let step = timestamp.wrapping_sub(newest) as i32;
                if step > 0 {
                    clock.now += u64::from(step.unsigned_abs()).min(MAX_CLOCK_STEP_MS);
                }
                // A small step back is jitter; a large one is a restart.
                if !(-MAX_INTERLEAVE_MS..=0).contains(&step) {
                    clock.newest = Some(timestamp);
                }
            }
            None => {
                let beside = other.newest.map(|newest| timestamp.wrapping_sub(newest) as i32);
                let now =
                    match beside.filter(|step| step.unsigned_abs() <= MAX_INTERLEAVE_MS as u32) {
                        Some(step) => other.now.saturating_add_signed(step.into()),
                        None => self.now,
                    };
                *clock = KindClock { newest: Some(timestamp), now };
            }
        }
        self.now = self.now.max(clock.now);
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
/// Without audio or without video for this much media time, in milliseconds, a stream counts as one
/// without it.
const TRACKS_SETTLE_MS: u64 = 1_000;
/// Readers get audio alone if no key frame has come for this much media time, in milliseconds.
const KEY_FRAME_WAIT_MS: u64 = 1_000;
/// Readers get any frame if no key frame has come for this much media time, in milliseconds. Longer
/// than most groups of pictures.
pub(super) const ANY_FRAME_AFTER_MS: u64 = 4_000;
/// A trim drops one part in this many of the limits.
const TRIMMED_SHARE: usize = 32;
/// The most that one tag advances the media clock, in milliseconds.
const MAX_CLOCK_STEP_MS: u64 = 10_000;
/// How far a timestamp may step back before it counts as a restart, and how far the clocks of audio
/// and video may be apart, in milliseconds.
const MAX_INTERLEAVE_MS: i32 = 5_000;
/// Bytes of an entry, its tag's reference count and the allocator's share, approximately.
pub(super) const ENTRY_OVERHEAD: usize = 128;
