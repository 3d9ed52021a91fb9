//! `downpour/1`: our edge and our cloud, and each against a peer that misbehaves.

use std::{
    collections::HashSet,
    fs,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::common::repair_node::{
    Cloud, Edge, Feed, dial, edge_settings, quic_client, until, within,
};
use bytes::Bytes;
use downpour_distribution::{
    downstream::{
        outgoing::OutgoingStreams,
        repair_server::{
            EdgeHandler, EdgeHello, EdgeSession, RepairServer, RepairServerMetrics,
            RepairServerSettings,
        },
    },
    protocol::Protocol,
    tls::{Fingerprint, Identity, Trust},
    upstream::repair_client::{
        ClientError, RepairClient, RepairClientMetrics, RepairClientSettings, RepairEvent,
    },
};
use downpour_media::{
    StreamPattern,
    flv::{Headers, Tag, TagKind},
};
use downpour_repair::{
    control::{
        CloudMessage, ControlReader, EdgeMessage, Hello, Report, StreamInfo, StreamReport,
        encode_control,
    },
    message::{Gone, Heartbeat, Message, Nack, encode_repair},
    rtp::{Seq, Ssrc},
};
use prometheus::Registry;
use quinn::{Connection, ConnectionError, RecvStream, SendStream, TransportConfig};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

fn nack(feed: &Feed, copies: u8, seqs: &[Seq]) -> Nack {
    Nack { ssrc: feed.ssrc(), copies, slack_ms: 500, seqs: seqs.to_vec() }
}

async fn welcome(edge: &mut Edge) {
    edge.wait(|event| matches!(event, RepairEvent::Welcome(_)).then_some(())).await;
}

async fn stream_up(edge: &mut Edge) -> StreamInfo {
    edge.wait(|event| match event {
        RepairEvent::StreamUp(info) => Some(info),
        _ => None,
    })
    .await
}

async fn heartbeat(edge: &mut Edge, wanted: Heartbeat) {
    let is_it = |event| matches!(event, RepairEvent::Heartbeats(beats) if beats.contains(&wanted));
    edge.wait(|event| is_it(event).then_some(())).await;
}

#[tokio::test]
async fn streams_come_change_and_go() {
    let cloud = Cloud::start_with(RepairServerSettings {
        node: "cloud-1".into(),
        rtp_port: 5222,
        ..Default::default()
    });
    let mut first = Feed::start(&cloud.origin, "live/first", 1);
    let seqs = first.push(3);
    Feed::start(&cloud.origin, "other/unwanted", 2);
    let mut edge = Edge::start(RepairClientSettings {
        streams: vec!["live/*".parse().unwrap()],
        ..edge_settings(cloud.addr)
    });

    let connected = within(edge.events.recv()).await.unwrap();
    assert_eq!(connected, RepairEvent::Connected { protocol: Protocol::Downpour });
    match within(edge.events.recv()).await.unwrap() {
        RepairEvent::Welcome(welcome) => {
            assert_eq!((welcome.node.as_str(), welcome.rtp_port), ("cloud-1", 5222));
        }
        other => panic!("{other:?}"),
    }
    let info = stream_up(&mut edge).await;
    assert_eq!((info.key.as_str(), info.ssrc, info.start_unix_ms), ("live/first", Ssrc(1), 1234));
    assert_eq!((info.gop_start, info.newest), (Some(seqs[0]), Some(seqs[2])));
    assert_eq!(info.headers, Headers::default());
    assert_eq!(edge.handle.protocol(), Some(Protocol::Downpour));
    assert!(edge.handle.rtt().is_some());

    let second = Feed::start(&cloud.origin, "live/second", 3);
    let info = stream_up(&mut edge).await;
    assert_eq!((info.ssrc, info.gop_start, info.newest), (Ssrc(3), None, None));

    let headers = Headers {
        video: Some(Tag::new(TagKind::Video, 0, &[0x17, 0, 1]).unwrap()),
        audio: Some(Tag::new(TagKind::Audio, 0, &[0xaf, 0]).unwrap()),
        metadata: Some(Tag::new(TagKind::Script, 0, b"\x02\x00\x0aonMetaData").unwrap()),
    };
    second.stream.set_headers(headers.clone());
    cloud.origin.updated(&second.stream);
    let wanted = RepairEvent::StreamUpdate { ssrc: Ssrc(3), headers };
    edge.wait(|event| (event == wanted).then_some(())).await;

    cloud.origin.end(&first.stream);
    let wanted = RepairEvent::StreamEnd { ssrc: Ssrc(1), last_seq: Some(seqs[2]) };
    edge.wait(|event| (event == wanted).then_some(())).await;
    edge.handle.nack(nack(&first, 1, &seqs[2..]));
    assert_eq!(edge.repair().await, first.packet(seqs[2]), "an ended stream can be repaired");

    // What ends together with the cloud is told before the connection closes.
    cloud.origin.end(&second.stream);
    cloud.stop().await;
    let wanted = RepairEvent::StreamEnd { ssrc: Ssrc(3), last_seq: None };
    edge.wait(|event| (event == wanted).then_some(())).await;
    assert_eq!(edge.disconnected().await, "the cloud is shutting down");
}

#[tokio::test]
async fn nacks_bring_repairs_and_gone() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(600);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;

    // Across the wrap, and few enough for any socket buffer: nothing is asked for twice here.
    let wanted = &seqs[510..570];
    let mut asked = wanted.to_vec();
    asked.extend([Seq(64), Seq(900), Seq(64999)]);
    edge.handle.nack(nack(&feed, 1, &asked));
    edge.handle.nack(Nack { ssrc: Ssrc(99), copies: 1, slack_ms: 500, seqs: vec![Seq(1)] });
    let (mut repaired, mut gone) = (HashSet::new(), HashSet::new());
    let deadline = Instant::now() + Duration::from_secs(10);
    while repaired.len() < 60 || gone.len() < 4 {
        assert!(Instant::now() < deadline, "{} {gone:?} {:?}", repaired.len(), cloud.metrics);
        match edge.wait(Some).await {
            RepairEvent::Repair(packet) => {
                let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
                assert_eq!(packet, feed.packet(seq));
                assert!(repaired.insert(seq), "one copy was asked for");
            }
            RepairEvent::Gone(part) => {
                gone.extend(part.seqs.into_iter().map(|seq| (part.ssrc.0, seq.0)));
            }
            _ => {}
        }
    }
    // The 600 packets from 65000 on reach to 63.
    assert_eq!(gone, HashSet::from([(7, 64), (7, 900), (7, 64999), (99, 1)]));
    assert_eq!(repaired, wanted.iter().copied().collect());
    let metrics = &cloud.metrics.downpour;
    assert_eq!((metrics.asked.get(), metrics.repairs.get(), metrics.gone.get()), (64, 60, 4));
    assert_eq!(edge.metrics.asked.get(), 64);
    assert_eq!(edge.metrics.repairs.get(), 60);
}

