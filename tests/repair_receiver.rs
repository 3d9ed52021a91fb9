//! Receiver and history together in virtual time, over a link that loses, delays, reorders and
//! duplicates both ways.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    time::{Duration, Instant},
};

use bytes::Bytes;
use downpour::{
    flv::{Tag, TagKind},
    repair::{
        history::History,
        message::Nack,
        receiver::{Event, Path, Receiver, Request, Settings},
        resend::Resender,
    },
    rtp::{Packet, Packetizer, Seq, Ssrc},
};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

#[derive(Debug, Clone)]
struct Link {
    loss: f64,
    /// Packets lost in a row once one is.
    burst: u32,
    duplicate: f64,
    reorder: f64,
    one_way: Duration,
}

#[derive(Debug)]
enum Arrival {
    Packet(Bytes, Path),
    Request(Request),
    Gone(Vec<Seq>),
    Heartbeat(Seq),
}

struct Outcome {
    /// Number sent, counted from the first that the receiver could have seen.
    sent: u64,
    delivered: Vec<(u64, Duration)>,
    lost: u64,
    events: Vec<Event>,
    receiver: Receiver,
    /// Longest time that the receiver held a gap open.
    longest_gap: Duration,
    /// Bytes on the wire over bytes of media, less 1; headers of UDP and QUIC included.
    overhead: f64,
}

struct Simulation {
    now: Instant,
    rng: SmallRng,
    link: Link,
    burst_left: u32,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    arrivals: BTreeMap<u64, Arrival>,
    next_id: u64,
}

impl Simulation {
    fn new(link: Link, seed: u64) -> Self {
        Self {
            now: Instant::now(),
            rng: SmallRng::seed_from_u64(seed),
            link,
            burst_left: 0,
            queue: BinaryHeap::new(),
            arrivals: BTreeMap::new(),
            next_id: 0,
        }
    }

    fn send(&mut self, make: impl Fn() -> Arrival) {
        if self.burst_left > 0 {
            self.burst_left -= 1;
            return;
        }
        if self.rng.random_bool(self.link.loss) {
            self.burst_left = self.link.burst - 1;
            return;
        }
        let copies = if self.rng.random_bool(self.link.duplicate) { 2 } else { 1 };
        for _ in 0..copies {
            let mut delay = self.link.one_way;
            if self.rng.random_bool(self.link.reorder) {
                delay += Duration::from_micros(self.rng.random_range(100..15_000));
            }
            self.queue.push(Reverse((self.now + delay, self.next_id)));
            self.arrivals.insert(self.next_id, make());
            self.next_id += 1;
        }
    }

