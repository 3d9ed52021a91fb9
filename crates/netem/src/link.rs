//! One direction of a network path, in virtual time.

use std::{
    cmp::Ordering,
    collections::BinaryHeap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// A path that loses, delays, doubles and reorders datagrams, the same way for the same seed,
/// settings and input.
///
/// A datagram meets, in this order: blackouts, bursts, random loss, the rate limit's queue,
/// duplication, delay and jitter, reordering. Without reordering the order is kept, whatever the
/// jitter.
#[derive(Debug)]
pub struct Link {
    settings: LinkSettings,
    stats: LinkStats,
    rng: SmallRng,
    in_flight: BinaryHeap<InFlight>,
    in_flight_bytes: usize,
    next_order: u64,
    /// When the rate-limited sender has sent all that it holds.
    line_free: Option<Instant>,
    /// When the newest datagram that was not reordered arrives.
    last_due: Option<Instant>,
    /// The first datagram under these settings: blackouts count from here.
    epoch: Option<Instant>,
    burst: Option<BurstState>,
}

impl Link {
    /// An empty path. `seed` decides every draw.
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

    /// Puts a datagram on the path. `now` must not go back.
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

    /// The next datagram that has arrived by `now`, in the order of arrival.
    pub fn poll_output(&mut self, now: Instant) -> Option<Bytes> {
        if self.next_deadline()? > now {
            return None;
        }
        let arrived = self.in_flight.pop()?;
        self.in_flight_bytes -= arrived.datagram.len();
        self.stats.delivered += 1;
        Some(arrived.datagram)
    }

    /// Replaces the settings. What is on its way already arrives as it would have.
    pub fn set_settings(&mut self, settings: LinkSettings) {
        self.settings = settings;
        self.epoch = None;
        self.burst = None;
    }

    /// What happened since the last call, or since the start.
    pub fn take_stats(&mut self) -> LinkStats {
        std::mem::take(&mut self.stats)
    }

    /// When [`Link::poll_output`] has something next.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.in_flight.peek().map(|first| first.due)
    }

    /// What happened since the start, or since the last [`Link::take_stats`].
    pub fn stats(&self) -> &LinkStats {
        &self.stats
    }

    /// Sends one copy, if there is room for it.
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

    /// When the last bit leaves the sender; `None` when its queue is full.
    fn depart(&mut self, now: Instant, len: usize) -> Option<Instant> {
        if self.in_flight_bytes + len > IN_FLIGHT_MAX {
            return None;
        }
        let Some(rate) = self.settings.rate_bps else {
            // A datagram under an earlier limit may still be leaving.
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

    /// Draws only where the outcome is open. So a path without random loss has the same bursts at
    /// the same times whatever is sent over it, and one that was clean before loses the same
    /// datagrams from the change on, however many had passed.
    fn chance(&mut self, probability: f64) -> bool {
        probability >= 1.0 || probability > 0.0 && self.rng.random::<f64>() < probability
    }
}

/// What a [`Link`] does. The default is a perfect path.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkSettings {
    /// Share of datagrams lost, each on its own, 0 to 1.
    pub loss: f64,
    /// Loss in bursts, besides.
    pub bursts: Option<Bursts>,
    /// Share of datagrams that arrive twice, 0 to 1.
    pub duplicate: f64,
    /// Share of datagrams that later ones overtake, 0 to 1.
    pub reorder: f64,
    /// How much later those arrive.
    pub reorder_delay: Duration,
    /// One-way delay of every datagram.
    pub delay: Duration,
    /// Up to this much more, uniformly drawn; the order stays.
    pub jitter: Duration,
    /// Bits a second of payload that the path carries; `None` is no limit.
    pub rate_bps: Option<u64>,
    /// Bytes that wait for the rate limit; what comes on top is dropped.
    pub queue_bytes: usize,
    /// When nothing gets through at all.
    pub blackouts: Vec<Blackout>,
}

impl LinkSettings {
    /// A path that loses this share of datagrams at random.
    pub fn lossy(loss: f64) -> Self {
        Self { loss, ..Self::default() }
    }

    /// A path that is cut.
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

/// The Gilbert-Elliott model: a path that is good, and for short times bad.
///
/// Time drives it, not the count of datagrams: driven by count, a sparse flow (repair requests)
/// would stay in a burst for seconds, which no real path does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bursts {
    /// Mean time between two bursts; exponentially distributed.
    pub mean_gap: Duration,
    /// Mean length of a burst; exponentially distributed.
    pub mean_length: Duration,
    /// Share of datagrams lost during one, 0 to 1.
    pub loss: f64,
}

impl Bursts {
    /// Bursts of this mean length that lose everything and cover `share` of the time, 0 to 1.
    pub fn covering(share: f64, mean_length: Duration) -> Self {
        let share = share.clamp(1e-6, 1.0);
        let mean_gap = mean_length.mul_f64((1.0 - share) / share);
        Self { mean_gap, mean_length, loss: 1.0 }
    }
}

/// A time in which a link delivers nothing, counted from the first datagram under its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blackout {
    /// When it begins.
    pub start: Duration,
    /// How long it lasts.
    pub length: Duration,
    /// How often it comes back, from start to start; `None` is once.
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

/// What became of the datagrams of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkStats {
    /// Datagrams put in.
    pub sent: u64,
    /// Datagrams that came out, copies included.
    pub delivered: u64,
    /// Lost to [`LinkSettings::loss`].
    pub dropped_random: u64,
    /// Lost to [`LinkSettings::bursts`].
    pub dropped_burst: u64,
    /// Lost to [`LinkSettings::blackouts`].
    pub dropped_blackout: u64,
    /// Lost to a full queue, of the rate limit or of the link's own memory bound.
    pub dropped_queue: u64,
    /// Second copies made; like the first, one may be lost to a full queue.
    pub duplicated: u64,
    /// Datagrams held back so that later ones overtake them.
    pub reordered: u64,
}

