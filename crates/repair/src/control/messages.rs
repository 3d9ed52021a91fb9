//! The messages of both directions.

use std::{fmt, net::SocketAddr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{data, headers, report::Report};
use crate::rtp::{Seq, Ssrc};
use downpour_media::{
    PublicationId, StreamKey, StreamPattern,
    flv::{Headers, Tag},
};

/// A message from an edge to the cloud.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EdgeMessage {
    /// The first message: the edge's identity and its requirements.
    Hello(Hello),
    /// Adds streams to the subscription.
    Subscribe {
        /// Patterns to add.
        streams: Vec<StreamPattern>,
    },
    /// Removes streams from the subscription.
    Unsubscribe {
        /// Patterns to remove, exactly as they were subscribed to.
        streams: Vec<StreamPattern>,
    },
    /// Reception statistics, sent once per second.
    Report(Report),
    /// A message type of a later version; ignored.
    #[serde(other)]
    Unknown,
}

/// A message from the cloud to an edge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CloudMessage {
    /// The answer to `hello`.
    Welcome(Welcome),
    /// A subscribed stream started, or was live when the edge subscribed.
    StreamUp(StreamInfo),
    /// A stream's headers changed.
    StreamUpdate {
        /// The stream.
        ssrc: Ssrc,
        /// The complete set of headers.
        #[serde(with = "headers")]
        headers: Headers,
    },
    /// Script data in a stream: a cue point, caption or text. Metadata is a header instead.
    StreamData {
        /// The stream.
        ssrc: Ssrc,
        /// The tag, at most [`MAX_DATA_LEN`](super::MAX_DATA_LEN) bytes with its header. Its timestamp
        /// is its place in the stream.
        #[serde(with = "data")]
        tag: Tag,
    },
    /// A stream ended.
    StreamEnd {
        /// The stream.
        ssrc: Ssrc,
        /// The last sequence number sent; `None` if no packet was.
        last_seq: Option<Seq>,
    },
    /// The cloud is shutting down: the ends of streams that follow are the node's, not the encoders'. An
    /// edge keeps its viewers in case the cloud comes back.
    Closing {},
    /// The edge proved an address, and RTP is now sent to it.
    PathUp {
        /// Index of the edge's path: 0 or 1.
        path: u8,
        /// The edge's address as the cloud sees it.
        address: SocketAddr,
    },
    /// The reason why the cloud is about to close the connection.
    Error {
        /// A short word for programs.
        code: String,
        /// A sentence for people.
        message: String,
    },
    /// A message type of a later version; ignored.
    #[serde(other)]
    Unknown,
}

/// An edge's first message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol version: [`VERSION`](super::VERSION).
    pub version: u32,
    /// The edge's name, for logs and the API.
    pub node: String,
    /// The credential for subscribing, if the cloud requires one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The UDP port on which the edge receives RTP. `None` if the cloud needs no address for it:
    /// the edge listens to a multicast group or is in the cloud's list of destinations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtp_port: Option<u16>,
    /// Number of paths over which the edge wants each packet, and will prove an address for: 0..=2.
    #[serde(default = "one_path")]
    pub rtp_paths: u8,
    /// The multicast group that the edge listens to, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<SocketAddr>,
    /// `true` if the edge accepts parity packets beside RTP.
    #[serde(default)]
    pub parity: bool,
    /// The edge's repair latency in milliseconds: a packet that is later than this is useless.
    #[serde(default = "half_a_second")]
    pub latency_ms: u32,
    /// The streams to subscribe to.
    #[serde(default)]
    pub streams: Vec<StreamPattern>,
}

/// The cloud's first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Protocol version: [`VERSION`](super::VERSION).
    pub version: u32,
    /// The cloud's name.
    pub node: String,
    /// The nonce that the edge sends from its RTP socket to prove its address.
    pub nonce: Nonce,
    /// The cloud's RTP port.
    pub rtp_port: u16,
}

/// The state of one stream when it is announced to an edge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamInfo {
    /// The stream's name.
    pub key: StreamKey,
    /// The publication.
    pub ssrc: Ssrc,
    /// The identity of the publication on every hop; `None` from nodes that do not know it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publication: Option<PublicationId>,
    /// Unix time of media time 0, in milliseconds.
    pub start_unix_ms: u64,
    /// Metadata and sequence headers, which a decoder needs first.
    #[serde(with = "headers", default)]
    pub headers: Headers,
    /// First sequence number of the newest GOP, while the cloud holds all of it.
    #[serde(default)]
    pub gop_start: Option<Seq>,
    /// The newest sequence number sent (of that GOP if the cloud holds it); `None` before the first
    /// packet.
    #[serde(default)]
    pub newest: Option<Seq>,
}

/// Sixteen random bytes that identify one session of an edge; 32 hexadecimal digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(pub [u8; 16]);

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl Serialize for Nonce {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.0))
    }
}

impl<'de> Deserialize<'de> for Nonce {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(String::deserialize(deserializer)?, &mut bytes)
            .map_err(|_| serde::de::Error::custom("a nonce is 32 hexadecimal digits"))?;
        Ok(Self(bytes))
    }
}

fn half_a_second() -> u32 {
    500
}

fn one_path() -> u8 {
    1
}
