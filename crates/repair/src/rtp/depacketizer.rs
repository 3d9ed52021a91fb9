//! RTP packets in, FLV tags out.

use super::{Packet, Seq, packet::Header};
use downpour_media::flv::{
    Tag,
    tag::{TagError, TagHeader},
};
use downpour_sys::{
    buffer::{BufferMut, BufferPool},
    prefetch,
};

/// Puts one publication's packets, given in order and with losses told, back into tags.
///
/// After a loss it drops the tag that the loss cut and goes on with the next whole one.
#[derive(Debug)]
pub struct Depacketizer {
    state: State,
    partial: Option<BufferMut>,
    /// Memory of short tags.
    block: BufferPool,
    /// Packets that `partial` is made of.
    held: u64,
    /// Bytes of header and body that `partial` will have.
    expected: usize,
    /// Number of the packet that `partial` ends with, and how long the first one's payload was: all
    /// but the last are as long (wire v0).
    last_seq: Seq,
    slice_len: usize,
    damage: Damage,
}

/// What a stretch of losses cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Damage {
    /// Packets that never came.
    pub packets: u64,
    /// Packets that came and were of no use, because others of their tag were lost or malformed.
    pub discarded: u64,
    /// Packets that held no tag, or whose marker and tag length disagree.
    pub malformed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The next packet begins a tag.
    Boundary,
    /// Inside a tag of which every byte so far is held.
    Inside,
    /// Somewhere unknown: after a loss, or at a join in mid-stream.
    Lost,
}

impl Depacketizer {
    /// For a publication that is received from its first packet, or from a tag's first.
    pub fn new() -> Self {
        Self {
            state: State::Boundary,
            partial: None,
            block: BufferPool::new(BLOCK_LEN),
            held: 0,
            expected: 0,
            last_seq: Seq::default(),
            slice_len: 0,
            damage: Damage::default(),
        }
    }

    /// For a publication that is joined anywhere: packets are skipped until a tag begins.
    pub fn joining() -> Self {
        Self { state: State::Lost, ..Self::new() }
    }

    /// Takes the next packet in order; gives the tag that it completes.
    pub fn packet(&mut self, packet: &Packet) -> Option<Tag> {
        self.payload(&packet.header, &packet.payload)
    }

    /// The same for a packet whose payload is elsewhere: it is copied once, to its place in the tag.
    pub fn payload(&mut self, header: &Header, payload: &[u8]) -> Option<Tag> {
        let marker = header.marker;
        let begun = match self.state {
            State::Inside => self.partial.take(),
            State::Lost if !begins_tag(payload, marker) => None,
            State::Boundary | State::Lost => self.begin(payload, marker),
        };
        let Some(mut partial) = begun else {
            match self.state {
                State::Lost => self.damage.discarded += 1,
                _ => self.damage.malformed += 1,
            }
            self.skip(marker);
            return None;
        };
        let len = partial.len() + payload.len();
        let complete = len == self.expected;
        if marker != complete || len > self.expected {
            // The marker and the tag's own length disagree: neither can be trusted.
            self.damage.malformed += 1;
            self.discard_partial();
            self.skip(marker);
            return None;
        }
        if self.state != State::Inside {
            self.slice_len = payload.len();
        }
        self.last_seq = header.seq;
        partial.put_slice(payload);
        if !complete {
            self.partial = Some(partial);
            self.held += 1;
            self.state = State::Inside;
            // Most often one as long is next to come.
            prefetch(self.next_place(), payload.len());
            return None;
        }
        self.state = State::Boundary;
        match Tag::from_unit(partial) {
            Ok(tag) => {
                self.held = 0;
                Some(tag)
            }
            Err(_) => {
                self.damage.malformed += 1;
                self.discard_partial();
                None
            }
        }
    }

    /// Address of the place that the next payload will have, so far as one can tell.
    #[inline]
    pub fn next_place(&self) -> usize {
        match self.state {
            State::Inside => {
                self.partial.as_ref().map_or(0, |partial| partial.as_ptr_range().end.addr())
            }
            State::Boundary | State::Lost => self.block.next_place(),
        }
    }

    /// Address of what is written for each tag besides.
    #[inline]
    pub fn count(&self) -> usize {
        self.block.count()
    }

