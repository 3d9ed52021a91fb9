//! The control stream of `downpour/1`: JSON messages, each behind its length as a u32, big-endian.
//!
//! Fields and message types that this version does not know are ignored, so that either end may be
//! newer than the other.

mod compact;

use std::{fmt, net::SocketAddr};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

use super::receiver::{Histogram, MAX_PATHS, PathStats, Stats};
use crate::rtp::{Seq, Ssrc};
use downpour_media::{
    StreamKey, StreamPattern,
    flv::{Headers, Tag, TagKind},
};

/// The version that this crate speaks, told in `hello` and `welcome`.
pub const VERSION: u32 = 1;

/// What an edge tells the cloud.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EdgeMessage {
    /// The first message: who it is and what it wants.
    Hello(Hello),
    /// More streams.
    Subscribe {
        /// What to add.
        streams: Vec<StreamPattern>,
    },
    /// Fewer streams.
    Unsubscribe {
        /// What to take away, as it was subscribed to.
        streams: Vec<StreamPattern>,
    },
    /// How it fares, once a second.
    Report(Report),
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// What the cloud tells an edge.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CloudMessage {
    /// The answer to `hello`.
    Welcome(Welcome),
    /// A stream that the edge wants has begun, or was there already.
    StreamUp(StreamInfo),
    /// A stream's headers changed.
    StreamUpdate {
        /// The stream.
        ssrc: Ssrc,
        /// All of its headers.
        #[serde(with = "headers")]
        headers: Headers,
    },
    /// A stream is over.
    StreamEnd {
        /// The stream.
        ssrc: Ssrc,
        /// The last sequence number sent, if any was.
        last_seq: Option<Seq>,
    },
    /// RTP goes to an address that the edge proved to be its own.
    PathUp {
        /// Which of the edge's paths: 0 or 1.
        path: u8,
        /// Where RTP goes, as the cloud sees it.
        address: SocketAddr,
    },
    /// Why the cloud is about to close the connection.
    Error {
        /// For programs: a short word.
        code: String,
        /// For people.
        message: String,
    },
    /// Of a later version.
    #[serde(other)]
    Unknown,
}

/// An edge's first message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// The edge's name, for logs and the API.
    pub node: String,
    /// What shows that it may subscribe.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// The UDP port on which it takes RTP; none if it wants none sent to an address of its own,
    /// because it listens to a group or is in the cloud's list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtp_port: Option<u16>,
    /// Over how many paths it wants each packet, and will prove an address for: 0..=2.
    #[serde(default = "one_path")]
    pub rtp_paths: u8,
    /// The multicast group that it listens to, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<SocketAddr>,
    /// Whether it takes parity packets where it takes RTP.
    #[serde(default)]
    pub parity: bool,
    /// How late a packet may come to be of use, in milliseconds.
    #[serde(default = "half_a_second")]
    pub latency_ms: u32,
    /// The streams it wants.
    #[serde(default)]
    pub streams: Vec<StreamPattern>,
}

/// The cloud's first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`VERSION`].
    pub version: u32,
    /// The cloud's name.
    pub node: String,
    /// What the edge sends from its RTP socket to prove its address.
    pub nonce: Nonce,
    /// The cloud's RTP port.
    pub rtp_port: u16,
}

/// One stream, as it stands when the edge learns of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StreamInfo {
    /// The stream's name.
    pub key: StreamKey,
    /// The publication.
    pub ssrc: Ssrc,
    /// Unix time of media time 0, in milliseconds.
    pub start_unix_ms: u64,
    /// What a decoder needs first.
    #[serde(with = "headers", default)]
    pub headers: Headers,
    /// Where the newest group of pictures begins, while it is held.
    #[serde(default)]
    pub gop_start: Option<Seq>,
    /// The newest sequence number sent, if any was, of that group where it is held.
    #[serde(default)]
    pub newest: Option<Seq>,
}

/// How an edge fares. It may come in parts: a stream that it does not name fares as last told.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The round trip to the cloud, smoothed, in microseconds.
    #[serde(default)]
    pub round_trip_us: u64,
    /// One entry a stream; of some or of all streams.
    #[serde(default, serialize_with = "compact::serialize")]
    pub streams: Vec<StreamReport>,
}

