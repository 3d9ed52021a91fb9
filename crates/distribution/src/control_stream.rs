//! QUIC streams of `downpour/1`: the control stream, and streams of one long message. Used by both ends.

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

/// Control stream that carries JSON messages.
pub(super) struct ControlStream {
    pub(super) sender: ControlSender,
    pub(super) receiver: ControlReceiver,
}

/// Sending half of a [`ControlStream`].
pub(super) struct ControlSender(SendStream);

/// Receiving half of a [`ControlStream`].
pub(super) struct ControlReceiver {
    recv: RecvStream,
    reader: ControlReader,
}

impl ControlStream {
    /// A control stream that accepts messages of up to `max_len` bytes.
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

    /// Finishes the stream, and waits a short time until the peer has acknowledged all of it.
    pub(super) async fn finish(&mut self) {
        let send = &mut self.sender.0;
        if send.finish().is_ok() {
            let _ = timeout(FINISH_TIMEOUT, send.stopped()).await;
        }
    }
}

impl ControlReceiver {
    /// Returns the next message, or `None` at the end of the stream. Cancel safe.
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
    /// Sends a message. Waits while the peer does not read.
    pub(super) async fn send(&mut self, message: &impl Serialize) -> Result<(), StreamError> {
        Ok(self.0.write_all(&encode_control(message)?).await?)
    }
}

/// Why a control stream failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StreamError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Message(#[from] ControlError),
}

/// Reads messages that are too long for a datagram, one per unidirectional stream, until the connection
/// ends. The limit of open streams bounds the memory.
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
                // The stream was reset, or is too slow for the message to be of use.
                Ok(Err(ReadToEndError::Read(_))) | Err(_) => return,
            };
            // Fails once the session has ended.
            let _ = messages.send(message).await;
        });
    }
}

/// Time after which a message on a unidirectional stream is useless.
pub(super) const STREAM_TIMEOUT: Duration = Duration::from_secs(2);
const FINISH_TIMEOUT: Duration = Duration::from_millis(500);
