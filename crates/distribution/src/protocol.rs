//! Protocols of the repair connection, and the codes that close it.

/// Protocol of a repair connection, negotiated by ALPN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// `quic-echo-server`, the protocol of the existing Go nodes: one request at a time.
    V0,
    /// `downpour/1`.
    Downpour,
}

impl Protocol {
    /// The negotiated protocol of a connection; `None` if it is unknown.
    pub fn of(connection: &quinn::Connection) -> Option<Self> {
        Self::of_handshake(connection.handshake_data()?)
    }

    /// As [`Protocol::of`], during the handshake.
    pub(crate) fn of_handshake(data: Box<dyn std::any::Any>) -> Option<Self> {
        let data = data.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?;
        [Self::V0, Self::Downpour]
            .into_iter()
            .find(|protocol| data.protocol.as_deref() == Some(protocol.alpn()))
    }

    /// The ALPN name (RFC 7301).
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

/// Application error codes that close a `downpour/1` connection (RFC 9000 §20.2).
pub mod close {
    use quinn::VarInt;

    /// No error.
    pub const DONE: VarInt = VarInt::from_u32(0);
    /// The peer violated the protocol.
    pub const MALFORMED: VarInt = VarInt::from_u32(1);
    /// No `hello` or `welcome` arrived in time.
    pub const TIMEOUT: VarInt = VarInt::from_u32(2);
    /// The cloud refuses the edge.
    pub const REFUSED: VarInt = VarInt::from_u32(3);
    /// The node is shutting down.
    pub const SHUTDOWN: VarInt = VarInt::from_u32(4);
}
