//! Datagrams of path validation, exchanged between an edge's RTP sockets and the cloud's RTP port.
//!
//! The source address of a datagram can be forged. The cloud therefore answers a probe with a cookie
//! sent to the probe's source, and sends RTP there only after the cookie was returned. This proves
//! return routability, as path validation in QUIC does (RFC 9000 §8.2), and prevents an edge from
//! aiming streams at a victim.
//!
//! | type | direction | content |
//! |---|---|---|
//! | 1 probe | edge → cloud | path u8, the nonce of `welcome`, 16 bytes |
//! | 2 challenge | cloud → edge | path u8, the nonce's first 8 bytes, cookie 8 bytes |
//! | 3 proof | edge → cloud | path u8, nonce 16 bytes, cookie 8 bytes |
//!
//! Each datagram starts with the letters `DP` and the type. The first byte reads as RTP version 1, so
//! that RTP receivers discard it. A challenge is as long as a probe: a probe with a forged source is
//! not amplified.

use bytes::{BufMut, Bytes, BytesMut};

use super::control::Nonce;

/// A datagram of path validation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeMessage {
    /// Edge to cloud: the source address is where the edge receives RTP.
    Probe {
        /// Index of the edge's path, below [`MAX_PATHS`].
        path: u8,
        /// Identifies the edge.
        nonce: Nonce,
    },
    /// Cloud to edge: a request to prove that the edge receives at this address.
    Challenge {
        /// Path of the probe.
        path: u8,
        /// First half of the probe's nonce, which authenticates the cloud.
        nonce_prefix: [u8; NONCE_PREFIX_LEN],
        /// The cookie to return.
        cookie: Cookie,
    },
    /// Edge to cloud: returns the cookie of a challenge.
    Proof {
        /// Path of the challenge.
        path: u8,
        /// Identifies the edge.
        nonce: Nonce,
        /// Cookie of the challenge.
        cookie: Cookie,
    },
}

/// A secret that the cloud sends to an address, and that a proof returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cookie(pub u64);

impl ProbeMessage {
    /// Parses the message at the start of `datagram`. Returns it and the remaining bytes, because one
    /// read may contain several datagrams that the kernel coalesced (UDP GRO).
    ///
    /// # Errors
    /// If the magic, type or path is invalid, or the message is truncated.
    pub fn parse(datagram: &[u8]) -> Result<(Self, &[u8]), ProbeError> {
        let Some((&[m0, m1, kind, path], rest)) = datagram.split_first_chunk::<HEAD_LEN>() else {
            return Err(ProbeError::Truncated);
        };
        if [m0, m1] != MAGIC {
            return Err(ProbeError::Magic);
        }
        if path >= MAX_PATHS {
            return Err(ProbeError::Path(path));
        }
        fn take<const N: usize>(bytes: &[u8]) -> Result<([u8; N], &[u8]), ProbeError> {
            bytes.split_first_chunk().map(|(head, rest)| (*head, rest)).ok_or(ProbeError::Truncated)
        }
        match kind {
            TYPE_PROBE => {
                let (nonce, rest) = take(rest)?;
                Ok((Self::Probe { path, nonce: Nonce(nonce) }, rest))
            }
            TYPE_CHALLENGE => {
                let (nonce_prefix, rest) = take(rest)?;
                let (cookie, rest) = take(rest)?;
                Ok((
                    Self::Challenge {
                        path,
                        nonce_prefix,
                        cookie: Cookie(u64::from_be_bytes(cookie)),
                    },
                    rest,
                ))
            }
            TYPE_PROOF => {
                let (nonce, rest) = take(rest)?;
                let (cookie, rest) = take(rest)?;
                let cookie = Cookie(u64::from_be_bytes(cookie));
                Ok((Self::Proof { path, nonce: Nonce(nonce), cookie }, rest))
            }
            other => Err(ProbeError::UnknownType(other)),
        }
    }

    /// Encodes the datagram: 28 bytes for a proof, 20 for the others.
    pub fn encode(&self) -> Bytes {
        let mut datagram = BytesMut::with_capacity(MAX_LEN);
        datagram.put_slice(&MAGIC);
        match self {
            Self::Probe { path, nonce } => {
                datagram.put_slice(&[TYPE_PROBE, *path]);
                datagram.put_slice(&nonce.0);
            }
            Self::Challenge { path, nonce_prefix, cookie } => {
                datagram.put_slice(&[TYPE_CHALLENGE, *path]);
                datagram.put_slice(nonce_prefix);
                datagram.put_u64(cookie.0);
            }
            Self::Proof { path, nonce, cookie } => {
                datagram.put_slice(&[TYPE_PROOF, *path]);
                datagram.put_slice(&nonce.0);
                datagram.put_u64(cookie.0);
            }
        }
        datagram.freeze()
    }
}

/// Returns the part of a nonce that a challenge repeats.
pub fn nonce_prefix(nonce: &Nonce) -> [u8; NONCE_PREFIX_LEN] {
    let [a, b, c, d, e, f, g, h, ..] = nonce.0;
    [a, b, c, d, e, f, g, h]
}

