//! Sender and receiver of one publication in virtual time, over emulated links that carry the bytes of
//! the wire format.

use std::time::{Duration, Instant};

use bytes::Bytes;
use downpour_media::flv::{Tag, TagKind};
use downpour_netem::{Link, LinkSettings};
use downpour_repair::{
    history::History,
    message::{Gone, Heartbeat, Message, Nack, encode_repair},
    receiver::{Event, Path, Receiver, Settings, Stats},
    retransmit::Retransmitter,
    rtp::{Packet, Packetizer, Seq, Ssrc},
};

/// Parameters of a run.
#[derive(Debug, Clone)]
pub struct Run {
    /// The paths of RTP: one or two.
    pub live: Vec<LinkSettings>,
    /// Link for repairs and other messages of the cloud.
    pub down: LinkSettings,
    /// Link for requests.
    pub up: LinkSettings,
    pub receiver: Settings,
    /// Time from one tag to the next.
    pub interval: Duration,
    /// Bytes of each tag's body.
    pub tags: Vec<usize>,
    /// Packets sent before the receiver joins: they move the first number.
    pub before: usize,
    /// The sender restarts with the same SSRC before this tag.
    pub restart: Option<usize>,
    /// All clocks jump ahead before this tag.
    pub jump: Option<(usize, Duration)>,
    /// The sender pauses before this tag.
    pub pause: Option<(usize, Duration)>,
    pub seed: u64,
}

impl Run {
    /// `tags` tags of 1000 bytes, one per millisecond, over the same link in both directions.
    pub fn field(link: &LinkSettings, latency: Duration, tags: usize, seed: u64) -> Self {
        Self {
            live: vec![link.clone()],
            down: link.clone(),
            up: link.clone(),
            receiver: Settings { latency, join_latency: latency, ..Settings::default() },
            interval: Duration::from_millis(1),
            // 1000 bytes including the header.
            tags: vec![989; tags],
            before: 0,
            restart: None,
            jump: None,
            pause: None,
            seed,
        }
    }

    /// Runs until no datagram is in flight.
    pub fn play(&self) -> Outcome {
        World::new(self).play()
    }
}

/// The result of a run.
#[derive(Debug)]
pub struct Outcome {
    pub sent: u64,
    /// Time from sending to delivery per delivered packet.
    pub delays: Vec<Duration>,
    pub lost: u64,
    /// Maximum number of consecutive lost packets.
    pub longest_hole: u64,
    pub restarts: u64,
    pub stats: Stats,
    /// Longest time that the receiver waited for a gap.
    pub longest_gap: Duration,
    /// Bytes on the wire, with the headers of UDP and QUIC, per byte of media, minus 1.
    pub overhead: f64,
}

struct World<'a> {
    run: &'a Run,
    start: Instant,
    now: Instant,
    packetizer: Packetizer,
    history: History,
    resender: Retransmitter<Bytes>,
    receiver: Receiver,
    live: Vec<Link>,
    down: Link,
    up: Link,
    /// Send time of each packet, before and after the restart of the sender.
    sent_at: [Vec<Instant>; 2],
    anew: bool,
    /// The number of the first packet of the sequence that the receiver follows.
    first: Seq,
    /// Index of the next packet to be delivered or lost.
    position: usize,
    media_bytes: usize,
    extra_bytes: usize,
    out: Outcome,
    hole: u64,
    gap_since: Option<(Instant, usize)>,
}

impl<'a> World<'a> {
    fn new(run: &'a Run) -> Self {
        let start = Instant::now();
        let mut packetizer = Packetizer::new(SSRC, PAYLOAD);
        let mut history = History::new(1 << 15, Duration::from_secs(60));
        let early = tag(0, 10);
        for _ in 0..run.before {
            history.push(start, packetizer.packetize(&early));
        }
        let first = packetizer.next_seq();
        let mut receiver = Receiver::starting_at(run.receiver, first);
        let round_trip = run.down.delay + run.up.delay;
        receiver.set_round_trip(start, round_trip, round_trip / 8);
        let mut resender = Retransmitter::new();
        resender.set_round_trip(round_trip);
        let link = |settings: &LinkSettings, n: u64| {
            Link::new(settings.clone(), run.seed.wrapping_mul(4).wrapping_add(n))
        };
        Self {
            run,
            start,
            now: start,
            packetizer,
            history,
            resender,
            receiver,
            live: run.live.iter().zip(0..).map(|(settings, n)| link(settings, n)).collect(),
            down: link(&run.down, 2),
            up: link(&run.up, 3),
            sent_at: Default::default(),
            anew: false,
            first,
            position: 0,
            media_bytes: 0,
            extra_bytes: 0,
            out: Outcome {
                sent: 0,
                delays: Vec::new(),
                lost: 0,
                longest_hole: 0,
                restarts: 0,
                stats: Stats::default(),
                longest_gap: Duration::ZERO,
                overhead: 0.0,
            },
            hole: 0,
            gap_since: None,
        }
    }

