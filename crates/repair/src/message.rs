//! The datagrams of `downpour/1`: asking for packets, sending them again, saying what is gone.
//!
//! A datagram may also be the whole content of a unidirectional stream, for what does not fit the
//! path's datagram size. All numbers are big-endian.
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
    /// Edge to cloud: send these packets again.
    Nack(Nack),
    /// Cloud to edge: one whole RTP packet, sent again.
    Repair(Bytes),
    /// Cloud to edge: these are no longer held, or were never sent.
    Gone(Gone),
    /// Cloud to edge: how far streams have come, so that a lost tail shows.
    Heartbeats(Vec<Heartbeat>),
}

impl Message {
    /// The longest datagram, in bytes: it bounds what one nack can ask for, 8670 packets.
    pub const MAX_LEN: usize = 2048;

    /// Reads one datagram. Never panics; what it allocates is bounded by [`Message::MAX_LEN`].
    ///
    /// # Errors
    /// If the datagram is too long, of an unknown type, or not laid out as its type says.
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
                match beats.as_chunks::<BEAT_LEN>() {
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
    /// How many copies of each packet to send, a few milliseconds apart: 1..=[`Nack::MAX_COPIES`].
    pub copies: u8,
    /// How much later than this the first of the packets is of no use any more, in milliseconds, as
    /// the edge reckons it: what comes then should not have been sent.
    pub slack_ms: u16,
    /// The packets asked for, in the order of urgency.
    pub seqs: Vec<Seq>,
}

impl Nack {
    /// The most copies that may be asked for: a limit on what a nack can amplify.
    pub const MAX_COPIES: u8 = 3;

    /// Datagrams of at most `max_len` bytes that together ask for all of [`Nack::seqs`].
    /// `copies` outside its range is brought into it; no sequence number, no datagram.
    pub fn encode(&self, max_len: usize) -> Vec<Bytes> {
        let copies = self.copies.clamp(1, Self::MAX_COPIES);
        let slack = self.slack_ms.to_be_bytes();
        encode_pairs([TYPE_NACK, copies], self.ssrc, &slack, &self.seqs, max_len)
    }
}

/// Packets of one stream that cannot be sent again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// The stream, which may be unknown to the sender of this.
    pub ssrc: Ssrc,
    /// The packets that were asked for in vain.
    pub seqs: Vec<Seq>,
}

impl Gone {
    /// Datagrams of at most `max_len` bytes that together name all of [`Gone::seqs`].
    pub fn encode(&self, max_len: usize) -> Vec<Bytes> {
        encode_pairs([TYPE_GONE, 0], self.ssrc, &[], &self.seqs, max_len)
    }
}

/// How far a stream has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heartbeat {
    /// The stream.
    pub ssrc: Ssrc,
    /// The newest sequence number sent.
    pub last: Seq,
}

impl Heartbeat {
    /// Datagrams of at most `max_len` bytes each, or of one heartbeat where that is less.
    pub fn encode(beats: &[Self], max_len: usize) -> impl Iterator<Item = Bytes> {
        let room = max_len.min(Message::MAX_LEN).saturating_sub(2);
        beats.chunks((room / BEAT_LEN).max(1)).map(|beats| {
            let mut datagram = BytesMut::with_capacity(2 + beats.len() * BEAT_LEN);
            datagram.put_slice(&[TYPE_HEARTBEAT, 0]);
            for Self { ssrc, last } in beats {
                datagram.put_u32(ssrc.0);
                datagram.put_u16(last.0);
            }
            datagram.freeze()
        })
    }
}

impl From<[u8; BEAT_LEN]> for Heartbeat {
    fn from([s0, s1, s2, s3, l0, l1]: [u8; BEAT_LEN]) -> Self {
        let ssrc = Ssrc(u32::from_be_bytes([s0, s1, s2, s3]));
        Self { ssrc, last: Seq(u16::from_be_bytes([l0, l1])) }
    }
}

/// The `repair` datagram around an RTP packet, which it copies.
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
    /// Bit i says that `pid + i + 1` is meant too.
    pub blp: u16,
}

impl Pair {
    /// Packs sequence numbers, keeping their order as far as pairs can: a number joins the last
    /// pair if it is up to 16 after that pair's first, across the wrap too, else begins a new one.
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

    /// The sequence numbers meant, first to last.
    pub fn seqs(self) -> impl Iterator<Item = Seq> {
        std::iter::once(self.pid).chain(
            (0..16)
                .filter(move |bit| self.blp & (1 << bit) != 0)
                .map(move |bit| self.pid.plus(bit + 1)),
        )
    }
}

/// Why bytes are not a datagram of `downpour/1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    /// Nothing at all.
    #[error("an empty datagram")]
    Empty,
    /// Longer than [`Message::MAX_LEN`].
    #[error("a datagram of {0} bytes is over the {max} allowed", max = Message::MAX_LEN)]
    TooLong(usize),
    /// A first byte that means nothing.
    #[error("unknown datagram type {0}")]
    UnknownType(u8),
    /// Not the length that the type needs.
    #[error("the datagram's length does not fit its type")]
    Truncated,
    /// A copy count outside 1..=3.
    #[error("a nack for {0} copies, when 1 to 3 may be asked for")]
    Copies(u8),
}

/// The byte after the type, the SSRC, and what follows.
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
    more: &[u8],
    seqs: &[Seq],
    max_len: usize,
) -> Vec<Bytes> {
    let head_len = HEAD_LEN + more.len();
    let per_datagram = (max_len.min(Message::MAX_LEN).saturating_sub(head_len) / PAIR_LEN).max(1);
    Pair::pack(seqs)
        .chunks(per_datagram)
        .map(|pairs| {
            let mut datagram = BytesMut::with_capacity(head_len + pairs.len() * PAIR_LEN);
            datagram.put_slice(&head);
            datagram.put_u32(ssrc.0);
            datagram.put_slice(more);
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
/// Type, copies or reserved, SSRC.
const HEAD_LEN: usize = 6;
const PAIR_LEN: usize = 4;
/// SSRC, sequence number.
const BEAT_LEN: usize = 6;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_nack_is_laid_out_as_rfc_4585_says() {
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
    fn what_is_not_a_datagram_says_why() {
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
    fn the_small_ones_survive_the_trip() {
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
        fn any_numbers_in_any_order_come_through(
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
        fn a_run_takes_a_seventeenth_of_the_pairs(first: u16, len in 1usize..2000) {
            let seqs: Vec<_> = (0..len).map(|i| Seq(first).plus(i)).collect();
            let pairs = Pair::pack(&seqs);
            prop_assert_eq!(pairs.len(), len.div_ceil(17));
            let back: Vec<_> = pairs.into_iter().flat_map(Pair::seqs).collect();
            prop_assert_eq!(back, seqs);
        }

        #[test]
        fn parsing_is_total(bytes in prop::collection::vec(any::<u8>(), 0..2100), kind in 0u8..6) {
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
