//! The RTMP handshake, simple and with digests, for both sides.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0 §5.2 for the simple form. The digest form is
//! not in the specification, but every Flash-era peer implements it: 32 of the random bytes of C1
//! and S1 are an HMAC-SHA256 over the others, at an offset given by four of them, and C2 and S2 are
//! signed under a key derived from the peer's digest. Some players require it, so a server answers
//! a digest with a digest.
//!
//! # States
//! - **greeting**: collects C0 and C1 (client: S0, S1). A version other than 3 is an error at the
//!   first byte.
//! - greeting → **answered**: they are complete; S0, S1 and S2 (client: C2) are queued. Collects C2
//!   (client: S2).
//! - answered → **done**: C2 (S2) is complete. Later input stays untouched.

use bytes::{BufMut, BytesMut};
use rand::RngCore;
use ring::hmac;

/// The server's side: bytes in, bytes out.
#[derive(Debug)]
pub struct ServerHandshake {
    /// Bytes of C0 and C1 received so far; once answered, bytes of C2.
    received: Vec<u8>,
    /// `true` once C1 is complete and S0, S1 and S2 are queued.
    answered: bool,
}

impl ServerHandshake {
    /// A handshake that waits for C0.
    pub fn new() -> Self {
        Self { received: Vec::new(), answered: false }
    }

    /// Consumes `input` and appends the bytes to send to `out`. Returns `true` once the handshake
    /// is done; bytes after C2 stay in `input`.
    ///
    /// # Errors
    /// [`HandshakeError::Version`] if C0 is not version 3, plain RTMP.
    pub fn receive(
        &mut self,
        input: &mut &[u8],
        rng: &mut impl RngCore,
        out: &mut BytesMut,
    ) -> Result<bool, HandshakeError> {
        if !self.answered {
            let Some(c1) = greeting(&mut self.received, input)? else { return Ok(false) };
            out.put_u8(VERSION);
            let mut s1 = random_packet(rng);
            if let Some(c1_digest) = find_digest(c1, CLIENT_KEY) {
                s1[4..8].copy_from_slice(&SERVER_VERSION);
                sign(&mut s1, SERVER_KEY);
                out.put_slice(&s1);
                out.put_slice(&keyed_answer(random_packet(rng), &SERVER_KEY.full(), &c1_digest));
            } else {
                out.put_slice(&s1);
                out.put_slice(c1);
            }
            self.answered = true;
            self.received.clear();
        }
        // C2 is not compared with S1: some encoders send other bytes (owncast #34).
        Ok(fill(&mut self.received, input, PACKET_LEN))
    }
}

impl Default for ServerHandshake {
    fn default() -> Self {
        Self::new()
    }
}

/// The client's side, with digests. A server without digest support takes them for random bytes.
#[derive(Debug)]
pub struct ClientHandshake {
    /// Bytes of S0 and S1 received so far; once answered, bytes of S2.
    received: Vec<u8>,
    /// `true` once S1 is complete and C2 is queued.
    answered: bool,
}

impl ClientHandshake {
    /// Appends C0 and C1 to `out` and returns a handshake that waits for S0.
    pub fn start(rng: &mut impl RngCore, out: &mut BytesMut) -> Self {
        let mut c1 = random_packet(rng);
        c1[4..8].copy_from_slice(&CLIENT_VERSION);
        sign(&mut c1, CLIENT_KEY);
        out.put_u8(VERSION);
        out.put_slice(&c1);
        Self { received: Vec::new(), answered: false }
    }

    /// Consumes `input` and appends the bytes to send to `out`. Returns `true` once the handshake
    /// is done; bytes after S2 stay in `input`.
    ///
    /// # Errors
    /// [`HandshakeError::Version`] if S0 is not version 3.
    pub fn receive(
        &mut self,
        input: &mut &[u8],
        rng: &mut impl RngCore,
        out: &mut BytesMut,
    ) -> Result<bool, HandshakeError> {
        if !self.answered {
            let Some(s1) = greeting(&mut self.received, input)? else { return Ok(false) };
            match find_digest(s1, SERVER_KEY) {
                Some(digest) => {
                    out.put_slice(&keyed_answer(random_packet(rng), &CLIENT_KEY.full(), &digest))
                }
                None => out.put_slice(s1),
            }
            self.answered = true;
            self.received.clear();
        }
        Ok(fill(&mut self.received, input, PACKET_LEN))
    }
}

/// Why a handshake fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The first byte is not 3: an encrypted variant of RTMP, or another protocol.
    #[error("the peer starts with byte {0:#04x}, not with RTMP version 3")]
    Version(u8),
}

/// Length of each of C1, S1, C2 and S2 in bytes.
pub const PACKET_LEN: usize = 1536;

