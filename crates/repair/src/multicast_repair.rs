//! What many edges of one multicast group ask for in the same moment: it is sent to the group once.
//! No socket, no clock.
//!
//! A packet that is lost near the cloud is missing at every edge of the group, and without this the
//! cloud would answer each of them for itself, just when the path is short of room.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::bucket::TokenBucket;
use crate::rtp::{Seq, Ssrc};

/// The requests of all groups in the last moments.
#[derive(Debug, Default)]
pub struct GroupRepair {
    asked: HashMap<Key, Asked>,
    /// The keys of `asked`, each once, about the oldest first.
    order: VecDeque<(Instant, Key)>,
    /// Groups that something was sent to.
    groups: HashMap<SocketAddr, Group>,
}

/// One edge's request for one packet.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    /// The group that the edge listens to.
    pub group: SocketAddr,
    /// The edge: any number that no other has.
    pub edge: u64,
    /// The round trip to it.
    pub round_trip: Duration,
    /// The stream.
    pub ssrc: Ssrc,
    /// The packet.
    pub seq: Seq,
    /// How many copies it wants.
    pub copies: u8,
    /// The packet's bytes.
    pub len: usize,
}

/// How to answer an [`Ask`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// To the edge alone, as if there were no group.
    Unicast,
    /// To the group: `at_once`, if it says so, and so many copies more, spaced.
    Group {
        /// Whether one is to be sent now; otherwise that was done a moment before.
        at_once: bool,
        /// Copies to send after that.
        further: u8,
    },
    /// Not at all: what was sent to the group is on its way to this edge.
    Covered,
}

/// What groups may be sent, in bytes a second and at once. A rate of 0 is no limit.
#[derive(Debug, Clone, Copy)]
pub struct GroupBudget {
    /// Bytes a second.
    pub rate: u64,
    /// Bytes at once.
    pub burst: u64,
}

impl GroupRepair {
    /// Nothing has been asked for.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a request that came at `now` and is no repetition of one from the same edge that was
    /// just answered.
    pub fn ask(&mut self, now: Instant, ask: Ask, budget: GroupBudget) -> Answer {
        self.expire(now);
        let key = (ask.group, ask.ssrc, ask.seq);
        let full = self.asked.len() >= MAX_ASKED;
        let asked = match self.asked.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if full => return Answer::Unicast,
            Entry::Vacant(entry) => {
                self.order.push_back((now, key));
                entry.insert(Asked::new(now))
            }
        };

        if let Some(sent) = asked.sent {
            // What an edge asked for within its own round trip after the sending it asked for
            // before the packet could have come. Later than that, it was lost on its way too.
            if now.saturating_duration_since(sent) >= ask.round_trip.clamp(MIN_GUARD, MAX_GUARD) {
                return Answer::Unicast;
            }
            let further = ask.copies.saturating_sub(asked.copies);
            if further == 0 {
                return Answer::Covered;
            }
            asked.copies = ask.copies;
            return Answer::Group { at_once: false, further };
        }

        if now.saturating_duration_since(asked.since) >= MOMENT {
            *asked = Asked::new(now);
        }
        asked.copies = asked.copies.max(ask.copies);
        if asked.edges.iter().flatten().any(|edge| *edge == ask.edge) {
            return Answer::Unicast;
        }
        if let Some(free) = asked.edges.iter_mut().find(|edge| edge.is_none()) {
            *free = Some(ask.edge);
            return Answer::Unicast;
        }
        let (copies, bytes) = (asked.copies, ask.len as u64 * u64::from(asked.copies));
        if !self.may_send(now, ask.group, bytes, budget) {
            return Answer::Unicast;
        }
        if let Some(asked) = self.asked.get_mut(&key) {
            asked.sent = Some(now);
        }
        Answer::Group { at_once: true, further: copies.saturating_sub(1) }
    }

    /// Takes back an [`Answer::Group`]: this cloud does not send to that group. Its edges are
    /// answered by unicast for a while.
    pub fn refused(&mut self, now: Instant, group: SocketAddr) {
        if let Some(known) = self.groups.get_mut(&group) {
            known.refused_until = Some(now + REFUSED);
        }
        for (_, asked) in self.asked.iter_mut().filter(|((of, ..), _)| *of == group) {
            asked.sent = None;
        }
    }

    fn may_send(
        &mut self,
        now: Instant,
        group: SocketAddr,
        bytes: u64,
        budget: GroupBudget,
    ) -> bool {
        if self.groups.len() >= MAX_GROUPS && !self.groups.contains_key(&group) {
            // Edges may claim any group; the true ones are asked about all the time.
            let idle = |known: &Group| now.saturating_duration_since(known.used) >= IDLE;
            self.groups.retain(|_, known| !idle(known));
            if self.groups.len() >= MAX_GROUPS {
                return false;
            }
        }
        let known = self.groups.entry(group).or_insert_with(|| Group {
            budget: TokenBucket::new(now, budget.rate, budget.burst),
            set: now,
            used: now,
            refused_until: None,
        });
        known.used = now;
        if known.refused_until.is_some_and(|until| now < until) {
            return false;
        }
        if now.saturating_duration_since(known.set) >= BUDGET_AGE {
            known.budget.set(now, budget.rate, budget.burst);
            known.set = now;
        }
        known.budget.take(now, bytes)
    }

    fn expire(&mut self, now: Instant) {
        while let Some((at, key)) = self.order.front()
            && now.saturating_duration_since(*at) >= MAX_GUARD
        {
            let key = *key;
            self.order.pop_front();
            let Some(asked) = self.asked.get(&key) else { continue };
            let last = asked.sent.unwrap_or(asked.since);
            if now.saturating_duration_since(last) >= MAX_GUARD {
                self.asked.remove(&key);
            } else {
                self.order.push_back((last, key));
            }
        }
    }
}

