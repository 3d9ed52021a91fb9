//! The RTMP chunk stream: messages split into interleaved chunks.
//!
//! [`ChunkReader`] reassembles messages, [`ChunkWriter`] splits them. A chunk stream, identified by
//! its id (`csid`), carries one message at a time; several chunk streams are interleaved.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0 §5.3. Comments name the encoders that deviate
//! from it.

mod message;
mod reader;
mod writer;

pub use message::{Message, MessageHead};
pub use reader::ChunkReader;
pub use writer::{ChunkWriter, OutgoingMessage};

/// Why a chunk stream cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// A chunk with a compressed header on a chunk stream without a previous header.
    #[error("chunk stream {0} starts without a header")]
    NoHeader(u32),
    /// More than [`MAX_CHUNK_STREAMS`] chunk streams.
    #[error("there are more than {MAX_CHUNK_STREAMS} chunk streams")]
    TooManyStreams,
    /// A message over the limit for its type.
    #[error("a message of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// Length in the message header, in bytes.
        length: usize,
        /// Limit in bytes.
        limit: usize,
    },
    /// The unfinished messages of all chunk streams hold too much memory.
    #[error("too many bytes in unfinished messages")]
    TooMuchUnfinished,
    /// Set Chunk Size with 0 or with the high bit set.
    #[error("a chunk size of {0} is not allowed")]
    ChunkSize(u32),
    /// A control message shorter than four bytes.
    #[error("a control message is truncated")]
    ShortControl,
}

/// Message type of Set Chunk Size, §5.4.1.
pub const SET_CHUNK_SIZE: u8 = 1;
/// Message type of Abort Message, §5.4.2.
pub const ABORT: u8 = 2;
/// Message type of Acknowledgement, §5.4.3.
pub const ACKNOWLEDGEMENT: u8 = 3;
/// Message type of User Control Message, §6.2.
pub const USER_CONTROL: u8 = 4;
/// Message type of Window Acknowledgement Size, §5.4.4.
pub const WINDOW_ACK_SIZE: u8 = 5;
/// Message type of Set Peer Bandwidth, §5.4.5.
pub const SET_PEER_BANDWIDTH: u8 = 6;
/// Message type of Audio Message, §7.1.4.
pub const AUDIO: u8 = 8;
/// Message type of Video Message, §7.1.5.
pub const VIDEO: u8 = 9;
/// Message type of Data Message in AMF3, §7.1.2.
pub const DATA_AMF3: u8 = 15;
/// Message type of Command Message in AMF3, §7.1.1.
pub const COMMAND_AMF3: u8 = 17;
/// Message type of Data Message in AMF0, §7.1.2.
pub const DATA_AMF0: u8 = 18;
/// Message type of Command Message in AMF0, §7.1.1.
pub const COMMAND_AMF0: u8 = 20;
/// Message type of Aggregate Message, §7.1.6.
pub const AGGREGATE: u8 = 22;
/// The chunk stream of protocol control messages.
pub const CONTROL_CSID: u32 = 2;
/// Chunk streams per direction. Encoders use five or six.
pub const MAX_CHUNK_STREAMS: usize = 64;
/// The longest command or control message, in bytes.
pub const MAX_COMMAND_LEN: usize = 64 << 10;

/// The state of a chunk stream that compressed headers refer to.
#[derive(Debug, Default, Clone, Copy)]
struct Header {
    timestamp: u32,
    /// The timestamp delta that a format 3 chunk repeats, in milliseconds.
    delta: u32,
    length: usize,
    kind: u8,
    stream_id: u32,
    /// The extended timestamp field, if the last header had one.
    extended: Option<u32>,
}

impl Header {
    /// `true` if this header of format 0, 1 or 2 repeats `unfinished`, that of an unfinished message,
    /// rather than begins another message.
    fn repeats(&self, unfinished: &Self, format: u8) -> bool {
        let is_same = (self.length, self.kind, self.stream_id)
            == (unfinished.length, unfinished.kind, unfinished.stream_id);
        is_same && (format != 0 || self.timestamp == unfinished.timestamp)
    }
}

/// §5.4.1.
const DEFAULT_CHUNK_SIZE: usize = 128;
const MAX_CHUNK_SIZE: u32 = 0x7fff_ffff;
/// The 24-bit timestamp that announces a 32-bit extended timestamp.
const EXTENDED: u32 = 0xff_ffff;

#[cfg(test)]
mod tests;
