//! Recovers lost media packets from parity packets.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::Matrix;
use crate::rtp::{
    Packet, Seq, Ssrc,
    flexfec::{self, Protection, Repair},
    packet::{HEADER_LEN, PAYLOAD_TYPE},
};

/// Memory bounds of a [`Decoder`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Media packets, counted back from the newest sequence number. Should be at least two blocks plus
    /// the reorder window.
    pub packets: usize,
    /// Bytes of media packets, without the rest of their buffers.
    pub packet_bytes: usize,
    /// Parity packets that wait for media: up to one per row and column of a block.
    pub parity: usize,
    /// Bytes of waiting parity packets.
    pub parity_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Two of the largest blocks, and as much again for late packets.
        let packets = 4 * Matrix::AREA_LIMIT;
        let parity = 4 * Matrix::SIDE_LIMIT as usize;
        Self { packets, packet_bytes: packets * 1500, parity, parity_bytes: parity * 1500 }
    }
}

/// Recovers lost packets of one publication.
///
/// Accepts media from any source (live, repair, duplicates) in any order and shares its memory. When
/// all but one of a parity packet's media packets are present, the missing one is recovered, which may
/// complete further parity packets. Age is measured in sequence numbers behind the newest packet, not
/// in time. When the sender restarts at another sequence number, replace the decoder by a new one.
///
/// States of a parity packet: *waiting* while two or more of its packets are missing → *recovered*
/// when one is missing, *useless* when none is, *unrecoverable* when it leaves the bounds. Invariants:
/// `missing` of each waiting packet is exact and at least 2; the window never exceeds [`Limits`].
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    media: Ssrc,
    /// Packets by extended sequence number from `oldest` on; `None` where one is missing.
    window: VecDeque<Option<Bytes>>,
    /// Extended sequence number of the window's front; 0 before the first packet.
    oldest: u64,
    /// Bytes in `window`.
    window_bytes: usize,
    /// Consecutive media packets older than the window.
    stale: u32,
    /// Parity packets with at least two missing media packets.
    waiting: VecDeque<Waiting>,
    /// Bytes in `waiting`.
    waiting_bytes: usize,
    stats: Stats,
}

/// Counters since the start, in packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Media packets recovered.
    pub recovered: u64,
    /// Parity packets without a missing media packet, and duplicates.
    pub useless: u64,
    /// Parity packets that left the bounds with more than one media packet missing.
    pub unrecoverable: u64,
    /// Packets of another stream, and parity that yields no valid packet.
    pub malformed: u64,
}

impl Decoder {
    /// Creates the decoder of the publication `media`.
    pub fn new(media: Ssrc, limits: Limits) -> Self {
        Self {
            limits: Limits { packets: limits.packets.clamp(1, WINDOW_LIMIT), ..limits },
            media,
            window: VecDeque::new(),
            oldest: 0,
            window_bytes: 0,
            stale: 0,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            stats: Stats::default(),
        }
    }

    /// Handles a media packet, passed as the whole RTP datagram. Appends recovered packets to `out`,
    /// each a whole datagram.
    pub fn handle_media(&mut self, packet: Bytes, out: &mut Vec<Bytes>) {
        let Some(&[_, _, s0, s1, _, _, _, _, c0, c1, c2, c3]) = packet.first_chunk::<HEADER_LEN>()
        else {
            self.stats.malformed += 1;
            return;
        };
        if Ssrc(u32::from_be_bytes([c0, c1, c2, c3])) != self.media {
            self.stats.malformed += 1;
            return;
        }
        let seq = Seq(u16::from_be_bytes([s0, s1]));
        let mut number = self.extend(seq);
        self.stale = if number < self.oldest { self.stale + 1 } else { 0 };
        if self.stale == STALE_LIMIT {
            // One forged packet far ahead must not exclude all others.
            (self.oldest, self.stale, self.window_bytes) = (0, 0, 0);
            self.window.clear();
            number = self.extend(seq);
            self.stats.unrecoverable += self.waiting.drain(..).count() as u64;
            self.waiting_bytes = 0;
        }
        if self.insert(number, packet) && !self.waiting.is_empty() {
            self.settle(number, out);
        }
    }

