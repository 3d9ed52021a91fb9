//! Requests to a sender that answers one after the other, in order: a v0 cloud.
//!
//! When such a sender answers more slowly than packets are lost, requesting everything makes each
//! answer late. So the number of requests in flight follows the answers that come in time, and the
//! rest waits here, where it can still be dropped.
//!
//! # States of a packet
//!
//! | from | event | to |
//! |---|---|---|
//! | – | [`SerialRequests::want`] | waiting |
//! | waiting | newest, and there is room: [`SerialRequests::poll_request`] | in flight |
//! | waiting | [`SerialRequests::withdraw`], deadline, or [`MAX_WAITING`] newer ones | dropped |
//! | in flight | [`SerialRequests::answered`], [`SerialRequests::not_held`] | answered |
//!
//! Invariants: a packet is waiting or in flight at most once; `waiting` and `serials` have the same
//! packets; requests in flight are in the order in which they were sent, which is that of the answers.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::rtp::{Seq, Ssrc};

/// The requests of one connection; see the [module](self).
#[derive(Debug)]
pub struct SerialRequests {
    /// By serial number: the newest is last.
    waiting: BTreeMap<u64, Request>,
    serials: HashMap<(Ssrc, Seq), u64>,
    next_serial: u64,
    /// Oldest first.
    in_flight: VecDeque<Request>,
    /// How many may be in flight.
    limit: f64,
    /// `true` until an answer has been late: the limit then doubles per round.
    is_starting: bool,
    /// When the limit was last reduced.
    reduced: Option<Instant>,
    /// When the last answer arrived.
    answered: Option<Instant>,
    expired: u64,
}

/// A requested packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// The stream.
    pub ssrc: Ssrc,
    /// The packet.
    pub seq: Seq,
    /// When it is useless.
    deadline: Instant,
    /// When it was requested; until then, when it was first wanted.
    since: Instant,
}

impl SerialRequests {
    /// No requests.
    pub fn new() -> Self {
        Self {
            waiting: BTreeMap::new(),
            serials: HashMap::new(),
            next_serial: 0,
            in_flight: VecDeque::new(),
            limit: FIRST_LIMIT,
            is_starting: true,
            reduced: None,
            answered: None,
            expired: 0,
        }
    }

    /// Adds a packet that is missing, and useless after `deadline`. Returns `false` if it is waiting or
    /// in flight already.
    pub fn want(&mut self, now: Instant, ssrc: Ssrc, seq: Seq, deadline: Instant) -> bool {
        let is_asked = |request: &&Request| (request.ssrc, request.seq) == (ssrc, seq);
        if self.in_flight.iter().any(|request| is_asked(&request)) {
            return false;
        }
        if let Some(request) =
            self.serials.get(&(ssrc, seq)).and_then(|serial| self.waiting.get_mut(serial))
        {
            request.deadline = request.deadline.max(deadline);
            return false;
        }
        self.serials.insert((ssrc, seq), self.next_serial);
        self.waiting.insert(self.next_serial, Request { ssrc, seq, deadline, since: now });
        self.next_serial += 1;
        if self.waiting.len() > MAX_WAITING
            && let Some((_, oldest)) = self.waiting.pop_first()
        {
            self.serials.remove(&(oldest.ssrc, oldest.seq));
            self.expired += 1;
        }
        true
    }

    /// Drops a packet that has arrived in another way, or is no longer of use. Returns `true` if it was
    /// waiting; one in flight will still be answered.
    pub fn withdraw(&mut self, ssrc: Ssrc, seq: Seq) -> bool {
        match self.serials.remove(&(ssrc, seq)) {
            Some(serial) => self.waiting.remove(&serial).is_some(),
            None => false,
        }
    }

    /// Returns the newest waiting packet that can still arrive in time, to be requested now; `None`
    /// if there is none, or enough is in flight. Call until it returns `None`.
    pub fn poll_request(&mut self, now: Instant, round_trip: Duration) -> Option<Request> {
        while self.in_flight.len() < self.limit as usize {
            let (_, mut request) = self.waiting.pop_last()?;
            self.serials.remove(&(request.ssrc, request.seq));
            // The estimate of the round trip contains delays of acknowledgements.
            if request.deadline <= now + round_trip / 2 {
                self.expired += 1;
                continue;
            }
            request.since = now;
            self.in_flight.push_back(request);
            return Some(request);
        }
        None
    }

