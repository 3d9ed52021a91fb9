//! One direction of a network path, without a clock.

use std::{
    cmp::Ordering,
    collections::BinaryHeap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// One direction of a path that loses, delays, duplicates and reorders datagrams. The outcome is a
/// function of seed, settings and input.
///
/// Stages in order: blackouts, burst loss, random loss, duplication, the rate limit's queue, delay
/// and jitter, reordering. Jitter alone keeps the order.
///
/// The caller passes the time: [`Link::send`] puts a datagram on the path, [`Link::poll_output`]
/// returns those that have arrived, [`Link::next_deadline`] is the time of the next arrival.
#[derive(Debug)]
pub struct Link {
    settings: LinkSettings,
    stats: LinkStats,
    rng: SmallRng,
    in_flight: BinaryHeap<InFlight>,
    in_flight_bytes: usize,
    /// Sequence number of the next datagram in flight: breaks ties between equal arrival times.
    next_order: u64,
    /// When the rate limit's queue is empty.
    line_free: Option<Instant>,
    /// Arrival of the last datagram that was not reordered.
    last_due: Option<Instant>,
    /// Time of the first datagram under these settings, from which blackouts count.
    epoch: Option<Instant>,
    burst: Option<BurstState>,
}

impl Link {
    /// An empty path. `seed` determines all random draws.
    pub fn new(settings: LinkSettings, seed: u64) -> Self {
        Self {
            settings,
            stats: LinkStats::default(),
            rng: SmallRng::seed_from_u64(seed),
            in_flight: BinaryHeap::new(),
            in_flight_bytes: 0,
            next_order: 0,
            line_free: None,
            last_due: None,
            epoch: None,
            burst: None,
        }
    }

    /// Puts a datagram on the path. `now` must not decrease.
    pub fn send(&mut self, now: Instant, datagram: Bytes) {
        self.stats.sent += 1;
        let epoch = *self.epoch.get_or_insert(now);
        let since = now.saturating_duration_since(epoch);
        if self.settings.blackouts.iter().any(|blackout| blackout.covers(since)) {
            self.stats.dropped_blackout += 1;
            return;
        }
        if self.lost_in_burst(now) {
            self.stats.dropped_burst += 1;
            return;
        }
        if self.chance(self.settings.loss) {
            self.stats.dropped_random += 1;
            return;
        }
        if self.chance(self.settings.duplicate) {
            self.stats.duplicated += 1;
            self.transmit(now, datagram.clone());
        }
        self.transmit(now, datagram);
    }

    /// Returns the next datagram that has arrived by `now`, in order of arrival.
    pub fn poll_output(&mut self, now: Instant) -> Option<Bytes> {
        if self.next_deadline()? > now {
            return None;
        }
        let arrived = self.in_flight.pop()?;
        self.in_flight_bytes -= arrived.datagram.len();
        self.stats.delivered += 1;
        Some(arrived.datagram)
    }

    /// Replaces the settings. Datagrams in flight keep their arrival times.
    pub fn set_settings(&mut self, settings: LinkSettings) {
        self.settings = settings;
        self.epoch = None;
        self.burst = None;
    }

    /// Returns the counters and resets them.
    pub fn take_stats(&mut self) -> LinkStats {
        std::mem::take(&mut self.stats)
    }

    /// Returns the time at which [`Link::poll_output`] has the next datagram.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.in_flight.peek().map(|first| first.due)
    }

    /// Returns the counters since the start or the last [`Link::take_stats`].
    pub fn stats(&self) -> &LinkStats {
        &self.stats
    }

    /// Sends one copy, unless a queue is full.
    fn transmit(&mut self, now: Instant, datagram: Bytes) {
        let Some(departs) = self.depart(now, datagram.len()) else {
            self.stats.dropped_queue += 1;
            return;
        };
        let mut due = departs + self.settings.delay;
        if !self.settings.jitter.is_zero() {
            due += self.settings.jitter.mul_f64(self.rng.random::<f64>());
        }
        due = self.last_due.map_or(due, |last| due.max(last));
        if self.chance(self.settings.reorder) {
            due += self.settings.reorder_delay;
            self.stats.reordered += 1;
        } else {
            self.last_due = Some(due);
        }
        self.in_flight_bytes += datagram.len();
        self.in_flight.push(InFlight { due, order: self.next_order, datagram });
        self.next_order += 1;
    }

    /// Returns the time at which the last bit leaves the sender, or `None` if its queue is full.
    fn depart(&mut self, now: Instant, len: usize) -> Option<Instant> {
        if self.in_flight_bytes + len > MAX_IN_FLIGHT {
            return None;
        }
        let Some(rate) = self.settings.rate_bps else {
            // A datagram sent under an earlier rate limit may still be leaving.
            return Some(self.line_free.map_or(now, |free| free.max(now)));
        };
        let starts = self.line_free.map_or(now, |free| free.max(now));
        let queued = starts.duration_since(now).as_secs_f64() * rate.max(1) as f64 / 8.0;
        if queued + len as f64 > self.settings.queue_bytes as f64 {
            return None;
        }
        let ends = starts + Duration::from_secs_f64(len as f64 * 8.0 / rate.max(1) as f64);
        self.line_free = Some(ends);
        Some(ends)
    }

    fn lost_in_burst(&mut self, now: Instant) -> bool {
        let Some(bursts) = self.settings.bursts else { return false };
        let state = match &mut self.burst {
            Some(state) => state,
            None => self.burst.insert(BurstState::stationary(&bursts, now, &mut self.rng)),
        };
        state.advance(&bursts, now, &mut self.rng);
        state.bad && self.chance(bursts.loss)
    }

    /// Draws a random number only if the probability is neither 0 nor 1. Without random loss, bursts
    /// are therefore independent of the traffic; and after a change of settings, the losses do not
    /// depend on earlier datagrams.
    fn chance(&mut self, probability: f64) -> bool {
        probability >= 1.0 || probability > 0.0 && self.rng.random::<f64>() < probability
    }
}