    /// Handles a parity packet. Appends recovered packets to `out`.
    pub fn handle_parity(&mut self, repair: Repair, out: &mut Vec<Bytes>) {
        let Repair { media, base, protection, word, body, .. } = repair;
        if media != self.media || body.len() > BODY_LIMIT {
            self.stats.malformed += 1;
            return;
        }
        if self.oldest == 0 {
            // Only media sets the position of the window.
            self.stats.unrecoverable += 1;
            return;
        }
        let base = self.extend(base);
        // Parity far ahead is forged, or useless because too much was lost.
        let lookahead = self.limits.packets as u64 / 2;
        if base < self.oldest || base + protection.span() as u64 >= self.end() + lookahead {
            self.stats.unrecoverable += 1;
            return;
        }
        let is_duplicate =
            |other: &Waiting| other.base == base && other.protection.is_same_set(protection);
        if self.waiting.iter().any(is_duplicate) {
            self.stats.useless += 1;
            return;
        }
        let mut parity = Waiting { base, protection, word, body, missing: 0 };
        parity.missing = parity.numbers().filter(|&number| self.held(number).is_none()).count();
        if parity.missing > 1 {
            self.wait(parity);
        } else if let Some(number) = self.recover(&parity, out) {
            self.settle(number, out);
        }
    }

    /// Returns the counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Returns the bytes of all packets held, media and parity.
    pub fn held_bytes(&self) -> usize {
        self.window_bytes + self.waiting_bytes
    }

    #[cfg(test)]
    pub(super) fn window_len(&self) -> usize {
        self.window.len()
    }

    #[cfg(test)]
    pub(super) fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    /// Returns the extended sequence number after the newest packet.
    fn end(&self) -> u64 {
        self.oldest + self.window.len() as u64
    }

    /// Returns the extended sequence number nearest to the newest one.
    fn extend(&mut self, seq: Seq) -> u64 {
        if self.oldest == 0 {
            self.oldest = START + u64::from(seq.0);
        }
        let end = self.end();
        end.saturating_add_signed(seq.distance_from(Seq(end as u16)).into())
    }

    /// Stores a packet. Returns `false` if it is a duplicate or older than the window.
    fn insert(&mut self, number: u64, packet: Bytes) -> bool {
        let oldest = self.oldest;
        if number < oldest || self.held(number).is_some() {
            return false;
        }
        if number >= self.end() + self.limits.packets as u64 {
            // Every packet held is now too old.
            self.window.clear();
            (self.window_bytes, self.oldest) = (0, number);
        }
        let index = (number - self.oldest) as usize;
        if index >= self.window.len() {
            self.window.resize(index + 1, None);
        }
        self.window_bytes += packet.len();
        self.window[index] = Some(packet);
        while self.window.len() > self.limits.packets
            || (self.window_bytes > self.limits.packet_bytes && self.window.len() > 1)
        {
            if let Some(packet) = self.window.pop_front() {
                self.window_bytes -= packet.map_or(0, |packet| packet.len());
            }
            self.oldest += 1;
        }
        if self.oldest != oldest {
            self.expire();
        }
        number >= self.oldest
    }

    /// Drops parity packets that start before the window.
    fn expire(&mut self) {
        if self.waiting.iter().all(|waiting| waiting.base >= self.oldest) {
            return;
        }
        let (oldest, before) = (self.oldest, self.waiting.len());
        self.waiting.retain(|waiting| waiting.base >= oldest);
        self.stats.unrecoverable += (before - self.waiting.len()) as u64;
        self.waiting_bytes = self.waiting.iter().map(|waiting| waiting.body.len()).sum();
    }

    fn wait(&mut self, waiting: Waiting) {
        self.waiting_bytes += waiting.body.len();
        self.waiting.push_back(waiting);
        while self.waiting.len() > self.limits.parity
            || self.waiting_bytes > self.limits.parity_bytes
        {
            let Some(waiting) = self.waiting.pop_front() else { return };
            self.waiting_bytes -= waiting.body.len();
            self.stats.unrecoverable += 1;
        }
    }

