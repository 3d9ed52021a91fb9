//! Sends bursts of RTP to many addresses, on threads of its own.

mod outlet;
pub mod routes;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    slice,
    sync::{
        Arc, Weak,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, SyncSender},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use prometheus::{
    IntCounter, IntCounterVec, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};

use self::{
    outlet::Outlet,
    routes::{Routes, Target},
};
use crate::{
    repair::server::GroupSender,
    rtp::Burst,
    udp::{self, MulticastOut},
};

/// Where and how to send.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The local port of RTP, on all interfaces; 0 picks a free one.
    pub port: u16,
    /// Options for multicast destinations.
    pub multicast: MulticastOut,
    /// Bytes to ask of the kernel for the send buffer.
    pub send_buffer: usize,
    /// Bytes of bursts that may wait for the sending thread; more are not sent but counted, and
    /// edges find them in the history.
    pub queue_bytes: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            port: 5220,
            multicast: MulticastOut::default(),
            send_buffer: 4 << 20,
            queue_bytes: 64 << 20,
        }
    }
}

/// Handle of the sending thread, which ends with the last handle. Cloning shares it.
#[derive(Clone)]
pub struct Fanout {
    shared: Arc<Shared>,
    queue: SyncSender<Job>,
}

struct Shared {
    routes: Routes,
    queued_bytes: AtomicUsize,
    queue_limit: usize,
    local_port: u16,
    metrics: FanoutMetrics,
}

/// Takes what comes to the RTP port: from where, and the bytes of one or more datagrams of that
/// sender, one behind the other. What it gives is sent back there, each as one datagram.
pub type OnDatagrams = Arc<dyn Fn(SocketAddr, &[u8]) -> Vec<Bytes> + Send + Sync>;

enum Job {
    Burst(Burst, Arc<[Target]>),
    /// One small datagram to several: the port announcement.
    Datagram(Bytes, Arc<[Target]>),
    /// One packet to one group: a repair for all of its members.
    Packet(Bytes, Target),
    /// Parity of what went before.
    Parity(Train, Arc<[Target]>),
}

/// Packets of one length, one behind the other; the last one may be shorter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Train {
    bytes: Bytes,
    stride: usize,
}

impl Train {
    /// Puts packets together, in their order, into as few trains as their lengths allow.
    pub fn collect(packets: impl IntoIterator<Item = Bytes>) -> Vec<Self> {
        let mut trains: Vec<(BytesMut, usize)> = Vec::new();
        for packet in packets.into_iter().filter(|packet| !packet.is_empty()) {
            match trains.last_mut() {
                // Behind a shorter one, none can follow.
                Some((bytes, stride))
                    if packet.len() <= *stride && bytes.len().is_multiple_of(*stride) =>
                {
                    bytes.extend_from_slice(&packet);
                }
                _ => trains.push((BytesMut::from(&packet[..]), packet.len())),
            }
        }
        trains.into_iter().map(|(bytes, stride)| Self { bytes: bytes.freeze(), stride }).collect()
    }

    /// How many they are.
    pub fn packets(&self) -> usize {
        self.bytes.len().div_ceil(self.stride)
    }
}

impl Fanout {
    /// Binds the RTP port and starts its threads, which end with the last handle.
    ///
    /// # Errors
    /// If the port is taken, an option is refused or no thread can be started.
    pub fn spawn(
        settings: &Settings,
        routes: Routes,
        on_datagrams: &OnDatagrams,
        metrics: FanoutMetrics,
    ) -> io::Result<Self> {
        let bind = |ip: IpAddr, port| {
            let addr = SocketAddr::new(ip, port);
            Outlet::new(udp::sender(addr, settings.send_buffer, settings.multicast)?)
        };
        let v4 = bind(Ipv4Addr::UNSPECIFIED.into(), settings.port)?;
        let local_port = v4.socket().local_addr()?.port();
        // A machine without IPv6 seldom has IPv6 edges; if it has, that is told when one is sent to.
        let v6 = bind(Ipv6Addr::UNSPECIFIED.into(), local_port);
        let shared = Arc::new(Shared {
            routes,
            queued_bytes: AtomicUsize::new(0),
            queue_limit: settings.queue_bytes,
            local_port,
            metrics,
        });
        for outlet in [Some(&v4), v6.as_ref().ok()].into_iter().flatten() {
            let socket = outlet.socket().try_clone()?;
            socket.set_read_timeout(Some(LISTEN_TIMEOUT))?;
            let (on_datagrams, metrics) = (on_datagrams.clone(), shared.metrics.clone());
            let alive = Arc::downgrade(&shared);
            thread::Builder::new()
                .name("rtp-port".into())
                .spawn(move || listen(&socket, &on_datagrams, &metrics, &alive))?;
        }
        let (queue, jobs) = mpsc::sync_channel(QUEUE_JOBS);
        let mut worker = Worker { v4, v6, shared: shared.clone(), told: HashMap::new() };
        thread::Builder::new().name("fanout".into()).spawn(move || {
            while let Ok(job) = jobs.recv() {
                worker.run(job);
            }
        })?;
        Ok(Self { shared, queue })
    }

