//! What a receiver counts.

use std::time::Duration;

use crate::receiver::dual_path::MAX_PATHS;

/// Counts since the start, in packets unless it says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Packets that came, by either path, duplicates included.
    pub received: u64,
    /// Came live, after a packet with a later number.
    pub reordered: u64,
    /// Came again after it was there.
    pub duplicate: u64,
    /// Missing and asked for at least once.
    pub asked: u64,
    /// Repaired by the first, the second, and any later request.
    pub repaired: [u64; 3],
    /// Missing, and made anew from parity.
    pub parity: u64,
    /// Given up: told by [`Event::Lost`].
    pub lost: u64,
    /// Given up early, and counted as lost too, because others of their tag were lost.
    pub abandoned: u64,
    /// How long after a later packet showed that they were due packets came: 0 for all that were
    /// in order.
    pub delays: Histogram,
    /// How long after they were due packets were handed on, the wait for others before them
    /// included.
    pub waits: Histogram,
    /// Each path that packets come over.
    pub paths: [PathStats; MAX_PATHS],
    /// Came after it had been given up.
    pub too_late: u64,
    /// Numbers in requests, repetitions included.
    pub requests: u64,
    /// Times that the sender began anew.
    pub restarts: u64,
}

/// What one path brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PathStats {
    /// Packets that came over it, duplicates included.
    pub received: u64,
    /// Packets that it lost; one that it brought late is taken off again.
    pub lost: u64,
    /// Times that it lost packets, one or more in a row.
    pub gaps: u64,
}

/// How many packets were delayed by how much.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Histogram {
    /// Packets within each of [`DELAY_BOUNDS_MS`] and over the one before, then those over the last.
    pub counts: [u64; DELAY_BOUNDS_MS.len() + 1],
    /// All delays together, in microseconds.
    pub sum_us: u64,
}

impl Histogram {
    pub(super) fn add(&mut self, delay: Duration) {
        let over = |bound: &&u16| delay > Duration::from_millis(u64::from(**bound));
        self.counts[DELAY_BOUNDS_MS.iter().take_while(over).count()] += 1;
        self.sum_us += delay.as_micros() as u64;
    }

    /// Adds packets that came when they were due.
    pub(super) fn add_zero(&mut self, packets: u64) {
        self.counts[0] += packets;
    }

    /// All packets counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Upper bounds of the delays that a [`Histogram`] tells apart, in milliseconds.
pub const DELAY_BOUNDS_MS: [u16; 16] =
    [0, 2, 5, 10, 15, 20, 25, 50, 75, 100, 125, 150, 200, 300, 500, 1000];
