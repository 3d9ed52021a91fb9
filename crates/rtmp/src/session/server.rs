//! The server's side of a connection on which an encoder publishes.

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

/// An encoder's connection.
///
/// Pass received bytes to [`ServerSession::receive`] until it returns `None`, then send
/// [`ServerSession::take_output`]. Answer a [`ServerEvent::Publish`] with [`ServerSession::accept`]
/// or [`ServerSession::refuse`] before passing more input: media outside an accepted publication is
/// discarded.
///
/// # States
/// - **handshake** → **connected**: the handshake is done. Commands are answered from here on;
///   `publish` needs a preceding `connect`.
/// - The publication is **idle** → **requested**: `publish` with a valid name; returns
///   [`ServerEvent::Publish`].
/// - requested → **live**: [`ServerSession::accept`]; media is returned as [`ServerEvent::Tag`].
/// - requested → idle: [`ServerSession::refuse`].
/// - live → idle: `FCUnpublish` with its name or without one, or `closeStream` or `deleteStream` of its
///   message stream; returns [`ServerEvent::Unpublish`].
///
/// # Invariants
/// - At most one publication at a time per connection, whatever the number of message streams.
/// - Message streams, publications, and bytes outside a publication are bounded.
#[derive(Debug)]
pub struct ServerSession {
    /// `None` once the handshake is done.
    handshake: Option<Box<(ServerHandshake, SmallRng)>>,
    channel: ChunkChannel,
    /// Payload of outgoing chunks after `connect`, in bytes.
    chunk_size: u32,
    /// The application of `connect`; `None` before it.
    target: Option<ConnectTarget>,
    /// Message streams that were created and not deleted.
    streams: Vec<u32>,
    next_stream: u32,
    publishing: Publishing,
    /// Publications requested so far.
    publications: usize,
    /// The rest of an aggregate message that is being returned tag by tag.
    aggregate: Option<Aggregate>,
    /// Bytes received since the start or the end of the last publication.
    bytes_without_publication: usize,
    /// Messages ignored since the last [`ServerSession::take_ignored`].
    ignored: u64,
}

impl ServerSession {
    /// A session that waits for the handshake. `seed` seeds its random bytes, which need not be
    /// unpredictable.
    pub fn new(settings: SessionSettings, seed: u64) -> Self {
        Self {
            handshake: Some(Box::new((ServerHandshake::new(), SmallRng::seed_from_u64(seed)))),
            channel: ChunkChannel::new(settings.max_message_len),
            chunk_size: settings.chunk_size,
            target: None,
            streams: Vec::new(),
            next_stream: 1,
            publishing: Publishing::Idle,
            publications: 0,
            aggregate: None,
            bytes_without_publication: 0,
            ignored: 0,
        }
    }

    /// Consumes `input` up to the next event and returns it, or `None` once all input is consumed.
    ///
    /// # Errors
    /// [`SessionError`], after which the connection must be closed.
    pub fn receive(&mut self, input: &mut &[u8]) -> Result<Option<ServerEvent>, SessionError> {
        let before = input.len();
        let event = self.next_event(input)?;
        if !matches!(self.publishing, Publishing::Live { .. }) {
            self.bytes_without_publication += before - input.len();
            // Stops clients that occupy the server without publishing. The limit is a hundred times
            // the preamble of the most verbose encoder.
            if self.bytes_without_publication > MAX_BYTES_WITHOUT_PUBLICATION {
                return Err(SessionError::NothingPublished(self.bytes_without_publication));
            }
        }
        Ok(event)
    }

    /// Accepts the requested publication.
    ///
    /// # Errors
    /// If the answer cannot be encoded, which no valid key causes.
    pub fn accept(&mut self) -> Result<(), SessionError> {
        if let Publishing::Requested { stream_id, key } = std::mem::take(&mut self.publishing) {
            let description = format!("{key} is now published");
            let info = status_info("status", PUBLISH_START, &description);
            // FMLE waits for `onFCPublish`, every other encoder for `onStatus`.
            self.channel.write_command(0, "onFCPublish", 0.0, &[Value::Null, info])?;
            self.status(stream_id, "status", PUBLISH_START, &description)?;
            self.bytes_without_publication = 0;
            self.publishing = Publishing::Live { stream_id, key };
        }
        Ok(())
    }