    /// Streams `tags` one every 2 ms and runs until nothing is pending any more.
    fn run(mut self, settings: Settings, tags: &[Tag]) -> Outcome {
        let start = self.now;
        let mut packetizer = Packetizer::new(Ssrc(1), 1120);
        let mut history = History::new(1 << 15, Duration::from_secs(60));
        let mut receiver = Receiver::starting_at(settings, Seq::FIRST);
        let (mut sent, mut sent_at, mut delivered) = (0, Vec::new(), Vec::new());
        let (mut lost, mut position, mut events) = (0, 0u64, Vec::new());
        let mut gap_since = None;
        let mut longest_gap = Duration::ZERO;
        let mut tags = tags.iter().enumerate();
        let mut next_tag = tags.next();
        let end = start + Duration::from_millis(2) * tags.len() as u32 + Duration::from_secs(8);
        let mut next_heartbeat = start;
        let mut resender = Resender::new();
        resender.set_round_trip(self.link.one_way * 2);
        receiver.set_round_trip(start, self.link.one_way * 2, Duration::ZERO);
        let (mut media_bytes, mut extra_bytes) = (0, 0);
        loop {
            let tag_due = next_tag.map(|(i, _)| start + Duration::from_millis(2) * i as u32);
            let arrival_due = self.queue.peek().map(|Reverse((due, _))| *due);
            let due = [
                tag_due,
                arrival_due,
                receiver.poll_timeout(),
                resender.poll_timeout(),
                Some(next_heartbeat),
            ];
            let Some(due) = due.into_iter().flatten().min().filter(|due| *due < end) else { break };
            self.now = self.now.max(due);
            if tag_due.is_some_and(|due| due <= self.now) {
                let burst = packetizer.packetize(next_tag.unwrap().1);
                history.push(self.now, burst.clone());
                for i in 0..burst.count() {
                    let packet = burst.packet(i).unwrap();
                    sent_at.push(self.now);
                    media_bytes += packet.len() + UDP_HEADERS;
                    self.send(|| Arrival::Packet(packet.clone(), Path::Live(0)));
                }
                sent += burst.count() as u64;
                next_tag = tags.next();
            }
            if next_heartbeat <= self.now {
                next_heartbeat = self.now + Duration::from_millis(50);
                if let Some(last) = history.newest_seq() {
                    self.send(|| Arrival::Heartbeat(last));
                }
            }
            while let Some(&Reverse((due, id))) = self.queue.peek()
                && due <= self.now
            {
                self.queue.pop();
                match self.arrivals.remove(&id).unwrap() {
                    Arrival::Packet(bytes, path) => {
                        receiver.handle_packet(self.now, Packet::parse(bytes).unwrap(), path);
                    }
                    Arrival::Gone(seqs) => receiver.handle_gone(self.now, seqs),
                    Arrival::Heartbeat(last) => receiver.handle_heartbeat(self.now, last),
                    Arrival::Request(request) => {
                        let mut gone = Vec::new();
                        for seq in request.seqs {
                            if !resender.is_new(self.now, Ssrc(1), seq) {
                                continue;
                            }
                            match history.packet(seq) {
                                Some(packet) => {
                                    resender.copy(self.now, packet.clone(), request.copies - 1);
                                    extra_bytes += packet.len() + QUIC_HEADERS;
                                    self.send(|| Arrival::Packet(packet.clone(), Path::Repair));
                                }
                                None => gone.push(seq),
                            }
                        }
                        if !gone.is_empty() {
                            self.send(|| Arrival::Gone(gone.clone()));
                        }
                    }
                }
            }
            while let Some(packet) = resender.poll_copy(self.now) {
                extra_bytes += packet.len() + QUIC_HEADERS;
                self.send(|| Arrival::Packet(packet.clone(), Path::Repair));
            }
            receiver.handle_timeout(self.now);
            while let Some(request) = receiver.poll_request(self.now) {
                assert!(!request.seqs.is_empty());
                let nack = Nack {
                    ssrc: Ssrc(1),
                    copies: request.copies,
                    slack_ms: request.slack_ms(self.now),
                    seqs: request.seqs.clone(),
                };
                let encoded = nack.encode(1150).into_iter();
                extra_bytes += encoded.map(|nack| nack.len() + QUIC_HEADERS).sum::<usize>();
                self.send(|| Arrival::Request(request.clone()));
            }
            while let Some(event) = receiver.poll_event() {
                match &event {
                    Event::Packet(packet) => {
                        assert_eq!(packet.header.seq, Seq::FIRST.plus(position as usize), "order");
                        let delay = self.now - sent_at[position as usize];
                        delivered.push((position, delay));
                        position += 1;
                    }
                    Event::Lost(count) => {
                        lost += count;
                        position += count;
                    }
                    Event::Restart(_) => {}
                }
                events.push(event);
            }
            match (receiver.pending() > 0, gap_since) {
                (true, None) => gap_since = Some((self.now, position)),
                // The front moved on: the gap that is open now is another one.
                (true, Some((_, front))) if front != position => {
                    gap_since = Some((self.now, position));
                }
                (true, Some((since, _))) => longest_gap = longest_gap.max(self.now - since),
                (false, _) => gap_since = None,
            }
        }
        assert_eq!(receiver.pending(), 0, "nothing stays behind");
        assert_eq!(receiver.poll_timeout(), None, "and no timer");
        let overhead = extra_bytes as f64 / media_bytes as f64;
        Outcome { sent, delivered, lost, events, receiver, longest_gap, overhead }
    }
}

fn tags(count: usize) -> Vec<Tag> {
    (0..count)
        .map(|i| {
            let body = vec![i as u8; if i % 25 == 0 { 9000 } else { 300 + i % 7 * 400 }];
            Tag::new(TagKind::Video, i as u32 * 40, &body).unwrap()
        })
        .collect()
}

/// `kbps` of media in one packet a tag, as a tag stream that [`Simulation::run`] sends every 2 ms.
fn stream(kbps: usize, count: usize) -> Vec<Tag> {
    let body = vec![7; (kbps / 4).min(1100)];
    (0..count).map(|i| Tag::new(TagKind::Audio, i as u32 * 2, &body).unwrap()).collect()
}

fn clean(one_way_ms: u64) -> Link {
    let one_way = Duration::from_millis(one_way_ms);
    Link { loss: 0.0, burst: 1, duplicate: 0.0, reorder: 0.0, one_way }
}

