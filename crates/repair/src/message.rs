//! The datagrams of `downpour/1`: requests for packets, repairs, refusals and heartbeats.
//!
//! A message that exceeds the path's datagram size is sent as the whole content of a unidirectional
//! stream instead. All numbers are big-endian.
//!
//! | type | then |
//! |---|---|
//! | 1 `nack` | copies u8 (1..=3), ssrc u32, slack u16, one or more pairs |
//! | 2 `repair` | one whole RTP packet |
//! | 3 `gone` | reserved u8, ssrc u32, one or more pairs |
//! | 4 `heartbeat` | reserved u8, one or more of: ssrc u32, last sequence number u16 |
//!
//! A pair is PID u16, BLP u16 as in a generic NACK (RFC 4585 §6.2.1): a sequence number, and a bit
//! for each of the sixteen that follow it.

use bytes::{BufMut, Bytes, BytesMut};

use crate::rtp::{Seq, Ssrc, packet::HEADER_LEN};

/// One parsed datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Edge to cloud: a request to send packets again.
    Nack(Nack),
    /// Cloud to edge: one whole RTP packet, sent again.
    Repair(Bytes),
    /// Cloud to edge: packets that the cloud no longer holds or never sent.
    Gone(Gone),
    /// Cloud to edge: newest sequence numbers, which reveal loss at the tail of a stream.
    Heartbeats(Vec<Heartbeat>),
}

impl Message {
    /// The longest datagram, in bytes. It limits one nack to 8670 packets.
    pub const MAX_LEN: usize = 2048;

    /// Parses one datagram. Allocation is bounded by [`Message::MAX_LEN`].
    ///
    /// # Errors
    /// If the datagram is empty, too long, of an unknown type, or malformed for its type.
    pub fn parse(datagram: Bytes) -> Result<Self, MessageError> {
        if datagram.len() > Self::MAX_LEN {
            return Err(MessageError::TooLong(datagram.len()));
        }
        let Some((&kind, rest)) = datagram.split_first() else { return Err(MessageError::Empty) };
        match kind {
            TYPE_NACK => {
                let (copies, ssrc, rest) = split_head(rest)?;
                let Some((slack, pairs)) = rest.split_first_chunk::<2>() else {
                    return Err(MessageError::Truncated);
                };
                if !(1..=Nack::MAX_COPIES).contains(&copies) {
                    return Err(MessageError::Copies(copies));
                }
                let slack_ms = u16::from_be_bytes(*slack);
                Ok(Self::Nack(Nack { ssrc, copies, slack_ms, seqs: parse_pairs(pairs)? }))
            }
            TYPE_REPAIR if rest.len() < HEADER_LEN => Err(MessageError::Truncated),
            TYPE_REPAIR => Ok(Self::Repair(datagram.slice(1..))),
            TYPE_GONE => {
                let (_, ssrc, pairs) = split_head(rest)?;
                Ok(Self::Gone(Gone { ssrc, seqs: parse_pairs(pairs)? }))
            }
            TYPE_HEARTBEAT => {
                let Some((_, beats)) = rest.split_first() else {
                    return Err(MessageError::Truncated);
                };
                match beats.as_chunks::<HEARTBEAT_LEN>() {
                    ([], _) | (_, [_, ..]) => Err(MessageError::Truncated),
                    (beats, []) => {
                        Ok(Self::Heartbeats(beats.iter().copied().map(Heartbeat::from).collect()))
                    }
                }
            }
            _ => Err(MessageError::UnknownType(kind)),
        }
    }
}

/// A request for packets of one stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nack {
    /// The stream.
    pub ssrc: Ssrc,
    /// Copies of each packet to send, a few milliseconds apart: 1..=[`Nack::MAX_COPIES`].
    pub copies: u8,
    /// Time until the edge gives up the first of the packets, in milliseconds from when the nack was
    /// sent. A repair that would arrive later should not be sent.
    pub slack_ms: u16,
    /// The packets requested, most urgent first.
    pub seqs: Vec<Seq>,
}

impl Nack {
    /// The most copies that may be requested: bounds the amplification of a nack.
    pub const MAX_COPIES: u8 = 3;

