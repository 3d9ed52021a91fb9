//! Downpour carries live video from one cloud node to many edge nodes: RTMP in, RTP over UDP between
//! them, repair over QUIC, HTTP-FLV out. `docs/architecture.md` describes the parts.
//!
//! Imports point down only: [`cli`] uses [`node`], which assembles [`rtmp`], [`http`] and [`record`]
//! from the settings in [`config`]. These parts use [`net`] and the workspace's crates: `distribution`
//! (node to node) on `hub` (streams and their readers), on state machines without sockets (`rtmp`,
//! `repair`), on formats (`media`).

#![forbid(unsafe_code)]
#![warn(missing_docs, unreachable_pub)]

pub mod cli;
pub mod config;
pub mod http;
pub mod net;
pub mod node;
pub mod record;
pub mod rtmp;
