//! The server's end of a connection on which an encoder publishes.

use bytes::BytesMut;
use rand::{SeedableRng, rngs::SmallRng};

use super::{
    SessionError,
    channel::{ChunkChannel, Command, WINDOW},
    media::{Aggregate, into_tag},
    target::ConnectTarget,
};
use crate::{
    chunk::{
        AGGREGATE, AUDIO, COMMAND_AMF0, COMMAND_AMF3, DATA_AMF0, DATA_AMF3, SET_PEER_BANDWIDTH,
        VIDEO, WINDOW_ACK_SIZE,
    },
    handshake::ServerHandshake,
};
use downpour_media::{StreamKey, amf0::Value, flv::Tag};

/// One encoder's connection.
///
/// Feed what came to [`ServerSession::receive`] until it yields nothing more, then send
/// [`ServerSession::take_output`]. A [`ServerEvent::Publish`] is answered with
/// [`ServerSession::accept`] or [`ServerSession::refuse`] before more is fed: media of a
/// publication that is not accepted is dropped.
#[derive(Debug)]
pub struct ServerSession {
    /// Until it is done.
    handshake: Option<Box<(ServerHandshake, SmallRng)>>,
    channel: ChunkChannel,
    chunk_size: u32,
    /// What `connect` named.
    target: Option<ConnectTarget>,
    /// Message streams that were created and not deleted.
    streams: Vec<u32>,
    next_stream: u32,
    publishing: Publishing,
    /// Publications asked for so far.
    publications: usize,
    aggregate: Option<Aggregate>,
    /// Bytes since the start, or since the last publication ended.
    bytes_without_publication: usize,
    ignored: u64,
}

impl ServerSession {
    /// Waits for the handshake, for which `seed` is the randomness; the handshake keeps no
    /// secret, so it need not be unpredictable.
    pub fn new(settings: SessionSettings, seed: u64) -> Self {
        Self {
            handshake: Some(Box::new((ServerHandshake::new(), SmallRng::seed_from_u64(seed)))),
            channel: ChunkChannel::new(settings.max_message_len),
            chunk_size: settings.chunk_size,
            target: None,
            streams: Vec::new(),
            next_stream: 1,
            publishing: Publishing::No,
            publications: 0,
            aggregate: None,
            bytes_without_publication: 0,
            ignored: 0,
        }
    }

    /// Takes bytes off `input` up to the next event; `None` when all are used up.
    ///
    /// # Errors
    /// Ends the connection.
    pub fn receive(&mut self, input: &mut &[u8]) -> Result<Option<ServerEvent>, SessionError> {
        let before = input.len();
        let event = self.next_event(input)?;
        if !matches!(self.publishing, Publishing::Live { .. }) {
            self.bytes_without_publication += before - input.len();
            // Whoever does not publish is not worth our time: this much is a hundred times what
            // the most talkative encoder says first.
            if self.bytes_without_publication > MAX_BYTES_WITHOUT_PUBLICATION {
                return Err(SessionError::NothingPublished(self.bytes_without_publication));
            }
        }
        Ok(event)
    }

    /// Admits the publication that was asked for.
    ///
    /// # Errors
    /// If the answer cannot be written, which no admitted key can cause.
    pub fn accept(&mut self) -> Result<(), SessionError> {
        if let Publishing::Asked { stream_id, key } = std::mem::take(&mut self.publishing) {
            let description = format!("{key} is now published");
            let info = status_info("status", PUBLISH_START, &description);
            // FMLE waits for this one, everybody else for the other.
            self.channel.command(0, "onFCPublish", 0.0, &[Value::Null, info])?;
            self.status(stream_id, "status", PUBLISH_START, &description)?;
            self.bytes_without_publication = 0;
            self.publishing = Publishing::Live { stream_id, key };
        }
        Ok(())
    }

    /// Refuses the publication that was asked for. The caller sends the output and closes.
    ///
    /// # Errors
    /// If the answer cannot be written.
    pub fn refuse(
        &mut self,
        reason: PublishRefusal,
        description: &str,
    ) -> Result<(), SessionError> {
        if let Publishing::Asked { stream_id, .. } = std::mem::take(&mut self.publishing) {
            let code = match reason {
                PublishRefusal::BadName => PUBLISH_BAD_NAME,
                PublishRefusal::Unauthorized => "NetStream.Publish.Unauthorized",
                PublishRefusal::Failed => PUBLISH_FAILED,
            };
            self.status(stream_id, "error", code, description)?;
        }
        Ok(())
    }

