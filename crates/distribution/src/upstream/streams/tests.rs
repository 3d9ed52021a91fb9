use super::{header_recovery::*, unnamed_packets::*, *};
use downpour_hub::{LogLimits, ReadOutcome};
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::{
    receiver::Settings as ReceiverSettings,
    rtp::{Burst, Packetizer},
};

fn intake() -> (Streams, Hub) {
    let hub = Hub::new(LogLimits { max_bytes: 1 << 22, max_age: 60_000 });
    let metrics = ReceiveMetrics::register(&prometheus::Registry::new()).unwrap();
    let settings = Settings {
        receiver: ReceiverSettings::default(),
        silence: Duration::from_secs(10),
        max_streams: 3,
    };
    (Streams::new(settings, hub.clone(), metrics, |_| ()), hub)
}

fn up(key: &str, ssrc: u32, gop_start: Option<Seq>, newest: Option<Seq>) -> StreamInfo {
    StreamInfo {
        key: key.parse().unwrap(),
        ssrc: Ssrc(ssrc),
        start_unix_ms: 0,
        headers: Headers::default(),
        gop_start,
        newest,
    }
}

fn named(key: &str, ssrc: u32) -> LiveStream {
    LiveStream { key: key.parse().unwrap(), ssrc: Ssrc(ssrc), start_unix_ms: 0 }
}

/// A header, then groups of a key frame and four others.
fn bursts(ssrc: u32, frames: usize) -> (Vec<Tag>, Vec<Burst>) {
    let mut packetizer = Packetizer::new(Ssrc(ssrc), 1120);
    let header = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap();
    let frame = |i: usize| {
        let mut body = vec![i as u8; 3000];
        body[0] = if i.is_multiple_of(5) { 0x17 } else { 0x27 };
        body[1] = 1;
        Tag::new(TagKind::Video, i as u32 * 40, &body).unwrap()
    };
    let tags: Vec<_> = std::iter::once(header).chain((0..frames).map(frame)).collect();
    let bursts = tags.iter().map(|tag| packetizer.packetize(tag)).collect();
    (tags, bursts)
}

fn feed(intake: &mut Streams, now: Instant, burst: &Burst, path: Path) {
    for i in 0..burst.count() {
        intake.handle_packet(now, burst.packet(i).unwrap(), path);
    }
}

fn read(hub: &Hub, key: &str) -> Vec<Tag> {
    let mut out = Vec::new();
    let mut reader = hub.subscribe(key).unwrap();
    while let ReadOutcome::Read(_) = reader.try_read(&mut out, usize::MAX) {}
    out
}

#[test]
fn packets_that_come_before_their_name_are_not_lost() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 4);
    assert!(!intake.saw_unknown_ssrc());
    feed(&mut intake, now, &bursts[0], Path::Live(0));
    assert!(intake.saw_unknown_ssrc() && !intake.saw_unknown_ssrc());
    bursts[1..3].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
    assert!(hub.is_empty() && !intake.saw_unknown_ssrc(), "once for each");
    assert_eq!(intake.unnamed(now, Duration::ZERO).collect::<Vec<_>>(), [Ssrc(7)]);
    intake.stream_named(now, named("live/a", 7));
    bursts[3..].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
    assert_eq!(read(&hub, "live/a"), tags);
    assert_eq!(intake.poll_nack(), None);
}

#[test]
fn who_joins_late_asks_for_the_group_from_its_start() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    let mut info = up("live/a", 7, Some(bursts[6].first_seq()), Some(bursts[8].last_seq()));
    info.headers.video = Some(tags[0].clone());
    intake.stream_up(now, info);
    let nack = intake.poll_nack().unwrap();
    assert_eq!(nack.seqs.first(), Some(&bursts[6].first_seq()));
    assert_eq!(nack.seqs.last(), Some(&bursts[8].last_seq()));
    bursts[6..9].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Repair));
    feed(&mut intake, now, &bursts[9], Path::Live(0));
    let read = read(&hub, "live/a");
    assert_eq!(read[0].body(), tags[0].body());
    assert_eq!(read[1..], tags[6..]);
}

#[test]
fn under_v0_who_joins_late_finds_the_headers_at_the_publications_start() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    feed(&mut intake, now, &bursts[6], Path::Live(0));
    intake.stream_named(now, named("live/a", 7));
    let nack = intake.poll_nack().unwrap();
    assert_eq!((nack.ssrc, nack.seqs[0]), (Ssrc(7), Seq::FIRST));
    feed(&mut intake, now, &bursts[0], Path::Repair);
    feed(&mut intake, now, &bursts[7], Path::Live(0));
    intake.gone(now, Ssrc(7), &[Seq::FIRST.plus(1)]);
    let read = read(&hub, "live/a");
    assert_eq!(read[0].body(), tags[0].body());
    assert_eq!(read[1..], tags[6..8]);
}

