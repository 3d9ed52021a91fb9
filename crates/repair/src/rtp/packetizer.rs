//! Slices FLV tags into RTP packets.

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
/// Wire v0: payload type 100, no padding, extension or CSRC list. A tag's header and body, without
/// `PreviousTagSize`, are cut into slices of equal length, the last one shorter and with the marker.
/// The RTP timestamp is the tag's media time on a 90 kHz clock.
#[derive(Debug)]
pub struct Packetizer {
    ssrc: Ssrc,
    next_seq: Seq,
    payload_max: usize,
    /// Shared memory of short bursts.
    pool: BufferPool,
}

impl Packetizer {
    /// The longest payload in bytes: the limit of the existing Go edge.
    pub const PAYLOAD_LIMIT: usize = 1180;

    /// The smallest value of `payload_max` in bytes. The largest tag then takes 32,768 packets, the
    /// most that sequence numbers tell apart.
    pub const PAYLOAD_LEAST: usize = 512;

    /// Starts a publication at [`Seq::FIRST`]. `payload_max` is in bytes and clamped to
    /// [`Self::PAYLOAD_LEAST`]`..=`[`Self::PAYLOAD_LIMIT`].
    pub fn new(ssrc: Ssrc, payload_max: usize) -> Self {
        let payload_max = payload_max.clamp(Self::PAYLOAD_LEAST, Self::PAYLOAD_LIMIT);
        Self { ssrc, next_seq: Seq::FIRST, payload_max, pool: BufferPool::new(BLOCK_LEN) }
    }

    /// Slices one tag into packets. This copies its bytes, once for all receivers.
    pub fn packetize(&mut self, tag: &Tag) -> Burst {
        self.slice(tag, tag.timestamp().wrapping_mul(CLOCK_KHZ))
    }

    /// Slices a codec header that is sent again. Its RTP timestamp is one tick late, by which receivers
    /// tell that the publication does not have the tag here ([`Depacketizer::is_repeated`]).
    ///
    /// [`Depacketizer::is_repeated`]: super::Depacketizer::is_repeated
    pub fn packetize_again(&mut self, header: &Tag) -> Burst {
        self.slice(header, repeated_timestamp(header.timestamp()))
    }

    fn slice(&mut self, tag: &Tag, timestamp: u32) -> Burst {
        let unit = tag.unit();
        let count = unit.len().div_ceil(self.payload_max);
        let first_seq = self.next_seq;
        let len = unit.len() + count * HEADER_LEN;
        let mut bytes = self.pool.take(len);
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

    /// Returns the sequence number of the next packet.
    pub fn next_seq(&self) -> Seq {
        self.next_seq
    }
}

/// The RTP timestamp of a tag that is sent again; `timestamp` is the tag's, in milliseconds.
pub(super) fn repeated_timestamp(timestamp: u32) -> u32 {
    timestamp.wrapping_mul(CLOCK_KHZ).wrapping_add(1)
}

/// The packets of one tag in one buffer at a fixed stride, the last one shorter. UDP segmentation
/// offload (GSO) sends this layout in one call, and the history keeps it.
///
/// Short bursts share a block of memory, which is freed with the last of its bursts.
#[derive(Debug, Clone)]
pub struct Burst {
    bytes: Buffer,
    /// A `u16` because the history of each stream holds hundreds of bursts.
    stride: u16,
    first_seq: Seq,
}

impl Burst {
    /// Returns all packets, end to end.
    #[inline]
    pub fn bytes(&self) -> &Buffer {
        &self.bytes
    }

    /// Returns the bytes from the start of one packet to the next: the GSO segment size.
    #[inline]
    pub fn stride(&self) -> usize {
        self.stride.into()
    }

    /// Returns the number of packets, at least 1.
    #[inline]
    pub fn count(&self) -> usize {
        self.bytes.len().div_ceil(self.stride())
    }

    /// Returns the sequence number of the first packet.
    #[inline]
    pub fn first_seq(&self) -> Seq {
        self.first_seq
    }

    /// Returns the sequence number of the last packet.
    #[inline]
    pub fn last_seq(&self) -> Seq {
        self.first_seq.plus(self.count() - 1)
    }

    /// Returns the packet at `index`, which shares the burst's memory, or `None` out of range.
    pub fn packet(&self, index: usize) -> Option<Bytes> {
        (index < self.count()).then(|| Bytes::from_owner(self.bytes.slice(self.range(index))))
    }

    /// Returns a copy that shares no memory with other bursts, to be kept longer than the history
    /// keeps its bursts.
    pub fn detached(&self) -> Self {
        Self { bytes: BufferMut::from(&self.bytes[..]).freeze(), ..*self }
    }

    fn range(&self, index: usize) -> Range<usize> {
        let start = index * self.stride();
        start..(start + self.stride()).min(self.bytes.len())
    }
}

/// Largest block in bytes: about twenty bursts of a slow stream, which amortizes the cost of an
/// allocation. A stream that no longer sends keeps one or two blocks.
const BLOCK_LEN: usize = 8 << 10;
/// RTP clock in kHz, as for video in RFC 3551 §5.
const CLOCK_KHZ: u32 = 90;

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use downpour_media::flv::TagKind;

    proptest! {
        #[test]
        fn bursts_that_share_memory_keep_their_packets(
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