    /// Tells the encoder that we end the connection. The caller sends the output and closes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn close(&mut self, why: &str) -> Result<(), SessionError> {
        let stream_id = match std::mem::take(&mut self.publishing) {
            Publishing::Live { stream_id, .. } | Publishing::Asked { stream_id, .. } => stream_id,
            Publishing::No => 0,
        };
        self.status(stream_id, "error", "NetConnection.Connect.Closed", why)
    }

    /// What is to be sent to the encoder; empty if there is nothing.
    pub fn take_output(&mut self) -> BytesMut {
        // Gives the memory away too: thousands of idle connections keep none.
        std::mem::take(&mut self.channel.output)
    }

    /// Messages since the last call that became neither an answer nor a tag: unknown, empty, cut
    /// short, or media outside a publication.
    pub fn take_ignored(&mut self) -> u64 {
        std::mem::take(&mut self.ignored)
    }

    /// The key that is being published.
    pub fn live_key(&self) -> Option<&StreamKey> {
        match &self.publishing {
            Publishing::Live { key, .. } => Some(key),
            _ => None,
        }
    }

    fn next_event(&mut self, input: &mut &[u8]) -> Result<Option<ServerEvent>, SessionError> {
        if let Some(handshake) = &mut self.handshake {
            let before = input.len();
            let (handshake, rng) = &mut **handshake;
            let done = handshake.receive(input, rng, &mut self.channel.output)?;
            self.channel.count(before - input.len());
            if !done {
                return Ok(None);
            }
            self.handshake = None;
        }
        loop {
            if let Some(aggregate) = &mut self.aggregate {
                match aggregate.next_tag() {
                    Some(tag) => return Ok(Some(ServerEvent::Tag(tag))),
                    None => {
                        self.ignored += aggregate.ignored;
                        self.aggregate = None;
                    }
                }
            }
            let Some(message) = self.channel.read(input)? else { return Ok(None) };
            match message.kind {
                COMMAND_AMF0 | COMMAND_AMF3 => {
                    let command = Command::parse(&message)?;
                    if let Some(event) = self.command(message.stream_id, &command)? {
                        return Ok(Some(event));
                    }
                }
                AUDIO | VIDEO | DATA_AMF0 | DATA_AMF3 | AGGREGATE if self.live_key().is_some() => {
                    if message.kind == AGGREGATE {
                        self.aggregate = Some(Aggregate::new(message));
                    } else if let Some(tag) = into_tag(message) {
                        return Ok(Some(ServerEvent::Tag(tag)));
                    } else {
                        self.ignored += 1;
                    }
                }
                _ => self.ignored += 1,
            }
        }
    }

    fn command(
        &mut self,
        stream_id: u32,
        command: &Command,
    ) -> Result<Option<ServerEvent>, SessionError> {
        let transaction = command.transaction;
        match command.name.as_str() {
            "connect" => self.connect(transaction, command.object())?,
            // Encoders wait for an answer to these, whatever it says.
            "releaseStream" | "FCPublish" | "_checkbw" => {
                self.result(transaction, Value::Null, Value::Undefined)?;
            }
            "getStreamLength" => self.result(transaction, Value::Null, 0.0.into())?,
            "createStream" => self.create_stream(transaction)?,
            "publish" => {
                let name = command.argument(0).as_str().unwrap_or_default();
                return self.publish(stream_id, name);
            }
            "play" | "play2" => {
                self.status(stream_id, "error", "NetStream.Play.Failed", PLAY_REFUSED)?;
                return Ok(Some(ServerEvent::Refused(Refusal::Play)));
            }
            "FCUnpublish" => {
                let info = status_info("status", UNPUBLISH_SUCCESS, "unpublished");
                self.channel.command(0, "onFCUnpublish", 0.0, &[Value::Null, info])?;
                self.result(transaction, Value::Null, Value::Undefined)?;
                return self.unpublish(None);
            }
            "closeStream" => return self.unpublish(Some(stream_id)),
            "deleteStream" => {
                let deleted = command.argument(0).as_number().map_or(stream_id, |id| id as u32);
                self.streams.retain(|id| *id != deleted);
                return self.unpublish(Some(deleted));
            }
            _ => self.ignored += 1,
        }
        Ok(None)
    }

    fn connect(&mut self, transaction: f64, object: &Value) -> Result<(), SessionError> {
        self.target = Some(ConnectTarget::new(object));
        self.channel.control(WINDOW_ACK_SIZE, &WINDOW.to_be_bytes())?;
        let [a, b, c, d] = WINDOW.to_be_bytes();
        self.channel.control(SET_PEER_BANDWIDTH, &[a, b, c, d, LIMIT_DYNAMIC])?;
        self.channel.set_chunk_size(self.chunk_size)?;

        let mut properties = vec![
            ("fmsVer".to_owned(), FMS_VERSION.into()),
            ("capabilities".to_owned(), 31.0.into()),
            ("mode".to_owned(), 1.0.into()),
        ];
        properties.extend(extended_capabilities(object));
        // We read commands in either encoding, so the client's choice stands (§7.2.1.1).
        let encoding = match object.property("objectEncoding").and_then(Value::as_number) {
            Some(3.0) => 3.0,
            _ => 0.0,
        };
        let info = Value::object([
            ("level", "status".into()),
            ("code", "NetConnection.Connect.Success".into()),
            ("description", "connected".into()),
            ("objectEncoding", encoding.into()),
        ]);
        self.result(transaction, Value::Object(properties), info)
    }

    fn create_stream(&mut self, transaction: f64) -> Result<(), SessionError> {
        if self.streams.len() >= MAX_STREAMS {
            let info = status_info("error", "NetConnection.Call.Failed", "too many streams");
            return self.channel.command(0, "_error", transaction, &[Value::Null, info]);
        }
        let id = self.next_stream;
        self.next_stream = self.next_stream.wrapping_add(1).max(1);
        self.streams.push(id);
        self.result(transaction, Value::Null, f64::from(id).into())
    }

    fn publish(&mut self, stream_id: u32, name: &str) -> Result<Option<ServerEvent>, SessionError> {
        let Some(target) = &self.target else {
            self.status(stream_id, "error", PUBLISH_FAILED, "publish came before connect")?;
            return Ok(Some(ServerEvent::Refused(Refusal::NotConnected)));
        };
        let (key, query) = match target.stream(name) {
            Ok(stream) => stream,
            Err(error) => {
                self.status(stream_id, "error", PUBLISH_BAD_NAME, &error.to_string())?;
                return Ok(Some(ServerEvent::Refused(Refusal::Name(error.to_string()))));
            }
        };
        match self.live_key() {
            // FMLE asks twice.
            Some(live) if *live == key => {
                let description = format!("{key} is now published");
                self.status(stream_id, "status", PUBLISH_START, &description)?;
                Ok(None)
            }
            Some(_) => {
                let why = "this connection publishes another stream already";
                self.status(stream_id, "error", PUBLISH_BAD_NAME, why)?;
                Ok(None)
            }
            // Each one is announced to every edge: nobody may do that at the speed of a loop.
            None if self.publications >= MAX_PUBLICATIONS => {
                let refusal = Refusal::TooMany;
                self.status(stream_id, "error", PUBLISH_FAILED, &refusal.to_string())?;
                Ok(Some(ServerEvent::Refused(refusal)))
            }
            None => {
                self.publications += 1;
                self.publishing = Publishing::Asked { stream_id, key: key.clone() };
                Ok(Some(ServerEvent::Publish(PublishIntent { key, query })))
            }
        }
    }

    /// Ends the publication, if it runs on `on`, or on whichever stream.
    fn unpublish(&mut self, on: Option<u32>) -> Result<Option<ServerEvent>, SessionError> {
        match &self.publishing {
            Publishing::Live { stream_id, .. } if on.is_none_or(|on| on == *stream_id) => {
                let stream_id = *stream_id;
                self.publishing = Publishing::No;
                self.status(stream_id, "status", UNPUBLISH_SUCCESS, "unpublished")?;
                Ok(Some(ServerEvent::Unpublish))
            }
            _ => Ok(None),
        }
    }

    fn result(&mut self, id: f64, object: Value, info: Value) -> Result<(), SessionError> {
        self.channel.command(0, "_result", id, &[object, info])
    }

    fn status(
        &mut self,
        stream_id: u32,
        level: &str,
        code: &str,
        description: &str,
    ) -> Result<(), SessionError> {
        let info = status_info(level, code, description);
        self.channel.command(stream_id, "onStatus", 0.0, &[Value::Null, info])
    }
}

