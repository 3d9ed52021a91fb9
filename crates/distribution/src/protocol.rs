//! What the repair connection speaks, and the codes with which it closes.

/// What the repair connection speaks, by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `quic-echo-server`: the existing nodes' one request at a time.
    V0,
    /// `downpour/1`.
    Downpour,
}

impl Protocol {
    /// The protocol that the two ends agreed on, if it is one of ours.
    pub fn of(connection: &quinn::Connection) -> Option<Self> {
        Self::of_handshake(connection.handshake_data()?)
    }

    /// The same, where the handshake is still under way.
    pub(crate) fn of_handshake(data: Box<dyn std::any::Any>) -> Option<Self> {
        let data = data.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?;
        [Self::V0, Self::Downpour]
            .into_iter()
            .find(|protocol| data.protocol.as_deref() == Some(protocol.alpn()))
    }

    /// The name in the TLS handshake (RFC 7301).
    pub fn alpn(self) -> &'static [u8] {
        match self {
            Self::V0 => b"quic-echo-server",
            Self::Downpour => b"downpour/1",
        }
    }

    /// The name in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0 => "v0",
            Self::Downpour => "downpour",
        }
    }
}

/// Application error codes with which either end closes a `downpour/1` connection (RFC 9000 §20.2).
pub mod close {
    use quinn::VarInt;

    /// Nothing is wrong.
    pub const DONE: VarInt = VarInt::from_u32(0);
    /// The peer broke the protocol.
    pub const MALFORMED: VarInt = VarInt::from_u32(1);
    /// The peer was too slow to say hello or welcome.
    pub const TIMEOUT: VarInt = VarInt::from_u32(2);
    /// The edge may not subscribe.
    pub const REFUSED: VarInt = VarInt::from_u32(3);
    /// The node is shutting down.
    pub const SHUTDOWN: VarInt = VarInt::from_u32(4);
}
