//! Writing FLV files and live FLV responses.

use std::io::{self, Seek, SeekFrom, Write};

use super::{Tag, TagKind};

/// The kinds of media in a stream, as the flags of a file header state them.
///
/// Players in browsers wait for each kind that is flagged before they show anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tracks {
    /// There is audio.
    pub audio: bool,
    /// There is video.
    pub video: bool,
}

impl Tracks {
    /// Audio and video.
    pub const BOTH: Self = Self { audio: true, video: true };

    /// Adds the kind of a tag. Script data is no track.
    #[inline]
    pub fn add(&mut self, kind: TagKind) {
        match kind {
            TagKind::Audio => self.audio = true,
            TagKind::Video => self.video = true,
            TagKind::Script => {}
        }
    }

    /// `true` if neither kind is there.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// The file header (FLV 10.1 §E.2) and `PreviousTagSize0`, which precede the first tag.
    pub const fn file_header(self) -> [u8; 13] {
        [b'F', b'L', b'V', 1, self.flags(), 0, 0, 0, 9, 0, 0, 0, 0]
    }

    const fn flags(self) -> u8 {
        (self.audio as u8) << 2 | self.video as u8
    }
}

/// The file header of a stream with audio and video, see [`Tracks::file_header`].
pub const FILE_HEADER: [u8; 13] = Tracks::BOTH.file_header();

/// Writes one FLV file.
#[derive(Debug)]
pub struct FlvWriter<W> {
    inner: W,
    bytes: u64,
    /// The flags in the file header.
    flagged: Tracks,
    /// The kinds of the tags written.
    tracks: Tracks,
}

impl<W: Write> FlvWriter<W> {
    /// Writes the file header to `inner`, with both flags set.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn new(inner: W) -> io::Result<Self> {
        Self::with_tracks(inner, Tracks::BOTH)
    }

    /// Writes the file header to `inner`, with the flags of `tracks`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn with_tracks(mut inner: W, tracks: Tracks) -> io::Result<Self> {
        let header = tracks.file_header();
        inner.write_all(&header)?;
        let bytes = header.len() as u64;
        Ok(Self { inner, bytes, flagged: tracks, tracks: Tracks::default() })
    }

    /// Continues a file of `bytes` bytes, which ends with a whole tag and has tags of `tracks`.
    /// [`FlvWriter::flush_with_flags`] writes the flags again, since it may have failed before.
    pub fn resume(inner: W, bytes: u64, tracks: Tracks) -> Self {
        Self { inner, bytes, flagged: Tracks::default(), tracks }
    }

    /// Writes a tag and its `PreviousTagSize`.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&mut self, tag: &Tag) -> io::Result<()> {
        self.write_at(tag, tag.timestamp())
    }

    /// Writes a tag with another timestamp (milliseconds), without copying its body.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_at(&mut self, tag: &Tag, timestamp: u32) -> io::Result<()> {
        self.inner.write_all(&tag.header_at(timestamp))?;
        self.inner.write_all(tag.framed().get(Tag::HEADER_LEN..).unwrap_or_default())?;
        self.bytes += tag.framed().len() as u64;
        self.tracks.add(tag.kind());
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

    /// The kinds of the tags written so far.
    pub fn tracks(&self) -> Tracks {
        self.tracks
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

impl<W: Write + Seek> FlvWriter<W> {
    /// Flushes, and sets the flags in the file header to the kinds of the tags written so far.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn flush_with_flags(&mut self) -> io::Result<()> {
        if self.flagged != self.tracks {
            self.inner.seek(SeekFrom::Start(FLAGS_OFFSET))?;
            self.inner.write_all(&[self.tracks.flags()])?;
            self.inner.seek(SeekFrom::End(0))?;
            self.flagged = self.tracks;
        }
        self.inner.flush()
    }
}

const FLAGS_OFFSET: u64 = 4;

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn flags_of_a_file_follow_its_tags() {
        let tag = |kind| Tag::new(kind, 0, &[2, 1]).unwrap();
        let mut writer =
            FlvWriter::with_tracks(Cursor::new(Vec::new()), Tracks::default()).unwrap();
        let mut expected = 0;
        for (kind, flag) in [
            (TagKind::Script, 0),
            (TagKind::Video, 1),
            (TagKind::Video, 1),
            (TagKind::Audio, 4),
            (TagKind::Video, 1),
        ] {
            writer.write(&tag(kind)).unwrap();
            writer.flush_with_flags().unwrap();
            expected |= flag;
            let file = writer.get_ref().get_ref();
            assert_eq!(file[4], expected, "{kind:?}");
            assert_eq!(file.len() as u64, writer.bytes());
            assert!(file.ends_with(tag(kind).framed()));
        }
    }
}