#[tokio::test]
async fn copies_come_apart() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(2);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    edge.handle.nack(nack(&feed, 3, &seqs));
    let mut at = Vec::new();
    for i in 0..6 {
        assert_eq!(edge.repair().await, feed.packet(seqs[i % 2]));
        at.push(Instant::now());
    }
    assert!(at[5] - at[0] >= Duration::from_millis(4), "{:?}", at[5] - at[0]);
    assert_eq!(cloud.metrics.downpour.repairs.get(), 6);
    assert_eq!(cloud.metrics.downpour.asked.get(), 2);
}

#[tokio::test]
async fn heartbeats_reveal_a_lost_tail() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    stream_up(&mut edge).await;
    let seqs = feed.push(5);
    let pushed = Instant::now();
    let beat = Heartbeat { ssrc: Ssrc(7), last: seqs[4] };
    heartbeat(&mut edge, beat).await;
    assert!(pushed.elapsed() < Duration::from_millis(500), "{:?}", pushed.elapsed());
    for _ in 0..3 {
        heartbeat(&mut edge, beat).await;
    }
    assert!(pushed.elapsed() >= Duration::from_millis(190), "told ever less often");
}

/// A `downpour/1` edge in its raw parts.
struct RawEdge {
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
    reader: ControlReader,
    _endpoint: quinn::Endpoint,
}

