//! Behaviour of the receiver, step by step and in virtual time.

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
fn receiver_delivers_without_delay_or_requests_if_nothing_is_lost() {
    let one_way = Duration::from_millis(30);
    let out = Run::field(&link(one_way), Duration::from_millis(500), 2000, 1).play();
    assert_eq!((out.lost, out.stats.requests), (0, 0));
    assert!(out.delays.iter().all(|delay| *delay == one_way));
}

#[test]
fn repair_takes_about_one_round_trip() {
    let link = lossy(Duration::from_millis(50), 0.05);
    let out = Run::field(&link, Duration::from_millis(600), 10_000, 2).play();
    assert_eq!(out.lost, 0);
    // More than 90 % of packets arrive when due, and 99.5 % within little more than a round trip.
    let within = |bounds: usize| out.stats.delays.counts[..bounds].iter().sum::<u64>() as f64;
    assert!(within(1) / out.sent as f64 > 0.9);
    assert!(within(11) / out.sent as f64 > 0.995, "within 125 ms: {:?}", out.stats.delays);
    // In order, nearly every packet waits behind one of the fifty in a thousand that are lost.
    let mut delays = out.delays;
    delays.sort_unstable();
    let added = |share: f64| delays[(delays.len() as f64 * share) as usize] - link.delay;
    assert!(added(0.5) <= Duration::from_millis(105), "median adds {:?}", added(0.5));
    assert!(added(0.99) <= Duration::from_millis(215), "p99 adds {:?}", added(0.99));
}

#[test]
fn receiver_learns_common_reordering() {
    let link = LinkSettings { reorder: 0.1, ..link(Duration::from_millis(50)) };
    let out = Run::field(&link, Duration::from_millis(500), 5000, 3).play();
    assert_eq!(out.lost, 0);
    assert!(out.stats.reordered > 400, "{:?}", out.stats);
    assert!(out.stats.asked < out.stats.reordered / 5, "{:?}", out.stats);
}

/// A blackout of two seconds loses two thousand packets at once. They are repaired in time, without
/// repeated requests for repairs that are in flight.
#[test]
fn receiver_requests_no_faster_than_repairs_arrive() {
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
    // Except one that a heartbeat announced at the start of the blackout: it expires at its end.
    assert!(out.lost <= 1, "{:?}", out.stats);
    assert!(out.stats.duplicate < 200, "{:?}", out.stats);
}

/// RTP by satellite, control by ground: heartbeats overtake the packets they announce.
#[test]
fn receiver_waits_for_packets_overtaken_by_heartbeats() {
    let run = Run {
        live: vec![lossy(Duration::from_millis(310), 0.02)],
        ..Run::field(&link(Duration::from_millis(10)), Duration::from_millis(500), 20_000, 6)
    };
    let out = run.play();
    assert_eq!((out.lost, out.restarts), (0, 0), "{:?}", out.stats);
    // Packets of the first second are requested before the skew is known.
    let requested = out.stats.asked as f64 / out.sent as f64;
    assert!((0.02..0.08).contains(&requested), "{requested}");
}

