//! One socket of a fan-out worker: trains to many targets in few calls, and what to do when the
//! kernel refuses.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use socket2::SockRef;

use super::{FanoutMetrics, metrics::Refusal};
use downpour_sys::sendmmsg::{Batch, Message, Messages, set_segment, wait_for_room};

/// What an outlet needs of a socket. None of it waits but for what says so.
pub(super) trait SendSocket {
    /// As [`Messages::send`].
    fn send(&self, messages: &mut Messages<'_, '_>, first: usize) -> io::Result<usize>;

    /// Sends one datagram.
    fn send_one(&self, to: SocketAddr, packet: &[u8]) -> io::Result<()>;

    /// Cuts longer messages into so many bytes by itself from now on; 0 cuts none.
    fn set_segment(&self, segment: u16) -> io::Result<()>;

    /// Waits until there is room for a datagram, or until `timeout` is over.
    fn wait_for_room(&self, timeout: Duration);

    /// Waits where nothing says when there is room.
    fn pause(&self, time: Duration);
}

/// One socket as one worker sends from it; other workers may send from the same.
pub(super) struct UdpSender<W = UdpSocket> {
    socket: Arc<W>,
    /// Calls of all workers in which the kernel took something from the socket.
    progress: Arc<AtomicU64>,
    offload: GsoState,
    batch: Batch,
    told: LogLimit,
    metrics: FanoutMetrics,
}

impl<W: SendSocket> UdpSender<W> {
    /// `segments` is the most datagrams that the kernel cuts out of one message; 1 is for none.
    /// `is_own` says that nobody else sends from the socket. `progress` counts for all that do.
    pub(super) fn new(
        socket: Arc<W>,
        segments: usize,
        is_own: bool,
        progress: Arc<AtomicU64>,
        metrics: FanoutMetrics,
    ) -> Self {
        let offload =
            GsoState { segments: segments.max(1), by_socket: is_own, ..GsoState::default() };
        if offload.segments > 1 {
            metrics.offload.inc();
        }
        let (batch, told) = (Batch::new(), LogLimit::default());
        Self { socket, progress, offload, batch, told, metrics }
    }

    /// Begins a round of sends of what lives for `'a`; nothing is sent for sure until
    /// [`Round::flush`].
    pub(super) fn round<'a>(&mut self) -> Round<'_, 'a, W> {
        Round {
            socket: &self.socket,
            progress: &self.progress,
            seen_progress: self.progress.load(Ordering::Relaxed),
            offload: &mut self.offload,
            messages: self.batch.begin(),
            told: &mut self.told,
            metrics: &self.metrics,
            patience: PATIENCE,
        }
    }
}

/// Sends that go together.
pub(super) struct Round<'o, 'a, W = UdpSocket> {
    socket: &'o W,
    progress: &'o AtomicU64,
    /// Up to where progress has renewed the patience.
    seen_progress: u64,
    offload: &'o mut GsoState,
    messages: Messages<'o, 'a>,
    told: &'o mut LogLimit,
    metrics: &'o FanoutMetrics,
    /// How much longer it may wait for room while the kernel takes nothing.
    patience: Duration,
}

