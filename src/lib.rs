//! Downpour carries live video from one cloud node to many edge nodes: RTMP in, RTP over UDP
//! between, QUIC for repair, HTTP-FLV out. `docs/architecture.md` says how the parts fit.
//!
//! Imports point down only: roles (`cli`, `cloud`, `edge`) on I/O shells (`rtmp::server`, `fanout`,
//! `repair::server`, `http`, `record`, …) on the hub, on state machines that know neither sockets
//! nor clocks (`rtmp::session`, `rtp`, `repair::receiver`), on wire formats.

#![forbid(unsafe_code)]

pub mod cli;
pub mod config;
pub mod http;
pub mod net;
pub mod node;
pub mod record;
pub mod rtmp;
