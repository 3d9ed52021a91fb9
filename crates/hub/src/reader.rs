//! A cursor in a stream's log.
//!
//! ```text
//!                start point in the log              cursor has left the log
//! Joining ─────────────────────────────► Reading ─────────────────────────────► Resuming
//!                                         │  ▲  ▲                                  │
//!          further behind than the MaxLag │  │  └── start point at or after cursor ┘
//!          and a start point ahead: skip  └──┘
//!
//! Joining, Resuming ── no start point for ANY_FRAME_AFTER_MS: newest frame of video ──► Reading
//! ```
//!
//! Invariants: the cursor only grows; `Reading` starts with the headers in effect there; tags that are
//! skipped are counted, except before the first start point. Frames before the first key frame are
//! left out, but not for longer than [`ANY_FRAME_AFTER_MS`].

use std::{
    borrow::Cow,
    ops::Deref,
    sync::{Arc, atomic::Ordering},
};

use tokio::sync::watch;

use super::{
    Stream,
    cursors::Cursor,
    log::{ANY_FRAME_AFTER_MS, StartKind, TagLog},
};
use downpour_media::flv::{Headers, Tag, TagKind, Tracks};

/// How far a reader may fall behind the newest tag before it skips to the newest key frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxLag {
    /// Bytes between the reader and the newest tag, bookkeeping included.
    pub max_bytes: u64,
    /// Media time between the reader and the newest tag, in milliseconds.
    pub max_ms: u64,
}

impl MaxLag {
    /// As far as the log reaches.
    pub const UNLIMITED: Self = Self { max_bytes: u64::MAX, max_ms: u64::MAX };
}

/// A cursor in a stream's log.
///
/// It starts at the newest group of pictures with the headers in effect there in front of it
/// (metadata, video, audio, then those of further tracks; with the timestamp of the group's first
/// tag). If the stream has video but no key frame in the log, it starts with audio, and frames of
/// video follow from the next key frame on, or after 4 s without one. In a stream without video it
/// starts at most [`AUDIO_JOIN_MS`](crate::AUDIO_JOIN_MS) back.
///
/// A clone continues from the same position.
#[derive(Debug, Clone)]
pub struct Reader {
    stream: Counted,
    pub(super) wake: watch::Receiver<()>,
    max_lag: MaxLag,
    pub(super) progress: Progress,
    /// Version of the headers that this reader got last.
    headers_version: u64,
}

/// A reader's handle of its stream, counted in [`Stream::readers`].
#[derive(Debug)]
struct Counted {
    stream: Arc<Stream>,
    /// What the log keeps for this reader.
    cursor: Cursor,
}

impl Counted {
    fn new(stream: Arc<Stream>, at: u64) -> Self {
        stream.readers.fetch_add(1, Ordering::Relaxed);
        let cursor = stream.cursors.add(at);
        Self { stream, cursor }
    }
}

impl Deref for Counted {
    type Target = Arc<Stream>;

    fn deref(&self) -> &Self::Target {
        &self.stream
    }
}

impl Clone for Counted {
    fn clone(&self) -> Self {
        Self::new(self.stream.clone(), self.cursor.get())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.stream.cursors.remove(&self.cursor);
        self.stream.readers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How far a reader has come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    /// Index in the log of the next tag to read.
    pub(super) cursor: u64,
    phase: Phase,
    /// Media time since which the reader has waited for a start point or a key frame.
    waiting_since: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Waits for the first start point.
    Joining,
    /// The cursor has left the log; waits for a start point at or after it.
    Resuming,
    /// Reads tag by tag. Video frames are left out until `key_frame_seen`.
    Reading { key_frame_seen: bool },
}

impl Progress {
    /// The point at which the reader starts, or to which it skips.
    fn find_start<'a>(&mut self, log: &'a TagLog, max_lag: MaxLag) -> Option<Start<'a>> {
        let start = log.start_point.as_ref().filter(|start| match self.phase {
            Phase::Joining => true,
            Phase::Resuming => start.index >= self.cursor,
            // A reader that decodes video does not give it up for a little audio.
            Phase::Reading { key_frame_seen: true }
                if start.kind == StartKind::AudioBeforeVideo =>
            {
                false
            }
            Phase::Reading { .. } => {
                start.index > self.cursor && log.lag_exceeds(self.cursor, max_lag)
            }
        });
        if let Some(start) = start {
            return Some(Start {
                index: start.index,
                headers: Cow::Borrowed(&start.headers),
                headers_version: start.headers_version,
                still: start.still.as_ref(),
                decodes_video: start.kind == StartKind::KeyFrame || start.still.is_some(),
            });
        }
        if matches!(self.phase, Phase::Reading { .. }) {
            return None;
        }
        let since = *self.waiting_since.get_or_insert(log.now());
        if log.now() - since < ANY_FRAME_AFTER_MS {
            return None;
        }
        let (index, headers) = log.newest_frame(self.cursor)?;
        Some(Start {
            index,
            headers: Cow::Owned(headers),
            headers_version: log.headers_version,
            still: None,
            decodes_video: true,
        })
    }
}

