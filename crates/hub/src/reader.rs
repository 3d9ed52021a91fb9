//! A cursor in a stream's log.

use std::{
    ops::Deref,
    sync::{Arc, atomic::Ordering},
};

use tokio::sync::watch;

use super::Stream;
use downpour_media::flv::{Tag, TagKind};

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

/// A sink's cursor in a stream's log.
///
/// It starts at the newest group of pictures with the headers in effect there in front of it
/// (metadata, video, audio; at the time of the group's first tag). A stream that has video but no
/// key frame in the log is waited for; a stream without video is joined at most
/// [`AUDIO_JOIN_MS`] back.
///
/// A clone reads on from the same place.
#[derive(Debug, Clone)]
pub struct Reader {
    stream: Counted,
    pub(super) wake: watch::Receiver<()>,
    backlog: MaxLag,
    /// Index in the log of the next tag to read.
    pub(super) cursor: u64,
    phase: Phase,
    /// Which headers this reader has been given last.
    headers_version: u64,
}

/// A reader's stream, which counts it as long as it lives.
#[derive(Debug)]
struct Counted(Arc<Stream>);

impl Counted {
    fn new(stream: Arc<Stream>) -> Self {
        stream.readers.fetch_add(1, Ordering::Relaxed);
        Self(stream)
    }
}

impl Deref for Counted {
    type Target = Arc<Stream>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl Clone for Counted {
    fn clone(&self) -> Self {
        Self::new(self.0.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::Relaxed);
    }
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

/// Where a reader is in the log. Readers of one stream at the same place will read the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Index of the next tag to read, counted from the publication's first tag.
    pub index: u64,
    /// Whether a key frame has been read, without which other frames are left out.
    pub key_frame_seen: bool,
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
    pub(super) fn new(stream: Arc<Stream>) -> Self {
        let stream = Counted::new(stream);
        Self {
            wake: stream.hear(&stream.tags),
            stream,
            backlog: MaxLag::UNLIMITED,
            cursor: 0,
            phase: Phase::Joining,
            headers_version: 0,
        }
    }

    /// Has this reader woken by video, headers and the end only; audio rides along. Where there has
    /// been no video for 10 s of media time, each tag wakes, and so does what comes when nobody was
    /// woken for 50 ms. What comes right before the source stalls is read when somebody looks.
    pub fn waking_with_video(mut self) -> Self {
        self.wake = self.stream.hear(&self.stream.frames);
        self
    }

    /// Sets how far this reader may fall behind.
    pub fn with_max_lag(mut self, backlog: MaxLag) -> Self {
        self.backlog = backlog;
        self
    }

    /// Appends the next tags to `out`: headers and one tag at least, then on while `out` has
    /// gained less than `max_bytes` bytes. A skip appends the headers again if they have changed.
    pub fn try_read(&mut self, out: &mut impl Extend<Tag>, max_bytes: usize) -> ReadOutcome {
        let outcome =
            self.try_read_each(max_bytes, |_, tag| out.extend(std::iter::once(tag.clone())));
        if let ReadOutcome::Read(count) = outcome {
            self.stream.count_skipped(count.skipped);
        }
        outcome
    }

    /// The same, with `each` called for each tag and its index in the log. Headers in front have the
    /// index of the tag that they precede, which after a skip is the one that was skipped to. The
    /// publisher waits as long as `each` takes.
    ///
    /// Skips that are told are the caller's to count ([`Stream::count_skipped`]): it may read for
    /// many, who need not have missed the same.
    pub fn try_read_each(
        &mut self,
        max_bytes: usize,
        mut each: impl FnMut(u64, &Tag),
    ) -> ReadOutcome {
        // Read before the log is: an end that is seen here has all tags in front of it.
        let ended = self.stream.ended();
        if !ended && self.stream.next.load(Ordering::Acquire) == self.cursor {
            return ReadOutcome::Pending;
        }
        let log = self.stream.read_log();
        let mut count = ReadCount::default();
        let mut emit = |index: u64, tag: &Tag, count: &mut ReadCount| {
            count.tags += 1;
            count.bytes += tag.framed().len();
            each(index, tag);
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
                    emit(join.index, tag, &mut count);
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
                emit(self.cursor - 1, &entry.tag, &mut count);
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
        match (count.tags, ended) {
            (0, true) => {
                self.stream.count_skipped(count.skipped);
                ReadOutcome::Ended
            }
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
                ReadOutcome::Pending => self.woken().await,
            }
        }
    }

    /// Waits until there may be something new to read, or the end. Cancel-safe.
    pub async fn woken(&mut self) {
        // The sender lives in the stream that this reader holds, so that it cannot be gone.
        let _ = self.wake.changed().await;
    }

    /// Where this reader is; `None` while it waits for a place to begin, or to begin again.
    pub fn place(&self) -> Option<Position> {
        match self.phase {
            Phase::Joining | Phase::Resuming => None,
            Phase::Reading { key_frame_seen } => {
                Some(Position { index: self.cursor, key_frame_seen })
            }
        }
    }

    /// The stream that is read.
    pub fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }
}
