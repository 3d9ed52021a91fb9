//! Media and parity packets in, lost media packets out.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::Matrix;
use crate::rtp::{
    Packet, Seq, Ssrc,
    flexfec::{self, Protection, Repair},
    packet::{HEADER_LEN, PAYLOAD_TYPE},
};

/// Bounds of what a decoder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Media packets, by number from the newest back. At least two blocks and what is reordered.
    pub packets: usize,
    /// Bytes of media packets, without what their buffers hold besides.
    pub packet_bytes: usize,
    /// Parity packets that wait for media. Each of a block's rows and columns may.
    pub parity: usize,
    /// Bytes of those.
    pub parity_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Two of the largest blocks, and as much again for what comes late.
        let packets = 4 * Matrix::AREA_LIMIT;
        let parity = 4 * Matrix::SIDE_LIMIT as usize;
        Self { packets, packet_bytes: packets * 1500, parity, parity_bytes: parity * 1500 }
    }
}

/// Makes one publication's lost packets anew.
///
/// It takes media however it came (live, repaired, twice) and in any order, and shares its memory.
/// Each parity packet that misses exactly one packet gives it back, whole, which may be what
/// another one missed. Time plays no part: what is old is what is far behind the newest packet.
/// Where the sender begins anew at another sequence number, so must the decoder: with a new one.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    media: Ssrc,
    /// Packets by their extended number, from `oldest` on; none where one is missing.
    window: VecDeque<Option<Bytes>>,
    /// Extended number of the window's front; 0 until something came.
    oldest: u64,
    /// Bytes in `window`.
    window_bytes: usize,
    /// Media packets in a row that were older than the window.
    stale: u32,
    /// Parity that misses at least two packets, or some that are yet to come.
    waiting: VecDeque<Waiting>,
    /// Bytes in `waiting`.
    waiting_bytes: usize,
    stats: Stats,
}

/// Counts since the start, in packets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Media made anew.
    pub recovered: u64,
    /// Parity that missed nothing, or that was there already.
    pub useless: u64,
    /// Parity that missed more than one packet when it, or they, fell out of the bounds.
    pub unrecoverable: u64,
    /// What is not the stream's, and parity that gives no packet.
    pub malformed: u64,
}

impl Decoder {
    /// For the publication `media`.
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

    /// Takes a media packet, whole as it came. What it lets be made anew goes to the end of `out`,
    /// each a whole packet too.
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
            // One forged packet far ahead must not shut out all others.
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

    /// Takes a parity packet. What it lets be made anew goes to the end of `out`.
    pub fn handle_parity(&mut self, repair: Repair, out: &mut Vec<Bytes>) {
        let Repair { media, base, protection, word, body, .. } = repair;
        if media != self.media || body.len() > BODY_LIMIT {
            self.stats.malformed += 1;
            return;
        }
        if self.oldest == 0 {
            // Only media says where the stream is.
            self.stats.unrecoverable += 1;
            return;
        }
        let base = self.extend(base);
        // Too far ahead is hostile, or else too much was lost for it to be of use.
        let reach = self.limits.packets as u64 / 2;
        if base < self.oldest || base + protection.reach() as u64 >= self.end() + reach {
            self.stats.unrecoverable += 1;
            return;
        }
        let is_known =
            |other: &Waiting| other.base == base && other.protection.is_same_set(protection);
        if self.waiting.iter().any(is_known) {
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

    /// Counts since the start.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Bytes of packets held, media and parity.
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

    /// One behind the newest packet's extended number.
    fn end(&self) -> u64 {
        self.oldest + self.window.len() as u64
    }

    /// The extended number nearest to the newest one's.
    fn extend(&mut self, seq: Seq) -> u64 {
        if self.oldest == 0 {
            self.oldest = START + u64::from(seq.0);
        }
        let end = self.end();
        end.saturating_add_signed(seq.distance_from(Seq(end as u16)).into())
    }

    /// Puts a packet in its place; false if it was there or is too old.
    fn insert(&mut self, number: u64, packet: Bytes) -> bool {
        let oldest = self.oldest;
        if number < oldest || self.held(number).is_some() {
            return false;
        }
        if number >= self.end() + self.limits.packets as u64 {
            // All that is held is too old now.
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

    /// Drops parity of packets that are out of the window.
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

    /// Tries the parity of a packet that is there now, and of those that this brings.
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
                        // Here, for what is made anew below may count afresh what waits.
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

    /// Makes the one packet anew that is missing, if one is, and says its number.
    fn recover(&mut self, parity: &Waiting, out: &mut Vec<Bytes>) -> Option<u64> {
        if parity.base < self.oldest {
            // What it recovered before moved the window on.
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

    /// The packet that the parity and its other packets give, if it can be one.
    fn xored(&self, parity: &Waiting, number: u64) -> Option<Bytes> {
        let mut bytes = BytesMut::zeroed(HEADER_LEN);
        bytes.extend_from_slice(&parity.body);
        let mut word = parity.word;
        for packet in parity.numbers().filter_map(|number| self.held(number)) {
            word ^= flexfec::word(packet)?;
            let body = &packet[HEADER_LEN..];
            // As long as the longest: else it is not these packets' parity.
            if body.len() > parity.body.len() {
                return None;
            }
            flexfec::xor(&mut bytes[HEADER_LEN..], body);
        }
        let (header, len) = flexfec::header_of(word, Seq(number as u16), self.media);
        let end = HEADER_LEN + len;
        // What is behind it was padding everywhere.
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

/// A parity packet that may yet be of use.
#[derive(Debug)]
struct Waiting {
    base: u64,
    protection: Protection,
    word: u64,
    body: Bytes,
    /// How many of its packets are.
    missing: usize,
}

impl Waiting {
    fn numbers(&self) -> impl Iterator<Item = u64> + use<> {
        let (base, stride) = (self.base, self.protection.stride() as u64);
        (0..self.protection.count() as u64).map(move |at| base + at * stride)
    }

    fn covers(&self, number: u64) -> bool {
        number.checked_sub(self.base).is_some_and(|ahead| {
            ahead <= self.protection.reach() as u64
                && ahead.is_multiple_of(self.protection.stride() as u64)
        })
    }
}

/// The longest that the rest of a packet behind its fixed header may be.
const BODY_LIMIT: usize = 1500 - HEADER_LEN;
/// Packets in a row that are too old before the window goes to where they are.
const STALE_LIMIT: u32 = 64;
/// A 16-bit number is ambiguous over more.
const WINDOW_LIMIT: usize = 1 << 14;
/// Above 0 by more than a number may ever be behind.
const START: u64 = 1 << 32;