    /// Applies a stored packet to the waiting parity, and recursively the packets recovered from it.
    fn settle(&mut self, number: u64, out: &mut Vec<Bytes>) {
        let (mut numbers, mut ready) = (vec![number], Vec::new());
        while let Some(number) = numbers.pop() {
            let mut index = 0;
            while let Some(parity) = self.waiting.get_mut(index) {
                index += 1;
                if !parity.covers(number) {
                    continue;
                }
                parity.missing -= 1;
                if parity.missing < 2 {
                    index -= 1;
                    if let Some(parity) = self.waiting.remove(index) {
                        // Subtracted before `recover`, which may recompute the sum.
                        self.waiting_bytes -= parity.body.len();
                        ready.push(parity);
                    }
                }
            }
            for parity in ready.drain(..) {
                numbers.extend(self.recover(&parity, out));
            }
        }
    }

    fn held(&self, number: u64) -> Option<&Bytes> {
        let index = usize::try_from(number.checked_sub(self.oldest)?).ok()?;
        self.window.get(index)?.as_ref()
    }

    /// Recovers the missing packet of a parity packet. Returns its extended number if it was stored.
    fn recover(&mut self, parity: &Waiting, out: &mut Vec<Bytes>) -> Option<u64> {
        if parity.base < self.oldest {
            // A packet recovered before it has moved the window.
            self.stats.unrecoverable += 1;
            return None;
        }
        let Some(number) = parity.numbers().find(|&number| self.held(number).is_none()) else {
            self.stats.useless += 1;
            return None;
        };
        let Some(packet) = self.xored(parity, number) else {
            self.stats.malformed += 1;
            return None;
        };
        self.stats.recovered += 1;
        out.push(packet.clone());
        self.insert(number, packet).then_some(number)
    }

    /// Returns the XOR of the parity and its other packets, or `None` if that is not a valid packet.
    fn xored(&self, parity: &Waiting, number: u64) -> Option<Bytes> {
        let mut bytes = BytesMut::zeroed(HEADER_LEN);
        bytes.extend_from_slice(&parity.body);
        let mut word = parity.word;
        for packet in parity.numbers().filter_map(|number| self.held(number)) {
            word ^= flexfec::header_word(packet)?;
            let body = &packet[HEADER_LEN..];
            // The parity is as long as its longest packet.
            if body.len() > parity.body.len() {
                return None;
            }
            flexfec::xor(&mut bytes[HEADER_LEN..], body);
        }
        let (header, len) = flexfec::header_from_word(word, Seq(number as u16), self.media);
        let end = HEADER_LEN + len;
        // The rest must be padding in all packets.
        if bytes.get(end..)?.iter().any(|&byte| byte != 0) {
            return None;
        }
        bytes[..HEADER_LEN].copy_from_slice(&header);
        bytes.truncate(end);
        let bytes = bytes.freeze();
        let packet = Packet::parse(bytes.clone()).ok()?;
        (packet.header.payload_type == PAYLOAD_TYPE).then_some(bytes)
    }
}

/// A parity packet that waits for media packets.
#[derive(Debug)]
struct Waiting {
    base: u64,
    protection: Protection,
    word: u64,
    body: Bytes,
    /// Number of its packets that are missing.
    missing: usize,
}

impl Waiting {
    fn numbers(&self) -> impl Iterator<Item = u64> + use<> {
        let (base, stride) = (self.base, self.protection.stride() as u64);
        (0..self.protection.count() as u64).map(move |at| base + at * stride)
    }

    fn covers(&self, number: u64) -> bool {
        number.checked_sub(self.base).is_some_and(|ahead| {
            ahead <= self.protection.span() as u64
                && ahead.is_multiple_of(self.protection.stride() as u64)
        })
    }
}

/// Longest accepted body in bytes: a packet without its fixed header.
const BODY_LIMIT: usize = 1500 - HEADER_LEN;
/// Consecutive packets older than the window after which the window moves back to them.
const STALE_LIMIT: u32 = 64;
/// 16-bit sequence numbers are ambiguous over larger windows.
const WINDOW_LIMIT: usize = 1 << 14;
/// First extended number: large enough that no number before it underflows.
const START: u64 = 1 << 32;
