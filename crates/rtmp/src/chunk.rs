//! The RTMP chunk stream: messages cut into chunks, several at a time.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0 §5.3. Where real encoders differ from it,
//! the comments say who and how.

use bytes::{BufMut, BytesMut};

use downpour_media::flv::{Tag, TagError, TagKind};
use downpour_sys::buffer::BufferMut;

/// Puts messages together from chunks, at any split of the input.
///
/// Each body is copied once, out of the input into the buffer that becomes a [`Tag`]. Memory grows
/// with the bytes that really come, never with the length that a header claims.
#[derive(Debug)]
pub struct ChunkReader {
    /// The largest payload of a chunk, as the peer last set it.
    chunk_size: usize,
    max_message_len: usize,
    /// A handful in practice, so a scan beats a map; [`MAX_CHUNK_STREAMS`] at most.
    streams: Vec<ChunkStream>,
    /// The chunk whose payload is being read: its stream's place, and the bytes still to come.
    current: Option<(usize, usize)>,
    /// The start of a header that the last input broke off in.
    carry: [u8; MAX_HEADER_LEN],
    carry_len: usize,
    /// Bytes granted to the buffers of unfinished messages.
    assembling: usize,
}

impl ChunkReader {
    /// A reader at the start of a chunk stream. A message longer than `max_message_len` bytes is
    /// an error, and unfinished messages may hold twice that together.
    pub fn new(max_message_len: usize) -> Self {
        Self {
            chunk_size: DEFAULT_CHUNK_SIZE,
            max_message_len: max_message_len.min(Tag::MAX_BODY_LEN),
            streams: Vec::new(),
            current: None,
            carry: [0; MAX_HEADER_LEN],
            carry_len: 0,
            assembling: 0,
        }
    }

    /// Takes bytes off `input` until a message is whole, and yields it; `None` when all input is
    /// used up. Set Chunk Size and Abort take effect here and are not yielded.
    ///
    /// # Errors
    /// Whatever cannot be part of a chunk stream. The reader is of no more use then.
    pub fn read(&mut self, input: &mut &[u8]) -> Result<Option<Message>, ChunkError> {
        loop {
            let (index, left) = match self.current {
                Some(current) => current,
                None => {
                    let Some(parsed) = self.next_header(input)? else { return Ok(None) };
                    self.begin_chunk(parsed)?
                }
            };
            let left = left - self.take_payload(index, left, input)?;
            if left > 0 {
                self.current = Some((index, left));
                return Ok(None);
            }
            self.current = None;
            let Some(message) = self.finish(index) else { continue };
            match message.kind {
                SET_CHUNK_SIZE => self.set_chunk_size(message.body())?,
                ABORT => self.abort(message.body())?,
                _ => return Ok(Some(message)),
            }
        }
    }

    /// Reads a header across the seam between the carried bytes and the input.
    fn next_header(&mut self, input: &mut &[u8]) -> Result<Option<Parsed>, ChunkError> {
        if self.carry_len == 0 {
            if let Some((parsed, rest)) = self.parse_header(input)? {
                *input = rest;
                return Ok(Some(parsed));
            }
            // No header is longer than the carry, so what does not parse fits.
            self.carry[..input.len()].copy_from_slice(input);
            self.carry_len = input.len();
            *input = &[];
            return Ok(None);
        }
        let held = self.carry_len;
        let added = input.len().min(MAX_HEADER_LEN - held);
        self.carry[held..held + added].copy_from_slice(&input[..added]);
        let joined = &self.carry[..held + added];
        let Some((parsed, rest)) = self.parse_header(joined)? else {
            self.carry_len = held + added;
            *input = &input[added..];
            return Ok(None);
        };
        let used = joined.len() - rest.len();
        if used >= held {
            self.carry_len = 0;
            *input = &input[used - held..];
        } else {
            // An extended timestamp was waited for, and turned out to be payload.
            self.carry.copy_within(used..held, 0);
            self.carry_len = held - used;
        }
        Ok(Some(parsed))
    }

