use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    chunk::MessageHead,
    handshake::PACKET_LEN,
    session::{ClientEvent, ClientSession, Purpose},
};
use downpour_media::flv::TagKind;

const SETTINGS: SessionSettings =
    SessionSettings { max_message_len: Tag::MAX_BODY_LEN, chunk_size: 4096 };

/// A scripted encoder and its server session, after the handshake.
struct Encoder {
    server: ServerSession,
    channel: ChunkChannel,
    /// The answer to every publication request.
    verdict: Result<(), (PublishRefusal, &'static str)>,
}

impl Encoder {
    fn new() -> Self {
        let mut server = ServerSession::new(SETTINGS, 1);
        let mut hello = vec![0; 1 + 2 * PACKET_LEN];
        hello[0] = 3;
        assert!(server.receive(&mut &hello[..]).unwrap().is_none());
        assert_eq!(server.take_output().len(), 1 + 2 * PACKET_LEN);
        Self { server, channel: ChunkChannel::new(Tag::MAX_BODY_LEN), verdict: Ok(()) }
    }

    /// An encoder that is connected to `live`, with the answers drained.
    fn connected() -> Self {
        let mut encoder = Self::new();
        encoder.command(0, "connect", 1.0, &[Value::object([("app", "live".into())])]);
        encoder.run().unwrap();
        encoder.answers();
        encoder
    }

    /// An encoder that publishes `live/x`, with the answers drained.
    fn live() -> Self {
        let mut encoder = Self::connected();
        encoder.publish(1, "x");
        assert_eq!(encoder.server.live_key().map(ToString::to_string), Some("live/x".into()));
        encoder.answers();
        encoder
    }

    fn command(&mut self, stream_id: u32, name: &str, id: f64, arguments: &[Value]) {
        self.channel.write_command(stream_id, name, id, arguments).unwrap();
    }

    fn message(&mut self, kind: u8, timestamp: u32, body: &[u8]) {
        self.channel.write(4, MessageHead { kind, stream_id: 1, timestamp }, body).unwrap();
    }

    fn publish(&mut self, stream_id: u32, name: &str) -> Vec<ServerEvent> {
        self.command(stream_id, "publish", 5.0, &[Value::Null, name.into(), "live".into()]);
        self.run().unwrap()
    }

    /// Delivers the written bytes to the server and returns its events.
    fn run(&mut self) -> Result<Vec<ServerEvent>, SessionError> {
        let output = self.channel.output.split();
        let mut input = &output[..];
        let mut events = Vec::new();
        while let Some(event) = self.server.receive(&mut input)? {
            if matches!(event, ServerEvent::Publish(_)) {
                match &self.verdict {
                    Ok(()) => self.server.accept()?,
                    Err((status, reason)) => self.server.refuse(*status, reason)?,
                }
            }
            events.push(event);
        }
        assert!(input.is_empty());
        Ok(events)
    }

    /// Takes the commands that the server has written.
    fn answers(&mut self) -> Vec<(u32, Command)> {
        let output = self.server.take_output();
        let mut input = &output[..];
        std::iter::from_fn(|| self.channel.read(&mut input).unwrap())
            .map(|message| (message.stream_id, Command::parse(&message).unwrap()))
            .collect()
    }

    /// Takes the only answer, an `onStatus`: level, code and description.
    fn status(&mut self) -> (String, String, String) {
        let answers = self.answers();
        let [(_, status)] = &answers[..] else { panic!("{answers:?}") };
        assert_eq!(status.name, "onStatus");
        let text = |name| status.argument(0).property(name).unwrap().as_str().unwrap().to_owned();
        (text("level"), text("code"), text("description"))
    }

    fn tags(&mut self) -> Vec<(TagKind, u32, Vec<u8>)> {
        let events = self.run().unwrap().into_iter();
        events
            .map(|event| match event {
                ServerEvent::Tag(tag) => (tag.kind(), tag.timestamp(), tag.body().to_vec()),
                other => panic!("{other:?}"),
            })
            .collect()
    }
}

/// The body of an aggregate message of three tags.
fn aggregate() -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, time, media) in [
        (TagKind::Video, 1000, &[0x17, 1][..]),
        (TagKind::Audio, 1023, &[0xaf, 1]),
        (TagKind::Video, 1040, &[0x27, 1]),
    ] {
        body.extend_from_slice(Tag::new(kind, time, media).unwrap().framed());
    }
    body
}

