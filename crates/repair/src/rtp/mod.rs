//! RTP as wire v0 uses it (`docs/wire.md`): FLV tags are sliced into packets and reassembled.

pub mod depacketizer;
pub mod flexfec;
pub mod packet;
pub mod packetizer;

pub use depacketizer::Depacketizer;
pub use packet::Packet;
pub use packetizer::{Burst, Packetizer};

use std::fmt;

/// A synchronization source identifier (RFC 3550 §3): one publication of one stream.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Ssrc(pub u32);

impl fmt::Display for Ssrc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl fmt::Debug for Ssrc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// An RTP sequence number (RFC 3550 §5.1), wrapping from 65535 to 0.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct Seq(pub u16);

impl Seq {
    /// First number of every publication in wire v0. Close to the wrap, so that receivers meet it early.
    pub const FIRST: Self = Self(65000);

    /// Returns the number `n` packets later.
    #[inline]
    pub fn plus(self, n: usize) -> Self {
        Self(self.0.wrapping_add(n as u16))
    }

    /// Returns how far `self` is ahead of `earlier`, modulo 2¹⁶: −32768..=32767.
    #[inline]
    pub fn distance_from(self, earlier: Self) -> i32 {
        i32::from(self.0.wrapping_sub(earlier.0) as i16)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