    /// Records the answer "not held" to the oldest request in flight, and returns that; `None` if there
    /// is none.
    pub fn not_held(&mut self, now: Instant) -> Option<Request> {
        let request = self.in_flight.pop_front()?;
        self.adjust(now, &request);
        Some(request)
    }

    /// Records a packet as the answer to its request, and returns the older requests, which were not
    /// answered; `None` if the packet was not requested.
    pub fn answered(&mut self, now: Instant, ssrc: Ssrc, seq: Seq) -> Option<Vec<Request>> {
        let at = self.in_flight.iter().position(|r| (r.ssrc, r.seq) == (ssrc, seq))?;
        let mut done: Vec<_> = self.in_flight.drain(..=at).collect();
        let request = done.pop()?;
        self.adjust(now, &request);
        Some(done)
    }

    /// `true` if nothing is in flight.
    pub fn is_settled(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// Returns how long an answer has been owed without any having come.
    pub fn stalled_for(&self, now: Instant) -> Duration {
        let Some(oldest) = self.in_flight.front() else { return Duration::ZERO };
        let since = self.answered.map_or(oldest.since, |at| at.max(oldest.since));
        now.saturating_duration_since(since)
    }

    /// Returns the number of packets dropped because they could not arrive in time, since the last call.
    pub fn take_expired(&mut self) -> u64 {
        std::mem::take(&mut self.expired)
    }

    /// Adjusts the number of requests in flight: twice as many per round, later one more per round, while
    /// answers come early; three tenths less when one comes after its deadline.
    fn adjust(&mut self, now: Instant, request: &Request) {
        self.answered = Some(now);
        let took = now.saturating_duration_since(request.since);
        let had = request.deadline.saturating_duration_since(request.since);
        let is_early = took <= had.mul_f64(EARLY);
        self.is_starting &= is_early;
        if now > request.deadline {
            let recently = |at: Instant| now.saturating_duration_since(at) < took;
            if !self.reduced.is_some_and(recently) {
                self.limit = (self.limit * REDUCE_BY).max(LEAST_LIMIT);
                self.reduced = Some(now);
            }
        } else if is_early && self.in_flight.len() + 1 >= self.limit as usize {
            let more = if self.is_starting { 1.0 } else { 1.0 / self.limit };
            self.limit = (self.limit + more).min(MOST_LIMIT);
        }
    }
}

impl Default for SerialRequests {
    fn default() -> Self {
        Self::new()
    }
}

/// Packets that wait at most.
pub const MAX_WAITING: usize = 4096;
const FIRST_LIMIT: f64 = 16.0;
const LEAST_LIMIT: f64 = 2.0;
/// 576 bytes of requests, which fit the smallest QUIC packet: a v0 cloud reads each half of a request
/// with one read, and fails if that returns a part.
const MOST_LIMIT: f64 = 96.0;
const REDUCE_BY: f64 = 0.7;
/// The share of its time that an early answer takes: two tries would nearly fit.
const EARLY: f64 = 0.6;

#[cfg(test)]
mod tests {
    use super::*;

    const SSRC: Ssrc = Ssrc(7);
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_newest_packet_is_requested_first_and_expired_ones_never() {
        let now = Instant::now();
        let mut requests = SerialRequests::new();
        for seq in 0..4 {
            let deadline = if seq == 2 { 40 } else { 500 };
            assert!(requests.want(now, SSRC, Seq(seq), now + MS * deadline));
        }
        assert!(!requests.want(now, SSRC, Seq(1), now + MS * 500), "it waits already");
        assert!(requests.withdraw(SSRC, Seq(1)), "it has arrived");
        let mut asked = Vec::new();
        while let Some(request) = requests.poll_request(now, MS * 100) {
            asked.push(request.seq.0);
        }
        assert_eq!(asked, [3, 0]);
        assert_eq!(requests.take_expired(), 1);
        assert!(!requests.want(now, SSRC, Seq(3), now + MS * 500), "it is in flight");
        assert!(!requests.withdraw(SSRC, Seq(3)));
    }