fn script(values: &[Value]) -> Vec<u8> {
    let mut body = BytesMut::new();
    for value in values {
        value.encode(&mut body).unwrap();
    }
    body.to_vec()
}

#[test]
fn every_command_of_an_encoder_is_answered() {
    let mut encoder = Encoder::new();
    let object = [("app", "live?k=1".into()), ("tcUrl", "rtmp://h/live?k=1".into())];
    encoder.command(0, "connect", 1.0, &[Value::object(object)]);
    encoder.command(0, "releaseStream", 2.0, &[Value::Null, "x".into()]);
    encoder.command(0, "FCPublish", 3.0, &[Value::Null, "x".into()]);
    encoder.command(0, "createStream", 4.0, &[Value::Null]);
    encoder.command(0, "_checkbw", 5.0, &[Value::Null]);
    encoder.command(0, "getStreamLength", 6.0, &[Value::Null, "x".into()]);
    encoder.command(0, "setPeerInfo", 7.0, &[Value::Null]);
    // Some encoders omit the publish type (lal #280).
    encoder.command(1, "publish", 8.0, &[Value::Null, "x?s=2".into()]);
    let events = encoder.run().unwrap();
    let [ServerEvent::Publish(intent)] = &events[..] else { panic!("{events:?}") };
    assert_eq!(intent.key.to_string(), "live/x");
    assert_eq!(intent.query, "k=1&s=2");

    let answers = encoder.answers();
    let names: Vec<_> =
        answers.iter().map(|(id, c)| (*id, c.name.as_str(), c.transaction)).collect();
    assert_eq!(
        names,
        [
            (0, "_result", 1.0),
            (0, "_result", 2.0),
            (0, "_result", 3.0),
            (0, "_result", 4.0),
            (0, "_result", 5.0),
            (0, "_result", 6.0),
            (0, "onFCPublish", 0.0),
            (1, "onStatus", 0.0),
        ]
    );
    let connected = answers[0].1.argument(0);
    assert_eq!(
        connected.property("code").and_then(Value::as_str),
        Some("NetConnection.Connect.Success")
    );
    assert_eq!(connected.property("objectEncoding"), Some(&Value::Number(0.0)));
    assert_eq!(answers[3].1.argument(0), &Value::Number(1.0));
    assert_eq!(
        answers[7].1.argument(0).property("code").and_then(Value::as_str),
        Some("NetStream.Publish.Start")
    );
    assert_eq!(encoder.server.take_ignored(), 1);
}

#[test]
fn media_becomes_tags_only_while_live() {
    let mut encoder = Encoder::connected();
    encoder.message(VIDEO, 10, &[0x17, 0]);
    assert!(encoder.run().unwrap().is_empty());
    assert_eq!(encoder.server.take_ignored(), 1);

    encoder.publish(1, "x");
    encoder.message(VIDEO, 20, &[0x17, 1]);
    encoder.message(AUDIO, 0xffff_ffff, &[0xaf, 1]);
    encoder.message(AUDIO, 30, &[]);
    assert_eq!(
        encoder.tags(),
        [(TagKind::Video, 20, vec![0x17, 1]), (TagKind::Audio, 0xffff_ffff, vec![0xaf, 1])]
    );
    assert_eq!(encoder.server.take_ignored(), 1);
}

