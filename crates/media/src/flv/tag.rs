//! FLV tags, the unit of media.

use std::fmt;

use super::{
    enhanced::{self, ExHeader},
    headers::HeaderSlot,
};
use downpour_sys::buffer::{Buffer, BufferMut};

/// The type of a tag (FLV 10.1 §E.4.1, `TagType`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum TagKind {
    /// `TagType` 8.
    Audio = 8,
    /// `TagType` 9.
    Video = 9,
    /// `TagType` 18: AMF0 script data, in a live stream `onMetaData`.
    Script = 18,
}

impl TagKind {
    /// Returns the kind for a `TagType` byte, if there is one. The filter bit (0x20) must be clear.
    #[inline]
    pub fn from_type(value: u8) -> Option<Self> {
        match value {
            8 => Some(Self::Audio),
            9 => Some(Self::Video),
            18 => Some(Self::Script),
            _ => None,
        }
    }
}

/// One audio, video or script tag, stored with its FLV framing.
///
/// The bytes are laid out as in an FLV file: an 11-byte tag header, the body, and the 4-byte
/// `PreviousTagSize`. RTP carries the first two parts, FLV outputs write all three. Clones share
/// the memory.
#[derive(Clone, PartialEq, Eq)]
pub struct Tag {
    framed: Buffer,
    kind: TagKind,
    timestamp: u32,
}

impl Tag {
    /// Bytes of the tag header before the body.
    pub const HEADER_LEN: usize = 11;
    /// Bytes of `PreviousTagSize` after the body.
    pub const TRAILER_LEN: usize = 4;
    /// The longest body in bytes: the maximum of the 24-bit `DataSize`.
    pub const MAX_BODY_LEN: usize = 0xff_ffff;

    /// Builds a tag from a copy of `body`. `timestamp` is in milliseconds and wraps at 2³².
    ///
    /// # Errors
    /// [`TagError::TooLong`] if the body is over [`Tag::MAX_BODY_LEN`].
    pub fn new(kind: TagKind, timestamp: u32, body: &[u8]) -> Result<Self, TagError> {
        let mut buffer = Self::buffer_for(body.len());
        buffer.put_slice(body);
        Self::from_buffer(kind, timestamp, buffer)
    }

    /// Returns a buffer that begins with [`Tag::HEADER_LEN`] placeholder bytes and has capacity for
    /// a body of `body_len` bytes and the trailer. Append the body, then call [`Tag::from_buffer`].
    #[inline]
    pub fn buffer_for(body_len: usize) -> BufferMut {
        let mut buffer = BufferMut::with_capacity(Self::HEADER_LEN + body_len + Self::TRAILER_LEN);
        buffer.put_slice(&[0; Self::HEADER_LEN]);
        buffer
    }

    /// Builds a tag from a buffer of [`Tag::HEADER_LEN`] placeholder bytes and the body. Does not
    /// copy if the buffer came from [`Tag::buffer_for`].
    ///
    /// # Errors
    /// [`TagError::TooLong`] if the body is over [`Tag::MAX_BODY_LEN`], [`TagError::Truncated`] if
    /// the placeholder bytes are missing.
    pub fn from_buffer(
        kind: TagKind,
        timestamp: u32,
        mut buffer: BufferMut,
    ) -> Result<Self, TagError> {
        let body_len = buffer.len().checked_sub(Self::HEADER_LEN).ok_or(TagError::Truncated)?;
        if body_len > Self::MAX_BODY_LEN {
            return Err(TagError::TooLong(body_len));
        }
        let head = header(kind, timestamp, body_len as u32);
        buffer[..Self::HEADER_LEN].copy_from_slice(&head);
        buffer.put_slice(&((Self::HEADER_LEN + body_len) as u32).to_be_bytes());
        Ok(Self { framed: buffer.freeze(), kind, timestamp })
    }

    /// Builds a tag from a received tag header and body, appending the trailer.
    ///
    /// # Errors
    /// [`TagError::UnknownType`] if the type is not 8, 9 or 18, [`TagError::Truncated`] if the
    /// header's length is not the body's.
    pub fn from_unit(mut unit: BufferMut) -> Result<Self, TagError> {
        let head = TagHeader::parse(&unit)?;
        if unit.len() != Self::HEADER_LEN + head.body_len {
            return Err(TagError::Truncated);
        }
        // The stream id is always 0 (§E.4.1), whatever the peer sent.
        unit[8..11].fill(0);
        unit.put_slice(&((Self::HEADER_LEN + head.body_len) as u32).to_be_bytes());
        Ok(Self { framed: unit.freeze(), kind: head.kind, timestamp: head.timestamp })
    }

    /// Returns a copy of the tag with another timestamp, in milliseconds.
    pub fn with_timestamp(&self, timestamp: u32) -> Self {
        if timestamp == self.timestamp {
            return self.clone();
        }
        let mut framed = BufferMut::from(&self.framed[..]);
        framed[..Self::HEADER_LEN].copy_from_slice(&self.header_at(timestamp));
        Self { framed: framed.freeze(), kind: self.kind, timestamp }
    }