/// What a session is told once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionSettings {
    /// The longest media message, in bytes.
    pub max_message_len: usize,
    /// The payload of the chunks that we send, in bytes.
    pub chunk_size: u32,
}

/// What an encoder did.
#[derive(Debug)]
pub enum ServerEvent {
    /// It asks to publish.
    Publish(PublishIntent),
    /// It sent media. Script data comes without `@setDataFrame`.
    Tag(Tag),
    /// It ended the publication; it may start another.
    Unpublish,
    /// It was refused what it asked for. The caller sends the output and closes.
    Refused(Refusal),
}

/// A publication that an encoder asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishIntent {
    /// The stream's name.
    pub key: StreamKey,
    /// The queries of application, `tcUrl` and stream name, joined with `&`.
    pub query: String,
}

/// The status with which [`ServerSession::refuse`] answers `publish`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishRefusal {
    /// `NetStream.Publish.BadName`: the name is taken.
    BadName,
    /// `NetStream.Publish.Unauthorized`: the encoder may not publish this name.
    Unauthorized,
    /// `NetStream.Publish.Failed`: the server cannot take the stream now.
    Failed,
}

/// Why a session refuses a request by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A player.
    #[error("{PLAY_REFUSED}")]
    Play,
    /// Application and stream name are no [`StreamKey`].
    #[error("{0}")]
    Name(String),
    /// `publish` without `connect`.
    #[error("publish came before connect")]
    NotConnected,
    /// One publication after another.
    #[error("this connection has published {MAX_PUBLICATIONS} times")]
    TooMany,
}