impl RawEdge {
    async fn dial(addr: SocketAddr, transport: TransportConfig) -> Self {
        let endpoint = quic_client();
        let connection = dial(&endpoint, addr, b"downpour/1", transport).await.unwrap();
        let (send, recv) = connection.open_bi().await.unwrap();
        let reader = ControlReader::new(1 << 20);
        Self { connection, send, recv, reader, _endpoint: endpoint }
    }

    async fn hello(addr: SocketAddr, transport: TransportConfig) -> Self {
        let mut edge = Self::dial(addr, transport).await;
        edge.send(&hello(&["*"])).await;
        assert!(matches!(edge.receive().await, CloudMessage::Welcome(_)));
        edge
    }

    async fn send(&mut self, message: &EdgeMessage) {
        self.send.write_all(&encode_control(message).unwrap()).await.unwrap();
    }

    async fn receive(&mut self) -> CloudMessage {
        loop {
            if let Some(message) = self.reader.next_message().unwrap() {
                return message;
            }
            let mut buffer = [0; 1000];
            let read = within(self.recv.read(&mut buffer)).await.unwrap().unwrap();
            self.reader.push(&buffer[..read]);
        }
    }

    /// The code and reason with which the cloud closed.
    async fn closed(&self) -> (u64, String) {
        match within(self.connection.closed()).await {
            ConnectionError::ApplicationClosed(close) => {
                (close.error_code.into_inner(), String::from_utf8_lossy(&close.reason).into_owned())
            }
            other => panic!("{other}"),
        }
    }
}

fn hello(streams: &[&str]) -> EdgeMessage {
    EdgeMessage::Hello(Hello {
        version: 1,
        node: "raw".into(),
        token: None,
        rtp_port: None,
        rtp_paths: 1,
        group: None,
        parity: false,
        latency_ms: 500,
        streams: streams.iter().map(|pattern| pattern.parse().unwrap()).collect(),
    })
}

#[tokio::test]
async fn what_does_not_fit_a_datagram_comes_on_a_stream_of_its_own() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(20);
    let mut small = TransportConfig::default();
    small.datagram_receive_buffer_size(Some(600));
    let mut none = TransportConfig::default();
    none.datagram_receive_buffer_size(None);
    for transport in [small, none] {
        let edge = RawEdge::hello(cloud.addr, transport).await;
        // This nack comes on a stream too.
        let mut stream = edge.connection.open_uni().await.unwrap();
        stream.write_all(&nack(&feed, 1, &seqs).encode(2000)[0]).await.unwrap();
        stream.finish().unwrap();
        let mut repaired = HashSet::new();
        for _ in &seqs {
            let mut stream = within(edge.connection.accept_uni()).await.unwrap();
            let message = Bytes::from(within(stream.read_to_end(2048)).await.unwrap());
            let Ok(Message::Repair(packet)) = Message::parse(message) else { panic!() };
            let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
            assert_eq!(packet, feed.packet(seq));
            repaired.insert(seq);
        }
        assert_eq!(repaired.len(), 20);
    }
}

