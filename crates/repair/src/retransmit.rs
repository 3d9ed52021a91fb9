//! What is sent again to one edge, and when: the sender's half of repair, without socket or clock.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::{Duration, Instant},
};

use crate::rtp::{Seq, Ssrc};

/// Answers requests of one edge, each of them once.
///
/// Edges say every request twice or more, milliseconds apart, in case one is lost: what has just
/// been sent is not sent again before a new try can mean anything. `T` is what a packet is to the
/// caller.
#[derive(Debug)]
pub struct Resender<T> {
    /// Half the round trip, within bounds: shorter than any try is from the next.
    guard: Duration,
    answered: HashMap<(Ssrc, Seq), Instant>,
    /// The keys of `answered`, oldest first.
    order: VecDeque<(Instant, (Ssrc, Seq))>,
    /// Further copies by their times, and by the order in which they were planned.
    copies: BTreeMap<(Instant, u64), Copy<T>>,
    planned: u64,
}

#[derive(Debug)]
struct Copy<T> {
    spacing: Duration,
    packet: T,
    /// How many to send, this one included.
    left: u8,
}

impl<T: Clone> Resender<T> {
    /// Nothing has been answered yet.
    pub fn new() -> Self {
        Self {
            guard: MIN_GUARD,
            answered: HashMap::new(),
            order: VecDeque::new(),
            copies: BTreeMap::new(),
            planned: 0,
        }
    }

    /// Tells the round trip to the edge.
    pub fn set_round_trip(&mut self, round_trip: Duration) {
        self.guard = (round_trip / 2).clamp(MIN_GUARD, MAX_GUARD);
    }

    /// Whether a request for this packet is to be answered: it is not if it only repeats one that
    /// was.
    pub fn is_new(&mut self, now: Instant, ssrc: Ssrc, seq: Seq) -> bool {
        while let Some((at, key)) = self.order.front()
            && (now.saturating_duration_since(*at) >= self.guard || self.order.len() > MAX_ANSWERED)
        {
            // A later answer to the same key has an entry of its own further back.
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

    /// Tells that a packet is being sent only now, after it waited: what is asked for from here on
    /// counts from now.
    pub fn sent(&mut self, now: Instant, ssrc: Ssrc, seq: Seq) {
        if self.answered.insert((ssrc, seq), now) != Some(now) {
            self.order.push_back((now, (ssrc, seq)));
        }
    }

    /// Takes back that a packet was answered: it could not be sent, so a repetition may.
    pub fn not_sent(&mut self, ssrc: Ssrc, seq: Seq) {
        self.answered.remove(&(ssrc, seq));
    }

    /// Plans `further` copies of a packet that is being sent, all of them within so long. False if
    /// too many wait already.
    pub fn copy(&mut self, now: Instant, packet: T, further: u8, within: Duration) -> bool {
        if further == 0 {
            return true;
        }
        let room = self.copies.len() < MAX_COPIES;
        if room {
            let spacing = SPACING.min(within / u32::from(further));
            self.plan(now, Copy { spacing, packet, left: further });
        }
        room
    }

    /// The next copy that is due at `now`; call until it gives `None`.
    pub fn poll_copy(&mut self, now: Instant) -> Option<T> {
        let entry = self.copies.first_entry().filter(|entry| entry.key().0 <= now)?;
        let mut copy = entry.remove();
        copy.left -= 1;
        let packet = copy.packet.clone();
        if copy.left > 0 {
            self.plan(now, copy);
        }
        Some(packet)
    }

    /// When the next copy is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.copies.first_key_value().map(|((due, _), _)| *due)
    }

    fn plan(&mut self, now: Instant, copy: Copy<T>) {
        self.planned += 1;
        self.copies.insert((now + copy.spacing, self.planned), copy);
    }
}

impl<T: Clone> Default for Resender<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// How far apart copies of a packet are sent, and a request is repeated: the shortest bursts of loss
/// take but one, and the last is hardly later than the first.
pub const SPACING: Duration = Duration::from_millis(2);
/// Above the repeats of a try, below the shortest time to the next (`receiver`).
const MIN_GUARD: Duration = Duration::from_millis(5);
const MAX_GUARD: Duration = Duration::from_millis(100);
/// Answers remembered: at 100,000 requests a second, the longest guard's worth.
const MAX_ANSWERED: usize = 10_000;
/// Copies that wait for their time: each holds on to the burst it is from.
const MAX_COPIES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_request_is_answered_once_and_a_new_try_again() {
        let now = Instant::now();
        let mut resender = Resender::<u32>::new();
        resender.set_round_trip(Duration::from_millis(100));
        let at = |ms| now + Duration::from_millis(ms);
        assert!(resender.is_new(at(0), Ssrc(1), Seq(7)));
        assert!(!resender.is_new(at(5), Ssrc(1), Seq(7)));
        assert!(resender.is_new(at(5), Ssrc(2), Seq(7)));
        assert!(resender.is_new(at(102), Ssrc(1), Seq(7)));
        assert!(!resender.is_new(at(104), Ssrc(1), Seq(7)));
        resender.not_sent(Ssrc(1), Seq(7));
        assert!(resender.is_new(at(105), Ssrc(1), Seq(7)));
        // One that waited 30 ms for budget counts from when it went.
        resender.sent(at(135), Ssrc(1), Seq(7));
        assert!(!resender.is_new(at(160), Ssrc(1), Seq(7)));
        assert!(resender.is_new(at(1000), Ssrc(1), Seq(8)));
        assert_eq!((resender.answered.len(), resender.order.len()), (1, 1));
    }

    #[test]
    fn memory_is_bounded_whatever_is_asked() {
        let now = Instant::now();
        let mut resender = Resender::new();
        for i in 0..100_000u32 {
            resender.is_new(now, Ssrc(i), Seq(i as u16));
            resender.copy(now, i, 2, Duration::MAX);
        }
        assert!(resender.answered.len() <= MAX_ANSWERED + 2);
        assert_eq!(resender.copies.len(), MAX_COPIES);
    }

    #[test]
    fn copies_come_spaced_and_in_time() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut resender = Resender::new();
        for (packet, further, within) in [('a', 2, 100), ('b', 1, 1), ('c', 0, 100), ('d', 2, 4)] {
            assert!(resender.copy(now, packet, further, Duration::from_millis(within)));
        }
        let mut come = |ms| std::iter::from_fn(|| resender.poll_copy(at(ms))).collect::<String>();
        assert_eq!([0, 1, 2, 3, 4].map(&mut come), ["", "b", "ad", "", "ad"]);
        assert_eq!(resender.poll_timeout(), None);
    }
}
