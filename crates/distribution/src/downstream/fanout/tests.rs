use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::{Duration, Instant},
};

use prometheus::Registry;

use super::{
    metrics::SendErrorKind,
    sockets::{WorkerSocket, WorkerSockets},
    *,
};
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::rtp::Packetizer;

fn receiver() -> (UdpSocket, SocketAddr) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket2::SockRef::from(&socket).set_recv_buffer_size(1 << 20).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let addr = socket.local_addr().unwrap();
    (socket, addr)
}

fn fanout(metrics: FanoutMetrics) -> Fanout {
    spawn(&Settings { port: 0, ..Settings::default() }, metrics)
}

fn spawn(settings: &Settings, metrics: FanoutMetrics) -> Fanout {
    let routes = Routes::new(&Registry::new()).unwrap();
    let echo: OnDatagrams = Arc::new(|_, datagrams| vec![Bytes::copy_from_slice(datagrams)]);
    Fanout::spawn(settings, routes, &echo, metrics).unwrap()
}

fn wait_until(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "the condition did not become true");
        thread::yield_now();
    }
}

#[test]
fn every_target_gets_every_packet_of_the_burst() {
    let (a, a_addr) = receiver();
    let (b, b_addr) = receiver();
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let fanout = fanout(metrics.clone());
    fanout.routes().set_fixed([a_addr, b_addr]);
    let body: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
    let tag = Tag::new(TagKind::Video, 5, &body).unwrap();
    let burst = Packetizer::new(Ssrc(9), 1120).packetize(&tag);
    fanout.send_to_fixed(Bytes::from_static(b"0001abcd"));
    fanout.send(Ssrc(9), &burst, &fanout.routes().fixed(), None);
    for socket in [a, b] {
        let mut buffer = [0; 2000];
        let (len, from) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!((&buffer[..len], from.port()), (&b"0001abcd"[..], fanout.local_port()));
        for i in 0..burst.count() {
            let (len, _) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!(buffer[..len], burst.packet(i).unwrap());
        }
    }
    // The counters are updated after the system call, maybe later than the packets arrive.
    wait_until(|| metrics.datagrams.get() == 2 * (1 + burst.count() as u64));
    assert_eq!(metrics.bytes.get(), 2 * (8 + burst.bytes().len() as u64));
    if metrics.gso_sockets.get() > 0 {
        assert!(metrics.calls.get() <= 2 * 3, "{} calls", metrics.calls.get());
    }
}

#[test]
fn an_unreachable_target_is_counted_and_others_are_served() {
    let (socket, addr) = receiver();
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    // Limited broadcast: the kernel refuses it.
    let nowhere = "255.255.255.255:9".parse().unwrap();
    let fanout = fanout(metrics.clone());
    fanout.routes().set_fixed([nowhere, addr]);
    let tag = Tag::new(TagKind::Audio, 5, &[1, 2, 3]).unwrap();
    let burst = Packetizer::new(Ssrc(9), 1120).packetize(&tag);
    fanout.send(Ssrc(9), &burst, &fanout.routes().fixed(), None);
    assert_eq!(socket.recv_from(&mut [0; 2000]).unwrap().0, 26);
    wait_until(|| metrics.errors(SendErrorKind::NotPermitted).get() == 1);
}

#[test]
fn datagrams_to_the_rtp_port_are_answered_while_bursts_are_sent() {
    let (socket, addr) = receiver();
    let fanout = fanout(FanoutMetrics::register(&Registry::new()).unwrap());
    fanout.routes().set_fixed([addr]);
    let to = (Ipv4Addr::LOCALHOST, fanout.local_port());
    let mut buffer = [0; 2000];
    let mut packetizer = Packetizer::new(Ssrc(9), 1120);
    for i in 0..100 {
        // The first byte is not that of RTP (0x80).
        socket.send_to(&[i; 20], to).unwrap();
        let tag = Tag::new(TagKind::Audio, 5, &[1, 2, 3]).unwrap();
        let burst = packetizer.packetize(&tag);
        fanout.send(Ssrc(9), &burst, &fanout.routes().fixed(), None);
        let lengths = [(); 2].map(|()| socket.recv_from(&mut buffer).unwrap().0);
        assert!(lengths == [20, 26] || lengths == [26, 20], "{lengths:?}");
    }
}

