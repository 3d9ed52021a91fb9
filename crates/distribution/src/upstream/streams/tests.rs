use super::{
    header_recovery::{HOLD_TIME, RETRY_INTERVAL},
    unnamed_packets::{MAX_UNNAMED, UNNAMED_HELD_FOR},
    *,
};
use crate::upstream::livestat::LiveStream;
use downpour_hub::{LogLimits, ReadOutcome};
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::{
    control::StreamInfo,
    fec,
    receiver::Settings as ReceiverSettings,
    rtp::{Burst, Packetizer},
};

mod go_cloud;

fn table() -> (Streams, Hub) {
    table_with(Duration::ZERO)
}

fn table_with(hold: Duration) -> (Streams, Hub) {
    let hub = Hub::new(LogLimits { max_bytes: 1 << 22, max_age: 60_000 });
    let metrics = ReceiveMetrics::register(&prometheus::Registry::new()).unwrap();
    let settings = Settings {
        receiver: ReceiverSettings::default(),
        silence: Duration::from_secs(10),
        hold,
        max_streams: 3,
        fetches_headers: false,
    };
    (Streams::new(settings, hub.clone(), metrics), hub)
}

fn up(key: &str, ssrc: u32, gop_start: Option<Seq>, newest: Option<Seq>) -> StreamInfo {
    StreamInfo {
        key: key.parse().unwrap(),
        ssrc: Ssrc(ssrc),
        publication: None,
        start_unix_ms: 0,
        headers: Headers::default(),
        gop_start,
        newest,
    }
}

fn named(key: &str, ssrc: u32) -> LiveStream {
    LiveStream { key: key.parse().unwrap(), ssrc: Ssrc(ssrc), start_unix_ms: 0, rtmp_port: None }
}

/// A sequence header, then GOPs of five frames.
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

fn feed(streams: &mut Streams, now: Instant, burst: &Burst, path: Path) {
    for i in 0..burst.count() {
        streams.handle_packet(now, burst.packet(i).unwrap(), path);
    }
}

fn read(hub: &Hub, key: &str) -> Vec<Tag> {
    let mut out = Vec::new();
    let mut reader = hub.subscribe(key).unwrap();
    while let ReadOutcome::Read(_) = reader.try_read(&mut out, usize::MAX) {}
    out
}

#[test]
fn packets_that_arrive_before_the_announcement_are_kept() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 4);
    assert!(!streams.saw_unknown_ssrc());
    feed(&mut streams, now, &bursts[0], Path::Live(0));
    assert!(streams.saw_unknown_ssrc());
    assert!(!streams.saw_unknown_ssrc(), "reported once per SSRC");
    bursts[1..3].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    assert!(!streams.saw_unknown_ssrc(), "reported once per SSRC");
    assert!(hub.is_empty());
    assert_eq!(streams.unnamed(now, Duration::ZERO).collect::<Vec<_>>(), [Ssrc(7)]);
    streams.stream_named(now, named("live/a", 7));
    bursts[3..].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    assert_eq!(read(&hub, "live/a"), tags);
    assert_eq!(streams.poll_nack(), None);
}

#[test]
fn late_joiner_requests_the_newest_gop() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    let mut info = up("live/a", 7, Some(bursts[6].first_seq()), Some(bursts[8].last_seq()));
    assert!(info.headers.learn(&tags[0]));
    streams.stream_up(now, info);
    let nack = streams.poll_nack().unwrap();
    assert_eq!(nack.seqs.first(), Some(&bursts[6].first_seq()));
    assert_eq!(nack.seqs.last(), Some(&bursts[8].last_seq()));
    bursts[6..9].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Repair));
    feed(&mut streams, now, &bursts[9], Path::Live(0));
    let read = read(&hub, "live/a");
    assert_eq!(read[0].body(), tags[0].body());
    assert_eq!(read[1..], tags[6..]);
}

#[test]
fn late_joiner_of_a_v0_cloud_recovers_headers_from_the_first_packets() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    feed(&mut streams, now, &bursts[6], Path::Live(0));
    streams.stream_named(now, named("live/a", 7));
    let nack = streams.poll_nack().unwrap();
    assert_eq!(nack.ssrc, Ssrc(7));
    assert_eq!(nack.seqs[0], Seq::FIRST);
    feed(&mut streams, now, &bursts[0], Path::Repair);
    feed(&mut streams, now, &bursts[7], Path::Live(0));
    streams.handle_gone(now, Ssrc(7), &[Seq::FIRST.plus(1)]);
    let read = read(&hub, "live/a");
    assert_eq!(read[0].body(), tags[0].body());
    assert_eq!(read[1..], tags[6..8]);
}

