//! How a worker rests between rounds.

use std::time::{Duration, Instant};

/// How a thread rests that has nothing to do.
///
/// To be woken costs a thread, or whoever wakes it, about as much as one packet does, and so does
/// each switch of threads. So where work comes thick and fast, as from a thousand streams, the thread
/// naps instead: nobody needs to wake it, and what came meanwhile is done in one round. Where it comes
/// seldom, the thread waits for it at once. It is what network cards do that moderate their
/// interrupts.
#[derive(Debug, Default)]
pub struct IdleStrategy {
    /// When the last round ended.
    ended: Option<Instant>,
    /// Whether that round began soon after the one before.
    busy: bool,
    napped: bool,
}

/// How to rest now.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Sleep for so long, and look again.
    Nap(Duration),
    /// Until there is work, or the deadline.
    Wait,
}

impl IdleStrategy {
    /// There is work.
    pub fn begin_round(&mut self, now: Instant) {
        self.busy = self.ended.is_some_and(|at| now.saturating_duration_since(at) < BUSY);
        self.napped = false;
    }

    /// It is done.
    pub fn end_round(&mut self, now: Instant) {
        self.ended = Some(now);
    }

    /// How to rest, if the next thing that is known to come is at `deadline`.
    pub fn next(&mut self, now: Instant, deadline: Option<Instant>) -> Next {
        let left = deadline.map(|at| at.saturating_duration_since(now));
        if left.is_some_and(|left| left <= NAP) {
            // Slots are not kept to the microsecond: what is due together leaves together.
            return Next::Nap(NAP);
        }
        if self.busy && !self.napped {
            self.napped = true;
            return Next::Nap(NAP);
        }
        Next::Wait
    }
}

/// Lets the calling thread's short sleeps end when they are over: as a rule the kernel adds up to
/// 50 µs to group them with others (prctl(2), PR_SET_TIMERSLACK).
pub fn sleep_exactly() {
    // SAFETY: it takes numbers and touches no memory of ours. A refusal changes nothing.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000 as libc::c_ulong) };
}

/// Added to the delay of what comes meanwhile, half of it on average.
const NAP: Duration = Duration::from_micros(150);
/// A pause between two rounds that is short for a nap to be worth it.
const BUSY: Duration = Duration::from_micros(600);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_busy_naps_once_and_then_parks() {
        let start = Instant::now();
        let at = |us| start + Duration::from_micros(us);
        let mut rest = IdleStrategy::default();
        assert_eq!(rest.next(at(0), None), Next::Wait);
        rest.begin_round(at(0));
        rest.end_round(at(10));
        assert_eq!(rest.next(at(10), None), Next::Wait, "the first in a while");
        rest.begin_round(at(100));
        rest.end_round(at(110));
        assert_eq!(rest.next(at(110), None), Next::Nap(NAP));
        assert_eq!(rest.next(at(260), None), Next::Wait, "nothing came");
        rest.begin_round(at(300));
        assert_eq!(rest.next(at(310), None), Next::Nap(NAP));
        rest.end_round(at(310));
        rest.begin_round(at(5000));
        assert_eq!(rest.next(at(5010), None), Next::Wait);
        // Until what is known to come.
        assert_eq!(rest.next(at(5010), Some(at(5020))), Next::Nap(NAP));
        assert_eq!(rest.next(at(5010), Some(at(9020))), Next::Wait);
    }
}
