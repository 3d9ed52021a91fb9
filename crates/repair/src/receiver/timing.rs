//! Estimators: round trip, reordering, loss, and the skew between control messages and packets.

use std::time::{Duration, Instant};

/// Time from a request to its answer, smoothed as in RFC 6298 §2.
#[derive(Debug)]
pub(super) struct RoundTrip {
    pub(super) smoothed: Duration,
    variation: Duration,
    sampled_at: Option<Instant>,
    has_hint: bool,
}

impl RoundTrip {
    pub(super) fn sample(&mut self, now: Instant, sample: Duration) {
        if self.sampled_at.replace(now).is_none() && !self.has_hint {
            self.smoothed = sample;
            self.variation = sample / 4;
            return;
        }
        self.variation = (self.variation * 3 + self.smoothed.abs_diff(sample)) / 4;
        self.smoothed = (self.smoothed * 7 + sample) / 8;
    }

    /// Sets a round trip measured elsewhere, unless there is a recent sample.
    pub(super) fn hint(&mut self, now: Instant, round_trip: Duration, variation: Duration) {
        let fresh = |at: Instant| now.saturating_duration_since(at) < SAMPLE_FRESH;
        if !self.sampled_at.is_some_and(fresh) {
            self.smoothed = round_trip;
            self.variation = variation;
            self.has_hint = true;
        }
    }

    /// Returns the time after a request when its answer is overdue.
    pub(super) fn retry_after(&self) -> Duration {
        let margin = (self.variation * 2).clamp(MIN_MARGIN, self.smoothed / 2 + MIN_MARGIN);
        (self.smoothed + margin + TIMER_GRAIN).max(MIN_RETRY)
    }

    /// Returns the time after a request when its answer is later than most.
    pub(super) fn hasty_retry_after(&self) -> Duration {
        let margin = (self.variation / 2).clamp(MIN_MARGIN, self.smoothed / 4 + MIN_MARGIN);
        (self.smoothed + margin + TIMER_GRAIN).max(MIN_RETRY)
    }

    /// Returns the most successive tries that fit in the remaining time.
    pub(super) fn tries_within(&self, left: Duration) -> u32 {
        let each = self.hasty_retry_after().as_micros().max(1);
        match left.checked_sub(self.min_try()) {
            Some(more) => 1 + (more.as_micros() / each) as u32,
            None => 0,
        }
    }

    /// Returns the shortest time from a request to its answer: an earlier packet is no answer.
    pub(super) fn min_answer(&self) -> Duration {
        self.smoothed * 3 / 4
    }

    /// Returns the least time that a try takes.
    pub(super) fn min_try(&self) -> Duration {
        self.smoothed + TIMER_GRAIN * 2
    }
}

impl Default for RoundTrip {
    fn default() -> Self {
        let guess = Duration::from_millis(100);
        Self { smoothed: guess, variation: guess / 8, sampled_at: None, has_hint: false }
    }
}

/// Estimates how long a missing packet may be reordered before it counts as lost.
#[derive(Debug, Default)]
pub(super) struct ReorderEstimate {
    /// Share of gaps that closed without a repair, 0..=1 (EWMA, gain 1/64).
    share: f32,
    /// Delay of reordered packets: peak hold with slow decay (1/32).
    lateness: Duration,
}

impl ReorderEstimate {
    pub(super) fn record_reordered(&mut self, delay: Duration) {
        self.share += (1.0 - self.share) / 64.0;
        self.lateness = match delay > self.lateness {
            true => delay,
            false => self.lateness - (self.lateness - delay) / 32,
        };
    }

    pub(super) fn record_lost(&mut self) {
        self.share -= self.share / 64.0;
    }

    /// Returns how long to wait before a request: zero unless reordering is common, and at most a
    /// quarter of the round trip, beyond which a needless request costs less than a late one.
    pub(super) fn wait(&self, round_trip: Duration) -> Duration {
        if self.share < REORDERING_IS_COMMON {
            return Duration::ZERO;
        }
        // Requests may be sent one timer grain early.
        (self.lateness + TIMER_GRAIN * 2).min(round_trip / 4).min(MAX_REORDER_WAIT)
    }
}

/// Estimates how much later packets arrive than the heartbeats that announce them, where the two take
/// different routes: RTP by satellite, control by ground.
///
/// An announcement is *pending* from [`Self::announce`] until a packet with that number or a later
/// one arrives.
#[derive(Debug, Default)]
pub(super) struct ControlSkew {
    /// The pending announcement: its newest number, and when it arrived.
    pending: Option<(u64, Instant)>,
    last_sample: Duration,
    skew: Duration,
}

impl ControlSkew {
    /// Records an announcement that packets up to `newest` were sent, which have not arrived.
    pub(super) fn announce(&mut self, now: Instant, newest: u64) {
        self.pending.get_or_insert((newest, now));
    }

    /// Records the arrival of a live packet.
    pub(super) fn record_arrival(&mut self, now: Instant, number: u64) {
        let Some((announced, at)) = self.pending.filter(|(announced, _)| *announced <= number)
        else {
            return;
        };
        self.pending = None;
        // A later number means that the announced packet was lost: no sample.
        if number == announced {
            let sample = now.saturating_duration_since(at);
            // The smaller of two samples, because a clock may jump. Peak hold with decay (1/8).
            let skew = sample.min(std::mem::replace(&mut self.last_sample, sample));
            self.skew = skew.max(self.skew - self.skew.saturating_sub(skew) / 8);
        }
    }

    /// `true` if an announcement is pending.
    pub(super) fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Records a heartbeat that was not ahead of the packets.
    pub(super) fn decay(&mut self) {
        self.skew -= self.skew / 8;
    }

    /// Returns how long to wait for announced packets.
    pub(super) fn wait(&self) -> Duration {
        (self.skew * 9 / 8).min(MAX_SKEW)
    }
}

/// Estimates the share of packets that do not arrive live.
#[derive(Debug, Default)]
pub(super) struct LossEstimate {
    /// Share of missing packets, 0..=1 (EWMA, gain 1/256).
    share: f32,
}

impl LossEstimate {
    /// Records an arrival after `missing` missing packets.
    pub(super) fn record(&mut self, missing: u64) {
        for _ in 0..missing.min(LOSS_WINDOW) {
            self.share += (1.0 - self.share) / LOSS_WINDOW as f32;
        }
        self.share -= self.share / LOSS_WINDOW as f32;
    }

    /// Records consecutive arrivals.
    pub(super) fn record_run(&mut self, packets: u64) {
        let decay = 1.0 - 1.0 / LOSS_WINDOW as f32;
        self.share *= decay.powi(i32::try_from(packets).unwrap_or(i32::MAX));
    }

    /// `true` if loss is so heavy that requests should be batched.
    pub(super) fn is_heavy(&self) -> bool {
        self.share > HEAVY_LOSS
    }
}

/// Timer resolution: events due within it are due.
pub(super) const TIMER_GRAIN: Duration = Duration::from_millis(1);
/// Shortest interval between tries, for paths without delay.
const MIN_RETRY: Duration = Duration::from_millis(6);
/// Delay by timers and queues on both ends that a constant round trip does not include.
const MIN_MARGIN: Duration = Duration::from_millis(1);
const MAX_REORDER_WAIT: Duration = Duration::from_millis(25);
const REORDERING_IS_COMMON: f32 = 0.05;
/// More than the delay of a satellite link and its queues.
const MAX_SKEW: Duration = Duration::from_secs(2);
const LOSS_WINDOW: u64 = 256;
const HEAVY_LOSS: f32 = 0.12;
const SAMPLE_FRESH: Duration = Duration::from_secs(5);
