//! Packets of publications whose stream key is not known yet.
//!
//! RTP often arrives before the cloud's announcement, or the API's answer, that names its
//! publication. Anyone can send RTP with any SSRC, so the memory for such packets is bounded.

use std::{
    collections::HashMap,
    mem,
    time::{Duration, Instant},
};

use downpour_repair::{
    receiver::Path,
    rtp::{Packet, Seq, Ssrc},
};

/// The first packets of each publication without a name.
#[derive(Default)]
pub(super) struct UnnamedPackets {
    by_ssrc: HashMap<Ssrc, Held>,
    /// Whether a publication was added since the last [`UnnamedPackets::take_new`].
    has_new: bool,
}

struct Held {
    since: Instant,
    packets: Vec<(Packet, Path)>,
}

impl UnnamedPackets {
    /// Holds a packet. Returns `false` if there is no room for it.
    pub(super) fn hold(&mut self, now: Instant, packet: Packet, path: Path) -> bool {
        let ssrc = packet.header.ssrc;
        if self.by_ssrc.len() >= MAX_UNNAMED && !self.by_ssrc.contains_key(&ssrc) {
            return false;
        }
        let held = self.by_ssrc.entry(ssrc).or_insert_with(|| {
            self.has_new = true;
            Held { since: now, packets: Vec::new() }
        });
        // Keep the first packets: they may hold the codec headers, and a NACK recovers later ones.
        let has_room = held.packets.len() < MAX_PACKETS;
        if has_room {
            held.packets.push((packet, path));
        }
        has_room
    }

    /// Removes a publication; returns its packets.
    pub(super) fn take(&mut self, ssrc: Ssrc) -> Vec<(Packet, Path)> {
        self.by_ssrc.remove(&ssrc).map(|held| held.packets).unwrap_or_default()
    }

    /// Drops publications that no one has named in time. Returns the number of dropped packets.
    pub(super) fn expire(&mut self, now: Instant) -> u64 {
        let mut dropped = 0;
        self.by_ssrc.retain(|_, held| {
            let keep = now.saturating_duration_since(held.since) < UNNAMED_HELD_FOR;
            if !keep {
                dropped += held.packets.len() as u64;
            }
            keep
        });
        dropped
    }

    /// `true` if a publication was added since the last call.
    pub(super) fn take_new(&mut self) -> bool {
        mem::take(&mut self.has_new)
    }

    /// Returns the sequence number of a publication's first packet.
    pub(super) fn first_seq(&self, ssrc: Ssrc) -> Option<Seq> {
        self.by_ssrc.get(&ssrc)?.packets.first().map(|(packet, _)| packet.header.seq)
    }

    /// Returns the publications whose first packet arrived at least `age` ago.
    pub(super) fn older_than(&self, now: Instant, age: Duration) -> impl Iterator<Item = Ssrc> {
        self.by_ssrc
            .iter()
            .filter(move |(_, held)| now.saturating_duration_since(held.since) >= age)
            .map(|(ssrc, _)| *ssrc)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_ssrc.len()
    }
}

/// How long packets wait for a name.
pub(super) const UNNAMED_HELD_FOR: Duration = Duration::from_secs(10);
/// Bounds the memory that a sender of random SSRCs can claim: 64 publications of 256 packets.
pub(super) const MAX_UNNAMED: usize = 64;
const MAX_PACKETS: usize = 256;
