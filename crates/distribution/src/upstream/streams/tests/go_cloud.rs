//! Clouds that announce nothing, numbering, and time on a starved machine.

use super::{super::header_recovery::FETCH_TIME, *};

#[test]
fn headers_that_the_cloud_no_longer_holds_are_fetched_while_media_waits() {
    let (mut streams, hub) = table();
    streams.settings.fetches_headers = true;
    let now = Instant::now();
    let (tags, bursts) = bursts(7, 9);
    feed(&mut streams, now, &bursts[6], Path::Live(0));
    streams.stream_named(now, named("live/a", 7));
    assert_eq!(streams.poll_header_fetch(), None, "the cloud may hold them");
    streams.handle_not_held(now, Ssrc(7), &[Seq::FIRST]);
    let (ssrc, key) = streams.poll_header_fetch().unwrap();
    assert_eq!((ssrc, key.as_str()), (Ssrc(7), "live/a"));
    assert_eq!(streams.poll_header_fetch(), None, "once");
    assert!(read(&hub, "live/a").is_empty(), "media waits for the headers");
    streams.headers_fetched(now, ssrc, Ok(vec![tags[0].clone()]));
    let read = read(&hub, "live/a");
    assert_eq!(read[0].body(), tags[0].body());
    assert_eq!(read[1..], tags[6..7]);
}

#[test]
fn media_plays_without_headers_that_cannot_be_fetched() {
    for silent in [false, true] {
        let (mut streams, hub) = table();
        streams.settings.fetches_headers = true;
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 9);
        feed(&mut streams, now, &bursts[6], Path::Live(0));
        streams.stream_named(now, named("live/a", 7));
        streams.handle_timeout(now + HOLD_TIME);
        assert!(streams.poll_header_fetch().is_some());
        assert!(read(&hub, "live/a").is_empty());
        match silent {
            true => streams.handle_timeout(now + HOLD_TIME + FETCH_TIME),
            false => streams.headers_fetched(now, Ssrc(7), Err("refused".into())),
        }
        assert_eq!(read(&hub, "live/a"), tags[6..7]);
    }
}

#[test]
fn restarted_go_cloud_is_another_publication_whatever_its_numbers() {
    // Packets that the first publication had, and the silence before the second.
    for (packets, silent_ms) in [(3, 400), (40, 1), (400, 1000)] {
        let (mut streams, hub) = table();
        let mut now = Instant::now();
        let (_, first) = bursts(7, packets);
        feed(&mut streams, now, &first[0], Path::Live(0));
        streams.stream_named(now, named("live/a", 7));
        for burst in &first[1..] {
            now += Duration::from_millis(40);
            feed(&mut streams, now, burst, Path::Live(0));
        }
        now += Duration::from_millis(silent_ms);
        let (tags, second) = bursts(7, 4);
        feed(&mut streams, now, &second[0], Path::Live(0));
        assert!(hub.is_empty(), "{packets}: what was live is over");
        assert!(streams.saw_unknown_ssrc(), "its name is looked up at once");
        // The same SSRC may be another stream now.
        streams.stream_named(now, named("live/b", 7));
        second[1..].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
        assert_eq!(read(&hub, "live/b"), tags, "{packets}");
        assert_eq!(streams.metrics.restarts.get(), 1);
    }
}

#[test]
fn numbers_that_pass_the_first_one_again_are_no_restart() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    streams.stream_named(now, named("live/a", 7));
    // 60 packets on both sides of the wrap, in media time that goes on; every third is late.
    let frame = |n: u16| {
        let tag = Tag::new(TagKind::Video, 1_000_000 + u32::from(n) * 40, &[0x27, 1, 0, 0, 0, 9]);
        let mut bytes =
            Packetizer::new(Ssrc(7), 1120).packetize(&tag.unwrap()).packet(0).unwrap().to_vec();
        bytes[2..4].copy_from_slice(&64970u16.wrapping_add(n).to_be_bytes());
        Bytes::from(bytes)
    };
    let order = (0..60).step_by(3).flat_map(|n| [n + 1, n + 2, n]);
    order.for_each(|n| streams.handle_packet(now, frame(n), Path::Live(0)));
    assert_eq!(streams.metrics.restarts.get(), 0);
    assert_eq!(hub.len(), 1);
}

