use super::*;
use crate::downstream::outgoing::OutgoingEvent;
use downpour_hub::{Hub, LogLimits};
use downpour_repair::rtp::Seq;

fn sender() -> (StreamSender, Hub, OutgoingStreams) {
    let settings = SenderSettings {
        history_packets: 100,
        history_age: Duration::from_secs(10),
        payload_max: 1120,
        repeat_headers: true,
    };
    let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 10_000 });
    let outgoing = OutgoingStreams::new();
    let metrics = SenderMetrics::register(&Registry::new()).unwrap();
    let sender = StreamSender::new(settings, outgoing.clone(), None, metrics);
    hub.add_sink(Arc::new(sender.clone()));
    (sender, hub, outgoing)
}

fn frame(timestamp: u32, first: u8) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[first, 1, 0, 0, 0, 9]).unwrap()
}

fn header() -> Tag {
    Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap()
}

fn script(body: &[u8]) -> Tag {
    Tag::new(TagKind::Script, 40, body).unwrap()
}

#[test]
fn a_live_stream_is_listed_and_its_packets_can_be_requested() {
    let (sender, hub, outgoing) = sender();
    let mut events = outgoing.subscribe();
    let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
    publisher.push(script(b"\x02\x00\x0aonMetaData\x05"));
    publisher.push(header());
    publisher.push(frame(1000, 0x17));
    publisher.push(frame(1040, 0x27));
    let stream = outgoing.streams().pop().unwrap();
    assert_eq!(stream.id(), publisher.stream().id());
    assert_eq!(stream.start_unix_ms(), publisher.stream().start_unix_ms());
    assert_eq!(stream.newest_seq(), Some(Seq(65002)));
    assert_eq!(stream.gop_start(), Some(Seq(65001)));
    assert!(stream.packet(Seq(65000)).is_some());
    let headers = stream.headers();
    assert!(headers.metadata().is_some() && headers.video().is_some() && headers.audio().is_none());
    assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Up(_))));
    assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Update(_))), "the metadata");
    assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Update(_))), "the video header");
    drop(publisher);
    assert!(matches!(events.try_recv(), Ok(OutgoingEvent::End(_))));
    assert!(stream.ended());
    sender.expire(Instant::now());
    assert!(stream.packet(Seq(65001)).is_some(), "its last packets can still be requested");
    sender.expire(Instant::now() + Duration::from_secs(11));
    assert!(outgoing.streams().is_empty());
}

#[test]
fn streams_that_come_and_go_do_not_fill_the_memory() {
    let (sender, hub, outgoing) = sender();
    let mut body = vec![0; 8 << 20];
    body[..2].copy_from_slice(&[0x17, 1]);
    let tag = Tag::new(TagKind::Video, 0, &body).unwrap();
    for _ in 0..20 {
        hub.publish("live/a".parse().unwrap()).unwrap().push(tag.clone());
    }
    let held: usize = outgoing.streams().iter().map(|stream| stream.held().1).sum();
    assert!(held <= RETIRED_BYTES, "{held} bytes are held");
    assert!(sender.shared.metrics.retired_early.get() >= 12);
    assert_eq!(outgoing.streams().len(), sender.shared.retired.lock().len());
    assert!(sender.shared.live.lock().is_empty());
}

#[test]
fn captions_do_not_replace_the_metadata() {
    let (_, hub, outgoing) = sender();
    let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
    publisher.push(script(b"\x02\x00\x0aonMetaData\x05"));
    publisher.push(frame(0, 0x17));
    publisher.push(script(b"\x02\x00\x0aonTextData\x05"));
    assert!(outgoing.streams()[0].headers().metadata().unwrap().is_metadata());
}

#[test]
fn script_data_is_passed_on_within_a_budget() {
    let (sender, hub, outgoing) = sender();
    let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
    publisher.push(frame(0, 0x17));
    let mut events = outgoing.subscribe();
    let cue = script(b"\x02\x00\x0aonCuePoint\x05");
    publisher.push(cue.clone());
    let Ok(OutgoingEvent::Data(_, tag)) = events.try_recv() else { panic!("no data") };
    assert_eq!(tag, cue);
    let dropped = &sender.shared.metrics.data_dropped;
    publisher.push(script(&vec![2; MAX_DATA_LEN]));
    assert_eq!(dropped.get(), 1, "too long");
    for _ in 0..1000 {
        publisher.push(script(&[2; 2000]));
    }
    let passed = std::iter::from_fn(|| events.try_recv().ok()).count() as u64;
    assert_eq!(passed + dropped.get(), 1001);
    assert!((50..500).contains(&passed), "{passed}");
}

#[test]
fn metadata_that_is_too_long_for_edges_is_counted() {
    let (sender, hub, _) = sender();
    let mut body = b"\x02\x00\x0aonMetaData".to_vec();
    body.resize(MAX_HEADER_LEN, 5);
    // Once it is known before the stream starts, and once it comes in mid-stream.
    let mut info = downpour_hub::PublicationInfo::starting_at(0);
    info.headers = [script(&body)].into_iter().collect();
    let mut publisher = hub.publish_with("live/a".parse().unwrap(), info).unwrap();
    publisher.push(frame(0, 0x17));
    assert_eq!(sender.shared.metrics.headers_left_out.get(), 1);
    publisher.push(script(&body));
    assert_eq!(sender.shared.metrics.headers_left_out.get(), 1, "repeated");
    body.push(6);
    publisher.push(script(&body));
    assert_eq!(sender.shared.metrics.headers_left_out.get(), 2);
}

#[test]
fn an_edge_that_joins_before_the_first_key_frame_starts_at_the_first_packet() {
    let (_, hub, outgoing) = sender();
    let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
    publisher.push(header());
    let stream = outgoing.streams().pop().unwrap();
    assert_eq!(stream.gop_start(), Some(Seq(65000)));
    assert_eq!(stream.newest_seq(), Some(Seq(65000)));
    for i in 0..200 {
        publisher.push(frame(i, if i == 0 { 0x17 } else { 0x27 }));
    }
    assert_eq!(stream.gop_start(), None, "the ring holds 100 packets");
    assert_eq!(stream.packet(Seq(65000)), None);
    assert!(stream.header_packet(Seq(65000)).is_some_and(|p| p.ends_with(header().unit())));
    assert_eq!(stream.header_packet(Seq(65001)), None);
}

#[test]
fn headers_of_every_track_are_announced_and_kept_for_requests() {
    let (_, hub, outgoing) = sender();
    let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
    let second = Tag::new(TagKind::Audio, 0, b"\x95\x00mp4a\x01\x12\x10").unwrap();
    let main = Tag::new(TagKind::Audio, 0, &[0xaf, 0, 0x12, 0x10]).unwrap();
    let changed = Tag::new(TagKind::Audio, 0, &[0xaf, 0, 0x13, 0x10]).unwrap();
    let empty = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0]).unwrap();
    for tag in [header(), main, second.clone(), empty, changed.clone()] {
        publisher.push(tag);
    }
    let stream = outgoing.streams().pop().unwrap();
    let headers: Vec<_> = stream.headers().iter().cloned().collect();
    assert_eq!(headers, [header(), changed, second]);
    let kept = |seq: u16| stream.header_packet(Seq(seq)).is_some();
    assert!(kept(65000) && kept(65002) && kept(65004));
    assert!(!kept(65001) && !kept(65003), "replaced, and no header");
}
