//! What the receiver does, step by step and in virtual time.

use std::time::{Duration, Instant};

use downpour_media::flv::{Tag, TagKind};
use downpour_netem::{Blackout, LinkSettings};
use downpour_repair::{
    receiver::{Event, GRACE, Path, Receiver, Settings},
    rtp::{Packet, Packetizer, Seq, Ssrc},
};

use crate::sim::{Run, link, lossy};
use proptest::prelude::*;

#[test]
fn without_loss_nothing_waits_and_nothing_is_asked() {
    let one_way = Duration::from_millis(30);
    let out = Run::field(&link(one_way), Duration::from_millis(500), 2000, 1).play();
    assert_eq!((out.lost, out.stats.requests), (0, 0));
    assert!(out.delays.iter().all(|delay| *delay == one_way));
}

#[test]
fn a_lost_packet_costs_about_one_round_trip() {
    let link = lossy(Duration::from_millis(50), 0.05);
    let out = Run::field(&link, Duration::from_millis(600), 10_000, 2).play();
    assert_eq!(out.lost, 0);
    // Half of all packets are there when they are due, and 99 % within a round trip and a bit.
    let within = |bounds: usize| out.stats.delays.counts[..bounds].iter().sum::<u64>() as f64;
    assert!(within(1) / out.sent as f64 > 0.9);
    assert!(within(11) / out.sent as f64 > 0.995, "within 125 ms: {:?}", out.stats.delays);
    // In order, nearly every packet waits for one of the fifty in a thousand that are lost.
    let mut delays = out.delays;
    delays.sort_unstable();
    let added = |share: f64| delays[(delays.len() as f64 * share) as usize] - link.delay;
    assert!(added(0.5) <= Duration::from_millis(105), "median adds {:?}", added(0.5));
    assert!(added(0.99) <= Duration::from_millis(215), "p99 adds {:?}", added(0.99));
}

#[test]
fn plain_reordering_is_learned_and_not_asked_about() {
    let link = LinkSettings { reorder: 0.1, ..link(Duration::from_millis(50)) };
    let out = Run::field(&link, Duration::from_millis(500), 5000, 3).play();
    assert_eq!(out.lost, 0);
    assert!(out.stats.reordered > 400, "{:?}", out.stats);
    assert!(out.stats.asked < out.stats.reordered / 5, "{:?}", out.stats);
}

/// A path that is cut for two seconds misses two thousand packets at once: what can come in time
/// comes, and is not asked for over and over.
#[test]
fn after_a_long_cut_packets_are_not_asked_for_faster_than_they_come() {
    let cut = Blackout {
        start: Duration::from_millis(500),
        length: Duration::from_millis(1900),
        period: None,
    };
    let line = LinkSettings {
        blackouts: vec![cut],
        rate_bps: Some(16_000_000),
        queue_bytes: 4 << 20,
        ..link(Duration::from_millis(50))
    };
    let run = Run {
        live: vec![LinkSettings { rate_bps: None, ..line.clone() }],
        down: line.clone(),
        ..Run::field(&link(Duration::from_millis(50)), Duration::from_secs(2), 5000, 4)
    };
    let out = run.play();
    // But for the one that a heartbeat told of as the cut began: its time is up when it ends.
    assert!(out.lost <= 1, "{:?}", out.stats);
    assert!(out.stats.duplicate < 200, "{:?}", out.stats);
}

/// RTP by satellite, the way back on the ground: word of packets is there long before they are.
#[test]
fn packets_that_lag_behind_word_of_them_are_waited_for() {
    let run = Run {
        live: vec![lossy(Duration::from_millis(310), 0.02)],
        ..Run::field(&link(Duration::from_millis(10)), Duration::from_millis(500), 20_000, 6)
    };
    let out = run.play();
    assert_eq!((out.lost, out.restarts), (0, 0), "{:?}", out.stats);
    // The first second's are asked for before it is known.
    let asked = out.stats.asked as f64 / out.sent as f64;
    assert!((0.02..0.08).contains(&asked), "{asked}");
}

#[test]
fn two_paths_lose_only_what_both_lose() {
    let one_way = Duration::from_millis(50);
    let run = Run {
        live: vec![lossy(one_way, 0.1), lossy(one_way + Duration::from_millis(15), 0.1)],
        ..Run::field(&link(one_way), Duration::from_millis(500), 10_000, 5)
    };
    let out = run.play();
    assert_eq!(out.lost, 0);
    // One in a hundred is lost by both; the others are not asked for, late as one path is.
    let asked = out.stats.asked as f64 / out.sent as f64;
    assert!((0.007..0.014).contains(&asked), "{asked}");
    for path in out.stats.paths {
        let lost = path.lost as f64 / (path.received + path.lost) as f64;
        assert!((0.09..0.11).contains(&lost), "{path:?}");
    }
}

