#![doc = include_str!("../README.md")]
#![warn(missing_docs, unreachable_pub)]

pub mod amf0;
mod amf3;
pub mod flv;
mod input;
mod publication_id;
mod stream_key;
mod stream_pattern;
pub mod timeline;
pub mod timestamps;

pub use publication_id::{InvalidPublicationId, PublicationId};
pub use stream_key::{InvalidStreamKey, StreamKey};
pub use stream_pattern::{InvalidPattern, StreamPattern};