impl Report {
    /// The same in reports that each fit in a message from an edge: of at most [`MAX_REPORTED`]
    /// streams, and at least one report, for the round trip.
    pub fn split(self) -> impl Iterator<Item = Self> {
        let Self { round_trip_us, streams } = self;
        let count = streams.len().div_ceil(MAX_REPORTED).max(1);
        let mut streams = streams.into_iter();
        (0..count).map(move |_| Self {
            round_trip_us,
            streams: streams.by_ref().take(MAX_REPORTED).collect(),
        })
    }
}

/// How one stream fares at an edge. Counters are in packets and run from the stream's start there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StreamReport {
    /// The publication.
    pub ssrc: u32,
    /// Came, by any way, duplicates included.
    pub received: u64,
    /// Found missing and asked for.
    pub asked: u64,
    /// Asked for, and brought by a repair: by the first, the second, and any later try.
    pub repaired: [u64; 3],
    /// Made anew from parity.
    pub parity: u64,
    /// Missing to the end.
    pub given_up: u64,
    /// Of those, not waited for because others of their tag were lost.
    pub abandoned: u64,
    /// Came after they had been given up.
    pub too_late: u64,
    /// Came again after they were there.
    pub duplicate: u64,
    /// Came as sent, behind a later one.
    pub reordered: u64,
    /// Sequence numbers in requests, repetitions included.
    pub nacks: u64,
    /// How long after they were due packets came.
    pub delays: DelayReport,
    /// How long after they were due packets were handed on: the wait for others before them
    /// included.
    pub waits: DelayReport,
    /// Each path by itself.
    pub paths: [PathReport; MAX_PATHS],
}

/// How many packets were delayed by how much.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DelayReport {
    /// How many within each of [`DELAY_BOUNDS_MS`](super::receiver::DELAY_BOUNDS_MS) and over the
    /// one before, then how many over the last.
    #[serde(deserialize_with = "compact::counts")]
    pub counts: Vec<u64>,
    /// All delays together, in microseconds.
    pub sum_us: u64,
}

/// How one path of a stream fares.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PathReport {
    /// Packets that came over it.
    pub received: u64,
    /// Packets that it lost.
    pub lost: u64,
    /// Times that it lost packets, one or more in a row.
    pub gaps: u64,
}

/// Kinds of counts in [`StreamReport::fates`].
pub const FATES: usize = 12;

impl StreamReport {
    /// Its counts by the names that metrics give them.
    pub fn fates(&self) -> [(&'static str, u64); FATES] {
        [
            ("received", self.received),
            ("reordered", self.reordered),
            ("duplicate", self.duplicate),
            ("asked", self.asked),
            ("repaired_1", self.repaired[0]),
            ("repaired_2", self.repaired[1]),
            ("repaired_3", self.repaired[2]),
            ("parity", self.parity),
            ("lost", self.given_up),
            ("abandoned", self.abandoned),
            ("too_late", self.too_late),
            ("requested", self.nacks),
        ]
    }

    /// Its plain counters, by their names on the wire.
    pub fn counters(&self) -> [(&'static str, u64); COUNTERS] {
        [
            ("received", self.received),
            ("asked", self.asked),
            ("parity", self.parity),
            ("given_up", self.given_up),
            ("abandoned", self.abandoned),
            ("too_late", self.too_late),
            ("duplicate", self.duplicate),
            ("reordered", self.reordered),
            ("nacks", self.nacks),
        ]
    }

    /// The same, in the same order, to be changed.
    pub fn counters_mut(&mut self) -> [&mut u64; COUNTERS] {
        // All fields, so that a new one is not forgotten.
        let Self {
            ssrc: _,
            received,
            asked,
            repaired: _,
            parity,
            given_up,
            abandoned,
            too_late,
            duplicate,
            reordered,
            nacks,
            delays: _,
            waits: _,
            paths: _,
        } = self;
        [received, asked, parity, given_up, abandoned, too_late, duplicate, reordered, nacks]
    }
}

const COUNTERS: usize = 9;

impl Stats {
    /// These counts as an edge tells them to the cloud.
    pub fn report(&self, ssrc: Ssrc) -> StreamReport {
        let delays = |histogram: &Histogram| DelayReport {
            counts: histogram.counts.to_vec(),
            sum_us: histogram.sum_us,
        };
        StreamReport {
            delays: delays(&self.delays),
            waits: delays(&self.waits),
            ..self.counts(ssrc)
        }
    }

    /// The same without the delays.
    pub fn counts(&self, ssrc: Ssrc) -> StreamReport {
        StreamReport {
            ssrc: ssrc.0,
            received: self.received,
            asked: self.asked,
            repaired: self.repaired,
            parity: self.parity,
            given_up: self.lost,
            abandoned: self.abandoned,
            too_late: self.too_late,
            duplicate: self.duplicate,
            reordered: self.reordered,
            nacks: self.requests,
            delays: DelayReport::default(),
            waits: DelayReport::default(),
            paths: self.paths.map(|PathStats { received, lost, gaps }| PathReport {
                received,
                lost,
                gaps,
            }),
        }
    }
}

/// Sixteen random bytes, as 32 hexadecimal digits in JSON.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce(pub [u8; 16]);

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl Serialize for Nonce {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&to_hex(&self.0))
    }
}