/// The impairments of a [`Link`]. The default is a perfect path.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkSettings {
    /// Share of datagrams lost independently of each other, 0 to 1.
    pub loss: f64,
    /// Burst loss, in addition.
    pub bursts: Option<Bursts>,
    /// Share of datagrams that arrive twice, 0 to 1.
    pub duplicate: f64,
    /// Share of datagrams delayed so that later ones overtake them, 0 to 1.
    pub reorder: f64,
    /// Additional delay of reordered datagrams.
    pub reorder_delay: Duration,
    /// One-way delay of every datagram.
    pub delay: Duration,
    /// The largest additional delay, drawn uniformly. Keeps the order.
    pub jitter: Duration,
    /// Rate limit in payload bits per second; `None` is unlimited.
    pub rate_bps: Option<u64>,
    /// Queue of the rate limit in bytes. A datagram that does not fit is dropped.
    pub queue_bytes: usize,
    /// Periods in which every datagram is lost.
    pub blackouts: Vec<Blackout>,
}

impl LinkSettings {
    /// A path with random loss, 0 to 1.
    pub fn lossy(loss: f64) -> Self {
        Self { loss, ..Self::default() }
    }

    /// A path that loses every datagram.
    pub fn cut() -> Self {
        Self::lossy(1.0)
    }
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            loss: 0.0,
            bursts: None,
            duplicate: 0.0,
            reorder: 0.0,
            reorder_delay: Duration::from_millis(10),
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            rate_bps: None,
            queue_bytes: 256 << 10,
            blackouts: Vec::new(),
        }
    }
}

/// Gilbert-Elliott burst loss: the path alternates between a good and a bad state.
///
/// Time drives the transitions, not the number of datagrams. Driven by datagrams, a sparse flow
/// such as repair requests would stay in a burst for seconds, which real paths do not do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bursts {
    /// Mean time between two bursts, exponentially distributed.
    pub mean_gap: Duration,
    /// Mean length of a burst, exponentially distributed.
    pub mean_length: Duration,
    /// Share of datagrams lost during a burst, 0 to 1.
    pub loss: f64,
}

impl Bursts {
    /// Bursts of total loss that cover `share` of the time, 0 to 1.
    pub fn covering(share: f64, mean_length: Duration) -> Self {
        let share = share.clamp(1e-6, 1.0);
        let mean_gap = mean_length.mul_f64((1.0 - share) / share);
        Self { mean_gap, mean_length, loss: 1.0 }
    }
}