fn latency(ms: u64) -> Settings {
    let latency = Duration::from_millis(ms);
    Settings { latency, join_latency: latency, ..Settings::default() }
}

fn tags(count: usize) -> Vec<Tag> {
    (0..count)
        .map(|i| {
            let body = vec![i as u8; if i % 25 == 0 { 9000 } else { 300 + i % 7 * 400 }];
            Tag::new(TagKind::Video, i as u32 * 40, &body).unwrap()
        })
        .collect()
}

#[test]
fn a_sender_that_begins_anew_is_followed() {
    let now = Instant::now();
    let mut receiver = Receiver::new(latency(100));
    let mut packetizer = Packetizer::new(Ssrc(1), 1120);
    let mut feed = |receiver: &mut Receiver, from: u16, count: u16| {
        for i in 0..count {
            let burst = packetizer.packetize(&tags(2)[1]);
            let mut packet = Packet::parse(burst.packet(0).unwrap()).unwrap();
            packet.header.seq = Seq(from.wrapping_add(i));
            receiver.handle_packet(now, packet, Path::Live(0));
        }
        std::iter::from_fn(|| receiver.poll_event()).collect::<Vec<_>>()
    };
    assert_eq!(feed(&mut receiver, 20_000, 10).len(), 10);
    // One stray packet changes nothing.
    assert_eq!(feed(&mut receiver, 60_000, 1), []);
    assert_eq!(feed(&mut receiver, 20_010, 5).len(), 5);
    let events = feed(&mut receiver, 50_000, 3);
    assert_eq!(events[0], Event::Restart(Seq(50_000)));
    assert_eq!(receiver.stats().restarts, 1);
    receiver.handle_timeout(now + Duration::from_millis(101) + GRACE);
    let events: Vec<_> = std::iter::from_fn(|| receiver.poll_event()).collect();
    assert_eq!(events[0], Event::Lost(1));
    assert_eq!(events.len(), 3);
}

/// An existing cloud that is started again uses the same SSRC and the same first number.
#[test]
fn a_sender_that_begins_anew_a_little_behind_is_followed_too() {
    let mut now = Instant::now();
    let mut receiver = Receiver::new(latency(100));
    let mut feed = |receiver: &mut Receiver, seqs: std::ops::Range<u16>| {
        for seq in seqs {
            now += Duration::from_millis(10);
            receiver.handle_packet(now, numbered(seq), Path::Live(0));
        }
        std::iter::from_fn(|| receiver.poll_event()).collect::<Vec<_>>()
    };
    assert_eq!(feed(&mut receiver, 1000..1500).len(), 500);
    let events = feed(&mut receiver, 1000..1200);
    let Some(Event::Restart(first)) = events.first() else { panic!("{:?}", events.first()) };
    assert!((1000..1101).contains(&first.0), "{first}");
    assert_eq!(receiver.stats().restarts, 1);
    let asked = std::iter::from_fn(|| receiver.poll_request(now)).flat_map(|r| r.seqs);
    assert!(asked.count() <= 31);
}

#[test]
fn what_the_sender_no_longer_has_is_given_up_at_once() {
    let now = Instant::now();
    let mut receiver = Receiver::new(latency(500));
    let mut packetizer = Packetizer::new(Ssrc(1), 1120);
    let packets: Vec<_> = tags(5)
        .iter()
        .skip(1)
        .map(|tag| Packet::parse(packetizer.packetize(tag).packet(0).unwrap()).unwrap())
        .collect();
    receiver.handle_packet(now, packets[0].clone(), Path::Live(0));
    let mut last = packets[3].clone();
    last.header.seq = packets[0].header.seq.plus(3);
    receiver.handle_packet(now, last, Path::Live(0));
    let request = receiver.poll_request(now).unwrap();
    assert_eq!(request.seqs, [Seq::FIRST.plus(1), Seq::FIRST.plus(2)]);
    receiver.handle_gone(now, request.seqs);
    let events: Vec<_> = std::iter::from_fn(|| receiver.poll_event()).collect();
    assert!(matches!(events[..], [Event::Packet(_), Event::Lost(2), Event::Packet(_)]));
}

#[test]
fn a_late_timer_does_not_ask_twice_in_one_request() {
    let now = Instant::now();
    let mut receiver = Receiver::new(latency(500));
    // Short of the deadline from the start, so that the first request is to be repeated.
    receiver.set_round_trip(now, Duration::from_millis(300), Duration::from_millis(10));
    receiver.handle_packet(now, numbered(100), Path::Live(0));
    receiver.handle_packet(now, numbered(102), Path::Live(0));
    assert_eq!(receiver.poll_request(now).map(|request| request.seqs), Some(vec![Seq(101)]));
    // Two milliseconds on it was due; by now the next try would be overdue too.
    receiver.set_round_trip(now, Duration::from_millis(10), Duration::from_millis(1));
    let late = now + Duration::from_millis(400);
    receiver.handle_timeout(late);
    assert_eq!(receiver.poll_request(late).map(|request| request.seqs), Some(vec![Seq(101)]));
    assert_eq!(receiver.poll_request(late), None);
    assert!(receiver.poll_timeout().is_some_and(|timeout| timeout > late));
}

