//! Sends bursts of RTP to many addresses, on threads of its own.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicUsize, Ordering},
        mpsc::{self, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};
use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};

use crate::{
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
    targets: RwLock<Arc<[SocketAddr]>>,
    queued_bytes: AtomicUsize,
    queue_limit: usize,
    local_port: u16,
    metrics: FanoutMetrics,
}

enum Job {
    Burst(Burst),
    /// One small datagram to every target, whatever waits: the port announcement.
    Datagram(bytes::Bytes),
}

impl Fanout {
    /// Binds the RTP port and starts the sending thread; nothing is sent before
    /// [`Fanout::set_targets`].
    ///
    /// # Errors
    /// If the port is taken, an option is refused or no thread can be started.
    pub fn spawn(settings: &Settings, metrics: FanoutMetrics) -> io::Result<Self> {
        let bind = |ip: IpAddr, port| {
            let socket =
                udp::sender(SocketAddr::new(ip, port), settings.send_buffer, settings.multicast)?;
            Outlet::new(socket)
        };
        let v4 = bind(Ipv4Addr::UNSPECIFIED.into(), settings.port)?;
        let local_port = v4.socket.local_addr()?.port();
        // A machine without IPv6 seldom has IPv6 edges; if it has, that is told when one is sent to.
        let v6 = bind(Ipv6Addr::UNSPECIFIED.into(), local_port);
        let shared = Arc::new(Shared {
            targets: RwLock::new(Arc::new([])),
            queued_bytes: AtomicUsize::new(0),
            queue_limit: settings.queue_bytes,
            local_port,
            metrics,
        });
        let (queue, jobs) = mpsc::sync_channel(QUEUE_JOBS);
        let mut worker = Worker { v4, v6, shared: shared.clone(), told: HashMap::new() };
        thread::Builder::new().name("fanout".into()).spawn(move || {
            while let Ok(job) = jobs.recv() {
                worker.run(job);
            }
        })?;
        Ok(Self { shared, queue })
    }

    /// Queues a burst for every target. Never waits: when the sending thread is too far behind the
    /// burst is not sent, which is counted.
    pub fn send(&self, burst: Burst) {
        let (bytes, packets) = (burst.bytes().len(), burst.count());
        let shared = &self.shared;
        let queued = shared.queued_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if queued > shared.queue_limit || self.queue.try_send(Job::Burst(burst)).is_err() {
            shared.queued_bytes.fetch_sub(bytes, Ordering::Relaxed);
            shared.metrics.skipped.inc_by(packets as u64);
        }
    }

    /// Queues one datagram for every target.
    pub fn send_datagram(&self, datagram: bytes::Bytes) {
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Job::Datagram(datagram)) {
            self.shared.metrics.skipped.inc();
        }
    }

    /// Replaces the addresses that bursts go to from now on.
    pub fn set_targets(&self, targets: Vec<SocketAddr>) {
        *self.shared.targets.write().unwrap_or_else(PoisonError::into_inner) = targets.into();
    }

    /// The UDP port that RTP comes from.
    pub fn local_port(&self) -> u16 {
        self.shared.local_port
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
            datagrams: counter("downpour_fanout_datagrams_total", "RTP datagrams sent")?,
            bytes: counter("downpour_fanout_bytes_total", "Bytes of RTP datagrams sent")?,
            calls: counter("downpour_fanout_calls_total", "System calls that sent them")?,
            skipped: counter(
                "downpour_fanout_skipped_packets_total",
                "Packets not sent because the fan-out was behind; edges ask for them",
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
        let targets = self.shared.targets.read().unwrap_or_else(PoisonError::into_inner).clone();
        let metrics = &self.shared.metrics;
        for target in &*targets {
            let sent = match (target, &mut self.v6) {
                (SocketAddr::V4(_), _) => self.v4.send_job(*target, &job, metrics),
                (SocketAddr::V6(_), Ok(v6)) => v6.send_job(*target, &job, metrics),
                (SocketAddr::V6(_), Err(error)) => {
                    metrics.errors.with_label_values(&["unreachable"]).inc();
                    Err(io::Error::new(error.kind(), format!("no IPv6 here: {error}")))
                }
            };
            if let Err(error) = sent {
                tell(&mut self.told, *target, &error);
            }
        }
        if let Job::Burst(burst) = &job {
            self.shared.queued_bytes.fetch_sub(burst.bytes().len(), Ordering::Relaxed);
        }
    }
}