impl LinkStats {
    /// All that was lost, for whatever cause.
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
    /// The earliest is the greatest, for `BinaryHeap` gives out the greatest.
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
    until: Instant,
}

impl BurstState {
    /// A state drawn from the long-run shares of both.
    fn stationary(bursts: &Bursts, now: Instant, rng: &mut SmallRng) -> Self {
        let cycle = bursts.mean_gap + bursts.mean_length;
        let share = bursts.mean_length.as_secs_f64() / cycle.as_secs_f64().max(f64::MIN_POSITIVE);
        let bad = rng.random::<f64>() < share;
        let mut state = Self { bad, until: now };
        state.until += state.stay(bursts, rng);
        state
    }

    fn advance(&mut self, bursts: &Bursts, now: Instant, rng: &mut SmallRng) {
        // After a long silence the state depends no more on the old one; this bounds the loop.
        let cycle = bursts.mean_gap + bursts.mean_length;
        if now.saturating_duration_since(self.until) > cycle.saturating_mul(64) {
            *self = Self::stationary(bursts, now, rng);
        }
        while self.until <= now {
            self.bad = !self.bad;
            self.until += self.stay(bursts, rng);
        }
    }

    fn stay(&self, bursts: &Bursts, rng: &mut SmallRng) -> Duration {
        let mean = if self.bad { bursts.mean_length } else { bursts.mean_gap };
        let length = mean.as_secs_f64() * -(1.0 - rng.random::<f64>()).ln();
        // Never zero, so that every change of state takes time and `advance` ends.
        Duration::from_secs_f64(length.min(1e6)).max(Duration::from_micros(1))
    }
}

