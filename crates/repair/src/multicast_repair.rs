//! Aggregation of repair requests: a packet that several edges of a multicast group request at the
//! same time is sent to the group once.
//!
//! A packet lost near the cloud is missing at every edge of the group. Answering each edge
//! separately would multiply the traffic on a path that is already losing packets.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::bucket::TokenBucket;
use crate::rtp::{Seq, Ssrc};

/// Recent requests of all multicast groups.
///
/// States of a requested packet, per group:
///
/// - *requested*: up to `UNICAST_ANSWERS` edges are answered by unicast. The next edge within
///   `SAME_LOSS` moves the packet to *sent*, if the group's budget allows; a later one restarts the
///   count.
/// - *sent to the group*: an edge whose request left before the packet could arrive is
///   [`Answer::Covered`], or gets only the copies it wants beyond those already sent. A request after
///   its round trip means that the edge lost the multicast packet too: unicast.
/// - *expired*: forgotten `MAX_GUARD` after the last event.
///
/// [`MulticastRepair::refused`] moves the group's packets back to *requested* and blocks the group
/// for a while. Invariants: `requested` and `order` have the same keys; all tables are bounded.
#[derive(Debug, Default)]
pub struct MulticastRepair {
    requested: HashMap<Key, Requested>,
    /// The keys of `requested`, each once, approximately oldest first.
    order: VecDeque<(Instant, Key)>,
    /// Groups that a packet was sent to.
    groups: HashMap<SocketAddr, Group>,
}

/// One edge's request for one packet.
#[derive(Debug, Clone, Copy)]
pub struct GroupRequest {
    /// The group that the edge listens to.
    pub group: SocketAddr,
    /// A unique identifier of the edge.
    pub edge: u64,
    /// The round trip to the edge.
    pub round_trip: Duration,
    /// The stream.
    pub ssrc: Ssrc,
    /// The packet's sequence number.
    pub seq: Seq,
    /// Number of copies the edge requests.
    pub copies: u8,
    /// Length of the packet in bytes.
    pub len: usize,
}

/// How to answer a [`GroupRequest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Send to the edge alone, as without a group.
    Unicast,
    /// Send to the group.
    Group {
        /// `true` if the first copy must be sent now; otherwise it was sent a moment ago.
        at_once: bool,
        /// Further copies to send, spaced.
        further: u8,
    },
    /// Send nothing: the packet sent to the group is on its way to the edge.
    Covered,
}

/// Repair budget of one group. A rate of 0 is no limit.
#[derive(Debug, Clone, Copy)]
pub struct GroupBudget {
    /// Bytes per second.
    pub rate: u64,
    /// Burst in bytes.
    pub burst: u64,
}

impl MulticastRepair {
    /// Creates an aggregator without requests.
    pub fn new() -> Self {
        Self::default()
    }

    /// Handles a request received at `now`. The caller must filter out repetitions of a request that
    /// was just answered (see [`Retransmitter::is_new`](crate::retransmit::Retransmitter::is_new)).
    pub fn handle_request(
        &mut self,
        now: Instant,
        request: GroupRequest,
        budget: GroupBudget,
    ) -> Answer {
        self.expire(now);
        let key = (request.group, request.ssrc, request.seq);
        let full = self.requested.len() >= MAX_REQUESTED;
        let requested = match self.requested.entry(key) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if full => return Answer::Unicast,
            Entry::Vacant(entry) => {
                self.order.push_back((now, key));
                entry.insert(Requested::new(now))
            }
        };

        if let Some(sent) = requested.sent {
            // A request within the edge's round trip left before the packet could arrive. A later
            // one means that the edge lost the multicast packet too.
            if now.saturating_duration_since(sent) >= request.round_trip.clamp(MIN_GUARD, MAX_GUARD)
            {
                return Answer::Unicast;
            }
            let further = request.copies.saturating_sub(requested.copies);
            if further == 0 {
                return Answer::Covered;
            }
            requested.copies = request.copies;
            return Answer::Group { at_once: false, further };
        }

