//! The control stream of `downpour/1`, at either end.

use std::fmt::Debug;

use downpour_repair::control::{
    CloudMessage, ControlError, ControlReader, EdgeMessage, encode_control,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{flv::check_tag, memory, pieces};

/// The messages do not depend on how the stream is cut, what is held is bounded by what came, and
/// every message written again is the same.
pub fn check(data: &[u8]) {
    check_as::<EdgeMessage>(data);
    for message in check_as::<CloudMessage>(data) {
        let headers = match message {
            CloudMessage::StreamUp(info) => info.headers,
            CloudMessage::StreamUpdate { headers, .. } => headers,
            _ => continue,
        };
        for tag in [headers.metadata, headers.video, headers.audio].iter().flatten() {
            check_tag(tag);
        }
    }
}

fn check_as<T>(data: &[u8]) -> Vec<T>
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let (whole, held) = memory::peak(|| read::<T>([data]));
    // JSON's shortest values, of two bytes, become the largest structs.
    assert!(held <= 256 * data.len() + (16 << 10), "{held} bytes held for {}", data.len());
    assert_eq!(read::<T>(pieces(data)), whole);
    let (messages, _) = whole;
    for message in &messages {
        let frame = encode_control(message).expect("what was read can be written");
        let (again, error) = read::<T>([&frame[..]]);
        assert_eq!((again.as_slice(), error), (std::slice::from_ref(message), None));
    }
    messages
}

fn read<'a, T: DeserializeOwned>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> (Vec<T>, Option<ControlError>) {
    // What the cloud takes from an edge.
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
