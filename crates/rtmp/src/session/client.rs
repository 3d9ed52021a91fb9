//! The client's side of a connection: publishes a stream or plays one.

use bytes::BytesMut;
use rand::{SeedableRng, rngs::SmallRng};

use super::{
    SessionError,
    channel::{ChunkChannel, Command, WINDOW},
    media::{Aggregate, into_tag},
};
use crate::{
    chunk::{
        AGGREGATE, AUDIO, COMMAND_AMF0, COMMAND_AMF3, DATA_AMF0, DATA_AMF3, Message, MessageHead,
        USER_CONTROL, VIDEO, WINDOW_ACK_SIZE,
    },
    handshake::ClientHandshake,
    url::RtmpUrl,
};
use downpour_media::{
    amf0::{self, Value},
    flv::{Tag, TagKind},
};

/// A client's connection that publishes or plays one stream.
///
/// After [`ClientSession::new`] and after every other call, send [`ClientSession::take_output`] to
/// the server.
///
/// # States
/// - **handshake** → **connecting**: the handshake is done; sends `connect`.
/// - connecting → **creating**: `_result` of `connect`; sends `createStream`.
/// - creating → **starting**: `_result` of `createStream`; sends `publish` or `play`.
/// - starting → **running**: `NetStream.Publish.Start` or `NetStream.Play.Start`; returns
///   [`ClientEvent::Started`].
/// - any → **ended**: Stream EOF, a stop or unpublish status, `close`, or
///   [`ClientSession::finish`]. All but `finish` return [`ClientEvent::Ended`], once.
/// - `_error` or an error status ends the session with [`SessionError::Rejected`].
///
/// # Invariants
/// - `stream_id` is 0 until the server has created a message stream.
/// - Tags are returned only while playing, in the states starting and running.
#[derive(Debug)]
pub struct ClientSession {
    /// `None` once the handshake is done.
    handshake: Option<Box<(ClientHandshake, SmallRng)>>,
    channel: ChunkChannel,
    url: RtmpUrl,
    purpose: Purpose,
    stage: Stage,
    /// The message stream of the publication or playback; 0 before it is created.
    stream_id: u32,
    /// The rest of an aggregate message that is being returned tag by tag.
    aggregate: Option<Aggregate>,
    /// Scratch buffer for metadata with its prefix.
    script: BytesMut,
}

impl ClientSession {
    /// Starts a session with a handshake. `seed` seeds its random bytes, which need not be
    /// unpredictable.
    pub fn new(url: RtmpUrl, purpose: Purpose, seed: u64) -> Self {
        let mut channel = ChunkChannel::new(Tag::MAX_BODY_LEN);
        let mut rng = SmallRng::seed_from_u64(seed);
        let handshake = ClientHandshake::start(&mut rng, &mut channel.output);
        Self {
            handshake: Some(Box::new((handshake, rng))),
            channel,
            url,
            purpose,
            stage: Stage::Connecting,
            stream_id: 0,
            aggregate: None,
            script: BytesMut::new(),
        }
    }

