//! Reading FLV files and live FLV responses.

use std::io::{self, Read};

use bytes::{Buf, BytesMut};

use crate::flv::{Tag, TagError, tag::TagHeader};
use downpour_sys::buffer::BufferMut;

/// Incremental FLV parser: bytes in, tags out.
///
/// After each [`FlvReader::push`], call [`FlvReader::next_tag`] until it returns `None`; the reader
/// then holds at most one unfinished tag (16 MiB). It ignores the flags of the file header and
/// `PreviousTagSize`, which writers get wrong. The first error is final.
///
/// States: `FileHeader` → `Skip` (rest of the file header) → `Tag` ⇄ `Skip` (`PreviousTagSize`);
/// any → `Failed`.
///
/// ```
/// use downpour_media::flv::{FILE_HEADER, FlvReader, Tag, TagKind};
/// let tag = Tag::new(TagKind::Audio, 40, &[0xaf, 1, 2]).unwrap();
/// let mut reader = FlvReader::new();
/// reader.push(&FILE_HEADER);
/// reader.push(tag.framed());
/// assert_eq!(reader.next_tag(), Ok(Some(tag)));
/// assert_eq!(reader.next_tag(), Ok(None));
/// ```
#[derive(Debug)]
pub struct FlvReader {
    buffer: BytesMut,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Waits for the 9 bytes of the file header.
    FileHeader,
    /// Discards this many bytes: the rest of the file header, or a `PreviousTagSize`.
    Skip(usize),
    /// Waits for a tag's header and body.
    Tag,
    /// Returns the same error to every call.
    Failed(FlvError),
}

impl FlvReader {
    /// A reader that expects a file header.
    pub fn new() -> Self {
        Self { buffer: BytesMut::new(), state: State::FileHeader }
    }

    /// Appends the next bytes of the file. Discards them after an error.
    pub fn push(&mut self, bytes: &[u8]) {
        if !matches!(self.state, State::Failed(_)) {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// Returns the next complete tag, or `None` if that takes more bytes.
    ///
    /// # Errors
    /// [`FlvError`] if the bytes are not FLV. Later calls return the same error.
    pub fn next_tag(&mut self) -> Result<Option<Tag>, FlvError> {
        let result = self.parse();
        if let Err(error) = &result {
            self.state = State::Failed(error.clone());
            self.buffer = BytesMut::new();
        }
        result
    }

    /// Returns `true` if the bytes so far end inside the file header or a tag.
    pub fn is_inside_tag(&self) -> bool {
        matches!(self.state, State::FileHeader) || !self.buffer.is_empty()
    }

    fn parse(&mut self) -> Result<Option<Tag>, FlvError> {
        loop {
            match &mut self.state {
                State::FileHeader => {
                    let signature = self.buffer.len().min(FILE_SIGNATURE.len());
                    if self.buffer[..signature] != FILE_SIGNATURE[..signature] {
                        return Err(FlvError::Signature);
                    }
                    let Some(&[_, _, _, version, _, o0, o1, o2, o3]) =
                        self.buffer.first_chunk::<FILE_HEADER_LEN>()
                    else {
                        return Ok(None);
                    };
                    if version != 1 {
                        return Err(FlvError::Version(version));
                    }
                    let offset = u32::from_be_bytes([o0, o1, o2, o3]);
                    if !(FILE_HEADER_LEN as u32..=MAX_DATA_OFFSET).contains(&offset) {
                        return Err(FlvError::DataOffset(offset));
                    }
                    self.state = State::Skip(offset as usize + Tag::TRAILER_LEN);
                }
                State::Skip(left) => {
                    let skipped = self.buffer.len().min(*left);
                    self.buffer.advance(skipped);
                    *left -= skipped;
                    if *left > 0 {
                        return Ok(None);
                    }
                    self.state = State::Tag;
                }
                State::Tag => {
                    if self.buffer.len() < Tag::HEADER_LEN {
                        return Ok(None);
                    }
                    let unit_len = Tag::HEADER_LEN + TagHeader::parse(&self.buffer)?.body_len;
                    let Some(bytes) = self.buffer.get(..unit_len) else { return Ok(None) };
                    // Copied out, so that a small tag does not keep the read buffer alive.
                    let mut unit = BufferMut::with_capacity(unit_len + Tag::TRAILER_LEN);
                    unit.put_slice(bytes);
                    self.buffer.advance(unit_len);
                    self.state = State::Skip(Tag::TRAILER_LEN);
                    return Ok(Some(Tag::from_unit(unit)?));
                }
                State::Failed(error) => return Err(error.clone()),
            }
        }
    }
}

impl Default for FlvReader {
    fn default() -> Self {
        Self::new()
    }
}

/// Why bytes are not an FLV file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlvError {
    /// It does not begin with `FLV`.
    #[error("not FLV: the data does not begin with the letters FLV")]
    Signature,
    /// A version other than 1.
    #[error("FLV version {0} is not supported; only version 1 exists")]
    Version(u8),
    /// A `DataOffset` below 9 bytes or over 64 KiB.
    #[error("the FLV file header has an invalid length of {0} bytes")]
    DataOffset(u32),
    /// An invalid tag.
    #[error(transparent)]
    Tag(#[from] TagError),
}

/// Iterator over the tags of an FLV file.
///
/// A file that is truncated inside a tag, as after a crash, yields its complete tags;
/// [`FlvTags::is_truncated`] reports it.
#[derive(Debug)]
pub struct FlvTags<R> {
    inner: R,
    reader: FlvReader,
    chunk: Box<[u8]>,
    done: bool,
}

impl<R: Read> FlvTags<R> {
    /// Reads from `inner`, which need not be buffered.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            reader: FlvReader::new(),
            chunk: vec![0; READ_CHUNK].into_boxed_slice(),
            done: false,
        }
    }

