//! Sends a stream over a lossy channel in virtual time, repairs it, and prints what was lost.
//!
//! ```sh
//! cargo run -p downpour-repair --example lossy_channel -- [LOSS_%] [DELAY_MS] [LATENCY_MS] [SEED]
//! ```
//!
//! Three channels connect the sender and the receiver: live RTP, the sender's messages, and the
//! receiver's requests. Each loses packets independently and delays them by a fixed time. Nothing
//! sleeps: the loop in [`Simulation::run`] jumps from one event to the next, as a program with sockets
//! would wait for the next timer or datagram.

use std::{
    collections::VecDeque,
    env,
    error::Error,
    time::{Duration, Instant},
};

use bytes::Bytes;
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::{
    history::History,
    message::{Gone, Heartbeat, Message, Nack, encode_repair},
    receiver::{Event, Path, Receiver, Settings, Stats},
    repair_queue,
    retransmit::Retransmitter,
    rtp::{Depacketizer, Packet, Packetizer, Seq, Ssrc},
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = env::args().skip(1);
    let mut argument = |default: f64| match args.next() {
        Some(text) => text.parse().map_err(|_| format!("not a number: {text}")),
        None => Ok(default),
    };
    let loss = argument(5.0)? / 100.0;
    let delay = Duration::try_from_secs_f64(argument(40.0)? / 1000.0)?;
    let latency = Duration::try_from_secs_f64(argument(400.0)? / 1000.0)?;
    let seed = argument(1.0)? as u64;
    if !(0.0..=1.0).contains(&loss) {
        return Err("loss must be 0 to 100 %".into());
    }
    println!("loss {:.1} %, delay {delay:?} each way, latency {latency:?}", loss * 100.0);
    Simulation::new(loss, delay, latency, seed).run().print();
    Ok(())
}

/// One direction of the network: loses datagrams at random and delays the others.
struct Channel {
    rng: SmallRng,
    loss: f64,
    delay: Duration,
    in_flight: VecDeque<(Instant, Bytes)>,
    lost: u64,
}

impl Channel {
    fn new(loss: f64, delay: Duration, seed: u64) -> Self {
        let rng = SmallRng::seed_from_u64(seed);
        Self { rng, loss, delay, in_flight: VecDeque::new(), lost: 0 }
    }

    fn send(&mut self, now: Instant, datagram: Bytes) {
        if self.rng.random_bool(self.loss) {
            self.lost += 1;
        } else {
            self.in_flight.push_back((now + self.delay, datagram));
        }
    }

    /// Returns the next datagram that has arrived at `now`.
    fn receive(&mut self, now: Instant) -> Option<Bytes> {
        let (arrival, _) = self.in_flight.front()?;
        if *arrival > now {
            return None;
        }
        self.in_flight.pop_front().map(|(_, datagram)| datagram)
    }

    fn next_arrival(&self) -> Option<Instant> {
        self.in_flight.front().map(|(arrival, _)| *arrival)
    }
}

/// The sending end: packetizes tags, and answers requests from its history.
struct Sender {
    packetizer: Packetizer,
    history: History,
    retransmitter: Retransmitter<Bytes>,
    round_trip: Duration,
    packets: u64,
}

impl Sender {
    fn new(round_trip: Duration) -> Self {
        let mut retransmitter = Retransmitter::new();
        retransmitter.set_round_trip(round_trip);
        Self {
            packetizer: Packetizer::new(SSRC, 1180),
            history: History::new(1 << 15, Duration::from_secs(5)),
            retransmitter,
            round_trip,
            packets: 0,
        }
    }

    fn send_tag(&mut self, now: Instant, tag: &Tag, rtp: &mut Channel) {
        let burst = self.packetizer.packetize(tag);
        for datagram in (0..burst.count()).filter_map(|index| burst.packet(index)) {
            self.packets += 1;
            rtp.send(now, datagram);
        }
        self.history.push(now, burst);
    }