impl<'de> Deserialize<'de> for Nonce {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        from_hex(&String::deserialize(deserializer)?)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("a nonce is 32 hexadecimal digits"))
    }
}

/// Splits a control stream into messages, whatever pieces it comes in.
#[derive(Debug)]
pub struct ControlReader {
    buffer: BytesMut,
    max_len: usize,
}

impl ControlReader {
    /// Takes messages of up to `max_len` bytes, at most [`MAX_CONTROL_LEN`].
    pub fn new(max_len: usize) -> Self {
        Self { buffer: BytesMut::new(), max_len: max_len.min(MAX_CONTROL_LEN) }
    }

    /// Adds bytes as they came.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if it is all there.
    ///
    /// # Errors
    /// If it is over the limit, which its first four bytes tell, or is not a message.
    pub fn next_message<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ControlError> {
        let Some(length) = self.buffer.first_chunk::<LENGTH_LEN>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length) as usize;
        if length == 0 || length > self.max_len {
            return Err(ControlError::Length { length, max: self.max_len });
        }
        if self.buffer.len() < LENGTH_LEN + length {
            return Ok(None);
        }
        self.buffer.advance(LENGTH_LEN);
        let json = self.buffer.split_to(length);
        serde_json::from_slice(&json)
            .map(Some)
            .map_err(|error| ControlError::Json(error.to_string()))
    }
}

/// One message behind its length.
///
/// # Errors
/// [`ControlError::Length`] if it is over [`MAX_CONTROL_LEN`].
pub fn encode_control(message: &impl Serialize) -> Result<Bytes, ControlError> {
    let json =
        serde_json::to_vec(message).map_err(|error| ControlError::Json(error.to_string()))?;
    if json.len() > MAX_CONTROL_LEN {
        return Err(ControlError::Length { length: json.len(), max: MAX_CONTROL_LEN });
    }
    let mut frame = BytesMut::with_capacity(LENGTH_LEN + json.len());
    frame.put_u32(json.len() as u32);
    frame.put_slice(&json);
    Ok(frame.freeze())
}

/// Why a control stream cannot be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A length of nothing, or over the limit.
    #[error("a control message of {length} bytes, when 1 to {max} are allowed")]
    Length {
        /// What the message claims.
        length: usize,
        /// What is allowed.
        max: usize,
    },
    /// Not the JSON of a message.
    #[error("a control message that cannot be read: {0}")]
    Json(String),
}

/// Patterns that one edge may subscribe to at one time.
pub const MAX_PATTERNS: usize = 1024;
/// The longest message, in bytes: 1 MiB.
pub const MAX_CONTROL_LEN: usize = 1 << 20;
/// The longest message from an edge, in bytes: 256 KiB.
pub const MAX_EDGE_MESSAGE: usize = 256 * 1024;
/// Streams in one report. With counters of twenty digits it takes less than half of
/// [`MAX_EDGE_MESSAGE`].
pub const MAX_REPORTED: usize = 75;