    /// Queues a burst for `targets`. Never waits: when the sending thread is too far behind the
    /// burst is not sent, which is counted.
    pub fn send(&self, burst: Burst, targets: Arc<[Target]>) {
        if !targets.is_empty() {
            self.queue(Job::Burst(burst, targets));
        }
    }

    /// Queues parity for `targets`, as [`Fanout::send`] does.
    pub fn send_parity(&self, train: Train, targets: Arc<[Target]>) {
        if !targets.is_empty() {
            self.queue(Job::Parity(train, targets));
        }
    }

    /// Queues one packet for one multicast group, so that all of its members get it again. Says
    /// whether `group` is an address that gets every stream: nothing is sent to any other, so that
    /// no edge can have packets sent where it likes.
    pub fn send_to(&self, group: SocketAddr, packet: Bytes) -> bool {
        let known = group.ip().is_multicast() && self.shared.routes.is_fixed(group);
        if known {
            self.queue(Job::Packet(packet, group.into()));
        }
        known
    }

    /// Queues one datagram for every address that gets every stream.
    pub fn send_to_fixed(&self, datagram: Bytes) {
        self.queue(Job::Datagram(datagram, self.shared.routes.fixed()));
    }

    /// Who gets what.
    pub fn routes(&self) -> &Routes {
        &self.shared.routes
    }

    /// The UDP port that RTP comes from.
    pub fn local_port(&self) -> u16 {
        self.shared.local_port
    }

    fn queue(&self, job: Job) {
        let (bytes, packets) = (job.bytes().len(), job.packets());
        let shared = &self.shared;
        let queued = shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if queued > shared.queue_limit || self.queue.try_send(job).is_err() {
            shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            shared.metrics.skipped.inc_by(packets as u64);
        }
    }
}

impl GroupSender for Fanout {
    fn send(&self, group: SocketAddr, packet: Bytes) -> bool {
        self.send_to(group, packet)
    }
}

impl Job {
    fn bytes(&self) -> &Bytes {
        match self {
            Self::Burst(burst, _) => burst.bytes(),
            Self::Parity(train, _) => &train.bytes,
            Self::Datagram(bytes, _) | Self::Packet(bytes, _) => bytes,
        }
    }

    /// Bytes from one packet's start to the next one's.
    fn stride(&self) -> usize {
        match self {
            Self::Burst(burst, _) => burst.stride(),
            Self::Parity(train, _) => train.stride,
            Self::Datagram(bytes, _) | Self::Packet(bytes, _) => bytes.len().max(1),
        }
    }

    fn packets(&self) -> usize {
        match self {
            Self::Burst(burst, _) => burst.count(),
            Self::Parity(train, _) => train.packets(),
            Self::Datagram(..) | Self::Packet(..) => 1,
        }
    }

    fn targets(&self) -> &[Target] {
        match self {
            Self::Burst(_, targets) | Self::Datagram(_, targets) | Self::Parity(_, targets) => {
                targets
            }
            Self::Packet(_, target) => slice::from_ref(target),
        }
    }
}

/// Reads what comes to the RTP port until the last handle of the fan-out is gone.
///
/// It shares the socket with the sending thread and nothing else. It must leave the socket blocking,
/// as that thread has it.
fn listen(
    socket: &UdpSocket,
    on_datagrams: &OnDatagrams,
    metrics: &FanoutMetrics,
    alive: &Weak<Shared>,
) {
    // The longest datagram; the kernel may put several together up to that length (UDP GRO).
    let mut buffer = vec![0; usize::from(u16::MAX)];
    while alive.strong_count() > 0 {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                for answer in on_datagrams(from, &buffer[..len]) {
                    if let Err(error) = socket.send_to(&answer, from) {
                        metrics.errors.with_label_values(&[error_label(&error)]).inc();
                    }
                }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN)) => {}
            Err(error) => {
                tracing::debug!(%error, "reading the RTP port");
                thread::sleep(LISTEN_PAUSE);
            }
        }
    }
}

/// Counters of the fan-out.
#[derive(Clone)]
pub struct FanoutMetrics {
    datagrams: IntCounter,
    bytes: IntCounter,
    calls: IntCounter,
    skipped: IntCounter,
    errors: IntCounterVec,
    offload: IntGauge,
}