#[test]
fn receiver_requests_only_losses_on_both_paths() {
    let one_way = Duration::from_millis(50);
    let run = Run {
        live: vec![lossy(one_way, 0.1), lossy(one_way + Duration::from_millis(15), 0.1)],
        ..Run::field(&link(one_way), Duration::from_millis(500), 10_000, 5)
    };
    let out = run.play();
    assert_eq!(out.lost, 0);
    // Both paths lose one packet in a hundred. The others are not requested, although one path lags.
    let requested = out.stats.asked as f64 / out.sent as f64;
    assert!((0.007..0.014).contains(&requested), "{requested}");
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
fn receiver_follows_a_restart_at_distant_numbers() {
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
    // A single stray packet has no effect.
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

/// An existing cloud that restarts reuses its SSRC and its first sequence number.
#[test]
fn receiver_follows_a_restart_at_recent_numbers() {
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
    let requested = std::iter::from_fn(|| receiver.poll_request(now)).flat_map(|r| r.seqs);
    assert!(requested.count() <= 31);
}

#[test]
fn receiver_reports_expired_packets_as_lost_at_once() {
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
fn late_timer_requests_each_number_once() {
    let now = Instant::now();
    let mut receiver = Receiver::new(latency(500));
    // Little time until the deadline, so that the first request is repeated.
    receiver.set_round_trip(now, Duration::from_millis(300), Duration::from_millis(10));
    receiver.handle_packet(now, numbered(100), Path::Live(0));
    receiver.handle_packet(now, numbered(102), Path::Live(0));
    assert_eq!(receiver.poll_request(now).map(|request| request.seqs), Some(vec![Seq(101)]));
    // The repetition was due after two milliseconds; now the next try is overdue too.
    receiver.set_round_trip(now, Duration::from_millis(10), Duration::from_millis(1));
    let late = now + Duration::from_millis(400);
    receiver.handle_timeout(late);
    assert_eq!(receiver.poll_request(late).map(|request| request.seqs), Some(vec![Seq(101)]));
    assert_eq!(receiver.poll_request(late), None);
    assert!(receiver.poll_timeout().is_some_and(|timeout| timeout > late));
}

#[test]
fn window_never_exceeds_its_limit() {
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

/// Two receivers with the same input: packets are offered to `short` by [`Receiver::handle_next`]
/// first.
struct Pair {
    long: Receiver,
    short: Receiver,
    now: Instant,
    /// Packets that `handle_next` accepted.
    accepted: u32,
}

impl Pair {
    fn new(starts_at: Option<Seq>) -> Self {
        let receiver = || match starts_at {
            Some(first) => Receiver::starting_at(latency(100), first),
            None => Receiver::new(latency(100)),
        };
        Self { long: receiver(), short: receiver(), now: Instant::now(), accepted: 0 }
    }

    fn receive(&mut self, seq: u16, path: u8) {
        let (now, packet) = (self.now, numbered(seq));
        self.long.handle_packet(now, packet.clone(), Path::Live(path));
        if self.short.handle_next(now, Seq(seq), path) {
            self.accepted += 1;
            assert_eq!(self.long.poll_event(), Some(Event::Packet(packet)));
        } else {
            self.short.handle_packet(now, packet, Path::Live(path));
        }
    }

    fn both(&mut self, mut input: impl FnMut(&mut Receiver, Instant)) {
        input(&mut self.long, self.now);
        input(&mut self.short, self.now);
    }

    /// Polls both receivers and checks that their outputs are equal.
    fn compare(&mut self) {
        self.both(Receiver::handle_timeout);
        loop {
            let request = self.long.poll_request(self.now);
            assert_eq!(request, self.short.poll_request(self.now));
            if request.is_none() {
                break;
            }
        }
        loop {
            let event = self.long.poll_event();
            assert_eq!(event, self.short.poll_event());
            if event.is_none() {
                break;
            }
        }
        assert_eq!(self.long.stats(), self.short.stats());
        assert_eq!(self.long.poll_timeout(), self.short.poll_timeout());
        assert_eq!(self.long.pending(), self.short.pending());
    }
}

proptest! {
    /// A receiver to which packets are offered by [`Receiver::handle_next`] first behaves exactly as
    /// one that gets them by [`Receiver::handle_packet`].
    #[test]
    fn handle_next_is_equivalent_to_handle_packet(
        steps in proptest::collection::vec((0u8..24, 0u64..40, any::<bool>()), 1..300),
        starts_at in proptest::option::of(Just(Seq::FIRST)),
        two_paths in any::<bool>(),
    ) {
        let mut pair = Pair::new(starts_at);
        let mut next = Seq::FIRST.0;
        for (what, ms, second) in steps {
            pair.now += Duration::from_millis(ms);
            let path = u8::from(two_paths && second && what > 10);
            // A long run of packets in order.
            for _ in 0..if what >= 20 { ms * 5 } else { 0 } {
                pair.now += Duration::from_micros(300);
                pair.receive(next, path);
                next = next.wrapping_add(1);
            }
            match what {
                // A skipped or repeated packet, and one far away.
                0 => pair.receive(next.wrapping_sub(3), path),
                1 => pair.receive(next.wrapping_add(20_000), path),
                3 => pair.receive(next.wrapping_sub(1), path),
                4 => pair.both(|receiver, now| _ = receiver.handle_heartbeat(now, Seq(next))),
                5 => pair.both(|receiver, now| receiver.handle_gone(now, [Seq(next)])),
                6 => pair.both(|receiver, now| {
                    receiver.handle_packet(now, numbered(next.wrapping_sub(2)), Path::Repair);
                }),
                // A gap of two, or the next packet.
                _ => {
                    let seq = if what == 2 { next.wrapping_add(2) } else { next };
                    next = seq.wrapping_add(1);
                    pair.receive(seq, path);
                }
            }
            pair.compare();
        }
        prop_assume!(pair.accepted > 0);
    }
}
