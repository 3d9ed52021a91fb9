//! How long to wait: for what is only reordered, and for answers.

use std::time::{Duration, Instant};

use crate::repair::resend::copy_spacing;

/// The time from a request to its answer, smoothed as in RFC 6298 §2.
#[derive(Debug)]
pub(super) struct RoundTrip {
    pub(super) smoothed: Duration,
    variation: Duration,
    sampled_at: Option<Instant>,
}

impl RoundTrip {
    pub(super) fn sample(&mut self, now: Instant, sample: Duration) {
        if self.sampled_at.replace(now).is_none() {
            self.smoothed = sample;
            self.variation = sample / 4;
            return;
        }
        self.variation = (self.variation * 3 + self.smoothed.abs_diff(sample)) / 4;
        self.smoothed = (self.smoothed * 7 + sample) / 8;
    }

    /// A round trip measured elsewhere counts while no answer of our own is fresh.
    pub(super) fn hint(&mut self, now: Instant, round_trip: Duration, variation: Duration) {
        let fresh = |at: Instant| now.saturating_duration_since(at) < SAMPLE_FRESH;
        if !self.sampled_at.is_some_and(fresh) {
            self.smoothed = round_trip;
            self.variation = variation;
        }
    }

    /// How long after a request for so many copies the last of them is overdue.
    pub(super) fn retry_after(&self, copies: u8) -> Duration {
        let margin = (self.variation * 2).clamp(MIN_MARGIN, self.smoothed / 2 + MIN_MARGIN);
        let copies = copy_spacing(self.smoothed) * u32::from(copies.saturating_sub(1));
        (self.smoothed + margin + copies + TIMER_GRAIN).max(MIN_RETRY)
    }

    /// What comes sooner after a request than this is no answer to it.
    pub(super) fn least(&self) -> Duration {
        self.smoothed * 3 / 4
    }

    /// How much time a try needs to be of use, said twice.
    pub(super) fn least_for_a_try(&self) -> Duration {
        self.smoothed + self.repeat_after()
    }

    /// How long after a request it is repeated.
    pub(super) fn repeat_after(&self) -> Duration {
        (self.smoothed / 16).clamp(MIN_REPEAT_GAP, MAX_REPEAT_GAP)
    }
}

impl Default for RoundTrip {
    fn default() -> Self {
        let guess = Duration::from_millis(100);
        Self { smoothed: guess, variation: guess / 8, sampled_at: None }
    }
}

/// Learns how long a number that is missing should be waited for before it counts as lost.
#[derive(Debug, Default)]
pub(super) struct Reordering {
    /// Share of gaps that closed by themselves, 0..=1, over the last hundred or so.
    share: f32,
    /// How late the late ones come: follows the longest, slowly forgets it.
    lateness: Duration,
}

impl Reordering {
    pub(super) fn came_late(&mut self, by: Duration) {
        self.share += (1.0 - self.share) / 64.0;
        self.lateness = match by > self.lateness {
            true => by,
            false => self.lateness - (self.lateness - by) / 32,
        };
    }

    pub(super) fn was_lost(&mut self) {
        self.share -= self.share / 64.0;
    }

    /// Worth it only where reordering is common, and never longer than a quarter of the round trip:
    /// past that, asking in vain is cheaper than asking late.
    pub(super) fn wait(&self, round_trip: Duration) -> Duration {
        if self.share < REORDERING_IS_COMMON {
            return Duration::ZERO;
        }
        self.lateness.min(round_trip / 4).min(MAX_REORDER_WAIT)
    }
}

/// Timers are that coarse; what is due within it is due.
pub(super) const TIMER_GRAIN: Duration = Duration::from_millis(1);
pub(super) const MIN_REPEAT_GAP: Duration = Duration::from_millis(2);
const MAX_REPEAT_GAP: Duration = Duration::from_millis(5);
/// On a path without delay, requests are not worth more than that.
const MIN_RETRY: Duration = Duration::from_millis(5);
/// What timers and queues on both ends add to a round trip that does not vary.
const MIN_MARGIN: Duration = Duration::from_millis(1);
const MAX_REORDER_WAIT: Duration = Duration::from_millis(25);
const REORDERING_IS_COMMON: f32 = 0.05;
const SAMPLE_FRESH: Duration = Duration::from_secs(5);