/// `true` if a datagram starts like a [`ProbeMessage`]; RTP never does.
#[inline]
pub fn is_probe_message(datagram: &[u8]) -> bool {
    datagram.starts_with(&MAGIC)
}

/// Error of parsing a [`ProbeMessage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// Shorter than the type requires.
    #[error("truncated probe message")]
    Truncated,
    /// The magic is missing.
    #[error("not a probe message")]
    Magic,
    /// The type is unknown.
    #[error("unknown probe message type {0}")]
    UnknownType(u8),
    /// The path is not below [`MAX_PATHS`].
    #[error("path {0}; only 0 and 1 exist")]
    Path(u8),
}

/// Paths, and thus proven addresses, per edge.
pub const MAX_PATHS: u8 = 2;
/// Bytes of the nonce that a challenge repeats.
pub const NONCE_PREFIX_LEN: usize = 8;
const MAGIC: [u8; 2] = *b"DP";
const TYPE_PROBE: u8 = 1;
const TYPE_CHALLENGE: u8 = 2;
const TYPE_PROOF: u8 = 3;
/// Magic, type, path.
const HEAD_LEN: usize = 4;
/// Length of a proof, the longest message.
const MAX_LEN: usize = HEAD_LEN + 16 + 8;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_have_the_layout_of_the_wire_document() {
        let nonce = Nonce(std::array::from_fn(|i| i as u8));
        let cookie = Cookie(0xa0a1_a2a3_a4a5_a6a7);
        let to_hex = |message: ProbeMessage| hex::encode(message.encode());
        assert_eq!(
            to_hex(ProbeMessage::Probe { path: 0, nonce }),
            "44500100000102030405060708090a0b0c0d0e0f"
        );
        assert_eq!(
            to_hex(ProbeMessage::Challenge { path: 1, nonce_prefix: nonce_prefix(&nonce), cookie }),
            "445002010001020304050607a0a1a2a3a4a5a6a7"
        );
        assert_eq!(
            to_hex(ProbeMessage::Proof { path: 1, nonce, cookie }),
            "44500301000102030405060708090a0b0c0d0e0fa0a1a2a3a4a5a6a7"
        );
    }

    #[test]
    fn invalid_messages_are_refused_with_a_reason() {
        let parse = |bytes: &[u8]| ProbeMessage::parse(bytes).map(|_| ()).unwrap_err();
        assert_eq!(parse(b""), ProbeError::Truncated);
        assert_eq!(parse(b"0001abcd"), ProbeError::Magic);
        assert_eq!(parse(b"DP\x01\x02"), ProbeError::Path(2));
        assert_eq!(parse(b"DP\x09\x00"), ProbeError::UnknownType(9));
        assert_eq!(parse(b"DP\x01\x00only 15 bytes.."), ProbeError::Truncated);
    }

    fn message() -> impl Strategy<Value = ProbeMessage> {
        (0u8..MAX_PATHS, any::<[u8; 16]>(), any::<u64>(), 0..3).prop_map(
            |(path, nonce, cookie, kind)| {
                let (nonce, cookie) = (Nonce(nonce), Cookie(cookie));
                match kind {
                    0 => ProbeMessage::Probe { path, nonce },
                    1 => {
                        ProbeMessage::Challenge { path, nonce_prefix: nonce_prefix(&nonce), cookie }
                    }
                    _ => ProbeMessage::Proof { path, nonce, cookie },
                }
            },
        )
    }

    proptest! {
        #[test]
        fn coalesced_messages_are_parsed_one_by_one(sent in prop::collection::vec(message(), 1..5)) {
            let bytes: Vec<u8> = sent.iter().flat_map(|message| message.encode()).collect();
            let mut rest = &bytes[..];
            let mut received = Vec::new();
            while !rest.is_empty() {
                let (message, after) = ProbeMessage::parse(rest).unwrap();
                received.push(message);
                rest = after;
            }
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 0u8..5) {
            let mut bytes = bytes;
            for (byte, wanted) in bytes.iter_mut().zip([b'D', b'P', kind]) {
                *byte = wanted;
            }
            if let Ok((message, rest)) = ProbeMessage::parse(&bytes) {
                let read = bytes.len() - rest.len();
                prop_assert_eq!(&message.encode()[..], &bytes[..read]);
                prop_assert_ne!(bytes[0] >> 6, 2, "it reads as RTP version 2");
            }
        }

        /// A forged probe is answered with at most as many bytes.
        #[test]
        fn a_challenge_is_no_longer_than_a_probe(path in 0u8..MAX_PATHS, nonce: [u8; 16], cookie: u64) {
            let nonce = Nonce(nonce);
            let probe = ProbeMessage::Probe { path, nonce }.encode();
            let challenge =
                ProbeMessage::Challenge { path, nonce_prefix: nonce_prefix(&nonce), cookie: Cookie(cookie) };
            prop_assert!(challenge.encode().len() <= probe.len());
        }
    }
}
