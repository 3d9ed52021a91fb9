//! The two ends of an RTMP connection as state machines: bytes in, events and bytes out.
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

/// Why a session cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// Not RTMP.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// Not a chunk stream, or one beyond our limits.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// A command that is not AMF0, or beyond our limits.
    #[error("in a command: {0}")]
    Amf0(#[from] Amf0Error),
    /// A command without a name.
    #[error("a command has no name")]
    Command,
    /// A client that sends and sends and publishes nothing.
    #[error("{0} bytes came without a publication")]
    NothingPublished(usize),
    /// The server said no.
    #[error("the server refused: {code}: {description}")]
    Rejected {
        /// Such as `NetStream.Publish.BadName`.
        code: String,
        /// The server's words.
        description: String,
    },
}

impl SessionError {
    /// A short name of the kind of error, for a metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Handshake(_) => "handshake",
            Self::Chunk(_) => "chunk",
            Self::Amf0(_) | Self::Command => "command",
            Self::NothingPublished(_) => "nothing_published",
            Self::Rejected { .. } => "rejected",
        }
    }

    /// All that [`SessionError::label`] may say.
    pub const LABELS: [&str; 5] =
        ["handshake", "chunk", "command", "nothing_published", "rejected"];
}