    /// Refuses the requested publication. Send the output, then close the connection.
    ///
    /// # Errors
    /// If the answer cannot be encoded.
    pub fn refuse(
        &mut self,
        reason: PublishRefusal,
        description: &str,
    ) -> Result<(), SessionError> {
        if let Publishing::Requested { stream_id, .. } = std::mem::take(&mut self.publishing) {
            let code = match reason {
                PublishRefusal::BadName => PUBLISH_BAD_NAME,
                PublishRefusal::Unauthorized => "NetStream.Publish.Unauthorized",
                PublishRefusal::Failed => PUBLISH_FAILED,
            };
            self.status(stream_id, "error", code, description)?;
        }
        Ok(())
    }

    /// Notifies the encoder that the server closes the connection. Send the output, then close it.
    ///
    /// # Errors
    /// If the notification cannot be encoded.
    pub fn close(&mut self, reason: &str) -> Result<(), SessionError> {
        let stream_id = match std::mem::take(&mut self.publishing) {
            Publishing::Live { stream_id, .. } | Publishing::Requested { stream_id, .. } => {
                stream_id
            }
            Publishing::Idle => 0,
        };
        self.status(stream_id, "error", "NetConnection.Connect.Closed", reason)
    }

    /// Takes the bytes to send to the encoder, possibly none.
    pub fn take_output(&mut self) -> BytesMut {
        // Takes the allocation too, so that thousands of idle connections hold none.
        std::mem::take(&mut self.channel.output)
    }

    /// Returns the number of messages ignored since the last call: unknown, empty, truncated or
    /// unfinished ones, and media outside a publication.
    pub fn take_ignored(&mut self) -> u64 {
        std::mem::take(&mut self.ignored) + self.channel.take_given_up()
    }

    /// Returns the key of the accepted publication.
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
            self.channel.count_received(before - input.len());
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
            // Encoders wait for an answer to these and ignore its content.
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
                self.channel.write_command(0, "onFCUnpublish", 0.0, &[Value::Null, info])?;
                self.result(transaction, Value::Null, Value::Undefined)?;
                if self.is_of_another_stream(command.argument(0)) {
                    return Ok(None);
                }
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
        self.channel.write_control(WINDOW_ACK_SIZE, &WINDOW.to_be_bytes())?;
        let [a, b, c, d] = WINDOW.to_be_bytes();
        self.channel.write_control(SET_PEER_BANDWIDTH, &[a, b, c, d, LIMIT_DYNAMIC])?;
        self.channel.set_chunk_size(self.chunk_size)?;

        let mut properties = vec![
            ("fmsVer".to_owned(), FMS_VERSION.into()),
            ("capabilities".to_owned(), 31.0.into()),
            ("mode".to_owned(), 1.0.into()),
        ];
        properties.extend(extended_capabilities(object));
        // Both encodings are supported, so confirm the client's choice (§7.2.1.1).
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
            return self.channel.write_command(0, "_error", transaction, &[Value::Null, info]);
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
        let (key, query) = match target.resolve(name) {
            Ok(stream) => stream,
            Err(error) => {
                self.status(stream_id, "error", PUBLISH_BAD_NAME, &error.to_string())?;
                return Ok(Some(ServerEvent::Refused(Refusal::Name(error.to_string()))));
            }
        };
        match self.live_key() {
            // FMLE publishes twice.
            Some(live) if *live == key => {
                let description = format!("{key} is now published");
                self.status(stream_id, "status", PUBLISH_START, &description)?;
                Ok(None)
            }
            Some(_) => {
                let reason = "this connection publishes another stream already";
                self.status(stream_id, "error", PUBLISH_BAD_NAME, reason)?;
                Ok(None)
            }
            // Every publication is announced to all edges; a client must not loop.
            None if self.publications >= MAX_PUBLICATIONS => {
                let refusal = Refusal::TooMany;
                self.status(stream_id, "error", PUBLISH_FAILED, &refusal.to_string())?;
                Ok(Some(ServerEvent::Refused(refusal)))
            }
            None => {
                self.publications += 1;
                self.publishing = Publishing::Requested { stream_id, key: key.clone() };
                Ok(Some(ServerEvent::Publish(PublishIntent { key, query })))
            }
        }
    }

    /// `true` if the name in `FCUnpublish` is not that of the publication: encoders tidy up after an
    /// earlier stream.
    fn is_of_another_stream(&self, name: &Value) -> bool {
        let Some(name) = name.as_str().filter(|name| !name.trim().is_empty()) else { return false };
        let key = self.target.as_ref().and_then(|target| target.resolve(name).ok());
        key.as_ref().map(|(key, _)| key) != self.live_key()
    }

    /// Ends the publication, if there is one and its message stream is `only` (`None` matches any).
    fn unpublish(&mut self, only: Option<u32>) -> Result<Option<ServerEvent>, SessionError> {
        match &self.publishing {
            Publishing::Live { stream_id, .. } if only.is_none_or(|only| only == *stream_id) => {
                let stream_id = *stream_id;
                self.publishing = Publishing::Idle;
                self.status(stream_id, "status", UNPUBLISH_SUCCESS, "unpublished")?;
                Ok(Some(ServerEvent::Unpublish))
            }
            _ => Ok(None),
        }
    }

    fn result(&mut self, id: f64, object: Value, info: Value) -> Result<(), SessionError> {
        self.channel.write_command(0, "_result", id, &[object, info])
    }

    fn status(
        &mut self,
        stream_id: u32,
        level: &str,
        code: &str,
        description: &str,
    ) -> Result<(), SessionError> {
        let info = status_info(level, code, description);
        self.channel.write_command(stream_id, "onStatus", 0.0, &[Value::Null, info])
    }
}

