//! What a live stream is made of: keys, tags, codec headers, FLV, AMF0 and timelines.
//!
//! Nothing here knows sockets, clocks or tasks: bytes in, values out.

pub mod amf0;
pub mod flv;
mod stream_key;
mod stream_pattern;
pub mod timeline;

pub use stream_key::{InvalidStreamKey, StreamKey};
pub use stream_pattern::{InvalidPattern, StreamPattern};