/// Headers as hexadecimal FLV tags without `PreviousTagSize`.
mod headers {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Headers, MAX_HEADER_LEN, Tag, TagKind, from_hex, to_hex};
    use downpour_sys::buffer::BufferMut;

    #[derive(Serialize, Deserialize)]
    struct Wire {
        #[serde(default)]
        video: Option<String>,
        #[serde(default)]
        audio: Option<String>,
        #[serde(default)]
        metadata: Option<String>,
    }

    pub fn serialize<S: Serializer>(headers: &Headers, serializer: S) -> Result<S::Ok, S::Error> {
        // Three headers of the longest length, in hexadecimal, stay below the message limit; a
        // longer one is no real decoder configuration.
        let hex = |tag: &Option<Tag>| {
            tag.as_ref().map(Tag::unit).filter(|unit| unit.len() <= MAX_HEADER_LEN).map(to_hex)
        };
        Wire {
            video: hex(&headers.video),
            audio: hex(&headers.audio),
            metadata: hex(&headers.metadata),
        }
        .serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Headers, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        let tag = |hex: Option<String>, kind: TagKind| match hex {
            None => Ok(None),
            Some(hex) => from_hex(&hex)
                .and_then(|unit| Tag::from_unit(BufferMut::from(&unit[..])).ok())
                .filter(|tag| tag.kind() == kind)
                .map(Some)
                .ok_or_else(|| serde::de::Error::custom(format!("not a {kind:?} tag in hex"))),
        };
        Ok(Headers {
            video: tag(wire.video, TagKind::Video)?,
            audio: tag(wire.audio, TagKind::Audio)?,
            metadata: tag(wire.metadata, TagKind::Script)?,
        })
    }
}

fn half_a_second() -> u32 {
    500
}

fn one_path() -> u8 {
    1
}

fn to_hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(HEX_DIGITS[usize::from(nibble & 0xf)]);
    bytes.iter().flat_map(|&byte| [digit(byte >> 4), digit(byte)]).collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let nibble = |digit: u8| char::from(digit).to_digit(16);
    pairs.iter().map(|&[high, low]| Some((nibble(high)? << 4 | nibble(low)?) as u8)).collect()
}

