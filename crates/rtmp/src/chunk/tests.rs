use bytes::BytesMut;
use downpour_media::flv::{Tag, TagKind};
use proptest::{collection::vec, prelude::*, sample::Index};

use super::{reader::MIN_GRANT, *};

/// Reads `input` in pieces of `step` bytes. Returns timestamps and bodies.
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

/// Reads `input` whole and in pieces of 1 to 39 bytes, and checks that the split is irrelevant.
fn read(input: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, ChunkError> {
    let whole = read_all(input, input.len());
    for step in 1..input.len().min(40) {
        assert_eq!(read_all(input, step), whole, "in pieces of {step}");
    }
    whole
}

#[test]
fn format_3_begins_a_message_with_the_last_delta() {
    let mut input = vec![0x04, 0, 0, 10, 0, 0, 1, AUDIO, 1, 0, 0, 0, b'a'];
    input.extend([0x84, 0, 0, 23, b'b']);
    input.extend([0xc4, b'c', 0xc4, b'd']);
    let times: Vec<_> = read(&input).unwrap().into_iter().map(|(time, _)| time).collect();
    assert_eq!(times, [10, 33, 56, 79]);
}

#[test]
fn format_3_after_format_0_uses_the_absolute_timestamp_as_delta() {
    // §5.3.1.2.4, and ffmpeg relies on it.
    let input = [0x04, 0, 0, 23, 0, 0, 1, AUDIO, 1, 0, 0, 0, b'a', 0xc4, b'b'];
    assert_eq!(read(&input).unwrap(), [(23, b"a".to_vec()), (46, b"b".to_vec())]);
}

#[test]
fn the_extended_timestamp_of_format_3_is_optional() {
    let head = [0x04, 0xff, 0xff, 0xff, 0, 0, 200, AUDIO, 1, 0, 0, 0, 1, 2, 3, 4];
    for (name, repeat) in [("repeated", &[1u8, 2, 3, 4][..]), ("omitted", &[])] {
        let mut input = head.to_vec();
        input.extend([7; 128]);
        input.push(0xc4);
        input.extend(repeat);
        input.extend([8; 72]);
        let messages = read(&input).unwrap();
        assert_eq!(messages.len(), 1, "{name}");
        assert_eq!(messages[0].0, 0x0102_0304, "{name}");
        assert_eq!(messages[0].1, [[7; 128].as_slice(), &[8; 72]].concat(), "{name}");
    }
}

#[test]
fn an_omitted_extended_timestamp_does_not_delay_a_short_tail() {
    let mut input = vec![0x04, 0xff, 0xff, 0xff, 0, 0, 129, AUDIO, 1, 0, 0, 0, 1, 2, 3, 4];
    input.extend([7; 128]);
    input.extend([0xc4, 9]);
    assert_eq!(read(&input).unwrap().len(), 1);
    // A tail equal to the timestamp's first byte is ambiguous until the next chunk.
    let at = input.len() - 1;
    input[at] = 1;
    assert_eq!(read(&input).unwrap().len(), 0);
    input.extend([0x02, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0, 0, 0, 1, 0]);
    assert_eq!(read(&input).unwrap().len(), 1);
}

#[test]
fn extended_values_in_formats_1_and_2_are_deltas() {
    let mut input = vec![0x04, 0, 0, 5, 0, 0, 1, AUDIO, 1, 0, 0, 0, b'a'];
    input.extend([0x44, 0xff, 0xff, 0xff, 0, 0, 1, VIDEO, 1, 0, 0, 0, b'b']);
    input.extend([0x84, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, b'c']);
    input.extend([0xc4, 0xff, 0xff, 0xff, 0xff, b'd']);
    let times: Vec<_> = read(&input).unwrap().into_iter().map(|(time, _)| time).collect();
    assert_eq!(times, [5, 0x0100_0005, 0x0100_0004, 0x0100_0003], "timestamps wrap at 32 bits");
}

#[test]
fn a_chunk_stream_may_begin_with_format_1_but_not_2_or_3() {
    let ping = [0x42, 0, 0, 7, 0, 0, 6, USER_CONTROL, 0, 3, 0, 0, 0, 0];
    assert_eq!(read(&ping).unwrap(), [(7, vec![0, 3, 0, 0, 0, 0])]);
    assert_eq!(read(&[0x85, 0, 0, 1, 0]), Err(ChunkError::NoHeader(5)));
    assert_eq!(read(&[0xc0, 36, 0]), Err(ChunkError::NoHeader(100)));
}

#[test]
fn the_chunk_size_changes_inside_a_message_of_another_chunk_stream() {
    let mut input = vec![0x06, 0, 0, 0, 0, 0, 200, VIDEO, 1, 0, 0, 0];
    input.extend([1; 128]);
    // Sent on chunk stream 3, as some encoders do (MediaMTX #4909).
    input.extend([0x03, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0, 0, 0, 0, 50]);
    input.push(0xc6);
    input.extend([2; 50]);
    input.push(0xc6);
    input.extend([3; 22]);
    assert_eq!(read(&input).unwrap()[0].1.len(), 200);
}

#[test]
fn a_chunk_size_of_1_works() {
    let mut input = set_chunk_size(1);
    input.extend([0x04, 0, 0, 0, 0, 0, 3, AUDIO, 1, 0, 0, 0, 1, 0xc4, 2, 0xc4, 3]);
    assert_eq!(read(&input).unwrap(), [(0, vec![1, 2, 3])]);
}

#[test]
fn the_largest_chunk_size_works() {
    let mut input = set_chunk_size(MAX_CHUNK_SIZE);
    input.extend([0x04, 0, 0, 0, 0, 1, 0, AUDIO, 1, 0, 0, 0]);
    input.extend([5; 256]);
    assert_eq!(read(&input).unwrap(), [(0, vec![5; 256])]);
}

#[test]
fn invalid_chunk_sizes_are_errors() {
    for size in [0, 1 << 31] {
        assert_eq!(read(&set_chunk_size(size)), Err(ChunkError::ChunkSize(size)));
    }
}

fn set_chunk_size(size: u32) -> Vec<u8> {
    let mut input = vec![0x02, 0, 0, 0, 0, 0, 4, SET_CHUNK_SIZE, 0, 0, 0, 0];
    input.extend(size.to_be_bytes());
    input
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
fn memory_does_not_follow_the_length_in_the_header() {
    let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
    for csid in 3..3 + 60 {
        let mut input = vec![csid, 0, 0, 0, 0xff, 0xff, 0xff, VIDEO, 1, 0, 0, 0];
        input.extend([1; 10]);
        // Completes the chunk, so that the next one can begin.
        input.extend([1; 118]);
        assert_eq!(reader.read(&mut &input[..]), Ok(None));
    }
    let allocated = reader.allocated();
    assert!(allocated <= 60 * (MIN_GRANT + 15), "{allocated} bytes");
}

#[test]
fn unfinished_messages_are_bounded_together() {
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
}

#[test]
fn chunk_streams_are_bounded_in_number() {
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
fn a_message_over_the_limit_is_an_error() {
    let mut reader = ChunkReader::new(1000);
    let input = [0x04, 0, 0, 0, 0, 0x03, 0xe9, VIDEO, 1, 0, 0, 0];
    let error = ChunkError::TooLong { length: 1001, limit: 1000 };
    assert_eq!(reader.read(&mut &input[..]), Err(error));
}

#[test]
fn a_command_has_a_lower_limit_than_media() {
    let error = ChunkError::TooLong { length: 0x01_0001, limit: MAX_COMMAND_LEN };
    assert_eq!(read(&[0x03, 0, 0, 0, 1, 0, 1, COMMAND_AMF0, 0, 0, 0, 0]), Err(error));
}

/// The first chunk of a message of 300 bytes on chunk stream 6 at 40 ms.
fn unfinished() -> Vec<u8> {
    let mut input = vec![0x06, 0, 0, 40, 0, 1, 44, VIDEO, 1, 0, 0, 0];
    input.extend([1; 128]);
    input
}

#[test]
fn a_repeated_header_continues_the_message() {
    for header in [
        &[0x46, 0, 0, 0, 0, 1, 44, VIDEO][..],
        &[0x46, 0, 0, 40, 0, 1, 44, VIDEO],
        &[0x86, 0, 0, 40],
        &[0x06, 0, 0, 40, 0, 1, 44, VIDEO, 1, 0, 0, 0],
    ] {
        let mut input = unfinished();
        input.extend(header);
        input.extend([2; 128]);
        input.extend(header);
        input.extend([3; 44]);
        // A delta on the timestamp of the message, which the repetitions did not move.
        input.extend([0x46, 0, 0, 5, 0, 0, 1, VIDEO, 9]);
        let body = [[1; 128].as_slice(), &[2; 128], &[3; 44]].concat();
        assert_eq!(read(&input).unwrap(), [(40, body), (45, vec![9])], "{header:?}");
    }
}

#[test]
fn a_header_of_another_message_gives_the_unfinished_one_up() {
    for (header, time) in [
        (&[0x06, 0, 0, 80, 0, 0, 2, VIDEO, 1, 0, 0, 0][..], 80),
        (&[0x06, 0, 0, 80, 0, 1, 44, VIDEO, 1, 0, 0, 0], 80),
        (&[0x46, 0, 0, 40, 0, 0, 2, VIDEO], 80),
        (&[0x46, 0, 0, 40, 0, 1, 44, AUDIO], 80),
    ] {
        let mut input = unfinished();
        input.extend(header);
        let length = usize::from(u16::from_be_bytes([header[5], header[6]]));
        for (i, piece) in vec![7; length].chunks(128).enumerate() {
            input.extend((i > 0).then_some(0xc6));
            input.extend(piece);
        }
        assert_eq!(read(&input).unwrap(), [(time, vec![7; length])], "{header:?}");
        let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
        let mut rest = &input[..];
        while reader.read(&mut rest).unwrap().is_some() {}
        assert_eq!((reader.take_given_up(), reader.take_given_up()), (1, 0));
        assert_eq!(reader.assembling, 0);
    }
}

#[test]
fn a_message_becomes_a_tag_without_a_copy() {
    let mut writer = ChunkWriter::new();
    let mut out = BytesMut::new();
    let head = MessageHead { kind: DATA_AMF0, stream_id: 1, timestamp: 40 };
    writer.write(5, head, &[9; 5000], &mut out).unwrap();
    let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
    let mut message = reader.read(&mut &out[..]).unwrap().unwrap();
    message.skip(16);
    let address = message.body().as_ptr();
    let tag = message.into_tag(TagKind::Script).unwrap();
    assert_eq!(tag.body().as_ptr(), address);
    assert_eq!(tag.body().len(), 4984);
    assert_eq!(tag.timestamp(), 40);
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
    fn reading_reverses_writing(
        messages in vec(sent(), 1..24),
        sizes in vec((0usize..60, prop_oneof![1u32..10, 100u32..5000]), 0..4),
        turns in vec(any::<Index>(), 1..40),
        splits in vec(1usize..700, 1..20),
    ) {
        let mut writer = ChunkWriter::new();
        let mut out = BytesMut::new();
        // At most one unfinished message per chunk stream; `turns` picks the next to write.
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
    fn arbitrary_bytes_are_messages_or_an_error(
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