    /// Says that the next `packets` packets will never come; 0 says that what comes next is no
    /// continuation. Gives the last packet of the tag that this cuts, if its length is known: up to
    /// there, nothing is of use any more.
    pub fn lost(&mut self, packets: u64) -> Option<Seq> {
        let cut_through = (self.state == State::Inside && packets > 0).then(|| {
            let left = self.expected.saturating_sub(self.partial.as_ref().map_or(0, |p| p.len()));
            self.last_seq.plus(left.div_ceil(self.slice_len.max(1)))
        });
        self.damage.packets += packets;
        self.discard_partial();
        self.state = State::Lost;
        cut_through
    }

    /// Takes what was lost since the last call, or `None` if nothing was.
    pub fn take_damage(&mut self) -> Option<Damage> {
        let damage = std::mem::take(&mut self.damage);
        (damage != Damage::default()).then_some(damage)
    }

    /// Whether the last packet completed a tag, so that nothing is held back.
    pub fn at_boundary(&self) -> bool {
        self.state == State::Boundary
    }

    /// Reads the tag header at the start of a packet; `None` if there is none.
    fn begin(&mut self, payload: &[u8], marker: bool) -> Option<BufferMut> {
        let header = TagHeader::parse(payload).ok()?;
        self.expected = Tag::HEADER_LEN + header.body_len;
        // All of it at once where it is a few packets, so that it need not move as it grows. A header
        // that lies about its length reserves no more than that.
        let few = if marker { payload.len() } else { RESERVED * payload.len() };
        Some(match self.expected <= few {
            true => self.block.room(self.expected + Tag::TRAILER_LEN),
            // It will grow, and move: what it had of a block would be lost.
            false => BufferMut::with_capacity(few + Tag::TRAILER_LEN),
        })
    }

    /// Drops an unfinished tag.
    fn discard_partial(&mut self) {
        self.damage.discarded += std::mem::take(&mut self.held);
        self.partial = None;
    }

    /// After a useless packet: its marker shows where the next tag begins.
    fn skip(&mut self, marker: bool) {
        self.state = if marker { State::Boundary } else { State::Lost };
    }
}

impl Default for Depacketizer {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether a packet that follows a loss is surely a tag's first: the header's type, its zero stream
/// id and its length all fit. Media bytes that look like that by chance are one in 2³⁰.
fn begins_tag(payload: &[u8], marker: bool) -> bool {
    match TagHeader::parse(payload) {
        Ok(header) => {
            let len = Tag::HEADER_LEN + header.body_len;
            payload[8..11] == [0, 0, 0]
                && if marker { payload.len() == len } else { payload.len() < len }
        }
        Err(TagError::Truncated | TagError::UnknownType(_) | TagError::TooLong(_)) => false,
    }
}

/// First packets' lengths: most frames have no more.
const RESERVED: usize = 8;
/// Most frames of up to 2 Mbit/s come out of blocks.
const BLOCK_LEN: usize = 128 << 10;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::rtp::{Burst, Packetizer, Seq, Ssrc};
    use downpour_media::flv::TagKind;

    fn tags() -> impl Strategy<Value = Vec<Tag>> {
        let size = prop_oneof![0usize..40, 1000usize..1300, 0usize..9000];
        let kind = prop_oneof![Just(TagKind::Audio), Just(TagKind::Video)];
        let tag =
            (kind, any::<u32>(), size, any::<u8>()).prop_map(|(kind, timestamp, size, fill)| {
                let body: Vec<u8> = (0..size).map(|i| fill.wrapping_add(i as u8)).collect();
                Tag::new(kind, timestamp, &body).unwrap()
            });
        proptest::collection::vec(tag, 1..40)
    }

    fn packets(burst: &Burst) -> impl Iterator<Item = Packet> {
        (0..burst.count()).map(|i| Packet::parse(burst.packet(i).unwrap()).unwrap())
    }

