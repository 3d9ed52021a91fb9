//! The client's end of a connection: it publishes a stream or plays one.

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

/// One connection to a server, for one stream.
///
/// Send [`ClientSession::take_output`] after every call, the first one included.
#[derive(Debug)]
pub struct ClientSession {
    /// Until it is done.
    handshake: Option<Box<(ClientHandshake, SmallRng)>>,
    channel: ChunkChannel,
    url: RtmpUrl,
    purpose: Purpose,
    stage: Stage,
    stream_id: u32,
    aggregate: Option<Aggregate>,
    /// Reused for metadata that needs a prefix.
    script: BytesMut,
}

impl ClientSession {
    /// Greets the server. `seed` is the randomness of the handshake, which keeps no secret.
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

    /// Takes bytes off `input` up to the next event; `None` when all are used up.
    ///
    /// # Errors
    /// Ends the connection. [`SessionError::Rejected`] is what the server said.
    pub fn receive(&mut self, input: &mut &[u8]) -> Result<Option<ClientEvent>, SessionError> {
        if let Some(handshake) = &mut self.handshake {
            let before = input.len();
            let (handshake, rng) = &mut **handshake;
            let done = handshake.receive(input, rng, &mut self.channel.output)?;
            self.channel.count(before - input.len());
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

    /// Queues a tag. Metadata gets the `@setDataFrame` in front that servers expect.
    ///
    /// # Errors
    /// None that a tag can cause.
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
                return self.channel.media(csid, head, &self.script);
            }
        }
        self.channel.media(csid, head, tag.body())
    }

    /// Ends the publication or the playback. The caller sends the output and closes.
    ///
    /// # Errors
    /// None that the stream's name can cause: it has been sent before.
    pub fn finish(&mut self) -> Result<(), SessionError> {
        if self.stream_id == 0 || self.stage == Stage::Ended {
            return Ok(());
        }
        self.stage = Stage::Ended;
        if self.purpose == Purpose::Publish {
            let name = self.url.stream_name().as_str().into();
            self.channel.command(0, "FCUnpublish", 6.0, &[Value::Null, name])?;
        }
        let id = f64::from(self.stream_id).into();
        self.channel.command(0, "deleteStream", 7.0, &[Value::Null, id])
    }

    /// What is to be sent to the server; empty if there is nothing.
    pub fn take_output(&mut self) -> BytesMut {
        self.channel.output.split()
    }

    fn connect(&mut self) -> Result<(), SessionError> {
        self.channel.control(WINDOW_ACK_SIZE, &WINDOW.to_be_bytes())?;
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
        self.channel.command(0, "connect", CONNECT, &[object])
    }

    fn command(&mut self, command: &Command) -> Result<Option<ClientEvent>, SessionError> {
        let info = command.argument(0);
        match command.name.as_str() {
            "_result" if command.transaction == CONNECT && self.stage == Stage::Connecting => {
                self.stage = Stage::Creating;
                if self.purpose == Purpose::Publish {
                    let name = Value::from(self.url.stream_name().as_str());
                    let arguments = [Value::Null, name];
                    self.channel.command(0, "releaseStream", 2.0, &arguments)?;
                    self.channel.command(0, "FCPublish", 3.0, &arguments)?;
                }
                self.channel.command(0, "createStream", CREATE_STREAM, &[Value::Null])?;
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
                self.channel.command(self.stream_id, "publish", START, &arguments)
            }
            Purpose::Play => {
                let mut buffer_length = SET_BUFFER_LENGTH.to_vec();
                buffer_length.extend(self.stream_id.to_be_bytes());
                buffer_length.extend(BUFFER_LENGTH_MS.to_be_bytes());
                self.channel.control(USER_CONTROL, &buffer_length)?;
                // §7.2.2.1: −2, a live stream or else a recorded one.
                let arguments = [Value::Null, name, (-2.0).into()];
                self.channel.command(self.stream_id, "play", START, &arguments)
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

/// What a client connects for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To send a stream.
    Publish,
    /// To receive one.
    Play,
}

/// What a server did.
#[derive(Debug)]
pub enum ClientEvent {
    /// The publication or the playback may begin.
    Started,
    /// It sent media; the first may come before [`ClientEvent::Started`], or instead.
    Tag(Tag),
    /// The stream is over.
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
    let text =
        |name| info.property(name).and_then(Value::as_str).unwrap_or("(not told)").to_owned();
    SessionError::Rejected { code: text("code"), description: text("description") }
}

/// Transaction ids of the commands whose answers matter.
const CONNECT: f64 = 1.0;
const CREATE_STREAM: f64 = 4.0;
const START: f64 = 5.0;
const AUDIO_CSID: u32 = 4;
const DATA_CSID: u32 = 5;
const VIDEO_CSID: u32 = 6;
/// All servers take this size, and larger ones gain nothing.
const CHUNK_SIZE: u32 = 4096;
const FLASH_VERSION: &str = "FMLE/3.0 (compatible; Downpour)";
/// Codecs that we pass on by their FourCC (Enhanced RTMP v2).
const FOUR_CCS: [&str; 10] =
    ["av01", "vp08", "vp09", "hvc1", "avc1", "mp4a", "Opus", "fLaC", "ac-3", "ec-3"];
/// User control events (§7.1.7).
const STREAM_EOF: [u8; 2] = [0, 1];
const SET_BUFFER_LENGTH: [u8; 2] = [0, 3];
const BUFFER_LENGTH_MS: u32 = 3000;
