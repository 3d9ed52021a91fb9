//! The datagrams with which an edge proves that RTP may be sent to an address: from its RTP sockets
//! to the cloud's RTP port and back.
//!
//! Who sends from an address need not own it. So the cloud answers a probe with a cookie to the
//! address that the probe came from, and sends RTP there only when the cookie comes back: return
//! routability, as in the path validation of QUIC (RFC 9000 §8.2). Without it an edge could aim
//! streams at somebody else.
//!
//! | type | direction | then |
//! |---|---|---|
//! | 1 probe | edge → cloud | path u8, the nonce of `welcome`, 16 bytes |
//! | 2 challenge | cloud → edge | path u8, the nonce's first 8 bytes, cookie 8 bytes |
//! | 3 proof | edge → cloud | path u8, nonce 16 bytes, cookie 8 bytes |
//!
//! Each begins with the letters `DP`, whose first byte says RTP version 1, and the type. A challenge
//! is as long as a probe, so that a probe with a forged source is not made larger.

use bytes::{BufMut, Bytes, BytesMut};

use super::control::Nonce;

/// One of the three datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeMessage {
    /// Edge to cloud: this is where I take RTP.
    Probe {
        /// Which of the edge's paths, below [`MAX_PATHS`].
        path: u8,
        /// Which edge.
        nonce: Nonce,
    },
    /// Cloud to edge: show that you get what is sent there.
    Challenge {
        /// The probe's.
        path: u8,
        /// The first half of the probe's nonce: the edge knows by it that the cloud answers.
        mark: [u8; MARK_LEN],
        /// To be sent back.
        cookie: Cookie,
    },
    /// Edge to cloud: I do.
    Proof {
        /// The challenge's.
        path: u8,
        /// Which edge.
        nonce: Nonce,
        /// The challenge's.
        cookie: Cookie,
    },
}

/// What the cloud wants back from an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cookie(pub u64);

impl ProbeMessage {
    /// Reads the message at the start of `datagram` and gives what follows it: one read may bring
    /// several datagrams of a sender that the kernel has put together (UDP GRO).
    ///
    /// # Errors
    /// If it is none of the three, or cut short.
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
                let (mark, rest) = take(rest)?;
                let (cookie, rest) = take(rest)?;
                Ok((
                    Self::Challenge { path, mark, cookie: Cookie(u64::from_be_bytes(cookie)) },
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

    /// The datagram: 20 bytes, a proof 28.
    pub fn encode(&self) -> Bytes {
        let mut datagram = BytesMut::with_capacity(MAX_LEN);
        datagram.put_slice(&MAGIC);
        match self {
            Self::Probe { path, nonce } => {
                datagram.put_slice(&[TYPE_PROBE, *path]);
                datagram.put_slice(&nonce.0);
            }
            Self::Challenge { path, mark, cookie } => {
                datagram.put_slice(&[TYPE_CHALLENGE, *path]);
                datagram.put_slice(mark);
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

/// The part of a nonce that a challenge repeats.
pub fn mark(nonce: &Nonce) -> [u8; MARK_LEN] {
    let [a, b, c, d, e, f, g, h, ..] = nonce.0;
    [a, b, c, d, e, f, g, h]
}

/// Whether a datagram is one of these and no RTP.
pub fn is_probe_message(datagram: &[u8]) -> bool {
    datagram.starts_with(&MAGIC)
}

/// Why bytes are none of the three datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ProbeError {
    /// Shorter than its type needs.
    #[error("a probe message that is cut short")]
    Truncated,
    /// Something else.
    #[error("no probe message")]
    Magic,
    /// A type that means nothing.
    #[error("unknown probe message {0}")]
    UnknownType(u8),
    /// An edge has at most [`MAX_PATHS`].
    #[error("path {0}, when there are 0 and 1")]
    Path(u8),
}

/// Addresses that one edge may prove.
pub const MAX_PATHS: u8 = 2;
/// Bytes of a nonce that a challenge repeats.
pub const MARK_LEN: usize = 8;
const MAGIC: [u8; 2] = *b"DP";
const TYPE_PROBE: u8 = 1;
const TYPE_CHALLENGE: u8 = 2;
const TYPE_PROOF: u8 = 3;
/// Magic, type, path.
const HEAD_LEN: usize = 4;
/// Of a proof, the longest.
const MAX_LEN: usize = HEAD_LEN + 16 + 8;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn they_are_laid_out_as_the_wire_document_says() {
        let nonce = Nonce(std::array::from_fn(|i| i as u8));
        let cookie = Cookie(0xa0a1_a2a3_a4a5_a6a7);
        let hex = |message: ProbeMessage| -> String {
            message.encode().iter().map(|byte| format!("{byte:02x}")).collect()
        };
        assert_eq!(
            hex(ProbeMessage::Probe { path: 0, nonce }),
            "44500100000102030405060708090a0b0c0d0e0f"
        );
        assert_eq!(
            hex(ProbeMessage::Challenge { path: 1, mark: mark(&nonce), cookie }),
            "445002010001020304050607a0a1a2a3a4a5a6a7"
        );
        assert_eq!(
            hex(ProbeMessage::Proof { path: 1, nonce, cookie }),
            "44500301000102030405060708090a0b0c0d0e0fa0a1a2a3a4a5a6a7"
        );
    }

    #[test]
    fn what_is_none_says_why() {
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
                    1 => ProbeMessage::Challenge { path, mark: mark(&nonce), cookie },
                    _ => ProbeMessage::Proof { path, nonce, cookie },
                }
            },
        )
    }

    proptest! {
        #[test]
        fn several_in_one_read_come_apart_again(sent in prop::collection::vec(message(), 1..5)) {
            let bytes: Vec<u8> = sent.iter().flat_map(|message| message.encode()).collect();
            let mut rest = &bytes[..];
            let mut came = Vec::new();
            while !rest.is_empty() {
                let (message, after) = ProbeMessage::parse(rest).unwrap();
                came.push(message);
                rest = after;
            }
            prop_assert_eq!(came, sent);
        }

        #[test]
        fn parsing_is_total(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 0u8..5) {
            let mut bytes = bytes;
            for (byte, wanted) in bytes.iter_mut().zip([b'D', b'P', kind]) {
                *byte = wanted;
            }
            if let Ok((message, rest)) = ProbeMessage::parse(&bytes) {
                let read = bytes.len() - rest.len();
                prop_assert_eq!(&message.encode()[..], &bytes[..read]);
                prop_assert_ne!(bytes[0] >> 6, 2, "it looks like RTP");
            }
        }

        /// A forged probe brings its victim no more bytes than it cost.
        #[test]
        fn a_challenge_is_no_longer_than_a_probe(path in 0u8..MAX_PATHS, nonce: [u8; 16], cookie: u64) {
            let nonce = Nonce(nonce);
            let probe = ProbeMessage::Probe { path, nonce }.encode();
            let challenge =
                ProbeMessage::Challenge { path, mark: mark(&nonce), cookie: Cookie(cookie) };
            prop_assert!(challenge.encode().len() <= probe.len());
        }
    }
}
