//! One stream's parity at the edge: what it lets be made anew, and how long it is worth a wait.

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

/// Begins with the stream's first parity packet.
pub(super) struct Parity {
    decoder: Decoder,
    recovered: Vec<Bytes>,
    /// Media packets from the first of a row to the last, and when a packet of a row came last.
    row: Option<(u8, Instant)>,
    /// Media packets counted, and when: for the time between two.
    counted: (u64, Instant),
    wait: Duration,
}

impl Parity {
    pub(super) fn new(now: Instant, media: Ssrc, packets: u64) -> Self {
        Self {
            decoder: Decoder::new(media, Limits::default()),
            recovered: Vec::new(),
            row: None,
            counted: (packets, now),
            wait: Duration::ZERO,
        }
    }

    /// Takes a media packet, however it came; gives those that can be made anew now.
    pub(super) fn handle_media(&mut self, packet: Bytes) -> impl Iterator<Item = Packet> {
        self.decoder.handle_media(packet, &mut self.recovered);
        // What the decoder makes is RTP: it looks before it gives it out.
        self.recovered.drain(..).filter_map(|packet| Packet::parse(packet).ok())
    }

    /// Takes a parity packet; gives the media packets that can be made anew now.
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

    /// How long a missing packet's row takes to be complete, given how many packets have come so
    /// far: zero without row parity, since columns take so long that asking is quicker.
    pub(super) fn wait(&mut self, now: Instant, packets: u64) -> Duration {
        let (before, at) = self.counted;
        let passed = now.saturating_duration_since(at);
        if passed >= MEASURED_OVER {
            let came = packets.saturating_sub(before);
            self.counted = (packets, now);
            self.wait = match self.row {
                Some((row, seen))
                    if came > 0 && now.saturating_duration_since(seen) < ROW_FRESH =>
                {
                    passed.mul_f64(f64::from(row) / came as f64) + MARGIN
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

const MEASURED_OVER: Duration = Duration::from_millis(500);
/// Row parity that stopped coming is not waited for.
const ROW_FRESH: Duration = Duration::from_secs(2);
/// The parity is sent behind its row, and both have their jitter.
const MARGIN: Duration = Duration::from_millis(3);
