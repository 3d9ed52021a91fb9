//! Framing: one JSON document behind its length.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

/// Splits a control stream into messages, independent of how the stream is cut into reads.
#[derive(Debug)]
pub struct ControlReader {
    buffer: BytesMut,
    max_len: usize,
}

impl ControlReader {
    /// Accepts messages of up to `max_len` bytes, at most [`MAX_CONTROL_LEN`].
    pub fn new(max_len: usize) -> Self {
        Self { buffer: BytesMut::new(), max_len: max_len.min(MAX_CONTROL_LEN) }
    }

    /// Appends bytes of the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next message, or `None` until all of it was pushed.
    ///
    /// # Errors
    /// [`ControlError::Length`] as soon as the length prefix is out of range, so that an oversized
    /// message is never buffered; [`ControlError::Json`] if the content is not a message.
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

/// Encodes one message with its length prefix.
///
/// # Errors
/// [`ControlError::Length`] if the message is over [`MAX_CONTROL_LEN`]; [`ControlError::Json`] if it
/// cannot be serialized.
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

/// Error of reading or writing a control message. A stream cannot be read any further after it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The length is 0 or over the limit.
    #[error("control message of {length} bytes; 1 to {max} are allowed")]
    Length {
        /// Length of the message in bytes.
        length: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// The content is not the JSON of a message.
    #[error("invalid control message: {0}")]
    Json(String),
}

/// The longest message, in bytes: 1 MiB.
pub const MAX_CONTROL_LEN: usize = 1 << 20;
/// The longest message from an edge, in bytes: 256 KiB.
pub const MAX_EDGE_MESSAGE: usize = 256 * 1024;
const LENGTH_LEN: usize = 4;
