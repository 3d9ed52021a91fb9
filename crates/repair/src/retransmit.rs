//! Retransmission to one edge: the sender's half of repair.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::rtp::{Seq, Ssrc};

/// Decides which requests of one edge to answer, and schedules further copies.
///
/// An edge repeats each request some milliseconds later, in case the first was lost. A packet is
/// therefore answered once per guard time of half a round trip: repetitions fall within it, the
/// edge's next try after it. `T` is the caller's packet type.
///
/// States of a packet: idle → answered ([`Self::is_new`] returned `true`, or [`Self::sent`]) → idle
/// when the guard time ends or [`Self::not_sent`] withdraws the answer. Copies are independent of
/// that: scheduled by [`Self::schedule_copies`], returned by [`Self::poll_copy`]. Invariants: every
/// entry of `answered` is in `order`; both and `copies` are bounded.
#[derive(Debug)]
pub struct Retransmitter<T> {
    /// Half the round trip, clamped: shorter than the interval between an edge's tries.
    guard: Duration,
    /// When each packet was answered last.
    answered: HashMap<(Ssrc, Seq), Instant>,
    /// Answers, oldest first. An entry that differs from `answered` is outdated.
    order: VecDeque<(Instant, (Ssrc, Seq))>,
    /// Scheduled copies by due time, then in the order of scheduling.
    copies: BTreeMap<(Instant, u64), Copies<T>>,
    next_serial: u64,
}

#[derive(Debug)]
struct Copies<T> {
    spacing: Duration,
    packet: T,
    /// Copies left to send, at least 1.
    left: u8,
}

impl<T: Clone> Retransmitter<T> {
    /// Creates a retransmitter that has answered nothing.
    pub fn new() -> Self {
        Self {
            guard: MIN_GUARD,
            answered: HashMap::new(),
            order: VecDeque::new(),
            copies: BTreeMap::new(),
            next_serial: 0,
        }
    }

    /// Sets the round trip to the edge.
    pub fn set_round_trip(&mut self, round_trip: Duration) {
        self.guard = (round_trip / 2).clamp(MIN_GUARD, MAX_GUARD);
    }

    /// `true` if a request for this packet must be answered; marks it as answered. `false` if the
    /// request repeats one that was answered within the guard time.
    pub fn is_new(&mut self, now: Instant, ssrc: Ssrc, seq: Seq) -> bool {
        while let Some((at, key)) = self.order.front()
            && (now.saturating_duration_since(*at) >= self.guard || self.order.len() > MAX_ANSWERED)
        {
            // A later answer to the same packet has another entry further back.
            if self.answered.get(key) == Some(at) {
                self.answered.remove(key);
            }
            self.order.pop_front();
        }
        if self.answered.contains_key(&(ssrc, seq)) {
            return false;
        }
        self.answered.insert((ssrc, seq), now);
        self.order.push_back((now, (ssrc, seq)));
        true
    }

    /// Restarts the guard time of a packet that waited in a queue and is sent now.
    pub fn sent(&mut self, now: Instant, ssrc: Ssrc, seq: Seq) {
        if self.answered.insert((ssrc, seq), now) != Some(now) {
            self.order.push_back((now, (ssrc, seq)));
        }
    }

    /// Withdraws the answer for a packet that could not be sent, so that a repetition is answered.
    pub fn not_sent(&mut self, ssrc: Ssrc, seq: Seq) {
        self.answered.remove(&(ssrc, seq));
    }

    /// Schedules `further` copies of a packet that is being sent, evenly spaced and all due within
    /// `within`. Returns `false` and schedules none if too many copies are waiting.
    pub fn schedule_copies(
        &mut self,
        now: Instant,
        packet: T,
        further: u8,
        within: Duration,
    ) -> bool {
        if further == 0 {
            return true;
        }
        let accepted = self.copies.len() < MAX_COPIES;
        if accepted {
            let spacing = SPACING.min(within / u32::from(further));
            self.schedule(now, Copies { spacing, packet, left: further });
        }
        accepted
    }

