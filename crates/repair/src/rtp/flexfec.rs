//! FlexFEC repair packets (RFC 8627): the variant with fixed rows and columns (R=0, F=1) over one
//! stream.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |V=2|P|X|CC = 1 |M|     PT      |        sequence number        |
//! |                           timestamp                           |
//! |                   SSRC of the repair stream                   |
//! |                 CSRC: SSRC of the media stream                |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |0|1|P|X|  CC   |M| PT recovery |        length recovery        |
//! |                          TS recovery                          |
//! |            SN base            |  L (columns)  |   D (rows)    |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! :       XOR of the media packets from byte 12 on, zero-padded   :
//! ```

use bytes::{BufMut, Bytes, BytesMut};

use super::{
    Packet, Seq, Ssrc,
    packet::{HEADER_LEN, Header, PacketError},
};

/// The payload type of repair packets: dynamic (RFC 3551 §6), different from the media's.
pub const PAYLOAD_TYPE: u8 = 109;
/// Bytes in front of a repair packet's body: RTP header, one CSRC, FEC header.
pub const OVERHEAD: usize = HEADER_LEN + CSRC_LEN + FEC_HEADER_LEN;

/// The set of media packets that a repair packet protects, relative to its base: L and D of RFC 8627.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protection {
    /// Consecutive packets: L = `count`; D = 0, or 1 if column parity follows.
    Row {
        /// Protected packets, 1..=255.
        count: u8,
        /// `true` if column parity protects the same packets too.
        columns_follow: bool,
    },
    /// Every `stride`th packet: L = `stride`, D = `count`.
    Column {
        /// Distance between protected packets, 1..=255.
        stride: u8,
        /// Protected packets, 2..=255.
        count: u8,
    },
}

impl Protection {
    /// Returns the number of protected packets, 1..=255.
    pub fn count(self) -> usize {
        match self {
            Self::Row { count, .. } | Self::Column { count, .. } => count.into(),
        }
    }

    /// Returns the distance between protected packets, 1..=255.
    pub fn stride(self) -> usize {
        match self {
            Self::Row { .. } => 1,
            Self::Column { stride, .. } => stride.into(),
        }
    }

    /// Returns the distance from the first protected packet to the last, 0..=64,770.
    pub fn span(self) -> usize {
        (self.count() - 1) * self.stride()
    }

    /// `true` if both protect the same packets relative to their base.
    pub fn is_same_set(self, other: Self) -> bool {
        (self.count(), self.stride()) == (other.count(), other.stride())
    }

    fn from_columns_and_rows(columns: u8, rows: u8) -> Option<Self> {
        match (columns, rows) {
            (0, _) => None,
            (count, 0 | 1) => Some(Self::Row { count, columns_follow: rows == 1 }),
            (stride, count) => Some(Self::Column { stride, count }),
        }
    }

    fn columns_and_rows(self) -> [u8; 2] {
        match self {
            Self::Row { count, columns_follow } => [count, columns_follow.into()],
            Self::Column { stride, count } => [stride, count],
        }
    }
}

/// A repair packet. The body shares the datagram's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repair {
    /// Sequence number, timestamp and SSRC of the repair stream. The marker has no meaning.
    pub header: Header,
    /// The protected media stream.
    pub media: Ssrc,
    /// Sequence number of the first protected packet.
    pub base: Seq,
    /// The protected packets.
    pub protection: Protection,
    /// XOR of the protected packets' [`header_word`]s.
    pub word: u64,
    /// XOR of the protected packets' bytes after the fixed header, as long as the longest.
    pub body: Bytes,
}

impl Repair {
    /// `true` if a datagram is RTP with the payload type of repair packets.
    pub fn is_repair_packet(datagram: &[u8]) -> bool {
        matches!(datagram, [b0, b1, ..] if b0 >> 6 == 2 && b1 & 0x7f == PAYLOAD_TYPE)
    }

