//! Parity of one received stream: recovers media packets, and estimates how long to wait for a row.

use std::time::{Duration, Instant};

use bytes::Bytes;

use downpour_repair::{
    fec::{
        Decoder,
        decoder::{Limits, Stats},
    },
    rtp::{
        Packet, Ssrc,
        flexfec::{Protection, Repair},
    },
};

/// FEC decoder of one stream, created with its first parity packet.
pub(super) struct Parity {
    decoder: Decoder,
    recovered: Vec<Bytes>,
    /// Media packets per row, and when row parity last arrived.
    row: Option<(u8, Instant)>,
    /// The last sample of the media packet count, and its time.
    sample: (u64, Instant),
    wait: Duration,
}

impl Parity {
    pub(super) fn new(now: Instant, media: Ssrc, packets: u64) -> Self {
        Self {
            decoder: Decoder::new(media, Limits::default()),
            recovered: Vec::new(),
            row: None,
            sample: (packets, now),
            wait: Duration::ZERO,
        }
    }

    /// Takes a media packet from any source; returns the packets that can now be recovered.
    pub(super) fn handle_media(&mut self, packet: Bytes) -> impl Iterator<Item = Packet> {
        self.decoder.handle_media(packet, &mut self.recovered);
        // The decoder returns only valid RTP, so this drops nothing.
        self.recovered.drain(..).filter_map(|packet| Packet::parse(packet).ok())
    }

    /// Takes a parity packet; returns the media packets that can now be recovered.
    pub(super) fn handle_parity(
        &mut self,
        now: Instant,
        repair: Repair,
    ) -> impl Iterator<Item = Packet> {
        if let Protection::Row { count, .. } = repair.protection {
            self.row = Some((count, now));
        }
        self.decoder.handle_parity(repair, &mut self.recovered);
        self.recovered.drain(..).filter_map(|packet| Packet::parse(packet).ok())
    }

    /// Returns how long it takes for a missing packet's row to be complete, from the packet rate;
    /// `packets` is the total so far. Zero without row parity: a NACK is faster than a column.
    pub(super) fn wait(&mut self, now: Instant, packets: u64) -> Duration {
        let (before, at) = self.sample;
        let passed = now.saturating_duration_since(at);
        if passed >= SAMPLE_INTERVAL {
            let received = packets.saturating_sub(before);
            self.sample = (packets, now);
            self.wait = match self.row {
                Some((row, seen))
                    if received > 0 && now.saturating_duration_since(seen) < ROW_FRESH =>
                {
                    passed.mul_f64(f64::from(row) / received as f64) + MARGIN
                }
                _ => Duration::ZERO,
            };
        }
        self.wait
    }

    pub(super) fn stats(&self) -> Stats {
        *self.decoder.stats()
    }
}

const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// Row parity that has not arrived for this long is not waited for.
const ROW_FRESH: Duration = Duration::from_secs(2);
/// Jitter between a row and its parity, which is sent after it.
const MARGIN: Duration = Duration::from_millis(3);
