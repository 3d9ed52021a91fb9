//! A server's answers to a client that publishes or plays.

use downpour_media::flv::{Tag, TagKind};
use downpour_rtmp::{
    chunk::{ACKNOWLEDGEMENT, Message},
    handshake::PACKET_LEN,
    session::{ClientEvent, ClientSession, Purpose, SessionError},
};

use super::{flv::check_tag, memory, pieces, rtmp_chunks};

/// What a server's bytes bring about does not depend on how they are cut: a stream starts and ends
/// at most once, media comes to players only and never after the end, and what the client says can
/// be read and is bounded.
///
/// The first byte says whether the handshake stands in front, and what the client is there for.
pub fn check(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let mut input = Vec::new();
    if choice & 1 != 0 {
        input.push(3);
        input.resize(1 + 2 * PACKET_LEN, 0);
    }
    input.extend_from_slice(data);
    let purpose = if choice & 2 != 0 { Purpose::Play } else { Purpose::Publish };
    let (whole, held) = memory::peak(|| run(purpose, [&input[..]]));
    let most = (1 << 20) + rtmp_chunks::most_held(input.len());
    assert!(held <= most, "{held} bytes held for {}", input.len());
    assert_eq!(run(purpose, pieces(&input)), whole);
}

/// What was seen, how it failed, and what was sent, without acknowledgements.
#[derive(Debug, PartialEq)]
struct Outcome {
    seen: Vec<Seen>,
    error: Option<SessionError>,
    said: Vec<Message>,
}

#[derive(Debug, PartialEq)]
enum Seen {
    Started,
    Tag(Tag),
    Ended,
}

fn run<'a>(purpose: Purpose, pieces: impl IntoIterator<Item = &'a [u8]>) -> Outcome {
    let url = "rtmp://127.0.0.1/live/movie?k=1".parse().expect("a good URL");
    let mut session = ClientSession::new(url, purpose, 7);
    let (mut seen, mut output, mut error) = (Vec::new(), Vec::new(), None);
    let (mut input_len, mut calls) = (0, 0);
    'connection: for mut piece in pieces {
        input_len += piece.len();
        loop {
            calls += 1;
            match session.receive(&mut piece) {
                Ok(Some(event)) => {
                    assert!(!seen.contains(&Seen::Ended), "nothing comes after the end");
                    seen.push(match event {
                        ClientEvent::Started => Seen::Started,
                        ClientEvent::Tag(tag) => {
                            assert_eq!(purpose, Purpose::Play);
                            check_tag(&tag);
                            Seen::Tag(tag)
                        }
                        ClientEvent::Ended => Seen::Ended,
                    });
                }
                Ok(None) => break,
                Err(fault) => {
                    error = Some(fault);
                    break 'connection;
                }
            }
        }
        assert!(piece.is_empty(), "nothing is left behind");
        output.extend_from_slice(&session.take_output());
    }
    assert!(seen.iter().filter(|seen| **seen == Seen::Started).count() <= 1);
    output.extend_from_slice(&session.take_output());
    let most = 1 + 2 * PACKET_LEN + 2048 + 8 * input_len + 20 * calls;
    assert!(output.len() <= most, "{} bytes answer {input_len}", output.len());

    let greeted = output.len() > 1 + PACKET_LEN;
    if error.is_none() && greeted {
        for kind in [TagKind::Script, TagKind::Video] {
            let tag = Tag::new(kind, 5, b"\x02\0\x0aonMetaData\x05").expect("it is short");
            session.send(&tag).expect("any tag can be sent");
        }
        session.finish().expect("the end can be told");
        output.extend_from_slice(&session.take_output());
    }
    let chunks = output.get(1 + 2 * PACKET_LEN..).unwrap_or_default();
    let (mut said, fault) = rtmp_chunks::read([chunks]);
    assert_eq!(fault, None, "a server can read it");
    said.retain(|message| message.kind != ACKNOWLEDGEMENT);
    Outcome { seen, error, said }
}
