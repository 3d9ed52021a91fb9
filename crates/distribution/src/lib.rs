//! Distribution of streams from node to node, as RTP over UDP with repair over QUIC.
//!
//! [`downstream`] is a sink of the hub: fan-out, history and the repair server. [`upstream`] is a source:
//! RTP reception, reordering and the repair client.

mod addr_range;
pub mod address;
pub mod congestion;
mod control_stream;
pub mod downstream;
pub mod http_client;
pub mod protocol;
pub mod report_metrics;
pub mod tls;
pub mod transport;
pub mod upstream;

pub use addr_range::{AddrRange, InvalidRange};
pub use protocol::Protocol;