    /// Parses one datagram.
    ///
    /// # Errors
    /// If it is not RTP, or not FlexFEC with fixed rows and columns over one stream.
    pub fn parse(datagram: Bytes) -> Result<Self, RepairError> {
        let csrcs = datagram.first().map_or(0, |b0| b0 & 0x0f);
        let csrc =
            datagram.get(HEADER_LEN..).and_then(|rest| rest.first_chunk::<CSRC_LEN>()).copied();
        let Packet { header, payload } = Packet::parse(datagram)?;
        if header.payload_type != PAYLOAD_TYPE {
            return Err(RepairError::PayloadType(header.payload_type));
        }
        let (1, Some(csrc)) = (csrcs, csrc) else { return Err(RepairError::Streams(csrcs)) };
        let Some(&[w0, w1, w2, w3, w4, w5, w6, w7, s0, s1, columns, rows]) =
            payload.first_chunk::<FEC_HEADER_LEN>()
        else {
            return Err(PacketError::Truncated.into());
        };
        if w0 & !WITHOUT_VERSION != FIXED {
            return Err(RepairError::Variant(w0 >> 6));
        }
        Ok(Self {
            header,
            media: Ssrc(u32::from_be_bytes(csrc)),
            base: Seq(u16::from_be_bytes([s0, s1])),
            protection: Protection::from_columns_and_rows(columns, rows)
                .ok_or(RepairError::NoColumns)?,
            word: u64::from_be_bytes([w0 & WITHOUT_VERSION, w1, w2, w3, w4, w5, w6, w7]),
            body: payload.slice(FEC_HEADER_LEN..),
        })
    }

    /// Encodes the datagram.
    pub fn encode(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(OVERHEAD + self.body.len());
        bytes.put_slice(&self.encode_headers());
        bytes.put_slice(&self.body);
        bytes.freeze()
    }

    /// Encodes all headers: the datagram up to the body.
    pub fn encode_headers(&self) -> [u8; OVERHEAD] {
        let mut header = self.header.encode();
        header[0] |= 1; // one CSRC
        let mut word = self.word.to_be_bytes();
        word[0] = word[0] & WITHOUT_VERSION | FIXED;
        let mut bytes = [0; OVERHEAD];
        bytes[..12].copy_from_slice(&header);
        bytes[12..16].copy_from_slice(&self.media.0.to_be_bytes());
        bytes[16..24].copy_from_slice(&word);
        bytes[24..26].copy_from_slice(&self.base.0.to_be_bytes());
        bytes[26..].copy_from_slice(&self.protection.columns_and_rows());
        bytes
    }
}

/// Returns the protected fields of a packet's fixed header, in the layout of the FEC header of
/// RFC 8627: P, X, CC, M and PT in place; the length after the fixed header in place of the sequence
/// number; the timestamp. Returns `None` if the packet is shorter than its header or too long.
pub fn header_word(packet: &[u8]) -> Option<u64> {
    let &[b0, b1, _, _, t0, t1, t2, t3, ..] = packet.first_chunk::<HEADER_LEN>()?;
    let [l0, l1] = u16::try_from(packet.len() - HEADER_LEN).ok()?.to_be_bytes();
    Some(u64::from_be_bytes([b0 & WITHOUT_VERSION, b1, l0, l1, t0, t1, t2, t3]))
}

/// Returns the fixed header with this [`header_word`], and the number of bytes that follow it.
pub fn header_from_word(word: u64, seq: Seq, ssrc: Ssrc) -> ([u8; HEADER_LEN], usize) {
    let [b0, b1, l0, l1, t0, t1, t2, t3] = word.to_be_bytes();
    let [s0, s1] = seq.0.to_be_bytes();
    let [c0, c1, c2, c3] = ssrc.0.to_be_bytes();
    let b0 = b0 & WITHOUT_VERSION | 2 << 6;
    let header = [b0, b1, s0, s1, t0, t1, t2, t3, c0, c1, c2, c3];
    (header, u16::from_be_bytes([l0, l1]).into())
}

