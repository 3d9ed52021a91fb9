//! A server's output to a client that publishes or plays.

use downpour_media::flv::{Tag, TagKind};
use downpour_rtmp::{
    chunk::Message,
    handshake::PACKET_LEN,
    session::{ClientEvent, ClientSession, Purpose, SessionError},
};

use super::{
    flv::check_tag,
    memory, pieces,
    rtmp::{HANDSHAKE_LEN, messages, split_input},
    rtmp_chunks,
};

/// Events do not depend on the split of the input. A stream starts and ends at most once, only players
/// receive media, and none after the end. The client's output is valid and bounded.
///
/// The first byte selects whether a handshake precedes the input, and the client's purpose.
pub fn check(data: &[u8]) {
    let Some((choice, input)) = split_input(data) else { return };
    let purpose = if choice & 2 != 0 { Purpose::Play } else { Purpose::Publish };
    let (whole, held) = memory::peak(|| run(purpose, [&input[..]]));
    let max = (1 << 20) + rtmp_chunks::max_memory(input.len());
    assert!(held <= max, "{held} bytes held for {}", input.len());
    assert_eq!(run(purpose, pieces(&input)), whole);
}

/// The events, the error, and the messages that the client sent.
#[derive(Debug, PartialEq)]
struct Outcome {
    events: Vec<Event>,
    error: Option<SessionError>,
    sent: Vec<Message>,
}

#[derive(Debug, PartialEq)]
enum Event {
    Started,
    Tag(Tag),
    Ended,
}

fn run<'a>(purpose: Purpose, pieces: impl IntoIterator<Item = &'a [u8]>) -> Outcome {
    let url = "rtmp://127.0.0.1/live/movie?k=1".parse().expect("a valid URL");
    let mut session = ClientSession::new(url, purpose, 7);
    let (mut events, mut output, mut error) = (Vec::new(), Vec::new(), None);
    let (mut input_len, mut calls) = (0, 0);
    'connection: for mut piece in pieces {
        input_len += piece.len();
        loop {
            calls += 1;
            match session.receive(&mut piece) {
                Ok(Some(event)) => {
                    assert!(!events.contains(&Event::Ended), "no event follows the end");
                    events.push(convert(event, purpose));
                }
                Ok(None) => break,
                Err(fault) => {
                    error = Some(fault);
                    break 'connection;
                }
            }
        }
        assert!(piece.is_empty(), "the input is consumed");
        output.extend_from_slice(&session.take_output());
    }
    assert!(events.iter().filter(|event| **event == Event::Started).count() <= 1);
    output.extend_from_slice(&session.take_output());
    let max = HANDSHAKE_LEN + 2048 + 8 * input_len + 20 * calls;
    assert!(output.len() <= max, "{} bytes of output for {input_len}", output.len());

    let handshake_done = output.len() > 1 + PACKET_LEN;
    if error.is_none() && handshake_done {
        for kind in [TagKind::Script, TagKind::Video] {
            let tag = Tag::new(kind, 5, b"\x02\0\x0aonMetaData\x05").expect("a short body");
            session.send(&tag).expect("any tag can be sent");
        }
        session.finish().expect("the end can be sent");
        output.extend_from_slice(&session.take_output());
    }
    Outcome { events, error, sent: messages(&output) }
}

fn convert(event: ClientEvent, purpose: Purpose) -> Event {
    match event {
        ClientEvent::Started => Event::Started,
        ClientEvent::Tag(tag) => {
            assert_eq!(purpose, Purpose::Play);
            check_tag(&tag);
            Event::Tag(tag)
        }
        ClientEvent::Ended => Event::Ended,
    }
}