#[test]
fn data_messages_lose_their_server_prefix() {
    let mut encoder = Encoder::live();
    let metadata = script(&["onMetaData".into(), Value::object([("width", 640.0.into())])]);
    let framed = [script(&["@setDataFrame".into()]), metadata.clone()].concat();
    encoder.message(DATA_AMF0, 0, &framed);
    encoder.message(DATA_AMF3, 1, &[&[0][..], &framed].concat());
    encoder.message(DATA_AMF0, 2, &metadata);
    encoder.message(DATA_AMF0, 3, &script(&["|RtmpSampleAccess".into(), Value::Boolean(false)]));
    encoder.message(DATA_AMF0, 4, &script(&["@clearDataFrame".into(), "onMetaData".into()]));
    encoder.message(DATA_AMF0, 5, &script(&["@setDataFrame".into()]));
    assert_eq!(encoder.tags(), [0, 1, 2].map(|time| (TagKind::Script, time, metadata.clone())));
    assert_eq!(encoder.server.take_ignored(), 3);
}

#[test]
fn aggregates_are_split_and_rebased_on_their_first_tag() {
    let mut encoder = Encoder::live();
    encoder.message(AGGREGATE, 50, &aggregate());
    encoder.message(AUDIO, 99, &[0xaf, 2]);
    let times: Vec<_> = encoder.tags().into_iter().map(|(kind, time, _)| (kind, time)).collect();
    assert_eq!(
        times,
        [(TagKind::Video, 50), (TagKind::Audio, 73), (TagKind::Video, 90), (TagKind::Audio, 99)]
    );
}

#[test]
fn invalid_parts_of_an_aggregate_are_ignored() {
    let mut encoder = Encoder::live();
    let mut body = aggregate();
    // Truncated.
    encoder.message(AGGREGATE, 50, &body[..body.len() - 5]);
    assert_eq!(encoder.tags().len(), 2);
    assert_eq!(encoder.server.take_ignored(), 1);
    // Of an unknown type, and empty.
    body[0] = 7;
    encoder.message(AGGREGATE, 50, &body);
    encoder.message(AGGREGATE, 50, &[]);
    assert_eq!(encoder.tags().len(), 2);
    assert_eq!(encoder.server.take_ignored(), 1);
}

#[test]
fn amf3_commands_are_amf0_after_a_zero_byte() {
    let mut encoder = Encoder::new();
    let object = Value::object([("app", "live".into()), ("objectEncoding", 3.0.into())]);
    let mut connect = vec![0];
    connect.extend(script(&["connect".into(), 1.0.into(), object]));
    // An AMF3 argument, null, after the relevant ones.
    connect.extend([0x11, 0x01]);
    encoder.message(COMMAND_AMF3, 0, &connect);
    encoder.run().unwrap();
    let answers = encoder.answers();
    assert_eq!(answers[0].1.argument(0).property("objectEncoding"), Some(&Value::Number(3.0)));
    encoder.message(
        COMMAND_AMF3,
        0,
        &[&[0][..], &script(&["publish".into(), 2.0.into(), Value::Null, "x".into()])].concat(),
    );
    assert!(matches!(encoder.run().unwrap()[..], [ServerEvent::Publish(_)]));
}

#[test]
fn a_refused_publication_gets_the_status_code_and_reason() {
    for (reason, code) in [
        (PublishRefusal::BadName, "NetStream.Publish.BadName"),
        (PublishRefusal::Unauthorized, "NetStream.Publish.Unauthorized"),
        (PublishRefusal::Failed, "NetStream.Publish.Failed"),
    ] {
        let mut encoder = Encoder::connected();
        let description = "the reason";
        encoder.verdict = Err((reason, description));
        encoder.publish(1, "x");
        assert_eq!(encoder.status(), ("error".into(), code.into(), description.into()));
        assert_eq!(encoder.server.live_key(), None);
        encoder.message(VIDEO, 0, &[0x17, 1]);
        assert!(encoder.run().unwrap().is_empty());
    }
}

#[test]
fn an_invalid_stream_name_is_refused() {
    for name in ["", "?k=1", "a\nb", "../x"] {
        let mut encoder = Encoder::connected();
        let events = encoder.publish(1, name);
        assert!(matches!(events[..], [ServerEvent::Refused(Refusal::Name(_))]), "{events:?}");
        let (level, code, reason) = encoder.status();
        assert_eq!((&level[..], &code[..]), ("error", "NetStream.Publish.BadName"));
        assert!(reason.starts_with("not a stream key"), "{reason}");
    }
}