/// How far a publication has come. Message streams share it: one connection, one publication.
#[derive(Debug, Default)]
enum Publishing {
    #[default]
    No,
    Asked {
        stream_id: u32,
        key: StreamKey,
    },
    Live {
        stream_id: u32,
        key: StreamKey,
    },
}

/// What we can do with the codecs that a client lists (Enhanced RTMP v2, "Enhancing NetConnection
/// connect Command"): media passes through untouched, so every codec can be forwarded, and none of
/// the extensions that would need our help is claimed.
fn extended_capabilities(object: &Value) -> Vec<(String, Value)> {
    let mut ours = Vec::new();
    if let Some(Value::StrictArray(codecs)) = object.property("fourCcList") {
        let codecs = codecs.iter().filter(|codec| codec.as_str().is_some_and(is_four_cc));
        let codecs = codecs.take(MAX_CODECS).cloned().collect();
        ours.push(("fourCcList".to_owned(), Value::StrictArray(codecs)));
    }
    for name in ["videoFourCcInfoMap", "audioFourCcInfoMap"] {
        if let Some(codecs) = object.property(name).and_then(Value::properties) {
            let codecs = codecs.iter().filter(|(codec, _)| is_four_cc(codec)).take(MAX_CODECS);
            let codecs = codecs.map(|(codec, _)| (codec.clone(), CAN_FORWARD.into())).collect();
            ours.push((name.to_owned(), Value::Object(codecs)));
        }
    }
    if object.property("capsEx").is_some() {
        ours.push(("capsEx".to_owned(), 0.0.into()));
    }
    ours
}

fn is_four_cc(codec: &str) -> bool {
    codec.len() == 4 || codec == "*"
}

fn status_info(level: &str, code: &str, description: &str) -> Value {
    Value::object([
        ("level", level.into()),
        ("code", code.into()),
        ("description", description.into()),
    ])
}

const PUBLISH_START: &str = "NetStream.Publish.Start";
const PUBLISH_BAD_NAME: &str = "NetStream.Publish.BadName";
const PUBLISH_FAILED: &str = "NetStream.Publish.Failed";
const UNPUBLISH_SUCCESS: &str = "NetStream.Unpublish.Success";
const PLAY_REFUSED: &str = "this node takes publishers only";
/// The version that encoders with a list of known servers know.
const FMS_VERSION: &str = "FMS/3,0,1,123";
/// §5.4.5.
const LIMIT_DYNAMIC: u8 = 2;
/// `FourCcInfoMask.CanForward`.
const CAN_FORWARD: f64 = 4.0;
const MAX_CODECS: usize = 64;
/// Publications one after another on one connection.
const MAX_PUBLICATIONS: usize = 64;
/// Message streams open at a time on one connection.
const MAX_STREAMS: usize = 16;
const MAX_BYTES_WITHOUT_PUBLICATION: usize = 1 << 20;

#[cfg(test)]
mod tests;
