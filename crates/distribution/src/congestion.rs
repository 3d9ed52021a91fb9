//! Congestion control of the repair connection.
//!
//! Repairs follow packet loss, on paths where loss is often not congestion. A controller that treats
//! every loss as congestion starves them: with Cubic, at 5 % loss and a round trip of 100 ms, 90 % of
//! repairs take more than four round trips. This controller reacts only to signals that random loss does
//! not cause: sustained growth of the round trip, ECN marks, and the loss of most packets.
//!
//! | state | window | leaves it |
//! |---|---|---|
//! | startup | grows by each acknowledged byte while the window is used (doubles per round trip) | first cut |
//! | cautious | grows by 1/8 of each acknowledged byte while the window is used | – |
//!
//! | event | cut to |
//! |---|---|
//! | round trip above its limit for 50 ms or one round trip, then again per such period | 3/4 |
//! | persistent congestion: nothing arrived for several timeouts | 1/2 |
//! | ECN CE mark | 4/5 |
//! | more bytes lost than acknowledged within a round trip | 7/10 |
//!
//! Invariants: the window stays between [`RepairControl::FLOOR`] and [`RepairControl::CEILING`]; packets
//! sent before a cut cause no further cut.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;

/// Factory that builds a [`RepairControl`] per path.
#[derive(Debug, Default)]
pub struct RepairControlFactory;

impl ControllerFactory for RepairControlFactory {
    fn build(self: Arc<Self>, now: Instant, _current_mtu: u16) -> Box<dyn Controller> {
        Box::new(RepairControl::new(now))
    }
}

/// Congestion controller with a window that random loss does not shrink.
#[derive(Debug, Clone)]
pub struct RepairControl {
    window: u64,
    /// Time of the latest cut. Packets sent before it carry no information about the current window.
    cut_at: Instant,
    /// `true` once the window was cut: `cautious` rather than `startup`.
    was_cut: bool,
    base: BaseRtt,
    /// Since when the round trip has been above its limit.
    slow_since: Option<Instant>,
    round: Round,
}

impl RepairControl {
    /// The smallest window in bytes: the repairs of a key frame.
    pub const FLOOR: u64 = 64 * 1024;
    /// The largest window in bytes: 320 Mbit/s at a round trip of 100 ms.
    pub const CEILING: u64 = 4 * 1024 * 1024;
    /// The initial window in bytes: half a second of 16 Mbit/s, all of which is requested at once after
    /// an outage of that length.
    pub const INITIAL: u64 = 1024 * 1024;

    /// The controller of a new path.
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

    /// `bytes` sent at `sent` are acknowledged. `rtt` is the smoothed round trip.
    fn acked(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: Duration) {
        // Not the estimator's minimum: before its first sample, that is the initial guess.
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
            // Restart the period: one cut per period.
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
            // Nothing arrived for several timeouts: the path has changed or failed.
            self.cut(now, 1, 2);
        } else if bytes == 0 {
            // An ECN CE mark, which random loss cannot cause.
            self.cut(now, 4, 5);
        } else if self.round.lost > self.round.acked && self.round.lost >= COLLAPSE_MIN {
            // More than half is lost: a queue overflows that is too short to show in the round trip.
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

/// Minimum round trip over the last one to two periods of [`BASE_WINDOW`], so that a path that became
/// longer is not mistaken for a queue forever.
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

/// Bytes acknowledged and lost within about one round trip.
#[derive(Debug, Clone)]
struct Round {
    began: Instant,
    acked: u64,
    lost: u64,
}

/// Growth of the round trip that counts as jitter.
const QUEUE_MIN: Duration = Duration::from_millis(25);
/// How long the round trip must stay above its limit; at least one round trip.
const SUSTAINED: Duration = Duration::from_millis(50);
/// Period of the minimum filter of the round trip.
const BASE_WINDOW: Duration = Duration::from_secs(20);
/// Divisor of the growth after a cut: the window grows by 1/8 per round trip.
const CAUTIOUS_GROWTH: u64 = 8;
/// Fewest lost bytes, about 40 packets, that count as a collapse.
const COLLAPSE_MIN: u64 = 48 * 1024;

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    const PACKET: u64 = 1200;

    /// Sends one packet per millisecond for `ms` milliseconds. Each is acknowledged or lost after `rtt`.
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
    fn sustained_growth_of_the_round_trip_shrinks_the_window_to_the_floor() {
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
    fn short_spikes_and_jitter_do_not_shrink_the_window() {
        let start = Instant::now();
        let mut control = RepairControl::new(start);
        let spiky = |i| Duration::from_millis(if i % 400 < 40 { 190 } else { 100 + i % 20 });
        run(&mut control, start, 4000, spiky, |_| false);
        assert!(control.window() > RepairControl::INITIAL);
    }

    #[test]
    fn a_longer_path_becomes_the_new_base() {
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
    fn the_initial_guess_of_the_estimator_is_not_the_base() {
        let start = Instant::now();
        let mut control = RepairControl::new(start);
        let long = |_| Duration::from_millis(200);
        control.acked(start + long(0), start, PACKET, true, Duration::from_millis(100));
        run(&mut control, start, 2000, long, |_| false);
        assert!(control.window() > RepairControl::INITIAL, "{}", control.window());
    }

    #[test]
    fn marks_and_collapse_cut_once_per_round_trip() {
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
