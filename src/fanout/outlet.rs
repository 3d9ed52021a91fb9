//! One socket of a fan-out worker: trains to many targets in few calls, and what to do when the
//! kernel refuses.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    FanoutMetrics,
    metrics::error_label,
    syscall::{Batch, Message, Messages, wait_for_room},
};

/// One socket as one worker sends from it; other workers send from the same.
pub(super) struct Outlet {
    socket: Arc<UdpSocket>,
    offload: Offload,
    batch: Batch,
    /// When each target's last failure was logged, by what it was.
    told: HashMap<(SocketAddr, &'static str), Instant>,
    metrics: FanoutMetrics,
}

impl Outlet {
    /// `segments` is the most datagrams that the kernel cuts out of one message; 1 is for none.
    pub(super) fn new(socket: Arc<UdpSocket>, segments: usize, metrics: FanoutMetrics) -> Self {
        let offload = Offload { segments: segments.max(1), whole: HashSet::new(), refused: 0 };
        Self { socket, offload, batch: Batch::new(), told: HashMap::new(), metrics }
    }

    /// Begins a round of sends of what lives for `'a`; nothing is sent for sure until
    /// [`Round::flush`].
    pub(super) fn round<'a>(&mut self) -> Round<'_, 'a> {
        Round {
            socket: &self.socket,
            offload: &mut self.offload,
            messages: self.batch.begin(),
            told: &mut self.told,
            metrics: &self.metrics,
            patience: PATIENCE,
        }
    }
}

/// Sends that go together.
pub(super) struct Round<'o, 'a> {
    socket: &'o UdpSocket,
    offload: &'o mut Offload,
    messages: Messages<'o, 'a>,
    told: &'o mut HashMap<(SocketAddr, &'static str), Instant>,
    metrics: &'o FanoutMetrics,
    /// How much longer it may wait for room in the socket: the other targets wait too.
    patience: Duration,
}

impl<'a> Round<'_, 'a> {
    /// The most bytes of a train of packets of `stride` bytes that go in one message.
    pub(super) fn piece(&self, stride: usize) -> usize {
        self.offload.segments.min(MAX_MESSAGE / stride.max(1)).max(1) * stride.max(1)
    }

    /// Sends one piece of a train as datagrams of `stride` bytes, the last one shorter.
    #[inline]
    pub(super) fn send(&mut self, to: SocketAddr, piece: &'a [u8], stride: usize) {
        if piece.len() <= stride || self.offload.cuts(to) {
            let segment = if piece.len() > stride { stride as u16 } else { 0 };
            return self.push(Message { to, bytes: piece, segment });
        }
        for packet in piece.chunks(stride) {
            self.push(Message { to, bytes: packet, segment: 0 });
        }
    }

    /// Sends what has not been sent yet.
    pub(super) fn flush(&mut self) {
        let mut next = 0;
        let mut sent = Sent::default();
        while next < self.messages.len() {
            let result = self.messages.send(self.socket, next);
            sent.calls += 1;
            match result {
                Ok(count) => {
                    for (len, segment) in self.messages.lengths().skip(next).take(count) {
                        sent.add(len, segment);
                        if segment > 0 {
                            self.offload.refused = 0;
                        }
                    }
                    next += count;
                }
                Err(error) => {
                    if let Some(message) = self.messages.get(next)
                        && !self.may_try_again(&error)
                    {
                        self.handle_failure(&message, error, &mut sent);
                        next += 1;
                    }
                }
            }
        }
        self.messages.clear();
        let metrics = self.metrics;
        metrics.calls.inc_by(sent.calls);
        metrics.datagrams.inc_by(sent.datagrams);
        metrics.bytes.inc_by(sent.bytes);
    }

    #[inline]
    fn push(&mut self, message: Message<'a>) {
        self.messages.push(message);
        if self.messages.is_full() {
            self.flush();
        }
    }

    /// Waits if that may help, and if there is time.
    fn may_try_again(&mut self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            Some(libc::EINTR) => true,
            // An answer to an earlier datagram, told to whoever sends next.
            Some(libc::ECONNREFUSED) => self.wait(|_| ()),
            Some(libc::EAGAIN) => self.wait(|socket| wait_for_room(socket, PATIENCE)),
            // A queue below the socket is full, and nothing says when it no longer is.
            Some(libc::ENOBUFS) => self.wait(|_| std::thread::sleep(QUEUE_PAUSE)),
            _ => false,
        }
    }

    fn wait(&mut self, wait: impl FnOnce(&UdpSocket)) -> bool {
        if self.patience.is_zero() {
            return false;
        }
        let began = Instant::now();
        wait(self.socket);
        // However short it was, waits come to an end.
        self.patience = self.patience.saturating_sub(began.elapsed().max(QUEUE_PAUSE));
        true
    }

    fn handle_failure(&mut self, message: &Message<'a>, error: io::Error, sent: &mut Sent) {
        if message.segment > 0 && refuses_offload(&error) {
            self.metrics.refused_offload.inc();
            self.offload.refuse(message.to, &error, self.metrics);
            for packet in message.bytes.chunks(usize::from(message.segment)) {
                let packet = Message { bytes: packet, segment: 0, ..*message };
                sent.calls += 1;
                match self.socket.send_to(packet.bytes, packet.to) {
                    Ok(_) => sent.add(packet.bytes.len(), 0),
                    Err(error) => self.fail(packet.to, &error),
                }
            }
            return;
        }
        self.fail(message.to, &error);
    }

    fn fail(&mut self, to: SocketAddr, error: &io::Error) {
        let label = error_label(error);
        self.metrics.errors.with_label_values(&[label]).inc();
        let now = Instant::now();
        // Targets that were taken off the list are forgotten with the rest.
        if self.told.len() > MAX_TOLD {
            self.told.clear();
        }
        let due = |at: &Instant| now.duration_since(*at) >= TELL_EVERY;
        if self.told.get(&(to, label)).is_none_or(due) {
            self.told.insert((to, label), now);
            tracing::warn!(target = %to, "RTP cannot be sent there: {error}");
        }
    }
}