/// Collects C0 and C1 (or S0 and S1) and returns C1 (S1) once it is complete. Checks the version
/// byte at once, so that a peer with another protocol does not hold a connection.
fn greeting<'a>(
    received: &'a mut Vec<u8>,
    input: &mut &[u8],
) -> Result<Option<&'a [u8; PACKET_LEN]>, HandshakeError> {
    if let Some(&version) = received.first().or(input.first())
        && version != VERSION
    {
        return Err(HandshakeError::Version(version));
    }
    fill(received, input, 1 + PACKET_LEN);
    Ok(received.get(1..).and_then(|packet| packet.first_chunk()))
}

/// Moves bytes from `input` to `received` until it has `len`. Returns `true` once it has.
fn fill(received: &mut Vec<u8>, input: &mut &[u8], len: usize) -> bool {
    let (head, rest) = input.split_at(input.len().min(len - received.len()));
    received.extend_from_slice(head);
    *input = rest;
    received.len() == len
}

/// Returns a packet with time 0, version 0 and random bytes.
fn random_packet(rng: &mut impl RngCore) -> [u8; PACKET_LEN] {
    let mut packet = [0; PACKET_LEN];
    rng.fill_bytes(&mut packet[8..]);
    packet
}

/// Returns the digest of a packet signed with `key`, in either layout. A packet with version 0 has
/// no digest.
fn find_digest(packet: &[u8; PACKET_LEN], key: Key) -> Option<[u8; DIGEST_LEN]> {
    if packet[4..8] == [0; 4] {
        return None;
    }
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.name.as_bytes());
    DIGEST_BLOCKS.into_iter().find_map(|block| {
        let at = digest_offset(packet, block);
        let found: [u8; DIGEST_LEN] = packet[at..at + DIGEST_LEN].try_into().ok()?;
        (digest(packet, at, &key) == found).then_some(found)
    })
}

/// Signs a packet, in the layout of current encoders.
fn sign(packet: &mut [u8; PACKET_LEN], key: Key) {
    let at = digest_offset(packet, DIGEST_BLOCKS[0]);
    let key = hmac::Key::new(hmac::HMAC_SHA256, key.name.as_bytes());
    let digest = digest(packet, at, &key);
    packet[at..at + DIGEST_LEN].copy_from_slice(&digest);
}

/// Returns the HMAC of a packet without the 32 bytes at `at`.
fn digest(packet: &[u8; PACKET_LEN], at: usize, key: &hmac::Key) -> [u8; DIGEST_LEN] {
    let mut context = hmac::Context::with_key(key);
    context.update(&packet[..at]);
    context.update(&packet[at + DIGEST_LEN..]);
    bytes_of(context.sign())
}

/// Turns a random packet into C2 or S2: the last 32 bytes become an HMAC over the others, under a
/// key derived from the peer's digest.
fn keyed_answer(
    mut packet: [u8; PACKET_LEN],
    key: &[u8],
    peer_digest: &[u8; DIGEST_LEN],
) -> [u8; PACKET_LEN] {
    let key = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), peer_digest);
    let (random, signature) = packet.split_at_mut(PACKET_LEN - DIGEST_LEN);
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.as_ref()), random);
    signature.copy_from_slice(tag.as_ref());
    packet
}

/// Returns the offset of the digest in the packet, computed from the first four bytes of its block.
fn digest_offset(packet: &[u8; PACKET_LEN], block: usize) -> usize {
    let sum: usize = packet[block..block + 4].iter().map(|&b| usize::from(b)).sum();
    block + 4 + sum % MAX_DIGEST_OFFSET
}

fn bytes_of(tag: hmac::Tag) -> [u8; DIGEST_LEN] {
    let mut bytes = [0; DIGEST_LEN];
    bytes.copy_from_slice(tag.as_ref());
    bytes
}

/// A well-known key. Its name signs C1 and S1; its name and [`KEY_TAIL`] sign C2 and S2.
#[derive(Clone, Copy)]
struct Key {
    name: &'static str,
}

impl Key {
    fn full(self) -> Vec<u8> {
        [self.name.as_bytes(), &KEY_TAIL].concat()
    }
}

