//! The streams of `downpour/1`, the same at both ends.

use std::time::Duration;

use bytes::Bytes;
use quinn::{
    Connection, ConnectionError, ReadError, ReadToEndError, RecvStream, SendStream, WriteError,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::mpsc, task::JoinSet, time::timeout};

use downpour_repair::{
    control::{ControlError, ControlReader, encode_control},
    message::{Message, MessageError},
};

/// The control stream, message by message.
pub(super) struct ControlStream {
    /// The half that sends.
    pub(super) sender: ControlSender,
    /// The half that receives.
    pub(super) receiver: ControlReceiver,
}

/// One half of a [`ControlStream`].
pub(super) struct ControlSender(SendStream);

/// The other half.
pub(super) struct ControlReceiver {
    recv: RecvStream,
    reader: ControlReader,
}

impl ControlStream {
    /// Takes messages of up to `max_len` bytes.
    pub(super) fn new(send: SendStream, recv: RecvStream, max_len: usize) -> Self {
        Self {
            sender: ControlSender(send),
            receiver: ControlReceiver { recv, reader: ControlReader::new(max_len) },
        }
    }

    /// As [`ControlReceiver::receive`].
    pub(super) async fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, StreamError> {
        self.receiver.receive().await
    }

    /// As [`ControlSender::send`].
    pub(super) async fn send(&mut self, message: &impl Serialize) -> Result<(), StreamError> {
        self.sender.send(message).await
    }

    /// Ends the stream and waits a little for the peer to have all of it.
    pub(super) async fn finish(&mut self) {
        let send = &mut self.sender.0;
        if send.finish().is_ok() {
            let _ = timeout(FINISH_TIMEOUT, send.stopped()).await;
        }
    }
}

impl ControlReceiver {
    /// The next message; none at the stream's end. Loses nothing when cancelled.
    pub(super) async fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, StreamError> {
        loop {
            if let Some(message) = self.reader.next_message()? {
                return Ok(Some(message));
            }
            let mut buffer = [0; 4096];
            match self.recv.read(&mut buffer).await? {
                Some(read) => self.reader.push(&buffer[..read]),
                None => return Ok(None),
            }
        }
    }
}

impl ControlSender {
    /// Sends a message; waits while the peer does not read.
    pub(super) async fn send(&mut self, message: &impl Serialize) -> Result<(), StreamError> {
        Ok(self.0.write_all(&encode_control(message)?).await?)
    }
}

/// Why a control stream cannot be used on.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Message(#[from] ControlError),
}

/// Reads messages that are too long for a datagram, each from a stream of its own, until the
/// connection ends. The number of streams that the peer may have open bounds what this holds.
pub(super) async fn read_messages(
    connection: &Connection,
    messages: mpsc::Sender<Result<Bytes, MessageError>>,
) -> ConnectionError {
    let mut readers = JoinSet::new();
    loop {
        let mut stream = match connection.accept_uni().await {
            Ok(stream) => stream,
            Err(error) => return error,
        };
        while readers.try_join_next().is_some() {}
        let messages = messages.clone();
        readers.spawn(async move {
            let read = timeout(STREAM_TIMEOUT, stream.read_to_end(Message::MAX_LEN)).await;
            let message = match read {
                Ok(Ok(message)) => Ok(message.into()),
                Ok(Err(ReadToEndError::TooLong)) => {
                    Err(MessageError::TooLong(Message::MAX_LEN + 1))
                }
                // Reset, or too slow to be of use.
                Ok(Err(ReadToEndError::Read(_))) | Err(_) => return,
            };
            // An error says that the connection is no longer served.
            let _ = messages.send(message).await;
        });
    }
}

/// A message on a stream of its own is of no use later than this.
pub(super) const STREAM_TIMEOUT: Duration = Duration::from_secs(2);
const FINISH_TIMEOUT: Duration = Duration::from_millis(500);
