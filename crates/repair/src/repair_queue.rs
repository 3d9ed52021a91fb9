//! What waits to be sent again to one edge: the most urgent first, and within a budget. No socket,
//! no clock.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use super::bucket::TokenBucket;
use crate::rtp::{Seq, Ssrc};

/// Repairs in the order of their deadlines.
///
/// What there is budget for leaves when it comes, so the order matters only when there is more to
/// send than may be sent: then what is still of use goes before what has more time, and what comes
/// too late to be of use goes not at all. `T` is what a packet is to the caller.
#[derive(Debug)]
pub struct Outbox<T> {
    budget: TokenBucket,
    /// By deadline, then in the order in which they came.
    queue: BTreeMap<(Instant, u64), Repair<T>>,
    places: HashMap<(Ssrc, Seq), (Instant, u64)>,
    next_serial: u64,
}

/// A packet that is to be sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair<T> {
    /// The stream.
    pub ssrc: Ssrc,
    /// The packet's number.
    pub seq: Seq,
    /// Sent later than this it is of no use.
    pub deadline: Instant,
    /// Its bytes, as the budget counts them.
    pub len: usize,
    /// Copies to send after it.
    pub further: u8,
    /// The packet.
    pub packet: T,
}

/// What [`Outbox::push`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum Pushed<T> {
    /// It waits its turn.
    Queued,
    /// It waited already: the earlier deadline and the greater number of copies count.
    Merged,
    /// There was no room, and this one had the most time left.
    Dropped(Repair<T>),
}

/// What is to be done now.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// Send this; the budget has been charged.
    Send(Repair<T>),
    /// This would come too late.
    Late(Repair<T>),
    /// Nothing until then: the budget is spent.
    Wait(Instant),
    /// Nothing at all.
    Idle,
}

impl<T> Outbox<T> {
    /// `rate` bytes a second, 0 for no limit, and `burst` at once.
    pub fn new(now: Instant, rate: u64, burst: u64) -> Self {
        Self {
            budget: TokenBucket::new(now, rate, burst),
            queue: BTreeMap::new(),
            places: HashMap::new(),
            next_serial: 0,
        }
    }

    /// Changes the budget.
    pub fn set_budget(&mut self, now: Instant, rate: u64, burst: u64) {
        self.budget.set(now, rate, burst);
    }

    /// Adds a repair; [`Outbox::poll`] gives it back when it may leave.
    pub fn push(&mut self, mut repair: Repair<T>) -> Pushed<T> {
        let key = (repair.ssrc, repair.seq);
        let queued = self.places.remove(&key).and_then(|place| self.queue.remove(&place));
        let merged = queued.is_some();
        if let Some(queued) = queued {
            repair.deadline = repair.deadline.min(queued.deadline);
            repair.further = repair.further.max(queued.further);
        }
        let place = (repair.deadline, self.next_serial);
        self.next_serial += 1;
        self.places.insert(key, place);
        self.queue.insert(place, repair);
        if self.queue.len() > MAX_QUEUED
            && let Some((_, dropped)) = self.queue.pop_last()
        {
            self.places.remove(&(dropped.ssrc, dropped.seq));
            return Pushed::Dropped(dropped);
        }
        if merged { Pushed::Merged } else { Pushed::Queued }
    }

    /// The most urgent thing to do; call until it gives [`Next::Wait`] or [`Next::Idle`].
    pub fn poll(&mut self, now: Instant) -> Next<T> {
        let Some(entry) = self.queue.first_entry() else { return Next::Idle };
        let late = entry.key().0 < now;
        let len = entry.get().len as u64;
        if !late && !self.budget.take(now, len) {
            return Next::Wait(self.budget.ready_at(now, len));
        }
        let repair = entry.remove();
        self.places.remove(&(repair.ssrc, repair.seq));
        if late { Next::Late(repair) } else { Next::Send(repair) }
    }

    /// Number of repairs that wait.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

/// The last moment to send what an edge asked for.
///
/// It said that it has `slack` left; the request took half a round trip and the repair takes
/// another. There is always time for one attempt at once: round trips are estimates, and `slack` is
/// that of the first of the packets asked for.
pub fn deadline(now: Instant, slack: Duration, round_trip: Duration) -> Instant {
    now + slack.saturating_sub(round_trip)
}

/// Repairs that wait: each holds on to the burst it is from.
const MAX_QUEUED: usize = 4096;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 1000;

    fn repair(seq: u16, deadline: Instant) -> Repair<u16> {
        Repair { ssrc: Ssrc(1), seq: Seq(seq), deadline, len: LEN, further: 0, packet: seq }
    }

