//! RTMP as state machines: bytes in, events and bytes out; no socket, clock or task.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0 (2012), and *Enhanced RTMP v2* for what
//! `connect` says about extended codecs.

pub mod chunk;
pub mod handshake;
pub mod session;
pub mod url;
