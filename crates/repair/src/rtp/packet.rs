//! The RTP packet (RFC 3550 §5.1).

use std::ops::Range;

use bytes::{Buf, Bytes};

use super::{Seq, Ssrc};

/// Bytes of a header without CSRC list and extension, which wire v0 never sends.
pub const HEADER_LEN: usize = 12;
/// The payload type of media in wire v0.
pub const PAYLOAD_TYPE: u8 = 100;

/// The fields of the fixed header that Downpour uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Set on the last packet of a tag.
    pub marker: bool,
    /// Payload type, 7 bits; 100 in wire v0.
    pub payload_type: u8,
    /// Sequence number within the publication.
    pub seq: Seq,
    /// Media time on a 90 kHz clock. The Go cloud counts tags instead.
    pub timestamp: u32,
    /// The publication.
    pub ssrc: Ssrc,
}

impl Header {
    /// Parses the header of one datagram. Returns it and the range of the payload, which excludes CSRC
    /// list, extension and padding.
    ///
    /// # Errors
    /// If the datagram is not RTP version 2 or is shorter than its header states.
    #[inline]
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

    /// Encodes the header: version 2, without padding, extension or CSRC list.
    #[inline]
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

/// An RTP packet. The payload shares the datagram's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packet {
    /// The fixed header.
    pub header: Header,
    /// Payload without padding.
    pub payload: Bytes,
}

impl Packet {
    /// Parses one datagram. CSRC list, extension and padding are skipped.
    ///
    /// # Errors
    /// See [`Header::parse`].
    #[inline]
    pub fn parse(mut datagram: Bytes) -> Result<Self, PacketError> {
        let (header, payload) = Header::parse(&datagram)?;
        // Reuses the reference: `slice` would increment the reference count.
        datagram.truncate(payload.end);
        datagram.advance(payload.start);
        Ok(Self { header, payload: datagram })
    }
}

/// Error of parsing an RTP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    /// The datagram is shorter than its header states.
    #[error("truncated RTP packet")]
    Truncated,
    /// The version is not 2: a probe message, or not RTP.
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
        fn encoded_header_equals_that_of_the_rtp_crate(
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
        fn any_bytes_parse_as_in_the_rtp_crate(
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
