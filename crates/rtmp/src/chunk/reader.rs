//! Chunks to messages.

use downpour_media::flv::Tag;
use downpour_sys::buffer::BufferMut;

use super::{
    ABORT, AGGREGATE, AUDIO, ChunkError, DATA_AMF0, DATA_AMF3, DEFAULT_CHUNK_SIZE, EXTENDED,
    Header, MAX_CHUNK_SIZE, MAX_CHUNK_STREAMS, MAX_COMMAND_LEN, Message, MessageHead,
    SET_CHUNK_SIZE, VIDEO,
};

/// Reassembles messages from chunks, at any split of the input.
///
/// Each body is copied once, from the input into the buffer that becomes a [`Tag`]. Memory grows
/// with the bytes received, not with the length in a message header.
///
/// # States
/// The reader is either **between chunks** or **inside a chunk**:
/// - between → inside: a chunk header is complete. An incomplete one waits in `carry`.
/// - inside → between: the chunk's payload is complete. If the message is complete too, it is
///   returned, or applied for Set Chunk Size and Abort.
///
/// Each chunk stream is either **idle** (no `buffer`) or **assembling** a message:
/// - idle → assembling: the first chunk of a message. A format 3 chunk repeats the last header.
/// - assembling → idle: the message is complete or aborted.
/// - assembling → assembling: a chunk of format 3 continues the message. So does one with a header that
///   repeats it, as some encoders write them: format 2, format 1 of the same length and type, and
///   format 0 of the same timestamp and message stream, too. Any other header begins another message,
///   and the unfinished one is given up.
///
/// # Invariants
/// - Between chunks, `carry` holds the start of one header; inside a chunk, it can hold the first
///   payload bytes.
/// - `assembling` is the sum of `granted` over all chunk streams, at most twice `max_message_len`
///   after every successful [`ChunkReader::read`].
#[derive(Debug)]
pub struct ChunkReader {
    /// The largest payload of a chunk in bytes, as last set by the peer.
    chunk_size: usize,
    max_message_len: usize,
    /// [`MAX_CHUNK_STREAMS`] at most, and usually few: a linear scan is faster than a map.
    streams: Vec<ChunkStream>,
    /// Inside a chunk: the index of its stream, and the payload bytes still missing.
    pub(super) current: Option<(usize, usize)>,
    /// Bytes of the input that no complete header could be parsed from.
    carry: [u8; MAX_HEADER_LEN],
    pub(super) carry_len: usize,
    /// Bytes granted to the buffers of unfinished messages.
    pub(super) assembling: usize,
    /// Messages given up for another one since the last [`ChunkReader::take_given_up`].
    given_up: u64,
}

impl ChunkReader {
    /// A reader at the start of a connection. Messages over `max_message_len` bytes are an error.
    /// All unfinished messages together may hold twice that.
    pub fn new(max_message_len: usize) -> Self {
        Self {
            chunk_size: DEFAULT_CHUNK_SIZE,
            max_message_len: max_message_len.min(Tag::MAX_BODY_LEN),
            streams: Vec::new(),
            current: None,
            carry: [0; MAX_HEADER_LEN],
            carry_len: 0,
            assembling: 0,
            given_up: 0,
        }
    }

    /// Returns the number of messages since the last call that their chunk stream gave up for another
    /// message.
    pub fn take_given_up(&mut self) -> u64 {
        std::mem::take(&mut self.given_up)
    }

    /// Consumes `input` up to the end of the next message and returns the message. Returns `None`
    /// once all input is consumed. Applies Set Chunk Size and Abort without returning them.
    ///
    /// # Errors
    /// [`ChunkError`] if the input is not a chunk stream or exceeds a limit. The reader must not be
    /// used afterwards.
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

    /// Parses the next header from the carried bytes and the input.
    fn next_header(&mut self, input: &mut &[u8]) -> Result<Option<Parsed>, ChunkError> {
        if self.carry_len == 0 {
            if let Some((parsed, rest)) = self.parse_header(input)? {
                *input = rest;
                return Ok(Some(parsed));
            }
            // An incomplete header is shorter than the carry.
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
            // Bytes carried as a possible extended timestamp are payload.
            self.carry.copy_within(used..held, 0);
            self.carry_len = held - used;
        }
        Ok(Some(parsed))
    }