    /// Consumes `input` up to the next event and returns it, or `None` once all input is consumed.
    ///
    /// # Errors
    /// [`SessionError`], after which the connection must be closed. [`SessionError::Rejected`] has
    /// the server's reason.
    pub fn receive(&mut self, input: &mut &[u8]) -> Result<Option<ClientEvent>, SessionError> {
        if let Some(handshake) = &mut self.handshake {
            let before = input.len();
            let (handshake, rng) = &mut **handshake;
            let done = handshake.receive(input, rng, &mut self.channel.output)?;
            self.channel.count_received(before - input.len());
            if !done {
                return Ok(None);
            }
            self.handshake = None;
            self.connect()?;
        }
        loop {
            if let Some(aggregate) = &mut self.aggregate {
                match aggregate.next_tag() {
                    Some(tag) => return Ok(Some(ClientEvent::Tag(tag))),
                    None => self.aggregate = None,
                }
            }
            let Some(message) = self.channel.read(input)? else { return Ok(None) };
            let event = match message.kind {
                COMMAND_AMF0 | COMMAND_AMF3 => self.command(&Command::parse(&message)?)?,
                USER_CONTROL if message.body().starts_with(&STREAM_EOF) => self.end(),
                AUDIO | VIDEO | DATA_AMF0 | DATA_AMF3 | AGGREGATE => self.media(message),
                _ => None,
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    /// Queues a tag for the server, prefixing metadata with `@setDataFrame`. Call it only after
    /// [`ClientEvent::Started`].
    ///
    /// # Errors
    /// None in practice: every tag fits into a message.
    pub fn send(&mut self, tag: &Tag) -> Result<(), SessionError> {
        let (csid, kind) = match tag.kind() {
            TagKind::Audio => (AUDIO_CSID, AUDIO),
            TagKind::Video => (VIDEO_CSID, VIDEO),
            TagKind::Script => (DATA_CSID, DATA_AMF0),
        };
        let head = MessageHead { kind, stream_id: self.stream_id, timestamp: tag.timestamp() };
        if matches!(amf0::leading_string(tag.body()), Some((b"onMetaData", _)))
            && tag.kind() == TagKind::Script
        {
            self.script.clear();
            Value::from("@setDataFrame").encode(&mut self.script)?;
            self.script.extend_from_slice(tag.body());
            if self.script.len() <= Tag::MAX_BODY_LEN {
                return self.channel.write(csid, head, &self.script);
            }
        }
        self.channel.write(csid, head, tag.body())
    }

    /// Ends the publication or playback. Send the output, then close the connection.
    ///
    /// # Errors
    /// None in practice: the stream's name has been encoded before.
    pub fn finish(&mut self) -> Result<(), SessionError> {
        if self.stream_id == 0 || self.stage == Stage::Ended {
            return Ok(());
        }
        self.stage = Stage::Ended;
        if self.purpose == Purpose::Publish {
            let name = self.url.stream_name().as_str().into();
            self.channel.write_command(0, "FCUnpublish", 6.0, &[Value::Null, name])?;
        }
        let id = f64::from(self.stream_id).into();
        self.channel.write_command(0, "deleteStream", 7.0, &[Value::Null, id])
    }

    /// Takes the bytes to send to the server, possibly none.
    pub fn take_output(&mut self) -> BytesMut {
        self.channel.output.split()
    }

    fn connect(&mut self) -> Result<(), SessionError> {
        self.channel.write_control(WINDOW_ACK_SIZE, &WINDOW.to_be_bytes())?;
        self.channel.set_chunk_size(CHUNK_SIZE)?;
        let codecs = FOUR_CCS.into_iter().map(Value::from).collect();
        let object = Value::object([
            ("app", self.url.app().into()),
            ("type", "nonprivate".into()),
            ("flashVer", FLASH_VERSION.into()),
            ("tcUrl", self.url.tc_url().as_str().into()),
            ("fpad", Value::Boolean(false)),
            ("capabilities", 15.0.into()),
            ("audioCodecs", 4071.0.into()),
            ("videoCodecs", 252.0.into()),
            ("videoFunction", 1.0.into()),
            ("objectEncoding", 0.0.into()),
            ("fourCcList", Value::StrictArray(codecs)),
        ]);
        self.channel.write_command(0, "connect", CONNECT, &[object])
    }

    fn command(&mut self, command: &Command) -> Result<Option<ClientEvent>, SessionError> {
        let info = command.argument(0);
        match command.name.as_str() {
            "_result" if command.transaction == CONNECT && self.stage == Stage::Connecting => {
                self.stage = Stage::Creating;
                if self.purpose == Purpose::Publish {
                    let name = Value::from(self.url.stream_name().as_str());
                    let arguments = [Value::Null, name];
                    self.channel.write_command(0, "releaseStream", 2.0, &arguments)?;
                    self.channel.write_command(0, "FCPublish", 3.0, &arguments)?;
                }
                self.channel.write_command(0, "createStream", CREATE_STREAM, &[Value::Null])?;
            }
            "_result" if command.transaction == CREATE_STREAM && self.stage == Stage::Creating => {
                self.stage = Stage::Starting;
                self.stream_id = info.as_number().map_or(1, |id| id as u32);
                self.start()?;
            }
            "_error" if [CONNECT, CREATE_STREAM, START].contains(&command.transaction) => {
                return Err(rejected(info));
            }
            "onStatus" => {
                let text = |name| info.property(name).and_then(Value::as_str);
                let code = text("code").unwrap_or_default();
                if text("level") == Some("error") {
                    return Err(rejected(info));
                }
                match code {
                    "NetStream.Publish.Start" | "NetStream.Play.Start"
                        if self.stage == Stage::Starting =>
                    {
                        self.stage = Stage::Running;
                        return Ok(Some(ClientEvent::Started));
                    }
                    "NetStream.Play.Stop"
                    | "NetStream.Play.Complete"
                    | "NetStream.Play.UnpublishNotify"
                    | "NetStream.Unpublish.Success" => return Ok(self.end()),
                    _ => {}
                }
            }
            "close" => return Ok(self.end()),
            _ => {}
        }
        Ok(None)
    }

    fn start(&mut self) -> Result<(), SessionError> {
        let name = Value::from(self.url.stream_name().as_str());
        match self.purpose {
            Purpose::Publish => {
                let arguments = [Value::Null, name, "live".into()];
                self.channel.write_command(self.stream_id, "publish", START, &arguments)
            }
            Purpose::Play => {
                let mut buffer_length = SET_BUFFER_LENGTH.to_vec();
                buffer_length.extend(self.stream_id.to_be_bytes());
                buffer_length.extend(BUFFER_LENGTH_MS.to_be_bytes());
                self.channel.write_control(USER_CONTROL, &buffer_length)?;
                // §7.2.2.1: −2 plays the live stream, or else a recorded one.
                let arguments = [Value::Null, name, (-2.0).into()];
                self.channel.write_command(self.stream_id, "play", START, &arguments)
            }
        }
    }

    fn media(&mut self, message: Message) -> Option<ClientEvent> {
        if self.purpose != Purpose::Play || !matches!(self.stage, Stage::Starting | Stage::Running)
        {
            return None;
        }
        if message.kind == AGGREGATE {
            self.aggregate = Some(Aggregate::new(message));
            return None;
        }
        into_tag(message).map(ClientEvent::Tag)
    }

    fn end(&mut self) -> Option<ClientEvent> {
        if self.stage == Stage::Ended {
            return None;
        }
        self.stage = Stage::Ended;
        Some(ClientEvent::Ended)
    }
}

/// The purpose of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Send a stream.
    Publish,
    /// Receive a stream.
    Play,
}

/// An event of a [`ClientSession`].
#[derive(Debug)]
pub enum ClientEvent {
    /// The server accepted the publication or playback.
    Started,
    /// Media from the server. Some servers send it before [`ClientEvent::Started`], or never send
    /// the latter.
    Tag(Tag),
    /// The stream has ended.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connecting,
    Creating,
    Starting,
    Running,
    Ended,
}

fn rejected(info: &Value) -> SessionError {
    let text = |name| info.property(name).and_then(Value::as_str).unwrap_or("(none)").to_owned();
    SessionError::Rejected { code: text("code"), description: text("description") }
}

/// Transaction ids of the commands whose answers the session evaluates.
const CONNECT: f64 = 1.0;
const CREATE_STREAM: f64 = 4.0;
const START: f64 = 5.0;
const AUDIO_CSID: u32 = 4;
const DATA_CSID: u32 = 5;
const VIDEO_CSID: u32 = 6;
/// Chunk size in bytes. All servers accept it, and a larger one gains nothing.
const CHUNK_SIZE: u32 = 4096;
const FLASH_VERSION: &str = "FMLE/3.0 (compatible; Downpour)";
/// Codecs that can be published by their FourCC (Enhanced RTMP v2).
const FOUR_CCS: [&str; 10] =
    ["av01", "vp08", "vp09", "hvc1", "avc1", "mp4a", "Opus", "fLaC", "ac-3", "ec-3"];
/// User control events (§7.1.7).
const STREAM_EOF: [u8; 2] = [0, 1];
const SET_BUFFER_LENGTH: [u8; 2] = [0, 3];
/// Playback buffer announced to the server, in milliseconds.
const BUFFER_LENGTH_MS: u32 = 3000;
