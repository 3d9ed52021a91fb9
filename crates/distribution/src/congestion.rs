//! Congestion control for the repair connection.
//!
//! Repairs are asked for because packets were lost, on paths where loss is often not congestion. A
//! controller that takes every loss for congestion starves them: with Cubic at 5 % loss and 100 ms,
//! 90 % of repairs miss four round trips. This one yields to what congestion does and random loss
//! does not: round trips that grow and stay grown, ECN marks, and the loss of most of what is sent.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// Builds a [`RepairControl`] for each path.
#[derive(Debug, Default)]
pub struct RepairControlFactory;

impl ControllerFactory for RepairControlFactory {
    fn build(self: Arc<Self>, now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(RepairControl::new(now))
    }
}

/// A window between [`RepairControl::FLOOR`] and [`RepairControl::CEILING`] bytes that random loss
/// does not shrink.
#[derive(Debug, Clone)]
pub struct RepairControl {
    window: u64,
    /// When the window was last cut: what was sent before says nothing about the window since.
    cut_at: Instant,
    /// Whether the window was ever cut; until then it doubles each round trip that fills it.
    was_cut: bool,
    base: BaseRtt,
    /// Since when the round trip is over its limit.
    slow_since: Option<Instant>,
    round: Round,
}

impl RepairControl {
    /// The window that every path gets, in bytes: a key frame's worth of repairs.
    pub const FLOOR: u64 = 64 * 1024;
    /// The widest window, in bytes: 320 Mbit/s at 100 ms.
    pub const CEILING: u64 = 4 * 1024 * 1024;
    /// The first window, in bytes: half a second of 16 Mbit/s, which is missing all at once where a
    /// path was cut for so long.
    pub const INITIAL: u64 = 1024 * 1024;

    /// A path on which nothing was sent yet.
    pub fn new(now: Instant) -> Self {
        Self {
            window: Self::INITIAL,
            cut_at: now,
            was_cut: false,
            base: BaseRtt::new(now),
            slow_since: None,
            round: Round { began: now, acked: 0, lost: 0 },
        }
    }

    /// `bytes` that were sent at `sent` have arrived; `rtt` is the smoothed round trip.
    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: Duration) {
        // Not the estimator's value: until its first sample that is the initial guess.
        let base = self.base.update(now, now.saturating_duration_since(sent));
        self.round.acked += bytes;
        if now.saturating_duration_since(self.round.began) > rtt {
            self.round = Round { began: now, acked: 0, lost: 0 };
        }

        if rtt <= base + QUEUE_MIN.max(base / 2) {
            self.slow_since = None;
            if !app_limited && sent > self.cut_at {
                let growth = if self.was_cut { bytes / CAUTIOUS_GROWTH } else { bytes };
                self.window = (self.window + growth).min(Self::CEILING);
            }
            return;
        }
        let since = *self.slow_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= SUSTAINED.max(rtt) {
            // The clock of "sustained" starts afresh: one cut for each further stretch.
            self.slow_since = Some(now);
            self.cut(now, 3, 4);
        }
    }

    fn lost(&mut self, now: Instant, sent: Instant, persistent: bool, bytes: u64) {
        self.round.lost += bytes;
        if sent <= self.cut_at {
            return;
        }
        if persistent {
            // Nothing got through for several timeouts: the path changed or is gone.
            self.cut(now, 1, 2);
        } else if bytes == 0 {
            // ECN CE: the one loss signal that random loss cannot forge.
            self.cut(now, 4, 5);
        } else if self.round.lost > self.round.acked && self.round.lost >= COLLAPSE_MIN {
            // Over half is lost: a queue too short to show in round trips is overflowing.
            self.cut(now, 7, 10);
        }
    }

    fn cut(&mut self, now: Instant, numerator: u64, denominator: u64) {
        self.window = (self.window * numerator / denominator).max(Self::FLOOR);
        self.cut_at = now;
        self.was_cut = true;
        self.round = Round { began: now, acked: 0, lost: 0 };
    }
}

impl Controller for RepairControl {
    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        app_limited: bool,
        rtt: &RttEstimator,
    ) {
        self.acked(now, sent, bytes, app_limited, rtt.get());
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        self.lost(now, sent, is_persistent_congestion, lost_bytes);
    }

    fn on_mtu_update(&mut self, _new_mtu: u16) {}

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        Self::INITIAL
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The least round trip of the last one to two windows of time, so that a path that became longer
/// is not taken for a queue for ever.
#[derive(Debug, Clone)]
struct BaseRtt {
    current: Duration,
    previous: Duration,
    began: Instant,
}

impl BaseRtt {
    fn new(now: Instant) -> Self {
        Self { current: Duration::MAX, previous: Duration::MAX, began: now }
    }

    fn update(&mut self, now: Instant, rtt: Duration) -> Duration {
        if now.saturating_duration_since(self.began) >= BASE_WINDOW {
            self.previous = std::mem::replace(&mut self.current, Duration::MAX);
            self.began = now;
        }
        self.current = self.current.min(rtt);
        self.current.min(self.previous)
    }
}