    #[test]
    fn answers_are_matched_in_order() {
        let now = Instant::now();
        let mut requests = SerialRequests::new();
        for seq in [5, 6, 7, 8] {
            requests.want(now, SSRC, Seq(seq), now + MS * 500);
            requests.poll_request(now, MS).unwrap();
        }
        assert_eq!(requests.stalled_for(now + MS * 30), MS * 30);
        assert_eq!(requests.not_held(now + MS).unwrap().seq, Seq(5));
        assert_eq!(requests.stalled_for(now + MS * 30), MS * 29);
        let unanswered = requests.answered(now + MS, SSRC, Seq(7)).unwrap();
        assert_eq!(unanswered.iter().map(|r| r.seq.0).collect::<Vec<_>>(), [6]);
        assert_eq!(requests.answered(now, SSRC, Seq(9)), None, "never requested");
        assert!(!requests.is_settled());
        assert_eq!(requests.answered(now, SSRC, Seq(8)).unwrap(), []);
        assert!(requests.is_settled() && requests.not_held(now).is_none());
        assert_eq!(requests.stalled_for(now + MS * 900), Duration::ZERO);
    }

    #[test]
    fn what_waits_is_bounded() {
        let now = Instant::now();
        let mut requests = SerialRequests::new();
        for seq in 0..5000 {
            requests.want(now, SSRC, Seq(seq), now + MS * 500);
        }
        assert_eq!((requests.waiting.len(), requests.serials.len()), (MAX_WAITING, MAX_WAITING));
        assert_eq!(requests.take_expired(), 5000 - MAX_WAITING as u64);
    }

    /// Plays losses at an even rate against a sender that answers one request after the other. Returns
    /// the shares of the losses that were repaired in time and that were answered at all.
    fn play(lost_per_s: u32, answers_per_s: u32, seconds: u32) -> (f64, f64) {
        let start = Instant::now();
        let (round_trip, latency) = (MS * 100, MS * 500);
        let service = Duration::from_secs(1) / answers_per_s;
        let mut requests = SerialRequests::new();
        let mut queue: VecDeque<(Instant, Request)> = VecDeque::new();
        let (mut free_at, mut answers, mut repaired, mut answered) = (start, VecDeque::new(), 0, 0);
        let mut lost = 0;
        for tick in 0..seconds * 1000 {
            let now = start + MS * tick;
            while lost < u64::from(tick) * u64::from(lost_per_s) / 1000 {
                requests.want(now, SSRC, Seq(lost as u16), now + latency);
                lost += 1;
            }
            while answers.front().is_some_and(|(at, _): &(Instant, Request)| *at <= now) {
                let (_, request) = answers.pop_front().unwrap();
                answered += 1;
                repaired += u64::from(now <= request.deadline);
                assert_eq!(requests.answered(now, SSRC, request.seq).unwrap(), []);
            }
            while let Some(request) = requests.poll_request(now, round_trip) {
                queue.push_back((now + round_trip / 2, request));
            }
            while queue.front().is_some_and(|(at, _)| *at <= now) && free_at <= now {
                let (_, request) = queue.pop_front().unwrap();
                free_at = now + service;
                answers.push_back((free_at + round_trip / 2, request));
            }
        }
        (repaired as f64 / lost as f64, answered as f64 / lost as f64)
    }

    #[test]
    fn a_slow_sender_repairs_as_much_as_its_answers_allow() {
        // As measured: 64 losses and 60 answers a second at 100 ms.
        let (repaired, _) = play(64, 60, 40);
        assert!(repaired > 0.85, "{repaired}");
        // Three times too slow: nearly every answer that it gives is in time.
        let (repaired, answered) = play(180, 60, 40);
        assert!(repaired > 0.29, "{repaired}");
        assert!(repaired > answered * 0.93, "{repaired} of {answered}");
        // A fast one is not held back, although many are in flight.
        let (repaired, _) = play(500, 5000, 20);
        assert!(repaired > 0.97, "{repaired}");
    }
}
