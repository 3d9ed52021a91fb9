//! Repairs that wait for budget: earliest deadline first.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use super::bucket::TokenBucket;
use crate::rtp::{Seq, Ssrc};

/// Queue of repairs to one edge, earliest deadline first, within a byte budget.
///
/// While the budget suffices, repairs leave in the order of their requests. When it is spent, the
/// most urgent repair goes first, and a repair past its deadline is not sent. `T` is the caller's
/// packet type.
///
/// States of a repair: pushed → queued → [`Next::Send`] or [`Next::Late`]; a second push of the same
/// packet merges with the queued one; [`Pushed::Dropped`] returns the least urgent one of a full
/// queue. Invariants: at most one queued repair per packet, and `keys` holds exactly the queued ones.
#[derive(Debug)]
pub struct RepairQueue<T> {
    budget: TokenBucket,
    /// By deadline, then in the order of arrival.
    queue: BTreeMap<(Instant, u64), Repair<T>>,
    keys: HashMap<(Ssrc, Seq), (Instant, u64)>,
    next_serial: u64,
}

/// A packet that is to be sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair<T> {
    /// The stream.
    pub ssrc: Ssrc,
    /// The packet's sequence number.
    pub seq: Seq,
    /// The last moment at which sending it is useful.
    pub deadline: Instant,
    /// Bytes charged to the budget.
    pub len: usize,
    /// Copies to send after this one.
    pub further: u8,
    /// The packet.
    pub packet: T,
}

/// Result of [`RepairQueue::push`].
#[derive(Debug, PartialEq, Eq)]
pub enum Pushed<T> {
    /// The repair was queued.
    Queued,
    /// The packet was queued already. It keeps the earlier deadline and the higher number of copies.
    Merged,
    /// The queue was full. This repair had the latest deadline and was dropped.
    Dropped(Repair<T>),
}

/// Result of [`RepairQueue::poll`].
#[derive(Debug, PartialEq, Eq)]
pub enum Next<T> {
    /// Send this repair; the budget has been charged.
    Send(Repair<T>),
    /// The deadline of this repair has passed.
    Late(Repair<T>),
    /// The budget is spent until this time.
    Wait(Instant),
    /// The queue is empty.
    Idle,
}

impl<T> RepairQueue<T> {
    /// Creates an empty queue with a budget of `rate` bytes per second (0 for no limit) and a burst of
    /// `burst` bytes.
    pub fn new(now: Instant, rate: u64, burst: u64) -> Self {
        Self {
            budget: TokenBucket::new(now, rate, burst),
            queue: BTreeMap::new(),
            keys: HashMap::new(),
            next_serial: 0,
        }
    }

    /// Changes the budget; see [`RepairQueue::new`].
    pub fn set_budget(&mut self, now: Instant, rate: u64, burst: u64) {
        self.budget.set(now, rate, burst);
    }

    /// Adds a repair. [`RepairQueue::poll`] returns it when it may be sent.
    pub fn push(&mut self, mut repair: Repair<T>) -> Pushed<T> {
        let key = (repair.ssrc, repair.seq);
        let queued = self.keys.remove(&key).and_then(|queue_key| self.queue.remove(&queue_key));
        let merged = queued.is_some();
        if let Some(queued) = queued {
            repair.deadline = repair.deadline.min(queued.deadline);
            repair.further = repair.further.max(queued.further);
        }
        let queue_key = (repair.deadline, self.next_serial);
        self.next_serial += 1;
        self.keys.insert(key, queue_key);
        self.queue.insert(queue_key, repair);
        if self.queue.len() > MAX_QUEUED
            && let Some((_, dropped)) = self.queue.pop_last()
        {
            self.keys.remove(&(dropped.ssrc, dropped.seq));
            return Pushed::Dropped(dropped);
        }
        if merged { Pushed::Merged } else { Pushed::Queued }
    }

    /// Returns the most urgent repair. Call until it returns [`Next::Wait`] or [`Next::Idle`].
    pub fn poll(&mut self, now: Instant) -> Next<T> {
        let Some(entry) = self.queue.first_entry() else { return Next::Idle };
        let late = entry.key().0 < now;
        let len = entry.get().len as u64;
        if !late && !self.budget.take(now, len) {
            return Next::Wait(self.budget.ready_at(now, len));
        }
        let repair = entry.remove();
        self.keys.remove(&(repair.ssrc, repair.seq));
        if late { Next::Late(repair) } else { Next::Send(repair) }
    }

    /// Returns the number of queued repairs.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// `true` if no repair is queued.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

/// Returns the last moment at which a requested packet is worth sending.
///
/// The edge has `slack` left when it sends the request; request and repair take half a round trip
/// each. The result is never before `now`, so that one immediate attempt is always made: round trips
/// are estimates, and `slack` is that of the request's most urgent packet.
pub fn deadline(now: Instant, slack: Duration, round_trip: Duration) -> Instant {
    now + slack.saturating_sub(round_trip)
}

/// Queued repairs; each keeps its whole burst in memory.
const MAX_QUEUED: usize = 4096;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LEN: usize = 1000;

