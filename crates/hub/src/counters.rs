//! Counters and rates of a stream.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Instant,
};

use downpour_media::flv::{Tag, TagKind};

/// Counters of one stream. Bytes are those of tag bodies.
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
    /// Current number of viewers.
    pub viewers: AtomicU64,
    /// Tags that readers skipped because they were too slow, summed over all readers.
    pub skipped_tags: AtomicU64,
}

impl Counters {
    /// Counts a tag. Only the publisher calls this, so plain loads and stores suffice.
    pub(super) fn count(&self, tag: &Tag) {
        let (tags, bytes) = match tag.kind() {
            TagKind::Video => (&self.video_tags, &self.video_bytes),
            TagKind::Audio => (&self.audio_tags, &self.audio_bytes),
            TagKind::Script => {
                add(&self.script_tags, 1);
                return;
            }
        };
        add(tags, 1);
        add(bytes, tag.body().len() as u64);
        if tag.is_key_frame() {
            add(&self.key_frames, 1);
        }
    }
}

/// Bytes per millisecond in the last window of [`RATE_WINDOW_MS`], for the API: written by the
/// publisher only, read by any thread without a lock, and 0 once the source has stalled.
///
/// It differs from the downstream rate meter on purpose. That one smooths (EWMA over seconds), is
/// updated behind its stream's lock and keeps its value in a stall, because pacing and repair
/// budgets must not follow each second's peak or drop to 0.
pub(super) struct Rates {
    epoch: Instant,
    /// When the window that is being filled began, in milliseconds since `epoch`.
    window_start: AtomicU64,
    pub(super) video: Rate,
    pub(super) audio: Rate,
}

#[derive(Default)]
pub(super) struct Rate {
    window_bytes: AtomicU64,
    speed: AtomicU64,
}

impl Rates {
    pub(super) fn new() -> Self {
        Self {
            epoch: Instant::now(),
            window_start: AtomicU64::new(0),
            video: Rate::default(),
            audio: Rate::default(),
        }
    }

    pub(super) fn count(&self, now: Instant, tag: &Tag) {
        let rate = match tag.kind() {
            TagKind::Video => &self.video,
            TagKind::Audio => &self.audio,
            TagKind::Script => return,
        };
        let now = self.millis(now);
        let elapsed = now.saturating_sub(self.window_start.load(Ordering::Relaxed));
        if elapsed >= RATE_WINDOW_MS {
            for rate in [&self.video, &self.audio] {
                let bytes = rate.window_bytes.load(Ordering::Relaxed);
                rate.window_bytes.store(0, Ordering::Relaxed);
                rate.speed.store(bytes / elapsed, Ordering::Relaxed);
            }
            self.window_start.store(now, Ordering::Relaxed);
        }
        add(&rate.window_bytes, tag.body().len() as u64);
    }

    pub(super) fn speed(&self, rate: &Rate) -> u64 {
        let elapsed =
            self.millis(Instant::now()).saturating_sub(self.window_start.load(Ordering::Relaxed));
        if elapsed > RATE_STALE_MS { 0 } else { rate.speed.load(Ordering::Relaxed) }
    }

    fn millis(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.epoch).as_millis() as u64
    }
}

/// Adds to a counter that no other thread writes.
fn add(counter: &AtomicU64, count: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
}

/// Shortest window of a rate, in milliseconds.
const RATE_WINDOW_MS: u64 = 1_000;
/// A rate is 0 if no window has ended for this long, in milliseconds.
const RATE_STALE_MS: u64 = 5_000;