    /// Announces the newest packet. Without it, the receiver cannot detect the loss of the last
    /// packets.
    fn send_heartbeat(&self, now: Instant, messages: &mut Channel) {
        if let Some(last) = self.history.newest_seq() {
            for datagram in Heartbeat::encode(&[Heartbeat { ssrc: SSRC, last }], MTU) {
                messages.send(now, datagram);
            }
        }
    }

    fn handle_request(&mut self, now: Instant, nack: Nack, messages: &mut Channel) {
        let slack = Duration::from_millis(nack.slack_ms.into());
        let deadline = repair_queue::deadline(now, slack, self.round_trip);
        let mut gone = Vec::new();
        for seq in nack.seqs {
            if !self.retransmitter.is_new(now, SSRC, seq) {
                continue;
            }
            match self.history.packet(seq) {
                Some(packet) => {
                    messages.send(now, encode_repair(&packet));
                    let within = deadline.saturating_duration_since(now);
                    self.retransmitter.schedule_copies(now, packet, nack.copies - 1, within);
                }
                None => gone.push(seq),
            }
        }
        for datagram in (Gone { ssrc: SSRC, seqs: gone }).encode(MTU) {
            messages.send(now, datagram);
        }
    }

    fn send_copies(&mut self, now: Instant, messages: &mut Channel) {
        while let Some(packet) = self.retransmitter.poll_copy(now) {
            messages.send(now, encode_repair(&packet));
        }
    }
}

/// The receiving end: repairs the stream and reassembles its tags.
struct Player {
    receiver: Receiver,
    depacketizer: Depacketizer,
    tags: u64,
}

impl Player {
    fn new(latency: Duration, first: Seq) -> Self {
        let settings = Settings { latency, join_latency: latency, ..Settings::default() };
        Self {
            receiver: Receiver::starting_at(settings, first),
            depacketizer: Depacketizer::new(),
            tags: 0,
        }
    }

    fn handle_rtp(&mut self, now: Instant, datagram: Bytes, path: Path) {
        // A program with sockets would count malformed datagrams instead of ignoring them.
        if let Ok(packet) = Packet::parse(datagram) {
            self.receiver.handle_packet(now, packet, path);
        }
    }

    fn handle_message(&mut self, now: Instant, datagram: Bytes) {
        match Message::parse(datagram) {
            Ok(Message::Repair(packet)) => self.handle_rtp(now, packet, Path::Repair),
            Ok(Message::Gone(gone)) => self.receiver.handle_gone(now, gone.seqs),
            Ok(Message::Heartbeats(heartbeats)) => {
                for heartbeat in heartbeats {
                    self.receiver.handle_heartbeat(now, heartbeat.last);
                }
            }
            Ok(Message::Nack(_)) | Err(_) => {}
        }
    }

    /// Polls everything that the last inputs made ready.
    fn poll(&mut self, now: Instant, requests: &mut Channel) {
        self.receiver.handle_timeout(now);
        while let Some(request) = self.receiver.poll_request(now) {
            let slack_ms = request.slack_ms(now);
            let nack = Nack { ssrc: SSRC, copies: request.copies, slack_ms, seqs: request.seqs };
            for datagram in nack.encode(MTU) {
                requests.send(now, datagram);
            }
        }
        while let Some(event) = self.receiver.poll_event() {
            match event {
                Event::Packet(packet) => {
                    self.tags += u64::from(self.depacketizer.packet(&packet).is_some());
                }
                Event::Lost(packets) => {
                    // The rest of an incomplete tag is useless: do not wait for it.
                    if let Some(last) = self.depacketizer.lost(packets) {
                        self.receiver.abandon_through(now, last);
                    }
                }
                Event::Restart(_) => self.depacketizer = Depacketizer::joining(),
            }
        }
    }
}

struct Simulation {
    start: Instant,
    sender: Sender,
    player: Player,
    rtp: Channel,
    messages: Channel,
    requests: Channel,
    latency: Duration,
}