    fn repair(seq: u16, deadline: Instant) -> Repair<u16> {
        Repair { ssrc: Ssrc(1), seq: Seq(seq), deadline, len: LEN, further: 0, packet: seq }
    }

    fn drain(queue: &mut RepairQueue<u16>, now: Instant) -> (Vec<u16>, Vec<u16>, Option<Instant>) {
        let (mut sent, mut late) = (Vec::new(), Vec::new());
        loop {
            match queue.poll(now) {
                Next::Send(repair) => sent.push(repair.packet),
                Next::Late(repair) => late.push(repair.packet),
                Next::Wait(until) => return (sent, late, Some(until)),
                Next::Idle => return (sent, late, None),
            }
        }
    }

    #[test]
    fn within_the_budget_repairs_leave_at_once_in_request_order() {
        let now = Instant::now();
        let mut queue = RepairQueue::new(now, 0, 0);
        // Even without time left there is one attempt.
        let deadline = deadline(now, Duration::from_millis(30), Duration::from_millis(100));
        assert_eq!(deadline, now);
        for seq in [5, 3, 4] {
            assert_eq!(queue.push(repair(seq, deadline)), Pushed::Queued);
        }
        assert_eq!(drain(&mut queue, now), (vec![5, 3, 4], vec![], None));
    }

    #[test]
    fn beyond_the_budget_urgent_repairs_go_first_and_late_ones_never() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut queue = RepairQueue::new(now, 10_000, LEN as u64);
        for (seq, deadline) in [(1, 350), (2, 90), (3, 150), (4, 1000), (5, 0)] {
            queue.push(repair(seq, at(deadline)));
        }
        // One packet per 100 ms.
        assert_eq!(drain(&mut queue, now), (vec![5], vec![], Some(at(100))));
        assert_eq!(drain(&mut queue, at(89)).1, [0; 0]);
        let (sent, late, _) = drain(&mut queue, at(101));
        assert_eq!((sent, late), (vec![3], vec![2]));
        assert_eq!(drain(&mut queue, at(202)).0, [1]);
        assert_eq!(drain(&mut queue, at(303)), (vec![4], vec![], None));
    }

    #[test]
    fn a_queued_packet_is_merged_with_its_repetition() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut queue = RepairQueue::new(now, 1, 1);
        queue.push(repair(0, now));
        drain(&mut queue, now);
        queue.push(repair(7, later + Duration::from_secs(1)));
        let again = Repair { further: 2, ..repair(7, later) };
        assert_eq!(queue.push(again.clone()), Pushed::Merged);
        assert_eq!(queue.push(repair(7, later + Duration::from_secs(9))), Pushed::Merged);
        assert_eq!(queue.len(), 1);
        assert_eq!(queue.poll(later), Next::Send(again));
        assert!(queue.is_empty() && queue.keys.is_empty());
    }

    #[test]
    fn a_full_queue_drops_the_latest_deadline() {
        let now = Instant::now();
        let mut queue = RepairQueue::new(now, 1, 1);
        for seq in 0..MAX_QUEUED as u16 {
            queue.push(repair(seq, now + Duration::from_secs(9)));
        }
        let urgent = repair(60_000, now + Duration::from_secs(1));
        let Pushed::Dropped(dropped) = queue.push(urgent) else { panic!() };
        assert_eq!(dropped.seq, Seq(MAX_QUEUED as u16 - 1));
        assert_eq!((queue.len(), queue.keys.len()), (MAX_QUEUED, MAX_QUEUED));
        assert!(matches!(queue.poll(now), Next::Send(repair) if repair.seq == Seq(60_000)));
    }

    proptest! {
        #[test]
        fn the_budget_holds_and_each_repair_is_sent_or_late_once(
            requests in prop::collection::vec((0u64..40, 0u64..400, 1usize..1200), 1..400),
            rate in 1u64..200_000, burst in 1200u64..50_000,
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut queue = RepairQueue::new(start, rate, burst);
            let (mut bytes, mut ended) = (0, 0);
            let mut take = |queue: &mut RepairQueue<()>, now: Instant| loop {
                match queue.poll(now) {
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
            for (seq, (pause, slack, len)) in requests.iter().enumerate() {
                now += Duration::from_millis(*pause);
                let deadline = now + Duration::from_millis(*slack);
                let seq = Seq(seq as u16);
                let ssrc = Ssrc(1);
                queue.push(Repair { ssrc, seq, deadline, len: *len, further: 0, packet: () });
                take(&mut queue, now);
            }
            take(&mut queue, now + Duration::from_secs(10));
            prop_assert_eq!(ended, requests.len());
        }
    }
}
