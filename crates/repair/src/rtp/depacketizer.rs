//! Reassembles FLV tags from RTP packets.

use super::{Packet, Seq, packet::Header, packetizer::repeated_timestamp};
use downpour_media::flv::{
    Tag,
    tag::{TagError, TagHeader},
};
use downpour_sys::{
    buffer::{BufferMut, BufferPool},
    prefetch,
};

/// Reassembles one publication's tags from its packets, which must be passed in order, with losses
/// reported in between. After a loss it drops the incomplete tag and resumes at the next whole one.
///
/// States, and the events between them:
///
/// | state | event | next state |
/// |---|---|---|
/// | *boundary* | first packet of a tag | *inside*, or *boundary* if it is the whole tag |
/// | *inside* | next packet | *inside*, or *boundary* if it completes the tag |
/// | any | loss ([`Self::lost`]) | *lost* |
/// | any | packet that does not fit | *boundary* if it has the marker, otherwise *lost* |
/// | *lost* | packet that starts a tag beyond doubt | as in *boundary* |
///
/// Invariants: only *inside* holds a partial tag, all bytes of it so far; every packet passed ends
/// in a tag or is counted in [`Damage`].
#[derive(Debug)]
pub struct Depacketizer {
    state: State,
    partial: Option<BufferMut>,
    /// Shared memory of short tags.
    pool: BufferPool,
    /// Number of packets in `partial`.
    partial_packets: u64,
    /// Bytes of header and body of the whole tag.
    expected_len: usize,
    /// Sequence number of the last packet in `partial`.
    last_seq: Seq,
    /// Payload length of the tag's first packet; all but the last are equally long (wire v0).
    slice_len: usize,
    /// RTP timestamp of the last packet.
    timestamp: u32,
    damage: Damage,
}

/// Packets lost or useless since the last [`Depacketizer::take_damage`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Damage {
    /// Packets reported as lost.
    pub packets: u64,
    /// Packets discarded because others of their tag were lost or malformed.
    pub discarded: u64,
    /// Packets without a valid tag, or whose marker contradicts the tag's length.
    pub malformed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The next packet starts a tag.
    Boundary,
    /// Within a tag, all of whose bytes so far are in `partial`.
    Inside,
    /// The position is unknown: after a loss, or after joining mid-stream.
    Lost,
}

impl Depacketizer {
    /// Creates a depacketizer for a stream that starts with the first packet of a tag.
    pub fn new() -> Self {
        Self {
            state: State::Boundary,
            partial: None,
            pool: BufferPool::new(BLOCK_LEN),
            partial_packets: 0,
            expected_len: 0,
            last_seq: Seq::default(),
            slice_len: 0,
            timestamp: 0,
            damage: Damage::default(),
        }
    }

    /// Creates a depacketizer for a stream joined at any packet. It skips packets until a tag starts.
    pub fn joining() -> Self {
        Self { state: State::Lost, ..Self::new() }
    }

    /// Handles the next packet in order. Returns the tag that it completes.
    #[inline]
    pub fn packet(&mut self, packet: &Packet) -> Option<Tag> {
        self.payload(&packet.header, &packet.payload)
    }

    /// As [`Self::packet`], for a payload in borrowed memory; copies it once, into the tag.
    pub fn payload(&mut self, header: &Header, payload: &[u8]) -> Option<Tag> {
        let marker = header.marker;
        let started = match self.state {
            State::Inside => self.partial.take(),
            State::Lost if !starts_tag(payload, marker) => None,
            State::Boundary | State::Lost => self.start(payload, marker),
        };
        let Some(mut partial) = started else {
            match self.state {
                State::Lost => self.damage.discarded += 1,
                _ => self.damage.malformed += 1,
            }
            self.resync(marker);
            return None;
        };
        let len = partial.len() + payload.len();
        let complete = len == self.expected_len;
        if marker != complete || len > self.expected_len {
            // Marker and tag length contradict each other: neither can be trusted.
            self.damage.malformed += 1;
            self.discard_partial();
            self.resync(marker);
            return None;
        }
        if self.state != State::Inside {
            self.slice_len = payload.len();
        }
        self.last_seq = header.seq;
        self.timestamp = header.timestamp;
        partial.put_slice(payload);
        if !complete {
            self.partial = Some(partial);
            self.partial_packets += 1;
            self.state = State::Inside;
            // The next payload is usually as long as this one (5 to 15 % in `scripts/bench edge`).
            prefetch(self.next_address(), payload.len());
            return None;
        }
        self.state = State::Boundary;
        match Tag::from_unit(partial) {
            Ok(tag) => {
                self.partial_packets = 0;
                Some(tag)
            }
            Err(_) => {
                self.damage.malformed += 1;
                self.discard_partial();
                None
            }
        }
    }

    /// Returns the address where the next payload will probably be written, for prefetching.
    #[inline]
    pub fn next_address(&self) -> usize {
        match self.state {
            State::Inside => {
                self.partial.as_ref().map_or(0, |partial| partial.as_ptr_range().end.addr())
            }
            State::Boundary | State::Lost => self.pool.next_address(),
        }
    }

