use std::{collections::VecDeque, sync::atomic::AtomicUsize};

use parking_lot::Mutex;
use prometheus::Registry;

use super::{
    super::gso::{MAX_REFUSALS, OPTION_THRESHOLD},
    *,
};

fn udp_sender(segments: usize) -> (UdpSender, FanoutMetrics) {
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
fn datagrams_are_the_same_with_and_without_gso() {
    let bytes: Vec<u8> = (0..2050_u32).map(|i| i as u8).collect();
    for (segments, calls) in [(64, 1), (8, 1), (1, 1)] {
        let (mut sender, metrics) = udp_sender(segments);
        let (socket, addr) = receiver();
        let mut round = sender.round();
        for piece in bytes.chunks(round.max_piece_len(100)) {
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
fn an_unreachable_target_does_not_affect_others() {
    let (mut sender, metrics) = udp_sender(64);
    let (socket, addr) = receiver();
    let nowhere = "255.255.255.255:9".parse().unwrap();
    let bytes = [7; 150];
    let mut round = sender.round();
    for to in [nowhere, addr, nowhere, addr, nowhere] {
        round.send(to, &bytes, 100);
    }
    round.flush();
    let mut buffer = [0; 200];
    let lengths = [(); 4].map(|()| socket.recv(&mut buffer).unwrap());
    assert_eq!(lengths, [100, 50, 100, 50]);
    assert_eq!(metrics.errors(SendErrorKind::NotPermitted).get(), 6, "3 messages of 2 packets");
    assert_eq!(metrics.datagrams.get(), 4);
    assert_eq!(metrics.gso_sockets.get(), 1);
}

/// Without checksums on the socket, the kernel refuses to segment (EIO), as it does on an interface
/// without checksum offload.
#[test]
fn packets_are_sent_one_by_one_where_gso_is_refused() {
    let (mut sender, metrics) = udp_sender(64);
    let (socket, addr) = receiver();
    downpour_sys::udp::disable_checksums(&sender.socket).unwrap();
    let bytes = [7; 250];
    for round in 1..=20 {
        let mut sending = sender.round();
        sending.send(addr, &bytes, 100);
        sending.flush();
        let mut buffer = [0; 200];
        let lengths = [(); 3].map(|()| socket.recv(&mut buffer).unwrap());
        assert_eq!(lengths, [100, 100, 50]);
        assert_eq!(metrics.datagrams.get(), 3 * round);
    }
    assert_eq!(metrics.gso_refused.get(), 1, "the target is remembered");
    assert!(sender.gso.is_on_for("127.0.0.1:9".parse().unwrap()), "other targets are tried");
    for port in 1..=20 {
        let mut sending = sender.round();
        sending.send(std::net::SocketAddr::from(([127, 0, 0, 1], port)), &bytes, 100);
        sending.flush();
    }
    assert_eq!(metrics.gso_refused.get(), MAX_REFUSALS as u64);
    assert!(!sender.gso.is_on_for(addr) && sender.round().max_piece_len(100) == 100);
}

#[test]
fn the_segment_option_is_set_when_wanted_and_cleared_when_refused() {
    let (mut sender, metrics) = udp_sender(64);
    let (socket, addr) = receiver();
    let (bytes, mut buffer) = ([7; 300], [0; 400]);
    let mut send = |sender: &mut UdpSender, lengths: &[(usize, usize)]| {
        let mut round = sender.round();
        lengths.iter().for_each(|(len, stride)| round.send(addr, &bytes[..*len], *stride));
        round.flush();
        let segment = round.messages.default_segment();
        let sent = lengths.iter().flat_map(|(len, stride)| bytes[..*len].chunks(*stride));
        for packet in sent {
            assert_eq!(socket.recv(&mut buffer).unwrap(), packet.len());
        }
        segment
    };
    for _ in 0..OPTION_THRESHOLD {
        assert_eq!(send(&mut sender, &[(250, 100)]), 0);
    }
    assert_eq!(send(&mut sender, &[(250, 100), (80, 100), (250, 120), (300, 300)]), 100);
    // Another size becomes the option too, but not within a batch.
    for _ in 0..OPTION_THRESHOLD - 1 {
        assert_eq!(send(&mut sender, &[(250, 120)]), 100);
    }
    assert_eq!(send(&mut sender, &[(250, 100), (250, 120)]), 100);
    assert_eq!(send(&mut sender, &[(250, 120), (250, 100)]), 120);
    // Without checksums and with the option, the kernel refuses even a short message (EINVAL).
    downpour_sys::udp::disable_checksums(&sender.socket).unwrap();
    assert_eq!(send(&mut sender, &[(80, 100), (250, 120), (90, 100)]), 0);
    assert_eq!(metrics.gso_refused.get(), 1, "only the message with segments");
    assert_eq!(metrics.datagrams.get(), 3 * 64 + 8 + 3 * 63 + 6 + 6 + 5);
    for _ in 0..2 * OPTION_THRESHOLD {
        assert_eq!(send(&mut sender, &[(250, 120)]), 0, "the option stays off");
    }
}

#[test]
fn the_segment_option_of_a_shared_socket_is_not_set() {
    let (_, metrics) = udp_sender(64);
    let fake = Arc::<Fake>::default();
    let mut sender = UdpSender::new(fake.clone(), 64, false, Arc::default(), metrics);
    for _ in 0..2 * OPTION_THRESHOLD {
        let mut round = sender.round();
        round.send(std::net::SocketAddr::from(([127, 0, 0, 1], 9)), &[7; 250], 100);
        round.flush();
    }
    assert!(fake.segments.lock().is_empty());
}

/// Fake socket with scripted answers.
#[derive(Default)]
struct Fake {
    /// One per call. Once they are used up, every message is accepted.
    answers: Mutex<VecDeque<Answer>>,
    /// Lengths of the accepted messages.
    taken: Mutex<Vec<usize>>,
    waits: AtomicUsize,
    segments: Mutex<Vec<u16>>,
    /// Progress of another worker that uses the room while this one waits.
    other: Option<Arc<AtomicU64>>,
}

#[derive(Clone, Copy)]
enum Answer {
    Take(usize),
    Fail(libc::c_int),
}

impl Fake {
    fn new_sender(answers: impl IntoIterator<Item = Answer>) -> (UdpSender<Self>, FanoutMetrics) {
        let answers = Mutex::new(answers.into_iter().collect());
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        let fake = Arc::new(Self { answers, ..Self::default() });
        (UdpSender::new(fake, 64, true, Arc::default(), metrics.clone()), metrics)
    }

    /// The number of messages that the next call accepts, of `most`.
    fn next(&self, most: usize) -> io::Result<usize> {
        match self.answers.lock().pop_front() {
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
        self.taken.lock().extend(lengths);
        Ok(count)
    }

    fn set_segment(&self, segment: u16) -> io::Result<()> {
        self.segments.lock().push(segment);
        Ok(())
    }

    fn send_one(&self, _: Target, packet: &[u8]) -> io::Result<()> {
        self.next(1)?;
        self.taken.lock().push(packet.len());
        Ok(())
    }

    fn wait_writable(&self, _: Duration) {
        self.waits.fetch_add(1, Ordering::Relaxed);
        if let Some(progress) = &self.other {
            progress.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn pause(&self, _: Duration) {
        self.waits.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits until the send timeout is used up: a wait that takes no time counts as half a millisecond.
const WAITS: usize = 40;

#[test]
fn nothing_is_dropped_while_the_kernel_accepts_messages() {
    for error in [libc::EAGAIN, libc::ENOBUFS] {
        let answers = [Answer::Fail(error), Answer::Take(1)].repeat(64);
        let (mut sender, metrics) = Fake::new_sender(answers);
        let mut round = sender.round();
        for _ in 0..64 {
            round.send(std::net::SocketAddr::from(([127, 0, 0, 1], 9)), &[7; 5400], 100);
        }
        round.flush();
        assert_eq!(sender.socket.taken.lock()[..], [5400; 64]);
        assert_eq!(metrics.datagrams.get(), 64 * 54);
        assert_eq!(sender.socket.waits.load(Ordering::Relaxed), 64);
    }
}

#[test]
fn progress_of_another_worker_renews_the_timeout() {
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let progress = Arc::<AtomicU64>::default();
    let answers = Mutex::new(VecDeque::from([Answer::Fail(libc::EAGAIN); 3 * WAITS]));
    let fake = Fake { answers, other: Some(Arc::clone(&progress)), ..Fake::default() };
    let mut sender = UdpSender::new(Arc::new(fake), 64, true, progress, metrics.clone());
    let mut round = sender.round();
    round.send(std::net::SocketAddr::from(([127, 0, 0, 1], 9)), &[7; 5400], 100);
    round.flush();
    assert_eq!(metrics.datagrams.get(), 54);
    assert_eq!(metrics.errors(SendErrorKind::WouldBlock).get(), 0);
}

#[test]
fn messages_are_dropped_and_counted_after_the_send_timeout() {
    let (mut sender, metrics) = Fake::new_sender([Answer::Fail(libc::EAGAIN); WAITS + 3]);
    let mut round = sender.round();
    for _ in 0..4 {
        round.send(std::net::SocketAddr::from(([127, 0, 0, 1], 9)), &[7; 5400], 100);
    }
    round.flush();
    assert_eq!(sender.socket.waits.load(Ordering::Relaxed), WAITS);
    assert_eq!(metrics.errors(SendErrorKind::WouldBlock).get(), 3 * 54, "each message was tried");
    assert_eq!(metrics.datagrams.get(), 54);
    let (now, target) = (Instant::now(), ([127, 0, 0, 1], 9).into());
    assert_eq!(sender.log.congestion.due(now), None, "congestion was logged");
    let per_target = sender.log.targets.due(now, (target, SendErrorKind::WouldBlock));
    assert_eq!(per_target, Some(0), "no target was logged");
}

#[test]
fn packets_sent_one_by_one_share_the_send_timeout() {
    // The errors of new and old Linux where the MTU is too small.
    for error in [libc::EMSGSIZE, libc::EINVAL] {
        let mut answers = vec![Answer::Fail(error)];
        answers.extend([Answer::Fail(libc::EAGAIN), Answer::Take(1)].repeat(50));
        answers.extend([Answer::Fail(libc::EAGAIN); WAITS + 2]);
        let (mut sender, metrics) = Fake::new_sender(answers);
        let mut round = sender.round();
        round.send(std::net::SocketAddr::from(([127, 0, 0, 1], 9)), &[7; 5400], 100);
        round.flush();
        assert_eq!(metrics.gso_refused.get(), 1);
        assert_eq!(sender.socket.taken.lock()[..], [100; 52]);
        assert_eq!(metrics.errors(SendErrorKind::WouldBlock).get(), 2);
        assert_eq!(sender.socket.waits.load(Ordering::Relaxed), 50 + WAITS);
    }
}