    /// Reads a chunk's basic header, message header and extended timestamp (§5.3.1), and returns
    /// what follows them; `None` if the input is too short.
    fn parse_header<'a>(&self, input: &'a [u8]) -> Result<Option<(Parsed, &'a [u8])>, ChunkError> {
        let Some((&first, mut rest)) = input.split_first() else { return Ok(None) };
        let csid = match first & 0x3f {
            0 => {
                let Some((&[low], tail)) = rest.split_first_chunk() else { return Ok(None) };
                rest = tail;
                64 + u32::from(low)
            }
            1 => {
                let Some((&pair, tail)) = rest.split_first_chunk() else { return Ok(None) };
                rest = tail;
                64 + u32::from(u16::from_le_bytes(pair))
            }
            id => id.into(),
        };
        let index = self.streams.iter().position(|stream| stream.csid == csid);
        let known = index.and_then(|index| self.streams.get(index));
        let partial = known.is_some_and(|stream| stream.buffer.is_some());

        let format = first >> 6;
        if format == 3 {
            let mut header = known.ok_or(ChunkError::NoHeader(csid))?.header;
            if let Some(extended) = header.extended {
                // The specification repeats the extended timestamp here, and librtmp left it out
                // until 2024 (OBS #10097): it is there if these bytes are the same value.
                match repeats(rest, [extended, header.timestamp]) {
                    Some(true) => rest = &rest[4..],
                    Some(false) => {}
                    None => return Ok(None),
                }
            }
            if !partial {
                // §5.3.1.2.4: a new message at the same distance as the one before.
                header.timestamp = header.timestamp.wrapping_add(header.delta);
            }
            return Ok(Some((Parsed { csid, index, header }, rest)));
        }
        if partial {
            return Err(ChunkError::UnexpectedHeader(csid));
        }

        // A stream may well begin with format 1: librtmp sends its first ping so.
        let mut header = match known {
            Some(stream) => stream.header,
            None if format < 2 => Header::default(),
            None => return Err(ChunkError::NoHeader(csid)),
        };
        let Some((fields, tail)) = rest.split_at_checked([11, 7, 3][usize::from(format)]) else {
            return Ok(None);
        };
        rest = tail;
        let mut time = u24(fields);
        header.extended = None;
        if time == EXTENDED {
            let Some((&value, tail)) = rest.split_first_chunk() else { return Ok(None) };
            rest = tail;
            time = u32::from_be_bytes(value);
            header.extended = Some(time);
        }
        // Extended or not, formats 1 and 2 hold a difference (SRS #4356). A format 3 after a
        // format 0 repeats its absolute time as the difference (§5.3.1.2.4), and ffmpeg counts
        // on that.
        header.delta = time;
        header.timestamp = if format == 0 { time } else { header.timestamp.wrapping_add(time) };
        if let Some(&[length @ .., kind]) = fields.get(3..).and_then(|f| f.first_chunk::<4>()) {
            header.length = u24(&length) as usize;
            header.kind = kind;
        }
        if let Some(&stream_id) = fields.get(7..).and_then(|f| f.first_chunk()) {
            header.stream_id = u32::from_le_bytes(stream_id);
        }
        Ok(Some((Parsed { csid, index, header }, rest)))
    }

    /// Makes room for a message that begins, and yields the chunk's stream and payload length.
    fn begin_chunk(&mut self, parsed: Parsed) -> Result<(usize, usize), ChunkError> {
        let index = match parsed.index {
            Some(index) => index,
            None if self.streams.len() >= MAX_CHUNK_STREAMS => {
                return Err(ChunkError::TooManyStreams);
            }
            None => {
                self.streams.push(ChunkStream { csid: parsed.csid, ..ChunkStream::default() });
                self.streams.len() - 1
            }
        };
        let header = parsed.header;
        let Some(stream) = self.streams.get_mut(index) else {
            return Err(ChunkError::NoHeader(parsed.csid));
        };
        stream.header = header;
        let received = match &stream.buffer {
            Some(buffer) => buffer.len() - Tag::HEADER_LEN,
            None => {
                let limit = match header.kind {
                    AUDIO | VIDEO | DATA_AMF0 | DATA_AMF3 | AGGREGATE => self.max_message_len,
                    _ => MAX_COMMAND_LEN.min(self.max_message_len),
                };
                if header.length > limit {
                    return Err(ChunkError::TooLong { length: header.length, limit });
                }
                // Credit for what this stream has really sent before; a first message that claims
                // 16 MB gets 4 KB.
                let granted = header.length.min(stream.largest.max(FIRST_GRANT));
                self.assembling += granted;
                stream.granted = granted;
                stream.buffer = Some(Tag::buffer_for(granted));
                0
            }
        };
        if self.assembling > 2 * self.max_message_len {
            return Err(ChunkError::TooMuchUnfinished);
        }
        Ok((index, self.chunk_size.min(header.length - received)))
    }

    /// Copies up to `left` bytes of payload and says how many.
    fn take_payload(
        &mut self,
        index: usize,
        left: usize,
        input: &mut &[u8],
    ) -> Result<usize, ChunkError> {
        let Some(stream) = self.streams.get_mut(index) else { return Ok(left) };
        let Some(buffer) = &mut stream.buffer else { return Ok(left) };
        let carried = self.carry_len.min(left);
        let (head, rest) = input.split_at(input.len().min(left - carried));
        *input = rest;
        let taken = carried + head.len();

        let received = buffer.len() - Tag::HEADER_LEN;
        if received + taken > stream.granted {
            let granted = stream.header.length.min((received + taken).max(2 * stream.granted));
            self.assembling += granted - stream.granted;
            stream.granted = granted;
            if self.assembling > 2 * self.max_message_len {
                return Err(ChunkError::TooMuchUnfinished);
            }
            buffer.reserve(granted - received + Tag::TRAILER_LEN);
        }
        if carried > 0 {
            buffer.put_slice(&self.carry[..carried]);
            self.carry.copy_within(carried..self.carry_len, 0);
            self.carry_len -= carried;
        }
        buffer.put_slice(head);
        Ok(taken)
    }

    /// The stream's message, if it is whole.
    fn finish(&mut self, index: usize) -> Option<Message> {
        let stream = self.streams.get_mut(index)?;
        let len = stream.buffer.as_ref()?.len() - Tag::HEADER_LEN;
        if len < stream.header.length {
            return None;
        }
        self.assembling -= stream.granted;
        stream.granted = 0;
        stream.largest = stream.largest.max(len.min(LARGEST_GRANT));
        Some(Message {
            kind: stream.header.kind,
            stream_id: stream.header.stream_id,
            timestamp: stream.header.timestamp,
            buffer: stream.buffer.take()?,
        })
    }

    fn set_chunk_size(&mut self, body: &[u8]) -> Result<(), ChunkError> {
        let size = u32::from_be_bytes(*body.first_chunk().ok_or(ChunkError::ShortControl)?);
        // §5.4.1: the first bit must be 0, and at least one byte must go into a chunk.
        if size == 0 || size > MAX_CHUNK_SIZE {
            return Err(ChunkError::ChunkSize(size));
        }
        self.chunk_size = size as usize;
        Ok(())
    }

    fn abort(&mut self, body: &[u8]) -> Result<(), ChunkError> {
        let csid = u32::from_be_bytes(*body.first_chunk().ok_or(ChunkError::ShortControl)?);
        if let Some(stream) = self.streams.iter_mut().find(|stream| stream.csid == csid) {
            stream.buffer = None;
            self.assembling -= stream.granted;
            stream.granted = 0;
        }
        Ok(())
    }
}

