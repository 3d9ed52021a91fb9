//! Both sides of an RTMP connection as state machines: bytes in, events and bytes out.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0 §5.4, §6 and §7.

mod channel;
mod client;
mod media;
mod server;
mod target;

pub use client::{ClientEvent, ClientSession, Purpose};
pub use server::{
    PublishIntent, PublishRefusal, Refusal, ServerEvent, ServerSession, SessionSettings,
};

use super::{chunk::ChunkError, handshake::HandshakeError};
use downpour_media::amf0::Amf0Error;

/// Why a session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The handshake failed: the peer does not speak RTMP.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The chunk stream is invalid or exceeds a limit.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// A command is not AMF0 or exceeds a limit.
    #[error("in a command: {0}")]
    Amf0(#[from] Amf0Error),
    /// A command without a name.
    #[error("a command has no name")]
    Command,
    /// A client sent this many bytes, over the limit, outside a publication.
    #[error("{0} bytes received without a publication")]
    NothingPublished(usize),
    /// The server refused the connection, publication or playback.
    #[error("the server refused: {code}: {description}")]
    Rejected {
        /// The status code, such as `NetStream.Publish.BadName`.
        code: String,
        /// The server's description.
        description: String,
    },
}

impl SessionError {
    /// Returns the kind of error as a metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Handshake(_) => "handshake",
            Self::Chunk(_) => "chunk",
            Self::Amf0(_) | Self::Command => "command",
            Self::NothingPublished(_) => "nothing_published",
            Self::Rejected { .. } => "rejected",
        }
    }

    /// All values of [`SessionError::label`].
    pub const LABELS: [&str; 5] =
        ["handshake", "chunk", "command", "nothing_published", "rejected"];
}
