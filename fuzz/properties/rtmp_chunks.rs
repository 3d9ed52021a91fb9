//! The RTMP chunk stream.

use bytes::BytesMut;
use downpour_rtmp::chunk::{
    ABORT, ChunkError, ChunkReader, ChunkWriter, MAX_CHUNK_STREAMS, Message, MessageHead,
    SET_CHUNK_SIZE,
};

use super::{Random, memory, pieces};

/// The messages do not depend on how the input is cut, memory grows with what came and not with
/// what is claimed, and messages written again in other chunks are the same.
pub fn check(data: &[u8]) {
    let (whole, held) = memory::peak(|| read([data]));
    assert!(held <= most_held(data.len()), "{held} bytes held for {}", data.len());
    assert_eq!(read(pieces(data)), whole);

    let (messages, _) = whole;
    for message in &messages {
        assert!(message.body().len() <= data.len());
        assert!(![SET_CHUNK_SIZE, ABORT].contains(&message.kind), "these are not yielded");
    }
    let (written, order) = write(&messages, Random::of(data));
    let (again, error) = read([&written[..]]);
    assert_eq!(error, None);
    let expected: Vec<Message> = order.into_iter().map(|i| messages[i].clone()).collect();
    assert_eq!(again, expected);
}

/// Bytes that a reader, and the messages it gave, may hold for `len` bytes of input: 4 KiB of
/// credit for each chunk stream, and what came, during the growth of a buffer.
pub fn most_held(len: usize) -> usize {
    MAX_CHUNK_STREAMS * (4096 + 1024) + 8 * len + 64 * len
}

/// Reads a chunk stream to its end or first error.
pub fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Message>, Option<ChunkError>) {
    // So much that no input of a fuzzer's length gets near the limit on unfinished messages, which
    // may take a little more or less with the way the input is cut.
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
        assert!(piece.is_empty(), "nothing is left behind");
    }
    (messages, None)
}

/// Writes the messages, two at a time side by side, with chunk sizes changing in between. Yields
/// the order in which they became whole.
fn write(messages: &[Message], mut random: Random) -> (BytesMut, Vec<usize>) {
    let (mut writer, mut out, mut order) = (ChunkWriter::new(), BytesMut::new(), Vec::new());
    let indices: Vec<usize> = (0..messages.len()).collect();
    for pair in indices.chunks(2) {
        if random.below(3) == 0 {
            let largest = [8, 200, 100_000][random.below(3)];
            let size = 1 + random.below(largest);
            writer.set_chunk_size(size as u32, &mut out).expect("any size can be told");
        }
        let mut open: Vec<_> = pair
            .iter()
            .zip([[3, 64, 320], [4, 63, 65_599]])
            .map(|(&index, csids)| {
                let Message { kind, stream_id, timestamp, .. } = messages[index];
                let head = MessageHead { kind, stream_id, timestamp };
                let len = messages[index].body().len();
                let csid = csids[random.below(3)];
                (index, writer.begin(csid, head, len).expect("it is as long as it came"))
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