/// A whole RTMP message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The message type id (§5.4, §7.1): [`AUDIO`] and the like.
    pub kind: u8,
    /// The message stream that it belongs to; 0 for the connection.
    pub stream_id: u32,
    /// Milliseconds, wrapping at 2³².
    pub timestamp: u32,
    /// The body behind the room for a tag header.
    buffer: BufferMut,
}

impl Message {
    /// The payload.
    pub fn body(&self) -> &[u8] {
        self.buffer.get(Tag::HEADER_LEN..).unwrap_or_default()
    }

    /// Cuts `len` bytes off the front of the body, or all of it.
    pub fn skip(&mut self, len: usize) {
        self.buffer.advance(len.min(self.body().len()));
    }

    /// Frames the body as a tag, in place.
    ///
    /// # Errors
    /// [`TagError::TooLong`] for a body over [`Tag::MAX_BODY_LEN`], which no chunk stream carries.
    pub fn into_tag(self, kind: TagKind) -> Result<Tag, TagError> {
        Tag::from_buffer(kind, self.timestamp, self.buffer)
    }
}

/// Cuts messages into chunks.
#[derive(Debug)]
pub struct ChunkWriter {
    chunk_size: usize,
    /// What was last written on each chunk stream; as many as the caller uses.
    streams: Vec<(u32, Header)>,
}

impl ChunkWriter {
    /// A writer at the start of a chunk stream.
    pub fn new() -> Self {
        Self { chunk_size: DEFAULT_CHUNK_SIZE, streams: Vec::new() }
    }

    /// Tells the peer that chunks carry up to `size` bytes from now on; 1 to 2³¹ − 1, and what is
    /// beyond is clamped.
    pub fn set_chunk_size(&mut self, size: u32, out: &mut BytesMut) -> Result<(), ChunkError> {
        let size = size.clamp(1, MAX_CHUNK_SIZE);
        let head = MessageHead { kind: SET_CHUNK_SIZE, stream_id: 0, timestamp: 0 };
        self.write(CONTROL_CSID, head, &size.to_be_bytes(), out)?;
        self.chunk_size = size as usize;
        Ok(())
    }

