//! RTMP, the protocol in which encoders push.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0 (2012), and *Enhanced RTMP v2* for what
//! `connect` says about extended codecs.

mod alarm;
pub mod client;
mod connection;
pub mod listener;
mod metrics;
mod socket;

pub use metrics::ServerMetrics;
