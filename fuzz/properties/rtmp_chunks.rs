//! The RTMP chunk stream.

use bytes::BytesMut;
use downpour_rtmp::chunk::{
    ABORT, ChunkError, ChunkReader, ChunkWriter, MAX_CHUNK_STREAMS, Message, MessageHead,
    SET_CHUNK_SIZE,
};

use super::{Random, memory, pieces};

/// The messages do not depend on the split of the input, memory is proportional to the received bytes
/// and not to claimed lengths, and messages survive a round trip in other chunks.
pub fn check(data: &[u8]) {
    let (whole, held) = memory::peak(|| read([data]));
    assert!(held <= max_memory(data.len()), "{held} bytes held for {}", data.len());
    assert_eq!(read(pieces(data)), whole);

    let (messages, _) = whole;
    for message in &messages {
        assert!(message.body().len() <= data.len());
        assert!(
            ![SET_CHUNK_SIZE, ABORT].contains(&message.kind),
            "the reader handles these itself"
        );
    }
    let (written, order) = write(&messages, Random::of(data));
    let (again, error) = read([&written[..]]);
    assert_eq!(error, None);
    let expected: Vec<Message> = order.into_iter().map(|i| messages[i].clone()).collect();
    assert_eq!(again, expected);
}

/// Maximum memory of a reader and its messages for `len` bytes of input: 4 KiB of preallocation per
/// chunk stream, and the received bytes, twice while a buffer grows.
pub fn max_memory(len: usize) -> usize {
    MAX_CHUNK_STREAMS * (4096 + 1024) + 8 * len + 64 * len
}

/// Reads a chunk stream to its end or first error.
pub fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Message>, Option<ChunkError>) {
    // A limit that no input of the fuzzer reaches. The size of unfinished messages depends slightly
    // on the split of the input.
    let mut reader = ChunkReader::new(1 << 20);
    let mut messages = Vec::new();
    for mut piece in pieces {
        loop {
            match reader.read(&mut piece) {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
        assert!(piece.is_empty(), "the input is consumed");
    }
    (messages, None)
}

/// Writes the messages as interleaved pairs, with changes of the chunk size in between. Returns the
/// order in which they are complete.
fn write(messages: &[Message], mut random: Random) -> (BytesMut, Vec<usize>) {
    let (mut writer, mut out, mut order) = (ChunkWriter::new(), BytesMut::new(), Vec::new());
    let indices: Vec<usize> = (0..messages.len()).collect();
    for pair in indices.chunks(2) {
        if random.below(3) == 0 {
            let largest = [8, 200, 100_000][random.below(3)];
            let size = 1 + random.below(largest);
            writer.set_chunk_size(size as u32, &mut out).expect("any size can be announced");
        }
        let mut open: Vec<_> = pair
            .iter()
            .zip([[3, 64, 320], [4, 63, 65_599]])
            .map(|(&index, csids)| {
                let Message { kind, stream_id, timestamp, .. } = messages[index];
                let head = MessageHead { kind, stream_id, timestamp };
                let len = messages[index].body().len();
                let csid = csids[random.below(3)];
                (index, writer.begin(csid, head, len).expect("a parsed message can be written"))
            })
            .collect();
        while !open.is_empty() {
            let turn = random.below(open.len());
            let (index, message) = &mut open[turn];
            if !writer.write_chunk(message, messages[*index].body(), &mut out) {
                order.push(open.swap_remove(turn).0);
            }
        }
    }
    (out, order)
}