    #[test]
    fn every_packet_of_a_tag_that_was_cut_is_counted() {
        let tag = Tag::new(TagKind::Video, 0, &[7; 5120]).unwrap();
        let burst = Packetizer::new(Ssrc(7), 512).packetize(&tag);
        let damage = |discarded, malformed| Some(Damage { packets: 0, discarded, malformed });
        let mut depacketizer = Depacketizer::new();
        for packet in packets(&burst).take(4) {
            depacketizer.packet(&packet);
        }
        depacketizer.lost(0);
        assert_eq!(depacketizer.take_damage(), damage(4, 0));

        for mut packet in packets(&burst).take(7) {
            packet.header.marker = packet.header.seq == burst.first_seq().plus(6);
            assert_eq!(depacketizer.packet(&packet), None);
        }
        assert_eq!(depacketizer.take_damage(), damage(6, 1));
        let whole: Vec<_> = packets(&burst).filter_map(|p| depacketizer.packet(&p)).collect();
        assert_eq!((whole, depacketizer.take_damage()), (vec![tag], None));
    }

    #[test]
    fn a_tag_holds_little_more_memory_than_it_has_bytes() {
        for (payload_max, len) in [(512, 5000), (512, 3000), (1120, 8900), (1120, 20_000)] {
            let tag = Tag::new(TagKind::Video, 0, &vec![7; len]).unwrap();
            let burst = Packetizer::new(Ssrc(7), payload_max).packetize(&tag);
            let mut depacketizer = Depacketizer::new();
            for packet in packets(&burst).take(burst.count() - 1) {
                assert_eq!(depacketizer.packet(&packet), None);
                let capacity = depacketizer.partial.as_ref().unwrap().capacity();
                assert!(capacity <= 2 * (len + 15), "{capacity} bytes for {len} at {payload_max}");
            }
        }
    }

    proptest! {
        #[test]
        fn undoes_the_packetizer(tags in tags(), payload_max in 512usize..=1180) {
            let mut packetizer = Packetizer::new(Ssrc(7), payload_max);
            let mut depacketizer = Depacketizer::new();
            let mut seq = Seq::FIRST;
            let mut out = Vec::new();
            for tag in &tags {
                let burst = packetizer.packetize(tag);
                prop_assert_eq!(burst.first_seq(), seq);
                for packet in packets(&burst) {
                    prop_assert_eq!(packet.header.seq, seq);
                    prop_assert_eq!(packet.header.timestamp, tag.timestamp().wrapping_mul(90));
                    prop_assert!(packet.payload.len() <= payload_max);
                    seq = seq.plus(1);
                    out.extend(depacketizer.packet(&packet));
                }
            }
            prop_assert_eq!(depacketizer.take_damage(), None);
            prop_assert_eq!(out, tags);
        }

        #[test]
        fn after_a_loss_every_whole_tag_comes_out(
            tags in tags(), lost in proptest::collection::vec(any::<bool>(), 40 * 9),
        ) {
            let mut packetizer = Packetizer::new(Ssrc(7), 1120);
            let mut depacketizer = Depacketizer::new();
            let (mut out, mut whole, mut lost) = (Vec::new(), Vec::new(), lost.into_iter().cycle());
            let mut lost_packets = 0;
            for tag in &tags {
                let mut cut = false;
                for packet in packets(&packetizer.packetize(tag)) {
                    if lost.next() == Some(true) {
                        depacketizer.lost(1);
                        lost_packets += 1;
                        cut = true;
                    } else {
                        out.extend(depacketizer.packet(&packet));
                    }
                }
                if !cut {
                    whole.push(tag.clone());
                }
            }
            prop_assert_eq!(out, whole);
            let damage = depacketizer.take_damage().unwrap_or_default();
            prop_assert_eq!(damage.packets, lost_packets);
            prop_assert_eq!(damage.malformed, 0);
        }

        #[test]
        fn garbage_never_panics(
            payloads in proptest::collection::vec(
                (proptest::collection::vec(any::<u8>(), 0..64), any::<bool>(), any::<bool>()), 0..50),
        ) {
            let mut depacketizer = Depacketizer::joining();
            for (seq, (payload, marker, tag_like)) in payloads.into_iter().enumerate() {
                let mut payload = payload;
                if tag_like && payload.len() > 10 {
                    payload[0] = 9;
                    payload[1..3].fill(0);
                }
                depacketizer.packet(&Packet {
                    header: crate::rtp::packet::Header {
                        marker, payload_type: 100, seq: Seq(seq as u16), timestamp: 0, ssrc: Ssrc(1),
                    },
                    payload: payload.into(),
                });
            }
        }
    }
}