impl Simulation {
    fn new(loss: f64, delay: Duration, latency: Duration, seed: u64) -> Self {
        let sender = Sender::new(2 * delay);
        let mut player = Player::new(latency, sender.packetizer.next_seq());
        let start = Instant::now();
        // In a real program, the round trip of the connection that carries the messages.
        player.receiver.set_round_trip(start, 2 * delay, delay / 4);
        let channel = |n: u64| Channel::new(loss, delay, seed.wrapping_mul(3).wrapping_add(n));
        Self {
            start,
            sender,
            player,
            rtp: channel(0),
            messages: channel(1),
            requests: channel(2),
            latency,
        }
    }

    fn run(mut self) -> Summary {
        let end = self.start + TAGS * TAG_INTERVAL;
        let drained = end + self.latency + Duration::from_secs(1);
        let (mut now, mut tags) = (self.start, 0);
        let mut heartbeat = now;
        while now < drained {
            while tags < TAGS && self.start + tags * TAG_INTERVAL <= now {
                self.sender.send_tag(now, &tag(tags), &mut self.rtp);
                tags += 1;
            }
            if heartbeat <= now {
                self.sender.send_heartbeat(now, &mut self.messages);
                heartbeat += HEARTBEAT_INTERVAL;
            }
            while let Some(datagram) = self.requests.receive(now) {
                if let Ok(Message::Nack(nack)) = Message::parse(datagram) {
                    self.sender.handle_request(now, nack, &mut self.messages);
                }
            }
            self.sender.send_copies(now, &mut self.messages);
            while let Some(datagram) = self.rtp.receive(now) {
                self.player.handle_rtp(now, datagram, Path::Live(0));
            }
            while let Some(datagram) = self.messages.receive(now) {
                self.player.handle_message(now, datagram);
            }
            self.player.poll(now, &mut self.requests);

            let next_tag = (tags < TAGS).then(|| self.start + tags * TAG_INTERVAL);
            let timers = [
                next_tag,
                Some(heartbeat),
                self.rtp.next_arrival(),
                self.messages.next_arrival(),
                self.requests.next_arrival(),
                self.sender.retransmitter.poll_timeout(),
                self.player.receiver.poll_timeout(),
            ];
            now = timers.into_iter().flatten().min().unwrap_or(drained).max(now);
        }
        Summary {
            sent: self.sender.packets,
            lost_live: self.rtp.lost,
            tags: self.player.tags,
            stats: self.player.receiver.stats(),
        }
    }
}

struct Summary {
    sent: u64,
    lost_live: u64,
    tags: u64,
    stats: Stats,
}

impl Summary {
    fn print(&self) {
        let Stats { repaired, requests, too_late, lost, duplicate, .. } = self.stats;
        let share = |count: u64| 100.0 * count as f64 / self.sent as f64;
        println!("packets sent       {:>7}", self.sent);
        println!("lost by the channel{:>7}  {:.2} %", self.lost_live, share(self.lost_live));
        let total: u64 = repaired.iter().sum();
        println!("repaired           {total:>7}  by try 1, 2, later: {repaired:?}");
        println!("late               {too_late:>7}  arrived after they were given up");
        println!("lost for good      {lost:>7}  {:.4} %", share(lost));
        println!("duplicates         {duplicate:>7}  superfluous repairs");
        println!("requested          {requests:>7}  sequence numbers, repetitions included");
        println!("whole tags         {:>7}  of {TAGS}", self.tags);
    }
}

/// A video frame every 40 ms: a large one once per second, smaller ones between.
fn tag(index: u32) -> Tag {
    let len = if index.is_multiple_of(25) { 60_000 } else { 8_000 };
    let timestamp = index * TAG_INTERVAL.as_millis() as u32;
    Tag::new(TagKind::Video, timestamp, &vec![0; len]).expect("shorter than 16 MiB")
}

const SSRC: Ssrc = Ssrc(7);
/// Longest message datagram in bytes.
const MTU: usize = 1200;
const TAGS: u32 = 1500;
const TAG_INTERVAL: Duration = Duration::from_millis(40);
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(100);
