//! FLV, the container in which media enters, crosses and leaves Downpour.
//!
//! Source: *Adobe Flash Video File Format Specification*, version 10.1, annex E, and *Enhanced RTMP
//! v2* for the extended (FourCC) video and audio headers.

pub mod headers;
pub mod reader;
pub mod tag;
pub mod writer;

pub use headers::Headers;
pub use reader::{FlvError, FlvReader, FlvTags};
pub use tag::{Tag, TagError, TagKind};
pub use writer::{FILE_HEADER, FlvWriter};
