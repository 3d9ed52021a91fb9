//! Writing FLV files and live FLV bodies.

use std::io::{self, Write};

use crate::flv::Tag;

/// The file header (FLV 10.1 §E.2) and `PreviousTagSize0` that stand in front of the first tag.
///
/// Both the audio and the video flag are set, because what a live stream will carry is not known
/// when its header goes out; players look at the tags.
pub const FILE_HEADER: [u8; 13] = [b'F', b'L', b'V', 1, 0b101, 0, 0, 0, 9, 0, 0, 0, 0];

/// Writes one FLV file.
#[derive(Debug)]
pub struct FlvWriter<W> {
    inner: W,
    bytes: u64,
}

impl<W: Write> FlvWriter<W> {
    /// Writes the file header.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn new(mut inner: W) -> io::Result<Self> {
        inner.write_all(&FILE_HEADER)?;
        Ok(Self { inner, bytes: FILE_HEADER.len() as u64 })
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

    /// Writes a tag as if it were of another time, without a copy of it.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_at(&mut self, tag: &Tag, timestamp: u32) -> io::Result<()> {
        self.inner.write_all(&tag.header_at(timestamp))?;
        self.inner.write_all(tag.framed().get(Tag::HEADER_LEN..).unwrap_or_default())?;
        self.bytes += tag.framed().len() as u64;
        Ok(())
    }

    /// Hands what is buffered to the writer below.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }

    /// Bytes written so far, the file header included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The writer below.
    pub fn get_ref(&self) -> &W {
        &self.inner
    }

    /// The writer below.
    pub fn into_inner(self) -> W {
        self.inner
    }
}