impl FanoutMetrics {
    /// Makes the handles and registers them.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let errors = register_int_counter_vec_with_registry!(
            Opts::new("downpour_fanout_errors_total", "Sends that the kernel refused, by error"),
            &["error"],
            registry
        )?;
        let offload = register_int_gauge_with_registry!(
            "downpour_fanout_gso",
            "Whether UDP segmentation offload is in use",
            registry
        )?;
        Ok(Self {
            datagrams: counter(
                "downpour_fanout_datagrams_total",
                "Datagrams of RTP and parity sent",
            )?,
            bytes: counter("downpour_fanout_bytes_total", "Bytes of those datagrams")?,
            calls: counter("downpour_fanout_calls_total", "System calls that sent them")?,
            skipped: counter(
                "downpour_fanout_skipped_packets_total",
                "Packets not sent because the fan-out was behind; edges ask for those that are not parity",
            )?,
            errors,
            offload,
        })
    }
}

/// Few different ones exist, so it can be a metric's label.
fn error_label(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => "unreachable",
        Some(libc::EPERM | libc::EACCES) => "not-permitted",
        Some(libc::ENOBUFS | libc::ENOMEM) => "no-buffers",
        Some(libc::EMSGSIZE) => "too-large",
        Some(libc::EAGAIN) => "would-block",
        _ => "other",
    }
}

