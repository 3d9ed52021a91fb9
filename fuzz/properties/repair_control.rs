//! The control stream of `downpour/1` at both ends.

use std::fmt::Debug;

use downpour_repair::control::{
    CloudMessage, ControlError, ControlReader, EdgeMessage, encode_control,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{flv::check_tag, memory, pieces};

/// Messages do not depend on the split of the stream, memory is proportional to the input, and every
/// message survives a round trip.
pub fn check(data: &[u8]) {
    check_as::<EdgeMessage>(data);
    for message in check_as::<CloudMessage>(data) {
        let headers = match message {
            CloudMessage::StreamUp(info) => info.headers,
            CloudMessage::StreamUpdate { headers, .. } => headers,
            _ => continue,
        };
        headers.iter().for_each(check_tag);
    }
}

fn check_as<T>(data: &[u8]) -> Vec<T>
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let (whole, held) = memory::peak(|| read::<T>([data]));
    // The shortest JSON values, of two bytes, become the largest structs.
    assert!(held <= 256 * data.len() + (16 << 10), "{held} bytes held for {}", data.len());
    assert_eq!(read::<T>(pieces(data)), whole);
    let (messages, _) = whole;
    for message in &messages {
        let frame = encode_control(message).expect("a parsed message can be encoded");
        let (again, error) = read::<T>([&frame[..]]);
        assert_eq!((again.as_slice(), error), (std::slice::from_ref(message), None));
    }
    messages
}

fn read<'a, T: DeserializeOwned>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<T>, Option<ControlError>) {
    // The limit of the cloud for messages of an edge.
    let mut reader = ControlReader::new(256 << 10);
    let mut messages = Vec::new();
    for piece in pieces {
        reader.push(piece);
        loop {
            match reader.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(error) => return (messages, Some(error)),
            }
        }
    }
    (messages, None)
}