    /// Writes a whole message.
    ///
    /// # Errors
    /// [`ChunkError::TooLong`] for a body that 24 bits cannot tell.
    pub fn write(
        &mut self,
        csid: u32,
        head: MessageHead,
        body: &[u8],
        out: &mut BytesMut,
    ) -> Result<(), ChunkError> {
        let mut message = self.begin(csid, head, body.len())?;
        while self.write_chunk(&mut message, body, out) {}
        Ok(())
    }

    /// Begins a message of `length` bytes, to be written chunk by chunk, so that others can go in
    /// between. Only one at a time may be unfinished on each chunk stream.
    ///
    /// # Errors
    /// As for [`ChunkWriter::write`].
    pub fn begin(
        &mut self,
        csid: u32,
        head: MessageHead,
        length: usize,
    ) -> Result<OutgoingMessage, ChunkError> {
        if length > Tag::MAX_BODY_LEN {
            return Err(ChunkError::TooLong { length, limit: Tag::MAX_BODY_LEN });
        }
        let mut header = Header {
            timestamp: head.timestamp,
            delta: NO_DELTA,
            length,
            kind: head.kind,
            stream_id: head.stream_id,
            extended: (head.timestamp >= EXTENDED).then_some(head.timestamp),
        };
        let mut format = 0;
        match self.streams.iter_mut().find(|(id, _)| *id == csid) {
            Some((_, last)) => {
                let delta = head.timestamp.wrapping_sub(last.timestamp);
                // A step back, or one that needs an extended difference, is told absolutely:
                // peers read extended differences in two ways.
                if last.stream_id == head.stream_id && delta < EXTENDED {
                    header.delta = delta;
                    header.extended = None;
                    format = match (last.length, last.kind) == (length, head.kind) {
                        true if last.delta == delta => 3,
                        true => 2,
                        false => 1,
                    };
                }
                *last = header;
            }
            None => self.streams.push((csid, header)),
        }
        Ok(OutgoingMessage { csid, format, header, offset: 0, started: false })
    }

    /// Writes the next chunk of `message`, whose whole body is `body`, and says whether there is
    /// more to write.
    pub fn write_chunk(
        &self,
        message: &mut OutgoingMessage,
        body: &[u8],
        out: &mut BytesMut,
    ) -> bool {
        let format = if message.started { 3 } else { message.format };
        message.started = true;
        let header = &message.header;
        match message.csid {
            csid @ ..64 => out.put_u8(format << 6 | csid as u8),
            csid @ 64..320 => out.put_slice(&[format << 6, (csid - 64) as u8]),
            csid => {
                out.put_u8(format << 6 | 1);
                out.put_u16_le((csid - 64) as u16);
            }
        }
        if format < 3 {
            let time = if format == 0 { header.timestamp } else { header.delta };
            out.put_uint(time.min(EXTENDED).into(), 3);
        }
        if format < 2 {
            out.put_uint(header.length as u64, 3);
            out.put_u8(header.kind);
        }
        if format == 0 {
            out.put_u32_le(header.stream_id);
        }
        if let Some(extended) = header.extended {
            out.put_u32(extended);
        }
        let rest = body.get(message.offset..header.length).unwrap_or_default();
        let payload = &rest[..rest.len().min(self.chunk_size)];
        out.put_slice(payload);
        message.offset += payload.len();
        payload.len() < rest.len()
    }
}

impl Default for ChunkWriter {
    fn default() -> Self {
        Self::new()
    }
}

/// What a message's header tells besides its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MessageHead {
    /// The message type id.
    pub kind: u8,
    /// The message stream.
    pub stream_id: u32,
    /// Milliseconds, wrapping at 2³².
    pub timestamp: u32,
}

/// A message of which some chunks have been written.
#[derive(Debug)]
pub struct OutgoingMessage {
    csid: u32,
    format: u8,
    header: Header,
    offset: usize,
    started: bool,
}

/// Why bytes are not a chunk stream that we take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// A chunk that refers to a header that never came.
    #[error("chunk stream {0} starts without a header")]
    NoHeader(u32),
    /// A new message before the last one on the chunk stream is whole.
    #[error("chunk stream {0} starts a message inside a message")]
    UnexpectedHeader(u32),
    /// More than [`MAX_CHUNK_STREAMS`] chunk streams.
    #[error("there are more than {MAX_CHUNK_STREAMS} chunk streams")]
    TooManyStreams,
    /// A message over the limit for its type.
    #[error("a message of {length} bytes is over the limit of {limit}")]
    TooLong {
        /// Claimed bytes.
        length: usize,
        /// Allowed bytes.
        limit: usize,
    },
    /// Unfinished messages hold too much memory together.
    #[error("too many bytes in unfinished messages")]
    TooMuchUnfinished,
    /// Set Chunk Size with 0 or with the high bit set.
    #[error("a chunk size of {0} is not allowed")]
    ChunkSize(u32),
    /// A control message without its four bytes.
    #[error("a control message is cut short")]
    ShortControl,
}