#[tokio::test]
async fn subscriptions_grow_and_shrink() {
    let cloud = Cloud::start();
    let a = Feed::start(&cloud.origin, "live/a", 1);
    let mut b = Feed::start(&cloud.origin, "live/b", 2);
    let seqs = b.push(1);
    let mut edge = RawEdge::dial(cloud.addr, TransportConfig::default()).await;
    edge.send(&hello(&["live/a"])).await;
    assert!(matches!(edge.receive().await, CloudMessage::Welcome(_)));
    assert!(matches!(edge.receive().await, CloudMessage::StreamUp(info) if info.ssrc == Ssrc(1)));

    // A stream that is not subscribed to is not repaired either.
    let ask = nack(&b, 1, &seqs).encode(1000).remove(0);
    edge.connection.send_datagram(ask.clone()).unwrap();
    let answer = within(edge.connection.read_datagram()).await.unwrap();
    assert_eq!(
        Message::parse(answer),
        Ok(Message::Gone(Gone { ssrc: Ssrc(2), seqs: seqs.clone() }))
    );

    edge.send(&EdgeMessage::Subscribe { streams: vec!["live/*".parse().unwrap()] }).await;
    assert!(matches!(edge.receive().await, CloudMessage::StreamUp(info) if info.ssrc == Ssrc(2)));
    edge.connection.send_datagram(ask).unwrap();
    within(async {
        loop {
            let datagram = edge.connection.read_datagram().await.unwrap();
            if let Ok(Message::Repair(packet)) = Message::parse(datagram) {
                return assert_eq!(packet, b.packet(seqs[0]));
            }
        }
    })
    .await;

    edge.send(&EdgeMessage::Unsubscribe { streams: vec!["live/*".parse().unwrap()] }).await;
    // Unknown messages are ignored; this one also shows that the one before was handled.
    edge.send.write_all(b"\0\0\0\x10{\"type\":\"dance\"}").await.unwrap();
    edge.send(&EdgeMessage::Subscribe { streams: vec!["x/y".parse().unwrap()] }).await;
    Feed::start(&cloud.origin, "x/y", 3);
    assert!(matches!(edge.receive().await, CloudMessage::StreamUp(info) if info.ssrc == Ssrc(3)));
    cloud.origin.end(&b.stream);
    cloud.origin.end(&a.stream);
    let message = edge.receive().await;
    assert_eq!(message, CloudMessage::StreamEnd { ssrc: Ssrc(1), last_seq: None });
}

