//! Statistics of a receiver.

use std::time::Duration;

use crate::receiver::dual_path::MAX_PATHS;

/// Counters since the start, in packets unless stated otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Received over any path or as a repair, duplicates included.
    pub received: u64,
    /// Received live after a packet with a later sequence number.
    pub reordered: u64,
    /// Received again.
    pub duplicate: u64,
    /// Missing and requested at least once.
    pub asked: u64,
    /// Repaired after the first, the second, and any later try.
    pub repaired: [u64; 3],
    /// Recovered from parity.
    pub parity: u64,
    /// Given up: reported by [`Event::Lost`](super::Event::Lost).
    pub lost: u64,
    /// Given up early because other packets of the same tag were lost; part of `lost`.
    pub abandoned: u64,
    /// Time from when a packet was due, as a later packet showed, until it arrived; 0 in order.
    pub delays: Histogram,
    /// Time from when a packet was due until it was handed on, including the wait for earlier packets.
    pub waits: Histogram,
    /// Statistics per path.
    pub paths: [PathStats; MAX_PATHS],
    /// Received after they had been given up.
    pub too_late: u64,
    /// Sequence numbers in requests, repetitions included.
    pub requests: u64,
    /// Restarts of the sender.
    pub restarts: u64,
}

/// Statistics of one path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathStats {
    /// Packets received over the path, duplicates included.
    pub received: u64,
    /// Packets lost on the path; a packet that arrives late is subtracted again.
    pub lost: u64,
    /// Loss events, each of one or more packets in a row.
    pub gaps: u64,
}

/// Histogram of packet delays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Packets per bucket: one bucket up to each of [`DELAY_BOUNDS_MS`], one above the last.
    pub counts: [u64; DELAY_BOUNDS_MS.len() + 1],
    /// Sum of all delays in microseconds.
    pub sum_us: u64,
}

impl Histogram {
    pub(super) fn add(&mut self, delay: Duration) {
        let exceeds = |bound: &&u16| delay > Duration::from_millis(u64::from(**bound));
        self.counts[DELAY_BOUNDS_MS.iter().take_while(exceeds).count()] += 1;
        self.sum_us += delay.as_micros() as u64;
    }

    /// Adds packets without delay.
    pub(super) fn add_zero(&mut self, packets: u64) {
        self.counts[0] += packets;
    }

    /// Returns the number of packets.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Upper bounds of a [`Histogram`]'s buckets, in milliseconds.
pub const DELAY_BOUNDS_MS: [u16; 16] =
    [0, 2, 5, 10, 15, 20, 25, 50, 75, 100, 125, 150, 200, 300, 500, 1000];
