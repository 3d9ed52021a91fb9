//! Both directions of a connection below commands and media: chunks, acknowledgements, pings.

use bytes::BytesMut;

use super::SessionError;
use crate::chunk::{
    ACKNOWLEDGEMENT, COMMAND_AMF0, COMMAND_AMF3, CONTROL_CSID, ChunkReader, ChunkWriter, Message,
    MessageHead, SET_PEER_BANDWIDTH, USER_CONTROL, WINDOW_ACK_SIZE,
};
use downpour_media::amf0::{Amf0Error, Decoder, Value};

/// Reads and writes messages, acknowledges received bytes and answers pings.
#[derive(Debug)]
pub(super) struct ChunkChannel {
    reader: ChunkReader,
    writer: ChunkWriter,
    /// Bytes to send to the peer.
    pub output: BytesMut,
    /// Bytes received, modulo 2³², the handshake included (§5.4.3).
    received: u32,
    /// Value of `received` in the last acknowledgement.
    acknowledged: u32,
    /// The peer's acknowledgement window in bytes; never 0.
    window: u32,
}

impl ChunkChannel {
    pub(super) fn new(max_message_len: usize) -> Self {
        Self {
            reader: ChunkReader::new(max_message_len),
            writer: ChunkWriter::new(),
            output: BytesMut::new(),
            received: 0,
            acknowledged: 0,
            window: WINDOW,
        }
    }

    /// Counts received bytes that [`ChunkChannel::read`] does not see, the handshake's.
    pub(super) fn count_received(&mut self, bytes: usize) {
        self.received = self.received.wrapping_add(bytes as u32);
    }

    /// Returns the number of messages since the last call that the peer left unfinished.
    pub(super) fn take_given_up(&mut self) -> u64 {
        self.reader.take_given_up()
    }

    /// Returns the next message that is not protocol control, or `None` once `input` is consumed.
    pub(super) fn read(&mut self, input: &mut &[u8]) -> Result<Option<Message>, SessionError> {
        loop {
            let before = input.len();
            let message = self.reader.read(input)?;
            self.count_received(before - input.len());
            let Some(message) = message else {
                self.acknowledge()?;
                return Ok(None);
            };
            match (message.kind, message.body()) {
                (ACKNOWLEDGEMENT, _) => {}
                // A window of 0 is invalid; keep the last one.
                (WINDOW_ACK_SIZE, &[a, b, c, d, ..]) => {
                    self.window = match u32::from_be_bytes([a, b, c, d]) {
                        0 => self.window,
                        window => window,
                    };
                }
                // The limit itself is not enforced: TCP has its own flow control.
                (SET_PEER_BANDWIDTH, &[a, b, c, d, ..]) => {
                    self.write_control(WINDOW_ACK_SIZE, &[a, b, c, d])?;
                }
                (USER_CONTROL, &[0, PING_REQUEST, a, b, c, d, ..]) => {
                    self.write_control(USER_CONTROL, &[0, PING_RESPONSE, a, b, c, d])?;
                }
                (WINDOW_ACK_SIZE | SET_PEER_BANDWIDTH, _) => {}
                _ => return Ok(Some(message)),
            }
        }
    }

    /// Sends an acknowledgement every half window. Peers that count differently would stall if it
    /// came only at the full window.
    fn acknowledge(&mut self) -> Result<(), SessionError> {
        if self.received.wrapping_sub(self.acknowledged) >= (self.window / 2).max(1) {
            self.acknowledged = self.received;
            self.write_control(ACKNOWLEDGEMENT, &self.received.to_be_bytes())?;
        }
        Ok(())
    }

    /// Writes a protocol control or user control message.
    pub(super) fn write_control(&mut self, kind: u8, body: &[u8]) -> Result<(), SessionError> {
        self.write(CONTROL_CSID, MessageHead { kind, stream_id: 0, timestamp: 0 }, body)
    }

    /// Announces and applies the payload size of outgoing chunks, in bytes.
    pub(super) fn set_chunk_size(&mut self, size: u32) -> Result<(), SessionError> {
        Ok(self.writer.set_chunk_size(size, &mut self.output)?)
    }

    /// Writes a command with its transaction id and arguments, the command object first.
    pub(super) fn write_command(
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
        self.write(COMMAND_CSID, head, &body)
    }

    /// Writes a message on the chunk stream `csid`.
    pub(super) fn write(
        &mut self,
        csid: u32,
        head: MessageHead,
        body: &[u8],
    ) -> Result<(), SessionError> {
        Ok(self.writer.write(csid, head, body, &mut self.output)?)
    }
}