#[tokio::test]
async fn an_edge_that_reads_slowly_ends_up_with_the_truth() {
    let cloud = Cloud::start();
    let mut transport = TransportConfig::default();
    transport.stream_receive_window(2000u32.into());
    let mut edge = RawEdge::hello(cloud.addr, transport).await;
    let feeds: Vec<_> =
        (1..=3000).map(|i| Feed::start(&cloud.origin, &format!("live/{i}"), i)).collect();
    for feed in feeds.iter().step_by(2) {
        cloud.origin.end(&feed.stream);
        cloud.origin.remove(feed.ssrc());
    }
    let live: HashSet<_> = feeds.iter().skip(1).step_by(2).map(|feed| feed.ssrc().0).collect();
    let mut told = HashSet::new();
    while told != live {
        match edge.receive().await {
            CloudMessage::StreamUp(info) => assert!(told.insert(info.ssrc.0)),
            CloudMessage::StreamEnd { ssrc, .. } => assert!(told.remove(&ssrc.0)),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_broken_edge_is_told_why_and_counted() {
    let cloud = Cloud::start();
    let frame = |json: &str| [&(json.len() as u32).to_be_bytes()[..], json.as_bytes()].concat();
    let two_hellos = [
        encode_control(&hello(&[])).unwrap().to_vec(),
        encode_control(&hello(&[])).unwrap().to_vec(),
    ]
    .concat();
    let patterns: Vec<StreamPattern> =
        (0..1025).map(|i| format!("live/{i}").parse().unwrap()).collect();
    let mut many = encode_control(&hello(&[])).unwrap().to_vec();
    many.extend(encode_control(&EdgeMessage::Subscribe { streams: patterns }).unwrap());
    let cases: [(Vec<u8>, &str); 7] = [
        (frame(r#"{"type":"report"}"#), "the first message was not hello"),
        (frame("nonsense"), "invalid control message"),
        (frame(r#"{"type":"hello","version":1,"node":"e","streams":["?"]}"#), "stream pattern"),
        (vec![0, 0, 0, 0], "control message of 0 bytes"),
        (vec![0xff; 4], "control message of 4294967295 bytes"),
        (two_hellos, "hello came twice"),
        (many, "more than 1024 stream patterns"),
    ];
    let count = cases.len() as u64;
    for (bytes, wanted) in cases {
        let mut edge = RawEdge::dial(cloud.addr, TransportConfig::default()).await;
        edge.send.write_all(&bytes).await.unwrap();
        let (code, reason) = edge.closed().await;
        assert_eq!(code, 1, "{reason}");
        assert!(reason.contains(wanted), "{reason:?} should contain {wanted:?}");
    }
    assert_eq!(cloud.metrics.malformed.get(), count);

    let datagrams: [(&[u8], &str); 3] = [
        (&[1, 9, 0, 0, 0, 7, 0, 1, 0, 0], "nack for 9 copies"),
        (&[1, 1, 0, 0], "length does not match"),
        (&[4, 0, 0, 0, 0, 7, 0, 1], "a message that only the cloud sends"),
    ];
    for (datagram, wanted) in datagrams {
        let edge = RawEdge::hello(cloud.addr, TransportConfig::default()).await;
        edge.connection.send_datagram(Bytes::from_static(&[250, 1, 2])).unwrap();
        edge.connection.send_datagram(Bytes::copy_from_slice(datagram)).unwrap();
        let (code, reason) = edge.closed().await;
        assert!(code == 1 && reason.contains(wanted), "{code} {reason:?}");
    }
    until(|| cloud.metrics.malformed.get() == count + 3).await;

    let edge = RawEdge::hello(cloud.addr, TransportConfig::default()).await;
    let mut stream = edge.connection.open_uni().await.unwrap();
    let _ = stream.write_all(&[1; 5000]).await;
    let _ = stream.finish();
    assert!(edge.closed().await.1.contains("at most 2048 are allowed"));
}

#[tokio::test]
async fn hello_must_come_in_time() {
    let cloud = Cloud::start();
    let edge = RawEdge::dial(cloud.addr, TransportConfig::default()).await;
    assert_eq!(edge.closed().await, (2, "no hello came in time".into()));
    assert_eq!(cloud.metrics.refused_edge.get(), 1);
}

#[tokio::test]
async fn a_budget_is_enforced_and_counted() {
    let cloud = Cloud::start_with(RepairServerSettings {
        repair_budget: 1,
        repair_burst: 50_000,
        ..Default::default()
    });
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    // A hundredth of that is less than everybody has: 16 KiB a second, and ten of those at once.
    let seqs = feed.push(200);
    let burst = 10 * 16 * 1024 / 1132;
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    let began = Instant::now();
    edge.handle.nack(Nack { slack_ms: 1000, ..nack(&feed, 1, &seqs) });
    for seq in &seqs[..burst] {
        assert_eq!(edge.repair().await, feed.packet(*seq), "in the order of the nack");
    }
    let metrics = &cloud.metrics;
    until(|| metrics.downpour.repairs.get() + metrics.dropped_late.get() == 200).await;
    let most = (10.0 + began.elapsed().as_secs_f64()) * 16.0 * 1024.0;
    assert!(metrics.downpour.repair_bytes.get() as f64 <= most);
    assert!(metrics.dropped_late.get() > 0);
    assert!(metrics.deferred_budget.get() >= 40, "{:?}", metrics.deferred_budget);
    // In the second that they had, those that waited went out as budget came.
    assert!(metrics.downpour.repairs.get() > burst as u64 + 5, "{:?}", metrics.downpour.repairs);

    // What there is no budget for goes by urgency, not by who came first.
    let seqs = feed.push(2);
    edge.handle.nack(Nack { slack_ms: 5000, ..nack(&feed, 1, &seqs[..1]) });
    edge.handle.nack(Nack { slack_ms: 4000, ..nack(&feed, 1, &seqs[1..]) });
    let late = feed.push(20);
    edge.handle.nack(Nack { slack_ms: 6000, ..nack(&feed, 1, &late) });
    let mut order = Vec::new();
    while order.len() < 4 {
        let packet = edge.repair().await;
        let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
        if seqs.contains(&seq) || late.contains(&seq) {
            order.push(seq);
        }
    }
    assert_eq!(order[2..], late[..2], "{order:?}");
}

#[tokio::test]
async fn no_budget_is_no_limit() {
    let cloud = Cloud::start_with(RepairServerSettings {
        repair_budget: 0,
        repair_burst: 1,
        ..Default::default()
    });
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(3000);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    for part in seqs.chunks(100) {
        edge.handle.nack(nack(&feed, 1, part));
        for _ in part {
            edge.repair().await;
        }
    }
    assert_eq!(cloud.metrics.downpour.repairs.get(), 3000);
    assert_eq!(cloud.metrics.deferred_budget.get(), 0);
}

#[tokio::test]
async fn a_whole_history_fits_the_default_budget() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    // 4 Mbit/s for four seconds, and at an edge that joins then.
    let mut seqs = Vec::new();
    for _ in 0..4 {
        seqs.extend(feed.push(450));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    let mut missing: HashSet<Seq> = seqs.into_iter().collect();
    let ask: Vec<_> = missing.iter().copied().collect();
    edge.handle.nack(nack(&feed, 1, &ask));
    while !missing.is_empty() {
        let packet = edge.repair().await;
        missing.remove(&Seq(u16::from_be_bytes([packet[2], packet[3]])));
    }
    assert_eq!((cloud.metrics.dropped_budget.get(), cloud.metrics.dropped_late.get()), (0, 0));
}

#[tokio::test]
async fn a_flood_of_nacks_is_cut_off() {
    let cloud = Cloud::start();
    let feed = Feed::start(&cloud.origin, "live/a", 7);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    let all: Vec<_> = (0..60_000).map(Seq).collect();
    until(|| {
        edge.handle.nack(nack(&feed, 3, &all));
        while edge.events.try_recv().is_ok() {}
        cloud.metrics.dropped_flood.get() > 0
    })
    .await;
    assert!(cloud.metrics.downpour.gone.get() > 0);
}

#[derive(Clone, Default)]
struct Doorman {
    seen: Arc<Mutex<Vec<String>>>,
}

struct Guest(Doorman);

impl EdgeHandler for Doorman {
    fn hello(&self, edge: &EdgeHello) -> Result<Box<dyn EdgeSession>, String> {
        if edge.node == "mallory" {
            return Err("mallory may not".into());
        }
        let seen = format!("hello {} {:?} {:?}", edge.node, edge.token, edge.rtp_port);
        self.seen.lock().unwrap().push(seen);
        Ok(Box::new(Guest(self.clone())))
    }
}

impl EdgeSession for Guest {
    fn subscribed(&mut self, streams: &[StreamPattern]) {
        self.0.seen.lock().unwrap().push(format!("wants {}", streams[0]));
    }

    fn reported(&mut self, report: Report) {
        self.0.seen.lock().unwrap().push(format!("asked {}", report.streams[0].asked));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.seen.lock().unwrap().push("left".into());
    }
}

#[tokio::test]
async fn edges_are_admitted_and_followed() {
    let identity = Arc::new(Identity::generate().unwrap());
    let metrics = RepairServerMetrics::register(&Registry::new()).unwrap();
    let settings = RepairServerSettings { token: Some("secret".into()), ..Default::default() };
    let doorman = Doorman::default();
    let server = RepairServer::bind(
        "127.0.0.1:0".parse().unwrap(),
        &identity,
        OutgoingStreams::new(),
        settings,
        metrics.clone(),
    )
    .unwrap()
    .with_handler(Arc::new(doorman.clone()));
    let cloud = Cloud::run(server, OutgoingStreams::new(), identity, metrics);

    let settings = edge_settings(cloud.addr);
    for token in [None, Some("Secret".to_owned())] {
        let mut stranger = Edge::start(RepairClientSettings { token, ..settings.clone() });
        assert_eq!(stranger.disconnected().await, "the token is wrong or missing");
        assert!(stranger.metrics.refused_token.get() >= 1);
        assert_eq!((stranger.metrics.refused_edge.get(), stranger.metrics.connects.get()), (0, 1));
    }
    let settings = RepairClientSettings { token: Some("secret".into()), ..settings };
    let mut mallory =
        Edge::start(RepairClientSettings { node: "mallory".into(), ..settings.clone() });
    assert_eq!(mallory.disconnected().await, "mallory may not");
    assert!(mallory.metrics.refused_edge.get() >= 1);
    assert_eq!(mallory.metrics.refused_token.get(), 0);
    drop(mallory);

    let mut edge = Edge::start(settings);
    welcome(&mut edge).await;
    let report = StreamReport { ssrc: 7, asked: 42, ..Default::default() };
    edge.handle.report(Report { round_trip_us: 0, streams: vec![report] });
    let seen = || doorman.seen.lock().unwrap().clone();
    until(|| seen().len() == 3).await;
    edge.shutdown.cancel();
    until(|| seen().len() == 4).await;
    assert_eq!(seen(), ["hello edge-1 Some(\"secret\") Some(5004)", "wants *", "asked 42", "left"]);
    assert!(cloud.metrics.refused_edge.get() >= 1);
    assert!(cloud.metrics.refused_token.get() >= 2);
}

#[tokio::test]
async fn the_edge_comes_back_when_the_cloud_does() {
    let cloud = Cloud::start();
    let (addr, identity, origin) = (cloud.addr, cloud.identity.clone(), cloud.origin.clone());
    let mut feed = Feed::start(&origin, "live/a", 7);
    let seqs = feed.push(3);
    let mut edge = Edge::start(edge_settings(addr));
    stream_up(&mut edge).await;
    cloud.stop().await;
    edge.disconnected().await;
    assert_eq!((edge.handle.rtt(), edge.handle.protocol()), (None, None));
    edge.handle.nack(nack(&feed, 1, &seqs));

    let _cloud = Cloud::restart_at(addr, identity, origin, RepairServerSettings::default()).await;
    stream_up(&mut edge).await;
    assert_eq!(edge.metrics.dropped_nacks.get(), 3, "nacks from before are forgotten");
    edge.handle.nack(nack(&feed, 1, &seqs[..1]));
    assert_eq!(edge.repair().await, feed.packet(seqs[0]));
}

#[test]
fn a_cloud_that_was_killed_is_noticed_when_it_is_back() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (edge_runtime, first, second) = (runtime(), runtime(), runtime());
    let cloud = first.block_on(async { Cloud::start() });
    let (addr, identity, origin) = (cloud.addr, cloud.identity.clone(), cloud.origin.clone());
    Feed::start(&origin, "live/a", 7);
    let mut edge = edge_runtime.block_on(async {
        let mut edge = Edge::start(edge_settings(addr));
        stream_up(&mut edge).await;
        edge
    });
    // Nothing is sent any more, not even that the connection is closed.
    std::mem::forget(cloud);
    first.shutdown_timeout(Duration::from_secs(1));
    let killed = Instant::now();
    let _cloud = second.block_on(async {
        Cloud::start_at(addr, identity, origin, RepairServerSettings::default())
    });
    edge_runtime.block_on(stream_up(&mut edge));
    // Well below the idle timeout of 10 s: the new process resets the old one's connections.
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
}

#[tokio::test]
async fn a_pinned_certificate_is_the_only_one() {
    let cloud = Cloud::start();
    let pinned = |fingerprint: Fingerprint| RepairClientSettings {
        trust: Trust::Pinned(fingerprint),
        ..edge_settings(cloud.addr)
    };
    let mut edge = Edge::start(pinned(cloud.identity.fingerprint()));
    welcome(&mut edge).await;

    let other = Identity::generate().unwrap().fingerprint();
    let mut edge = Edge::start(pinned(other));
    let reason = edge.disconnected().await;
    let wanted = format!(
        "the certificate of cloud {} has the fingerprint {}, but {other} is pinned",
        cloud.addr,
        cloud.identity.fingerprint()
    );
    assert!(reason.starts_with(&wanted), "{reason}");
    assert_eq!(edge.metrics.connects.get(), 0);
    assert!(edge.metrics.connect_failures.get() > 0);
    assert!(edge.metrics.refused_certificate.get() > 0);
    until(|| cloud.metrics.refused_handshake.get() > 0).await;
}

#[tokio::test]
async fn trust_on_first_use_refuses_a_changed_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("known-clouds");
    let cloud = Cloud::start();
    let addr = cloud.addr;
    let settings =
        RepairClientSettings { trust: Trust::TrustOnFirstUse(file.clone()), ..edge_settings(addr) };
    let mut edge = Edge::start(settings.clone());
    welcome(&mut edge).await;
    let kept = fs::read_to_string(&file).unwrap();
    assert_eq!(kept, format!("{addr} {}\n", cloud.identity.fingerprint()));
    cloud.stop().await;
    edge.disconnected().await;

    let identity = Arc::new(Identity::generate().unwrap());
    let _cloud =
        Cloud::restart_at(addr, identity, OutgoingStreams::new(), RepairServerSettings::default())
            .await;
    let refusal = edge
        .wait(|event| match event {
            RepairEvent::Disconnected { reason } if reason.contains("changed") => Some(reason),
            RepairEvent::Welcome(_) => panic!("trusted a changed certificate"),
            _ => None,
        })
        .await;
    assert!(refusal.contains(&format!("remove line 1 of {}", file.display())), "{refusal}");
    assert_eq!(fs::read_to_string(&file).unwrap(), kept);

    // What the message says to do helps, without a restart.
    fs::write(&file, "").unwrap();
    welcome(&mut edge).await;
}

#[tokio::test]
async fn an_authority_vouches_for_the_host_name() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
    let identity = Arc::new(Identity::load_or_create(&paths[0], &paths[1]).unwrap());
    let addr = "127.0.0.1:0".parse().unwrap();
    let cloud =
        Cloud::start_at(addr, identity, OutgoingStreams::new(), RepairServerSettings::default());
    let settings = |host: &str, ca: &Path| RepairClientSettings {
        cloud: format!("{host}:{}", cloud.addr.port()),
        trust: Trust::Ca(ca.into()),
        ..edge_settings(cloud.addr)
    };
    let mut edge = Edge::start(settings("localhost", &paths[0]));
    welcome(&mut edge).await;
    let mut edge = Edge::start(settings("127.0.0.1", &paths[0]));
    let reason = edge.disconnected().await;
    assert!(reason.starts_with("the certificate of cloud 127.0.0.1:"), "{reason}");
    assert!(edge.metrics.refused_certificate.get() > 0);
    until(|| cloud.metrics.refused_handshake.get() > 0).await;
}

#[tokio::test]
async fn a_cloud_address_must_be_one() {
    for cloud in ["", "cloud", ":4242", "cloud:", "cloud:x", "a b:1", "cloud:99999"] {
        let settings = RepairClientSettings {
            cloud: cloud.into(),
            ..edge_settings("127.0.0.1:1".parse().unwrap())
        };
        let metrics = RepairClientMetrics::register(&Registry::new()).unwrap();
        let spawned =
            RepairClient::spawn(settings, mpsc::channel(1).0, metrics, CancellationToken::new());
        assert!(matches!(spawned, Err(ClientError::Cloud(_))), "{cloud:?}");
    }
}

#[tokio::test]
async fn a_broken_cloud_is_left_with_a_reason() {
    let identity = Identity::generate().unwrap();
    let config = identity.server_config(&[b"downpour/1"]).unwrap();
    let endpoint = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = endpoint.local_addr().unwrap();
    // One way to break the protocol for each connection, in turn.
    let welcome = br#"{"type":"welcome","version":1,"node":"c","rtp_port":1,"nonce":"00000000000000000000000000000000"}"#;
    let frame = |json: &[u8]| [&(json.len() as u32).to_be_bytes()[..], json].concat();
    let ways: Vec<(Vec<u8>, Option<Bytes>)> = vec![
        (frame(br#"{"type":"later"}"#), None),
        (vec![0, 0x20, 0, 0], None),
        ([frame(welcome), frame(welcome)].concat(), None),
        (frame(welcome), Some(Bytes::from_static(&[2, 0x80]))),
        (
            frame(welcome),
            Nack { ssrc: Ssrc(1), copies: 1, slack_ms: 500, seqs: vec![Seq(1)] }.encode(100).pop(),
        ),
    ];
    let served = ways.clone();
    tokio::spawn(async move {
        for (control, datagram) in served {
            let connection = endpoint.accept().await.unwrap().await.unwrap();
            let (mut send, _recv) = connection.accept_bi().await.unwrap();
            send.write_all(&control).await.unwrap();
            if let Some(datagram) = datagram {
                connection.send_datagram(encode_repair(&[0x80; 20])).unwrap();
                connection.send_datagram(datagram).unwrap();
            }
            connection.closed().await;
        }
    });
    let mut edge = Edge::start(edge_settings(addr));
    for wanted in
        ["not welcome", "2097152 bytes", "welcome came twice", "does not match its type", "nack"]
    {
        let reason = edge.disconnected().await;
        assert!(reason.contains("broke the protocol") && reason.contains(wanted), "{reason}");
    }
    assert_eq!(edge.metrics.malformed.get(), ways.len() as u64);
    assert_eq!(edge.metrics.connected_downpour.get(), 0);
}