/// What is known of segmentation offload (UDP GSO).
struct Offload {
    /// Datagrams that a message may have; 1 once it is known that the kernel cuts none.
    segments: usize,
    /// Targets on whose way it is refused: a tunnel, an interface with a small MTU.
    whole: HashSet<SocketAddr>,
    /// Messages refused since the last one that was not.
    refused: usize,
}

impl Offload {
    fn cuts(&self, to: SocketAddr) -> bool {
        self.segments > 1 && (self.whole.is_empty() || !self.whole.contains(&to))
    }

    fn refuse(&mut self, to: SocketAddr, error: &io::Error, metrics: &FanoutMetrics) {
        self.refused += 1;
        if self.whole.len() >= MAX_WHOLE {
            self.whole.clear();
        }
        if self.whole.insert(to) && self.refused == 1 {
            tracing::warn!(
                target = %to,
                "UDP segmentation offload is refused ({error}): sending one datagram at a time there"
            );
        }
        if self.refused >= REFUSALS && self.segments > 1 {
            self.segments = 1;
            self.whole = HashSet::new();
            metrics.offload.set(0);
            tracing::warn!(
                "UDP segmentation offload is off: it was refused {REFUSALS} times running"
            );
        }
    }
}

#[derive(Default)]
struct Sent {
    calls: u64,
    datagrams: u64,
    bytes: u64,
}

impl Sent {
    #[inline]
    fn add(&mut self, len: usize, segment: u16) {
        self.bytes += len as u64;
        self.datagrams += match u32::from(segment) {
            0 => 1,
            // No message is longer than a datagram may be, so 32 bits do, and are quicker.
            segment => u64::from((len as u32).div_ceil(segment)),
        };
    }
}

/// The first is for an interface that cannot, the second for one whose MTU is too small.
fn refuses_offload(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::ENOTSUP))
}