    /// Returns the address of the pool's reference count, which each tag updates, for prefetching.
    #[inline]
    pub fn refcount_address(&self) -> usize {
        self.pool.refcount_address()
    }

    /// Reports that the next `packets` packets are lost; 0 reports a discontinuity without a count.
    /// Returns the last packet of the tag that the loss interrupts, if one was started: every packet
    /// up to it is useless.
    pub fn lost(&mut self, packets: u64) -> Option<Seq> {
        let useless_through = (self.state == State::Inside && packets > 0).then(|| {
            let left =
                self.expected_len.saturating_sub(self.partial.as_ref().map_or(0, |p| p.len()));
            self.last_seq.plus(left.div_ceil(self.slice_len.max(1)))
        });
        self.damage.packets += packets;
        self.discard_partial();
        self.state = State::Lost;
        useless_through
    }

    /// `true` if `tag`, which the last packet completed, is a codec header that the sender sent again.
    #[inline]
    pub fn is_repeated(&self, tag: &Tag) -> bool {
        self.timestamp == repeated_timestamp(tag.timestamp())
    }

    /// Returns the damage since the last call, or `None` if there was none.
    pub fn take_damage(&mut self) -> Option<Damage> {
        let damage = std::mem::take(&mut self.damage);
        (damage != Damage::default()).then_some(damage)
    }

    /// `true` if the last packet completed a tag, so that no partial tag is held.
    pub fn at_boundary(&self) -> bool {
        self.state == State::Boundary
    }

    /// Allocates the tag that starts with this packet. Returns `None` if it has no valid tag header.
    fn start(&mut self, payload: &[u8], marker: bool) -> Option<BufferMut> {
        let header = TagHeader::parse(payload).ok()?;
        self.expected_len = Tag::HEADER_LEN + header.body_len;
        // Reserves a tag of a few packets at once, so that it is not moved as it grows. This also
        // limits the memory that a forged length reserves.
        let reserved = if marker { payload.len() } else { RESERVED_SLICES * payload.len() };
        Some(match self.expected_len <= reserved {
            true => self.pool.take(self.expected_len + Tag::TRAILER_LEN),
            // The tag will grow and move, which would waste its part of a shared block.
            false => BufferMut::with_capacity(reserved + Tag::TRAILER_LEN),
        })
    }

    /// Drops the partial tag.
    fn discard_partial(&mut self) {
        self.damage.discarded += std::mem::take(&mut self.partial_packets);
        self.partial = None;
    }

    /// Sets the state after a useless packet: a tag starts after its marker.
    fn resync(&mut self, marker: bool) {
        self.state = if marker { State::Boundary } else { State::Lost };
    }
}

impl Default for Depacketizer {
    fn default() -> Self {
        Self::new()
    }
}

/// `true` if a packet after a loss is beyond doubt the first of a tag: type, zero stream id and length
/// are all valid. Random bytes pass with a probability of about 2⁻³⁰.
fn starts_tag(payload: &[u8], marker: bool) -> bool {
    match TagHeader::parse(payload) {
        Ok(header) => {
            let len = Tag::HEADER_LEN + header.body_len;
            payload[8..11] == [0, 0, 0]
                && if marker { payload.len() == len } else { payload.len() < len }
        }
        Err(TagError::Truncated | TagError::UnknownType(_) | TagError::TooLong(_)) => false,
    }
}

/// Returns the timestamp of the tag that a packet starts, in milliseconds; `None` if it is not beyond
/// doubt the first packet of a tag.
pub fn tag_timestamp(payload: &[u8], marker: bool) -> Option<u32> {
    starts_tag(payload, marker).then(|| TagHeader::parse(payload).ok())?.map(|tag| tag.timestamp)
}

/// Payloads to reserve for a started tag; most frames have fewer.
const RESERVED_SLICES: usize = 8;
/// Block length in bytes: most frames of streams up to 2 Mbit/s fit.
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
    fn every_packet_of_an_interrupted_tag_is_counted() {
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
    fn a_partial_tag_reserves_at_most_twice_its_length() {
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
        fn reassembles_the_packetizers_tags(tags in tags(), payload_max in 512usize..=1180) {
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
        fn every_tag_without_loss_is_reassembled(
            tags in tags(), lost in proptest::collection::vec(any::<bool>(), 40 * 9),
        ) {
            let mut packetizer = Packetizer::new(Ssrc(7), 1120);
            let mut depacketizer = Depacketizer::new();
            let (mut out, mut whole, mut lost) = (Vec::new(), Vec::new(), lost.into_iter().cycle());
            let mut lost_packets = 0;
            for tag in &tags {
                let mut incomplete = false;
                for packet in packets(&packetizer.packetize(tag)) {
                    if lost.next() == Some(true) {
                        depacketizer.lost(1);
                        lost_packets += 1;
                        incomplete = true;
                    } else {
                        out.extend(depacketizer.packet(&packet));
                    }
                }
                if !incomplete {
                    whole.push(tag.clone());
                }
            }
            prop_assert_eq!(out, whole);
            let damage = depacketizer.take_damage().unwrap_or_default();
            prop_assert_eq!(damage.packets, lost_packets);
            prop_assert_eq!(damage.malformed, 0);
        }

        #[test]
        fn any_payloads_are_handled_without_panic(
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