    /// Returns datagrams of at most `max_len` bytes that together request all of [`Nack::seqs`].
    /// `copies` is clamped to its range. Returns none if there is no sequence number.
    pub fn encode(&self, max_len: usize) -> Vec<Bytes> {
        let copies = self.copies.clamp(1, Self::MAX_COPIES);
        let slack = self.slack_ms.to_be_bytes();
        encode_pairs([TYPE_NACK, copies], self.ssrc, &slack, &self.seqs, max_len)
    }
}

/// Packets of one stream that cannot be sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// The stream; the cloud may not know it.
    pub ssrc: Ssrc,
    /// The packets that were requested and cannot be sent.
    pub seqs: Vec<Seq>,
}

impl Gone {
    /// Returns datagrams of at most `max_len` bytes that together name all of [`Gone::seqs`].
    pub fn encode(&self, max_len: usize) -> Vec<Bytes> {
        encode_pairs([TYPE_GONE, 0], self.ssrc, &[], &self.seqs, max_len)
    }
}

/// The position of one stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// The stream.
    pub ssrc: Ssrc,
    /// The newest sequence number sent.
    pub last: Seq,
}

impl Heartbeat {
    /// Returns datagrams of at most `max_len` bytes, each with at least one heartbeat.
    pub fn encode(beats: &[Self], max_len: usize) -> impl Iterator<Item = Bytes> {
        let available = max_len.min(Message::MAX_LEN).saturating_sub(2);
        beats.chunks((available / HEARTBEAT_LEN).max(1)).map(|beats| {
            let mut datagram = BytesMut::with_capacity(2 + beats.len() * HEARTBEAT_LEN);
            datagram.put_slice(&[TYPE_HEARTBEAT, 0]);
            for Self { ssrc, last } in beats {
                datagram.put_u32(ssrc.0);
                datagram.put_u16(last.0);
            }
            datagram.freeze()
        })
    }
}

impl From<[u8; HEARTBEAT_LEN]> for Heartbeat {
    fn from([s0, s1, s2, s3, l0, l1]: [u8; HEARTBEAT_LEN]) -> Self {
        let ssrc = Ssrc(u32::from_be_bytes([s0, s1, s2, s3]));
        Self { ssrc, last: Seq(u16::from_be_bytes([l0, l1])) }
    }
}

/// Returns the `repair` datagram with a copy of an RTP packet.
pub fn encode_repair(packet: &[u8]) -> Bytes {
    let mut datagram = BytesMut::with_capacity(1 + packet.len());
    datagram.put_u8(TYPE_REPAIR);
    datagram.put_slice(packet);
    datagram.freeze()
}

/// One PID and BLP (RFC 4585 §6.2.1): up to 17 sequence numbers in 4 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// A sequence number.
    pub pid: Seq,
    /// Bit i includes `pid + i + 1`.
    pub blp: u16,
}

impl Pair {
    /// Packs sequence numbers and keeps their order as far as pairs allow. A number joins the last
    /// pair if it is at most 16 after that pair's PID (modulo 2^16), and starts a new one otherwise.
    pub fn pack(seqs: &[Seq]) -> Vec<Self> {
        let mut pairs: Vec<Self> = Vec::new();
        for &seq in seqs {
            let ahead = pairs.last().map(|pair| seq.distance_from(pair.pid));
            match (pairs.last_mut(), ahead) {
                (Some(_), Some(0)) => {}
                (Some(pair), Some(ahead @ 1..=16)) => pair.blp |= 1 << (ahead - 1),
                _ => pairs.push(Self { pid: seq, blp: 0 }),
            }
        }
        pairs
    }

    /// Returns the sequence numbers of the pair, in ascending order.
    pub fn seqs(self) -> impl Iterator<Item = Seq> {
        std::iter::once(self.pid).chain(
            (0..16)
                .filter(move |bit| self.blp & (1 << bit) != 0)
                .map(move |bit| self.pid.plus(bit + 1)),
        )
    }
}