/// The largest UDP payload of IPv4: what one message with segmentation may carry.
const MAX_MESSAGE: usize = 65_507;
/// How long a round may wait for room, all in all.
const PATIENCE: Duration = Duration::from_millis(20);
/// About as long as a gigabit interface takes for fifty packets.
const QUEUE_PAUSE: Duration = Duration::from_micros(500);
const MAX_TOLD: usize = 10_000;
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Targets without segmentation that are remembered; the others are tried anew.
const MAX_WHOLE: usize = 4096;
/// Refusals one after the other, without a message that was cut, after which none will be.
const REFUSALS: usize = 16;

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use super::*;

    fn outlet(segments: usize) -> (Outlet, FanoutMetrics) {
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
        (Outlet::new(socket, segments, metrics.clone()), metrics)
    }

    fn receiver() -> (UdpSocket, SocketAddr) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let addr = socket.local_addr().unwrap();
        (socket, addr)
    }

    #[test]
    fn with_offload_and_without_the_datagrams_are_the_same() {
        let bytes: Vec<u8> = (0..2050_u32).map(|i| i as u8).collect();
        for (segments, calls) in [(64, 1), (8, 1), (1, 1)] {
            let (mut outlet, metrics) = outlet(segments);
            let (socket, addr) = receiver();
            let mut round = outlet.round();
            for piece in bytes.chunks(round.piece(100)) {
                round.send(addr, piece, 100);
            }
            round.flush();
            let mut buffer = [0; 200];
            for expected in bytes.chunks(100) {
                let len = socket.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..len], expected);
            }
            let counted = (metrics.calls.get(), metrics.datagrams.get(), metrics.bytes.get());
            assert_eq!(counted, (calls, 21, 2050), "{segments} segments");
        }
    }

    #[test]
    fn a_bad_target_hurts_no_other() {
        let (mut outlet, metrics) = outlet(64);
        let (socket, addr) = receiver();
        let nowhere = "255.255.255.255:9".parse().unwrap();
        let bytes = [7; 150];
        let mut round = outlet.round();
        for to in [nowhere, addr, nowhere, addr, nowhere] {
            round.send(to, &bytes, 100);
        }
        round.flush();
        let mut buffer = [0; 200];
        let lengths = [(); 4].map(|()| socket.recv(&mut buffer).unwrap());
        assert_eq!(lengths, [100, 50, 100, 50]);
        assert_eq!(metrics.errors.with_label_values(&["not-permitted"]).get(), 3);
        assert_eq!(metrics.datagrams.get(), 4);
        assert_eq!(metrics.offload.get(), 0, "nothing was said of it");
    }

    /// A packet over the interface's MTU cannot be cut, which is what a refusal looks like.
    #[test]
    fn where_offload_is_refused_the_packets_go_one_by_one() {
        let (mut outlet, metrics) = outlet(64);
        let (socket, addr) = receiver();
        // The MTU of loopback is 65,536, so it takes the checksum switched off: then the kernel
        // has nobody to cut.
        let off: libc::c_int = 1;
        // SAFETY: it reads the integer that it is given.
        let set = unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&*outlet.socket),
                libc::SOL_SOCKET,
                libc::SO_NO_CHECK,
                (&raw const off).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        assert_eq!(set, 0);
        let bytes = [7; 250];
        for round in 1..=20 {
            let mut sending = outlet.round();
            sending.send(addr, &bytes, 100);
            sending.flush();
            let mut buffer = [0; 200];
            let lengths = [(); 3].map(|()| socket.recv(&mut buffer).unwrap());
            assert_eq!(lengths, [100, 100, 50]);
            assert_eq!(metrics.datagrams.get(), 3 * round);
        }
        assert_eq!(metrics.refused_offload.get(), 1, "it is remembered");
        assert!(outlet.offload.cuts("127.0.0.1:9".parse().unwrap()), "others are tried");
        for port in 1..=20 {
            let mut sending = outlet.round();
            sending.send(([127, 0, 0, 1], port).into(), &bytes, 100);
            sending.flush();
        }
        assert_eq!(metrics.refused_offload.get(), REFUSALS as u64);
        assert!(!outlet.offload.cuts(addr) && outlet.round().piece(100) == 100);
    }
}