#[test]
fn recovered_first_packets_do_not_advance_the_receiver() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    // Renumbered from 60,000: the publication's first packet would be 5,000 packets ahead.
    let live = |i: usize, n: u16| {
        let mut bytes = bursts[i].packet(usize::from(n)).unwrap().to_vec();
        let seq = 60_000 + (i as u16 - 6) * 3 + n;
        bytes[2..4].copy_from_slice(&seq.to_be_bytes());
        Bytes::from(bytes)
    };
    (0..3).for_each(|n| streams.handle_packet(now, live(6, n), Path::Live(0)));
    streams.stream_named(now, named("live/a", 7));
    streams.poll_nack().unwrap();
    feed(&mut streams, now, &bursts[0], Path::Repair);
    streams.handle_gone(now, Ssrc(7), &[Seq::FIRST.plus(1)]);
    (0..3).for_each(|n| streams.handle_packet(now, live(7, n), Path::Live(0)));
    assert_eq!(streams.poll_nack(), None);
    assert_eq!(read(&hub, "live/a")[1..], tags[6..8]);
    // Nor does one that arrives after the recovery has ended.
    streams.streams.get_mut(&Ssrc(7)).unwrap().stop_header_recovery();
    feed(&mut streams, now, &bursts[0], Path::Repair);
    (0..3).for_each(|n| streams.handle_packet(now, live(8, n), Path::Live(0)));
    assert_eq!(streams.poll_nack(), None);
    assert_eq!(read(&hub, "live/a")[1..], tags[6..9]);
}

#[test]
fn header_recovery_retries_until_a_header_arrives() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    feed(&mut streams, now, &bursts[6], Path::Live(0));
    streams.stream_named(now, named("live/a", 7));
    assert_eq!(streams.poll_nack().unwrap().seqs[0], Seq::FIRST);
    // No answer: media is released, and the request is repeated.
    streams.handle_timeout(now + HOLD_TIME);
    assert_eq!(streams.poll_nack().unwrap().seqs[0], Seq::FIRST);
    feed(&mut streams, now + HOLD_TIME, &bursts[0], Path::Repair);
    streams.handle_timeout(now + HOLD_TIME + RETRY_INTERVAL);
    assert_eq!(streams.poll_nack(), None);
    let headers = hub.streams()[0].headers();
    assert_eq!(headers.video().unwrap().body(), tags[0].body());
}

#[test]
fn stream_that_ended_by_silence_can_start_again() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (_, bursts) = bursts(7, 9);
    feed(&mut streams, now, &bursts[0], Path::Live(0));
    streams.stream_named(now, named("live/a", 7));
    let later = now + Duration::from_secs(11);
    streams.tick(later);
    assert!(hub.is_empty());
    feed(&mut streams, later, &bursts[1], Path::Live(0));
    assert_eq!(streams.unnamed(later, Duration::ZERO).collect::<Vec<_>>(), [Ssrc(7)]);
    streams.stream_named(later, named("live/a", 7));
    assert_eq!(hub.len(), 1);
}

#[test]
fn join_over_a_long_path_does_not_repeat_requests_early() {
    // Sequence numbers requested within 300 ms, with this estimate of the round trip in ms.
    let asked = |round_trip: Option<u64>| {
        let (mut streams, _) = table();
        let now = Instant::now();
        if let Some(ms) = round_trip {
            let round_trip = Duration::from_millis(ms);
            streams.set_initial_round_trip(round_trip, round_trip / 8);
        }
        streams.stream_up(now, up("live/a", 7, Some(Seq::FIRST), Some(Seq::FIRST.plus(9))));
        let mut seqs = Vec::new();
        for ms in 0..300 {
            streams.handle_timeout(now + Duration::from_millis(ms));
            seqs.extend(std::iter::from_fn(|| streams.poll_nack()).flat_map(|nack| nack.seqs));
        }
        seqs.len()
    };
    // Each request is repeated once after a short time.
    assert!(asked(None) > asked(Some(400)), "{} {}", asked(None), asked(Some(400)));
    assert!((10..=20).contains(&asked(Some(400))), "{}", asked(Some(400)));
}