#[test]
fn headers_from_the_publications_start_do_not_move_the_stream_ahead() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    // Late in the sequence: 65000 would be 5000 packets ahead.
    let live = |i: usize, n: u16| {
        let mut bytes = bursts[i].packet(usize::from(n)).unwrap().to_vec();
        let seq = 60_000 + (i as u16 - 6) * 3 + n;
        bytes[2..4].copy_from_slice(&seq.to_be_bytes());
        Bytes::from(bytes)
    };
    (0..3).for_each(|n| intake.handle_packet(now, live(6, n), Path::Live(0)));
    intake.stream_named(now, named("live/a", 7));
    intake.poll_nack().unwrap();
    feed(&mut intake, now, &bursts[0], Path::Repair);
    intake.gone(now, Ssrc(7), &[Seq::FIRST.plus(1)]);
    (0..3).for_each(|n| intake.handle_packet(now, live(7, n), Path::Live(0)));
    assert_eq!(intake.poll_nack(), None);
    assert_eq!(read(&hub, "live/a")[1..], tags[6..8]);
    // One that comes when the hunt is long over changes nothing either.
    intake.streams.get_mut(&Ssrc(7)).unwrap().header_hunt = None;
    feed(&mut intake, now, &bursts[0], Path::Repair);
    (0..3).for_each(|n| intake.handle_packet(now, live(8, n), Path::Live(0)));
    assert_eq!(intake.poll_nack(), None);
    assert_eq!(read(&hub, "live/a")[1..], tags[6..9]);
}

#[test]
fn the_hunt_for_headers_goes_on_until_there_are_some() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    feed(&mut intake, now, &bursts[6], Path::Live(0));
    intake.stream_named(now, named("live/a", 7));
    assert_eq!(intake.poll_nack().unwrap().seqs[0], Seq::FIRST);
    // No answer: media does not wait for ever, and it is asked again.
    intake.handle_timeout(now + MEDIA_WAITS);
    assert_eq!(intake.poll_nack().unwrap().seqs[0], Seq::FIRST);
    feed(&mut intake, now + MEDIA_WAITS, &bursts[0], Path::Repair);
    intake.handle_timeout(now + MEDIA_WAITS + HUNT_EVERY);
    assert_eq!(intake.poll_nack(), None);
    let headers = hub.streams()[0].headers();
    assert_eq!(headers.video.unwrap().body(), tags[0].body());
}

#[test]
fn a_stream_that_was_silent_for_long_comes_up_again() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (_, bursts) = bursts(7, 9);
    feed(&mut intake, now, &bursts[0], Path::Live(0));
    intake.stream_named(now, named("live/a", 7));
    let later = now + Duration::from_secs(11);
    intake.tick(later);
    assert!(hub.is_empty());
    feed(&mut intake, later, &bursts[1], Path::Live(0));
    assert_eq!(intake.unnamed(later, Duration::ZERO).collect::<Vec<_>>(), [Ssrc(7)]);
    intake.stream_named(later, named("live/a", 7));
    assert_eq!(hub.len(), 1);
}

#[test]
fn who_joins_over_a_long_path_waits_for_the_answers() {
    // Numbers that are asked for within 300 ms, where the path is said to take so long.
    let asked = |round_trip: Option<u64>| {
        let (mut intake, _) = intake();
        let now = Instant::now();
        if let Some(ms) = round_trip {
            let round_trip = Duration::from_millis(ms);
            intake.expect_round_trip(round_trip, round_trip / 8);
        }
        intake.stream_up(now, up("live/a", 7, Some(Seq::FIRST), Some(Seq::FIRST.plus(9))));
        let mut seqs = Vec::new();
        for ms in 0..300 {
            intake.handle_timeout(now + Duration::from_millis(ms));
            seqs.extend(std::iter::from_fn(|| intake.poll_nack()).flat_map(|nack| nack.seqs));
        }
        seqs.len()
    };
    // Each request is made twice, shortly after one another.
    assert!(asked(None) > asked(Some(400)), "{} {}", asked(None), asked(Some(400)));
    assert!((10..=20).contains(&asked(Some(400))), "{}", asked(Some(400)));
}