/// A period of total loss, relative to the first datagram under the settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blackout {
    /// Start of the first period.
    pub start: Duration,
    /// Length of a period.
    pub length: Duration,
    /// Time from one start to the next; `None` for a single period.
    pub period: Option<Duration>,
}

impl Blackout {
    fn covers(&self, since: Duration) -> bool {
        let Some(into) = since.checked_sub(self.start) else { return false };
        match self.period.filter(|period| !period.is_zero()) {
            Some(period) => into.as_nanos() % period.as_nanos() < self.length.as_nanos(),
            None => into < self.length,
        }
    }
}

/// Counters of a [`Link`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams delivered, duplicates included.
    pub delivered: u64,
    /// Lost to [`LinkSettings::loss`].
    pub dropped_random: u64,
    /// Lost to [`LinkSettings::bursts`].
    pub dropped_burst: u64,
    /// Lost to [`LinkSettings::blackouts`].
    pub dropped_blackout: u64,
    /// Lost to a full queue: the rate limit's, or the link's bound of 64 MiB in flight.
    pub dropped_queue: u64,
    /// Duplicates sent. Like the original, a duplicate can be lost to a full queue.
    pub duplicated: u64,
    /// Datagrams delayed so that later ones overtake them.
    pub reordered: u64,
}

impl LinkStats {
    /// Returns the number of lost datagrams of all causes.
    pub fn dropped(&self) -> u64 {
        self.dropped_random + self.dropped_burst + self.dropped_blackout + self.dropped_queue
    }
}

impl std::ops::AddAssign for LinkStats {
    fn add_assign(&mut self, other: Self) {
        self.sent += other.sent;
        self.delivered += other.delivered;
        self.dropped_random += other.dropped_random;
        self.dropped_burst += other.dropped_burst;
        self.dropped_blackout += other.dropped_blackout;
        self.dropped_queue += other.dropped_queue;
        self.duplicated += other.duplicated;
        self.reordered += other.reordered;
    }
}

#[derive(Debug)]
struct InFlight {
    due: Instant,
    order: u64,
    datagram: Bytes,
}

impl Ord for InFlight {
    /// Reversed, because `BinaryHeap` pops the greatest and the earliest must come first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.due, other.order).cmp(&(self.due, self.order))
    }
}

impl PartialOrd for InFlight {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for InFlight {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for InFlight {}

#[derive(Debug)]
struct BurstState {
    bad: bool,
    /// Time of the next transition.
    until: Instant,
}

impl BurstState {
    /// Draws a state from the stationary distribution.
    fn stationary(bursts: &Bursts, now: Instant, rng: &mut SmallRng) -> Self {
        let cycle = bursts.mean_gap + bursts.mean_length;
        let share = bursts.mean_length.as_secs_f64() / cycle.as_secs_f64().max(f64::MIN_POSITIVE);
        let bad = rng.random::<f64>() < share;
        let mut state = Self { bad, until: now };
        state.until += state.draw_stay(bursts, rng);
        state
    }

    fn advance(&mut self, bursts: &Bursts, now: Instant, rng: &mut SmallRng) {
        // After a long silence the old state is irrelevant. This bounds the loop.
        let cycle = bursts.mean_gap + bursts.mean_length;
        if now.saturating_duration_since(self.until) > cycle.saturating_mul(64) {
            *self = Self::stationary(bursts, now, rng);
        }
        while self.until <= now {
            self.bad = !self.bad;
            self.until += self.draw_stay(bursts, rng);
        }
    }

    /// Draws the time that the current state lasts.
    fn draw_stay(&self, bursts: &Bursts, rng: &mut SmallRng) -> Duration {
        let mean = if self.bad { bursts.mean_length } else { bursts.mean_gap };
        let length = mean.as_secs_f64() * -(1.0 - rng.random::<f64>()).ln();
        // Never zero, so that the loop in `advance` ends.
        Duration::from_secs_f64(length.min(1e6)).max(Duration::from_micros(1))
    }
}

/// Bytes in flight per link: bounds the memory of a path with seconds of delay.
const MAX_IN_FLIGHT: usize = 64 << 20;

#[cfg(test)]
mod tests;
