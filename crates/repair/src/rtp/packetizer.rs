//! FLV tags in, RTP packets out.

use std::ops::Range;

use bytes::Bytes;

use super::{
    Seq, Ssrc,
    packet::{HEADER_LEN, Header, PAYLOAD_TYPE},
};
use downpour_media::flv::Tag;
use downpour_sys::buffer::{Buffer, BufferMut, BufferPool};

/// Slices one publication's tags into RTP packets.
///
/// Wire v0: payload type 100, no padding, extension or CSRC; a tag's header and body without
/// `PreviousTagSize`, in slices of equal length with the last one shorter; the marker on the last.
/// The RTP timestamp is the tag's media time on a 90 kHz clock.
#[derive(Debug)]
pub struct Packetizer {
    ssrc: Ssrc,
    next_seq: Seq,
    payload_max: usize,
    /// Memory of short bursts.
    block: BufferPool,
}

impl Packetizer {
    /// The longest payload allowed: what the existing Go edge's buffer and slicing take.
    pub const PAYLOAD_LIMIT: usize = 1180;

    /// The least that makes sense: the largest tag is then 32,768 packets, as many as sequence
    /// numbers can tell apart.
    pub const PAYLOAD_LEAST: usize = 512;

    /// Starts a publication at [`Seq::FIRST`]. `payload_max` is in bytes, clamped to
    /// [`Self::PAYLOAD_LEAST`]`..=`[`Self::PAYLOAD_LIMIT`].
    pub fn new(ssrc: Ssrc, payload_max: usize) -> Self {
        let payload_max = payload_max.clamp(Self::PAYLOAD_LEAST, Self::PAYLOAD_LIMIT);
        Self { ssrc, next_seq: Seq::FIRST, payload_max, block: BufferPool::new(BLOCK_LEN) }
    }

    /// Packs one tag. A copy of its bytes is the only one that the whole cloud makes.
    pub fn packetize(&mut self, tag: &Tag) -> Burst {
        let unit = tag.unit();
        let count = unit.len().div_ceil(self.payload_max);
        let timestamp = tag.timestamp().wrapping_mul(CLOCK_KHZ);
        let first_seq = self.next_seq;
        let len = unit.len() + count * HEADER_LEN;
        let mut bytes = self.block.room(len);
        for (i, slice) in unit.chunks(self.payload_max).enumerate() {
            let header = Header {
                marker: i + 1 == count,
                payload_type: PAYLOAD_TYPE,
                seq: first_seq.plus(i),
                timestamp,
                ssrc: self.ssrc,
            };
            bytes.put_slice(&header.encode());
            bytes.put_slice(slice);
        }
        self.next_seq = first_seq.plus(count);
        Burst { bytes: bytes.freeze(), stride: (HEADER_LEN + self.payload_max) as u16, first_seq }
    }

    /// The sequence number that the next packet will have.
    pub fn next_seq(&self) -> Seq {
        self.next_seq
    }
}

/// One tag's packets, one behind the other in one buffer at a fixed stride, the last one shorter:
/// the layout that UDP segmentation offload sends in one call and that the history ring keeps.
///
/// Short bursts share blocks of memory, each of which is held as long as one of its bursts is.
#[derive(Debug, Clone)]
pub struct Burst {
    bytes: Buffer,
    /// Small, for there are hundreds of bursts in the history of each stream.
    stride: u16,
    first_seq: Seq,
}

impl Burst {
    /// All packets, laid end to end.
    pub fn bytes(&self) -> &Buffer {
        &self.bytes
    }

    /// Bytes from one packet's start to the next one's: the GSO segment size.
    pub fn stride(&self) -> usize {
        self.stride.into()
    }

    /// Number of packets, at least 1.
    pub fn count(&self) -> usize {
        self.bytes.len().div_ceil(self.stride())
    }

    /// The first packet's sequence number.
    pub fn first_seq(&self) -> Seq {
        self.first_seq
    }

    /// The last packet's sequence number.
    pub fn last_seq(&self) -> Seq {
        self.first_seq.plus(self.count() - 1)
    }

    /// The packet at `index`, sharing the burst's memory.
    pub fn packet(&self, index: usize) -> Option<Bytes> {
        (index < self.count()).then(|| Bytes::from_owner(self.bytes.slice(self.range(index))))
    }

    /// The same packets in memory of their own, for who keeps them longer than the history does.
    pub fn detached(&self) -> Self {
        Self { bytes: BufferMut::from(&self.bytes[..]).freeze(), ..*self }
    }

    fn range(&self, index: usize) -> Range<usize> {
        let start = index * self.stride();
        start..(start + self.stride()).min(self.bytes.len())
    }
}

/// Bytes of a block at most: some twenty bursts of a slow stream, which spares each of them its share
/// of an allocator's work and bookkeeping. A stream that is not sent to any more holds one or two.
const BLOCK_LEN: usize = 8 << 10;
/// RTP ticks a millisecond: the 90 kHz clock of RFC 3551 §5 for video.
const CLOCK_KHZ: u32 = 90;

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use downpour_media::flv::TagKind;

    proptest! {
        #[test]
        fn bursts_keep_their_packets_whatever_shares_their_memory(
            lengths in vec(prop_oneof![0usize..300, 900usize..1300, 2000usize..5000], 1..60),
            payload_max in 512usize..=1180,
        ) {
            let mut packetizer = Packetizer::new(Ssrc(7), payload_max);
            let tags: Vec<_> = (0..)
                .zip(&lengths)
                .map(|(i, len)| Tag::new(TagKind::Video, i, &vec![i as u8; *len]).unwrap())
                .collect();
            let bursts: Vec<_> = tags.iter().map(|tag| packetizer.packetize(tag)).collect();
            let mut next = Seq::FIRST;
            for (tag, burst) in tags.iter().zip(&bursts) {
                prop_assert_eq!(burst.first_seq(), next);
                let mut unit = Vec::new();
                for i in 0..burst.count() {
                    let packet = burst.packet(i).unwrap();
                    prop_assert_eq!(burst.detached().packet(i), Some(packet.clone()));
                    prop_assert!(packet.len() <= HEADER_LEN + payload_max);
                    unit.extend_from_slice(&packet[HEADER_LEN..]);
                }
                prop_assert_eq!(&unit[..], tag.unit());
                next = next.plus(burst.count());
            }
        }
    }
}