/// Error of parsing a datagram of `downpour/1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// The datagram is empty.
    #[error("empty datagram")]
    Empty,
    /// The datagram is longer than [`Message::MAX_LEN`].
    #[error("datagram of {0} bytes; at most {max} are allowed", max = Message::MAX_LEN)]
    TooLong(usize),
    /// The first byte is not a known type.
    #[error("unknown datagram type {0}")]
    UnknownType(u8),
    /// The length does not match the type.
    #[error("datagram length does not match its type")]
    Truncated,
    /// The copy count of a nack is outside 1..=3.
    #[error("nack for {0} copies; 1 to 3 are allowed")]
    Copies(u8),
}

/// Splits off the byte after the type and the SSRC. Returns both and the rest.
fn split_head(rest: &[u8]) -> Result<(u8, Ssrc, &[u8]), MessageError> {
    match rest {
        [flag, s0, s1, s2, s3, tail @ ..] => {
            Ok((*flag, Ssrc(u32::from_be_bytes([*s0, *s1, *s2, *s3])), tail))
        }
        _ => Err(MessageError::Truncated),
    }
}

fn parse_pairs(bytes: &[u8]) -> Result<Vec<Seq>, MessageError> {
    let (pairs, []) = bytes.as_chunks::<PAIR_LEN>() else { return Err(MessageError::Truncated) };
    if pairs.is_empty() {
        return Err(MessageError::Truncated);
    }
    Ok(pairs
        .iter()
        .flat_map(|&[p0, p1, b0, b1]| {
            Pair { pid: Seq(u16::from_be_bytes([p0, p1])), blp: u16::from_be_bytes([b0, b1]) }
                .seqs()
        })
        .collect())
}

fn encode_pairs(
    head: [u8; 2],
    ssrc: Ssrc,
    fixed: &[u8],
    seqs: &[Seq],
    max_len: usize,
) -> Vec<Bytes> {
    let head_len = HEAD_LEN + fixed.len();
    let per_datagram = (max_len.min(Message::MAX_LEN).saturating_sub(head_len) / PAIR_LEN).max(1);
    Pair::pack(seqs)
        .chunks(per_datagram)
        .map(|pairs| {
            let mut datagram = BytesMut::with_capacity(head_len + pairs.len() * PAIR_LEN);
            datagram.put_slice(&head);
            datagram.put_u32(ssrc.0);
            datagram.put_slice(fixed);
            for pair in pairs {
                datagram.put_u16(pair.pid.0);
                datagram.put_u16(pair.blp);
            }
            datagram.freeze()
        })
        .collect()
}