    /// Returns a copy in a separate allocation, for tags that are kept long: short tags share
    /// memory blocks, and one of them would keep the whole block alive.
    pub fn detached(&self) -> Self {
        let Self { kind, timestamp, .. } = *self;
        Self { framed: BufferMut::from(&self.framed[..]).freeze(), kind, timestamp }
    }

    /// Returns the tag header with another timestamp, in milliseconds.
    #[inline]
    pub fn header_at(&self, timestamp: u32) -> [u8; Self::HEADER_LEN] {
        header(self.kind, timestamp, self.body().len() as u32)
    }

    /// Returns the type of the tag.
    #[inline]
    pub fn kind(&self) -> TagKind {
        self.kind
    }

    /// Returns the decoding time in milliseconds, which wraps at 2³².
    #[inline]
    pub fn timestamp(&self) -> u32 {
        self.timestamp
    }

    /// Returns the body.
    #[inline]
    pub fn body(&self) -> &[u8] {
        &self.framed[Self::HEADER_LEN..self.framed.len() - Self::TRAILER_LEN]
    }

    /// Returns header and body, the payload of RTP.
    #[inline]
    pub fn unit(&self) -> &[u8] {
        &self.framed[..self.framed.len() - Self::TRAILER_LEN]
    }

    /// Returns header, body and `PreviousTagSize`, as in an FLV file.
    #[inline]
    pub fn framed(&self) -> &Buffer {
        &self.framed
    }

    /// Returns `true` for a video frame at which decoding can start. Sequence headers and ends of
    /// sequence are not, although they carry the key frame flag.
    #[inline]
    pub fn is_key_frame(&self) -> bool {
        let body = self.body();
        let (TagKind::Video, Some(&first)) = (self.kind, body.first()) else { return false };
        if (first >> 4) & 0x7 != FRAME_TYPE_KEY {
            return false;
        }
        if first & 0x80 != 0 {
            return ExHeader::parse(self.kind, body).is_some_and(|header| {
                matches!(header.packet_type, enhanced::CODED_FRAMES | enhanced::CODED_FRAMES_X)
            });
        }
        // AVC, and HEVC under the unofficial codec id 12, have an `AVCPacketType` byte.
        match is_avc_like(first) {
            true => body.get(1) == Some(&AVC_NALU),
            false => body.len() > 1,
        }
    }

    /// Returns `true` for a decoder configuration with content: `AVCDecoderConfigurationRecord`,
    /// `AudioSpecificConfig`, or an Enhanced RTMP `SequenceStart`, of any track.
    #[inline]
    pub fn is_sequence_header(&self) -> bool {
        HeaderSlot::of(self).is_some_and(|slot| slot.is_sequence())
    }

    /// Returns `true` for a decoder configuration of the main track: one that is not in a multitrack
    /// packet (Enhanced RTMP v2).
    pub fn is_main_sequence_header(&self) -> bool {
        HeaderSlot::of(self).is_some_and(|slot| slot.is_sequence() && slot.is_main())
    }

    /// Returns `true` for metadata, sequence headers, and Enhanced RTMP's video metadata and channel
    /// configurations: the contents of [`Headers`](super::Headers).
    #[inline]
    pub fn is_header(&self) -> bool {
        HeaderSlot::of(self).is_some()
    }

    /// Returns `true` for a decoder configuration of AVC or AAC, with or without content.
    pub(crate) fn is_config_packet(&self) -> bool {
        let is_config = self.body().get(1) == Some(&0);
        self.body().first().is_some_and(|first| match self.kind {
            TagKind::Video => first & 0x80 == 0 && is_avc_like(*first) && is_config,
            TagKind::Audio => first >> 4 == SOUND_FORMAT_AAC && is_config,
            TagKind::Script => false,
        })
    }

    /// Returns `true` for `onMetaData`; `false` for captions, cue points and other script data.
    #[inline]
    pub fn is_metadata(&self) -> bool {
        self.kind == TagKind::Script && self.is_header()
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}@{}ms[{}]", self.kind, self.timestamp, self.body().len())
    }
}

/// The parsed 11-byte header of a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TagHeader {
    /// The type of the tag.
    pub kind: TagKind,
    /// Length of the body in bytes.
    pub body_len: usize,
    /// Decoding time in milliseconds, with `TimestampExtended` as its top 8 bits.
    pub timestamp: u32,
}

impl TagHeader {
    /// Parses the first [`Tag::HEADER_LEN`] bytes of `input`, ignoring the stream id.
    ///
    /// # Errors
    /// [`TagError::Truncated`] if `input` is shorter, [`TagError::UnknownType`] if the type is not
    /// 8, 9 or 18.
    #[inline]
    pub fn parse(input: &[u8]) -> Result<Self, TagError> {
        let Some(&[kind, s0, s1, s2, t0, t1, t2, t3, ..]) = input.first_chunk::<11>() else {
            return Err(TagError::Truncated);
        };
        Ok(Self {
            kind: TagKind::from_type(kind).ok_or(TagError::UnknownType(kind))?,
            body_len: u32::from_be_bytes([0, s0, s1, s2]) as usize,
            timestamp: u32::from_be_bytes([t3, t0, t1, t2]),
        })
    }
}

