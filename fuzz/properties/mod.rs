//! What must hold for any bytes: each property takes an input and panics if it does not hold.
//!
//! The targets of `fuzz/fuzz_targets` search for an input that breaks one; `tests/fuzz_corpus.rs`
//! holds them to the committed corpus. They use Downpour's public API only.
#![allow(dead_code, reason = "each fuzz target uses one property")]

pub mod amf0;
pub mod config;
pub mod flv;
pub mod memory;
pub mod repair_control;
pub mod repair_datagram;
pub mod repair_receiver;
pub mod rtmp_chunks;
pub mod rtmp_client;
pub mod rtmp_server;
pub mod rtp;

/// Panics if the property does not hold for the input.
pub type Check = fn(&[u8]);

/// Every property, by the name of its target and of its directory in the corpus.
pub const ALL: [(&str, Check); 10] = [
    ("amf0", amf0::check),
    ("config", config::check),
    ("flv", flv::check),
    ("repair_control", repair_control::check),
    ("repair_datagram", repair_datagram::check),
    ("repair_receiver", repair_receiver::check),
    ("rtmp_chunks", rtmp_chunks::check),
    ("rtmp_client", rtmp_client::check),
    ("rtmp_server", rtmp_server::check),
    ("rtp", rtp::check),
];

/// Pseudorandom numbers (xorshift64*): the same for the same bytes, so that an input alone says
/// all that is done with it.
pub struct Random(u64);

impl Random {
    /// Seeded with the bytes' FNV-1a hash.
    pub fn of(data: &[u8]) -> Self {
        let hash = data.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(hash | 1)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

/// `data` in pieces as a network might cut it: by the byte, by a few, or by the packet.
pub fn pieces(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut random = Random::of(data);
    let longest = [1, 4, 40, 1500][random.below(4)];
    let mut rest = data;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (piece, tail) = rest.split_at(rest.len().min(1 + random.below(longest)));
        rest = tail;
        Some(piece)
    })
}

/// Takes the first `N` bytes off `data`.
pub fn take<const N: usize>(data: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(*head)
}

/// Takes `len` bytes off `data`, or what is left.
pub fn take_up_to<'a>(data: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, rest) = data.split_at(data.len().min(len));
    *data = rest;
    head
}