/// XORs `from` into the start of `into`, which must be at least as long.
pub fn xor(into: &mut [u8], from: &[u8]) {
    debug_assert!(into.len() >= from.len());
    let (into_words, into_rest) = into[..from.len()].as_chunks_mut::<8>();
    let (from_words, from_rest) = from.as_chunks::<8>();
    for (into, from) in into_words.iter_mut().zip(from_words) {
        *into = (u64::from_ne_bytes(*into) ^ u64::from_ne_bytes(*from)).to_ne_bytes();
    }
    for (into, from) in into_rest.iter_mut().zip(from_rest) {
        *into ^= from;
    }
}

/// Error of parsing a repair packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RepairError {
    /// The datagram is not RTP.
    #[error(transparent)]
    Rtp(#[from] PacketError),
    /// The payload type is not that of repair packets.
    #[error("payload type {0} instead of {PAYLOAD_TYPE}")]
    PayloadType(u8),
    /// The packet protects no stream, or more than one.
    #[error("parity over {0} streams instead of one")]
    Streams(u8),
    /// The bits R and F select another variant: a mask, a retransmission, or a reserved one.
    #[error("FlexFEC variant {0:02b} instead of 01")]
    Variant(u8),
    /// L is 0.
    #[error("parity over no packets")]
    NoColumns,
}