#[test]
fn publish_before_connect_is_refused() {
    let mut encoder = Encoder::new();
    let events = encoder.publish(1, "x");
    assert!(matches!(events[..], [ServerEvent::Refused(Refusal::NotConnected)]));
    assert_eq!(encoder.status().1, "NetStream.Publish.Failed");
}

#[test]
fn a_player_is_refused() {
    let mut encoder = Encoder::connected();
    encoder.command(1, "play", 5.0, &[Value::Null, "x".into()]);
    assert!(matches!(encoder.run().unwrap()[..], [ServerEvent::Refused(Refusal::Play)]));
    assert_eq!(encoder.status().1, "NetStream.Play.Failed");
}

#[test]
fn closing_notifies_the_encoder() {
    let mut encoder = Encoder::live();
    encoder.server.close("shutting down").unwrap();
    let (level, code, reason) = encoder.status();
    assert_eq!((&level[..], &code[..]), ("error", "NetConnection.Connect.Closed"));
    assert_eq!(reason, "shutting down");
}

#[test]
fn a_second_publication_at_the_same_time_is_refused() {
    let mut encoder = Encoder::live();
    // FMLE publishes twice (SRS #4588).
    assert!(encoder.publish(1, "x").is_empty());
    assert_eq!(encoder.status().1, "NetStream.Publish.Start");
    assert!(encoder.publish(2, "y").is_empty());
    assert_eq!(encoder.status().1, "NetStream.Publish.BadName");
    assert_eq!(encoder.server.live_key().unwrap().name(), "x");
}

#[test]
fn a_connection_publishes_one_stream_after_another() {
    let mut encoder = Encoder::live();
    // Another message stream than the publication's.
    encoder.command(0, "deleteStream", 6.0, &[Value::Null, 2.0.into()]);
    assert!(encoder.run().unwrap().is_empty());
    for (name, end) in [("y", "FCUnpublish"), ("z", "deleteStream"), ("w", "closeStream")] {
        let live = encoder.server.live_key().unwrap().name().to_owned();
        let argument = if end == "FCUnpublish" { (&live[..]).into() } else { 1.0.into() };
        encoder.command(1, end, 6.0, &[Value::Null, argument]);
        assert!(matches!(encoder.run().unwrap()[..], [ServerEvent::Unpublish]), "{end}");
        assert_eq!(encoder.server.live_key(), None);
        encoder.answers();
        assert_eq!(encoder.publish(1, name).len(), 1);
        assert_eq!(encoder.server.live_key().unwrap().name(), name);
    }
}

#[test]
fn fc_unpublish_of_another_name_ends_nothing() {
    let mut encoder = Encoder::live();
    for other in ["y", "x/y", "../x"] {
        encoder.command(0, "FCUnpublish", 6.0, &[Value::Null, other.into()]);
        assert!(encoder.run().unwrap().is_empty(), "{other}");
    }
    assert_eq!(encoder.server.live_key().unwrap().name(), "x");
    encoder.command(0, "FCUnpublish", 6.0, &[Value::Null, "x?k=1".into()]);
    assert!(matches!(encoder.run().unwrap()[..], [ServerEvent::Unpublish]));
    // Without a name.
    encoder.publish(1, "x");
    encoder.command(0, "FCUnpublish", 6.0, &[Value::Null, Value::Null]);
    assert!(matches!(encoder.run().unwrap()[..], [ServerEvent::Unpublish]));
}

#[test]
fn amf3_arguments_name_the_stream() {
    let mut encoder = Encoder::connected();
    let mut publish = vec![0];
    publish.extend(script(&["publish".into(), 2.0.into(), Value::Null]));
    publish.extend([0x11, 0x06, 0x07]);
    publish.extend(b"cam\x11\x06\x09live");
    encoder.message(COMMAND_AMF3, 0, &publish);
    assert!(matches!(encoder.run().unwrap()[..], [ServerEvent::Publish(_)]));
    assert_eq!(encoder.server.live_key().unwrap().name(), "cam");
}