    fn play(mut self) -> Outcome {
        let mut next_tag = 0;
        let mut tag_due = self.start;
        let mut beat_due = self.start + HEARTBEAT;
        let mut end = None;
        loop {
            let tag = (next_tag < self.run.tags.len()).then_some(tag_due);
            if tag.is_none() && end.is_none() {
                end = Some(self.now + self.run.receiver.latency * 2 + Duration::from_secs(2));
            }
            let wakes = [
                tag,
                Some(beat_due),
                self.receiver.poll_timeout(),
                self.resender.poll_timeout(),
                self.down.next_deadline(),
                self.up.next_deadline(),
            ];
            let wakes = wakes.into_iter().chain(self.live.iter().map(Link::next_deadline));
            let Some(due) = wakes.flatten().min() else { break };
            if end.is_some_and(|end| due > end) {
                break;
            }
            self.now = self.now.max(due);
            if tag.is_some_and(|due| due <= self.now) {
                if let Some((_, by)) = self.run.jump.filter(|(at, _)| *at == next_tag) {
                    self.now += by;
                    tag_due += by;
                }
                if self.run.restart == Some(next_tag) {
                    self.restart();
                }
                self.send_tag(next_tag);
                next_tag += 1;
                tag_due += self.run.interval;
                if let Some((_, by)) = self.run.pause.filter(|(at, _)| *at == next_tag) {
                    tag_due += by;
                }
            }
            if beat_due <= self.now {
                beat_due = self.now + HEARTBEAT;
                if let Some(last) = self.history.newest_seq().filter(|_| self.out.sent > 0) {
                    let beat = [Heartbeat { ssrc: SSRC, last }];
                    let beat = Heartbeat::encode(&beat, 1200).next().unwrap();
                    self.extra_bytes += beat.len() + QUIC_HEADERS;
                    self.down.send(self.now, beat);
                }
            }
            self.carry();
            self.receive();
        }
        assert_eq!(self.receiver.pending(), 0, "no packet is pending");
        assert_eq!(self.receiver.poll_timeout(), None, "and no timer");
        self.out.stats = self.receiver.stats();
        self.out.overhead = self.extra_bytes as f64 / self.media_bytes as f64;
        self.out
    }

    fn send_tag(&mut self, index: usize) {
        let burst = self.packetizer.packetize(&tag(index as u32, self.run.tags[index]));
        self.history.push(self.now, burst.clone());
        for packet in (0..burst.count()).filter_map(|i| burst.packet(i)) {
            self.sent_at[usize::from(self.anew)].push(self.now);
            self.out.sent += 1;
            self.media_bytes += packet.len() + UDP_HEADERS;
            for link in &mut self.live {
                link.send(self.now, packet.clone());
            }
        }
    }

    /// Restarts like an existing cloud: the same SSRC, and the first sequence number.
    fn restart(&mut self) {
        self.anew = true;
        self.packetizer = Packetizer::new(SSRC, PAYLOAD);
        self.history = History::new(1 << 15, Duration::from_secs(60));
    }

    /// Passes arrived datagrams to both ends.
    fn carry(&mut self) {
        for (link, path) in self.live.iter_mut().zip(0..) {
            while let Some(packet) = link.poll_output(self.now) {
                let packet = Packet::parse(packet).unwrap();
                self.receiver.handle_packet(self.now, packet, Path::Live(path));
            }
        }
        while let Some(datagram) = self.down.poll_output(self.now) {
            match Message::parse(datagram).unwrap() {
                Message::Repair(packet) => {
                    let packet = Packet::parse(packet).unwrap();
                    self.receiver.handle_packet(self.now, packet, Path::Repair);
                }
                Message::Gone(gone) => self.receiver.handle_gone(self.now, gone.seqs),
                Message::Heartbeats(beats) => {
                    for beat in beats {
                        self.receiver.handle_heartbeat(self.now, beat.last);
                    }
                }
                Message::Nack(_) => unreachable!("the cloud sends no nack"),
            }
        }
        while let Some(datagram) = self.up.poll_output(self.now) {
            let Message::Nack(nack) = Message::parse(datagram).unwrap() else {
                unreachable!("an edge sends only nacks")
            };
            self.repair(nack);
        }
        while let Some(packet) = self.resender.poll_copy(self.now) {
            self.send_repair(&packet);
        }
    }