/// Set Chunk Size, §5.4.1.
pub const SET_CHUNK_SIZE: u8 = 1;
/// Abort Message, §5.4.2.
pub const ABORT: u8 = 2;
/// Acknowledgement, §5.4.3.
pub const ACKNOWLEDGEMENT: u8 = 3;
/// User Control Message, §6.2.
pub const USER_CONTROL: u8 = 4;
/// Window Acknowledgement Size, §5.4.4.
pub const WINDOW_ACK_SIZE: u8 = 5;
/// Set Peer Bandwidth, §5.4.5.
pub const SET_PEER_BANDWIDTH: u8 = 6;
/// Audio Message, §7.1.4.
pub const AUDIO: u8 = 8;
/// Video Message, §7.1.5.
pub const VIDEO: u8 = 9;
/// Data Message in AMF3, §7.1.2.
pub const DATA_AMF3: u8 = 15;
/// Command Message in AMF3, §7.1.1.
pub const COMMAND_AMF3: u8 = 17;
/// Data Message in AMF0, §7.1.2.
pub const DATA_AMF0: u8 = 18;
/// Command Message in AMF0, §7.1.1.
pub const COMMAND_AMF0: u8 = 20;
/// Aggregate Message, §7.1.6.
pub const AGGREGATE: u8 = 22;
/// The chunk stream of protocol control messages.
pub const CONTROL_CSID: u32 = 2;
/// Chunk streams that a peer may use. Encoders use five or six.
pub const MAX_CHUNK_STREAMS: usize = 64;
/// Bytes of a message that is no media: commands and control.
pub const MAX_COMMAND_LEN: usize = 64 << 10;

#[derive(Debug, Default)]
struct ChunkStream {
    csid: u32,
    header: Header,
    /// The unfinished message.
    buffer: Option<BufferMut>,
    /// Bytes of body that `buffer` has been given room for.
    granted: usize,
    /// The longest message so far, up to [`LARGEST_GRANT`].
    largest: usize,
}

#[derive(Debug, Default, Clone, Copy)]
struct Header {
    timestamp: u32,
    delta: u32,
    length: usize,
    kind: u8,
    stream_id: u32,
    /// The value of the extended timestamp field, if the last header had one.
    extended: Option<u32>,
}

struct Parsed {
    csid: u32,
    index: Option<usize>,
    header: Header,
}

/// Whether `input` begins with one of `values`; `None` while too few bytes are there to tell.
fn repeats(input: &[u8], values: [u32; 2]) -> Option<bool> {
    let len = input.len().min(4);
    let head = &input[..len];
    let matches = values.iter().any(|value| value.to_be_bytes()[..len] == *head);
    match matches {
        true if len < 4 => None,
        found => Some(found),
    }
}