const CLIENT_KEY: Key = Key { name: "Genuine Adobe Flash Player 001" };
const SERVER_KEY: Key = Key { name: "Genuine Adobe Flash Media Server 001" };
const KEY_TAIL: [u8; 32] = [
    0xf0, 0xee, 0xc2, 0x4a, 0x80, 0x68, 0xbe, 0xe8, 0x2e, 0x00, 0xd0, 0xd1, 0x02, 0x9e, 0x7e, 0x57,
    0x6e, 0xec, 0x5d, 0x2d, 0x29, 0x80, 0x6f, 0xab, 0x93, 0xb8, 0xe6, 0x36, 0xcf, 0xeb, 0x31, 0xae,
];
const VERSION: u8 = 3;
const CLIENT_VERSION: [u8; 4] = [9, 0, 124, 2];
const SERVER_VERSION: [u8; 4] = [4, 5, 0, 1];
const DIGEST_LEN: usize = 32;
/// Offsets of the digest block in the two layouts: first, or after a key block of 764 bytes.
const DIGEST_BLOCKS: [usize; 2] = [8, 8 + 764];
/// The block of 764 bytes, less 4 bytes of offset and 32 of digest.
const MAX_DIGEST_OFFSET: usize = 764 - 4 - DIGEST_LEN;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    fn rng() -> SmallRng {
        SmallRng::seed_from_u64(7)
    }

    /// Feeds `client` to a server in pieces of `step` bytes. Returns the output and the last
    /// result.
    fn serve(client: &[u8], step: usize) -> (BytesMut, bool) {
        let (mut server, mut out) = (ServerHandshake::new(), BytesMut::new());
        let mut done = false;
        for mut piece in client.chunks(step) {
            assert!(!done);
            done = server.receive(&mut piece, &mut rng(), &mut out).unwrap();
            assert!(piece.is_empty());
        }
        (out, done)
    }

    #[test]
    fn the_server_echoes_the_bytes_of_a_simple_client() {
        let mut c = vec![3];
        c.extend([0u8; 8]);
        c.extend((0..1528u32).map(|i| i as u8));
        c.extend([9; PACKET_LEN]);
        let (out, done) = serve(&c, 100);
        assert!(done);
        assert_eq!(out.len(), 1 + 2 * PACKET_LEN);
        assert_eq!(out[0], 3);
        assert_eq!(&out[1 + PACKET_LEN..], &c[1..1 + PACKET_LEN]);
    }

    #[test]
    fn the_server_answers_digests_of_both_layouts_with_digests() {
        for block in DIGEST_BLOCKS {
            let mut c1 = random_packet(&mut rng());
            c1[4..8].copy_from_slice(&CLIENT_VERSION);
            let at = digest_offset(&c1, block);
            let key = hmac::Key::new(hmac::HMAC_SHA256, CLIENT_KEY.name.as_bytes());
            let signature = digest(&c1, at, &key);
            c1[at..at + DIGEST_LEN].copy_from_slice(&signature);

            let (out, _) = serve(&[&[3][..], &c1].concat(), 4096);
            let s1 = out[1..].first_chunk::<PACKET_LEN>().unwrap();
            assert!(find_digest(s1, SERVER_KEY).is_some());
            let s2 = out[1 + PACKET_LEN..].first_chunk::<PACKET_LEN>().unwrap();
            assert_eq!(keyed_answer(*s2, &SERVER_KEY.full(), &signature), *s2);
        }
    }

    #[test]
    fn a_nonzero_version_without_a_digest_gets_the_simple_form() {
        let mut c1 = random_packet(&mut rng());
        c1[4..8].copy_from_slice(&CLIENT_VERSION);
        let (out, _) = serve(&[&[3][..], &c1].concat(), 1);
        assert_eq!(out[1 + PACKET_LEN..], c1);
    }

    #[test]
    fn another_version_is_refused_at_the_first_byte() {
        for byte in [0, 2, 6, b'G', 0x16] {
            let mut server = ServerHandshake::new();
            let result = server.receive(&mut &[byte][..], &mut rng(), &mut BytesMut::new());
            assert_eq!(result, Err(HandshakeError::Version(byte)));
        }
    }

    proptest! {
        #[test]
        fn client_and_server_finish_at_any_split(
            to_server in 1usize..4000,
            to_client in 1usize..4000,
        ) {
            let (mut up, mut down) = (BytesMut::new(), BytesMut::new());
            let mut client = ClientHandshake::start(&mut rng(), &mut up);
            let mut server = ServerHandshake::new();
            let (mut client_done, mut server_done) = (false, false);
            while !(client_done && server_done) {
                prop_assert!(!(up.is_empty() && down.is_empty()), "both sides wait");
                let sent = up.split_to(up.len().min(to_server));
                server_done |= server.receive(&mut &sent[..], &mut rng(), &mut down).unwrap();
                let sent = down.split_to(down.len().min(to_client));
                client_done |= client.receive(&mut &sent[..], &mut rng(), &mut up).unwrap();
            }
            prop_assert!(up.is_empty() && down.is_empty());
        }

        #[test]
        fn bytes_after_the_handshake_stay_in_the_input(extra in 1usize..100) {
            let mut input = vec![3; 1 + 2 * PACKET_LEN + extra];
            input[5..9].fill(0);
            let mut input = &input[..];
            let mut out = BytesMut::new();
            prop_assert!(ServerHandshake::new().receive(&mut input, &mut rng(), &mut out).unwrap());
            prop_assert_eq!(input.len(), extra);
        }
    }
}