/// A command message (§7.1.1).
#[derive(Debug)]
pub(super) struct Command {
    pub name: String,
    /// The transaction id; 0 if missing.
    pub transaction: f64,
    /// The command object and the arguments after it.
    arguments: Vec<Value>,
}

impl Command {
    /// Parses the body of a command message.
    ///
    /// # Errors
    /// If it is not AMF0, or does not begin with a name.
    pub(super) fn parse(message: &Message) -> Result<Self, SessionError> {
        let mut body = message.body();
        // The AMF3 form is a 0 byte ("AMF0 follows") and the AMF0 form.
        if message.kind == COMMAND_AMF3 && body.first() == Some(&0) {
            body = &body[1..];
        }
        let mut values = Decoder::new(body);
        let Some(Value::String(name)) = values.next().transpose()? else {
            return Err(SessionError::Command);
        };
        // ffmpeg as a server sends an `onFCPublish` without a transaction id.
        let transaction = values.next().transpose()?.and_then(|v| v.as_number()).unwrap_or(0.0);
        let mut arguments = Vec::new();
        for value in values {
            match value {
                Ok(value) => arguments.push(value),
                // AMF3 arguments occur only in commands that a session ignores.
                Err(Amf0Error::Unsupported(_)) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Self { name, transaction, arguments })
    }

    /// Returns the command object, or Null.
    pub(super) fn object(&self) -> &Value {
        self.arguments.first().unwrap_or(&Value::Null)
    }

    /// Returns the argument `index`, counted from 0 after the command object, or Null.
    pub(super) fn argument(&self, index: usize) -> &Value {
        self.arguments.get(index + 1).unwrap_or(&Value::Null)
    }
}

/// The acknowledgement window in bytes that a session announces, and assumes for the peer until the
/// peer announces its own. Most servers use this value.
pub(super) const WINDOW: u32 = 2_500_000;

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

    /// Takes the messages that `channel` has written.
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
        peer.write_control(USER_CONTROL, &[0, PING_REQUEST, 1, 2, 3, 4]).unwrap();
        assert!(ours.read(&mut &peer.output[..]).unwrap().is_none());
        assert_eq!(written(&mut ours), [(USER_CONTROL, vec![0, PING_RESPONSE, 1, 2, 3, 4])]);
    }

    #[test]
    fn every_half_window_is_acknowledged_with_a_wrapping_count() {
        let (mut peer, mut ours) = (channel(), channel());
        peer.write_control(WINDOW_ACK_SIZE, &1000u32.to_be_bytes()).unwrap();
        assert!(ours.read(&mut &peer.output.split()[..]).unwrap().is_none());
        assert_eq!(written(&mut ours), []);
        ours.received = u32::MAX - 100;
        ours.acknowledged = u32::MAX - 200;

        let head = MessageHead { kind: 8, stream_id: 1, timestamp: 0 };
        peer.write(4, head, &[0; 420]).unwrap();
        let mut input = &peer.output[..];
        let sent = input.len() as u32;
        assert!(ours.read(&mut input).unwrap().is_some());
        assert!(ours.read(&mut input).unwrap().is_none());
        let count = (u32::MAX - 100).wrapping_add(sent);
        assert!(count < 1000);
        assert_eq!(written(&mut ours), [(ACKNOWLEDGEMENT, count.to_be_bytes().to_vec())]);
    }

    #[test]
    fn a_window_of_0_is_ignored() {
        let (mut peer, mut ours) = (channel(), channel());
        peer.write_control(WINDOW_ACK_SIZE, &[0; 4]).unwrap();
        assert!(ours.read(&mut &peer.output.split()[..]).unwrap().is_none());
        assert_eq!(ours.window, WINDOW);
        assert_eq!(written(&mut ours), []);
    }

    #[test]
    fn a_window_of_1_acknowledges_every_read() {
        let (mut peer, mut ours) = (channel(), channel());
        peer.write_control(WINDOW_ACK_SIZE, &[0, 0, 0, 1]).unwrap();
        assert!(ours.read(&mut &peer.output.split()[..]).unwrap().is_none());
        assert_eq!(written(&mut ours).len(), 1);
    }

    #[test]
    fn truncated_control_messages_are_ignored() {
        let (mut peer, mut ours) = (channel(), channel());
        for kind in [WINDOW_ACK_SIZE, SET_PEER_BANDWIDTH, ACKNOWLEDGEMENT] {
            peer.write_control(kind, &[1]).unwrap();
        }
        assert!(ours.read(&mut &peer.output[..]).unwrap().is_none());
        assert_eq!(written(&mut ours), []);
    }
}