#[test]
fn parity_recovers_losses_without_a_request() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    let settings = fec::encoder::Settings::new(fec::Matrix::new(5, 1).unwrap());
    let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
    streams.stream_up(now, up("live/a", 7, None, None));
    streams.set_round_trip(now, Duration::from_millis(100), Duration::from_millis(1));
    let (mut number, mut lost) = (0, 0);
    for (i, burst) in bursts.iter().enumerate() {
        let at = now + Duration::from_millis(20 * i as u64);
        for packet in (0..burst.count()).filter_map(|n| burst.packet(n)) {
            let mut parity = Vec::new();
            encoder.push(at, &packet, &mut parity);
            number += 1;
            // Lose the fourth packet of each row but the first: the decoder starts with the first
            // parity packet.
            match number > 5 && number % 5 == 4 {
                true => lost += 1,
                false => streams.handle_packet(at, packet, Path::Live(0)),
            }
            parity.into_iter().for_each(|datagram| streams.handle_parity(at, datagram));
        }
    }
    assert_eq!(read(&hub, "live/a")[1..], tags[6..]);
    let report = &streams.reports(1)[0];
    assert_eq!(lost, 4);
    assert_eq!(report.parity, lost);
    assert_eq!(report.received, number);
}

/// No later packet has revealed the loss yet.
#[test]
fn parity_recovers_the_last_packet_of_a_row() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    let settings = fec::encoder::Settings::new(fec::Matrix::new(2, 1).unwrap());
    let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
    streams.stream_up(now, up("live/a", 7, None, None));
    let packets: Vec<_> =
        bursts.iter().flat_map(|b| (0..b.count()).filter_map(|n| b.packet(n))).collect();
    let last = packets.len() / 2 * 2 - 1;
    for (i, packet) in packets[..=last].iter().enumerate() {
        let mut parity = Vec::new();
        encoder.push(now, packet, &mut parity);
        if i != last {
            streams.handle_packet(now, packet.clone(), Path::Live(0));
        }
        parity.into_iter().for_each(|datagram| streams.handle_parity(now, datagram));
    }
    let before = read(&hub, "live/a").len();
    assert_eq!(streams.reports(10)[0].parity, 1);
    // The live packet arrives late, as a duplicate.
    streams.handle_packet(now, packets[last].clone(), Path::Live(0));
    assert_eq!(streams.reports(10)[0].duplicate, 1);
    assert_eq!(read(&hub, "live/a").len(), before);
    packets[last + 1..].iter().for_each(|packet| {
        streams.handle_packet(now, packet.clone(), Path::Live(0));
    });
    assert!(read(&hub, "live/a").ends_with(&tags[6..]));
}

#[test]
fn only_streams_with_missing_packets_have_a_timer() {
    let (mut streams, _) = table();
    let now = Instant::now();
    for ssrc in [7, 8] {
        streams.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
        let (_, bursts) = bursts(ssrc, 4);
        feed(&mut streams, now, &bursts[0], Path::Live(0));
        assert_eq!(streams.poll_timeout(), None);
        if ssrc == 8 {
            feed(&mut streams, now, &bursts[2], Path::Live(0));
        }
    }
    assert_eq!(streams.wakes.len(), 1);
    streams.handle_timeout(streams.poll_timeout().unwrap());
    let nacks: Vec<_> = std::iter::from_fn(|| streams.poll_nack()).collect();
    assert!(!nacks.is_empty() && nacks.iter().all(|nack| nack.ssrc == Ssrc(8)));
    assert_eq!(streams.wakes.len(), 1);
    feed(&mut streams, now, &bursts(8, 4).1[1], Path::Repair);
    // The repeat that was due finds that the packets have arrived.
    streams.handle_timeout(streams.poll_timeout().unwrap());
    assert_eq!(streams.poll_timeout(), None);
    feed(&mut streams, now, &bursts(7, 4).1[3], Path::Live(0));
    streams.end(now, Ssrc(7), "test", false);
    assert!(streams.wakes.is_empty());
}

#[test]
fn streams_are_reported_in_turn() {
    let (mut streams, _) = table();
    let now = Instant::now();
    for ssrc in 7..10 {
        streams.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
    }
    let reported = |streams: &mut Streams| {
        let mut ssrcs: Vec<_> = streams.reports(2).iter().map(|report| report.ssrc).collect();
        ssrcs.extend(streams.reports(1).iter().map(|report| report.ssrc));
        ssrcs.sort_unstable();
        ssrcs
    };
    assert_eq!(reported(&mut streams), [7, 8, 9]);
    assert_eq!(reported(&mut streams), [7, 8, 9]);
    streams.end(now, Ssrc(8), "test", false);
    assert_eq!(streams.reports(9).len(), 2);
    assert_eq!(streams.report_turns.len(), 2);
}

