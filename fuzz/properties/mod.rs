//! Properties that must hold for any input. A property is a function that panics if it is violated.
//!
//! The targets of `fuzz/fuzz_targets` search for inputs that violate one; `tests/fuzz_corpus.rs`
//! checks them on the committed corpus. They use only Downpour's public API.
#![allow(dead_code, reason = "each fuzz target uses one property")]

pub mod amf0;
pub mod config;
pub mod flv;
pub mod memory;
pub mod repair_control;
pub mod repair_datagram;
pub mod repair_receiver;
mod rtmp;
pub mod rtmp_chunks;
pub mod rtmp_client;
pub mod rtmp_server;
pub mod rtp;

/// A property. Panics if the input violates it.
pub type Check = fn(&[u8]);

/// All properties, with the name of the target and of the corpus directory.
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

/// A pseudorandom generator (xorshift64*), seeded with the input, so that a check is reproducible from
/// its input.
pub struct Random(u64);

impl Random {
    /// Returns a generator seeded with the FNV-1a hash of `data`.
    pub fn of(data: &[u8]) -> Self {
        let hash = data.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(hash | 1)
    }

    /// Returns a number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

/// Splits `data` as a network might: into single bytes, a few bytes, or packets.
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

/// Removes and returns the first `N` bytes of `data`.
pub fn take<const N: usize>(data: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(*head)
}

/// Removes and returns up to `len` bytes of `data`.
pub fn take_up_to<'a>(data: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (head, rest) = data.split_at(data.len().min(len));
    *data = rest;
    head
}