    fn drain(outbox: &mut Outbox<u16>, now: Instant) -> (Vec<u16>, Vec<u16>, Option<Instant>) {
        let (mut sent, mut late) = (Vec::new(), Vec::new());
        loop {
            match outbox.poll(now) {
                Next::Send(repair) => sent.push(repair.packet),
                Next::Late(repair) => late.push(repair.packet),
                Next::Wait(until) => return (sent, late, Some(until)),
                Next::Idle => return (sent, late, None),
            }
        }
    }

    #[test]
    fn with_budget_everything_leaves_at_once_and_in_the_order_of_the_request() {
        let now = Instant::now();
        let mut outbox = Outbox::new(now, 0, 0);
        // Of no time left at all there is still one attempt.
        let deadline = deadline(now, Duration::from_millis(30), Duration::from_millis(100));
        assert_eq!(deadline, now);
        for seq in [5, 3, 4] {
            assert_eq!(outbox.push(repair(seq, deadline)), Pushed::Queued);
        }
        assert_eq!(drain(&mut outbox, now), (vec![5, 3, 4], vec![], None));
    }

    #[test]
    fn without_budget_the_urgent_go_first_and_the_late_not_at_all() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut outbox = Outbox::new(now, 10_000, LEN as u64);
        for (seq, deadline) in [(1, 350), (2, 90), (3, 150), (4, 1000), (5, 0)] {
            outbox.push(repair(seq, at(deadline)));
        }
        // One packet each 100 ms.
        assert_eq!(drain(&mut outbox, now), (vec![5], vec![], Some(at(100))));
        assert_eq!(drain(&mut outbox, at(89)).1, [0; 0]);
        let (sent, late, _) = drain(&mut outbox, at(101));
        assert_eq!((sent, late), (vec![3], vec![2]));
        assert_eq!(drain(&mut outbox, at(202)).0, [1]);
        assert_eq!(drain(&mut outbox, at(303)), (vec![4], vec![], None));
    }

    #[test]
    fn what_waits_is_not_queued_twice() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut outbox = Outbox::new(now, 1, 1);
        outbox.push(repair(0, now));
        drain(&mut outbox, now);
        outbox.push(repair(7, later + Duration::from_secs(1)));
        let again = Repair { further: 2, ..repair(7, later) };
        assert_eq!(outbox.push(again.clone()), Pushed::Merged);
        assert_eq!(outbox.push(repair(7, later + Duration::from_secs(9))), Pushed::Merged);
        assert_eq!(outbox.len(), 1);
        assert_eq!(outbox.poll(later), Next::Send(again));
        assert!(outbox.is_empty() && outbox.places.is_empty());
    }

    #[test]
    fn a_full_outbox_drops_what_has_the_most_time() {
        let now = Instant::now();
        let mut outbox = Outbox::new(now, 1, 1);
        for seq in 0..MAX_QUEUED as u16 {
            outbox.push(repair(seq, now + Duration::from_secs(9)));
        }
        let urgent = repair(60_000, now + Duration::from_secs(1));
        let Pushed::Dropped(dropped) = outbox.push(urgent) else { panic!() };
        assert_eq!(dropped.seq, Seq(MAX_QUEUED as u16 - 1));
        assert_eq!((outbox.len(), outbox.places.len()), (MAX_QUEUED, MAX_QUEUED));
        assert!(matches!(outbox.poll(now), Next::Send(repair) if repair.seq == Seq(60_000)));
    }

    proptest! {
        #[test]
        fn the_budget_holds_and_each_repair_ends_one_way(
            asks in prop::collection::vec((0u64..40, 0u64..400, 1usize..1200), 1..400),
            rate in 1u64..200_000, burst in 1200u64..50_000,
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut outbox = Outbox::new(start, rate, burst);
            let (mut bytes, mut ended) = (0, 0);
            let mut take = |outbox: &mut Outbox<()>, now: Instant| loop {
                match outbox.poll(now) {
                    Next::Send(repair) => {
                        assert!(repair.deadline >= now);
                        bytes += repair.len as u64;
                        ended += 1;
                        let passed = now.duration_since(start).as_secs_f64();
                        assert!(bytes as f64 <= burst as f64 + rate as f64 * passed + 1.0);
                    }
                    Next::Late(repair) => {
                        assert!(repair.deadline < now);
                        ended += 1;
                    }
                    Next::Wait(until) => {
                        assert!(until >= now);
                        break;
                    }
                    Next::Idle => break,
                }
            };
            for (seq, (pause, slack, len)) in asks.iter().enumerate() {
                now += Duration::from_millis(*pause);
                let deadline = now + Duration::from_millis(*slack);
                let seq = Seq(seq as u16);
                let ssrc = Ssrc(1);
                outbox.push(Repair { ssrc, seq, deadline, len: *len, further: 0, packet: () });
                take(&mut outbox, now);
            }
            take(&mut outbox, now + Duration::from_secs(10));
            prop_assert_eq!(ended, asks.len());
        }
    }
}
