//! What the edge does with what comes: RTP and the repair connection's events in, tags into the hub,
//! requests out. [`super::receive`] has the threads.

mod cloud;
mod repair_events;
mod stream_names;

pub use cloud::Cloud;

use std::{
    io,
    net::UdpSocket,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use self::cloud::Connection;
use super::{
    livestat::{LiveStream, LivestatError},
    prober::ProbeMetrics,
    socket::{Lookups, RtpSocket},
    stats::ReceiveMetrics,
    streams::Streams,
};
use crate::upstream::repair_client::{ClientError, RepairEvent, RepairHandle};
use downpour_repair::{
    control::{Nonce, Report},
    probe::{ProbeMessage, is_probe_message},
    rtp::{
        flexfec::Repair,
        packet::{HEADER_LEN, PAYLOAD_TYPE},
    },
};
use downpour_sys::recvmmsg::{GroDatagrams, RecvBatch};

/// How to receive.
pub struct Settings {
    /// The cloud, or the ports to assume of the one whose datagrams come first.
    pub cloud: Cloud,
    /// Share of received packets to drop on purpose, 0..=1.
    pub pack_loss: f64,
    /// Opens the repair connection to a cloud; `None` receives without repair.
    pub connect: Option<Connect>,
}

/// Opens a repair connection to `host:port` whose events go to the sender, until the token is
/// cancelled.
pub type Connect = Box<
    dyn Fn(&str, mpsc::Sender<RepairEvent>, CancellationToken) -> Result<RepairHandle, ClientError>
        + Send
        + Sync,
>;

/// Receives until it is told to stop.
pub struct Upstream {
    /// Of RTP, and behind them of parity.
    sockets: Vec<RtpSocket>,
    /// How many of them take RTP.
    rtp_sockets: usize,
    /// How many of those were not given up.
    rtp_left: usize,
    settings: Settings,
    intake: Streams,
    metrics: ReceiveMetrics,
    probe_metrics: ProbeMetrics,
    /// The cloud's RTP port is being found.
    found: Lookups,
    /// That of the connection there is.
    nonce: Option<Nonce>,
    cloud: Option<Cloud>,
    repair: Option<Connection>,
    lookup: Option<JoinHandle<Result<Vec<LiveStream>, LivestatError>>>,
    last_lookup: Option<Instant>,
    /// What was last logged about a look-up that failed.
    lookup_failure: String,
    next_tick: Instant,
    last_report: Instant,
    /// Something asynchronous has begun that was not polled yet, so that it would not wake anybody.
    begun: bool,
    rng: SmallRng,
}

impl Upstream {
    /// Receives RTP on one socket or on two, and nothing but parity on up to two others.
    pub fn new(
        rtp: Vec<RtpSocket>,
        parity: Vec<RtpSocket>,
        settings: Settings,
        intake: Streams,
        metrics: ReceiveMetrics,
        probe_metrics: ProbeMetrics,
    ) -> Self {
        Self {
            rtp_sockets: rtp.len(),
            rtp_left: rtp.len(),
            sockets: rtp.into_iter().chain(parity).collect(),
            intake,
            metrics,
            probe_metrics,
            found: Lookups::default(),
            nonce: None,
            cloud: None,
            repair: None,
            lookup: None,
            last_lookup: None,
            lookup_failure: String::new(),
            next_tick: Instant::now(),
            last_report: Instant::now(),
            begun: true,
            rng: SmallRng::from_os_rng(),
            settings,
        }
    }

    /// Connects, if the cloud is known. The repair connection's tasks, now and later, are in the
    /// runtime of who calls.
    pub(super) fn begin(&mut self) {
        if !self.must_learn() {
            self.connect(self.settings.cloud.clone());
        }
    }

    /// The repair connection there is. There will be no other.
    pub(super) fn take_repair(&mut self) -> Option<Connection> {
        self.settings.connect = None;
        self.repair.take()
    }

    /// Reads from each of these, in their order.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Arc<UdpSocket>> {
        self.sockets.iter().map(RtpSocket::socket)
    }

    /// Says that this was read: what is needed of memory to take it is fetched.
    pub(super) fn expect(&self, reads: &RecvBatch) {
        self.intake.expect(reads.trains().filter_map(|train| train.datagrams().next()));
    }

    /// Takes what was read from socket `i`.
    pub(super) fn handle_reads(&mut self, now: Instant, i: usize, reads: &RecvBatch) {
        if let Some(socket) = self.sockets.get_mut(i) {
            socket.heard(now);
        }
        for train in reads.trains() {
            for datagram in train.datagrams() {
                self.handle_datagram(now, i, &train, datagram);
            }
        }
        if self.intake.saw_unknown_ssrc() {
            // Only so many of its packets are held until its name is known.
            self.look_up(now);
        }
        self.intake.handle_timeout(now);
        self.send_requests();
    }

    /// Socket `i` is not read any more; whether RTP can still come by another.
    pub(super) fn give_up(&mut self, i: usize) -> bool {
        self.rtp_left -= usize::from(i < self.rtp_sockets);
        self.rtp_left > 0
    }

    /// Does what is due.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.intake.handle_timeout(now);
        if self.next_tick <= now {
            self.next_tick = now + TICK;
            self.tick(now);
        }
        self.send_requests();
        for socket in &mut self.sockets {
            socket.probe(now, &self.probe_metrics);
        }
    }

    /// When to call [`Upstream::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Instant {
        let probe = self.sockets.iter().filter_map(RtpSocket::poll_timeout).min();
        [self.intake.poll_timeout(), probe].into_iter().flatten().fold(self.next_tick, Instant::min)
    }

    /// When a stream is due; not when anything else is.
    pub(super) fn poll_intake_timeout(&self) -> Option<Instant> {
        self.intake.poll_timeout()
    }

    /// Whether [`Upstream::handle_inputs`] is to be called, though nothing has woken for it.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Takes what look-ups and the repair connection have; what comes later wakes `cx`.
    pub(super) fn handle_inputs(&mut self, cx: &mut Context<'_>) {
        self.begun = false;
        if let Some(lookup) = &mut self.lookup
            && let Poll::Ready(found) = Pin::new(lookup).poll(cx)
        {
            self.lookup = None;
            self.handle_lookup(found.unwrap_or_else(|error| Err(io::Error::other(error).into())));
        }
        while let Poll::Ready((path, nonce, cloud)) = self.found.poll_next(cx) {
            if self.nonce == Some(nonce) {
                self.sockets.iter_mut().for_each(|socket| socket.set_cloud(path, cloud));
            }
        }
        for _ in 0..MAX_EVENTS {
            let Some(repair) = &mut self.repair else { return };
            let Poll::Ready(event) = repair.events.poll_recv(cx) else { return };
            self.handle_event(event);
        }
        // There may be more.
        self.begun = true;
    }

    fn handle_datagram(
        &mut self,
        now: Instant,
        i: usize,
        train: &GroDatagrams<'_>,
        datagram: &[u8],
    ) {
        let is_rtp = is_rtp(datagram);
        if i >= self.rtp_sockets || (!is_rtp && Repair::is_one(datagram)) {
            if !self.throws_away() {
                self.intake.handle_parity(now, Bytes::copy_from_slice(datagram));
            }
            return;
        }
        if !is_rtp && self.handle_other(i, train, datagram) {
            return;
        }
        if is_rtp
            && self.must_learn()
            && self.cloud.is_none()
            && let Some(from) = train.from()
        {
            self.learn_from_source(from.ip());
        }
        if self.throws_away() {
            return;
        }
        // There are two sockets of RTP at most.
        self.intake.handle_live(now, datagram, i as u8);
    }

    /// Takes a datagram that is a probe message or an announcement; whether it was.
    fn handle_other(&mut self, i: usize, train: &GroDatagrams<'_>, datagram: &[u8]) -> bool {
        if is_probe_message(datagram) {
            if let (Some(from), Some(socket), Ok((message, _))) =
                (train.from(), self.sockets.get(i), ProbeMessage::parse(datagram))
            {
                socket.handle_probe_message(from, message, &self.probe_metrics);
            }
            return true;
        }
        let Some((quic_port, api_port)) = parse_announcement(datagram) else { return false };
        if self.must_learn()
            && let Some(from) = train.from()
        {
            let host = from.ip().to_canonical().to_string();
            self.learn(Cloud { host, quic_port, api_port, ..self.settings.cloud.clone() });
        }
        true
    }

    /// Whether to lose the next packet on purpose.
    fn throws_away(&mut self) -> bool {
        let lost = self.settings.pack_loss > 0.0 && self.rng.random_bool(self.settings.pack_loss);
        if lost {
            self.metrics.pack_loss.inc();
        }
        lost
    }

    fn send_requests(&mut self) {
        while let Some(nack) = self.intake.poll_nack() {
            match &self.repair {
                Some(repair) => repair.handle.nack(nack),
                None => self.metrics.nacks_dropped.inc(),
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        if let Some(repair) = &self.repair {
            if let Some(round_trip) = repair.handle.rtt() {
                self.intake.set_round_trip(now, round_trip, round_trip / 8);
            }
            if now.duration_since(self.last_report) >= REPORT_EVERY {
                self.last_report = now;
                let round_trip_us = repair.handle.rtt().map_or(0, |rtt| rtt.as_micros() as u64);
                let streams = self.intake.reports(MAX_REPORTS);
                repair.handle.report(Report { round_trip_us, streams });
            }
        }
        self.intake.tick(now);
        self.look_up(now);
        self.sockets.iter_mut().for_each(|socket| socket.complain(now));
    }
}

/// Whether a datagram looks like RTP of wire v0.
fn is_rtp(datagram: &[u8]) -> bool {
    datagram.len() > HEADER_LEN
        && datagram[0] == VERSION_2_ONLY
        && datagram[1] & 0x7f == PAYLOAD_TYPE
}

/// The cloud's 8 bytes: ASCII `0001`, QUIC port, API port (wire v0).
fn parse_announcement(datagram: &[u8]) -> Option<(u16, u16)> {
    let ports = datagram.strip_prefix(b"0001")?;
    let &[q0, q1, a0, a1] = ports else { return None };
    Some((u16::from_be_bytes([q0, q1]), u16::from_be_bytes([a0, a1])))
}

/// The first byte of an RTP header: version 2, no padding, extension or CSRC.
const VERSION_2_ONLY: u8 = 2 << 6;
const TICK: Duration = Duration::from_millis(500);
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Streams in one report: 600 kB at most. With more of them they take turns.
const MAX_REPORTS: usize = 1000;
/// Events in a row before what is due has its turn: fewer than those after which tokio would have
/// this task yield.
const MAX_EVENTS: usize = 64;
