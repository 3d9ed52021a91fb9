#![doc = include_str!("../README.md")]
#![warn(missing_docs, unreachable_pub)]

pub mod amf0;
pub mod flv;
mod stream_key;
mod stream_pattern;
pub mod timeline;

pub use stream_key::{InvalidStreamKey, StreamKey};
pub use stream_pattern::{InvalidPattern, StreamPattern};