    fn repair(&mut self, nack: Nack) {
        let mut gone = Vec::new();
        let round_trip = self.run.down.delay + self.run.up.delay;
        let slack = Duration::from_millis(nack.slack_ms.into());
        let within = slack.saturating_sub(round_trip);
        for seq in nack.seqs {
            if !self.resender.is_new(self.now, SSRC, seq) {
                continue;
            }
            match self.history.packet(seq) {
                Some(packet) => {
                    self.send_repair(&packet);
                    self.resender.schedule_copies(self.now, packet, nack.copies - 1, within);
                }
                None => gone.push(seq),
            }
        }
        for datagram in (Gone { ssrc: SSRC, seqs: gone }).encode(1150) {
            self.down.send(self.now, datagram);
        }
    }

    fn send_repair(&mut self, packet: &Bytes) {
        self.extra_bytes += packet.len() + 1 + QUIC_HEADERS;
        self.down.send(self.now, encode_repair(packet));
    }

    fn receive(&mut self) {
        let now = self.now;
        self.receiver.handle_timeout(now);
        while let Some(request) = self.receiver.poll_request(now) {
            assert!(!request.seqs.is_empty());
            let slack_ms = request.slack_ms(now);
            let nack = Nack { ssrc: SSRC, copies: request.copies, slack_ms, seqs: request.seqs };
            for datagram in nack.encode(1150) {
                self.extra_bytes += datagram.len() + QUIC_HEADERS;
                self.up.send(now, datagram);
            }
        }
        while let Some(event) = self.receiver.poll_event() {
            match event {
                Event::Packet(packet) => {
                    let expected = self.first.plus(self.position);
                    assert_eq!(packet.header.seq, expected, "in order, each once");
                    let sent_at = self.sent_at[self.out.restarts as usize][self.position];
                    self.out.delays.push(now - sent_at);
                    self.position += 1;
                    self.hole = 0;
                }
                Event::Lost(count) => {
                    self.out.lost += count;
                    self.position += count as usize;
                    self.hole += count;
                    self.out.longest_hole = self.out.longest_hole.max(self.hole);
                }
                Event::Restart(next) => {
                    self.out.restarts += 1;
                    self.gap_since = None;
                    self.first = Seq::FIRST;
                    self.position = usize::from(next.0.wrapping_sub(Seq::FIRST.0));
                }
            }
        }
        // Longest wait for one gap: the time that the front stays the same while packets are pending.
        match (self.receiver.pending() > 0, self.gap_since) {
            (true, Some((since, front))) if front == self.position => {
                self.out.longest_gap = self.out.longest_gap.max(now - since);
            }
            (true, _) => self.gap_since = Some((now, self.position)),
            (false, _) => self.gap_since = None,
        }
    }
}

/// A perfect link with this delay.
pub fn link(one_way: Duration) -> LinkSettings {
    LinkSettings { delay: one_way, ..LinkSettings::default() }
}

/// A link with independent random loss.
pub fn lossy(one_way: Duration, loss: f64) -> LinkSettings {
    LinkSettings { loss, ..link(one_way) }
}

fn tag(index: u32, len: usize) -> Tag {
    Tag::new(TagKind::Audio, index, &vec![index as u8; len]).unwrap()
}

const SSRC: Ssrc = Ssrc(1);
const PAYLOAD: usize = 1120;
/// As `repair::server` sends them while a stream flows.
const HEARTBEAT: Duration = Duration::from_millis(100);
/// IPv4 and UDP.
const UDP_HEADERS: usize = 28;
/// IPv4, UDP, and a short-header packet with one datagram frame to an edge: connection id
/// 2, number 2, frame 3, tag 16.
const QUIC_HEADERS: usize = 28 + 24;