#[test]
fn a_packet_is_sent_only_to_a_listed_multicast_group() {
    let (socket, addr) = receiver();
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let fanout = fanout(metrics.clone());
    let group = "239.255.0.9:5999".parse().unwrap();
    let packet = Bytes::from_static(b"packet");
    assert!(!fanout.send_to(group, packet.clone()));
    fanout.routes().set_fixed([addr, group]);
    assert!(!fanout.send_to(addr, packet.clone()), "a unicast edge is repaired over QUIC");
    assert!(fanout.send_to(group, packet));
    wait_until(|| {
        let failed = metrics.errors(SendErrorKind::Unreachable).get();
        metrics.datagrams.get() + failed == 1
    });
    socket.set_nonblocking(true).unwrap();
    assert!(socket.recv_from(&mut [0; 100]).is_err());
}

#[test]
fn packets_of_equal_length_form_a_train() {
    let packets = [5, 5, 5, 4, 5, 0, 5, 6].map(|len| Bytes::from(vec![len as u8; len]));
    let trains = Train::collect(packets.clone());
    let shapes: Vec<_> = trains.iter().map(|t| (t.packets(), t.stride())).collect();
    assert_eq!(shapes, [(4, 5), (2, 5), (1, 6)]);
    let bytes: Vec<u8> = trains.iter().flat_map(|train| train.bytes().to_vec()).collect();
    assert_eq!(bytes, packets.concat());
    // They are sent as separate packets again.
    let (socket, addr) = receiver();
    let fanout = fanout(FanoutMetrics::register(&Registry::new()).unwrap());
    for train in trains {
        fanout.send(Ssrc(9), train, &Arc::from([addr.into()]), None);
    }
    for packet in packets.iter().filter(|packet| !packet.is_empty()) {
        let mut buffer = [0; 2000];
        let (len, _) = socket.recv_from(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], &packet[..]);
    }
}

#[test]
fn threads_end_with_the_last_handle() {
    let routes = Routes::new(&Registry::new()).unwrap();
    // Owned by the thread that reads the port.
    let reader = Arc::new(());
    let held = reader.clone();
    let ignore: OnDatagrams = Arc::new(move |_, _| {
        let _ = &held;
        Vec::new()
    });
    let settings = Settings { port: 0, workers: 3, ..Settings::default() };
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let fanout = Fanout::spawn(&settings, routes, &ignore, metrics).unwrap();
    drop(ignore);
    // Each queue is owned by its worker.
    let queues: Vec<_> = fanout.shared.queues.iter().map(Arc::downgrade).collect();
    let last = fanout.clone();
    drop(fanout);
    thread::sleep(Duration::from_millis(20));
    assert!(Arc::strong_count(&reader) > 1);
    assert!(queues.iter().all(|queue| queue.strong_count() > 1));
    drop(last);
    wait_until(|| queues.iter().all(|queue| queue.strong_count() == 0));
    wait_until(|| Arc::strong_count(&reader) == 1);
}

#[tokio::test]
async fn a_failed_worker_is_reported_and_drops_its_tasks() {
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let pacing = Pacing::Factor(PaceFactor::new(2.0).unwrap());
    let settings = Settings { port: 0, workers: 1, pacing, ..Settings::default() };
    let fanout = spawn(&settings, metrics.clone());
    let (_socket, addr) = receiver();
    let soon = Duration::from_millis(20);
    assert!(tokio::time::timeout(soon, fanout.failed()).await.is_err());
    let held: Arc<dyn std::any::Any + Send + Sync> = Arc::new(());
    let pace = Pace { rate: 1, interval: Duration::from_secs(60), held: Some(held.clone()) };
    let packet = || Bytes::from(vec![7; 100]);
    // The second train waits behind the first one, which takes a minute.
    for _ in 0..2 {
        let trains = Train::collect(vec![packet(); 16]);
        fanout.send(Ssrc(9), trains[0].clone(), &Arc::from([addr.into()]), Some(&pace));
    }
    assert!(!fanout.drain(soon).await, "the trains are paced");
    assert!(fanout.shared.queues[0].push(Task::Panic));
    tokio::time::timeout(Duration::from_secs(20), fanout.failed()).await.unwrap();
    drop(pace);
    assert_eq!(Arc::strong_count(&held), 1);
    assert!(fanout.drain(soon).await, "the failed worker holds nothing");
    let before = metrics.skipped();
    fanout.send(Ssrc(9), packet(), &Arc::from([addr.into(); 3]), None);
    assert_eq!(metrics.skipped(), before + 3);
}

