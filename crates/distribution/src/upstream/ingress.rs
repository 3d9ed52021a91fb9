//! What the edge does with what comes: RTP and the repair connection's events in, tags into the hub,
//! requests out. [`super::receive`] has the threads.

use std::{
    io,
    net::{IpAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{
    intake::Streams,
    livestat::{self, LiveStream, LivestatError},
    prober::ProbeMetrics,
    socket::{CloudRtp, Lookups, RtpSocket},
    stats::ReceiveMetrics,
};
use crate::{
    protocol::Protocol,
    upstream::repair_client::{ClientError, RepairEvent, RepairHandle},
};
use downpour_repair::{
    control::{Nonce, Report, Welcome},
    probe::{ProbeMessage, is_probe_message},
    receiver::Path,
    rtp::{
        Ssrc,
        flexfec::Repair,
        packet::{HEADER_LEN, PAYLOAD_TYPE},
    },
};
use downpour_sys::recvmmsg::{GroDatagrams, RecvBatch};

/// Where the cloud is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cloud {
    /// Its name or address; empty while it is to be learned from the first datagram.
    pub host: String,
    /// Where it answers QUIC, if elsewhere.
    pub quic_host: Option<String>,
    /// Its port for repair.
    pub quic_port: u16,
    /// Where it answers HTTP, if elsewhere.
    pub api_host: Option<String>,
    /// Its port for the HTTP API.
    pub api_port: u16,
}

impl Cloud {
    /// `host:port` of its repair service.
    pub fn quic(&self) -> String {
        host_port(self.quic_host.as_deref().unwrap_or(&self.host), self.quic_port)
    }

    /// `host:port` of its API.
    pub fn api(&self) -> String {
        host_port(self.api_host.as_deref().unwrap_or(&self.host), self.api_port)
    }
}

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

/// A repair connection, which ends when this is dropped.
pub(super) struct Connection {
    handle: RepairHandle,
    events: mpsc::Receiver<RepairEvent>,
    cancel: CancellationToken,
    protocol: Option<Protocol>,
}

impl Connection {
    /// Closes it, and waits until that has been told. Answers that are under way to an existing cloud's
    /// edge are taken, because that cloud does not stand it when they are not.
    pub(super) async fn close(mut self) {
        self.cancel.cancel();
        let handle = self.handle.clone();
        let closed = async {
            while self.events.recv().await.is_some() {}
            handle.closed().await;
        };
        if tokio::time::timeout(CLOSE_PATIENCE, closed).await.is_err() {
            tracing::debug!("the repair connection does not close in time");
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
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

    fn handle_event(&mut self, event: Option<RepairEvent>) {
        let now = Instant::now();
        let Some(event) = event else {
            // The client ends only when it is told to.
            self.repair = None;
            self.stop_probing();
            return;
        };
        let intake = &mut self.intake;
        match event {
            RepairEvent::Connected { protocol } => {
                intake.set_told(now, protocol == Protocol::Downpour);
                if let Some(repair) = &mut self.repair {
                    repair.protocol = Some(protocol);
                }
            }
            RepairEvent::Disconnected { .. } => {
                intake.set_told(now, false);
                if let Some(repair) = &mut self.repair {
                    repair.protocol = None;
                }
                self.stop_probing();
            }
            RepairEvent::Welcome(welcome) => self.start_probing(now, &welcome),
            RepairEvent::PathUp { path, address } => {
                tracing::info!(path, %address, "the cloud sends RTP to this edge");
                for socket in &mut self.sockets {
                    socket.path_up(now, path, &self.probe_metrics);
                }
            }
            RepairEvent::StreamUp(up) => {
                // It asks for a whole group of pictures at once, and times its retries by this.
                if let Some(rtt) = self.repair.as_ref().and_then(|repair| repair.handle.rtt()) {
                    intake.expect_round_trip(rtt, rtt / 8);
                }
                intake.stream_up(now, up);
            }
            RepairEvent::StreamUpdate { ssrc, headers } => intake.stream_update(ssrc, headers),
            RepairEvent::StreamEnd { ssrc, last_seq } => intake.stream_end(now, ssrc, last_seq),
            RepairEvent::Repair(packet) => {
                intake.handle_packet(now, packet, Path::Repair);
            }
            RepairEvent::Gone(gone) => intake.gone(now, gone.ssrc, &gone.seqs),
            RepairEvent::Heartbeats(beats) => intake.heartbeats(now, &beats),
        }
    }

    fn start_probing(&mut self, now: Instant, welcome: &Welcome) {
        let Some(cloud) = &self.cloud else { return };
        let rtp = CloudRtp { host: cloud.host.clone(), port: welcome.rtp_port };
        self.nonce = Some(welcome.nonce);
        self.found.clear();
        for socket in &mut self.sockets {
            socket.start(now, welcome.nonce, &rtp, &mut self.found);
        }
        self.begun = true;
    }

    fn stop_probing(&mut self) {
        self.nonce = None;
        self.found.clear();
        for socket in &mut self.sockets {
            socket.stop(&self.probe_metrics);
        }
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

    /// Asks the HTTP API for names where the repair connection does not tell them.
    fn look_up(&mut self, now: Instant) {
        let Some(cloud) = &self.cloud else { return };
        let told = self.protocol() == Some(Protocol::Downpour);
        // A connection that is just being made may tell soon.
        let wait = match (&self.repair, self.protocol()) {
            (Some(_), None) => WAIT_FOR_NAME,
            _ => Duration::ZERO,
        };
        let unnamed = !told && self.intake.unnamed(now, wait).next().is_some();
        let maybe_over = !told && self.intake.any_silent(now, SILENCE_IS_SUSPECT);
        let recently = self.last_lookup.is_some_and(|at| now.duration_since(at) < LOOK_UP_EVERY);
        if !(unnamed || maybe_over) || recently || self.lookup.is_some() {
            return;
        }
        self.last_lookup = Some(now);
        let address = cloud.api();
        self.lookup = Some(tokio::spawn(async move { livestat::fetch(&address).await }));
        self.begun = true;
    }

    fn handle_lookup(&mut self, found: Result<Vec<LiveStream>, LivestatError>) {
        let now = Instant::now();
        let found = match found {
            Ok(found) => found,
            Err(error) => {
                let reason = error.to_string();
                if reason != self.lookup_failure {
                    tracing::warn!("cannot ask the cloud's API for stream names: {reason}");
                    self.lookup_failure = reason;
                }
                return;
            }
        };
        self.lookup_failure.clear();
        let unnamed: Vec<_> = self.intake.unnamed(now, Duration::ZERO).collect();
        let listed: Vec<Ssrc> = found.iter().map(|stream| stream.ssrc).collect();
        for stream in found.into_iter().filter(|stream| unnamed.contains(&stream.ssrc)) {
            self.intake.stream_named(now, stream);
        }
        if self.protocol() != Some(Protocol::Downpour) {
            self.intake.retain_streams(now, &listed, SILENCE_IS_SUSPECT);
        }
    }

    fn must_learn(&self) -> bool {
        self.settings.cloud.host.is_empty()
    }

    fn protocol(&self) -> Option<Protocol> {
        self.repair.as_ref()?.protocol
    }

    /// RTP came before any announcement: the ports are the configured ones until one comes.
    fn learn_from_source(&mut self, ip: IpAddr) {
        let host = ip.to_canonical().to_string();
        self.learn(Cloud { host, ..self.settings.cloud.clone() });
    }

    fn learn(&mut self, cloud: Cloud) {
        if self.cloud.as_ref() == Some(&cloud) {
            return;
        }
        // A cloud that still answers is not given up for another that shares the group.
        if self.cloud.as_ref().is_some_and(|old| old.host != cloud.host)
            && self.protocol().is_some()
        {
            return;
        }
        tracing::info!(
            "the cloud is {}: repair at {}, API at {}",
            cloud.host,
            cloud.quic(),
            cloud.api()
        );
        self.connect(cloud);
    }

    fn connect(&mut self, cloud: Cloud) {
        if let Some(connect) = &self.settings.connect {
            let (events_in, events) = mpsc::channel(EVENT_QUEUE);
            let cancel = CancellationToken::new();
            self.repair = match connect(&cloud.quic(), events_in, cancel.clone()) {
                Ok(handle) => Some(Connection { handle, events, cancel, protocol: None }),
                Err(error) => {
                    tracing::error!("no repair from {}: {error}", cloud.quic());
                    None
                }
            };
            self.intake.set_told(Instant::now(), false);
            self.stop_probing();
            self.begun = true;
        }
        self.cloud = Some(cloud);
    }
}

fn host_port(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
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
const WAIT_FOR_NAME: Duration = Duration::from_secs(1);
const LOOK_UP_EVERY: Duration = Duration::from_secs(1);
/// A stream that has been silent for so long may have ended without our being told.
const SILENCE_IS_SUSPECT: Duration = Duration::from_secs(3);
/// Events in a row before what is due has its turn: fewer than those after which tokio would have
/// this task yield.
const MAX_EVENTS: usize = 64;
/// Longer than each of the client's waits at its end.
const CLOSE_PATIENCE: Duration = Duration::from_millis(1500);
const EVENT_QUEUE: usize = 4096;

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};

    use super::*;
    use crate::{
        tls::Trust,
        upstream::{
            intake,
            repair_client::{
                ProtocolChoice, RepairClient, RepairClientMetrics, RepairClientSettings,
            },
        },
    };
    use downpour_hub::{Hub, LogLimits};
    use downpour_media::flv::{Headers, Tag, TagKind};
    use downpour_repair::{
        control::StreamInfo,
        receiver,
        rtp::{Packetizer, Seq},
    };

    /// An ingress with two sockets, the hub that it fills, where its sockets are, and what the repair
    /// connection would send events with.
    struct Rig {
        ingress: Upstream,
        hub: Hub,
        rtp: [SocketAddr; 2],
        events: mpsc::UnboundedReceiver<mpsc::Sender<RepairEvent>>,
    }

    fn rig(on_start: impl Fn(&Arc<downpour_hub::Stream>) + Send + 'static) -> Rig {
        let registry = prometheus::Registry::new();
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 60_000 });
        let metrics = ReceiveMetrics::register(&registry).unwrap();
        let settings = intake::Settings {
            receiver: receiver::Settings::default(),
            silence: Duration::from_secs(10),
            max_streams: 1000,
        };
        let intake = Streams::new(settings, hub.clone(), metrics.clone(), on_start);
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let rtp = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
        // Where nobody answers: what the cloud says, the test says.
        let nobody = UdpSocket::bind("127.0.0.1:0").unwrap();
        let quic_port = nobody.local_addr().unwrap().port();
        let (events_in, events) = mpsc::unbounded_channel();
        let client_metrics = RepairClientMetrics::register(&registry).unwrap();
        let connect: Connect = Box::new(move |cloud, events, shutdown| {
            let _ = events_in.send(events);
            let _held = &nobody;
            let settings = RepairClientSettings {
                cloud: cloud.to_owned(),
                protocol: ProtocolChoice::Auto,
                trust: Trust::Insecure,
                node: "test".into(),
                token: None,
                streams: Vec::new(),
                rtp_port: None,
                rtp_paths: 0,
                group: None,
                parity: false,
                latency: Duration::from_millis(500),
            };
            let (unused, _) = mpsc::channel(1);
            RepairClient::spawn(settings, unused, client_metrics.clone(), shutdown)
        });
        let cloud = Cloud {
            host: "127.0.0.1".into(),
            quic_host: None,
            quic_port,
            api_host: None,
            api_port: 9,
        };
        let settings = Settings { cloud, pack_loss: 0.0, connect: Some(connect) };
        let probe_metrics = ProbeMetrics::register(&registry).unwrap();
        let sockets = sockets.map(RtpSocket::new).into();
        let ingress = Upstream::new(sockets, Vec::new(), settings, intake, metrics, probe_metrics);
        Rig { ingress, hub, rtp, events }
    }

    fn up(number: u32) -> RepairEvent {
        RepairEvent::StreamUp(StreamInfo {
            key: format!("live/{number}").parse().unwrap(),
            ssrc: Ssrc(number),
            start_unix_ms: 0,
            headers: Headers::default(),
            gop_start: None,
            newest: None,
        })
    }

    async fn wait_until(what: &str, so: impl Fn() -> bool) {
        let began = Instant::now();
        while !so() {
            assert!(began.elapsed() < Duration::from_secs(20), "waited too long until {what}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn an_event_is_taken_promptly_while_nothing_comes_and_shutdown_ends_the_streams() {
        let Rig { ingress, hub, mut events, .. } = rig(|_| ());
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(ingress.run(shutdown.clone()));
        let events = events.recv().await.unwrap();
        events.send(RepairEvent::Connected { protocol: Protocol::Downpour }).await.unwrap();
        let mut quickest = Duration::MAX;
        for number in 1..=10 {
            // It sleeps by now, with nothing to wake it but a tick each 500 ms.
            tokio::time::sleep(Duration::from_millis(10)).await;
            let began = Instant::now();
            events.send(up(number)).await.unwrap();
            wait_until("the stream is up", || hub.len() == number as usize).await;
            quickest = quickest.min(began.elapsed());
        }
        // Other tests may hold one of them up, but not all.
        assert!(quickest < Duration::from_millis(20), "{quickest:?}");
        shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(20), running).await.unwrap().unwrap();
        assert!(hub.is_empty());
    }

    #[tokio::test]
    async fn a_lone_packet_is_read_at_once_and_what_is_lost_is_asked_for() {
        let Rig { ingress, hub, rtp, mut events } = rig(|_| ());
        let metrics = ingress.metrics.clone();
        let _running = tokio::spawn(ingress.run(CancellationToken::new()));
        let events = events.recv().await.unwrap();
        events.send(up(7)).await.unwrap();
        wait_until("the stream is up", || hub.len() == 1).await;
        let stream = hub.stream("live/7").unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut packetizer = Packetizer::new(Ssrc(7), 1120);
        let mut quickest = Duration::MAX;
        for number in 1..=10u32 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            let tag = Tag::new(TagKind::Audio, number * 20, &[0xaf, 1, number as u8]).unwrap();
            let began = Instant::now();
            sender.send_to(packetizer.packetize(&tag).bytes(), rtp[0]).unwrap();
            wait_until("the tag is there", || stream.held().0 == number as usize).await;
            quickest = quickest.min(began.elapsed());
        }
        assert!(quickest < Duration::from_millis(20), "{quickest:?}");
        // Two are left out, and the third shows it.
        let tag = Tag::new(TagKind::Audio, 300, &[0xaf, 1]).unwrap();
        let last = (0..3).map(|_| packetizer.packetize(&tag)).last().unwrap();
        assert_eq!(last.first_seq(), Seq::FIRST.plus(12));
        sender.send_to(last.bytes(), rtp[0]).unwrap();
        wait_until("both are asked for", || {
            metrics.streams().first().is_some_and(|stream| stream.report.asked == 2)
        })
        .await;
        assert_eq!(stream.held().0, 10);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_socket_that_never_runs_dry_does_not_shut_out_the_other() {
        let Rig { ingress, hub, rtp, mut events } = rig(|_| ());
        let _running = tokio::spawn(ingress.run(CancellationToken::new()));
        let events = events.recv().await.unwrap();
        events.send(up(7)).await.unwrap();
        wait_until("the stream is up", || hub.len() == 1).await;
        let stream = hub.stream("live/7").unwrap();
        let over = CancellationToken::new();
        let _over = over.clone().drop_guard();
        for _ in 0..2 {
            let over = over.clone();
            thread::spawn(move || {
                let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
                let state = UdpSocketState::new(UdpSockRef::from(&socket)).unwrap();
                // Many to a call, so that they come faster than they are read.
                let noise = Transmit {
                    destination: rtp[0],
                    ecn: None,
                    contents: &[7; 64 * 8],
                    segment_size: Some(8),
                    src_ip: None,
                };
                while !over.is_cancelled() {
                    let _ = state.try_send(UdpSockRef::from(&socket), &noise);
                }
            });
        }
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut packetizer = Packetizer::new(Ssrc(7), 1120);
        for number in 1..=20u32 {
            let tag = Tag::new(TagKind::Audio, number * 20, &[0xaf, 1, number as u8]).unwrap();
            let burst = packetizer.packetize(&tag);
            // The flood may fill the loopback interface's queue.
            let began = Instant::now();
            while stream.held().0 < number as usize {
                assert!(began.elapsed() < Duration::from_secs(20), "tag {number} is not read");
                sender.send_to(burst.bytes(), rtp[1]).unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    }

    #[tokio::test]
    async fn a_panic_on_the_thread_is_one_of_the_task() {
        let Rig { ingress, mut events, hub, .. } = rig(|_| panic!("on purpose"));
        let running = tokio::spawn(ingress.run(CancellationToken::new()));
        events.recv().await.unwrap().send(up(7)).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(20), running).await.unwrap();
        assert!(ended.unwrap_err().is_panic());
        assert!(hub.is_empty());
    }

    #[tokio::test]
    async fn the_thread_ends_with_the_task() {
        struct Counted(Arc<AtomicUsize>);
        impl Drop for Counted {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::SeqCst);
            }
        }
        let alive = Arc::new(AtomicUsize::new(1));
        let counted = Counted(alive.clone());
        let Rig { ingress, mut events, hub, .. } = rig(move |_| _ = &counted);
        let running = tokio::spawn(ingress.run(CancellationToken::new()));
        events.recv().await.unwrap().send(up(7)).await.unwrap();
        wait_until("the stream is up", || hub.len() == 1).await;
        running.abort();
        wait_until("the thread has ended", || alive.load(Ordering::SeqCst) == 0).await;
        assert!(hub.is_empty());
    }
}
