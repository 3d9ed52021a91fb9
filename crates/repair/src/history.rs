//! The most recent packets of one publication, for retransmission.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::Bytes;

use crate::rtp::{Burst, Seq};

/// Ring of bursts, bounded by packets and by age, indexed by sequence number.
///
/// Bursts must be pushed in the order of their sequence numbers, without a gap. A packet is found by
/// binary search over the bursts.
#[derive(Debug)]
pub struct History {
    bursts: VecDeque<Entry>,
    max_packets: usize,
    max_age: Duration,
    /// Reference of the entries' times: when the first burst was pushed.
    epoch: Option<Instant>,
    packets: usize,
    bytes: usize,
    /// Bytes ever pushed.
    total_bytes: u64,
    /// Extended sequence number of the next packet, wraps included.
    next: u64,
}

/// One burst. Kept small: a stream pushes about a hundred per second.
#[derive(Debug)]
struct Entry {
    burst: Burst,
    /// Push time in milliseconds since the epoch, modulo 2³².
    pushed_ms: u32,
}

impl History {
    /// Creates a history of at most `max_packets` packets (1..=32768), none older than `max_age`. The
    /// newest burst is always kept.
    pub fn new(max_packets: usize, max_age: Duration) -> Self {
        // 16-bit sequence numbers are unambiguous over at most 32768 packets.
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

    /// Adds the next burst and drops the oldest ones beyond either bound.
    pub fn push(&mut self, now: Instant, burst: Burst) {
        debug_assert_eq!(burst.first_seq().0, self.next as u16, "bursts are pushed in order");
        let count = burst.count();
        self.packets += count;
        self.bytes += burst.bytes().len();
        self.total_bytes += burst.bytes().len() as u64;
        let pushed_ms = self.millis(now);
        self.bursts.push_back(Entry { burst, pushed_ms });
        self.next += count as u64;
        while self.packets > self.max_packets && self.bursts.len() > 1 {
            self.drop_oldest();
        }
        self.expire(now);
    }

    /// Drops bursts older than the age bound, except the newest.
    pub fn expire(&mut self, now: Instant) {
        let (now, max_age) = (self.millis(now), self.max_age.as_millis());
        while self.bursts.len() > 1
            && self.bursts.front().is_some_and(|oldest| {
                // Several threads read the clock, so `now` may lie slightly before a push.
                let age = now.wrapping_sub(oldest.pushed_ms) as i32;
                u128::from(age.max(0).unsigned_abs()) > max_age
            })
        {
            self.drop_oldest();
        }
    }

    /// Returns milliseconds since the epoch, which the first call sets.
    fn millis(&mut self, now: Instant) -> u32 {
        let epoch = *self.epoch.get_or_insert(now);
        now.saturating_duration_since(epoch).as_millis() as u32
    }

    fn drop_oldest(&mut self) {
        if let Some(entry) = self.bursts.pop_front() {
            self.packets -= entry.burst.count();
            self.bytes -= entry.burst.bytes().len();
        }
    }

    /// Returns the packet with this sequence number, or `None` if it is not in the history.
    pub fn packet(&self, seq: Seq) -> Option<Bytes> {
        let newest = Seq(self.next.wrapping_sub(1) as u16);
        let behind = u16::try_from(newest.distance_from(seq)).ok()?;
        // Every packet held is at most 32767 behind the newest one.
        let age = |burst: &Burst| newest.0.wrapping_sub(burst.first_seq().0);
        let index =
            self.bursts.partition_point(|entry| age(&entry.burst) >= behind).checked_sub(1)?;
        let burst = &self.bursts.get(index)?.burst;
        burst.packet(usize::from(age(burst) - behind))
    }

    /// Returns the number of packets held.
    pub fn len(&self) -> usize {
        self.packets
    }

    /// `true` if at least one packet was pushed and none has been dropped.
    pub fn is_complete(&self) -> bool {
        self.packets > 0 && self.pushed().0 == self.packets as u64
    }

    /// `true` if nothing was ever pushed.
    pub fn is_empty(&self) -> bool {
        self.packets == 0
    }

    /// Returns the bytes of all packets held.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Returns the packets and bytes ever pushed.
    pub fn pushed(&self) -> (u64, u64) {
        (self.next - u64::from(Seq::FIRST.0), self.total_bytes)
    }

    /// Returns the newest sequence number, or `None` if nothing was pushed.
    pub fn newest_seq(&self) -> Option<Seq> {
        self.bursts.back().map(|entry| entry.burst.last_seq())
    }
}