#[test]
fn parity_brings_back_what_was_lost_without_asking() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    let settings = fec::encoder::Settings::new(fec::Matrix::new(5, 1).unwrap());
    let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
    intake.stream_up(now, up("live/a", 7, None, None));
    intake.set_round_trip(now, Duration::from_millis(100), Duration::from_millis(1));
    let (mut number, mut lost) = (0, 0);
    for (i, burst) in bursts.iter().enumerate() {
        let at = now + Duration::from_millis(20 * i as u64);
        for packet in (0..burst.count()).filter_map(|n| burst.packet(n)) {
            let mut parity = Vec::new();
            encoder.push(at, &packet, &mut parity);
            number += 1;
            // The fourth of each row; the decoder begins with the first parity.
            match number > 5 && number % 5 == 4 {
                true => lost += 1,
                false => intake.handle_packet(at, packet, Path::Live(0)),
            }
            parity.into_iter().for_each(|datagram| intake.handle_parity(at, datagram));
        }
    }
    assert_eq!(read(&hub, "live/a")[1..], tags[6..]);
    let report = &intake.reports(1)[0];
    assert_eq!((lost, report.parity, report.received), (4, 4, number));
}

/// Nothing behind it has come that would show the loss.
#[test]
fn parity_brings_back_the_last_packet_of_a_row() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    let settings = fec::encoder::Settings::new(fec::Matrix::new(2, 1).unwrap());
    let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
    intake.stream_up(now, up("live/a", 7, None, None));
    let packets: Vec<_> =
        bursts.iter().flat_map(|b| (0..b.count()).filter_map(|n| b.packet(n))).collect();
    let last = packets.len() / 2 * 2 - 1;
    for (i, packet) in packets[..=last].iter().enumerate() {
        let mut parity = Vec::new();
        encoder.push(now, packet, &mut parity);
        if i != last {
            intake.handle_packet(now, packet.clone(), Path::Live(0));
        }
        parity.into_iter().for_each(|datagram| intake.handle_parity(now, datagram));
    }
    let before = read(&hub, "live/a").len();
    assert_eq!(intake.reports(10)[0].parity, 1);
    // It was late, not lost.
    intake.handle_packet(now, packets[last].clone(), Path::Live(0));
    assert_eq!(intake.reports(10)[0].duplicate, 1);
    assert_eq!(read(&hub, "live/a").len(), before);
    packets[last + 1..].iter().for_each(|packet| {
        intake.handle_packet(now, packet.clone(), Path::Live(0));
    });
    assert!(read(&hub, "live/a").ends_with(&tags[6..]));
}

#[test]
fn only_streams_that_wait_for_something_have_a_timer() {
    let (mut intake, _) = intake();
    let now = Instant::now();
    for ssrc in [7, 8] {
        intake.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
        let (_, bursts) = bursts(ssrc, 4);
        feed(&mut intake, now, &bursts[0], Path::Live(0));
        assert_eq!(intake.poll_timeout(), None);
        if ssrc == 8 {
            feed(&mut intake, now, &bursts[2], Path::Live(0));
        }
    }
    assert_eq!(intake.wakes.len(), 1);
    intake.handle_timeout(intake.poll_timeout().unwrap());
    let nacks: Vec<_> = std::iter::from_fn(|| intake.poll_nack()).collect();
    assert!(!nacks.is_empty() && nacks.iter().all(|nack| nack.ssrc == Ssrc(8)));
    assert_eq!(intake.wakes.len(), 1);
    feed(&mut intake, now, &bursts(8, 4).1[1], Path::Repair);
    // What was to be asked again is found to have come.
    intake.handle_timeout(intake.poll_timeout().unwrap());
    assert_eq!(intake.poll_timeout(), None);
    feed(&mut intake, now, &bursts(7, 4).1[3], Path::Live(0));
    intake.end(now, Ssrc(7), "test");
    assert!(intake.wakes.is_empty());
}

#[test]
fn streams_are_reported_in_turn() {
    let (mut intake, _) = intake();
    let now = Instant::now();
    for ssrc in 7..10 {
        intake.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
    }
    let told = |intake: &mut Streams| {
        let mut told: Vec<_> = intake.reports(2).iter().map(|report| report.ssrc).collect();
        told.extend(intake.reports(1).iter().map(|report| report.ssrc));
        told.sort_unstable();
        told
    };
    assert_eq!(told(&mut intake), [7, 8, 9]);
    assert_eq!(told(&mut intake), [7, 8, 9]);
    intake.end(now, Ssrc(8), "test");
    assert_eq!(intake.reports(9).len(), 2);
    assert_eq!(intake.report_turns.len(), 2);
}

#[test]
fn parity_that_is_none_or_nobodys_is_counted() {
    let (mut intake, _) = intake();
    let now = Instant::now();
    intake.handle_parity(now, Bytes::from_static(b"\x80\x6d nothing"));
    assert_eq!(intake.metrics.parity_malformed.get(), 1);
    let settings = fec::encoder::Settings::new(fec::Matrix::new(1, 1).unwrap());
    let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
    let mut parity = Vec::new();
    encoder.push_burst(now, &bursts(7, 1).1[0], &mut parity);
    parity.into_iter().for_each(|datagram| intake.handle_parity(now, datagram));
    assert_eq!(intake.metrics.parity_unknown.get(), 1);
    assert!(intake.unknown.is_empty());
}

