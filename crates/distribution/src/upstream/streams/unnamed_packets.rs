//! Packets of publications that nobody has named yet.

use std::time::{Duration, Instant};

use super::Streams;
use downpour_repair::{
    receiver::Path,
    rtp::{Packet, Ssrc},
};

pub(super) struct Unknown {
    pub(super) since: Instant,
    pub(super) packets: Vec<(Packet, Path)>,
}

impl Streams {
    /// The publications of which packets have come for at least `age`, and no name.
    pub fn unnamed(&self, now: Instant, age: Duration) -> impl Iterator<Item = Ssrc> {
        self.unknown
            .iter()
            .filter(move |(_, unknown)| now.saturating_duration_since(unknown.since) >= age)
            .map(|(ssrc, _)| *ssrc)
    }

    /// Whether there is a publication without a name that there was not at the last call.
    pub fn saw_unknown_ssrc(&mut self) -> bool {
        std::mem::take(&mut self.saw_unknown_ssrc)
    }

    pub(super) fn hold_unknown(&mut self, now: Instant, packet: Packet, path: Path) {
        let ssrc = packet.header.ssrc;
        let stale = path == Path::Repair || self.ended.iter().any(|(_, ended)| *ended == ssrc);
        let room = self.unknown.len() < MAX_UNKNOWN || self.unknown.contains_key(&ssrc);
        if stale || !room {
            self.metrics.unknown_dropped.inc();
            return;
        }
        let unknown = self.unknown.entry(ssrc).or_insert_with(|| {
            self.saw_unknown_ssrc = true;
            Unknown { since: now, packets: Vec::new() }
        });
        // The first ones are kept: they may hold the headers, and the later can be asked for.
        if unknown.packets.len() < MAX_UNKNOWN_PACKETS {
            unknown.packets.push((packet, path));
        } else {
            self.metrics.unknown_dropped.inc();
        }
    }
}

/// How long packets of a publication that nobody names are kept.
pub(super) const UNKNOWN_KEPT: Duration = Duration::from_secs(10);
/// Bounds what strangers can make the edge hold: 16,384 packets.
pub(super) const MAX_UNKNOWN: usize = 64;
pub(super) const MAX_UNKNOWN_PACKETS: usize = 256;