#[test]
fn malformed_and_unknown_parity_is_counted() {
    let (mut streams, _) = table();
    let now = Instant::now();
    streams.handle_parity(now, Bytes::from_static(b"\x80\x6d nothing"));
    assert_eq!(streams.metrics.parity_malformed.get(), 1);
    let settings = fec::encoder::Settings::new(fec::Matrix::new(1, 1).unwrap());
    let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
    let mut parity = Vec::new();
    encoder.push_burst(now, &bursts(7, 1).1[0], &mut parity);
    parity.into_iter().for_each(|datagram| streams.handle_parity(now, datagram));
    assert_eq!(streams.metrics.parity_unknown.get(), 1);
    assert_eq!(streams.unnamed.len(), 0);
}

#[test]
fn losses_before_the_announcement_are_requested() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 4);
    // The sequence header is lost.
    feed(&mut streams, now, &bursts[1], Path::Live(0));
    streams.stream_up(now, up("live/a", 7, None, None));
    assert_eq!(streams.poll_nack().unwrap().seqs, [Seq::FIRST]);
    feed(&mut streams, now, &bursts[0], Path::Repair);
    assert_eq!(read(&hub, "live/a"), tags[..2]);
}

#[test]
fn ending_stream_waits_for_its_last_packets_and_leaves_nothing_behind() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (_, bursts) = bursts(7, 4);
    streams.stream_up(now, up("live/a", 7, None, None));
    bursts[..4].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    streams.stream_end(now, Ssrc(7), Some(bursts[4].last_seq()));
    assert_eq!(hub.len(), 1, "its last tag is missing");
    let wake = streams.poll_timeout().unwrap();
    streams.handle_timeout(wake);
    assert_eq!(streams.poll_nack().unwrap().seqs.len(), bursts[4].count());
    feed(&mut streams, now, &bursts[4], Path::Repair);
    assert!(hub.is_empty() && streams.streams.is_empty() && streams.by_key.is_empty());
    // A late packet does not start it again.
    feed(&mut streams, now, &bursts[4], Path::Live(0));
    assert_eq!(streams.unnamed.len(), 0);
}

#[test]
fn ending_stream_ends_without_its_last_packets_after_a_deadline() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (_, bursts) = bursts(7, 4);
    streams.stream_up(now, up("live/a", 7, None, None));
    feed(&mut streams, now, &bursts[0], Path::Live(0));
    streams.stream_end(now, Ssrc(7), Some(bursts[4].last_seq()));
    for _ in 0..1000 {
        let Some(wake) = streams.poll_timeout() else { break };
        streams.handle_timeout(wake);
    }
    assert!(hub.is_empty());
}

#[test]
fn newer_publication_takes_over_the_key() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    streams.stream_up(now, up("live/a", 7, None, None));
    streams.stream_up(now, up("live/a", 8, None, None));
    assert_eq!(hub.len(), 1);
    assert_eq!(streams.streams.len(), 1);
    assert_eq!(streams.by_key.len(), 1);
    let (tags, bursts) = bursts(8, 2);
    bursts.iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    assert_eq!(read(&hub, "live/a"), tags);
    // The end of the old publication changes nothing.
    streams.stream_end(now, Ssrc(7), None);
    assert_eq!(hub.len(), 1);
}

#[test]
fn stream_not_announced_after_a_reconnect_ends() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    streams.set_announced(now, true);
    streams.stream_up(now, up("live/a", 7, None, None));
    streams.stream_up(now, up("live/b", 8, None, None));
    streams.set_announced(now, false);
    let later = now + Duration::from_secs(2);
    streams.set_announced(later, true);
    streams.stream_up(later, up("live/b", 8, None, None));
    streams.tick(later);
    assert_eq!(hub.len(), 2);
    streams.tick(later + Duration::from_secs(4));
    assert!(hub.stream("live/a").is_none() && hub.stream("live/b").is_some());
}

#[test]
fn silence_ends_a_stream_without_a_connection() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    streams.stream_up(now, up("live/a", 7, None, None));
    streams.tick(now + Duration::from_secs(9));
    assert_eq!(hub.len(), 1);
    assert!(streams.any_silent(now + Duration::from_secs(9), Duration::from_secs(3)));
    streams.tick(now + Duration::from_secs(11));
    assert!(hub.is_empty());
}

