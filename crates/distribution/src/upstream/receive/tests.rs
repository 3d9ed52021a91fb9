use std::{
    net::SocketAddr,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};

use super::*;
use crate::{
    protocol::Protocol,
    tls::Trust,
    upstream::{
        dispatch::{Cloud, Connect, Settings},
        prober::ProbeMetrics,
        repair_client::{
            ProtocolChoice, RepairClient, RepairClientMetrics, RepairClientSettings, RepairEvent,
        },
        socket::RtpSocket,
        stats::ReceiveMetrics,
        streams::{self, Streams},
    },
};
use downpour_hub::{Hub, LogLimits, Sink, Tap};
use downpour_media::flv::{Headers, Tag, TagKind};
use downpour_repair::{
    control::StreamInfo,
    receiver,
    rtp::{Packetizer, Seq, Ssrc},
};

/// An [`Upstream`] with two sockets on loopback and a repair connection whose events the test
/// sends.
struct Rig {
    upstream: Upstream,
    hub: Hub,
    metrics: ReceiveMetrics,
    rtp: [SocketAddr; 2],
    /// The sender of each repair connection's events.
    events: mpsc::UnboundedReceiver<mpsc::Sender<RepairEvent>>,
}

/// A sink that calls a function for each stream.
struct OnStreamUp<F>(F);

impl<F: Fn() -> Option<Box<dyn Tap>> + Send + Sync> Sink for OnStreamUp<F> {
    fn stream_up(&self, _: &Arc<downpour_hub::Stream>) -> Option<Box<dyn Tap>> {
        (self.0)()
    }
}