/// Settings of a [`ServerSession`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionSettings {
    /// The longest media message, in bytes.
    pub max_message_len: usize,
    /// The payload of outgoing chunks, in bytes.
    pub chunk_size: u32,
}

/// An event of a [`ServerSession`].
#[derive(Debug)]
pub enum ServerEvent {
    /// The encoder asks to publish.
    Publish(PublishIntent),
    /// Media of the publication. Script data is without `@setDataFrame`.
    Tag(Tag),
    /// The encoder ended the publication. It may start another.
    Unpublish,
    /// The session refused a request. Send the output, then close the connection.
    Refused(Refusal),
}

/// A requested publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishIntent {
    /// The stream's name.
    pub key: StreamKey,
    /// The queries of application, `tcUrl` and stream name, without repetitions, joined with `&`.
    pub query: String,
}

/// The status code of [`ServerSession::refuse`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishRefusal {
    /// `NetStream.Publish.BadName`: the name is taken.
    BadName,
    /// `NetStream.Publish.Unauthorized`: the encoder may not publish this name.
    Unauthorized,
    /// `NetStream.Publish.Failed`: the server cannot take the stream now.
    Failed,
}

/// Why a session refuses a request without asking the server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// A `play` request: the session takes publishers only.
    #[error("{PLAY_REFUSED}")]
    Play,
    /// Application and stream name are not a [`StreamKey`], or the query is too long.
    #[error("{0}")]
    Name(String),
    /// `publish` before `connect`.
    #[error("publish came before connect")]
    NotConnected,
    /// Too many publications on one connection.
    #[error("this connection has published {MAX_PUBLICATIONS} times")]
    TooMany,
}

/// The state of the connection's publication.
#[derive(Debug, Default)]
enum Publishing {
    #[default]
    Idle,
    Requested {
        stream_id: u32,
        key: StreamKey,
    },
    Live {
        stream_id: u32,
        key: StreamKey,
    },
}

/// The server's capabilities for the codecs that a client lists (Enhanced RTMP v2, "Enhancing
/// NetConnection connect Command"). Media passes through untouched, so every codec can be
/// forwarded; extensions that need the server's help are not offered.
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
/// A version that encoders with a list of known servers accept.
const FMS_VERSION: &str = "FMS/3,0,1,123";
/// §5.4.5.
const LIMIT_DYNAMIC: u8 = 2;
/// `FourCcInfoMask.CanForward`.
const CAN_FORWARD: f64 = 4.0;
/// Codecs per list that the server echoes.
const MAX_CODECS: usize = 64;
/// Publications per connection, one after another.
const MAX_PUBLICATIONS: usize = 64;
/// Message streams per connection at a time.
const MAX_STREAMS: usize = 16;
const MAX_BYTES_WITHOUT_PUBLICATION: usize = 1 << 20;

#[cfg(test)]
mod tests;