/// The numbering of an announced publication is what the cloud says.
#[test]
fn announced_publication_never_restarts_and_time_never_runs_back() {
    let (mut streams, hub) = table();
    let mut now = Instant::now();
    streams.stream_up(now, up("live/a", 7, None, None));
    let (tags, bursts) = bursts(7, 400);
    bursts.iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    // A path that was held up brings old packets, in perfect order and for seconds.
    for burst in &bursts[..300] {
        now += Duration::from_millis(40);
        feed(&mut streams, now, burst, Path::Live(0));
    }
    let packets = |bursts: &[Burst]| bursts.iter().map(Burst::count).sum::<usize>() as u64;
    let received = streams.reports(1)[0].received;
    assert_eq!(received, packets(&bursts) + packets(&bursts[..300]));
    assert_eq!(read(&hub, "live/a").last(), tags.last());
    assert_eq!(streams.metrics.restarts.get(), 0);
}

#[test]
fn announced_publication_goes_on_after_an_interruption_longer_than_the_window() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    streams.stream_up(now, up("live/a", 7, None, None));
    let (_, bursts) = bursts(7, 4);
    bursts[..2].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    let later = |n: u16| {
        let first = if n == 3 { 0x17 } else { 0x27 };
        let tag = Tag::new(TagKind::Video, 60_000 + u32::from(n), &[first, 1, 0, 0, 0, 9]).unwrap();
        let mut bytes = Packetizer::new(Ssrc(7), 1120).packetize(&tag).packet(0).unwrap().to_vec();
        bytes[2..4].copy_from_slice(&(30_000 + n).to_be_bytes());
        Bytes::from(bytes)
    };
    (0..3).for_each(|n| streams.handle_packet(now, later(n), Path::Live(0)));
    assert_eq!(read(&hub, "live/a").len(), 2, "numbers alone are no proof");
    streams.handle_heartbeats(now, &[Heartbeat { ssrc: Ssrc(7), last: Seq(30_003) }]);
    (3..6).for_each(|n| streams.handle_packet(now, later(n), Path::Live(0)));
    let times: Vec<_> = read(&hub, "live/a").iter().map(Tag::timestamp).collect();
    assert_eq!(times[1..], [60_003, 60_004, 60_005]);
    assert_eq!(hub.len(), 1);
}

#[test]
fn deadlines_count_only_up_to_the_time_at_which_all_that_arrived_was_read() {
    let (mut streams, hub) = table();
    let now = Instant::now();
    streams.stream_up(now, up("live/a", 7, None, None));
    let (tags, bursts) = bursts(7, 4);
    feed(&mut streams, now, &bursts[0], Path::Live(0));
    // The control thread runs, and learns what was sent; the receiver thread does not.
    let last = bursts[3].last_seq();
    streams.handle_heartbeats(now, &[Heartbeat { ssrc: Ssrc(7), last }]);
    let late = now + Duration::from_secs(5);
    for ms in 0..5000 {
        streams.handle_timeout_until(now + Duration::from_millis(ms), now);
    }
    assert!(streams.poll_timeout().unwrap() > now + Duration::from_millis(4999), "no busy loop");
    streams.tick(late);
    // Now it is scheduled, and what lay in its socket is not lost.
    bursts[1..4].iter().for_each(|burst| feed(&mut streams, late, burst, Path::Live(0)));
    streams.handle_timeout(late);
    assert_eq!(read(&hub, "live/a"), tags[..4]);
    assert_eq!(streams.reports(1)[0].given_up, 0);
    // What has not come by a time up to which everything was read is lost.
    let last = bursts[4].last_seq();
    streams.handle_heartbeats(late, &[Heartbeat { ssrc: Ssrc(7), last }]);
    streams.handle_timeout_until(late + Duration::from_secs(1), late + Duration::from_secs(1));
    assert_eq!(streams.reports(1)[0].given_up, bursts[4].count() as u64);
}

#[test]
fn headers_that_are_sent_again_are_left_out_unless_they_are_news() {
    let now = Instant::now();
    let (mut packetizer, tags) = (Packetizer::new(Ssrc(7), 1120), bursts(7, 2).0);
    let header = tags[0].with_timestamp(tags[1].timestamp());
    let packets: Vec<_> = [&tags[0], &tags[1], &tags[2]]
        .map(|tag| packetizer.packetize(tag))
        .into_iter()
        .chain([packetizer.packetize_again(&header), packetizer.packetize(&tags[1])])
        .collect();
    let (mut streams, hub) = table();
    streams.stream_up(now, up("live/a", 7, None, None));
    packets.iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    let read_all = read(&hub, "live/a");
    assert_eq!(read_all.iter().filter(|tag| tag.is_sequence_header()).count(), 1);
    // Who joined without headers takes them.
    let (mut streams, hub) = table();
    streams.stream_up(now, up("live/a", 7, Some(packets[2].first_seq()), None));
    packets[2..].iter().for_each(|burst| feed(&mut streams, now, burst, Path::Live(0)));
    assert_eq!(hub.streams()[0].headers().video().unwrap().body(), header.body());
}