fn latency(ms: u64) -> Settings {
    let latency = Duration::from_millis(ms);
    Settings { latency, join_latency: latency, ..Settings::default() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn each_number_is_handed_on_or_lost_exactly_once_and_in_order(
        seed: u64, loss in 0.0..0.4f64, burst in 1u32..12, duplicate in 0.0..0.3f64,
        reorder in 0.0..0.3f64, one_way_ms in 0u64..100, latency_ms in 20u64..800,
    ) {
        let one_way = Duration::from_millis(one_way_ms);
        let link = Link { loss: loss / f64::from(burst), burst, duplicate, reorder, one_way };
        let out = Simulation::new(link, seed).run(latency(latency_ms), &tags(250));
        // Heartbeats tell the tail, so every number sent is accounted for.
        prop_assert_eq!(out.delivered.len() as u64 + out.lost, out.sent);
        prop_assert_eq!(out.receiver.stats().lost, out.lost);
        prop_assert!(out.longest_gap <= Duration::from_millis(latency_ms + 1));
        prop_assert_eq!(out.receiver.stats().restarts, 0);
        let told: u64 = out.events.iter().map(|event| match event {
            Event::Packet(_) => 1,
            Event::Lost(count) => *count,
            Event::Restart(_) => 0,
        }).sum();
        prop_assert_eq!(told, out.sent);
    }
}

#[test]
fn without_loss_nothing_waits_and_nothing_is_asked() {
    let out = Simulation::new(clean(30), 1).run(latency(500), &tags(2000));
    assert_eq!(out.lost, 0);
    assert_eq!(out.receiver.stats().requests, 0);
    assert!(out.delivered.iter().all(|(_, delay)| *delay == Duration::from_millis(30)));
}

#[test]
fn a_lost_packet_costs_about_one_round_trip() {
    let link = Link { loss: 0.05, ..clean(50) };
    let out = Simulation::new(link, 2).run(latency(600), &tags(5000));
    assert_eq!(out.lost, 0);
    let mut delays: Vec<_> = out.delivered.iter().map(|(_, delay)| *delay).collect();
    delays.sort_unstable();
    let added = |share: f64| delays[(delays.len() as f64 * share) as usize] - delays[0];
    // In order: at 500 packets a second nearly every packet waits for some gap before it.
    assert!(added(0.5) <= Duration::from_millis(110), "median adds {:?}", added(0.5));
    assert!(added(0.99) <= Duration::from_millis(250), "p99 adds {:?}", added(0.99));
}

/// Per cent of packets lost for good at a budget of so many round trips, and what it costs.
///
/// The bounds on cost are what SRT 1.5.1 was measured to need at 4 and 6 round trips.
#[test]
fn residual_loss_is_orders_below_one_request_a_round_trip() {
    let cells = [
        (20, 0.05, [0.1, 0.005, 0.0, 0.0], 0.18),
        (20, 0.2, [1.0, 0.1, 0.01, 0.0], 0.37),
        (100, 0.05, [0.1, 0.002, 0.0, 0.0], 0.18),
        (100, 0.1, [0.3, 0.01, 0.0001, 0.0], 0.18),
        (100, 0.2, [1.0, 0.1, 0.01, 0.0], 0.37),
    ];
    let tags = stream(8000, 6000);
    for (round_trip, loss, targets, dearest) in cells {
        for (budget, target) in [2, 3, 4, 6].into_iter().zip(targets) {
            let (mut lost, mut sent, mut overhead) = (0, 0, 0.0f64);
            for seed in 0..5 {
                let link = Link { loss, ..clean(round_trip / 2) };
                // Its playout adds 2 to 16 ms to SRT's budget; ours has 5.
                let settings = latency(round_trip * budget + 5);
                let out = Simulation::new(link, seed).run(settings, &tags);
                lost += out.lost;
                sent += out.sent;
                overhead = overhead.max(out.overhead);
            }
            let residual = lost as f64 / sent as f64 * 100.0;
            println!(
                "{round_trip:3} ms {:2.0} % {budget} round trips: {residual:.5} % of {sent} lost \
                 (target {target}), {:.1} % more bytes",
                loss * 100.0,
                overhead * 100.0
            );
            // What the target allows of so many packets, and the luck of a few.
            let allowed = target / 100.0 * sent as f64;
            assert!(lost as f64 <= allowed + 3.0 * allowed.sqrt() + 1.0);
            let dearest = if budget < 4 { dearest * 1.5 } else { dearest };
            assert!(overhead <= dearest, "{overhead:.3} at {loss}, {budget} round trips");
        }
    }
}

#[test]
fn plain_reordering_is_learned_and_not_asked_about() {
    let link = Link { reorder: 0.1, ..clean(50) };
    let out = Simulation::new(link, 3).run(latency(500), &tags(5000));
    assert_eq!(out.lost, 0);
    let stats = out.receiver.stats();
    assert!(stats.reordered > 1000, "{stats:?}");
    assert!(stats.asked < stats.reordered / 5, "{stats:?}");
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
    receiver.handle_timeout(now + Duration::from_millis(101));
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

/// IPv4 and UDP.
const UDP_HEADERS: usize = 28;
/// IPv4, UDP, and a short-header packet with one datagram frame: connection id 8, number 2, frame
/// 3, tag 16.
const QUIC_HEADERS: usize = 28 + 30;