/// A point in the log at which a reader starts.
struct Start<'a> {
    /// Index of the first tag.
    index: u64,
    headers: Cow<'a, Headers>,
    headers_version: u64,
    still: Option<&'a Tag>,
    /// `true` if frames of video follow without a key frame in front.
    decodes_video: bool,
}

/// A reader's position in the log. Readers of one stream at the same position read the same tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Index of the next tag to read, counted from the publication's first tag.
    pub index: u64,
    /// `true` once a key frame has been read. Other frames are left out before.
    pub key_frame_seen: bool,
}

/// Result of [`Reader::try_read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOutcome {
    /// At least one tag was appended.
    Read(ReadCount),
    /// Nothing to read now.
    Pending,
    /// The stream is over and everything has been read.
    Ended,
}

/// Tags that one read appended and skipped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadCount {
    /// Tags appended, headers included.
    pub tags: usize,
    /// Their bytes, framed.
    pub bytes: usize,
    /// Tags skipped before them because this reader was too slow.
    pub skipped: u64,
}

/// The stream is over and everything has been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the stream has ended")]
pub struct Ended;

impl Reader {
    pub(super) fn new(stream: Arc<Stream>) -> Self {
        let stream = Counted::new(stream, Cursor::NOWHERE);
        Self {
            wake: stream.changes_of(&stream.tags),
            stream,
            max_lag: MaxLag::UNLIMITED,
            progress: Progress { cursor: 0, phase: Phase::Joining, waiting_since: None },
            headers_version: 0,
        }
    }

    /// Wakes this reader on video, headers and the end only; audio is read along with them. Audio
    /// wakes it, too, if there was no wake for 50 ms or no video for 10 s of media time. Audio right
    /// before the source stalls is read with the next wake.
    pub fn waking_with_video(mut self) -> Self {
        self.wake = self.stream.changes_of(&self.stream.frames);
        self
    }

    /// Sets how far this reader may fall behind.
    pub fn with_max_lag(mut self, max_lag: MaxLag) -> Self {
        self.max_lag = max_lag;
        self
    }

    /// Appends the next tags to `out`: headers and at least one tag, then more while fewer than
    /// `max_bytes` bytes are appended. After a skip, headers that changed are appended first.
    pub fn try_read(&mut self, out: &mut impl Extend<Tag>, max_bytes: usize) -> ReadOutcome {
        let outcome =
            self.try_read_each(max_bytes, |_, tag| out.extend(std::iter::once(tag.clone())));
        if let ReadOutcome::Read(count) = outcome {
            self.stream.count_skipped(count.skipped);
        }
        outcome
    }

