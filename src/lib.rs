//! Downpour carries live video from one cloud node to many edge nodes: RTMP in, RTP over UDP
//! between, QUIC for repair, HTTP-FLV out. `docs/architecture.md` says how the parts fit.
//!
//! Imports point down only: roles (`cli`, `cloud`, `edge`) on I/O shells (`rtmp::server`, `fanout`,
//! `repair::server`, `http`, `record`, …) on the hub, on state machines that know neither sockets
//! nor clocks (`rtmp::session`, `rtp`, `repair::receiver`), on wire formats.

mod addr_range;
pub mod block;
pub mod cli;
pub mod cloud;
pub mod config;
pub mod edge;
pub mod edges;
pub mod fanout;
pub mod flv;
pub mod http;
pub mod hub;
pub mod impair;
pub mod limits;
pub mod logging;
pub mod metrics;
pub mod net;
pub mod node;
pub mod origin;
mod os;
mod prefetch;
pub mod record;
pub mod repair;
pub mod rtmp;
pub mod rtp;
mod stream_key;
pub mod tls;
pub mod udp;

pub use addr_range::{AddrRange, InvalidRange};
pub use stream_key::{InvalidStreamKey, StreamKey};
