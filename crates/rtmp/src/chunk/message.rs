//! Messages and their heads.

use downpour_media::flv::{Tag, TagError, TagKind};
use downpour_sys::buffer::BufferMut;

/// A complete RTMP message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The message type id (§5.4, §7.1), such as [`AUDIO`](super::AUDIO).
    pub kind: u8,
    /// The message stream; 0 is the connection itself.
    pub stream_id: u32,
    /// Milliseconds, wrapping at 2³².
    pub timestamp: u32,
    /// [`Tag::HEADER_LEN`] placeholder bytes, then the body.
    buffer: BufferMut,
}

impl Message {
    pub(super) fn new(head: MessageHead, buffer: BufferMut) -> Self {
        let MessageHead { kind, stream_id, timestamp } = head;
        Self { kind, stream_id, timestamp, buffer }
    }

    /// Returns the payload.
    #[inline]
    pub fn body(&self) -> &[u8] {
        self.buffer.get(Tag::HEADER_LEN..).unwrap_or_default()
    }

    /// Removes the first `len` bytes of the body, or all of it if it is shorter.
    pub fn skip(&mut self, len: usize) {
        self.buffer.advance(len.min(self.body().len()));
    }

    /// Converts the message into a tag without copying the body.
    ///
    /// # Errors
    /// [`TagError::TooLong`] for a body over [`Tag::MAX_BODY_LEN`], which no chunk stream can
    /// carry.
    pub fn into_tag(self, kind: TagKind) -> Result<Tag, TagError> {
        Tag::from_buffer(kind, self.timestamp, self.buffer)
    }
}

/// The header fields of a message, its length excepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageHead {
    /// The message type id.
    pub kind: u8,
    /// The message stream; 0 is the connection itself.
    pub stream_id: u32,
    /// Milliseconds, wrapping at 2³².
    pub timestamp: u32,
}
