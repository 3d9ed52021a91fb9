//! The packets that one publication sent recently.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::rtp::{Burst, Seq};

/// A ring of bursts, bounded by a number of packets and by age, looked up by sequence number.
///
/// Bursts must be pushed in the order of their sequence numbers, without a gap.
#[derive(Debug)]
pub struct History {
    bursts: VecDeque<Held>,
    max_packets: usize,
    max_age: Duration,
    /// When the first burst was pushed.
    epoch: Option<Instant>,
    packets: usize,
    bytes: usize,
    /// Bytes ever pushed.
    total_bytes: u64,
    /// Extended number of the next packet: sequence numbers seen so far, wraps included.
    next: u64,
}

/// Kept small: there are some hundred a second of media.
#[derive(Debug)]
struct Held {
    burst: Burst,
    /// Milliseconds since the epoch, modulo 2³².
    pushed: u32,
}

impl History {
    /// Holds at most `max_packets` packets, none older than `max_age`, and always the newest burst.
    pub fn new(max_packets: usize, max_age: Duration) -> Self {
        // A 16-bit sequence number names at most 32768 packets without ambiguity.
        let max_packets = max_packets.clamp(1, 1 << 15);
        Self {
            bursts: VecDeque::new(),
            max_packets,
            max_age,
            epoch: None,
            packets: 0,
            bytes: 0,
            total_bytes: 0,
            next: u64::from(Seq::FIRST.0),
        }
    }

    /// Adds the next burst and drops what is over either bound.
    pub fn push(&mut self, now: Instant, burst: Burst) {
        debug_assert_eq!(burst.first_seq().0, self.next as u16, "bursts come in order");
        let count = burst.count();
        self.packets += count;
        self.bytes += burst.bytes().len();
        self.total_bytes += burst.bytes().len() as u64;
        let pushed = self.millis(now);
        self.bursts.push_back(Held { burst, pushed });
        self.next += count as u64;
        while self.packets > self.max_packets && self.bursts.len() > 1 {
            self.drop_oldest();
        }
        self.expire(now);
    }

    /// Drops what is older than the age bound, the newest burst excepted.
    pub fn expire(&mut self, now: Instant) {
        let (now, max_age) = (self.millis(now), self.max_age.as_millis());
        while self.bursts.len() > 1
            && self.bursts.front().is_some_and(|oldest| {
                // A clock that is read by several threads may seem to go back a little.
                let age = now.wrapping_sub(oldest.pushed) as i32;
                u128::from(age.max(0).unsigned_abs()) > max_age
            })
        {
            self.drop_oldest();
        }
    }

    /// Milliseconds since the epoch, which begins when this is first called.
    fn millis(&mut self, now: Instant) -> u32 {
        let epoch = *self.epoch.get_or_insert(now);
        now.saturating_duration_since(epoch).as_millis() as u32
    }

    fn drop_oldest(&mut self) {
        if let Some(held) = self.bursts.pop_front() {
            self.packets -= held.burst.count();
            self.bytes -= held.burst.bytes().len();
        }
    }

    /// The packet with this sequence number, if it is still held.
    pub fn packet(&self, seq: Seq) -> Option<Bytes> {
        let newest = Seq(self.next.wrapping_sub(1) as u16);
        let behind = u16::try_from(newest.distance_from(seq)).ok()?;
        // All that is held lies within the 32768 numbers up to the newest one.
        let age = |burst: &Burst| newest.0.wrapping_sub(burst.first_seq().0);
        let index =
            self.bursts.partition_point(|held| age(&held.burst) >= behind).checked_sub(1)?;
        let burst = &self.bursts.get(index)?.burst;
        burst.packet(usize::from(age(burst) - behind))
    }

    /// Number of packets held.
    pub fn len(&self) -> usize {
        self.packets
    }

    /// Whether everything that was ever pushed is still held, and something was.
    pub fn is_complete(&self) -> bool {
        self.packets > 0 && self.pushed().0 == self.packets as u64
    }

    /// Whether nothing was ever pushed.
    pub fn is_empty(&self) -> bool {
        self.packets == 0
    }

    /// Bytes of packets held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Packets and bytes ever pushed.
    pub fn pushed(&self) -> (u64, u64) {
        (self.next - u64::from(Seq::FIRST.0), self.total_bytes)
    }

    /// The newest sequence number held.
    pub fn newest_seq(&self) -> Option<Seq> {
        self.bursts.back().map(|held| held.burst.last_seq())
    }
}
