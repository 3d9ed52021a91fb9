//! What both ends of a connection do alike, below commands and media.

use bytes::BytesMut;

use super::SessionError;
use crate::chunk::{
    ACKNOWLEDGEMENT, COMMAND_AMF0, COMMAND_AMF3, CONTROL_CSID, ChunkReader, ChunkWriter, Message,
    MessageHead, SET_PEER_BANDWIDTH, USER_CONTROL, WINDOW_ACK_SIZE,
};
use downpour_media::amf0::{Amf0Error, Decoder, Value};

/// Chunks in both directions, acknowledgements and pings.
#[derive(Debug)]
pub struct ChunkChannel {
    reader: ChunkReader,
    writer: ChunkWriter,
    /// Bytes for the peer.
    pub output: BytesMut,
    /// All bytes that came, modulo 2³², as the peer counts them (§5.4.3).
    received: u32,
    /// Up to where they have been acknowledged.
    acknowledged: u32,
    /// The peer's acknowledgement window; never 0.
    window: u32,
}

impl ChunkChannel {
    pub fn new(max_message_len: usize) -> Self {
        Self {
            reader: ChunkReader::new(max_message_len),
            writer: ChunkWriter::new(),
            output: BytesMut::new(),
            received: 0,
            acknowledged: 0,
            window: WINDOW,
        }
    }

    /// Counts bytes that did not go through [`ChunkChannel::read`]: the handshake's.
    pub fn count(&mut self, bytes: usize) {
        self.received = self.received.wrapping_add(bytes as u32);
    }

    /// The next message that the session itself must look at; `None` when `input` is used up.
    pub fn read(&mut self, input: &mut &[u8]) -> Result<Option<Message>, SessionError> {
        loop {
            let before = input.len();
            let message = self.reader.read(input)?;
            self.count(before - input.len());
            let Some(message) = message else {
                self.acknowledge()?;
                return Ok(None);
            };
            match (message.kind, message.body()) {
                (ACKNOWLEDGEMENT, _) => {}
                // A window of 0 would have us acknowledge nothing, for ever.
                (WINDOW_ACK_SIZE, &[a, b, c, d, ..]) => {
                    self.window = match u32::from_be_bytes([a, b, c, d]) {
                        0 => self.window,
                        window => window,
                    };
                }
                // We do not send so much that the limit could matter; the window is answered.
                (SET_PEER_BANDWIDTH, &[a, b, c, d, ..]) => {
                    self.control(WINDOW_ACK_SIZE, &[a, b, c, d])?;
                }
                (USER_CONTROL, &[0, PING_REQUEST, a, b, c, d, ..]) => {
                    self.control(USER_CONTROL, &[0, PING_RESPONSE, a, b, c, d])?;
                }
                (WINDOW_ACK_SIZE | SET_PEER_BANDWIDTH, _) => {}
                _ => return Ok(Some(message)),
            }
        }
    }

    /// Acknowledges what came once it is half the window: peers that count differently stall
    /// when it is late.
    fn acknowledge(&mut self) -> Result<(), SessionError> {
        if self.received.wrapping_sub(self.acknowledged) >= (self.window / 2).max(1) {
            self.acknowledged = self.received;
            self.control(ACKNOWLEDGEMENT, &self.received.to_be_bytes())?;
        }
        Ok(())
    }

    /// Writes a protocol control or user control message.
    pub fn control(&mut self, kind: u8, body: &[u8]) -> Result<(), SessionError> {
        self.media(CONTROL_CSID, MessageHead { kind, stream_id: 0, timestamp: 0 }, body)
    }

    /// Announces and applies the size of the chunks that we send.
    pub fn set_chunk_size(&mut self, size: u32) -> Result<(), SessionError> {
        Ok(self.writer.set_chunk_size(size, &mut self.output)?)
    }

    /// Writes a command with its transaction id and arguments, the command object first.
    pub fn command(
        &mut self,
        stream_id: u32,
        name: &str,
        transaction: f64,
        arguments: &[Value],
    ) -> Result<(), SessionError> {
        let mut body = BytesMut::new();
        Value::from(name).encode(&mut body)?;
        Value::from(transaction).encode(&mut body)?;
        for argument in arguments {
            argument.encode(&mut body)?;
        }
        let head = MessageHead { kind: COMMAND_AMF0, stream_id, timestamp: 0 };
        self.media(COMMAND_CSID, head, &body)
    }

    /// Writes any message.
    pub fn media(&mut self, csid: u32, head: MessageHead, body: &[u8]) -> Result<(), SessionError> {
        Ok(self.writer.write(csid, head, body, &mut self.output)?)
    }
}

/// A command message (§7.1.1).
#[derive(Debug)]
pub struct Command {
    pub name: String,
    pub transaction: f64,
    /// The command object, and what follows it.
    arguments: Vec<Value>,
}