impl<'a, W: SendSocket> Round<'_, 'a, W> {
    /// The most bytes of a train of packets of `stride` bytes that go in one message.
    pub(super) fn piece(&self, stride: usize) -> usize {
        self.offload.segments.min(MAX_MESSAGE / stride.max(1)).max(1) * stride.max(1)
    }

    /// Sends one piece of a train as datagrams of `stride` bytes, the last one shorter.
    #[inline]
    pub(super) fn send(&mut self, to: SocketAddr, piece: &'a [u8], stride: usize) {
        if piece.len() <= stride {
            return self.push(Message { to, bytes: piece, segment: 0 });
        }
        if self.offload.cuts(to) {
            let segment = stride as u16;
            if segment != self.messages.default_segment() {
                self.ask_for(segment);
            }
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
            let result = self.socket.send(&mut self.messages, next);
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
                    // A key frame to a thousand edges takes an interface of 1 Gbit/s half a second:
                    // as long as it goes on, it is the queue that pushes back.
                    if count > 0 {
                        self.patience = PATIENCE;
                        self.progress.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(error) => {
                    if let Some(message) = self.messages.get(next)
                        && !self.may_try_again(&error)
                        && !self.stops_cutting(&error)
                    {
                        self.handle_failure(&message, error, &mut sent);
                        next += 1;
                    }
                }
            }
        }
        self.messages.clear();
        if let Some(error) = sent.congestion {
            self.told.of_congestion(Instant::now(), &error);
        }
        let metrics = self.metrics;
        metrics.calls.inc_by(sent.calls);
        metrics.datagrams.inc_by(sent.datagrams);
        metrics.bytes.inc_by(sent.bytes);
    }

    /// A message wants what the socket does not do by itself. After some of the same, it does.
    fn ask_for(&mut self, segment: u16) {
        let offload = &mut *self.offload;
        if !offload.by_socket {
            return;
        }
        let (wanted, times) = offload.wanted;
        offload.wanted = (segment, if wanted == segment { times + 1 } else { 1 });
        // What waits in the batch counts on what there is.
        if offload.wanted.1 > WANTED && self.messages.len() == 0 {
            match self.socket.set_segment(segment) {
                Ok(()) => self.messages.set_default_segment(segment),
                Err(_) => offload.by_socket = false,
            }
        }
    }

    /// Whether the socket cut by itself until now, and the error may be for that: it refuses even
    /// short messages then, where a way cannot be cut for (IPsec) or has a small MTU.
    fn stops_cutting(&mut self, error: &io::Error) -> bool {
        let was_cutting = self.messages.default_segment() > 0 && refuses_offload(error);
        if was_cutting {
            self.offload.by_socket = false;
            self.messages.set_default_segment(0);
            if let Err(error) = self.socket.set_segment(0) {
                tracing::warn!(
                    "RTP may be cut wrongly: UDP_SEGMENT cannot be switched off: {error}"
                );
            }
        }
        was_cutting
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
            Some(libc::EAGAIN) => {
                // Room that there was, another worker may have had first.
                let progress = self.progress.load(Ordering::Relaxed);
                if std::mem::replace(&mut self.seen_progress, progress) != progress {
                    self.patience = PATIENCE;
                }
                self.wait(|socket| socket.wait_for_room(PATIENCE))
            }
            // A queue below the socket is full, and nothing says when it no longer is.
            Some(libc::ENOBUFS) => self.wait(|socket| socket.pause(QUEUE_PAUSE)),
            _ => false,
        }
    }

    fn wait(&mut self, wait: impl FnOnce(&W)) -> bool {
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
                self.send_one(message.to, packet, sent);
            }
            return;
        }
        let packets = packets(message.bytes.len(), message.segment);
        self.fail(message.to, packets, error, sent);
    }

    fn send_one(&mut self, to: SocketAddr, packet: &[u8], sent: &mut Sent) {
        loop {
            sent.calls += 1;
            match self.socket.send_one(to, packet) {
                Ok(()) => {
                    self.patience = PATIENCE;
                    self.progress.fetch_add(1, Ordering::Relaxed);
                    return sent.add(packet.len(), 0);
                }
                Err(error) if self.may_try_again(&error) => {}
                Err(error) => return self.fail(to, 1, error, sent),
            }
        }
    }

    fn fail(&mut self, to: SocketAddr, packets: u64, error: io::Error, sent: &mut Sent) {
        let refusal = Refusal::from(&error);
        self.metrics.errors(refusal).inc_by(packets);
        // That may be most of what a worker that is behind has to send, so it is told later.
        match refusal.is_congestion() {
            true => sent.congestion = Some(error),
            false => self.told.of_target(Instant::now(), to, refusal, &error),
        }
    }
}

impl SendSocket for UdpSocket {
    #[inline]
    fn send(&self, messages: &mut Messages<'_, '_>, first: usize) -> io::Result<usize> {
        messages.send(self, first)
    }

    fn send_one(&self, to: SocketAddr, packet: &[u8]) -> io::Result<()> {
        // The socket itself is one that waits, for who reads its port.
        let socket = SockRef::from(self);
        socket.send_to_with_flags(packet, &to.into(), libc::MSG_DONTWAIT).map(drop)
    }

    fn set_segment(&self, segment: u16) -> io::Result<()> {
        set_segment(self, segment)
    }

    fn wait_for_room(&self, timeout: Duration) {
        wait_for_room(self, timeout);
    }

    fn pause(&self, time: Duration) {
        thread::sleep(time);
    }
}

/// When failures were logged last.
#[derive(Debug, Default)]
struct LogLimit {
    targets: HashMap<(SocketAddr, Refusal), Instant>,
    congestion: Option<Instant>,
}