/// The 24-bit number at the start of `bytes`, which are three at least.
fn u24(bytes: &[u8]) -> u32 {
    bytes.iter().take(3).fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// §5.4.1.
const DEFAULT_CHUNK_SIZE: usize = 128;
const MAX_CHUNK_SIZE: u32 = 0x7fff_ffff;
/// The 24-bit time that says that the real one follows in 32 bits.
const EXTENDED: u32 = 0xff_ffff;
/// 3 bytes of basic header, 11 of message header, 4 of extended timestamp.
const MAX_HEADER_LEN: usize = 18;
/// Room for a message on a chunk stream that has not sent a longer one yet.
const FIRST_GRANT: usize = 4 << 10;
/// The most that a chunk stream's past earns it.
const LARGEST_GRANT: usize = 1 << 20;
/// No difference is this large: the writer's mark that a format 3 may not follow.
const NO_DELTA: u32 = u32::MAX;

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::Index};

    use super::*;

    /// Reads all of `input`, given in pieces of `step` bytes.
    fn read_all(input: &[u8], step: usize) -> Result<Vec<(u32, Vec<u8>)>, ChunkError> {
        let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
        let mut messages = Vec::new();
        for mut piece in input.chunks(step) {
            while let Some(message) = reader.read(&mut piece)? {
                messages.push((message.timestamp, message.body().to_vec()));
            }
            assert!(piece.is_empty());
        }
        assert!(reader.current.is_some() || reader.carry_len > 0 || reader.assembling == 0);
        Ok(messages)
    }

    /// As [`read_all`], at every step that can make a difference.
    fn read(input: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, ChunkError> {
        let whole = read_all(input, input.len());
        for step in 1..input.len().min(40) {
            assert_eq!(read_all(input, step), whole, "in pieces of {step}");
        }
        whole
    }

    #[test]
    fn a_chunk_of_format_3_begins_a_message_at_the_same_distance() {
        let mut input = vec![0x04, 0, 0, 10, 0, 0, 1, AUDIO, 1, 0, 0, 0, b'a'];
        input.extend([0x84, 0, 0, 23, b'b']);
        input.extend([0xc4, b'c', 0xc4, b'd']);
        let times: Vec<_> = read(&input).unwrap().into_iter().map(|(time, _)| time).collect();
        assert_eq!(times, [10, 33, 56, 79]);

        // §5.3.1.2.4: after a format 0, its time is the distance; ffmpeg sends it so.
        let input = [0x04, 0, 0, 23, 0, 0, 1, AUDIO, 1, 0, 0, 0, b'a', 0xc4, b'b'];
        assert_eq!(read(&input).unwrap(), [(23, b"a".to_vec()), (46, b"b".to_vec())]);
    }

    #[test]
    fn extended_timestamps_on_format_3_may_be_there_or_not() {
        let head = [0x04, 0xff, 0xff, 0xff, 0, 0, 200, AUDIO, 1, 0, 0, 0, 1, 2, 3, 4];
        for (name, repeat) in [("repeated", &[1u8, 2, 3, 4][..]), ("left out", &[])] {
            let mut input = head.to_vec();
            input.extend([7; 128]);
            input.push(0xc4);
            input.extend(repeat);
            input.extend([8; 72]);
            let messages = read(&input).unwrap();
            assert_eq!(messages.len(), 1, "{name}");
            assert_eq!(messages[0].0, 0x0102_0304);
            assert_eq!(messages[0].1, [[7; 128].as_slice(), &[8; 72]].concat(), "{name}");
        }
    }

    #[test]
    fn a_missing_extended_timestamp_does_not_hold_a_short_tail_back() {
        let mut input = vec![0x04, 0xff, 0xff, 0xff, 0, 0, 129, AUDIO, 1, 0, 0, 0, 1, 2, 3, 4];
        input.extend([7; 128]);
        input.extend([0xc4, 9]);
        assert_eq!(read(&input).unwrap().len(), 1);
        // The tail looks like the value's first byte: it is told apart by the next chunk.
        let at = input.len() - 1;
        input[at] = 1;
        assert_eq!(read(&input).unwrap().len(), 0);
        input.extend([0x02, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(read(&input).unwrap().len(), 1);
    }

    #[test]
    fn an_extended_value_in_formats_1_and_2_is_a_difference() {
        let mut input = vec![0x04, 0, 0, 5, 0, 0, 1, AUDIO, 1, 0, 0, 0, b'a'];
        input.extend([0x44, 0xff, 0xff, 0xff, 0, 0, 1, VIDEO, 1, 0, 0, 0, b'b']);
        input.extend([0x84, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, b'c']);
        input.extend([0xc4, 0xff, 0xff, 0xff, 0xff, b'd']);
        let times: Vec<_> = read(&input).unwrap().into_iter().map(|(time, _)| time).collect();
        assert_eq!(times, [5, 0x0100_0005, 0x0100_0004, 0x0100_0003], "and it wraps at 32 bits");
    }

    #[test]
    fn a_chunk_stream_may_begin_with_format_1_only() {
        let ping = [0x42, 0, 0, 7, 0, 0, 6, USER_CONTROL, 0, 3, 0, 0, 0, 0];
        assert_eq!(read(&ping).unwrap(), [(7, vec![0, 3, 0, 0, 0, 0])]);
        assert_eq!(read(&[0x85, 0, 0, 1, 0]), Err(ChunkError::NoHeader(5)));
        assert_eq!(read(&[0xc0, 36, 0]), Err(ChunkError::NoHeader(100)));
    }

    #[test]
    fn the_chunk_size_changes_inside_a_message_of_another_stream() {
        let mut input = vec![0x06, 0, 0, 0, 0, 0, 200, VIDEO, 1, 0, 0, 0];
        input.extend([1; 128]);
        // On chunk stream 3, as some encoders do (MediaMTX #4909).
        input.extend([0x03, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0, 0, 0, 0, 50]);
        input.push(0xc6);
        input.extend([2; 50]);
        input.push(0xc6);
        input.extend([3; 22]);
        assert_eq!(read(&input).unwrap()[0].1.len(), 200);
    }

    #[test]
    fn chunk_sizes_of_1_and_of_2_to_the_31_minus_1_work_and_others_do_not() {
        let set = |size: u32| {
            let mut input = vec![0x02, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0];
            input.extend(size.to_be_bytes());
            input
        };
        let mut input = set(1);
        input.extend([0x04, 0, 0, 0, 0, 0, 3, AUDIO, 1, 0, 0, 0, 1, 0xc4, 2, 0xc4, 3]);
        assert_eq!(read(&input).unwrap(), [(0, vec![1, 2, 3])]);

        let mut input = set(MAX_CHUNK_SIZE);
        input.extend([0x04, 0, 0, 0, 0, 1, 0, AUDIO, 1, 0, 0, 0]);
        input.extend([5; 256]);
        assert_eq!(read(&input).unwrap(), [(0, vec![5; 256])]);

        assert_eq!(read(&set(0)), Err(ChunkError::ChunkSize(0)));
        assert_eq!(read(&set(1 << 31)), Err(ChunkError::ChunkSize(1 << 31)));
    }

    #[test]
    fn abort_drops_the_unfinished_message_and_its_memory() {
        let mut input = vec![0x06, 0, 0, 0, 0, 0, 200, VIDEO, 1, 0, 0, 0];
        input.extend([1; 128]);
        input.extend([0x02, 0, 0, 0, 0, 0, 4, ABORT, 0, 0, 0, 0, 0, 0, 0, 6]);
        input.extend([0x46, 0, 0, 9, 0, 0, 1, VIDEO, 7]);
        assert_eq!(read(&input).unwrap(), [(9, vec![7])]);
    }

    #[test]
    fn claimed_lengths_cost_nothing() {
        let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
        for csid in 3..3 + 60 {
            let mut input = vec![csid, 0, 0, 0, 0xff, 0xff, 0xff, VIDEO, 1, 0, 0, 0];
            input.extend([1; 10]);
            // The next chunk needs the first one's 128 bytes.
            input.extend([1; 118]);
            assert_eq!(reader.read(&mut &input[..]), Ok(None));
        }
        let held: usize =
            reader.streams.iter().flat_map(|s| &s.buffer).map(|buffer| buffer.capacity()).sum();
        assert!(held <= 60 * (FIRST_GRANT + 15), "{held} bytes held");
    }

    #[test]
    fn unfinished_messages_are_bounded_together_and_in_number() {
        let mut reader = ChunkReader::new(100_000);
        let mut result = Ok(None);
        for csid in 3..63 {
            let mut input = vec![0x02, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0, 0, 1, 0, 0];
            input.extend([csid, 0, 0, 0, 0x01, 0x40, 0, VIDEO, 1, 0, 0, 0]);
            input.extend([1; 65_536]);
            result = reader.read(&mut &input[..]);
            if result.is_err() {
                assert!(csid > 4);
                break;
            }
        }
        assert_eq!(result, Err(ChunkError::TooMuchUnfinished));

        let mut reader = ChunkReader::new(100_000);
        for csid in 64..64 + MAX_CHUNK_STREAMS as u32 {
            let input = [1, (csid - 64) as u8, 0, 0, 0, 0, 0, 0, 9, AUDIO, 1, 0, 0, 0];
            assert_eq!(reader.read(&mut &input[..]), Ok(None), "{csid}");
            reader.current = None;
        }
        let input = [0x07, 0, 0, 0, 0, 0, 9, AUDIO, 1, 0, 0, 0];
        assert_eq!(reader.read(&mut &input[..]), Err(ChunkError::TooManyStreams));
    }

    #[test]
    fn lengths_over_the_limit_are_refused() {
        let mut reader = ChunkReader::new(1000);
        let input = [0x04, 0, 0, 0, 0, 0x03, 0xe9, VIDEO, 1, 0, 0, 0];
        let error = ChunkError::TooLong { length: 1001, limit: 1000 };
        assert_eq!(reader.read(&mut &input[..]), Err(error));
        let error = ChunkError::TooLong { length: 0x01_0001, limit: MAX_COMMAND_LEN };
        assert_eq!(read(&[0x03, 0, 0, 0, 1, 0, 1, COMMAND_AMF0, 0, 0, 0, 0]), Err(error));
        let input = [0x04, 0, 0, 0, 0, 0, 3, VIDEO, 1, 0, 0, 0, 1];
        let twice = [&input[..], &input].concat();
        assert_eq!(ChunkReader::new(9).read(&mut &input[..]), Ok(None));
        let mut split = ChunkReader::new(9);
        let mut set = &[2, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0, 0, 0, 0, 1][..];
        assert_eq!(split.read(&mut set), Ok(None));
        assert_eq!(split.read(&mut &twice[..]), Err(ChunkError::UnexpectedHeader(4)));
    }

    #[test]
    fn a_media_message_becomes_a_tag_in_place() {
        let mut writer = ChunkWriter::new();
        let mut out = BytesMut::new();
        let head = MessageHead { kind: DATA_AMF0, stream_id: 1, timestamp: 40 };
        writer.write(5, head, &[9; 5000], &mut out).unwrap();
        let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
        let mut message = reader.read(&mut &out[..]).unwrap().unwrap();
        message.skip(16);
        let place = message.body().as_ptr();
        let tag = message.into_tag(TagKind::Script).unwrap();
        assert_eq!((tag.body().as_ptr(), tag.body().len(), tag.timestamp()), (place, 4984, 40));
    }

    #[derive(Debug, Clone)]
    struct Sent {
        csid: u32,
        head: MessageHead,
        body: Vec<u8>,
    }

    fn sent() -> impl Strategy<Value = Sent> {
        let csid = prop_oneof![Just(3u32), Just(4), Just(63), Just(64), Just(319), Just(65_599)];
        let time = prop_oneof![0u32..200, 0xff_fff0u32..0x100_0010, any::<u32>()];
        let length = prop_oneof![0usize..4, 100usize..400, Just(5000)];
        (csid, time, length, 8u8..=9, 0u32..2, any::<u8>()).prop_map(
            |(csid, timestamp, length, kind, stream_id, byte)| Sent {
                csid,
                head: MessageHead { kind, stream_id, timestamp },
                body: (0..length).map(|i| byte.wrapping_add(i as u8)).collect(),
            },
        )
    }

    proptest! {
        #[test]
        fn reading_undoes_writing(
            messages in vec(sent(), 1..24),
            sizes in vec((0usize..60, prop_oneof![1u32..10, 100u32..5000]), 0..4),
            turns in vec(any::<Index>(), 1..40),
            splits in vec(1usize..700, 1..20),
        ) {
            let mut writer = ChunkWriter::new();
            let mut out = BytesMut::new();
            // One unfinished message per chunk stream; whose turn it is comes from `turns`.
            let mut waiting = messages.clone();
            let mut open: Vec<(OutgoingMessage, Sent)> = Vec::new();
            let mut finished: Vec<Sent> = Vec::new();
            for turn in turns.iter().cycle().enumerate() {
                for (_, size) in sizes.iter().filter(|(at, _)| *at == turn.0) {
                    writer.set_chunk_size(*size, &mut out).unwrap();
                }
                while let Some(at) =
                    waiting.iter().position(|m| open.iter().all(|(_, o)| o.csid != m.csid))
                {
                    let next = waiting.remove(at);
                    let begun = writer.begin(next.csid, next.head, next.body.len()).unwrap();
                    open.push((begun, next));
                }
                if open.is_empty() {
                    break;
                }
                let at = turn.1.index(open.len());
                let (message, sent) = &mut open[at];
                if !writer.write_chunk(message, &sent.body, &mut out) {
                    finished.push(open.swap_remove(at).1);
                }
            }

            let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
            let mut read = Vec::new();
            let mut rest = &out[..];
            for split in splits.iter().cycle() {
                let (mut piece, tail) = rest.split_at(rest.len().min(*split));
                rest = tail;
                while let Some(message) = reader.read(&mut piece).unwrap() {
                    read.push(message);
                }
                prop_assert!(piece.is_empty());
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(reader.assembling, 0);
            prop_assert_eq!(read.len(), finished.len());
            for (read, sent) in read.iter().zip(&finished) {
                let head = MessageHead {
                    kind: read.kind,
                    stream_id: read.stream_id,
                    timestamp: read.timestamp,
                };
                prop_assert_eq!(head, sent.head);
                prop_assert_eq!(read.body(), &sent.body[..]);
            }
        }

        #[test]
        fn any_bytes_are_messages_or_an_error(
            input in vec(prop_oneof![any::<u8>(), Just(0u8), Just(0xff), Just(0xc4)], 0..600),
            split in 1usize..50,
        ) {
            let mut reader = ChunkReader::new(100_000);
            for mut piece in input.chunks(split) {
                loop {
                    match reader.read(&mut piece) {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => return Ok(()),
                    }
                }
                prop_assert!(reader.assembling <= 200_000);
            }
        }
    }
}
