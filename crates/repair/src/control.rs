//! The control stream of `downpour/1`: JSON messages, each behind its length as a big-endian u32.
//!
//! Unknown fields and message types are ignored, so that either end may run a newer version.

mod codec;
mod compact;
mod data;
mod headers;
mod messages;
mod report;

pub use codec::{ControlError, ControlReader, MAX_CONTROL_LEN, MAX_EDGE_MESSAGE, encode_control};
pub use data::MAX_DATA_LEN;
pub use headers::MAX_HEADER_LEN;
pub use messages::{CloudMessage, EdgeMessage, Hello, Nonce, StreamInfo, Welcome};
pub use report::{DelayReport, FATES, MAX_REPORTED, PathReport, Report, StreamReport};

/// The protocol version of this crate, sent in `hello` and `welcome`.
pub const VERSION: u32 = 1;
/// Patterns that one edge may be subscribed to at a time.
pub const MAX_PATTERNS: usize = 1024;

#[cfg(test)]
mod tests;
