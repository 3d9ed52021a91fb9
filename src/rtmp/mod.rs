//! RTMP over TCP: the server that encoders publish to, and a client.
//!
//! The protocol itself, without I/O, is in the crate `downpour-rtmp`.

mod arrival;
pub mod client;
mod connection;
pub mod listener;
mod metrics;
mod socket;

pub use metrics::ServerMetrics;
