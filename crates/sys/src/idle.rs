//! How a worker thread idles between rounds of work.

use std::time::{Duration, Instant};

/// Decides whether an idle thread naps for a fixed time or blocks until work arrives.
///
/// Waking a thread costs the waker and the thread about as much as sending one packet. Under a high
/// event rate, as with a thousand streams, the thread naps: nobody has to wake it, and one round
/// handles everything that arrived meanwhile. Under a low rate it blocks, for the lowest latency.
/// Network cards moderate interrupts the same way.
///
/// - **Quiet**: the last round began more than 600 µs after the end of the round before. The thread
///   blocks.
/// - **Busy**: it began sooner. The thread naps once; if the nap brings no work, it blocks.
/// - In either state, a deadline within one nap means a nap, so that work due at nearly the same
///   time is done in one round.
#[derive(Debug, Default)]
pub struct IdleStrategy {
    /// End of the last round.
    ended: Option<Instant>,
    /// `true` if the last round began within [`BUSY_GAP`] of the end of the round before.
    busy: bool,
    /// `true` if the thread has napped since the last round began.
    napped: bool,
}

/// What an idle thread does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Sleep for this duration, then look for work.
    Nap(Duration),
    /// Block until work arrives or the deadline passes.
    Wait,
}

impl IdleStrategy {
    /// Records that a round of work begins.
    #[inline]
    pub fn begin_round(&mut self, now: Instant) {
        self.busy = self.ended.is_some_and(|at| now.saturating_duration_since(at) < BUSY_GAP);
        self.napped = false;
    }

    /// Records that the round is finished.
    #[inline]
    pub fn end_round(&mut self, now: Instant) {
        self.ended = Some(now);
    }

    /// Returns how to idle until `deadline`, the earliest time at which work is due.
    #[inline]
    pub fn next(&mut self, now: Instant, deadline: Option<Instant>) -> Next {
        let left = deadline.map(|at| at.saturating_duration_since(now));
        if left.is_some_and(|left| left <= NAP) {
            return Next::Nap(NAP);
        }
        if self.busy && !self.napped {
            self.napped = true;
            return Next::Nap(NAP);
        }
        Next::Wait
    }
}

/// Reduces the calling thread's timer slack to 1 µs: by default the kernel ends a sleep up to 50 µs
/// late, to group it with others (prctl(2), PR_SET_TIMERSLACK).
pub fn minimize_timer_slack() {
    // SAFETY: the call takes integers only. A failure leaves the default in place.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000 as libc::c_ulong) };
}

/// Adds half of this to the delay of work that arrives during a nap, on average.
const NAP: Duration = Duration::from_micros(150);
/// The longest gap between two rounds for which a nap pays off.
const BUSY_GAP: Duration = Duration::from_micros(600);

#[cfg(test)]
mod tests {
    use super::*;

    fn after_round(start: Instant, begin_us: u64, end_us: u64) -> IdleStrategy {
        let mut idle = IdleStrategy::default();
        idle.begin_round(start);
        idle.end_round(start + Duration::from_micros(10));
        idle.begin_round(start + Duration::from_micros(begin_us));
        idle.end_round(start + Duration::from_micros(end_us));
        idle
    }

    #[test]
    fn the_first_round_is_followed_by_a_wait() {
        let start = Instant::now();
        let mut idle = IdleStrategy::default();
        assert_eq!(idle.next(start, None), Next::Wait);
        idle.begin_round(start);
        idle.end_round(start);
        assert_eq!(idle.next(start, None), Next::Wait);
    }

    #[test]
    fn a_busy_thread_naps_once_per_round() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut idle = after_round(start, 100, 110);
        assert_eq!(idle.next(at(110), None), Next::Nap(NAP));
        assert_eq!(idle.next(at(260), None), Next::Wait, "the nap brought no work");
        idle.begin_round(at(300));
        assert_eq!(idle.next(at(310), None), Next::Nap(NAP));
    }

    #[test]
    fn a_quiet_thread_naps_only_towards_a_close_deadline() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut idle = after_round(start, 5000, 5010);
        assert_eq!(idle.next(at(5010), None), Next::Wait);
        assert_eq!(idle.next(at(5010), Some(at(5020))), Next::Nap(NAP));
        assert_eq!(idle.next(at(5010), Some(at(9020))), Next::Wait);
    }
}