#[test]
fn the_window_holds_as_many_as_it_says() {
    let now = Instant::now();
    let mut receiver = Receiver::new(Settings { window: 4, ..latency(500) });
    receiver.handle_packet(now, numbered(100), Path::Live(0));
    for number in [103, 104, 105] {
        receiver.handle_packet(now, numbered(number), Path::Live(0));
        assert!(receiver.pending() <= 4, "{} at {number}", receiver.pending());
    }
    let events: Vec<_> = std::iter::from_fn(|| receiver.poll_event()).collect();
    assert!(matches!(events[..], [Event::Packet(_), Event::Lost(1)]), "{events:?}");
    assert_eq!(receiver.pending(), 4);
}

fn numbered(seq: u16) -> Packet {
    let burst = Packetizer::new(Ssrc(1), 1120).packetize(&tags(2)[1]);
    let mut packet = Packet::parse(burst.packet(0).unwrap()).unwrap();
    packet.header.seq = Seq(seq);
    packet
}

proptest! {
    /// [`Receiver::handle_next`] is a shorter way to the same end: nothing that one can see of a
    /// receiver tells whether packets were offered to it first.
    #[test]
    fn the_short_way_for_packets_in_order_comes_to_the_same(
        steps in proptest::collection::vec((0u8..24, 0u64..40, any::<bool>()), 1..300),
        starts_at in proptest::option::of(Just(Seq::FIRST)),
        two_paths in any::<bool>(),
    ) {
        let mut now = Instant::now();
        let new = || match starts_at {
            Some(first) => Receiver::starting_at(latency(100), first),
            None => Receiver::new(latency(100)),
        };
        let (mut long, mut short) = (new(), new());
        let (mut next, mut taken) = (Seq::FIRST.0, 0);
        for (what, ms, second) in steps {
            now += Duration::from_millis(ms);
            let path = u8::from(two_paths && second && what > 10);
            // Many in a row, of which nothing is heard until something else comes.
            for _ in 0..if what >= 20 { ms * 5 } else { 0 } {
                now += Duration::from_micros(300);
                let packet = numbered(next);
                long.handle_packet(now, packet.clone(), Path::Live(path));
                match short.handle_next(now, Seq(next), path) {
                    true => {
                        taken += 1;
                        prop_assert_eq!(long.poll_event(), Some(Event::Packet(packet)));
                    }
                    false => short.handle_packet(now, packet, Path::Live(path)),
                }
                next = next.wrapping_add(1);
            }
            // Mostly the next; else one that was passed over, one far away, or a gap.
            let seq = match what {
                0 => next.wrapping_sub(3),
                1 => next.wrapping_add(20_000),
                2 => next.wrapping_add(2),
                3 => next.wrapping_sub(1),
                _ => next,
            };
            match what {
                4 => {
                    long.handle_heartbeat(now, Seq(next));
                    short.handle_heartbeat(now, Seq(next));
                }
                5 => {
                    long.handle_gone(now, [Seq(seq)]);
                    short.handle_gone(now, [Seq(seq)]);
                }
                6 => {
                    let packet = numbered(next.wrapping_sub(2));
                    long.handle_packet(now, packet.clone(), Path::Repair);
                    short.handle_packet(now, packet, Path::Repair);
                }
                _ => {
                    if !matches!(what, 0 | 1 | 3) {
                        next = seq.wrapping_add(1);
                    }
                    long.handle_packet(now, numbered(seq), Path::Live(path));
                    if short.handle_next(now, Seq(seq), path) {
                        taken += 1;
                        prop_assert_eq!(long.poll_event(), Some(Event::Packet(numbered(seq))));
                    } else {
                        short.handle_packet(now, numbered(seq), Path::Live(path));
                    }
                }
            }
            long.handle_timeout(now);
            short.handle_timeout(now);
            loop {
                let requests = [&mut long, &mut short].map(|receiver| receiver.poll_request(now));
                prop_assert_eq!(&requests[0], &requests[1]);
                if requests[0].is_none() {
                    break;
                }
            }
            loop {
                let events = [&mut long, &mut short].map(|receiver| receiver.poll_event());
                prop_assert_eq!(&events[0], &events[1]);
                if events[0].is_none() {
                    break;
                }
            }
            prop_assert_eq!(long.stats(), short.stats());
            prop_assert_eq!(long.poll_timeout(), short.poll_timeout());
            prop_assert_eq!(long.pending(), short.pending());
        }
        prop_assume!(taken > 0);
    }
}