    /// Like [`Reader::try_read`], but calls `each` with each tag and its index in the log. Headers in
    /// front have the index of the tag that they precede. The publisher waits while `each` runs.
    ///
    /// The caller counts the returned skips ([`Stream::count_skipped`]): it may read for many
    /// viewers, which need not have missed the same tags.
    pub fn try_read_each(
        &mut self,
        max_bytes: usize,
        mut each: impl FnMut(u64, &Tag),
    ) -> ReadOutcome {
        let progress = &mut self.progress;
        // Loaded before the log is read: if the stream has ended, the log holds all of its tags.
        let ended = self.stream.ended();
        if !ended && self.stream.next.load(Ordering::Acquire) == progress.cursor {
            return ReadOutcome::Pending;
        }
        let log = self.stream.read_log();
        let mut count = ReadCount::default();
        let mut emit = |index: u64, tag: &Tag, count: &mut ReadCount| {
            count.tags += 1;
            count.bytes += tag.framed().len();
            each(index, tag);
        };

        if progress.cursor < log.first && matches!(progress.phase, Phase::Reading { .. }) {
            (progress.phase, progress.waiting_since) = (Phase::Resuming, None);
        }
        if let Some(start) = progress.find_start(&log, self.max_lag) {
            if progress.phase != Phase::Joining {
                count.skipped = start.index - progress.cursor;
            }
            if progress.phase == Phase::Joining || self.headers_version != start.headers_version {
                start.headers.iter().for_each(|tag| emit(start.index, tag, &mut count));
            }
            if let Some(still) = &start.still {
                emit(start.index, still, &mut count);
            }
            progress.cursor = start.index;
            progress.phase = Phase::Reading { key_frame_seen: start.decodes_video };
            progress.waiting_since = None;
        }
        if let Phase::Reading { mut key_frame_seen } = progress.phase {
            let first = usize::try_from(progress.cursor - log.first).unwrap_or(usize::MAX);
            let mut tags = 0;
            for entry in log.entries.range(first.min(log.entries.len())..) {
                if tags > 0 && count.bytes >= max_bytes {
                    break;
                }
                progress.cursor += 1;
                self.headers_version = entry.headers_version;
                if !key_frame_seen && entry.tag.kind() == TagKind::Video && !entry.tag.is_header() {
                    let since = *progress.waiting_since.get_or_insert(entry.at);
                    key_frame_seen =
                        entry.tag.is_key_frame() || entry.at - since >= ANY_FRAME_AFTER_MS;
                    if !key_frame_seen {
                        continue;
                    }
                }
                emit(progress.cursor - 1, &entry.tag, &mut count);
                tags += 1;
            }
            progress.phase = Phase::Reading { key_frame_seen };
        } else if ended {
            // No start point will come.
            if progress.phase == Phase::Resuming {
                count.skipped = log.next() - progress.cursor;
            }
            progress.cursor = log.next();
        }
        // While the log is locked.
        self.stream.cursor.set(match progress.phase {
            Phase::Reading { .. } => progress.cursor,
            Phase::Joining | Phase::Resuming => Cursor::NOWHERE,
        });
        drop(log);
        match (count.tags, ended) {
            (0, true) => {
                self.stream.count_skipped(count.skipped);
                ReadOutcome::Ended
            }
            (0, false) => ReadOutcome::Pending,
            _ => ReadOutcome::Read(count),
        }
    }

    /// The kinds of media that the stream has, for the header of a file that this reader fills.
    /// `None` while a kind may still come: until both are there, or after a second of media.
    pub fn settled_tracks(&self) -> Option<Tracks> {
        self.stream.read_log().settled_tracks()
    }

    /// The kinds of media that the stream has so far.
    pub fn tracks(&self) -> Tracks {
        self.stream.read_log().tracks()
    }

    /// Waits until there is something to read, then reads like [`Reader::try_read`].
    /// Cancel-safe: no tag is lost if the future is dropped.
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
                ReadOutcome::Pending => self.woken().await,
            }
        }
    }

    /// Waits until there may be something new to read, or the end. Cancel-safe.
    pub async fn woken(&mut self) {
        // Cannot fail: the sender is in the stream, which this reader holds.
        let _ = self.wake.changed().await;
    }

    /// This reader's position; `None` while it waits for a start point.
    pub fn position(&self) -> Option<Position> {
        match self.progress.phase {
            Phase::Joining | Phase::Resuming => None,
            Phase::Reading { key_frame_seen } => {
                Some(Position { index: self.progress.cursor, key_frame_seen })
            }
        }
    }

    /// The stream that is read.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }
}
