//! Reception reports: statistics of each stream at an edge.

use serde::{Deserialize, Serialize};

use super::compact;
use crate::{
    receiver::{Histogram, MAX_PATHS, PathStats, Stats},
    rtp::Ssrc,
};

/// Reception statistics of an edge. They may be split over several reports: a stream that a report
/// does not name keeps its last reported counts.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Smoothed round trip to the cloud, in microseconds.
    #[serde(default)]
    pub round_trip_us: u64,
    /// One entry per stream, of some or of all streams.
    #[serde(default, serialize_with = "compact::serialize")]
    pub streams: Vec<StreamReport>,
}

impl Report {
    /// Splits the report into reports of at most [`MAX_REPORTED`] streams, each of which fits in a
    /// message from an edge. Returns at least one report, for the round trip.
    pub fn split(self) -> impl Iterator<Item = Self> {
        let Self { round_trip_us, streams } = self;
        let count = streams.len().div_ceil(MAX_REPORTED).max(1);
        let mut streams = streams.into_iter();
        (0..count).map(move |_| Self {
            round_trip_us,
            streams: streams.by_ref().take(MAX_REPORTED).collect(),
        })
    }
}

/// Statistics of one stream at an edge, in packets since the stream started there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamReport {
    /// The publication.
    pub ssrc: u32,
    /// Received over any path or as a repair, duplicates included.
    pub received: u64,
    /// Missing and requested at least once.
    pub asked: u64,
    /// Requested and received as a repair: after the first, the second, and any later try.
    pub repaired: [u64; 3],
    /// Recovered from parity.
    pub parity: u64,
    /// Given up: never received in time.
    pub given_up: u64,
    /// Given up early because other packets of the same tag were lost; part of `given_up`.
    pub abandoned: u64,
    /// Received after they had been given up.
    pub too_late: u64,
    /// Received again.
    pub duplicate: u64,
    /// Received live after a packet with a later sequence number.
    pub reordered: u64,
    /// Sequence numbers in requests, repetitions included.
    pub nacks: u64,
    /// Time from when a packet was due until it was received.
    pub delays: DelayReport,
    /// Time from when a packet was due until it was handed on, including the wait for earlier
    /// packets.
    pub waits: DelayReport,
    /// Statistics per path.
    pub paths: [PathReport; MAX_PATHS],
}

/// Histogram of packet delays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DelayReport {
    /// Packets per bucket: one bucket up to each of
    /// [`DELAY_BOUNDS_MS`](crate::receiver::DELAY_BOUNDS_MS), one above the last bound.
    #[serde(deserialize_with = "compact::counts")]
    pub counts: Vec<u64>,
    /// Sum of all delays in microseconds.
    pub sum_us: u64,
}

/// Statistics of one path of a stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PathReport {
    /// Packets received over the path.
    pub received: u64,
    /// Packets lost on the path.
    pub lost: u64,
    /// Loss events, each of one or more packets in a row.
    pub gaps: u64,
}

/// Number of counts in [`StreamReport::fates`].
pub const FATES: usize = 12;

impl StreamReport {
    /// Returns the counts with their value of the metrics' `fate` label.
    pub fn fates(&self) -> [(&'static str, u64); FATES] {
        [
            ("received", self.received),
            ("reordered", self.reordered),
            ("duplicate", self.duplicate),
            ("asked", self.asked),
            ("repaired_1", self.repaired[0]),
            ("repaired_2", self.repaired[1]),
            ("repaired_3", self.repaired[2]),
            ("parity", self.parity),
            ("lost", self.given_up),
            ("abandoned", self.abandoned),
            ("too_late", self.too_late),
            ("requested", self.nacks),
        ]
    }

    /// Returns the scalar counters with their names on the wire.
    pub fn counters(&self) -> [(&'static str, u64); COUNTERS] {
        [
            ("received", self.received),
            ("asked", self.asked),
            ("parity", self.parity),
            ("given_up", self.given_up),
            ("abandoned", self.abandoned),
            ("too_late", self.too_late),
            ("duplicate", self.duplicate),
            ("reordered", self.reordered),
            ("nacks", self.nacks),
        ]
    }

    /// Returns the scalar counters for modification, in the order of [`Self::counters`].
    pub fn counters_mut(&mut self) -> [&mut u64; COUNTERS] {
        // Names every field, so that a new one does not compile until it is handled here.
        let Self {
            ssrc: _,
            received,
            asked,
            repaired: _,
            parity,
            given_up,
            abandoned,
            too_late,
            duplicate,
            reordered,
            nacks,
            delays: _,
            waits: _,
            paths: _,
        } = self;
        [received, asked, parity, given_up, abandoned, too_late, duplicate, reordered, nacks]
    }
}

impl Stats {
    /// Returns the statistics as an edge reports them.
    pub fn report(&self, ssrc: Ssrc) -> StreamReport {
        let delays = |histogram: &Histogram| DelayReport {
            counts: histogram.counts.to_vec(),
            sum_us: histogram.sum_us,
        };
        StreamReport {
            delays: delays(&self.delays),
            waits: delays(&self.waits),
            ..self.counts(ssrc)
        }
    }

    /// Returns the report without its histograms; does not allocate.
    pub fn counts(&self, ssrc: Ssrc) -> StreamReport {
        StreamReport {
            ssrc: ssrc.0,
            received: self.received,
            asked: self.asked,
            repaired: self.repaired,
            parity: self.parity,
            given_up: self.lost,
            abandoned: self.abandoned,
            too_late: self.too_late,
            duplicate: self.duplicate,
            reordered: self.reordered,
            nacks: self.requests,
            delays: DelayReport::default(),
            waits: DelayReport::default(),
            paths: self.paths.map(|PathStats { received, lost, gaps }| PathReport {
                received,
                lost,
                gaps,
            }),
        }
    }
}

/// Streams per report. With counters of twenty digits a report takes less than half of
/// [`MAX_EDGE_MESSAGE`](super::MAX_EDGE_MESSAGE).
pub const MAX_REPORTED: usize = 75;
const COUNTERS: usize = 9;
