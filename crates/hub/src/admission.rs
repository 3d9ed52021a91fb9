//! What an RTMP server needs from the node behind it to take a publication.

use std::net::SocketAddr;

use tokio_util::sync::CancellationToken;

use downpour_media::{StreamKey, flv::Tag};

/// Decides who may publish and takes what they send. Shared by all connections.
pub trait PublishHandler: Send + Sync + 'static {
    /// Admits a publication or refuses it, before anything about it is announced.
    ///
    /// When `request.kick` is cancelled the server closes the connection: a newer publisher took
    /// the key over, or the node is shutting down.
    fn publish(&self, request: PublishRequest) -> Result<Box<dyn Publication>, PublishError>;
}

/// One admitted publication; dropping it ends the stream.
pub trait Publication: Send {
    /// Takes the next tag, in the order of arrival. Script tags come without `@setDataFrame`.
    fn tag(&mut self, tag: Tag);
}

/// Who wants to publish what.
#[derive(Debug, Clone)]
pub struct PublishRequest {
    /// The stream's name.
    pub key: StreamKey,
    /// What stood behind `?` in the application, the `tcUrl` or the stream name; may be empty.
    pub query: String,
    /// The encoder's address.
    pub peer: SocketAddr,
    /// Cancelled by the handler to end the connection.
    pub kick: CancellationToken,
}

/// Why a publication is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// Another encoder is live on the key: `NetStream.Publish.BadName`.
    #[error("{0} already has a live publisher")]
    AlreadyLive(StreamKey),
    /// The publisher may not: `NetStream.Publish.Unauthorized`.
    #[error("publishing is not allowed: {0}")]
    Unauthorized(String),
    /// The node has no room for another stream: `NetStream.Publish.Failed`.
    #[error("the node is full: {0}")]
    Full(String),
}