/// Logs a target's failure, once a minute at most.
fn tell(
    told: &mut HashMap<(SocketAddr, &'static str), Instant>,
    target: SocketAddr,
    error: &io::Error,
) {
    let now = Instant::now();
    // Targets that were taken off the list are forgotten with the rest.
    if told.len() > MAX_TOLD {
        told.clear();
    }
    let key = (target, error_label(error));
    if told.get(&key).is_none_or(|at| now.duration_since(*at) >= TELL_EVERY) {
        told.insert(key, now);
        tracing::warn!(%target, "RTP cannot be sent there: {error}");
    }
}

struct Worker {
    v4: Outlet,
    v6: io::Result<Outlet>,
    shared: Arc<Shared>,
    /// When each target's last failure was logged, by what it was.
    told: HashMap<(SocketAddr, &'static str), Instant>,
}

impl Worker {
    fn run(&mut self, job: Job) {
        let metrics = &self.shared.metrics;
        let (bytes, stride) = (job.bytes(), job.stride());
        for Target { addr } in job.targets() {
            let sent = match (addr, &mut self.v6) {
                (SocketAddr::V4(_), _) => self.v4.send(*addr, bytes, stride, metrics),
                (SocketAddr::V6(_), Ok(v6)) => v6.send(*addr, bytes, stride, metrics),
                (SocketAddr::V6(_), Err(error)) => {
                    metrics.errors.with_label_values(&["unreachable"]).inc();
                    Err(io::Error::new(error.kind(), format!("no IPv6 here: {error}")))
                }
            };
            if let Err(error) = sent {
                tell(&mut self.told, *addr, &error);
            }
        }
        self.shared.queued_bytes.fetch_sub(bytes.len(), Ordering::Relaxed);
    }
}

/// Bursts that may wait, whatever their size.
const QUEUE_JOBS: usize = 16 << 10;
const MAX_TOLD: usize = 10_000;
const TELL_EVERY: Duration = Duration::from_secs(60);
/// How long the last handle may be gone before a thread that waits for datagrams sees it.
const LISTEN_TIMEOUT: Duration = Duration::from_millis(500);
/// An error that stays must not turn into a busy loop.
const LISTEN_PAUSE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        flv::{Tag, TagKind},
        rtp::{Packetizer, Ssrc},
    };

    fn receiver() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let addr = socket.local_addr().unwrap();
        (socket, addr)
    }

    fn fanout(metrics: FanoutMetrics) -> Fanout {
        let settings = Settings { port: 0, ..Settings::default() };
        let routes = Routes::new(&Registry::new()).unwrap();
        let echo: OnDatagrams = Arc::new(|_, datagrams| vec![Bytes::copy_from_slice(datagrams)]);
        Fanout::spawn(&settings, routes, &echo, metrics).unwrap()
    }

    fn wait_until(condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !condition() {
            assert!(Instant::now() < deadline, "it did not come true");
            thread::yield_now();
        }
    }

    #[test]
    fn every_target_gets_every_packet_as_it_stands_in_the_burst() {
        let (a, a_addr) = receiver();
        let (b, b_addr) = receiver();
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        let fanout = fanout(metrics.clone());
        fanout.routes().set_fixed([a_addr, b_addr]);
        let body: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let tag = Tag::new(TagKind::Video, 5, &body).unwrap();
        let burst = Packetizer::new(Ssrc(9), 1120).packetize(&tag);
        fanout.send_to_fixed(Bytes::from_static(b"0001abcd"));
        fanout.send(burst.clone(), fanout.routes().fixed());
        for socket in [a, b] {
            let mut buffer = [0; 2000];
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..len], from.port()), (&b"0001abcd"[..], fanout.local_port()));
            for i in 0..burst.count() {
                let (len, _) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!(buffer[..len], burst.packet(i).unwrap());
            }
        }
        // It counts once the kernel has returned, which may be after the packets have come.
        wait_until(|| metrics.datagrams.get() == 2 * (1 + burst.count() as u64));
        assert_eq!(metrics.bytes.get(), 2 * (8 + burst.bytes().len() as u64));
        if metrics.offload.get() == 1 {
            assert!(metrics.calls.get() <= 2 * 3, "{} calls", metrics.calls.get());
        }
    }

    #[test]
    fn an_unreachable_target_is_counted_and_the_others_are_served() {
        let (socket, addr) = receiver();
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        // Class E: no route leads there.
        let nowhere = "255.255.255.255:9".parse().unwrap();
        let fanout = fanout(metrics.clone());
        fanout.routes().set_fixed([nowhere, addr]);
        let tag = Tag::new(TagKind::Audio, 5, &[1, 2, 3]).unwrap();
        fanout.send(Packetizer::new(Ssrc(9), 1120).packetize(&tag), fanout.routes().fixed());
        assert_eq!(socket.recv_from(&mut [0; 2000]).unwrap().0, 26);
        wait_until(|| metrics.errors.with_label_values(&["not-permitted"]).get() == 1);
    }

    #[test]
    fn what_comes_to_the_rtp_port_is_answered_while_bursts_go_out() {
        let (socket, addr) = receiver();
        let fanout = fanout(FanoutMetrics::register(&Registry::new()).unwrap());
        fanout.routes().set_fixed([addr]);
        let to = (Ipv4Addr::LOCALHOST, fanout.local_port());
        let mut buffer = [0; 2000];
        let mut packetizer = Packetizer::new(Ssrc(9), 1120);
        for i in 0..100 {
            // RTP begins with 0x80.
            socket.send_to(&[i; 20], to).unwrap();
            let tag = Tag::new(TagKind::Audio, 5, &[1, 2, 3]).unwrap();
            fanout.send(packetizer.packetize(&tag), fanout.routes().fixed());
            let lengths = [(); 2].map(|()| socket.recv_from(&mut buffer).unwrap().0);
            assert!(lengths == [20, 26] || lengths == [26, 20], "{lengths:?}");
        }
    }

    #[test]
    fn a_packet_goes_to_a_group_that_is_listed_and_nowhere_else() {
        let (socket, addr) = receiver();
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        let fanout = fanout(metrics.clone());
        let group = "239.255.0.9:5999".parse().unwrap();
        let packet = Bytes::from_static(b"packet");
        assert!(!fanout.send_to(group, packet.clone()));
        fanout.routes().set_fixed([addr, group]);
        assert!(!fanout.send_to(addr, packet.clone()), "one edge has its repair by QUIC");
        assert!(fanout.send_to(group, packet));
        wait_until(|| {
            let failed = metrics.errors.with_label_values(&["unreachable"]).get();
            metrics.datagrams.get() + failed == 1
        });
        socket.set_nonblocking(true).unwrap();
        assert!(socket.recv_from(&mut [0; 100]).is_err());
    }

    #[test]
    fn packets_of_one_length_make_a_train() {
        let packets = [5, 5, 5, 4, 5, 0, 5, 6].map(|len| Bytes::from(vec![len as u8; len]));
        let trains = Train::collect(packets.clone());
        let shapes: Vec<_> = trains.iter().map(|t| (t.packets(), t.stride)).collect();
        assert_eq!(shapes, [(4, 5), (2, 5), (1, 6)]);
        let bytes: Vec<u8> = trains.iter().flat_map(|train| train.bytes.to_vec()).collect();
        assert_eq!(bytes, packets.concat());
        // They leave as the packets that they were.
        let (socket, addr) = receiver();
        let fanout = fanout(FanoutMetrics::register(&Registry::new()).unwrap());
        for train in trains {
            fanout.send_parity(train, Arc::new([addr.into()]));
        }
        for packet in packets.iter().filter(|packet| !packet.is_empty()) {
            let mut buffer = [0; 2000];
            let (len, _) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..len], &packet[..]);
        }
    }

    #[test]
    fn its_threads_end_with_the_last_handle() {
        let fanout = fanout(FanoutMetrics::register(&Registry::new()).unwrap());
        let alive = Arc::downgrade(&fanout.shared);
        drop(fanout);
        wait_until(|| alive.strong_count() == 0);
    }
}