/// One socket and what the kernel offers on it.
struct Outlet {
    socket: UdpSocket,
    state: UdpSocketState,
    gso: bool,
}

impl Outlet {
    fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // This thread has nothing else to do, so it waits for room, but not for long: the other
        // targets wait too.
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        let gso = state.max_gso_segments() > 1;
        Ok(Self { socket, state, gso })
    }

    fn send_job(
        &mut self,
        target: SocketAddr,
        job: &Job,
        metrics: &FanoutMetrics,
    ) -> io::Result<()> {
        match job {
            Job::Burst(burst) => self.send(target, burst.bytes(), burst.stride(), metrics),
            Job::Datagram(datagram) => self.send(target, datagram, datagram.len().max(1), metrics),
        }
    }

    /// Sends `bytes` as datagrams of `stride` bytes, the last one shorter. Goes on after a failure,
    /// and gives the last one.
    fn send(
        &mut self,
        target: SocketAddr,
        bytes: &[u8],
        stride: usize,
        metrics: &FanoutMetrics,
    ) -> io::Result<()> {
        let mut failure = Ok(());
        let mut rest = bytes;
        while !rest.is_empty() {
            let packets = match self.gso {
                true => self.state.max_gso_segments().min(MAX_GSO_BYTES / stride).max(1),
                false => 1,
            };
            let (train, after) = rest.split_at(rest.len().min(packets * stride));
            let transmit = Transmit {
                destination: target,
                ecn: None,
                contents: train,
                segment_size: (train.len() > stride).then_some(stride),
                src_ip: None,
            };
            match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
                Ok(()) => {
                    metrics.calls.inc();
                    metrics.datagrams.inc_by(train.len().div_ceil(stride) as u64);
                    metrics.bytes.inc_by(train.len() as u64);
                }
                // The kernel or the network card does not segment: from now on one by one.
                Err(error) if transmit.segment_size.is_some() && refuses_offload(&error) => {
                    self.gso = false;
                    tracing::warn!(
                        "UDP segmentation offload is refused ({error}): sending one datagram a call"
                    );
                    metrics.offload.set(0);
                    continue;
                }
                Err(error) => {
                    metrics.errors.with_label_values(&[error_label(&error)]).inc();
                    failure = Err(error);
                }
            }
            rest = after;
        }
        if self.gso {
            metrics.offload.set(1);
        }
        failure
    }
}

fn refuses_offload(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::ENOTSUP))
}

/// Bursts that may wait, whatever their size.
const QUEUE_JOBS: usize = 16 << 10;
/// The largest UDP payload of IPv4: what one send with segmentation may carry.
const MAX_GSO_BYTES: usize = 65_507;
const MAX_TOLD: usize = 10_000;
const TELL_EVERY: Duration = Duration::from_secs(60);
const SEND_TIMEOUT: Duration = Duration::from_millis(20);

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
        let settings = Settings { port: 0, ..Settings::default() };
        let fanout = Fanout::spawn(&settings, metrics.clone()).unwrap();
        fanout.set_targets(vec![a_addr, b_addr]);
        let body: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let tag = Tag::new(TagKind::Video, 5, &body).unwrap();
        let burst = Packetizer::new(Ssrc(9), 1120).packetize(&tag);
        fanout.send_datagram(bytes::Bytes::from_static(b"0001abcd"));
        fanout.send(burst.clone());
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
        let settings = Settings { port: 0, ..Settings::default() };
        // Class E: no route leads there.
        let nowhere = "255.255.255.255:9".parse().unwrap();
        let fanout = Fanout::spawn(&settings, metrics.clone()).unwrap();
        fanout.set_targets(vec![nowhere, addr]);
        let tag = Tag::new(TagKind::Audio, 5, &[1, 2, 3]).unwrap();
        fanout.send(Packetizer::new(Ssrc(9), 1120).packetize(&tag));
        assert_eq!(socket.recv_from(&mut [0; 2000]).unwrap().0, 26);
        wait_until(|| metrics.errors.with_label_values(&["not-permitted"]).get() == 1);
    }
}