type Key = (SocketAddr, Ssrc, Seq);

#[derive(Debug)]
struct Asked {
    since: Instant,
    /// The first askers.
    edges: [Option<u64>; UNICAST_ASKERS],
    /// The most copies that one of them wants.
    copies: u8,
    /// When it went to the group.
    sent: Option<Instant>,
}

impl Asked {
    fn new(since: Instant) -> Self {
        Self { since, edges: [None; UNICAST_ASKERS], copies: 1, sent: None }
    }
}

#[derive(Debug)]
struct Group {
    budget: TokenBucket,
    set: Instant,
    used: Instant,
    refused_until: Option<Instant>,
}

/// Edges that are answered by unicast before the group is.
const UNICAST_ASKERS: usize = 2;
/// Requests this close together are for one loss.
const MOMENT: Duration = Duration::from_millis(20);
/// Edges on one LAN see a gap at the same time, but do not all get to asking at once.
const MIN_GUARD: Duration = Duration::from_millis(10);
const MAX_GUARD: Duration = Duration::from_millis(250);
const REFUSED: Duration = Duration::from_secs(1);
/// How old a group's budget may be before it is set anew.
const BUDGET_AGE: Duration = Duration::from_secs(1);
/// 65,000 lost packets a second.
const MAX_ASKED: usize = 16_384;
const MAX_GROUPS: usize = 1024;
const IDLE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    const NO_LIMIT: GroupBudget = GroupBudget { rate: 0, burst: 0 };
    const AT_ONCE: Answer = Answer::Group { at_once: true, further: 0 };

    fn ask(edge: u64) -> Ask {
        Ask {
            group: "239.0.0.1:5222".parse().unwrap(),
            edge,
            round_trip: Duration::from_millis(50),
            ssrc: Ssrc(1),
            seq: Seq(7),
            copies: 1,
            len: 1000,
        }
    }

    #[test]
    fn the_third_edge_of_a_moment_brings_it_to_the_group() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut groups = GroupRepair::new();
        let mut answer = |ms, ask| groups.ask(at(ms), ask, NO_LIMIT);
        assert_eq!(answer(0, ask(1)), Answer::Unicast);
        assert_eq!(answer(1, ask(2)), Answer::Unicast);
        // The same edge again, another stream, another group: none of them is a third.
        assert_eq!(answer(2, ask(2)), Answer::Unicast);
        assert_eq!(answer(2, Ask { ssrc: Ssrc(2), ..ask(3) }), Answer::Unicast);
        let other = "239.0.0.2:5222".parse().unwrap();
        assert_eq!(answer(2, Ask { group: other, ..ask(3) }), Answer::Unicast);
        assert_eq!(answer(3, ask(3)), AT_ONCE);
        for edge in 4..100 {
            assert_eq!(answer(30, ask(edge)), Answer::Covered);
        }
        // After its own round trip an edge asks because it did not get that either.
        assert_eq!(answer(53, ask(5)), Answer::Unicast);
        let far = Ask { round_trip: Duration::from_millis(200), ..ask(200) };
        assert_eq!(answer(180, far), Answer::Covered);
    }

    #[test]
    fn apart_they_are_answered_apart() {
        let now = Instant::now();
        let mut groups = GroupRepair::new();
        for i in 0..20 {
            let at = now + Duration::from_millis(i * 11);
            assert_eq!(groups.ask(at, ask(i), NO_LIMIT), Answer::Unicast, "{i}");
        }
    }

    #[test]
    fn the_group_gets_the_most_copies_that_one_of_them_wants() {
        let now = Instant::now();
        let mut groups = GroupRepair::new();
        let mut answer = |edge, copies| groups.ask(now, Ask { copies, ..ask(edge) }, NO_LIMIT);
        answer(1, 2);
        answer(2, 1);
        assert_eq!(answer(3, 1), Answer::Group { at_once: true, further: 1 });
        assert_eq!(answer(4, 2), Answer::Covered);
        assert_eq!(answer(5, 3), Answer::Group { at_once: false, further: 1 });
        assert_eq!(answer(6, 3), Answer::Covered);
    }

    #[test]
    fn a_group_that_is_none_of_ours_is_left_alone_for_a_while() {
        let now = Instant::now();
        let mut groups = GroupRepair::new();
        let mut third = |at| {
            groups.ask(at, ask(1), NO_LIMIT);
            groups.ask(at, ask(2), NO_LIMIT);
            let answer = groups.ask(at, ask(3), NO_LIMIT);
            if answer == AT_ONCE {
                groups.refused(at, ask(3).group);
            }
            answer
        };
        assert_eq!(third(now), AT_ONCE);
        assert_eq!(third(now + Duration::from_millis(900)), Answer::Unicast);
        assert_eq!(third(now + Duration::from_millis(1100)), AT_ONCE);
    }

    #[test]
    fn a_groups_budget_holds() {
        let now = Instant::now();
        let mut groups = GroupRepair::new();
        let budget = GroupBudget { rate: 10_000, burst: 5_000 };
        let mut sent = 0;
        for ms in 0..1000 {
            for edge in 0..4 {
                let ask = Ask { seq: Seq(ms), ..ask(edge) };
                let at = now + Duration::from_millis(ms.into());
                sent += usize::from(groups.ask(at, ask, budget) == AT_ONCE);
            }
        }
        assert!((14..=15).contains(&sent), "{sent}");
    }

    #[test]
    fn three_hundred_edges_that_lose_the_same_cost_three_answers_each() {
        // Edges 5 to 150 ms away, all missing the same packets of a stream, each of them asking as
        // soon as it sees the gap, and again 1.1 round trips later while the packet is missing; the
        // group's own copy is lost at one edge in twenty.
        let mut rng = SmallRng::seed_from_u64(1);
        let start = Instant::now();
        let round_trips: Vec<u64> = (0..300).map(|_| rng.random_range(5..150)).collect();
        let mut asks = Vec::new();
        for seq in 0..50u16 {
            for (edge, round_trip) in round_trips.iter().enumerate() {
                // Half for the packet that shows the gap, half for the request.
                let delay = Duration::from_millis(round_trip + rng.random_range(0..3));
                let at = start + Duration::from_millis(u64::from(seq) * 300) + delay;
                asks.push((at, edge, seq));
            }
        }
        let mut groups = GroupRepair::new();
        let (mut unicast, mut multicast, mut covered) = (0, 0, 0);
        let mut held = HashSet::new();
        // Retries are put in as they arise.
        let mut queue: std::collections::BinaryHeap<_> =
            asks.into_iter().map(std::cmp::Reverse).collect();
        let mut on_its_way: HashMap<u16, Instant> = HashMap::new();
        while let Some(std::cmp::Reverse((at, edge, seq))) = queue.pop() {
            if held.contains(&(edge, seq)) {
                continue;
            }
            let round_trip = Duration::from_millis(round_trips[edge]);
            let ask = Ask { seq: Seq(seq), round_trip, ..ask(edge as u64) };
            match groups.ask(at, ask, NO_LIMIT) {
                Answer::Unicast => {
                    unicast += 1;
                    held.insert((edge, seq));
                }
                Answer::Group { .. } => {
                    multicast += 1;
                    on_its_way.insert(seq, at);
                    for other in 0..300 {
                        if rng.random_bool(0.95) {
                            held.insert((other, seq));
                        }
                    }
                }
                Answer::Covered => {
                    let sent = on_its_way[&seq];
                    assert!(at - sent < round_trip.max(MIN_GUARD), "it was asked for before");
                    covered += 1;
                }
            }
            if !held.contains(&(edge, seq)) {
                queue.push(std::cmp::Reverse((at + round_trip * 11 / 10, edge, seq)));
            }
        }
        // All have all, for a fiftieth of the 15,000 answers that each for itself would be.
        assert_eq!(held.len(), 300 * 50);
        assert!((50..=100).contains(&multicast), "{multicast}");
        assert!(unicast <= 50 * 30, "{unicast}");
        assert!(covered > 0);
    }

    #[test]
    fn memory_is_bounded_whatever_is_asked() {
        let now = Instant::now();
        let mut groups = GroupRepair::new();
        for i in 0..200_000u32 {
            let group = SocketAddr::from(([239, 1, (i >> 8) as u8, i as u8], 5));
            for edge in 0..3 {
                groups.ask(now, Ask { group, ssrc: Ssrc(i), ..ask(edge) }, NO_LIMIT);
            }
        }
        assert!(groups.asked.len() <= MAX_ASKED && groups.order.len() <= MAX_ASKED);
        assert!(groups.groups.len() <= MAX_GROUPS);
        groups.ask(now + MAX_GUARD, ask(0), NO_LIMIT);
        assert_eq!((groups.asked.len(), groups.order.len()), (1, 1));
    }
}