impl LogLimit {
    fn of_target(&mut self, now: Instant, to: SocketAddr, refusal: Refusal, error: &io::Error) {
        // Targets that were taken off the list are forgotten with the rest.
        if self.targets.len() > MAX_TOLD {
            self.targets.clear();
        }
        if self.targets.get(&(to, refusal)).is_none_or(|at| is_due(now, *at)) {
            self.targets.insert((to, refusal), now);
            tracing::warn!(target = %to, "RTP cannot be sent there: {error}");
        }
    }

    fn of_congestion(&mut self, now: Instant, error: &io::Error) {
        if self.congestion.is_none_or(|at| is_due(now, at)) {
            self.congestion = Some(now);
            tracing::warn!(
                "RTP is lost here: for {} ms the kernel took nothing more ({error})",
                PATIENCE.as_millis()
            );
        }
    }
}

fn is_due(now: Instant, told: Instant) -> bool {
    now.saturating_duration_since(told) >= TELL_EVERY
}

/// What is known of segmentation offload (UDP GSO).
#[derive(Default)]
struct GsoState {
    /// Datagrams that a message may have; 1 once it is known that the kernel cuts none.
    segments: usize,
    /// Targets on whose way it is refused: a tunnel, an interface with a small MTU.
    whole: HashSet<SocketAddr>,
    /// Messages refused since the last one that was not.
    refused: usize,
    /// Whether the socket may be set to cut by itself: nobody else sends from it, and it never refused
    /// anything then.
    by_socket: bool,
    /// What messages wanted of late that the socket does not do by itself, and how many in a row.
    wanted: (u16, usize),
    /// When a refusal was logged last.
    told: Option<Instant>,
}

impl GsoState {
    fn cuts(&self, to: SocketAddr) -> bool {
        self.segments > 1 && (self.whole.is_empty() || !self.whole.contains(&to))
    }

    fn refuse(&mut self, to: SocketAddr, error: &io::Error, metrics: &FanoutMetrics) {
        self.refused += 1;
        if self.whole.len() >= MAX_WHOLE {
            self.whole.clear();
        }
        let now = Instant::now();
        if self.whole.insert(to) && self.told.is_none_or(|at| is_due(now, at)) {
            self.told = Some(now);
            tracing::warn!(
                target = %to,
                "UDP segmentation offload is refused ({error}): sending one datagram at a time there"
            );
        }
        if self.refused >= REFUSALS && self.segments > 1 {
            self.segments = 1;
            self.whole = HashSet::new();
            metrics.offload.dec();
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
    /// Why packets were given up that had nowhere to go.
    congestion: Option<io::Error>,
}

impl Sent {
    #[inline]
    fn add(&mut self, len: usize, segment: u16) {
        self.bytes += len as u64;
        self.datagrams += packets(len, segment);
    }
}

/// Datagrams of a message.
#[inline]
fn packets(len: usize, segment: u16) -> u64 {
    match u32::from(segment) {
        0 => 1,
        // No message is longer than a datagram may be, so 32 bits do, and are quicker.
        segment => u64::from((len as u32).div_ceil(segment)),
    }
}

/// The first is for an interface that cannot. The second is for one whose MTU a packet exceeds, for
/// which since 2025 (Linux 6.14) it is the last, as for a packet that was not to be cut.
fn refuses_offload(error: &io::Error) -> bool {
    let error = error.raw_os_error();
    matches!(error, Some(libc::EIO | libc::EINVAL | libc::ENOTSUP | libc::EMSGSIZE))
}

/// The largest UDP payload of IPv4: what one message with segmentation may carry.
const MAX_MESSAGE: usize = 65_507;
/// How long a round waits for room while the kernel takes nothing: the other targets wait too.
const PATIENCE: Duration = Duration::from_millis(20);
/// About as long as a gigabit interface takes for fifty packets.
const QUEUE_PAUSE: Duration = Duration::from_micros(500);
const MAX_TOLD: usize = 10_000;
const TELL_EVERY: Duration = Duration::from_secs(60);
/// Targets without segmentation that are remembered; the others are tried anew.
const MAX_WHOLE: usize = 4096;
/// Refusals one after the other, without a message that was cut, after which none will be.
const REFUSALS: usize = 16;
/// Messages in a row to cut alike, after which the socket does so by itself.
const WANTED: usize = 64;

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::{
            Mutex,
            atomic::{AtomicUsize, Ordering},
        },
    };

    use prometheus::Registry;

    use super::*;

