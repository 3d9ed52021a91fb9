//! The project's own bad network: loss, bursts, delay, reordering and cuts, the same for a seed.
//!
//! [`Link`] is one direction of a path and knows no clock; [`UdpRelay`] puts two of them between
//! UDP sockets. Tests and `downpour demo --loss` use them; no node needs them.

pub mod link;
pub mod relay;

pub use link::{Blackout, Bursts, Link, LinkSettings, LinkStats};
pub use relay::{RelaySettings, RelayStats, UdpRelay};
