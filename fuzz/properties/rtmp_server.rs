//! An encoder's connection, from the first byte on.

use downpour_media::flv::Tag;
use downpour_rtmp::{
    chunk::{ACKNOWLEDGEMENT, Message},
    handshake::PACKET_LEN,
    session::{
        PublishIntent, PublishRefusal, Refusal, ServerEvent, ServerSession, SessionError,
        SessionSettings,
    },
};

use super::{flv::check_tag, memory, pieces, rtmp_chunks};

/// What an encoder's bytes bring about does not depend on how they are cut, comes in an order that
/// makes sense, and is answered with chunks that can be read, not many times as long as the input.
///
/// The first byte says whether the handshake stands in front, and what the node decides.
pub fn check(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let mut input = Vec::new();
    if choice & 1 != 0 {
        input.push(3);
        input.resize(1 + 2 * PACKET_LEN, 0);
    }
    input.extend_from_slice(data);
    let (whole, held) = memory::peak(|| run(choice, [&input[..]]));
    let most = (1 << 20) + rtmp_chunks::most_held(input.len()) + 3 * whole.output_len;
    assert!(held <= most, "{held} bytes held for {}", input.len());
    assert_eq!(run(choice, pieces(&input)).told(), whole.told());
}

/// All that a connection came to.
struct Outcome {
    seen: Vec<Seen>,
    error: Option<SessionError>,
    /// The handshake's answer.
    greeting: Vec<u8>,
    /// What was sent after that, without acknowledgements, whose number may differ.
    answers: Vec<Message>,
    output_len: usize,
}

impl Outcome {
    fn told(&self) -> (&[Seen], &Option<SessionError>, &[u8], &[Message]) {
        (&self.seen, &self.error, &self.greeting, &self.answers)
    }
}

#[derive(Debug, PartialEq)]
enum Seen {
    Publish(PublishIntent),
    Tag(Tag),
    Unpublish,
    Refused(Refusal),
}

fn run<'a>(choice: u8, pieces: impl IntoIterator<Item = &'a [u8]>) -> Outcome {
    let settings = SessionSettings { max_message_len: 1 << 20, chunk_size: 128 };
    let mut session = ServerSession::new(settings, 7);
    let (mut seen, mut output, mut error) = (Vec::new(), Vec::new(), None);
    let (mut input_len, mut calls, mut ignored) = (0, 0, 0);
    'connection: for mut piece in pieces {
        input_len += piece.len();
        loop {
            calls += 1;
            let event = session.receive(&mut piece);
            ignored += session.take_ignored();
            let event = match event {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(fault) => {
                    assert!(SessionError::LABELS.contains(&fault.label()));
                    error = Some(fault);
                    break 'connection;
                }
            };
            let live = seen.iter().rfind(|seen| !matches!(seen, Seen::Tag(_)));
            let live = matches!(live, Some(Seen::Publish(_)));
            match event {
                ServerEvent::Publish(intent) => {
                    assert!(!live, "one publication at a time");
                    assert_eq!(intent.key.as_str().parse().as_ref(), Ok(&intent.key));
                    decide(&mut session, choice, &intent);
                    let accepted = session.live_key() == Some(&intent.key);
                    seen.push(Seen::Publish(intent));
                    if !accepted {
                        break 'connection;
                    }
                }
                ServerEvent::Tag(tag) => {
                    assert!(live, "media belongs to a publication");
                    assert!(!tag.body().is_empty());
                    check_tag(&tag);
                    seen.push(Seen::Tag(tag));
                }
                ServerEvent::Unpublish => {
                    assert!(live, "what ends had begun");
                    assert_eq!(session.live_key(), None);
                    seen.push(Seen::Unpublish);
                }
                ServerEvent::Refused(refusal) => {
                    seen.push(Seen::Refused(refusal));
                    break 'connection;
                }
            }
        }
        assert!(piece.is_empty(), "nothing is left behind");
        output.extend_from_slice(&session.take_output());
    }
    if error.is_none() {
        session.close("the end").expect("a reason can be told");
    }
    output.extend_from_slice(&session.take_output());
    assert!(session.take_output().is_empty(), "what was taken is gone");

    let most = 1 + 2 * PACKET_LEN + 1024 + 32 * input_len + 20 * calls;
    assert!(output.len() <= most, "{} bytes answer {input_len}", output.len());
    assert!(ignored <= input_len as u64);
    let (greeting, chunks) = output.split_at(output.len().min(1 + 2 * PACKET_LEN));
    // Before the handshake is through there is nobody to read the reason.
    let answers = match greeting.len() == 1 + 2 * PACKET_LEN {
        true => {
            let (mut answers, fault) = rtmp_chunks::read([chunks]);
            assert_eq!(fault, None, "a client can read the answers");
            answers.retain(|message| message.kind != ACKNOWLEDGEMENT);
            answers
        }
        false => Vec::new(),
    };
    Outcome { seen, error, greeting: greeting.into(), answers, output_len: output.len() }
}

/// The node's decision.
fn decide(session: &mut ServerSession, choice: u8, intent: &PublishIntent) {
    let decided = match choice >> 1 & 7 {
        1 => session.refuse(PublishRefusal::BadName, intent.key.as_str()),
        2 => session.refuse(PublishRefusal::Unauthorized, "not you"),
        3 => session.refuse(PublishRefusal::Failed, "no"),
        _ => session.accept(),
    };
    decided.expect("a decision can be told");
}