#[test]
fn what_was_lost_before_the_cloud_told_of_the_stream_is_asked_for() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 4);
    // The header was lost on its way.
    feed(&mut intake, now, &bursts[1], Path::Live(0));
    intake.stream_up(now, up("live/a", 7, None, None));
    assert_eq!(intake.poll_nack().unwrap().seqs, [Seq::FIRST]);
    feed(&mut intake, now, &bursts[0], Path::Repair);
    assert_eq!(read(&hub, "live/a"), tags[..2]);
}

#[test]
fn a_stream_that_ends_waits_for_its_tail_and_then_leaves_nothing_behind() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (_, bursts) = bursts(7, 4);
    intake.stream_up(now, up("live/a", 7, None, None));
    bursts[..4].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
    intake.stream_end(now, Ssrc(7), Some(bursts[4].last_seq()));
    assert_eq!(hub.len(), 1, "its last tag is still missing");
    let wake = intake.poll_timeout().unwrap();
    intake.handle_timeout(wake);
    assert_eq!(intake.poll_nack().unwrap().seqs.len(), bursts[4].count());
    feed(&mut intake, now, &bursts[4], Path::Repair);
    assert!(hub.is_empty() && intake.streams.is_empty() && intake.by_key.is_empty());
    // A straggler does not bring it back.
    feed(&mut intake, now, &bursts[4], Path::Live(0));
    assert!(intake.unknown.is_empty());
}

#[test]
fn a_tail_that_never_comes_ends_the_stream_all_the_same() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    let (_, bursts) = bursts(7, 4);
    intake.stream_up(now, up("live/a", 7, None, None));
    feed(&mut intake, now, &bursts[0], Path::Live(0));
    intake.stream_end(now, Ssrc(7), Some(bursts[4].last_seq()));
    for _ in 0..1000 {
        let Some(wake) = intake.poll_timeout() else { break };
        intake.handle_timeout(wake);
    }
    assert!(hub.is_empty());
}

#[test]
fn a_newer_publication_takes_the_name_over() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    intake.stream_up(now, up("live/a", 7, None, None));
    intake.stream_up(now, up("live/a", 8, None, None));
    assert_eq!((hub.len(), intake.streams.len(), intake.by_key.len()), (1, 1, 1));
    let (tags, bursts) = bursts(8, 2);
    bursts.iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
    assert_eq!(read(&hub, "live/a"), tags);
    // The old one's end changes nothing.
    intake.stream_end(now, Ssrc(7), None);
    assert_eq!(hub.len(), 1);
}

#[test]
fn after_a_reconnect_a_stream_that_is_not_named_again_ends() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    intake.set_told(now, true);
    intake.stream_up(now, up("live/a", 7, None, None));
    intake.stream_up(now, up("live/b", 8, None, None));
    intake.set_told(now, false);
    let later = now + Duration::from_secs(2);
    intake.set_told(later, true);
    intake.stream_up(later, up("live/b", 8, None, None));
    intake.tick(later);
    assert_eq!(hub.len(), 2);
    intake.tick(later + Duration::from_secs(4));
    assert!(hub.stream("live/a").is_none() && hub.stream("live/b").is_some());
}

#[test]
fn without_word_from_the_cloud_silence_ends_a_stream() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    intake.stream_up(now, up("live/a", 7, None, None));
    intake.tick(now + Duration::from_secs(9));
    assert_eq!(hub.len(), 1);
    assert!(intake.any_silent(now + Duration::from_secs(9), Duration::from_secs(3)));
    intake.tick(now + Duration::from_secs(11));
    assert!(hub.is_empty());
}

#[test]
fn strangers_cannot_make_the_edge_hold_much() {
    let (mut intake, hub) = intake();
    let now = Instant::now();
    for ssrc in 0..1000 {
        let (_, bursts) = bursts(ssrc, 1);
        for _ in 0..10 {
            bursts.iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
        }
    }
    assert_eq!(intake.unknown.len(), MAX_UNKNOWN);
    assert!(intake.metrics.unknown_dropped.get() > 0);
    intake.tick(now + UNKNOWN_KEPT);
    assert!(intake.unknown.is_empty());
    for ssrc in 0..10 {
        intake.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
    }
    assert_eq!(hub.len(), 3, "max_streams");
    for garbage in [&b""[..], b"0001", &[0x80; 11], &[0x80, 100, 1]] {
        intake.handle_packet(now, Bytes::copy_from_slice(garbage), Path::Live(0));
    }
    assert_eq!(intake.metrics.malformed.get(), 4);
}
