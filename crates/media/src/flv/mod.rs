//! FLV: tags, a reader and a writer.
//!
//! Downpour carries every stream as FLV tags, from ingest to playback.
//!
//! Source: *Adobe Flash Video File Format Specification*, version 10.1, annex E, and *Enhanced RTMP
//! v2* for the extended (FourCC) video and audio headers.

mod enhanced;
pub mod headers;
pub mod reader;
pub mod tag;
pub mod writer;

pub use headers::Headers;
pub use reader::{FlvError, FlvReader, FlvTags};
pub use tag::{Tag, TagError, TagKind};
pub use writer::{FILE_HEADER, FlvWriter, Tracks};
