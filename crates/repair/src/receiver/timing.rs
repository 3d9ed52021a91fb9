//! How long to wait: for what is only reordered, and for answers.

use std::time::{Duration, Instant};

/// The time from a request to its answer, smoothed as in RFC 6298 §2.
#[derive(Debug)]
pub(super) struct RoundTrip {
    pub(super) smoothed: Duration,
    variation: Duration,
    sampled_at: Option<Instant>,
    hinted: bool,
}

impl RoundTrip {
    pub(super) fn sample(&mut self, now: Instant, sample: Duration) {
        if self.sampled_at.replace(now).is_none() && !self.hinted {
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
            self.hinted = true;
        }
    }

    /// How long after a request its answer is overdue.
    pub(super) fn retry_after(&self) -> Duration {
        let margin = (self.variation * 2).clamp(MIN_MARGIN, self.smoothed / 2 + MIN_MARGIN);
        (self.smoothed + margin + TIMER_GRAIN).max(MIN_RETRY)
    }

    /// How long after a request its answer is later than most.
    pub(super) fn retry_in_haste_after(&self) -> Duration {
        let margin = (self.variation / 2).clamp(MIN_MARGIN, self.smoothed / 4 + MIN_MARGIN);
        (self.smoothed + margin + TIMER_GRAIN).max(MIN_RETRY)
    }

    /// How many tries, one after the other, there is time for at the most.
    pub(super) fn tries_within(&self, left: Duration) -> u32 {
        let each = self.retry_in_haste_after().as_micros().max(1);
        match left.checked_sub(self.least_for_a_try()) {
            Some(more) => 1 + (more.as_micros() / each) as u32,
            None => 0,
        }
    }

    /// What comes sooner after a request than this is no answer to it.
    pub(super) fn least(&self) -> Duration {
        self.smoothed * 3 / 4
    }

    /// How much time a try needs to be of use.
    pub(super) fn least_for_a_try(&self) -> Duration {
        self.smoothed + TIMER_GRAIN * 2
    }
}

impl Default for RoundTrip {
    fn default() -> Self {
        let guess = Duration::from_millis(100);
        Self { smoothed: guess, variation: guess / 8, sampled_at: None, hinted: false }
    }
}

/// Learns how long a number that is missing should be waited for before it counts as lost.
#[derive(Debug, Default)]
pub(super) struct ReorderEstimate {
    /// Share of gaps that closed by themselves, 0..=1, over the last hundred or so.
    share: f32,
    /// How late the late ones come: follows the longest, slowly forgets it.
    lateness: Duration,
}

impl ReorderEstimate {
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
        // What is due within the timer's grain is asked for already.
        (self.lateness + TIMER_GRAIN * 2).min(round_trip / 4).min(MAX_REORDER_WAIT)
    }
}

/// Learns how much later packets come than the word that they were sent, where the two go different
/// ways: a satellite's, and the ground's.
#[derive(Debug, Default)]
pub(super) struct ControlSkew {
    /// The newest number that was told and had not come, and when.
    told: Option<(u64, Instant)>,
    sample: Duration,
    lag: Duration,
}

impl ControlSkew {
    /// Everything up to `newest` was sent, and has not come.
    pub(super) fn told(&mut self, now: Instant, newest: u64) {
        self.told.get_or_insert((newest, now));
    }

    /// A packet came as it was sent.
    pub(super) fn came(&mut self, now: Instant, number: u64) {
        let Some((told, at)) = self.told.filter(|(told, _)| *told <= number) else { return };
        self.told = None;
        // If it is a later one, that one was lost, and says nothing.
        if number == told {
            let sample = now.saturating_duration_since(at);
            // Of two, the lesser: a clock may jump.
            let lag = sample.min(std::mem::replace(&mut self.sample, sample));
            self.lag = lag.max(self.lag - self.lag.saturating_sub(lag) / 8);
        }
    }

    /// Whether it waits for what was told.
    pub(super) fn is_told(&self) -> bool {
        self.told.is_some()
    }

    /// Word came that was not ahead of the packets.
    pub(super) fn decay(&mut self) {
        self.lag -= self.lag / 8;
    }

    /// How long to wait for what was told.
    pub(super) fn wait(&self) -> Duration {
        (self.lag * 9 / 8).min(MAX_LAG)
    }
}

/// Learns how much does not come by itself.
#[derive(Debug, Default)]
pub(super) struct LossEstimate {
    /// Share of packets, 0..=1, over the last few hundred.
    share: f32,
}

impl LossEstimate {
    /// A packet came, and as many before it did not.
    pub(super) fn came_after(&mut self, missing: u64) {
        for _ in 0..missing.min(LOSING_OVER) {
            self.share += (1.0 - self.share) / LOSING_OVER as f32;
        }
        self.share -= self.share / LOSING_OVER as f32;
    }

    /// So many came, and nothing was missing.
    pub(super) fn came_in_a_row(&mut self, packets: u64) {
        let forgets = 1.0 - 1.0 / LOSING_OVER as f32;
        self.share *= forgets.powi(i32::try_from(packets).unwrap_or(i32::MAX));
    }

    pub(super) fn is_heavy(&self) -> bool {
        self.share > HEAVY_LOSS
    }
}

/// Timers are that coarse; what is due within it is due.
pub(super) const TIMER_GRAIN: Duration = Duration::from_millis(1);
/// On a path without delay, requests are not worth more than that.
const MIN_RETRY: Duration = Duration::from_millis(6);
/// What timers and queues on both ends add to a round trip that does not vary.
const MIN_MARGIN: Duration = Duration::from_millis(1);
const MAX_REORDER_WAIT: Duration = Duration::from_millis(25);
const REORDERING_IS_COMMON: f32 = 0.05;
/// Longer than a satellite's way and its queues.
const MAX_LAG: Duration = Duration::from_secs(2);
const LOSING_OVER: u64 = 256;
const HEAVY_LOSS: f32 = 0.12;
const SAMPLE_FRESH: Duration = Duration::from_secs(5);
