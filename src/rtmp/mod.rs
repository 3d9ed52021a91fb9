//! RTMP, the protocol in which encoders push.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0 (2012), and *Enhanced RTMP v2* for what
//! `connect` says about extended codecs.

pub mod client;
pub mod server;
mod socket;