const HEX_DIGITS: &[u8; 16] = b"0123456789abcdef";
const LENGTH_LEN: usize = 4;
/// The longest header tag that is told, in bytes.
const MAX_HEADER_LEN: usize = 128 * 1024;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn info() -> StreamInfo {
        StreamInfo {
            key: "live/movie".parse().unwrap(),
            ssrc: Ssrc(0xdead_beef),
            start_unix_ms: 1_700_000_000_000,
            headers: Headers {
                video: Some(Tag::new(TagKind::Video, 0, &[0x17, 0, 1, 2]).unwrap()),
                audio: Some(Tag::new(TagKind::Audio, 9, &[0xaf, 0]).unwrap()),
                metadata: None,
            },
            gop_start: Some(Seq(65000)),
            newest: None,
        }
    }

    #[test]
    fn the_json_is_what_the_wire_document_says() {
        let json = serde_json::to_value(CloudMessage::StreamUp(info())).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "type": "stream_up", "key": "live/movie", "ssrc": 0xdead_beef_u32,
                "start_unix_ms": 1_700_000_000_000_u64,
                "headers": {
                    "video": "090000040000000000000017000102",
                    "audio": "08000002000009000000 00af00".replace(' ', ""),
                    "metadata": null,
                },
                "gop_start": 65000, "newest": null,
            })
        );
        let welcome =
            Welcome { version: 1, node: "c".into(), nonce: Nonce([0xa1; 16]), rtp_port: 9 };
        assert_eq!(
            serde_json::to_value(CloudMessage::Welcome(welcome)).unwrap()["nonce"],
            "a1".repeat(16)
        );
    }

    #[test]
    fn what_a_later_version_adds_is_ignored() {
        let parse = |json: &str| serde_json::from_str::<EdgeMessage>(json);
        assert_eq!(parse(r#"{"type":"dance","to":"music"}"#).unwrap(), EdgeMessage::Unknown);
        let hello = parse(r#"{"type":"hello","version":2,"node":"e","mood":"good"}"#).unwrap();
        assert!(matches!(hello, EdgeMessage::Hello(Hello { version: 2, token: None, .. })));
        assert!(parse(r#"{"type":"hello","version":1}"#).is_err());
        assert!(parse(r#"{"type":"subscribe","streams":["a/b/*/c"]}"#).is_err());
    }

    #[test]
    fn lengths_are_checked_before_anything_is_kept() {
        for (head, length) in [([0u8; 4], 0), ([0, 0, 1, 1], 257), ([0xff; 4], u32::MAX as usize)] {
            let mut reader = ControlReader::new(256);
            reader.push(&head);
            assert_eq!(
                reader.next_message::<EdgeMessage>(),
                Err(ControlError::Length { length, max: 256 })
            );
        }
    }

    #[test]
    fn a_header_too_long_to_tell_is_left_out() {
        let mut info = info();
        info.headers.metadata = Some(Tag::new(TagKind::Script, 0, &vec![0; 200_000]).unwrap());
        let frame = encode_control(&CloudMessage::StreamUp(info.clone())).unwrap();
        let mut reader = ControlReader::new(MAX_CONTROL_LEN);
        reader.push(&frame);
        info.headers.metadata = None;
        assert_eq!(reader.next_message(), Ok(Some(CloudMessage::StreamUp(info))));
    }

    #[test]
    fn no_part_of_a_report_is_too_long_for_a_message() {
        let most =
            Histogram { counts: Histogram::default().counts.map(|_| u64::MAX), sum_us: u64::MAX };
        let mut worst = Stats { delays: most, waits: most, ..Stats::default() }.report(Ssrc(0));
        worst.paths.fill(PathReport { received: u64::MAX, lost: u64::MAX, gaps: u64::MAX });
        worst.repaired = [u64::MAX; 3];
        worst.counters_mut().into_iter().for_each(|count| *count = u64::MAX);
        for count in [0, 1, MAX_REPORTED, MAX_REPORTED + 1, 3000] {
            let about = |i| StreamReport { ssrc: u32::MAX - i as u32, ..worst.clone() };
            let streams = (0..count).map(about).collect();
            let report = Report { round_trip_us: u64::MAX, streams };
            let parts: Vec<_> = report.clone().split().collect();
            assert_eq!(parts.len(), count.div_ceil(MAX_REPORTED).max(1));
            for part in &parts {
                let frame = encode_control(&EdgeMessage::Report(part.clone())).unwrap();
                assert!(frame.len() < MAX_EDGE_MESSAGE / 2, "{}", frame.len());
                assert_eq!(part.round_trip_us, u64::MAX);
            }
            let parts = parts.into_iter().flat_map(|part| part.streams);
            assert_eq!(parts.collect::<Vec<_>>(), report.streams);
        }
    }

    proptest! {
        #[test]
        fn messages_come_through_any_split(cuts in prop::collection::vec(0usize..600, 0..12)) {
            let sent = [
                CloudMessage::StreamUp(info()),
                CloudMessage::StreamEnd { ssrc: Ssrc(1), last_seq: None },
                CloudMessage::StreamUpdate { ssrc: Ssrc(1), headers: info().headers },
            ];
            let bytes: Vec<u8> =
                sent.iter().flat_map(|message| encode_control(message).unwrap()).collect();
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let (mut reader, mut got) = (ControlReader::new(MAX_CONTROL_LEN), Vec::new());
            for range in cuts.windows(2) {
                reader.push(&bytes[range[0]..range[1]]);
                while let Some(message) = reader.next_message::<CloudMessage>().unwrap() {
                    got.push(message);
                }
            }
            prop_assert_eq!(&got[..], &sent[..]);
        }

        #[test]
        fn reading_is_total(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let mut reader = ControlReader::new(MAX_CONTROL_LEN);
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_message::<EdgeMessage>() {}
        }
    }
}