/// Bytes on the way at most: a delay of seconds must not eat the machine's memory.
const IN_FLIGHT_MAX: usize = 64 << 20;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STEP: Duration = Duration::from_millis(1);

    /// Sends `count` numbered datagrams of 100 bytes, one a millisecond, and takes all that arrives
    /// with its time of arrival, counted from the first one's sending.
    fn run(settings: LinkSettings, seed: u64, count: u32) -> (Vec<(u32, Duration)>, LinkStats) {
        let mut link = Link::new(settings, seed);
        let start = Instant::now();
        let mut arrived = Vec::new();
        let mut take = |link: &mut Link, now: Instant| {
            while let Some(deadline) = link.next_deadline().filter(|deadline| *deadline <= now) {
                let datagram = link.poll_output(deadline).unwrap();
                let number = u32::from_be_bytes(*datagram.first_chunk().unwrap());
                arrived.push((number, deadline - start));
            }
        };
        for number in 0..count {
            let now = start + STEP * number;
            take(&mut link, now);
            let mut datagram = vec![0; 100];
            datagram[..4].copy_from_slice(&number.to_be_bytes());
            link.send(now, datagram.into());
        }
        take(&mut link, start + STEP * count + Duration::from_secs(60));
        assert!(link.next_deadline().is_none());
        let stats = *link.stats();
        assert_eq!(stats.delivered, arrived.len() as u64);
        assert_eq!(stats.sent + stats.duplicated, stats.delivered + stats.dropped());
        (arrived, stats)
    }

    #[test]
    fn a_perfect_path_changes_nothing() {
        let (arrived, stats) = run(LinkSettings::default(), 1, 1000);
        assert!(arrived.iter().enumerate().all(|(i, a)| *a == (i as u32, STEP * i as u32)));
        assert_eq!(stats.dropped(), 0);
    }

    #[test]
    fn a_seed_decides_everything_and_seeds_differ() {
        let settings = LinkSettings {
            loss: 0.1,
            bursts: Some(Bursts::covering(0.05, Duration::from_millis(10))),
            duplicate: 0.02,
            reorder: 0.05,
            delay: Duration::from_millis(20),
            jitter: Duration::from_millis(5),
            ..LinkSettings::default()
        };
        let first = run(settings.clone(), 7, 5000).0;
        assert_eq!(first, run(settings.clone(), 7, 5000).0);
        assert_ne!(first, run(settings, 8, 5000).0);
    }

    #[test]
    fn random_loss_has_the_asked_share_and_no_memory() {
        for (seed, loss) in [(1, 0.01), (2, 0.05), (3, 0.2), (4, 0.5)] {
            let count = 100_000;
            let (arrived, stats) = run(LinkSettings::lossy(loss), seed, count);
            let share = stats.dropped_random as f64 / f64::from(count);
            // Five standard deviations of a binomial share.
            let bound = 5.0 * (loss * (1.0 - loss) / f64::from(count)).sqrt();
            assert!((share - loss).abs() < bound, "{share} of {loss}");
            // Losses come alone: runs of lost ones have the mean length 1 / (1 - p).
            let gaps = arrived.windows(2).map(|w| w[1].0 - w[0].0 - 1).filter(|gap| *gap > 0);
            let (runs, lost) = gaps.fold((0, 0), |(runs, lost), gap| (runs + 1, lost + gap));
            let mean = f64::from(lost) / f64::from(runs);
            assert!((mean - 1.0 / (1.0 - loss)).abs() < 0.05, "{mean} at {loss}");
        }
    }

    #[test]
    fn bursts_have_the_asked_share_and_length_in_time() {
        let length = Duration::from_millis(20);
        let settings = LinkSettings {
            bursts: Some(Bursts::covering(0.05, length)),
            ..LinkSettings::default()
        };
        let (arrived, stats) = run(settings, 11, 1_000_000);
        let share = stats.dropped_burst as f64 / 1e6;
        assert!((share - 0.05).abs() < 0.005, "{share}");
        let gaps: Vec<u32> =
            arrived.windows(2).map(|w| w[1].0 - w[0].0 - 1).filter(|gap| *gap > 0).collect();
        // At one datagram a millisecond a burst loses as many as it lasts milliseconds; bursts too
        // short to meet one are not seen, which lengthens the mean by half a datagram.
        let mean = f64::from(gaps.iter().sum::<u32>()) / gaps.len() as f64;
        assert!((mean - 20.5).abs() < 1.5, "{mean}");
    }

    #[test]
    fn bursts_come_when_they_come_whatever_is_sent() {
        let settings = LinkSettings {
            bursts: Some(Bursts::covering(0.1, Duration::from_millis(20))),
            ..LinkSettings::default()
        };
        let start = Instant::now();
        let lost = |step: u32| -> Vec<bool> {
            let mut link = Link::new(settings.clone(), 4);
            let mut fates = Vec::new();
            for i in (0..10_000).step_by(step as usize) {
                let before = link.stats().dropped_burst;
                link.send(start + STEP * i, Bytes::from_static(b"x"));
                if i % 2 == 0 {
                    fates.push(link.stats().dropped_burst > before);
                }
            }
            fates
        };
        let dense = lost(1);
        assert!(dense.iter().filter(|lost| **lost).count() > 100);
        assert_eq!(dense, lost(2));
    }

    #[test]
    fn a_sparse_flow_meets_no_longer_bursts_than_a_dense_one() {
        let bursts = Bursts::covering(0.2, Duration::from_millis(20));
        let mut link =
            Link::new(LinkSettings { bursts: Some(bursts), ..LinkSettings::default() }, 3);
        let start = Instant::now();
        let count = 20_000u32;
        // One datagram in ten seconds: each draw is independent of the one before.
        let lost: Vec<bool> = (0..count)
            .map(|i| {
                let before = link.stats().dropped_burst;
                link.send(start + Duration::from_secs(10) * i, Bytes::from_static(b"x"));
                link.stats().dropped_burst > before
            })
            .collect();
        let share = lost.iter().filter(|lost| **lost).count() as f64 / f64::from(count);
        let pairs = lost.windows(2).filter(|w| w[0] && w[1]).count() as f64 / f64::from(count);
        assert!((share - 0.2).abs() < 0.015, "{share}");
        assert!((pairs - 0.04).abs() < 0.008, "{pairs}");
    }

    #[test]
    fn delay_and_jitter_stay_in_their_bounds_and_keep_the_order() {
        let (delay, jitter) = (Duration::from_millis(50), Duration::from_millis(30));
        let (arrived, _) =
            run(LinkSettings { delay, jitter, ..LinkSettings::default() }, 5, 10_000);
        assert!(arrived.windows(2).all(|w| w[0].0 < w[1].0));
        for (number, at) in &arrived {
            let took = *at - STEP * *number;
            assert!(took >= delay && took <= delay + jitter, "{took:?}");
        }
        let spread = arrived.iter().map(|(number, at)| *at - STEP * *number);
        assert!(spread.clone().max().unwrap() - spread.min().unwrap() > jitter / 2);
    }

    #[test]
    fn reordered_datagrams_come_late_and_only_they() {
        let settings = LinkSettings {
            reorder: 0.1,
            reorder_delay: Duration::from_millis(5),
            ..LinkSettings::default()
        };
        let (arrived, stats) = run(settings, 9, 50_000);
        let late = arrived.iter().filter(|(number, at)| *at > STEP * *number).count() as u64;
        assert_eq!(late, stats.reordered);
        assert!((4600..5400).contains(&late), "{late}");
        let overtaken = arrived.windows(2).filter(|w| w[0].0 > w[1].0).count();
        assert!(overtaken > 3000, "{overtaken}");
    }

    #[test]
    fn duplicates_arrive_twice() {
        let (arrived, stats) =
            run(LinkSettings { duplicate: 0.1, ..LinkSettings::default() }, 2, 50_000);
        assert!((4600..5400).contains(&stats.duplicated), "{}", stats.duplicated);
        assert_eq!(arrived.len() as u64, 50_000 + stats.duplicated);
    }

    #[test]
    fn the_rate_limit_spaces_datagrams_and_its_queue_overflows() {
        // 800 bits a millisecond are sent and 400 carried; ten datagrams wait at most.
        let settings =
            LinkSettings { rate_bps: Some(400_000), queue_bytes: 1000, ..LinkSettings::default() };
        let (arrived, stats) = run(settings, 1, 10_000);
        assert!((4980..5020).contains(&stats.dropped_queue), "{}", stats.dropped_queue);
        assert!(arrived.windows(2).all(|w| w[1].1 - w[0].1 >= Duration::from_micros(1999)));
        let longest = arrived.iter().map(|(number, at)| *at - STEP * *number).max().unwrap();
        assert!(longest <= Duration::from_millis(21), "{longest:?}");
    }

    #[test]
    fn blackouts_cut_once_or_again_and_again() {
        let once = Blackout { start: STEP * 100, length: STEP * 50, period: None };
        let again = Blackout { start: STEP * 1000, length: STEP * 10, period: Some(STEP * 100) };
        let settings = LinkSettings { blackouts: vec![once, again], ..LinkSettings::default() };
        let (arrived, stats) = run(settings, 1, 2000);
        assert_eq!(stats.dropped_blackout, 50 + 10 * 10);
        let seen = |number| arrived.iter().any(|(n, _)| *n == number);
        assert!(seen(99) && !seen(100) && !seen(149) && seen(150));
        assert!(!seen(1000) && seen(1010) && !seen(1105));
    }

    #[test]
    fn settings_change_under_way() {
        let delay = Duration::from_millis(10);
        let mut link = Link::new(LinkSettings { delay, ..LinkSettings::default() }, 1);
        let start = Instant::now();
        link.send(start, Bytes::from_static(b"before"));
        link.set_settings(LinkSettings::cut());
        link.send(start, Bytes::from_static(b"during"));
        link.set_settings(LinkSettings::default());
        link.send(start, Bytes::from_static(b"after"));
        assert_eq!(link.poll_output(start), None);
        assert_eq!(link.poll_output(start + delay).unwrap(), "before");
        // The path keeps its order even when its delay has shrunk.
        assert_eq!(link.poll_output(start + delay).unwrap(), "after");
        assert_eq!(link.next_deadline(), None);
    }

    #[test]
    fn memory_is_bounded() {
        let delay = Duration::from_secs(3600);
        let mut link = Link::new(LinkSettings { delay, ..LinkSettings::default() }, 1);
        let datagram = Bytes::from(vec![0; 60_000]);
        let now = Instant::now();
        (0..2000).for_each(|_| link.send(now, datagram.clone()));
        assert_eq!(link.in_flight.len(), IN_FLIGHT_MAX / datagram.len());
        assert_eq!(link.stats().dropped_queue as usize, 2000 - link.in_flight.len());
    }

    fn any_settings() -> impl Strategy<Value = LinkSettings> {
        let share = || prop_oneof![Just(0.0), Just(1.0), 0.0..1.0f64];
        let millis = |most: u64| (0..most).prop_map(Duration::from_millis);
        let bursts = (millis(100), millis(100), share())
            .prop_map(|(mean_gap, mean_length, loss)| Bursts { mean_gap, mean_length, loss });
        let blackout = (millis(300), millis(100), prop::option::of(millis(200)))
            .prop_map(|(start, length, period)| Blackout { start, length, period });
        let path = (millis(50), millis(50), millis(50), prop::option::of(10_000..1_000_000u64));
        (
            (share(), share(), share()),
            path,
            prop::option::of(bursts),
            prop::collection::vec(blackout, 0..3),
            0..5000usize,
        )
            .prop_map(
                |((loss, duplicate, reorder), path, bursts, blackouts, queue_bytes)| {
                    let (delay, jitter, reorder_delay, rate_bps) = path;
                    LinkSettings {
                        loss,
                        bursts,
                        duplicate,
                        reorder,
                        reorder_delay,
                        delay,
                        jitter,
                        rate_bps,
                        queue_bytes,
                        blackouts,
                    }
                },
            )
    }

    proptest! {
        /// `run` itself checks that each datagram is delivered or counted as lost.
        #[test]
        fn nothing_is_lost_uncounted_and_order_is_kept_unless_told_otherwise(
            settings in any_settings(), seed: u64,
        ) {
            let (arrived, stats) = run(settings.clone(), seed, 400);
            prop_assert!(stats.duplicated <= stats.sent && stats.reordered <= 2 * stats.sent);
            if settings.reorder == 0.0 {
                prop_assert!(arrived.windows(2).all(|w| w[0].0 <= w[1].0));
            }
            if settings.duplicate == 0.0 {
                prop_assert!(arrived.iter().all(|(number, _)| *number < 400));
                prop_assert_eq!(stats.duplicated, 0);
            }
            for (number, at) in arrived {
                prop_assert!(at >= STEP * number + settings.delay);
            }
        }
    }
}
