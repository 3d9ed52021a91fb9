//! An encoder's connection, from the first byte.

use downpour_media::flv::Tag;
use downpour_rtmp::{
    chunk::Message,
    session::{
        PublishIntent, PublishRefusal, Refusal, ServerEvent, ServerSession, SessionError,
        SessionSettings,
    },
};

use super::{
    flv::check_tag,
    memory, pieces,
    rtmp::{HANDSHAKE_LEN, messages, split_input},
    rtmp_chunks,
};

/// Events do not depend on the split of the input. Media arrives only within publications. The answers
/// are valid, and their length is proportional to the input.
///
/// The first byte selects whether a handshake precedes the input, and the node's decision.
pub fn check(data: &[u8]) {
    let Some((choice, input)) = split_input(data) else { return };
    let ((whole, output_len), held) = memory::peak(|| run(choice, [&input[..]]));
    let max = (1 << 20) + rtmp_chunks::max_memory(input.len()) + 3 * output_len;
    assert!(held <= max, "{held} bytes held for {}", input.len());
    assert_eq!(run(choice, pieces(&input)).0, whole);
}

/// The result of a connection.
#[derive(Debug, PartialEq)]
struct Outcome {
    events: Vec<Event>,
    error: Option<SessionError>,
    /// The server's part of the handshake.
    handshake: Vec<u8>,
    answers: Vec<Message>,
}

#[derive(Debug, PartialEq)]
enum Event {
    Publish(PublishIntent),
    Tag(Tag),
    Unpublish,
    Refused(Refusal),
}

/// Runs a connection. Returns its outcome and the length of the output.
fn run<'a>(choice: u8, pieces: impl IntoIterator<Item = &'a [u8]>) -> (Outcome, usize) {
    let settings = SessionSettings { max_message_len: 1 << 20, chunk_size: 128 };
    let session = ServerSession::new(settings, 7);
    let mut connection = Connection { session, choice, events: Vec::new(), calls: 0, ignored: 0 };
    let (mut output, mut error, mut input_len) = (Vec::new(), None, 0);
    for mut piece in pieces {
        input_len += piece.len();
        match connection.receive(&mut piece) {
            Ok(true) => assert!(piece.is_empty(), "the input is consumed"),
            Ok(false) => break,
            Err(fault) => {
                error = Some(fault);
                break;
            }
        }
        output.extend_from_slice(&connection.session.take_output());
    }
    let Connection { mut session, events, calls, ignored, .. } = connection;
    if error.is_none() {
        session.close("the end").expect("any reason can be sent");
    }
    output.extend_from_slice(&session.take_output());
    assert!(session.take_output().is_empty(), "output is returned once");

    let max = HANDSHAKE_LEN + 1024 + 32 * input_len + 20 * calls;
    assert!(output.len() <= max, "{} bytes of output for {input_len}", output.len());
    assert!(ignored <= input_len as u64);
    let handshake = output[..output.len().min(HANDSHAKE_LEN)].to_vec();
    (Outcome { events, error, handshake, answers: messages(&output) }, output.len())
}

/// A server session with the events so far.
struct Connection {
    session: ServerSession,
    choice: u8,
    events: Vec<Event>,
    /// Calls of [`ServerSession::receive`].
    calls: usize,
    ignored: u64,
}

impl Connection {
    /// Passes input to the session. Returns `false` if the connection is over.
    fn receive(&mut self, input: &mut &[u8]) -> Result<bool, SessionError> {
        loop {
            self.calls += 1;
            let event = self.session.receive(input);
            self.ignored += self.session.take_ignored();
            match event {
                Ok(Some(event)) => {
                    if !self.handle(event) {
                        return Ok(false);
                    }
                }
                Ok(None) => return Ok(true),
                Err(error) => {
                    assert!(SessionError::LABELS.contains(&error.label()));
                    return Err(error);
                }
            }
        }
    }

    /// Checks and records an event. Returns `false` if the connection is over.
    fn handle(&mut self, event: ServerEvent) -> bool {
        let last = self.events.iter().rfind(|event| !matches!(event, Event::Tag(_)));
        let live = matches!(last, Some(Event::Publish(_)));
        match event {
            ServerEvent::Publish(intent) => {
                assert!(!live, "one publication at a time");
                assert_eq!(intent.key.as_str().parse().as_ref(), Ok(&intent.key));
                self.decide(&intent);
                let accepted = self.session.live_key() == Some(&intent.key);
                self.events.push(Event::Publish(intent));
                return accepted;
            }
            ServerEvent::Tag(tag) => {
                assert!(live, "media belongs to a publication");
                assert!(!tag.body().is_empty());
                check_tag(&tag);
                self.events.push(Event::Tag(tag));
            }
            ServerEvent::Unpublish => {
                assert!(live, "only a live publication ends");
                assert_eq!(self.session.live_key(), None);
                self.events.push(Event::Unpublish);
            }
            ServerEvent::Refused(refusal) => {
                self.events.push(Event::Refused(refusal));
                return false;
            }
        }
        true
    }

    /// Answers a request to publish with the node's decision.
    fn decide(&mut self, intent: &PublishIntent) {
        let session = &mut self.session;
        let result = match self.choice >> 1 & 7 {
            1 => session.refuse(PublishRefusal::BadName, intent.key.as_str()),
            2 => session.refuse(PublishRefusal::Unauthorized, "not you"),
            3 => session.refuse(PublishRefusal::Failed, "no"),
            _ => session.accept(),
        };
        result.expect("any decision can be sent");
    }
}