/// What arrived and what was lost in about one round trip, in bytes.
#[derive(Debug, Clone)]
struct Round {
    began: Instant,
    acked: u64,
    lost: u64,
}

/// Growth of the round trip that is still jitter.
const QUEUE_MIN: Duration = Duration::from_millis(25);
/// How long round trips must stay grown, if a round trip is shorter than that.
const SUSTAINED: Duration = Duration::from_millis(50);
const BASE_WINDOW: Duration = Duration::from_secs(20);
/// After a cut the window grows by an eighth for each round trip that fills it.
const CAUTIOUS_GROWTH: u64 = 8;
/// Fewer lost bytes than this, 40 packets or so, are no proof of a collapse.
const COLLAPSE_MIN: u64 = 48 * 1024;

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    const PACKET: u64 = 1200;

    /// Sends a packet each millisecond for `ms` milliseconds, its fate `rtt` later.
    fn run(
        control: &mut RepairControl,
        start: Instant,
        ms: u64,
        rtt: impl Fn(u64) -> Duration,
        mut lost: impl FnMut(u64) -> bool,
    ) -> Instant {
        let mut now = start;
        for i in 0..ms {
            let sent = start + Duration::from_millis(i);
            now = sent + rtt(i);
            if lost(i) {
                control.lost(now, sent, false, PACKET);
            } else {
                control.acked(now, sent, PACKET, false, rtt(i));
            }
        }
        now
    }

    fn flat(_: u64) -> Duration {
        Duration::from_millis(100)
    }

    #[test]
    fn random_loss_does_not_shrink_the_window() {
        for percent in [1, 5, 20, 30] {
            let start = Instant::now();
            let mut control = RepairControl::new(start);
            let mut rng = SmallRng::seed_from_u64(percent);
            let mut least = u64::MAX;
            for round in 0..100 {
                let at = start + Duration::from_millis(round * 100);
                run(&mut control, at, 100, flat, |_| rng.random_ratio(percent as u32, 100));
                least = least.min(control.window());
            }
            assert!(least >= RepairControl::INITIAL, "{percent} %: {least}");
            assert_eq!(control.window(), RepairControl::CEILING);
        }
    }

    #[test]
    fn grown_round_trips_shrink_it_to_the_floor_and_it_recovers() {
        let start = Instant::now();
        let mut control = RepairControl::new(start);
        let now = run(&mut control, start, 500, flat, |_| false);
        let before = control.window();
        let grown = |_| Duration::from_millis(180);
        let now = run(&mut control, now, 250, grown, |_| false);
        assert!(control.window() < before, "sustained growth is congestion");
        let now = run(&mut control, now, 5000, grown, |_| false);
        assert_eq!(control.window(), RepairControl::FLOOR);
        run(&mut control, now, 5000, flat, |_| false);
        assert!(control.window() > 2 * RepairControl::FLOOR);
    }

    #[test]
    fn a_short_spike_and_jitter_are_not_congestion() {
        let start = Instant::now();
        let mut control = RepairControl::new(start);
        let spiky = |i| Duration::from_millis(if i % 400 < 40 { 190 } else { 100 + i % 20 });
        run(&mut control, start, 4000, spiky, |_| false);
        assert!(control.window() > RepairControl::INITIAL);
    }

    #[test]
    fn a_path_that_became_longer_is_believed_in_the_end() {
        let start = Instant::now();
        let mut control = RepairControl::new(start);
        let now = run(&mut control, start, 1000, flat, |_| false);
        let longer = |_| Duration::from_millis(300);
        let now = run(&mut control, now, 45_000, longer, |_| false);
        let settled = control.window();
        run(&mut control, now, 2000, longer, |_| false);
        assert!(control.window() > settled || settled == RepairControl::CEILING);
    }

    /// The first packets are acknowledged before the estimator has its first sample.
    #[test]
    fn the_estimators_first_guess_is_no_base() {
        let start = Instant::now();
        let mut control = RepairControl::new(start);
        let long = |_| Duration::from_millis(200);
        control.acked(start + long(0), start, PACKET, true, Duration::from_millis(100));
        run(&mut control, start, 2000, long, |_| false);
        assert!(control.window() > RepairControl::INITIAL, "{}", control.window());
    }

    #[test]
    fn marks_and_collapse_count_once_a_round_trip() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut control = RepairControl::new(start);
        control.lost(at(200), at(100), false, 0);
        assert_eq!(control.window(), RepairControl::INITIAL * 4 / 5);
        control.lost(at(201), at(101), false, 0);
        assert_eq!(control.window(), RepairControl::INITIAL * 4 / 5);

        let mut control = RepairControl::new(start);
        run(&mut control, at(1), 100, flat, |i| i % 5 != 0);
        assert!(control.window() < RepairControl::INITIAL, "80 % lost is a collapse");
        let mut control = RepairControl::new(start);
        control.lost(at(900), at(500), true, PACKET);
        assert_eq!(control.window(), RepairControl::INITIAL / 2);
    }
}