    /// Returns `true` if the file ended inside a tag or the file header. Meaningful after the last
    /// tag.
    pub fn is_truncated(&self) -> bool {
        self.done && self.reader.is_inside_tag()
    }

    fn read(&mut self) -> io::Result<Option<Tag>> {
        loop {
            let tag = self
                .reader
                .next_tag()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            if tag.is_some() {
                return Ok(tag);
            }
            match self.inner.read(&mut self.chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.reader.push(&self.chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl<R: Read> Iterator for FlvTags<R> {
    type Item = io::Result<Tag>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let tag = self.read().transpose();
        self.done = !matches!(tag, Some(Ok(_)));
        tag
    }
}

const FILE_SIGNATURE: &[u8] = b"FLV";
const FILE_HEADER_LEN: usize = 9;
/// Writers use 9. A larger value than this is garbage, not a header worth waiting for.
const MAX_DATA_OFFSET: u32 = 64 * 1024;
const READ_CHUNK: usize = 64 * 1024;

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::flv::{FILE_HEADER, FlvWriter, TagKind};

    #[test]
    fn a_file_truncated_at_any_byte_yields_its_complete_tags() {
        let tags = tags(&[(9, 0, vec![0x17, 0]), (8, 5, vec![0xaf, 1, 2]), (18, 9, vec![2])]);
        let file = file(&tags);
        for len in 0..=file.len() {
            let mut reader = FlvTags::new(&file[..len]);
            let read: Vec<_> = reader.by_ref().map(Result::unwrap).collect();
            let mut end = FILE_HEADER.len();
            let whole = tags
                .iter()
                .take_while(|tag| {
                    end += tag.framed().len();
                    end - Tag::TRAILER_LEN <= len
                })
                .count();
            assert_eq!(read, tags[..whole]);
        }
        let mut reader = FlvTags::new(&file[..file.len() - 5]);
        assert_eq!(reader.by_ref().count(), 2);
        assert!(reader.is_truncated());
    }

    #[test]
    fn an_error_is_immediate_and_final() {
        let error = |bytes: &[u8]| {
            let mut reader = FlvReader::new();
            reader.push(bytes);
            let error = reader.next_tag().unwrap_err();
            reader.push(&FILE_HEADER);
            assert_eq!(reader.next_tag().as_ref(), Err(&error));
            error
        };
        assert_eq!(error(b"<"), FlvError::Signature);
        assert_eq!(error(b"FLV\x02\x05\0\0\0\x09"), FlvError::Version(2));
        assert_eq!(error(b"FLV\x01\x05\0\0\0\x08"), FlvError::DataOffset(8));
        assert_eq!(error(b"FLV\x01\x05\xff\0\0\x09"), FlvError::DataOffset(0xff00_0009));
        let mut garbage = FILE_HEADER.to_vec();
        garbage.extend_from_slice(&[7; 11]);
        assert_eq!(error(&garbage), FlvError::Tag(TagError::UnknownType(7)));
    }

    #[test]
    fn a_longer_file_header_is_skipped() {
        let tags = tags(&[(8, 5, vec![0xaf, 1, 2])]);
        let mut file = b"FLV\x01\x04\0\0\0\x0c***\0\0\0\0".to_vec();
        file.extend_from_slice(tags[0].framed());
        let read: Vec<_> = FlvTags::new(&file[..]).map(Result::unwrap).collect();
        assert_eq!(read, tags);
    }

    proptest! {
        #[test]
        fn reading_returns_the_written_tags_at_any_split(
            specs in vec(
                (prop_oneof![Just(8u8), Just(9), Just(18)], any::<u32>(), vec(any::<u8>(), 0..600)),
                0..20,
            ),
            splits in vec(1usize..700, 1..50),
        ) {
            let tags = tags(&specs);
            let file = file(&tags);
            let mut reader = FlvReader::new();
            let mut read = Vec::new();
            let mut rest = &file[..];
            for size in splits.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let (chunk, tail) = rest.split_at(rest.len().min(*size));
                reader.push(chunk);
                while let Some(tag) = reader.next_tag().unwrap() {
                    read.push(tag);
                }
                rest = tail;
            }
            prop_assert_eq!(read, tags);
            prop_assert!(!reader.is_inside_tag());
        }

        #[test]
        fn arbitrary_input_parses_or_fails_cleanly(bytes in vec(any::<u8>(), 0..2000), header: bool) {
            let mut reader = FlvReader::new();
            if header {
                reader.push(&FILE_HEADER);
            }
            reader.push(&bytes);
            while let Ok(Some(_)) = reader.next_tag() {}
        }
    }

    fn tags(specs: &[(u8, u32, Vec<u8>)]) -> Vec<Tag> {
        specs
            .iter()
            .map(|(kind, timestamp, body)| {
                Tag::new(TagKind::from_type(*kind).unwrap(), *timestamp, body).unwrap()
            })
            .collect()
    }

    fn file(tags: &[Tag]) -> Vec<u8> {
        let mut writer = FlvWriter::new(Vec::new()).unwrap();
        for tag in tags {
            writer.write(tag).unwrap();
        }
        let bytes = writer.bytes();
        let file = writer.into_inner();
        assert_eq!(bytes, file.len() as u64);
        file
    }
}