/// Why bytes are not an FLV tag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TagError {
    /// A body over [`Tag::MAX_BODY_LEN`] bytes.
    #[error("a tag body of {0} bytes is over the FLV limit of 16777215")]
    TooLong(usize),
    /// Fewer bytes than the header states.
    #[error("the FLV tag is truncated")]
    Truncated,
    /// A `TagType` that is not audio, video or script data.
    #[error("unknown FLV tag type {0}")]
    UnknownType(u8),
}

fn header(kind: TagKind, timestamp: u32, body_len: u32) -> [u8; Tag::HEADER_LEN] {
    let [_, s0, s1, s2] = body_len.to_be_bytes();
    let [t3, t0, t1, t2] = timestamp.to_be_bytes();
    [kind as u8, s0, s1, s2, t0, t1, t2, t3, 0, 0, 0]
}

/// `true` for the first byte of AVC, and of HEVC under the unofficial codec id 12.
pub(super) fn is_avc_like(first: u8) -> bool {
    matches!(first & 0x0f, 7 | 12)
}

const FRAME_TYPE_KEY: u8 = 1;
/// An information or command frame, which has no picture.
pub(super) const FRAME_TYPE_COMMAND: u8 = 5;
const AVC_NALU: u8 = 1;
pub(super) const SOUND_FORMAT_AAC: u8 = 10;
pub(super) const SOUND_FORMAT_EX_HEADER: u8 = 9;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn framing_has_the_layout_of_a_file() {
        let tag = Tag::new(TagKind::Video, 0x0102_0304, &[0x17, 1, 0, 0, 0]).unwrap();
        assert_eq!(
            &tag.framed()[..],
            [9, 0, 0, 5, 2, 3, 4, 1, 0, 0, 0, 0x17, 1, 0, 0, 0, 0, 0, 0, 16]
        );
        assert!(tag.is_key_frame());
        assert_eq!(Tag::from_unit(BufferMut::from(tag.unit())).unwrap(), tag);
        assert_eq!(tag.with_timestamp(7).timestamp(), 7);
    }

    #[test]
    fn sequence_headers_are_not_key_frames() {
        let video = |body: &[u8]| Tag::new(TagKind::Video, 0, body).unwrap();
        let audio = |body: &[u8]| Tag::new(TagKind::Audio, 0, body).unwrap();
        let header = video(&[0x17, 0, 0, 0, 0, 1]);
        assert!(header.is_sequence_header() && !header.is_key_frame());
        assert!(video(&[0x1c, 1]).is_key_frame());
        assert!(!video(&[0x27, 1]).is_key_frame());
        assert!(video(&[0x90, b'h', b'v', b'c', b'1', 1]).is_sequence_header());
        assert!(video(&[0x91, b'h', b'v', b'c', b'1']).is_key_frame());
        assert!(!video(&[0x94, b'h', b'v', b'c', b'1', 2]).is_key_frame());
        assert!(audio(&[0xaf, 0, 0x12]).is_sequence_header());
        assert!(!audio(&[0xaf, 1]).is_sequence_header());
        assert!(!audio(&[0x2f]).is_sequence_header());
        assert!(!video(&[]).is_key_frame());
        // ffmpeg's end of sequence, a truncated body, an Enhanced RTMP end of sequence.
        for ends in [&[0x17, 2, 0, 0, 0][..], &[0x17], &[0x92, b'h', b'v', b'c', b'1']] {
            assert!(!video(ends).is_key_frame() && !video(ends).is_sequence_header());
        }
        // A legacy codec, CodedFramesX, a multitrack packet, a timestamp offset.
        for starts in [&[0x12, 0][..], &[0x93, b'a'], &[0x96, 0x01], &[0x97, 2, 0, 0, 0, 0x01]] {
            assert!(video(starts).is_key_frame());
        }
        assert!(video(b"\x96\x00avc1\x01\x01").is_sequence_header());
        assert!(audio(b"\x95\x00mp4a\x01\x12").is_sequence_header());
        assert!(!video(b"\x96\x00avc1\x01\x01").is_main_sequence_header());
        assert!(!audio(b"\x95\x00mp4a\x01\x12").is_main_sequence_header());
        assert!(header.is_main_sequence_header());
        assert!(!video(&[0x97, 255, 0]).is_key_frame());
        let script = |body: &[u8]| Tag::new(TagKind::Script, 0, body).unwrap();
        assert!(script(b"\x02\x00\x0aonMetaData\x08").is_metadata());
        assert!(!script(b"\x02\x00\x0aonTextData\x08").is_metadata());
    }

    #[test]
    fn a_wrong_length_is_refused() {
        assert_eq!(Tag::from_unit(BufferMut::from(&[9u8, 0, 0, 5][..])), Err(TagError::Truncated));
        let mut unit = BufferMut::from(Tag::new(TagKind::Audio, 1, &[1, 2]).unwrap().unit());
        unit[3] = 3;
        assert_eq!(Tag::from_unit(unit), Err(TagError::Truncated));
    }
}
