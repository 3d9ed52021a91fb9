//! Writing FLV files and live FLV responses.

use std::io::{self, Write};

use crate::flv::Tag;

/// The file header (FLV 10.1 §E.2) and `PreviousTagSize0`, which precede the first tag.
///
/// Both the audio and the video flag are set: the tracks of a live stream are unknown when its
/// header is sent, and players rely on the tags.
pub const FILE_HEADER: [u8; 13] = [b'F', b'L', b'V', 1, 0b101, 0, 0, 0, 9, 0, 0, 0, 0];

/// Writes one FLV file.
#[derive(Debug)]
pub struct FlvWriter<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> FlvWriter<W> {
    /// Writes the file header to `inner`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn new(mut inner: W) -> io::Result<Self> {
        inner.write_all(&FILE_HEADER)?;
        Ok(Self { inner, bytes: FILE_HEADER.len() as u64 })
    }

    /// Continues a file of `bytes` bytes, which ends with a whole tag.
    pub fn resume(inner: W, bytes: u64) -> Self {
        Self { inner, bytes }
    }

    /// Writes a tag and its `PreviousTagSize`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&mut self, tag: &Tag) -> io::Result<()> {
        self.inner.write_all(tag.framed())?;
        self.bytes += tag.framed().len() as u64;
        Ok(())
    }

    /// Writes a tag with another timestamp (milliseconds), without copying its body.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_at(&mut self, tag: &Tag, timestamp: u32) -> io::Result<()> {
        self.inner.write_all(&tag.header_at(timestamp))?;
        self.inner.write_all(tag.framed().get(Tag::HEADER_LEN..).unwrap_or_default())?;
        self.bytes += tag.framed().len() as u64;
        Ok(())
    }

    /// Flushes the underlying writer.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }

    /// Returns the bytes written so far, the file header included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns a reference to the underlying writer.
    pub fn get_ref(&self) -> &W {
        &self.inner
    }

    /// Returns the underlying writer.
    pub fn into_inner(self) -> W {
        self.inner
    }
}