    /// Returns the next copy that is due at `now`. Call until it returns `None`.
    pub fn poll_copy(&mut self, now: Instant) -> Option<T> {
        let entry = self.copies.first_entry().filter(|entry| entry.key().0 <= now)?;
        let mut copies = entry.remove();
        copies.left -= 1;
        let packet = copies.packet.clone();
        if copies.left > 0 {
            self.schedule(now, copies);
        }
        Some(packet)
    }

    /// Returns when the next copy is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.copies.first_key_value().map(|((due, _), _)| *due)
    }

    fn schedule(&mut self, now: Instant, copies: Copies<T>) {
        self.next_serial += 1;
        self.copies.insert((now + copies.spacing, self.next_serial), copies);
    }
}

impl<T: Clone> Default for Retransmitter<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// Interval between copies of a packet, and between repetitions of a request. Long enough that a
/// short loss burst hits only one of them, short enough that the last is hardly later than the first.
pub const SPACING: Duration = Duration::from_millis(2);
/// Longer than the repetitions of one try take, shorter than the interval between tries
/// (`receiver`).
const MIN_GUARD: Duration = Duration::from_millis(5);
const MAX_GUARD: Duration = Duration::from_millis(100);
/// Answers remembered: the longest guard time at 100,000 requests per second.
const MAX_ANSWERED: usize = 10_000;
/// Packets with scheduled copies; each keeps its whole burst in memory.
const MAX_COPIES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repetition_is_ignored_and_a_new_try_answered() {
        let now = Instant::now();
        let mut retransmitter = Retransmitter::<u32>::new();
        retransmitter.set_round_trip(Duration::from_millis(100));
        let at = |ms| now + Duration::from_millis(ms);
        assert!(retransmitter.is_new(at(0), Ssrc(1), Seq(7)));
        assert!(!retransmitter.is_new(at(5), Ssrc(1), Seq(7)));
        assert!(retransmitter.is_new(at(5), Ssrc(2), Seq(7)));
        assert!(retransmitter.is_new(at(102), Ssrc(1), Seq(7)));
        assert!(!retransmitter.is_new(at(104), Ssrc(1), Seq(7)));
        retransmitter.not_sent(Ssrc(1), Seq(7));
        assert!(retransmitter.is_new(at(105), Ssrc(1), Seq(7)));
        // A repair that waited 30 ms for budget restarts its guard time when it is sent.
        retransmitter.sent(at(135), Ssrc(1), Seq(7));
        assert!(!retransmitter.is_new(at(160), Ssrc(1), Seq(7)));
        assert!(retransmitter.is_new(at(1000), Ssrc(1), Seq(8)));
        assert_eq!((retransmitter.answered.len(), retransmitter.order.len()), (1, 1));
    }

    #[test]
    fn memory_is_bounded_for_any_requests() {
        let now = Instant::now();
        let mut retransmitter = Retransmitter::new();
        for i in 0..100_000u32 {
            retransmitter.is_new(now, Ssrc(i), Seq(i as u16));
            retransmitter.schedule_copies(now, i, 2, Duration::MAX);
        }
        assert!(retransmitter.answered.len() <= MAX_ANSWERED + 2);
        assert_eq!(retransmitter.copies.len(), MAX_COPIES);
    }

    #[test]
    fn copies_are_spaced_and_due_within_the_limit() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut retransmitter = Retransmitter::new();
        for (packet, further, within) in [('a', 2, 100), ('b', 1, 1), ('c', 0, 100), ('d', 2, 4)] {
            assert!(retransmitter.schedule_copies(
                now,
                packet,
                further,
                Duration::from_millis(within)
            ));
        }
        let mut due =
            |ms| std::iter::from_fn(|| retransmitter.poll_copy(at(ms))).collect::<String>();
        assert_eq!([0, 1, 2, 3, 4].map(&mut due), ["", "b", "ad", "", "ad"]);
        assert_eq!(retransmitter.poll_timeout(), None);
    }
}