fn rig(sink: impl Fn() -> Option<Box<dyn Tap>> + Send + Sync + 'static) -> Rig {
    let registry = prometheus::Registry::new();
    let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 60_000 });
    let metrics = ReceiveMetrics::register(&registry).unwrap();
    let settings = streams::Settings {
        receiver: receiver::Settings::default(),
        silence: Duration::from_secs(10),
        hold: Duration::ZERO,
        max_streams: 1000,
        fetches_headers: false,
    };
    hub.add_sink(Arc::new(OnStreamUp(sink)));
    let streams = Streams::new(settings, hub.clone(), metrics.clone());
    let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
    let rtp = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
    // Nothing answers here: the test plays the cloud.
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let quic_port = silent.local_addr().unwrap().port();
    let (events_in, events) = mpsc::unbounded_channel();
    let client_metrics = RepairClientMetrics::register(&registry).unwrap();
    let connect: Connect = Box::new(move |cloud, events, shutdown| {
        let _ = events_in.send(events);
        let _held = &silent;
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
    let cloud =
        Cloud { host: "127.0.0.1".into(), quic_host: None, quic_port, api_host: None, api_port: 9 };
    let settings = Settings { cloud, pack_loss: 0.0, connect: Some(connect), fetch_headers: None };
    let probe_metrics = ProbeMetrics::register(&registry).unwrap();
    let sockets = sockets.map(RtpSocket::new).into();
    let upstream =
        Upstream::new(sockets, Vec::new(), settings, streams, metrics.clone(), probe_metrics);
    Rig { upstream, hub, metrics, rtp, events }
}

fn up(number: u32) -> RepairEvent {
    RepairEvent::StreamUp(StreamInfo {
        key: format!("live/{number}").parse().unwrap(),
        ssrc: Ssrc(number),
        publication: None,
        start_unix_ms: 0,
        headers: Headers::default(),
        gop_start: None,
        newest: None,
    })
}

async fn wait_until(condition: &str, is_met: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_met() {
        assert!(began.elapsed() < Duration::from_secs(20), "timed out: {condition}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn event_is_handled_at_once_on_idle_sockets_and_shutdown_ends_the_streams() {
    let Rig { upstream, hub, mut events, .. } = rig(|| None);
    let shutdown = CancellationToken::new();
    let running = tokio::spawn(upstream.run(shutdown.clone()));
    let events = events.recv().await.unwrap();
    events.send(RepairEvent::Connected { protocol: Protocol::Downpour }).await.unwrap();
    let mut quickest = Duration::MAX;
    for number in 1..=10 {
        // The threads are asleep by now; only the tick every 500 ms would wake them.
        tokio::time::sleep(Duration::from_millis(10)).await;
        let began = Instant::now();
        events.send(up(number)).await.unwrap();
        wait_until("the stream is up", || hub.len() == number as usize).await;
        quickest = quickest.min(began.elapsed());
    }
    // Other tests may delay some of them, but not all.
    assert!(quickest < Duration::from_millis(20), "{quickest:?}");
    shutdown.cancel();
    tokio::time::timeout(Duration::from_secs(20), running).await.unwrap().unwrap();
    assert!(hub.is_empty());
}

#[tokio::test]
async fn single_packet_is_received_at_once_and_losses_are_requested() {
    let Rig { upstream, hub, metrics, rtp, mut events } = rig(|| None);
    let _running = tokio::spawn(upstream.run(CancellationToken::new()));
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
        wait_until("the tag is in the hub", || stream.held().0 == number as usize).await;
        quickest = quickest.min(began.elapsed());
    }
    assert!(quickest < Duration::from_millis(20), "{quickest:?}");
    // Two packets are lost, and the third reveals it.
    let tag = Tag::new(TagKind::Audio, 300, &[0xaf, 1]).unwrap();
    let last = (0..3).map(|_| packetizer.packetize(&tag)).last().unwrap();
    assert_eq!(last.first_seq(), Seq::FIRST.plus(12));
    sender.send_to(last.bytes(), rtp[0]).unwrap();
    wait_until("both are requested", || {
        metrics.streams().first().is_some_and(|stream| stream.report.asked == 2)
    })
    .await;
    assert_eq!(stream.held().0, 10);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flooded_socket_does_not_starve_the_other() {
    let Rig { upstream, hub, rtp, mut events, .. } = rig(|| None);
    let _running = tokio::spawn(upstream.run(CancellationToken::new()));
    let events = events.recv().await.unwrap();
    events.send(up(7)).await.unwrap();
    wait_until("the stream is up", || hub.len() == 1).await;
    let stream = hub.stream("live/7").unwrap();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    for _ in 0..2 {
        let stop = stop.clone();
        thread::spawn(move || {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let state = UdpSocketState::new(UdpSockRef::from(&socket)).unwrap();
            // GSO sends them faster than they are received.
            let noise = Transmit {
                destination: rtp[0],
                ecn: None,
                contents: &[7; 64 * 8],
                segment_size: Some(8),
                src_ip: None,
            };
            while !stop.is_cancelled() {
                let _ = state.try_send(UdpSockRef::from(&socket), &noise);
            }
        });
    }
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut packetizer = Packetizer::new(Ssrc(7), 1120);
    for number in 1..=20u32 {
        let tag = Tag::new(TagKind::Audio, number * 20, &[0xaf, 1, number as u8]).unwrap();
        let burst = packetizer.packetize(&tag);
        // The flood may fill the queue of the loopback interface: send until it arrives.
        let began = Instant::now();
        while stream.held().0 < number as usize {
            assert!(began.elapsed() < Duration::from_secs(20), "tag {number} did not arrive");
            sender.send_to(burst.bytes(), rtp[1]).unwrap();
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

#[tokio::test]
async fn panic_of_a_thread_is_a_panic_of_the_task() {
    let Rig { upstream, mut events, hub, .. } = rig(|| panic!("on purpose"));
    let running = tokio::spawn(upstream.run(CancellationToken::new()));
    events.recv().await.unwrap().send(up(7)).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), running).await.unwrap();
    assert!(ended.unwrap_err().is_panic());
    assert!(hub.is_empty());
}

#[tokio::test]
async fn threads_end_with_the_task() {
    struct Counted(Arc<AtomicUsize>);
    impl Tap for Counted {
        fn push(&mut self, _: Instant, _: &Tag) {}
    }
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
    let alive = Arc::new(AtomicUsize::new(1));
    let counted = alive.clone();
    let Rig { upstream, mut events, hub, .. } =
        rig(move || Some(Box::new(Counted(counted.clone())) as Box<dyn Tap>));
    let running = tokio::spawn(upstream.run(CancellationToken::new()));
    events.recv().await.unwrap().send(up(7)).await.unwrap();
    wait_until("the stream is up", || hub.len() == 1).await;
    running.abort();
    wait_until("the threads have ended", || alive.load(Ordering::SeqCst) == 0).await;
    assert!(hub.is_empty());
}

#[test]
fn socket_that_only_fails_for_a_second_is_broken() {
    let start = Instant::now();
    let at = |ms| start + Duration::from_millis(ms);
    let mut failures = None;
    // Failures 500 ms apart.
    assert!((0..20).all(|n| !FailureRun::is_too_long(&mut failures, at(n * 500))));
    let broken = (0..2000).find(|ms| FailureRun::is_too_long(&mut failures, at(20_000 + ms)));
    assert_eq!(broken, Some(1000));
}