    /// Parses a chunk's basic header, message header and extended timestamp (§5.3.1). Returns the
    /// rest of the input with it, or `None` if the input is too short.
    fn parse_header<'a>(&self, input: &'a [u8]) -> Result<Option<(Parsed, &'a [u8])>, ChunkError> {
        let Some((format, csid, rest)) = parse_basic_header(input) else { return Ok(None) };
        let index = self.streams.iter().position(|stream| stream.csid == csid);
        let stream = index.and_then(|index| self.streams.get(index));
        let parsed = match format {
            3 => parse_repeated_header(stream.ok_or(ChunkError::NoHeader(csid))?, rest),
            _ => parse_message_header(format, csid, stream, rest)?,
        };
        let unfinished = stream.filter(|stream| stream.buffer.is_some());
        Ok(parsed.map(|(header, rest)| {
            let (header, begins) = match unfinished {
                Some(_) if format == 3 => (header, false),
                Some(stream) if header.repeats(&stream.header, format) => {
                    // The message keeps its timestamp; only the field's form is that of this chunk.
                    (Header { extended: header.extended, ..stream.header }, false)
                }
                _ => (header, true),
            };
            (Parsed { csid, index, header, begins }, rest)
        }))
    }

    /// Prepares the buffer of a message that begins. Returns the index of the chunk's stream and
    /// the length of its payload in bytes.
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
        if parsed.begins && stream.buffer.take().is_some() {
            self.assembling -= std::mem::take(&mut stream.granted);
            self.given_up += 1;
        }
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
                // The initial allocation is limited by the longest message that this stream has
                // sent: a first header that states 16 MB allocates 4 KB.
                let granted = header.length.min(stream.largest.max(MIN_GRANT));
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

    /// Copies up to `left` bytes of payload. Returns the number copied.
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

    /// Returns the stream's message, if it is complete.
    fn finish(&mut self, index: usize) -> Option<Message> {
        let stream = self.streams.get_mut(index)?;
        let len = stream.buffer.as_ref()?.len() - Tag::HEADER_LEN;
        if len < stream.header.length {
            return None;
        }
        self.assembling -= stream.granted;
        stream.granted = 0;
        stream.largest = stream.largest.max(len.min(MAX_INITIAL_GRANT));
        let Header { kind, stream_id, timestamp, .. } = stream.header;
        Some(Message::new(MessageHead { kind, stream_id, timestamp }, stream.buffer.take()?))
    }

    fn set_chunk_size(&mut self, body: &[u8]) -> Result<(), ChunkError> {
        let size = u32::from_be_bytes(*body.first_chunk().ok_or(ChunkError::ShortControl)?);
        // §5.4.1: the first bit must be 0, and a chunk must carry at least one byte.
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

    /// Returns the bytes allocated for unfinished messages.
    #[cfg(test)]
    pub(super) fn allocated(&self) -> usize {
        self.streams.iter().flat_map(|s| &s.buffer).map(|buffer| buffer.capacity()).sum()
    }
}

#[derive(Debug, Default)]
struct ChunkStream {
    csid: u32,
    header: Header,
    /// The unfinished message: placeholder bytes for a tag header, then the body so far.
    buffer: Option<BufferMut>,
    /// Bytes of body that `buffer` may hold without another grant.
    granted: usize,
    /// Length of the longest message so far in bytes, up to [`MAX_INITIAL_GRANT`].
    largest: usize,
}

/// A parsed chunk header.
struct Parsed {
    csid: u32,
    /// The index of the chunk stream; `None` for a new one.
    index: Option<usize>,
    header: Header,
    /// `true` for the first chunk of a message.
    begins: bool,
}