        if now.saturating_duration_since(requested.since) >= SAME_LOSS {
            *requested = Requested::new(now);
        }
        requested.copies = requested.copies.max(request.copies);
        if requested.edges.iter().flatten().any(|edge| *edge == request.edge) {
            return Answer::Unicast;
        }
        if let Some(free) = requested.edges.iter_mut().find(|edge| edge.is_none()) {
            *free = Some(request.edge);
            return Answer::Unicast;
        }
        let (copies, bytes) = (requested.copies, request.len as u64 * u64::from(requested.copies));
        if !self.may_send(now, request.group, bytes, budget) {
            return Answer::Unicast;
        }
        if let Some(requested) = self.requested.get_mut(&key) {
            requested.sent = Some(now);
        }
        Answer::Group { at_once: true, further: copies.saturating_sub(1) }
    }

    /// Withdraws an [`Answer::Group`] because the cloud does not send to that group. Its edges are
    /// answered by unicast for a while.
    pub fn refused(&mut self, now: Instant, group: SocketAddr) {
        if let Some(state) = self.groups.get_mut(&group) {
            state.refused_until = Some(now + REFUSED_FOR);
        }
        for (_, requested) in self.requested.iter_mut().filter(|((other, ..), _)| *other == group) {
            requested.sent = None;
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
            // Edges may claim any group; real groups are requested from all the time.
            let idle = |state: &Group| now.saturating_duration_since(state.used) >= IDLE;
            self.groups.retain(|_, state| !idle(state));
            if self.groups.len() >= MAX_GROUPS {
                return false;
            }
        }
        let state = self.groups.entry(group).or_insert_with(|| Group {
            budget: TokenBucket::new(now, budget.rate, budget.burst),
            budget_set: now,
            used: now,
            refused_until: None,
        });
        state.used = now;
        if state.refused_until.is_some_and(|until| now < until) {
            return false;
        }
        if now.saturating_duration_since(state.budget_set) >= BUDGET_INTERVAL {
            state.budget.set(now, budget.rate, budget.burst);
            state.budget_set = now;
        }
        state.budget.take(now, bytes)
    }

    fn expire(&mut self, now: Instant) {
        while let Some((at, key)) = self.order.front()
            && now.saturating_duration_since(*at) >= MAX_GUARD
        {
            let key = *key;
            self.order.pop_front();
            let Some(requested) = self.requested.get(&key) else { continue };
            let last = requested.sent.unwrap_or(requested.since);
            if now.saturating_duration_since(last) >= MAX_GUARD {
                self.requested.remove(&key);
            } else {
                self.order.push_back((last, key));
            }
        }
    }
}

type Key = (SocketAddr, Ssrc, Seq);

#[derive(Debug)]
struct Requested {
    since: Instant,
    /// The first edges that requested the packet.
    edges: [Option<u64>; UNICAST_ANSWERS],
    /// The most copies that any edge requested.
    copies: u8,
    /// When the packet was sent to the group.
    sent: Option<Instant>,
}

impl Requested {
    fn new(since: Instant) -> Self {
        Self { since, edges: [None; UNICAST_ANSWERS], copies: 1, sent: None }
    }
}

#[derive(Debug)]
struct Group {
    budget: TokenBucket,
    budget_set: Instant,
    used: Instant,
    refused_until: Option<Instant>,
}