#[tokio::test]
async fn drain_waits_for_paced_packets() {
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let pacing = Pacing::Factor(PaceFactor::new(2.0).unwrap());
    let fanout = spawn(&Settings { port: 0, pacing, ..Settings::default() }, metrics.clone());
    let (_socket, addr) = receiver();
    let pace = Pace { rate: 1, interval: Duration::from_millis(60), held: None };
    let train = Train::collect(vec![Bytes::from(vec![7; 100]); 64]).remove(0);
    fanout.send(Ssrc(9), train, &Arc::from([addr.into()]), Some(&pace));
    assert!(fanout.drain(Duration::from_secs(20)).await);
    assert_eq!(metrics.datagrams(), 64);
}

#[test]
fn gso_of_one_family_is_independent_of_the_other() {
    for (v4, v6, calls) in [(64, 1, 2), (1, 64, 2)] {
        let socket = |addr: &str, segments| {
            let socket = Arc::new(UdpSocket::bind(addr).unwrap());
            WorkerSocket {
                socket,
                max_segments: segments,
                is_exclusive: true,
                progress: Arc::default(),
            }
        };
        let sockets =
            WorkerSockets { v4: socket("127.0.0.1:0", v4), v6: Some(socket("[::1]:0", v6)) };
        let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
        let queue = Arc::new(Queue::new(Amount { tasks: 9, bytes: 1 << 20 }));
        let targets: Arc<[Target]> =
            ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), 9).into()).into();
        let train = Train::collect(vec![Bytes::from(vec![7; 100]); 30]).remove(0);
        let share = TargetShare::of(&targets, Ssrc(1), 0, 1).unwrap();
        queue.push(Task::Send(Job { flow: Ssrc(1), train, share, pace: None }));
        queue.close();
        Worker::new(queue, sockets, Pacing::Off, &metrics).run();
        assert_eq!(metrics.datagrams(), 60);
        // One call for 30 single packets, and one for one message with GSO.
        assert_eq!(metrics.calls(), calls, "{v4} and {v6} segments");
        assert_eq!(metrics.gso_sockets.get(), 1);
    }
}

#[test]
fn every_datagram_to_the_shared_port_reaches_the_reader() {
    let settings = Settings { port: 0, workers: 8, ..Settings::default() };
    let fanout = spawn(&settings, FanoutMetrics::register(&Registry::new()).unwrap());
    let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    for ip in loopback.into_iter().filter(|ip| UdpSocket::bind((*ip, 0)).is_ok()) {
        // Without the filter, the kernel would distribute them over the sockets by source port.
        for number in 0..64u8 {
            let socket = UdpSocket::bind((ip, 0)).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket.send_to(&[number], (ip, fanout.local_port())).unwrap();
            let mut buffer = [0; 9];
            let (len, from) = socket.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..len], from.port()), (&[number][..], fanout.local_port()));
        }
    }
}

#[test]
fn a_port_in_use_is_refused() {
    let fanout = fanout(FanoutMetrics::register(&Registry::new()).unwrap());
    let settings = Settings { port: fanout.local_port(), ..Settings::default() };
    let (registry, ignore): (_, OnDatagrams) = (Registry::new(), Arc::new(|_, _| Vec::new()));
    let routes = Routes::new(&registry).unwrap();
    let metrics = FanoutMetrics::register(&registry).unwrap();
    let refused = Fanout::spawn(&settings, routes, &ignore, metrics).err();
    assert_eq!(refused.map(|error| error.kind()), Some(io::ErrorKind::AddrInUse));
}