const CSRC_LEN: usize = 4;
const FEC_HEADER_LEN: usize = 12;
/// R = 0, F = 1, in place of the RTP version.
const FIXED: u8 = 0x40;
/// Mask of the first byte without the version.
const WITHOUT_VERSION: u8 = 0x3f;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Two packets with 3 and 5 bytes after the header, the marker on the second. The expected parity
    /// was computed by hand.
    #[test]
    fn repair_packet_equals_one_computed_by_hand() {
        let first = [
            0x80, 0x64, 0xfd, 0xe8, 0x00, 0x00, 0x00, 0x5a, 0x11, 0x22, 0x33, 0x44, //
            0x09, 0x01, 0xff,
        ];
        let second = [
            0x80, 0xe4, 0xfd, 0xe9, 0x00, 0x00, 0x0e, 0x10, 0x11, 0x22, 0x33, 0x44, //
            0x08, 0xaf, 0x0f, 0x00, 0x77,
        ];
        let mut body = vec![0; 5];
        xor(&mut body, &first[12..]);
        xor(&mut body, &second[12..]);
        let repair = Repair {
            header: Header {
                marker: false,
                payload_type: PAYLOAD_TYPE,
                seq: Seq(0x0102),
                timestamp: 0x0e10,
                ssrc: Ssrc(0xaabb_ccdd),
            },
            media: Ssrc(0x1122_3344),
            base: Seq(65000),
            protection: Protection::Row { count: 2, columns_follow: false },
            word: header_word(&first).unwrap() ^ header_word(&second).unwrap(),
            body: body.into(),
        };
        let by_hand = [
            // RTP: V=2, CC=1; PT 109; number; timestamp; SSRC; CSRC.
            0x81, 0x6d, 0x01, 0x02, 0x00, 0x00, 0x0e, 0x10, 0xaa, 0xbb, 0xcc, 0xdd, 0x11, 0x22,
            0x33, 0x44, //
            // R=0 F=1 and no P, X, CC; M is 0^1, PT 100^100; length 3^5 = 6; TS 0x5a^0xe10.
            0x40, 0x80, 0x00, 0x06, 0x00, 0x00, 0x0e, 0x4a, //
            // SN base 65000, L = 2, D = 0.
            0xfd, 0xe8, 0x02, 0x00, //
            // 09^08, 01^af, ff^0f, 00, 77.
            0x01, 0xae, 0xf0, 0x00, 0x77,
        ];
        assert_eq!(repair.encode(), by_hand[..]);
        assert_eq!(Repair::parse(Bytes::copy_from_slice(&by_hand)), Ok(repair));
    }

    #[test]
    fn l_and_d_select_rows_or_columns() {
        let row = |count, columns_follow| Some(Protection::Row { count, columns_follow });
        for (columns, rows, protection) in [
            (0, 0, None),
            (0, 5, None),
            (10, 0, row(10, false)),
            (10, 1, row(10, true)),
            (10, 2, Some(Protection::Column { stride: 10, count: 2 })),
            (255, 255, Some(Protection::Column { stride: 255, count: 255 })),
        ] {
            assert_eq!(Protection::from_columns_and_rows(columns, rows), protection);
            if let Some(protection) = protection {
                assert_eq!(protection.columns_and_rows(), [columns, rows]);
            }
        }
        let most = Protection::Column { stride: 255, count: 255 };
        assert_eq!((most.count(), most.stride(), most.span()), (255, 255, 64_770));
    }

    #[test]
    fn invalid_packets_are_refused_with_a_reason() {
        let good = {
            let mut bytes = vec![0x81, PAYLOAD_TYPE];
            bytes.resize(16, 7);
            bytes.extend([0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0]);
            bytes
        };
        let parse = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Repair::parse(bytes.into()).err()
        };
        assert_eq!(parse(0, 0x81), None);
        assert_eq!(parse(0, 0x41), Some(RepairError::Rtp(PacketError::Version(1))));
        assert_eq!(parse(1, 100), Some(RepairError::PayloadType(100)));
        assert_eq!(parse(0, 0x80), Some(RepairError::Streams(0)));
        assert_eq!(parse(0, 0x82), Some(RepairError::Streams(2)));
        assert_eq!(parse(16, 0x00), Some(RepairError::Variant(0)));
        assert_eq!(parse(16, 0xc0), Some(RepairError::Variant(3)));
        assert_eq!(parse(26, 0), Some(RepairError::NoColumns));
        for len in 0..good.len() {
            assert!(Repair::parse(Bytes::copy_from_slice(&good[..len])).is_err(), "{len}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_round_trip(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..80), likely: bool,
        ) {
            if likely && bytes.len() > 16 {
                (bytes[0], bytes[1]) = (0x81, bytes[1] & 0x80 | PAYLOAD_TYPE);
                bytes[16] = bytes[16] & WITHOUT_VERSION | FIXED;
            }
            let bytes = Bytes::from(bytes);
            if let Ok(repair) = Repair::parse(bytes.clone()) {
                prop_assert!(Repair::is_repair_packet(&bytes));
                prop_assert!(repair.body.len() + OVERHEAD <= bytes.len());
                prop_assert_eq!(Repair::parse(repair.encode()), Ok(repair.clone()));
                if bytes[0] == 0x81 {
                    prop_assert_eq!(repair.encode(), bytes);
                }
            }
        }

        #[test]
        fn xor_is_its_own_inverse(
            into in proptest::collection::vec(any::<u8>(), 40..80),
            from in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut bytes = into.clone();
            xor(&mut bytes, &from);
            for (at, byte) in bytes.iter().enumerate() {
                prop_assert_eq!(*byte, into[at] ^ from.get(at).copied().unwrap_or(0));
            }
            xor(&mut bytes, &from);
            prop_assert_eq!(bytes, into);
        }

        #[test]
        fn a_header_is_restored_from_its_word(bytes in proptest::collection::vec(any::<u8>(), 12..60)) {
            let mut packet = bytes;
            packet[0] = packet[0] & WITHOUT_VERSION | 0x80;
            let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
            let ssrc = Ssrc(u32::from_be_bytes(packet[8..12].try_into().unwrap()));
            let (header, rest) = header_from_word(header_word(&packet).unwrap(), seq, ssrc);
            prop_assert_eq!(&header[..], &packet[..12]);
            prop_assert_eq!(rest, packet.len() - 12);
        }
    }
}
