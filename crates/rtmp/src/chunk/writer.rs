//! Messages to chunks.

use bytes::{BufMut, BytesMut};
use downpour_media::flv::Tag;

use super::{
    CONTROL_CSID, ChunkError, DEFAULT_CHUNK_SIZE, EXTENDED, Header, MAX_CHUNK_SIZE, MessageHead,
    SET_CHUNK_SIZE,
};

/// Splits messages into chunks, with the shortest header that every known peer understands.
#[derive(Debug)]
pub struct ChunkWriter {
    chunk_size: usize,
    /// The last header per chunk stream id. Bounded by the ids that the caller uses.
    streams: Vec<(u32, Header)>,
}

impl ChunkWriter {
    /// A writer at the start of a connection.
    pub fn new() -> Self {
        Self { chunk_size: DEFAULT_CHUNK_SIZE, streams: Vec::new() }
    }

    /// Announces and applies a chunk size of `size` bytes, clamped to 1..=2³¹ − 1.
    ///
    /// # Errors
    /// None in practice: the announcement is a short message.
    pub fn set_chunk_size(&mut self, size: u32, out: &mut BytesMut) -> Result<(), ChunkError> {
        let size = size.clamp(1, MAX_CHUNK_SIZE);
        let head = MessageHead { kind: SET_CHUNK_SIZE, stream_id: 0, timestamp: 0 };
        self.write(CONTROL_CSID, head, &size.to_be_bytes(), out)?;
        self.chunk_size = size as usize;
        Ok(())
    }

    /// Appends all chunks of a message to `out`.
    ///
    /// # Errors
    /// [`ChunkError::TooLong`] if the body is over [`Tag::MAX_BODY_LEN`].
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

    /// Begins a message of `length` bytes, to be written with [`ChunkWriter::write_chunk`] and
    /// interleaved with others. Finish it before the next one on the same chunk stream.
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
                // Backward steps and extended deltas use format 0: peers disagree on how to read an
                // extended delta.
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

    /// Appends the next chunk of `message`, whose whole body is `body`. Returns `false` if that was
    /// the last one.
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

/// A message of which some chunks have been written.
#[derive(Debug)]
pub struct OutgoingMessage {
    csid: u32,
    /// The format of the first chunk; the others have format 3.
    format: u8,
    header: Header,
    /// Bytes of body written.
    offset: usize,
    started: bool,
}

/// No delta is this large: it marks that the next message cannot use format 3.
const NO_DELTA: u32 = u32::MAX;
