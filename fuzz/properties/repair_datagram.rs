//! The datagrams of `downpour/1`.

use std::collections::HashSet;

use bytes::Bytes;
use downpour_repair::{
    message::{Gone, Heartbeat, Message, Nack, encode_repair},
    rtp::Seq,
};

use super::{Random, memory};

/// A parsed message can be encoded into datagrams of any length and keeps its meaning.
pub fn check(data: &[u8]) {
    let datagram = Bytes::copy_from_slice(data);
    let (parsed, held) = memory::peak(|| Message::parse(datagram));
    assert!(held <= 64 * Message::MAX_LEN, "{held} bytes held for {}", data.len());
    let Ok(message) = parsed else { return };
    assert!(data.len() <= Message::MAX_LEN);
    let max_len = Random::of(data).below(Message::MAX_LEN + 100);
    match message {
        Message::Nack(nack) => {
            assert!((1..=Nack::MAX_COPIES).contains(&nack.copies));
            check_pairs(&nack.seqs, data.len(), max_len, |seqs, max_len| {
                let datagrams = Nack { seqs, ..nack }.encode(max_len);
                let parts = datagrams.into_iter().map(|datagram| match reread(datagram, max_len) {
                    Message::Nack(part) => {
                        assert_eq!((part.ssrc, part.copies), (nack.ssrc, nack.copies));
                        part.seqs
                    }
                    other => panic!("a nack became {other:?}"),
                });
                parts.flatten().collect()
            });
        }
        Message::Gone(gone) => {
            check_pairs(&gone.seqs, data.len(), max_len, |seqs, max_len| {
                let datagrams = Gone { seqs, ..gone }.encode(max_len);
                let parts = datagrams.into_iter().map(|datagram| match reread(datagram, max_len) {
                    Message::Gone(part) => {
                        assert_eq!(part.ssrc, gone.ssrc);
                        part.seqs
                    }
                    other => panic!("a gone became {other:?}"),
                });
                parts.flatten().collect()
            });
        }
        Message::Repair(packet) => assert_eq!(encode_repair(&packet), data),
        Message::Heartbeats(heartbeats) => {
            let parts = Heartbeat::encode(&heartbeats, max_len).map(|datagram| {
                match reread(datagram, max_len) {
                    Message::Heartbeats(part) => part,
                    other => panic!("heartbeats became {other:?}"),
                }
            });
            assert_eq!(parts.collect::<Vec<_>>().concat(), heartbeats);
        }
    }
}

/// Encoded and parsed, the sequence numbers are the same, and their order is stable.
fn check_pairs(
    seqs: &[Seq],
    len: usize,
    max_len: usize,
    round_trip: impl Fn(Vec<Seq>, usize) -> Vec<Seq>,
) {
    assert!(seqs.len() <= len / 4 * 17, "{} numbers in {len} bytes", seqs.len());
    let sent = round_trip(seqs.to_vec(), max_len);
    let set = |seqs: &[Seq]| seqs.iter().copied().collect::<HashSet<_>>();
    assert_eq!(set(&sent), set(seqs));
    assert_eq!(sent.first(), seqs.first(), "the most urgent stays first");
    assert_eq!(round_trip(sent.clone(), Message::MAX_LEN), sent);
}

fn reread(datagram: Bytes, max_len: usize) -> Message {
    // At least a head and one pair.
    assert!(datagram.len() <= max_len.clamp(12, Message::MAX_LEN));
    Message::parse(datagram).expect("an encoded message can be parsed")
}