#[test]
fn packets_of_unknown_ssrcs_are_bounded() {
    let (mut streams, _) = table();
    let now = Instant::now();
    for ssrc in 0..1000 {
        let (_, bursts) = bursts(ssrc, 1);
        for _ in 0..10 {
            bursts.iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
        }
    }
    assert_eq!(streams.unnamed.len(), MAX_UNNAMED);
    assert!(streams.metrics.unknown_dropped.get() > 0);
    streams.tick(now + UNNAMED_HELD_FOR);
    assert_eq!(streams.unnamed.len(), 0);
}

#[test]
fn streams_above_max_streams_are_refused() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    for ssrc in 0..10 {
        streams.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
    }
    assert_eq!(hub.len(), 3);
    assert_eq!(streams.metrics.refused_streams.get(), 7);
}

#[test]
fn malformed_packets_are_counted() {
    let (mut streams, _) = table();
    let now = Instant::now();
    for garbage in [&b""[..], b"0001", &[0x80; 11], &[0x80, 100, 1]] {
        streams.handle_packet(now, Bytes::copy_from_slice(garbage), Path::Live(0));
    }
    assert_eq!(streams.metrics.malformed.get(), 4);
}

#[test]
fn script_data_takes_its_place_among_the_media() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 4);
    let cue = |timestamp| Tag::new(TagKind::Script, timestamp, b"\x02\0\x01c\x05").unwrap();
    streams.stream_data(now, Ssrc(7), cue(0));
    streams.stream_up(now, up("live/a", 7, None, None));
    bursts[..3].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    // One of the past, one of the next frame, one far ahead.
    for timestamp in [20, 80, 9000] {
        streams.stream_data(now, Ssrc(7), cue(timestamp));
    }
    bursts[3..].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    let mut expected = tags[..3].to_vec();
    expected.extend([cue(20), cue(80)]);
    expected.extend_from_slice(&tags[3..]);
    assert_eq!(read(&hub, "live/a"), expected);
    let due = streams.poll_timeout().unwrap();
    streams.handle_timeout(due);
    expected.push(cue(9000));
    assert_eq!(read(&hub, "live/a"), expected);
}

#[test]
fn viewers_stay_while_the_cloud_restarts() {
    let hold = Duration::from_secs(5);
    // The cloud says that it shuts down, is silent, or another publication takes the key.
    for cause in ["closing", "silent", "replaced"] {
        let (mut streams, hub) = table_with(hold);
        let now = Instant::now();
        let (_, before) = bursts(7, 5);
        streams.stream_up(now, up("live/a", 7, None, None));
        before.iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
        let (mut reader, mut read) = (hub.subscribe("live/a").unwrap(), Vec::new());
        while let ReadOutcome::Read(_) = reader.try_read(&mut read, usize::MAX) {}
        let later = match cause {
            "closing" => {
                streams.set_announced(now, true);
                streams.cloud_closes();
                streams.stream_end(now, Ssrc(7), Some(before[5].last_seq()));
                now
            }
            "silent" => now + Duration::from_secs(11),
            _ => now,
        };
        streams.set_announced(later, false);
        streams.tick(later);
        assert_eq!(streams.streams.len(), usize::from(cause == "replaced"));
        let (tags, after) = bursts(8, 5);
        let mut info = up("live/a", 8, Some(after[1].first_seq()), None);
        info.headers = [tags[0].clone()].into_iter().collect();
        streams.set_announced(later, true);
        streams.stream_up(later, info);
        after[1..].iter().for_each(|burst| feed(&mut streams, later, burst, Path::Live(0)));
        while let ReadOutcome::Read(_) = reader.try_read(&mut read, usize::MAX) {}
        let frames: Vec<_> = read.iter().filter(|tag| !tag.is_header()).collect();
        let times: Vec<_> = frames.iter().map(|tag| tag.timestamp()).collect();
        assert_eq!(times, [0, 40, 80, 120, 160, 200, 240, 280, 320, 360], "{cause}");
        // The cloud says that the encoder left: the stream is not held.
        streams.stream_end(later, Ssrc(8), Some(after[5].last_seq()));
        assert!(hub.is_empty(), "{cause}");
    }
}

#[test]
fn a_held_stream_ends_if_the_cloud_stays_away() {
    let hold = Duration::from_secs(5);
    let (mut streams, hub) = table_with(hold);
    let now = Instant::now();
    streams.stream_up(now, up("live/a", 7, None, None));
    let gone = now + Duration::from_secs(11);
    streams.tick(gone);
    assert!(streams.streams.is_empty());
    assert_eq!(hub.len(), 1);
    streams.tick(gone + hold - Duration::from_millis(1));
    assert_eq!(hub.len(), 1);
    streams.tick(gone + hold);
    assert!(hub.is_empty());
}
