//! Node to node: every tag of the hub as RTP to many edges, and back.
//!
//! [`downstream`] is a sink: fan-out, history and the repair server. [`upstream`] is a source: RTP
//! in, reordering and the repair client.

mod addr_range;
pub mod address;
pub mod congestion;
mod control_stream;
pub mod downstream;
pub mod protocol;
pub mod report_metrics;
pub mod tls;
pub mod transport;
pub mod upstream;

pub use addr_range::{AddrRange, InvalidRange};
pub use protocol::Protocol;