#[test]
fn extended_codecs_are_offered_for_forwarding_only() {
    let mut encoder = Encoder::new();
    let map = Value::object([("hvc1", 7.0.into()), ("*", 4.0.into()), ("too long", 1.0.into())]);
    let list = vec!["hvc1".into(), "av01".into(), 7.0.into(), "too long".into()];
    encoder.command(
        0,
        "connect",
        1.0,
        &[Value::object([
            ("app", "live".into()),
            ("fourCcList", Value::StrictArray(list)),
            ("videoFourCcInfoMap", map),
            ("capsEx", 15.0.into()),
        ])],
    );
    encoder.run().unwrap();
    let answers = encoder.answers();
    let ours = answers[0].1.object();
    assert_eq!(
        ours.property("fourCcList"),
        Some(&Value::StrictArray(vec!["hvc1".into(), "av01".into()]))
    );
    assert_eq!(
        ours.property("videoFourCcInfoMap"),
        Some(&Value::object([("hvc1", 4.0.into()), ("*", 4.0.into())]))
    );
    assert_eq!(ours.property("audioFourCcInfoMap"), None);
    assert_eq!(ours.property("capsEx"), Some(&Value::Number(0.0)));
}

#[test]
fn message_streams_are_bounded() {
    let mut encoder = Encoder::connected();
    for _ in 0..=MAX_STREAMS {
        encoder.command(0, "createStream", 2.0, &[Value::Null]);
    }
    encoder.run().unwrap();
    let answers = encoder.answers();
    assert_eq!(answers.iter().filter(|(_, c)| c.name == "_result").count(), MAX_STREAMS);
    assert_eq!(answers.last().unwrap().1.name, "_error");
}

#[test]
fn bytes_without_a_publication_are_bounded() {
    let mut encoder = Encoder::connected();
    let mut error = None;
    for _ in 0..40 {
        encoder.message(VIDEO, 0, &[0; 60_000]);
        error = error.or(encoder.run().err());
    }
    assert!(matches!(error, Some(SessionError::NothingPublished(_))), "{error:?}");

    let mut encoder = Encoder::live();
    for _ in 0..40 {
        encoder.message(VIDEO, 0, &[0; 60_000]);
        assert_eq!(encoder.run().unwrap().len(), 1, "a publication is not limited");
    }
}

#[test]
fn publications_per_connection_are_bounded() {
    let mut encoder = Encoder::connected();
    for i in 0..MAX_PUBLICATIONS {
        assert!(matches!(encoder.publish(1, "x")[..], [ServerEvent::Publish(_)]), "{i}");
        encoder.command(1, "closeStream", 0.0, &[Value::Null]);
        encoder.run().unwrap();
    }
    encoder.answers();
    let events = encoder.publish(1, "x");
    assert!(matches!(events[..], [ServerEvent::Refused(Refusal::TooMany)]), "{events:?}");
    assert_eq!(encoder.status().1, "NetStream.Publish.Failed");
}

#[test]
fn hostile_commands_are_errors() {
    for body in [
        [&script(&["connect".into(), 1.0.into()])[..], &[0x0a, 0, 0, 0, 1].repeat(10_000)].concat(),
        vec![],
        vec![0x05],
        script(&[1.0.into(), "connect".into()]),
        [&script(&["connect".into(), 1.0.into()])[..], &[0x03, 0, 3, b'a']].concat(),
    ] {
        let mut encoder = Encoder::new();
        encoder.message(COMMAND_AMF0, 0, &body);
        let error = encoder.run().unwrap_err();
        assert_eq!(error.label(), "command", "{error}");
    }
}

#[test]
fn a_client_receives_the_servers_refusal() {
    let mut server = ServerSession::new(SETTINGS, 1);
    let url = "rtmp://h/live/x".parse().unwrap();
    let mut client = ClientSession::new(url, Purpose::Play, 2);
    let error = loop {
        let up = client.take_output();
        let mut input = &up[..];
        while server.receive(&mut input).unwrap().is_some() {}
        let down = server.take_output();
        assert!(!(up.is_empty() && down.is_empty()));
        let mut input = &down[..];
        match client.receive(&mut input) {
            Ok(event) => assert!(event.is_none()),
            Err(error) => break error,
        }
    };
    let SessionError::Rejected { code, description } = error else { panic!("{error}") };
    assert_eq!(code, "NetStream.Play.Failed");
    assert_eq!(description, PLAY_REFUSED);
}