/// Edges that are answered by unicast before a packet is sent to the group.
const UNICAST_ANSWERS: usize = 2;
/// Requests within this time are attributed to one loss.
const SAME_LOSS: Duration = Duration::from_millis(20);
/// Edges on one LAN see a gap at the same time, but their requests spread by scheduling delays.
const MIN_GUARD: Duration = Duration::from_millis(10);
const MAX_GUARD: Duration = Duration::from_millis(250);
/// Time for which a refused group is answered by unicast.
const REFUSED_FOR: Duration = Duration::from_secs(1);
/// Interval at which a group's budget is updated.
const BUDGET_INTERVAL: Duration = Duration::from_secs(1);
/// Enough for 65,000 lost packets per second.
const MAX_REQUESTED: usize = 16_384;
const MAX_GROUPS: usize = 1024;
/// A group without a request for this time may be forgotten.
const IDLE: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use rand::{Rng, SeedableRng, rngs::SmallRng};

    use super::*;

    const NO_LIMIT: GroupBudget = GroupBudget { rate: 0, burst: 0 };
    const AT_ONCE: Answer = Answer::Group { at_once: true, further: 0 };

    fn request(edge: u64) -> GroupRequest {
        GroupRequest {
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
    fn the_third_edge_with_the_same_loss_triggers_multicast() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut groups = MulticastRepair::new();
        let mut answer = |ms, request| groups.handle_request(at(ms), request, NO_LIMIT);
        assert_eq!(answer(0, request(1)), Answer::Unicast);
        assert_eq!(answer(1, request(2)), Answer::Unicast);
        // The same edge, another stream or another group do not count as a third edge.
        assert_eq!(answer(2, request(2)), Answer::Unicast);
        assert_eq!(answer(2, GroupRequest { ssrc: Ssrc(2), ..request(3) }), Answer::Unicast);
        let other = "239.0.0.2:5222".parse().unwrap();
        assert_eq!(answer(2, GroupRequest { group: other, ..request(3) }), Answer::Unicast);
        assert_eq!(answer(3, request(3)), AT_ONCE);
        for edge in 4..100 {
            assert_eq!(answer(30, request(edge)), Answer::Covered);
        }
        // A request after the edge's round trip means that it lost the multicast packet too.
        assert_eq!(answer(53, request(5)), Answer::Unicast);
        let far = GroupRequest { round_trip: Duration::from_millis(200), ..request(200) };
        assert_eq!(answer(180, far), Answer::Covered);
    }

    #[test]
    fn requests_far_apart_are_answered_by_unicast() {
        let now = Instant::now();
        let mut groups = MulticastRepair::new();
        for i in 0..20 {
            let at = now + Duration::from_millis(i * 11);
            assert_eq!(groups.handle_request(at, request(i), NO_LIMIT), Answer::Unicast, "{i}");
        }
    }

    #[test]
    fn the_group_gets_the_most_copies_that_any_edge_requests() {
        let now = Instant::now();
        let mut groups = MulticastRepair::new();
        let mut answer = |edge, copies| {
            groups.handle_request(now, GroupRequest { copies, ..request(edge) }, NO_LIMIT)
        };
        answer(1, 2);
        answer(2, 1);
        assert_eq!(answer(3, 1), Answer::Group { at_once: true, further: 1 });
        assert_eq!(answer(4, 2), Answer::Covered);
        assert_eq!(answer(5, 3), Answer::Group { at_once: false, further: 1 });
        assert_eq!(answer(6, 3), Answer::Covered);
    }

    #[test]
    fn a_refused_group_is_answered_by_unicast_for_a_while() {
        let now = Instant::now();
        let mut groups = MulticastRepair::new();
        let mut third = |at| {
            groups.handle_request(at, request(1), NO_LIMIT);
            groups.handle_request(at, request(2), NO_LIMIT);
            let answer = groups.handle_request(at, request(3), NO_LIMIT);
            if answer == AT_ONCE {
                groups.refused(at, request(3).group);
            }
            answer
        };
        assert_eq!(third(now), AT_ONCE);
        assert_eq!(third(now + Duration::from_millis(900)), Answer::Unicast);
        assert_eq!(third(now + Duration::from_millis(1100)), AT_ONCE);
    }

    #[test]
    fn the_budget_of_a_group_holds() {
        let now = Instant::now();
        let mut groups = MulticastRepair::new();
        let budget = GroupBudget { rate: 10_000, burst: 5_000 };
        let mut sent = 0;
        for ms in 0..1000 {
            for edge in 0..4 {
                let request = GroupRequest { seq: Seq(ms), ..request(edge) };
                let at = now + Duration::from_millis(ms.into());
                sent += usize::from(groups.handle_request(at, request, budget) == AT_ONCE);
            }
        }
        assert!((14..=15).contains(&sent), "{sent}");
    }

    #[test]
    fn three_hundred_edges_with_the_same_loss_cost_few_answers() {
        // Edges 5 to 150 ms away miss the same packets. Each requests a packet when it sees the gap
        // and every 1.1 round trips while it is missing. One edge in twenty loses a multicast packet.
        let mut rng = SmallRng::seed_from_u64(1);
        let start = Instant::now();
        let round_trips: Vec<u64> = (0..300).map(|_| rng.random_range(5..150)).collect();
        let mut requests = Vec::new();
        for seq in 0..50u16 {
            for (edge, round_trip) in round_trips.iter().enumerate() {
                // Half the round trip for the packet that shows the gap, half for the request.
                let delay = Duration::from_millis(round_trip + rng.random_range(0..3));
                let at = start + Duration::from_millis(u64::from(seq) * 300) + delay;
                requests.push((at, edge, seq));
            }
        }
        let mut groups = MulticastRepair::new();
        let (mut unicast, mut multicast, mut covered) = (0, 0, 0);
        let mut held = HashSet::new();
        let mut queue: std::collections::BinaryHeap<_> =
            requests.into_iter().map(std::cmp::Reverse).collect();
        let mut sent_at: HashMap<u16, Instant> = HashMap::new();
        while let Some(std::cmp::Reverse((at, edge, seq))) = queue.pop() {
            if held.contains(&(edge, seq)) {
                continue;
            }
            let round_trip = Duration::from_millis(round_trips[edge]);
            let request = GroupRequest { seq: Seq(seq), round_trip, ..request(edge as u64) };
            match groups.handle_request(at, request, NO_LIMIT) {
                Answer::Unicast => {
                    unicast += 1;
                    held.insert((edge, seq));
                }
                Answer::Group { .. } => {
                    multicast += 1;
                    sent_at.insert(seq, at);
                    for other in 0..300 {
                        if rng.random_bool(0.95) {
                            held.insert((other, seq));
                        }
                    }
                }
                Answer::Covered => {
                    let sent = sent_at[&seq];
                    assert!(
                        at - sent < round_trip.max(MIN_GUARD),
                        "requested before it could arrive"
                    );
                    covered += 1;
                }
            }
            if !held.contains(&(edge, seq)) {
                queue.push(std::cmp::Reverse((at + round_trip * 11 / 10, edge, seq)));
            }
        }
        // Every edge has every packet, for a fraction of the 15,000 answers that unicast would take.
        assert_eq!(held.len(), 300 * 50);
        assert!((50..=100).contains(&multicast), "{multicast}");
        assert!(unicast <= 50 * 30, "{unicast}");
        assert!(covered > 0);
    }

    #[test]
    fn memory_is_bounded_for_any_requests() {
        let now = Instant::now();
        let mut groups = MulticastRepair::new();
        for i in 0..200_000u32 {
            let group = SocketAddr::from(([239, 1, (i >> 8) as u8, i as u8], 5));
            for edge in 0..3 {
                groups.handle_request(
                    now,
                    GroupRequest { group, ssrc: Ssrc(i), ..request(edge) },
                    NO_LIMIT,
                );
            }
        }
        assert!(groups.requested.len() <= MAX_REQUESTED && groups.order.len() <= MAX_REQUESTED);
        assert!(groups.groups.len() <= MAX_GROUPS);
        groups.handle_request(now + MAX_GUARD, request(0), NO_LIMIT);
        assert_eq!((groups.requested.len(), groups.order.len()), (1, 1));
    }
}