impl Command {
    pub fn parse(message: &Message) -> Result<Self, SessionError> {
        let mut body = message.body();
        // The AMF3 form is a byte, 0 for "as in AMF0", in front of the AMF0 one.
        if message.kind == COMMAND_AMF3 && body.first() == Some(&0) {
            body = &body[1..];
        }
        let mut values = Decoder::new(body);
        let Some(Value::String(name)) = values.next().transpose()? else {
            return Err(SessionError::Command);
        };
        // ffmpeg as a server sends an `onFCPublish` that ends here.
        let transaction = values.next().transpose()?.and_then(|v| v.as_number()).unwrap_or(0.0);
        let mut arguments = Vec::new();
        for value in values {
            match value {
                Ok(value) => arguments.push(value),
                // What follows is in AMF3 or the like, and in no command that we act on.
                Err(Amf0Error::Unsupported(_)) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { name, transaction, arguments })
    }

    /// The command object, or Null.
    pub fn object(&self) -> &Value {
        self.arguments.first().unwrap_or(&Value::Null)
    }

    /// The `index`-th argument behind the command object, or Null.
    pub fn argument(&self, index: usize) -> &Value {
        self.arguments.get(index + 1).unwrap_or(&Value::Null)
    }
}

/// The acknowledgement window that we ask for, and assume until told otherwise: what most servers
/// say, in bytes.
pub const WINDOW: u32 = 2_500_000;

const COMMAND_CSID: u32 = 3;
/// User control event types (§7.1.7).
const PING_REQUEST: u8 = 6;
const PING_RESPONSE: u8 = 7;

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_media::flv::Tag;

    fn channel() -> ChunkChannel {
        ChunkChannel::new(Tag::MAX_BODY_LEN)
    }

    /// What `channel` has written, as messages.
    fn written(channel: &mut ChunkChannel) -> Vec<(u8, Vec<u8>)> {
        let output = channel.output.split();
        let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
        let mut rest = &output[..];
        std::iter::from_fn(|| reader.read(&mut rest).unwrap())
            .map(|message| (message.kind, message.body().to_vec()))
            .collect()
    }

    #[test]
    fn pings_are_answered() {
        let (mut peer, mut ours) = (channel(), channel());
        peer.control(USER_CONTROL, &[0, PING_REQUEST, 1, 2, 3, 4]).unwrap();
        assert!(ours.read(&mut &peer.output[..]).unwrap().is_none());
        assert_eq!(written(&mut ours), [(USER_CONTROL, vec![0, PING_RESPONSE, 1, 2, 3, 4])]);
    }

    #[test]
    fn every_half_window_is_acknowledged_and_the_count_wraps() {
        let (mut peer, mut ours) = (channel(), channel());
        peer.control(WINDOW_ACK_SIZE, &1000u32.to_be_bytes()).unwrap();
        assert!(ours.read(&mut &peer.output.split()[..]).unwrap().is_none());
        assert_eq!(written(&mut ours), []);
        ours.received = u32::MAX - 100;
        ours.acknowledged = u32::MAX - 200;

        let head = MessageHead { kind: 8, stream_id: 1, timestamp: 0 };
        peer.media(4, head, &[0; 420]).unwrap();
        let mut input = &peer.output[..];
        let sent = input.len() as u32;
        assert!(ours.read(&mut input).unwrap().is_some());
        assert!(ours.read(&mut input).unwrap().is_none());
        let count = (u32::MAX - 100).wrapping_add(sent);
        assert!(count < 1000);
        assert_eq!(written(&mut ours), [(ACKNOWLEDGEMENT, count.to_be_bytes().to_vec())]);
    }

    #[test]
    fn a_window_of_0_changes_nothing_and_one_of_1_is_obeyed() {
        let (mut peer, mut ours) = (channel(), channel());
        peer.control(WINDOW_ACK_SIZE, &[0; 4]).unwrap();
        assert!(ours.read(&mut &peer.output.split()[..]).unwrap().is_none());
        assert_eq!((ours.window, written(&mut ours)), (WINDOW, vec![]));
        peer.control(WINDOW_ACK_SIZE, &[0, 0, 0, 1]).unwrap();
        assert!(ours.read(&mut &peer.output.split()[..]).unwrap().is_none());
        assert_eq!(written(&mut ours).len(), 1);
    }

    #[test]
    fn control_messages_cut_short_are_ignored() {
        let (mut peer, mut ours) = (channel(), channel());
        for kind in [WINDOW_ACK_SIZE, SET_PEER_BANDWIDTH, ACKNOWLEDGEMENT] {
            peer.control(kind, &[1]).unwrap();
        }
        assert!(ours.read(&mut &peer.output[..]).unwrap().is_none());
        assert_eq!(written(&mut ours), []);
    }
}
