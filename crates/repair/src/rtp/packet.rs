//! The RTP packet (RFC 3550 §5.1).

use std::ops::Range;

use bytes::{Buf, Bytes};

use super::{Seq, Ssrc};

/// Bytes of a header without CSRC or extension: all that wire v0 sends.
pub const HEADER_LEN: usize = 12;
/// The payload type of wire v0.
pub const PAYLOAD_TYPE: u8 = 100;

/// The fields of the fixed header that Downpour uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Set on the last packet of a tag.
    pub marker: bool,
    /// 7 bits; 100 in wire v0.
    pub payload_type: u8,
    /// The packet's place in its publication.
    pub seq: Seq,
    /// Media time on a 90 kHz clock; the Go cloud counts tags instead.
    pub timestamp: u32,
    /// The publication.
    pub ssrc: Ssrc,
}

impl Header {
    /// Reads the header of one datagram, and says where in it the payload is: behind CSRC list and
    /// extension, before the padding.
    ///
    /// # Errors
    /// If it is not RTP version 2 or shorter than its own header says.
    pub fn parse(datagram: &[u8]) -> Result<(Self, Range<usize>), PacketError> {
        let Some(&[b0, b1, s0, s1, t0, t1, t2, t3, c0, c1, c2, c3]) =
            datagram.first_chunk::<HEADER_LEN>()
        else {
            return Err(PacketError::Truncated);
        };
        if b0 & 0xc0 != VERSION_2 {
            return Err(PacketError::Version(b0 >> 6));
        }
        let mut start = HEADER_LEN + usize::from(b0 & CSRC_COUNT) * 4;
        if b0 & EXTENSION != 0 {
            let words = datagram
                .get(start + 2..start + 4)
                .ok_or(PacketError::Truncated)?
                .iter()
                .fold(0, |words, byte| words << 8 | usize::from(*byte));
            start += 4 + words * 4;
        }
        let padding = match (b0 & PADDING != 0, datagram.last()) {
            (true, Some(0)) => return Err(PacketError::Truncated),
            (true, Some(&count)) => usize::from(count),
            _ => 0,
        };
        let end = datagram.len().checked_sub(padding).ok_or(PacketError::Truncated)?;
        if start > end {
            return Err(PacketError::Truncated);
        }
        let header = Self {
            marker: b1 & MARKER != 0,
            payload_type: b1 & !MARKER,
            seq: Seq(u16::from_be_bytes([s0, s1])),
            timestamp: u32::from_be_bytes([t0, t1, t2, t3]),
            ssrc: Ssrc(u32::from_be_bytes([c0, c1, c2, c3])),
        };
        Ok((header, start..end))
    }

    /// The header as [`HEADER_LEN`] bytes: version 2, no padding, extension or CSRC.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = VERSION_2;
        bytes[1] = self.payload_type & !MARKER | if self.marker { MARKER } else { 0 };
        bytes[2..4].copy_from_slice(&self.seq.0.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.timestamp.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.ssrc.0.to_be_bytes());
        bytes
    }
}

/// A header and the payload behind it, sharing the datagram's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The fixed header.
    pub header: Header,
    /// What follows header, CSRC list and extension, without padding.
    pub payload: Bytes,
}

impl Packet {
    /// Reads one datagram. CSRC list, extension and padding are allowed and left out.
    ///
    /// # Errors
    /// As [`Header::parse`].
    pub fn parse(mut datagram: Bytes) -> Result<Self, PacketError> {
        let (header, payload) = Header::parse(&datagram)?;
        // Not a slice, which would count another reference to the memory.
        datagram.truncate(payload.end);
        datagram.advance(payload.start);
        Ok(Self { header, payload: datagram })
    }
}

/// Why a datagram is not an RTP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// Shorter than its header says.
    #[error("the RTP packet is cut short")]
    Truncated,
    /// Not version 2: a port announcement, or no RTP at all.
    #[error("RTP version {0} instead of 2")]
    Version(u8),
}

const VERSION_2: u8 = 2 << 6;
const PADDING: u8 = 0x20;
const EXTENSION: u8 = 0x10;
const CSRC_COUNT: u8 = 0x0f;
const MARKER: u8 = 0x80;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use webrtc_util::marshal::{Marshal, Unmarshal};

    use super::*;

    proptest! {
        #[test]
        fn header_is_what_the_rtp_crate_writes(
            marker: bool, payload_type in 0u8..128, seq: u16, timestamp: u32, ssrc: u32,
            payload in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let header = Header {
                marker, payload_type, seq: Seq(seq), timestamp, ssrc: Ssrc(ssrc),
            };
            let theirs = rtp::packet::Packet {
                header: rtp::header::Header {
                    version: 2, marker, payload_type, sequence_number: seq, timestamp, ssrc,
                    ..Default::default()
                },
                payload: payload.clone().into(),
            };
            let bytes = theirs.marshal().unwrap();
            prop_assert_eq!(&bytes[..HEADER_LEN], header.encode());
            prop_assert_eq!(Packet::parse(bytes).unwrap(), Packet { header, payload: payload.into() });
        }

        #[test]
        fn any_bytes_parse_as_the_rtp_crate_parses_them(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..80), version_2: bool,
        ) {
            if version_2 && let Some(first) = bytes.first_mut() {
                *first = *first & 0x3f | VERSION_2;
            }
            let bytes = Bytes::from(bytes);
            let theirs = rtp::packet::Packet::unmarshal(&mut bytes.clone());
            if let (Ok(ours), Ok(theirs)) = (Packet::parse(bytes.clone()), theirs) {
                prop_assert_eq!(ours.header.seq.0, theirs.header.sequence_number);
                prop_assert_eq!(ours.header.ssrc.0, theirs.header.ssrc);
                prop_assert_eq!(ours.header.marker, theirs.header.marker);
                prop_assert_eq!(ours.header.timestamp, theirs.header.timestamp);
                if bytes[0] & EXTENSION == 0 {
                    prop_assert_eq!(ours.payload, theirs.payload);
                }
            }
        }
    }
}