    fn outlet(segments: usize) -> (UdpSender, FanoutMetrics) {
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
        (UdpSender::new(socket, segments, true, Arc::default(), metrics.clone()), metrics)
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
        assert_eq!(metrics.errors(Refusal::NotPermitted).get(), 6, "of two packets each");
        assert_eq!(metrics.datagrams.get(), 4);
        assert_eq!(metrics.offload.get(), 1);
    }

    /// A socket without checksums has the kernel refuse to cut (EIO), as an interface does that
    /// cannot.
    #[test]
    fn where_offload_is_refused_the_packets_go_one_by_one() {
        let (mut outlet, metrics) = outlet(64);
        let (socket, addr) = receiver();
        downpour_sys::udp::disable_checksums(&outlet.socket).unwrap();
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

    #[test]
    fn a_socket_that_cuts_by_itself_sends_the_same_and_stops_when_it_is_refused() {
        let (mut outlet, metrics) = outlet(64);
        let (socket, addr) = receiver();
        let (bytes, mut buffer) = ([7; 300], [0; 400]);
        let mut send = |outlet: &mut UdpSender, lengths: &[(usize, usize)]| {
            let mut round = outlet.round();
            lengths.iter().for_each(|(len, stride)| round.send(addr, &bytes[..*len], *stride));
            round.flush();
            let segment = round.messages.default_segment();
            let sent = lengths.iter().flat_map(|(len, stride)| bytes[..*len].chunks(*stride));
            for packet in sent {
                assert_eq!(socket.recv(&mut buffer).unwrap(), packet.len());
            }
            segment
        };
        for _ in 0..WANTED {
            assert_eq!(send(&mut outlet, &[(250, 100)]), 0);
        }
        assert_eq!(send(&mut outlet, &[(250, 100), (80, 100), (250, 120), (300, 300)]), 100);
        // What is wanted instead becomes the rule too, but not within a batch.
        for _ in 0..WANTED - 1 {
            assert_eq!(send(&mut outlet, &[(250, 120)]), 100);
        }
        assert_eq!(send(&mut outlet, &[(250, 100), (250, 120)]), 100);
        assert_eq!(send(&mut outlet, &[(250, 120), (250, 100)]), 120);
        // A socket without checksums has the kernel refuse even a short message (EINVAL).
        downpour_sys::udp::disable_checksums(&outlet.socket).unwrap();
        assert_eq!(send(&mut outlet, &[(80, 100), (250, 120), (90, 100)]), 0);
        assert_eq!(metrics.refused_offload.get(), 1, "of the one that was to be cut");
        assert_eq!(metrics.datagrams.get(), 3 * 64 + 8 + 3 * 63 + 6 + 6 + 5);
        for _ in 0..2 * WANTED {
            assert_eq!(send(&mut outlet, &[(250, 120)]), 0, "it is left alone");
        }
    }

    #[test]
    fn a_socket_that_others_send_from_is_left_alone() {
        let (_, metrics) = outlet(64);
        let fake = Arc::<Fake>::default();
        let mut outlet = UdpSender::new(fake.clone(), 64, false, Arc::default(), metrics);
        for _ in 0..2 * WANTED {
            let mut round = outlet.round();
            round.send(([127, 0, 0, 1], 9).into(), &[7; 250], 100);
            round.flush();
        }
        assert!(fake.segments.lock().unwrap().is_empty());
    }

    /// What a socket is to answer, one call after the other, and what it took.
    #[derive(Default)]
    struct Fake {
        answers: Mutex<VecDeque<Answer>>,
        taken: Mutex<Vec<usize>>,
        waits: AtomicUsize,
        segments: Mutex<Vec<u16>>,
        /// Another worker, which gets the room that this one waits for.
        other: Option<Arc<AtomicU64>>,
    }

    #[derive(Clone, Copy)]
    enum Answer {
        Take(usize),
        Fail(libc::c_int),
    }

    impl Fake {
        fn outlet(answers: impl IntoIterator<Item = Answer>) -> (UdpSender<Self>, FanoutMetrics) {
            let answers = Mutex::new(answers.into_iter().collect());
            let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
            let fake = Arc::new(Self { answers, ..Self::default() });
            (UdpSender::new(fake, 64, true, Arc::default(), metrics.clone()), metrics)
        }

        /// Without an answer, it takes all.
        fn next(&self, most: usize) -> io::Result<usize> {
            match self.answers.lock().unwrap().pop_front() {
                None => Ok(most),
                Some(Answer::Take(count)) => Ok(count.min(most)),
                Some(Answer::Fail(error)) => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    impl SendSocket for Fake {
        fn send(&self, messages: &mut Messages<'_, '_>, first: usize) -> io::Result<usize> {
            let count = self.next(messages.len() - first)?;
            let lengths = messages.lengths().skip(first).take(count).map(|(len, _)| len);
            self.taken.lock().unwrap().extend(lengths);
            Ok(count)
        }

        fn set_segment(&self, segment: u16) -> io::Result<()> {
            self.segments.lock().unwrap().push(segment);
            Ok(())
        }

        fn send_one(&self, _: SocketAddr, packet: &[u8]) -> io::Result<()> {
            self.next(1)?;
            self.taken.lock().unwrap().push(packet.len());
            Ok(())
        }

        fn wait_for_room(&self, _: Duration) {
            self.waits.fetch_add(1, Ordering::Relaxed);
            if let Some(progress) = &self.other {
                progress.fetch_add(1, Ordering::Relaxed);
            }
        }

        fn pause(&self, _: Duration) {
            self.waits.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A wait that takes no time counts for half a millisecond.
    const WAITS: usize = 40;

    #[test]
    fn as_long_as_the_kernel_takes_something_nothing_is_given_up() {
        for error in [libc::EAGAIN, libc::ENOBUFS] {
            let answers = [Answer::Fail(error), Answer::Take(1)].repeat(64);
            let (mut outlet, metrics) = Fake::outlet(answers);
            let mut round = outlet.round();
            for _ in 0..64 {
                round.send(([127, 0, 0, 1], 9).into(), &[7; 5400], 100);
            }
            round.flush();
            assert_eq!(outlet.socket.taken.lock().unwrap()[..], [5400; 64]);
            assert_eq!(metrics.datagrams.get(), 64 * 54);
            assert_eq!(outlet.socket.waits.load(Ordering::Relaxed), 64);
        }
    }

    #[test]
    fn as_long_as_another_worker_has_the_room_it_is_waited_for() {
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        let progress = Arc::<AtomicU64>::default();
        let answers = Mutex::new(VecDeque::from([Answer::Fail(libc::EAGAIN); 3 * WAITS]));
        let fake = Fake { answers, other: Some(Arc::clone(&progress)), ..Fake::default() };
        let mut outlet = UdpSender::new(Arc::new(fake), 64, true, progress, metrics.clone());
        let mut round = outlet.round();
        round.send(([127, 0, 0, 1], 9).into(), &[7; 5400], 100);
        round.flush();
        assert_eq!(metrics.datagrams.get(), 54);
        assert_eq!(metrics.errors(Refusal::WouldBlock).get(), 0);
    }

    #[test]
    fn where_the_kernel_takes_nothing_all_is_given_up_after_a_while_and_counted() {
        let (mut outlet, metrics) = Fake::outlet([Answer::Fail(libc::EAGAIN); WAITS + 3]);
        let mut round = outlet.round();
        for _ in 0..4 {
            round.send(([127, 0, 0, 1], 9).into(), &[7; 5400], 100);
        }
        round.flush();
        assert_eq!(outlet.socket.waits.load(Ordering::Relaxed), WAITS);
        assert_eq!(metrics.errors(Refusal::WouldBlock).get(), 3 * 54, "each was tried");
        assert_eq!(metrics.datagrams.get(), 54);
        assert!(outlet.told.targets.is_empty() && outlet.told.congestion.is_some());
    }

    #[test]
    fn packets_that_go_one_by_one_wait_no_longer_than_others() {
        // As Linux answers where the MTU is too small, by its age.
        for error in [libc::EMSGSIZE, libc::EINVAL] {
            let mut answers = vec![Answer::Fail(error)];
            answers.extend([Answer::Fail(libc::EAGAIN), Answer::Take(1)].repeat(50));
            answers.extend([Answer::Fail(libc::EAGAIN); WAITS + 2]);
            let (mut outlet, metrics) = Fake::outlet(answers);
            let mut round = outlet.round();
            round.send(([127, 0, 0, 1], 9).into(), &[7; 5400], 100);
            round.flush();
            assert_eq!(metrics.refused_offload.get(), 1);
            assert_eq!(outlet.socket.taken.lock().unwrap()[..], [100; 52]);
            assert_eq!(metrics.errors(Refusal::WouldBlock).get(), 2);
            assert_eq!(outlet.socket.waits.load(Ordering::Relaxed), 50 + WAITS);
        }
    }
}