const TYPE_NACK: u8 = 1;
const TYPE_REPAIR: u8 = 2;
const TYPE_GONE: u8 = 3;
const TYPE_HEARTBEAT: u8 = 4;
/// Type, copies or reserved byte, SSRC.
const HEAD_LEN: usize = 6;
const PAIR_LEN: usize = 4;
/// SSRC, sequence number.
const HEARTBEAT_LEN: usize = 6;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nack_has_the_layout_of_rfc_4585() {
        let seqs = [65534, 65535, 0, 14, 15].map(Seq).to_vec();
        let nack = Nack { ssrc: Ssrc(0x0a0b_0c0d), copies: 2, slack_ms: 0x0190, seqs };
        let datagrams = nack.encode(1200);
        assert_eq!(
            datagrams,
            [Bytes::from_static(&[
                1, 2, 0x0a, 0x0b, 0x0c, 0x0d, 0x01, 0x90, 0xff, 0xfe, 0x80, 0x03, 0, 15, 0, 0
            ])]
        );
        assert_eq!(Message::parse(datagrams[0].clone()), Ok(Message::Nack(nack)));
    }

    #[test]
    fn malformed_datagrams_are_refused_with_a_reason() {
        let parse = |bytes: &'static [u8]| Message::parse(Bytes::from_static(bytes));
        assert_eq!(parse(&[]), Err(MessageError::Empty));
        assert_eq!(parse(&[9]), Err(MessageError::UnknownType(9)));
        assert_eq!(parse(&[1, 1, 0, 0, 0, 1, 0, 9]), Err(MessageError::Truncated));
        assert_eq!(parse(&[1, 1, 0, 0, 0, 1, 0, 9, 0, 1, 0]), Err(MessageError::Truncated));
        assert_eq!(parse(&[1, 0, 0, 0, 0, 1, 0, 9, 0, 1, 0, 0]), Err(MessageError::Copies(0)));
        assert_eq!(parse(&[1, 4, 0, 0, 0, 1, 0, 9, 0, 1, 0, 0]), Err(MessageError::Copies(4)));
        assert_eq!(parse(&[2, 0x80, 100]), Err(MessageError::Truncated));
        assert_eq!(parse(&[4, 0, 0, 0, 0, 1, 0]), Err(MessageError::Truncated));
        assert_eq!(
            Message::parse(Bytes::from(vec![2; Message::MAX_LEN + 1])),
            Err(MessageError::TooLong(Message::MAX_LEN + 1))
        );
    }

    #[test]
    fn heartbeats_and_repairs_round_trip() {
        let beats = [7, 8, 9].map(|ssrc| Heartbeat { ssrc: Ssrc(ssrc), last: Seq(65000) });
        for (max_len, lens) in [(1200, vec![20]), (14, vec![14, 8]), (0, vec![8; 3])] {
            let datagrams: Vec<_> = Heartbeat::encode(&beats, max_len).collect();
            assert_eq!(datagrams.iter().map(Bytes::len).collect::<Vec<_>>(), lens);
            let parsed = datagrams.into_iter().map(|datagram| match Message::parse(datagram) {
                Ok(Message::Heartbeats(beats)) => beats,
                other => panic!("heartbeats became {other:?}"),
            });
            assert_eq!(parsed.collect::<Vec<_>>().concat(), beats);
        }
        for cut in [&[4][..], &[4, 0], &[4, 0, 1, 2, 3, 4, 5], &[4, 0, 1, 2, 3, 4, 5, 6, 7]] {
            assert_eq!(Message::parse(Bytes::from_static(cut)), Err(MessageError::Truncated));
        }
        let packet = Bytes::from_static(b"\x80\x64 twelve bytes or more");
        assert_eq!(Message::parse(encode_repair(&packet)), Ok(Message::Repair(packet)));
    }

    proptest! {
        #[test]
        fn any_sequence_numbers_in_any_order_round_trip(
            seqs in prop::collection::vec(any::<u16>().prop_map(Seq), 0..600),
            near in prop::collection::vec((65500u16..=65535).prop_map(Seq), 0..60),
            max_len in 0usize..1500,
            ssrc: u32,
        ) {
            let seqs = [seqs, near].concat();
            let gone = Gone { ssrc: Ssrc(ssrc), seqs: seqs.clone() };
            let mut back = HashSet::new();
            for datagram in gone.encode(max_len) {
                prop_assert!(datagram.len() <= max_len.max(HEAD_LEN + PAIR_LEN));
                match Message::parse(datagram) {
                    Ok(Message::Gone(part)) => back.extend(part.seqs.into_iter().map(|s| s.0)),
                    other => prop_assert!(false, "{other:?}"),
                }
            }
            prop_assert_eq!(back, seqs.into_iter().map(|s| s.0).collect::<HashSet<_>>());
        }

        #[test]
        fn consecutive_numbers_take_one_pair_per_17(first: u16, len in 1usize..2000) {
            let seqs: Vec<_> = (0..len).map(|i| Seq(first).plus(i)).collect();
            let pairs = Pair::pack(&seqs);
            prop_assert_eq!(pairs.len(), len.div_ceil(17));
            let back: Vec<_> = pairs.into_iter().flat_map(Pair::seqs).collect();
            prop_assert_eq!(back, seqs);
        }

        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..2100), kind in 0u8..6) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            let most = bytes.len().div_ceil(PAIR_LEN) * 17;
            if let Ok(Message::Nack(Nack { seqs, .. }) | Message::Gone(Gone { seqs, .. })) =
                Message::parse(bytes.into())
            {
                prop_assert!(!seqs.is_empty() && seqs.len() <= most);
            }
        }
    }
}