#[test]
fn many_workers_keep_the_order_at_each_target() {
    let receivers: Vec<_> = (0..150).map(|_| receiver()).collect();
    let targets: Arc<[Target]> = receivers.iter().map(|(_, addr)| (*addr).into()).collect();
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let settings = Settings { port: 0, workers: 4, ..Settings::default() };
    let fanout = spawn(&settings, metrics.clone());
    assert_eq!(fanout.workers(), 4);
    let mut packetizer = Packetizer::new(Ssrc(6), 1120);
    let first = packetizer.next_seq();
    for n in 1..=15 {
        let tag = Tag::new(TagKind::Video, n, &vec![7; 400 * n as usize]).unwrap();
        fanout.send(Ssrc(6), &packetizer.packetize(&tag), &targets, None);
        // The loopback queue of a core holds 1000 messages, of all tests together. Without GSO, a
        // burst here is up to 900.
        let sent = packetizer.next_seq().distance_from(first) as u64 * 150;
        wait_until(|| metrics.datagrams() == sent);
    }
    let count = packetizer.next_seq().distance_from(first);
    for (socket, _) in &receivers {
        let mut buffer = [0; 2000];
        for n in 0..count {
            socket.recv(&mut buffer).unwrap();
            let seq = u16::from_be_bytes([buffer[2], buffer[3]]);
            assert_eq!(seq, first.plus(n as usize).0);
        }
    }
    assert_eq!(metrics.skipped(), 0);
}

#[test]
fn packets_beyond_the_queue_limit_are_skipped_and_counted() {
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let settings = Settings { port: 0, queue_bytes: 5000, workers: 1, ..Settings::default() };
    let fanout = spawn(&settings, metrics.clone());
    let (_socket, addr) = receiver();
    let tag = Tag::new(TagKind::Video, 5, &[1; 6000]).unwrap();
    let burst = Packetizer::new(Ssrc(9), 1120).packetize(&tag);
    fanout.send(Ssrc(9), &burst, &Arc::from([addr.into(); 5]), None);
    assert_eq!((metrics.skipped(), metrics.datagrams()), (5 * 6, 0));
}

#[test]
fn a_paced_burst_is_spread_out_and_held_until_its_last_packet() {
    let metrics = FanoutMetrics::register(&Registry::new()).unwrap();
    let pacing = Pacing::Factor(PaceFactor::new(2.0).unwrap());
    let settings = Settings { port: 0, pacing, ..Settings::default() };
    let fanout = spawn(&settings, metrics.clone());
    assert!(fanout.paces());
    let (socket, addr) = receiver();
    let targets: Arc<[Target]> = Arc::from([addr.into()]);
    let mut packetizer = Packetizer::new(Ssrc(9), 1120);
    let mut burst = || {
        let tag = Tag::new(TagKind::Video, 5, &[1; 64 * 1120 - 11]).unwrap();
        packetizer.packetize(&tag)
    };
    let interval = Duration::from_millis(40);
    let held: Arc<dyn std::any::Any + Send + Sync> = Arc::new(());
    let pace = |held| Pace { rate: 1, interval, held };
    let began = Instant::now();
    fanout.send(Ssrc(9), &burst(), &targets, Some(&pace(Some(held.clone()))));
    let mut buffer = [0; 2000];
    for n in 0..64 {
        socket.recv(&mut buffer).unwrap();
        assert_eq!(buffer[3], (65000 + n) as u8);
        // The last of eight groups is sent after seven eighths of the interval.
        assert!(n < 63 || began.elapsed() >= interval * 7 / 8, "{:?}", began.elapsed());
    }
    wait_until(|| Arc::strong_count(&held) == 1);
    // A finished flow is sent at once.
    let began = Instant::now();
    let slow = Duration::from_secs(60);
    for _ in 0..2 {
        let pace = Pace { interval: slow, ..pace(None) };
        fanout.send(Ssrc(9), &burst(), &targets, Some(&pace));
    }
    fanout.finish(Ssrc(9));
    for n in 64..192 {
        socket.recv(&mut buffer).unwrap();
        assert_eq!(buffer[3], (65000 + n) as u8);
    }
    // Everything is sent at once when the last handle is dropped.
    fanout.send(Ssrc(9), &burst(), &targets, Some(&Pace { interval: slow, ..pace(None) }));
    drop(fanout);
    for _ in 0..64 {
        socket.recv(&mut buffer).unwrap();
    }
    assert!(began.elapsed() < slow / 2);
}