fn any_tag() -> impl Strategy<Value = Tag> {
    let kind = prop_oneof![Just(TagKind::Audio), Just(TagKind::Video), Just(TagKind::Script)];
    let length = prop_oneof![1usize..300, 4000usize..9000];
    (kind, any::<u32>(), length, any::<u8>()).prop_map(|(kind, time, length, byte)| {
        let mut body = script(&["onMetaData".into()]);
        if kind != TagKind::Script {
            body.clear();
        }
        body.extend((0..length).map(|i| byte.wrapping_add(i as u8)));
        Tag::new(kind, time, &body).unwrap()
    })
}

proptest! {
    #[test]
    fn tags_cross_from_client_to_server_at_any_split(
        tags in vec(any_tag(), 1..20),
        to_server in 1usize..5000,
        to_client in 1usize..5000,
    ) {
        let mut server = ServerSession::new(SETTINGS, 1);
        let url = "rtmp://h/live/x?k=1".parse().unwrap();
        let mut client = ClientSession::new(url, Purpose::Publish, 2);
        let (mut started, mut ended, mut received) = (false, false, Vec::new());
        loop {
            let (up, down) = (client.take_output(), server.take_output());
            if up.is_empty() && down.is_empty() {
                break;
            }
            for mut piece in up.chunks(to_server) {
                while let Some(event) = server.receive(&mut piece).unwrap() {
                    match event {
                        ServerEvent::Publish(intent) => {
                            prop_assert_eq!(intent.query, "k=1");
                            server.accept().unwrap();
                        }
                        ServerEvent::Tag(tag) => received.push(tag),
                        ServerEvent::Unpublish => ended = true,
                        ServerEvent::Refused(refusal) => panic!("{refusal}"),
                    }
                }
            }
            for mut piece in down.chunks(to_client) {
                while let Some(event) = client.receive(&mut piece).unwrap() {
                    if matches!(event, ClientEvent::Started) {
                        started = true;
                        for tag in &tags {
                            client.send(tag).unwrap();
                        }
                        client.finish().unwrap();
                    }
                }
            }
        }
        prop_assert!(started && ended);
        prop_assert_eq!(received, tags);
        prop_assert_eq!(server.take_ignored(), 0);
    }

    #[test]
    fn a_damaged_session_is_events_or_an_error(
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        split in 1usize..300,
    ) {
        let mut channel = ChunkChannel::new(Tag::MAX_BODY_LEN);
        channel.write_command(0, "connect", 1.0, &[Value::object([("app", "live".into())])]).unwrap();
        channel.set_chunk_size(200).unwrap();
        channel.write_command(0, "createStream", 2.0, &[Value::Null]).unwrap();
        channel.write_command(1, "publish", 3.0, &[Value::Null, "x".into()]).unwrap();
        let body = Tag::new(TagKind::Audio, 7, &[1; 99]).unwrap();
        for kind in [VIDEO, AUDIO, DATA_AMF0, DATA_AMF3, AGGREGATE, WINDOW_ACK_SIZE, 1, 2, 3, 4, 6]
        {
            let head = MessageHead { kind, stream_id: 1, timestamp: kind.into() };
            let body = if kind < 7 { &body.framed()[..6] } else { &body.framed()[..] };
            channel.write(4, head, body).unwrap();
        }
        for (at, byte) in damage {
            let at = at.index(channel.output.len());
            channel.output[at] = byte;
        }
        let mut server = ServerSession::new(SETTINGS, 1);
        let mut hello = vec![0; 1 + 2 * PACKET_LEN];
        hello[0] = 3;
        server.receive(&mut &hello[..]).unwrap();
        for mut piece in channel.output.chunks(split) {
            loop {
                match server.receive(&mut piece) {
                    Ok(Some(ServerEvent::Publish(_))) => server.accept().unwrap(),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => return Ok(()),
                }
            }
        }
    }
}