/// Parses the basic header (§5.3.1.1) into format and chunk stream id.
fn parse_basic_header(input: &[u8]) -> Option<(u8, u32, &[u8])> {
    let (&first, rest) = input.split_first()?;
    let (csid, rest) = match first & 0x3f {
        0 => {
            let (&[low], rest) = rest.split_first_chunk()?;
            (64 + u32::from(low), rest)
        }
        1 => {
            let (&pair, rest) = rest.split_first_chunk()?;
            (64 + u32::from(u16::from_le_bytes(pair)), rest)
        }
        id => (id.into(), rest),
    };
    Some((first >> 6, csid, rest))
}

/// Derives the header of a format 3 chunk, which continues a message or begins one like the last.
fn parse_repeated_header<'a>(
    stream: &ChunkStream,
    mut input: &'a [u8],
) -> Option<(Header, &'a [u8])> {
    let mut header = stream.header;
    if let Some(extended) = header.extended {
        // The specification repeats the extended timestamp here; librtmp omitted it until 2024
        // (OBS #10097). It is present if the next four bytes have the same value.
        if starts_with_any(input, [extended, header.timestamp])? {
            input = &input[4..];
        }
    }
    if stream.buffer.is_none() {
        // §5.3.1.2.4: a new message with the same timestamp delta as the last.
        header.timestamp = header.timestamp.wrapping_add(header.delta);
    }
    Some((header, input))
}

/// Parses the message header (§5.3.1.2) and extended timestamp of a chunk of format 0, 1 or 2.
fn parse_message_header<'a>(
    format: u8,
    csid: u32,
    stream: Option<&ChunkStream>,
    input: &'a [u8],
) -> Result<Option<(Header, &'a [u8])>, ChunkError> {
    let mut header = match stream {
        Some(stream) => stream.header,
        // librtmp begins a chunk stream with format 1 for its first ping.
        None if format < 2 => Header::default(),
        None => return Err(ChunkError::NoHeader(csid)),
    };
    let Some((fields, mut rest)) = input.split_at_checked([11, 7, 3][usize::from(format)]) else {
        return Ok(None);
    };
    let mut time = u24(fields);
    header.extended = None;
    if time == EXTENDED {
        let Some((&value, tail)) = rest.split_first_chunk() else { return Ok(None) };
        rest = tail;
        time = u32::from_be_bytes(value);
        header.extended = Some(time);
    }
    // Formats 1 and 2 hold a delta, extended or not (SRS #4356). A format 3 after a format 0 uses
    // the absolute timestamp as its delta (§5.3.1.2.4); ffmpeg relies on that.
    header.delta = time;
    header.timestamp = if format == 0 { time } else { header.timestamp.wrapping_add(time) };
    if let Some(&[length @ .., kind]) = fields.get(3..).and_then(|f| f.first_chunk::<4>()) {
        header.length = u24(&length) as usize;
        header.kind = kind;
    }
    if let Some(&stream_id) = fields.get(7..).and_then(|f| f.first_chunk()) {
        header.stream_id = u32::from_le_bytes(stream_id);
    }
    Ok(Some((header, rest)))
}

/// Returns `true` if `input` begins with one of `values` in network byte order, and `None` if the
/// input is too short to decide.
fn starts_with_any(input: &[u8], values: [u32; 2]) -> Option<bool> {
    let len = input.len().min(4);
    let head = &input[..len];
    let matches = values.iter().any(|value| value.to_be_bytes()[..len] == *head);
    if matches && len < 4 { None } else { Some(matches) }
}

/// Reads a 24-bit number in network byte order from the first three bytes.
fn u24(bytes: &[u8]) -> u32 {
    bytes.iter().take(3).fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// 3 bytes of basic header, 11 of message header, 4 of extended timestamp.
const MAX_HEADER_LEN: usize = 18;
/// Initial allocation for a message on a chunk stream without history, in bytes.
pub(super) const MIN_GRANT: usize = 4 << 10;
/// The largest initial allocation that a chunk stream can earn, in bytes.
const MAX_INITIAL_GRANT: usize = 1 << 20;
