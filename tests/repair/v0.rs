//! The retransmission service of wire v0: our server with a client written from `docs/wire.md` alone,
//! and our client with a server that behaves like the existing cloud.

use std::time::Duration;

use crate::common::repair_node::{
    Cloud, Edge, Feed, dial, edge_settings, quic_client, until, within,
};
use downpour_distribution::{
    downstream::{outgoing::OutgoingStreams, repair_server::RepairServerSettings},
    protocol::Protocol,
    tls::Identity,
    upstream::repair_client::{ProtocolChoice, RepairClientSettings, RepairEvent},
};
use downpour_repair::{
    message::Nack,
    rtp::{Seq, Ssrc},
};
use quinn::{Connection, RecvStream, SendStream, TransportConfig};
use tokio::{sync::mpsc, time::sleep};

/// An existing edge, step by step.
struct V0Edge {
    connection: Connection,
    info: SendStream,
    lengths: RecvStream,
    data: Option<(SendStream, RecvStream)>,
    _endpoint: quinn::Endpoint,
}

impl V0Edge {
    async fn connect(cloud: &Cloud) -> Self {
        let endpoint = quic_client();
        let alpn = b"quic-echo-server";
        let connection =
            dial(&endpoint, cloud.addr, alpn, TransportConfig::default()).await.unwrap();
        let (info, lengths) = connection.open_bi().await.unwrap();
        Self { connection, info, lengths, data: None, _endpoint: endpoint }
    }

    async fn request(&mut self, requests: &[(u32, u16)]) {
        self.info.write_all(&encode(requests)).await.unwrap();
    }

    async fn length(&mut self) -> usize {
        let mut length = [0; 2];
        within(self.lengths.read_exact(&mut length)).await.unwrap();
        u16::from_be_bytes(length).into()
    }

    async fn packet(&mut self, length: usize) -> Vec<u8> {
        if self.data.is_none() {
            self.data = Some(within(self.connection.accept_bi()).await.unwrap());
        }
        let mut packet = vec![0; length];
        within(self.data.as_mut().unwrap().1.read_exact(&mut packet)).await.unwrap();
        packet
    }

    async fn answer(&mut self) -> Option<Vec<u8>> {
        match self.length().await {
            0 => None,
            length => Some(self.packet(length).await),
        }
    }
}

fn encode(requests: &[(u32, u16)]) -> Vec<u8> {
    requests
        .iter()
        .flat_map(|(ssrc, seq)| [&ssrc.to_be_bytes()[..], &seq.to_be_bytes()[..]].concat())
        .collect()
}

#[tokio::test]
async fn cloud_answers_known_and_unknown_packets() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 1020304);
    let seqs = feed.push(700);
    assert_eq!((seqs[0], seqs[699]), (Seq(65000), Seq(163)), "across the wrap");

    let mut edge = V0Edge::connect(&cloud).await;
    for seq in [seqs[0], seqs[535], seqs[536], seqs[699]] {
        edge.request(&[(1020304, seq.0)]).await;
        assert_eq!(edge.answer().await.unwrap(), feed.packet(seq));
    }
    for missing in [(1020304, 164), (1020304, 64999), (1020305, 65000), (0, 0)] {
        edge.request(&[missing]).await;
        assert_eq!(edge.answer().await, None);
    }
    edge.request(&[(1020304, 65000)]).await;
    assert_eq!(edge.answer().await.unwrap(), feed.packet(Seq(65000)), "still in step");

    let metrics = &cloud.metrics;
    assert_eq!((metrics.v0.asked.get(), metrics.v0.repairs.get()), (9, 5));
    assert_eq!((metrics.v0.gone.get(), metrics.unknown_ssrc.get()), (4, 2));
    let counts = &feed.stream.repairs;
    let load =
        |count: &std::sync::atomic::AtomicU64| count.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!((load(&counts.asked), load(&counts.served), load(&counts.gone)), (7, 5, 2));
    assert_eq!(metrics.v0.open.get(), 1);
    edge.connection.close(0u32.into(), b"");
    until(|| metrics.v0.open.get() == 0).await;
    cloud.stop().await;
}

#[tokio::test]
async fn cloud_parses_requests_split_anywhere() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(4);
    let mut edge = V0Edge::connect(&cloud).await;
    let requests: Vec<_> = seqs.iter().map(|seq| (7, seq.0)).collect();
    for piece in [1, 2, 4, 5, 7] {
        for bytes in encode(&requests).chunks(piece) {
            edge.info.write_all(bytes).await.unwrap();
            // Makes separate packets of the pieces. The answer does not depend on it.
            sleep(Duration::from_millis(2)).await;
        }
        for &seq in &seqs {
            assert_eq!(edge.answer().await.unwrap(), feed.packet(seq));
        }
    }
}

#[tokio::test]
async fn cloud_answers_hundreds_of_requests_in_order() {
    let cloud = Cloud::start();
    let mut feeds = [7, 8].map(|ssrc| Feed::start(&cloud.origin, &format!("live/{ssrc}"), ssrc));
    let seqs = feeds[0].push(250);
    assert_eq!(feeds[1].push(250), seqs);
    let mut edge = V0Edge::connect(&cloud).await;
    let requests: Vec<_> = seqs.iter().flat_map(|seq| [(7, seq.0), (8, seq.0), (8, 1)]).collect();
    edge.request(&requests).await;
    for &seq in &seqs {
        assert_eq!(edge.answer().await.unwrap(), feeds[0].packet(seq));
        assert_eq!(edge.answer().await.unwrap(), feeds[1].packet(seq));
        assert_eq!(edge.answer().await, None);
    }
}

#[tokio::test]
async fn edge_may_read_all_lengths_first() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(300);
    let mut edge = V0Edge::connect(&cloud).await;
    edge.request(&seqs.iter().map(|seq| (7, seq.0)).collect::<Vec<_>>()).await;
    let mut lengths = Vec::new();
    for _ in &seqs {
        lengths.push(edge.length().await);
    }
    for (seq, length) in seqs.into_iter().zip(lengths) {
        assert_eq!(edge.packet(length).await, feed.packet(seq));
    }
}

#[tokio::test]
async fn single_read_returns_a_whole_packet() {
    // An existing edge reads each packet with a single read and does not check its length.
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let mut edge = V0Edge::connect(&cloud).await;
    for seq in feed.push(200) {
        edge.request(&[(7, seq.0)]).await;
        if edge.data.is_none() {
            edge.data = Some(within(edge.connection.accept_bi()).await.unwrap());
        }
        let length = edge.length().await;
        let mut packet = vec![0; length];
        let read = within(edge.data.as_mut().unwrap().1.read(&mut packet)).await.unwrap();
        assert_eq!(read, Some(length));
        assert_eq!(packet, feed.packet(seq));
    }
}

#[tokio::test]
async fn cloud_survives_garbage_requests() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seq = feed.push(1)[0];
    let mut good = V0Edge::connect(&cloud).await;
    let mut bad = V0Edge::connect(&cloud).await;
    let garbage: Vec<u8> =
        (0..6003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    bad.info.write_all(&garbage).await.unwrap();
    for _ in 0..1000 {
        assert_eq!(bad.answer().await, None);
    }
    bad.info.finish().unwrap();
    assert_eq!(
        within(bad.lengths.read(&mut [0])).await.unwrap(),
        None,
        "half a request has no answer"
    );
    assert_eq!(cloud.metrics.unknown_ssrc.get(), 1000);
    good.request(&[(7, seq.0)]).await;
    assert_eq!(good.answer().await.unwrap(), feed.packet(seq));

    // The next info stream of the same connection is served too.
    (bad.info, bad.lengths) = bad.connection.open_bi().await.unwrap();
    bad.request(&[(7, seq.0)]).await;
    assert_eq!(bad.answer().await.unwrap(), feed.packet(seq));
}

#[tokio::test]
async fn cloud_closes_an_edge_without_packets() {
    let cloud = Cloud::start();
    let mut edge = V0Edge::connect(&cloud).await;
    edge.request(&[(7, 1)]).await;
    // An existing edge accepts the data stream before it reads the length.
    let error = within(edge.connection.accept_bi()).await.unwrap_err();
    assert!(matches!(error, quinn::ConnectionError::ApplicationClosed(_)), "{error}");
}

#[tokio::test]
async fn cloud_refuses_v0_if_disabled() {
    let cloud = Cloud::start_with(RepairServerSettings { v0: false, ..Default::default() });
    let dialled =
        dial(&quic_client(), cloud.addr, b"quic-echo-server", TransportConfig::default()).await;
    assert!(dialled.is_err());
    until(|| cloud.metrics.refused_handshake.get() == 1).await;

    let mut edge = Edge::start(v0_settings(cloud.addr));
    edge.handle.nack(Nack { ssrc: Ssrc(7), copies: 1, slack_ms: 500, seqs: vec![Seq(1)] });
    let reason = edge.disconnected().await;
    assert!(reason.ends_with("does not speak the protocol that was asked for"), "{reason}");
    assert_eq!(edge.metrics.refused_protocol.get(), 1);
}

#[tokio::test]
async fn cloud_admits_v0_edges_by_address() {
    let start = |ranges: &[&str]| {
        Cloud::start_with(RepairServerSettings {
            v0_allow: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            ..Default::default()
        })
    };
    let cloud = start(&["192.0.2.0/24", "::1"]);
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seq = feed.push(1)[0];
    let edge = V0Edge::connect(&cloud).await;
    let closed = match within(edge.connection.closed()).await {
        quinn::ConnectionError::ApplicationClosed(close) => close,
        other => panic!("{other}"),
    };
    assert_eq!(closed.error_code, quinn::VarInt::from_u32(3));
    assert_eq!(&closed.reason[..], b"v0 repair is not allowed from this address");
    assert_eq!((cloud.metrics.refused_v0_address.get(), cloud.metrics.v0.accepted.get()), (1, 0));
    let mut edge = Edge::start(v0_settings(cloud.addr));
    let nack = Nack { ssrc: Ssrc(7), copies: 1, slack_ms: 500, seqs: vec![seq] };
    edge.handle.nack(nack.clone());
    assert_eq!(edge.disconnected().await, "v0 repair is not allowed from this address");
    assert!(edge.metrics.refused_edge.get() >= 1);
    // The list does not apply to other protocols.
    let mut edge = Edge::start(edge_settings(cloud.addr));
    edge.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;
    edge.handle.nack(nack);
    assert_eq!(edge.repair().await, feed.packet(seq));

    let cloud = start(&["192.0.2.0/24", "127.0.0.0/8"]);
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seq = feed.push(1)[0];
    let mut edge = V0Edge::connect(&cloud).await;
    edge.request(&[(7, seq.0)]).await;
    assert_eq!(edge.answer().await.unwrap(), feed.packet(seq));
}

#[tokio::test]
async fn cloud_refuses_too_many_connections() {
    let cloud =
        Cloud::start_with(RepairServerSettings { max_connections: 4, ..Default::default() });
    let mut edges = Vec::new();
    for _ in 0..4 {
        edges.push(V0Edge::connect(&cloud).await);
    }
    let alpn = b"quic-echo-server";
    let endpoint = quic_client();
    assert!(dial(&endpoint, cloud.addr, alpn, TransportConfig::default()).await.is_err());
    assert!(cloud.metrics.refused_full.get() >= 1);
    let gone = edges.pop().unwrap();
    gone.connection.close(0u32.into(), b"");
    until(|| cloud.metrics.v0.open.get() == 3).await;
    V0Edge::connect(&cloud).await;
}

#[tokio::test]
async fn budget_delays_repairs_to_v0_edges() {
    let cloud = Cloud::start_with(RepairServerSettings {
        repair_budget: 1,
        repair_burst: 5_000,
        ..Default::default()
    });
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    // The minimum budget is 16 KiB per second with a burst of ten seconds: 144 packets.
    let seqs = feed.push(155);
    let mut edge = V0Edge::connect(&cloud).await;
    let began = std::time::Instant::now();
    edge.request(&seqs.iter().map(|seq| (7, seq.0)).collect::<Vec<_>>()).await;
    for &seq in &seqs {
        assert_eq!(edge.answer().await.unwrap(), feed.packet(seq));
    }
    assert!(began.elapsed() >= Duration::from_millis(500), "{:?}", began.elapsed());
    assert!(cloud.metrics.deferred_budget.get() >= 5);
}

fn v0_settings(addr: std::net::SocketAddr) -> RepairClientSettings {
    RepairClientSettings { protocol: ProtocolChoice::Only(Protocol::V0), ..edge_settings(addr) }
}

#[tokio::test]
async fn edge_repairs_over_v0() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(400);
    let mut edge = Edge::start(v0_settings(cloud.addr));
    assert_eq!(edge.handle.rtt(), None);
    let mut asked = seqs.clone();
    asked.insert(100, Seq(9999));
    edge.handle.nack(nack(7, &asked));
    edge.wait(|event| {
        matches!(event, RepairEvent::Connected { protocol: Protocol::V0 }).then_some(())
    })
    .await;
    assert!(edge.handle.rtt().is_some());
    let (mut packets, mut gone) = (Vec::new(), Vec::new());
    while packets.len() < 400 || gone.is_empty() {
        let event = edge.wait(Some).await;
        match event {
            RepairEvent::Repair(packet) => packets.push(packet),
            RepairEvent::Gone(part) => gone.extend(part.seqs),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(gone, [Seq(9999)]);
    packets.sort();
    assert_eq!(packets, sorted(&feed, &seqs));
}

#[tokio::test]
async fn edge_reconnects_over_v0() {
    let cloud = Cloud::start();
    let (addr, identity, origin) = (cloud.addr, cloud.identity.clone(), cloud.origin.clone());
    let mut feed = Feed::start(&origin, "live/a", 7);
    let seq = feed.push(1)[0];
    let nack = Nack { ssrc: Ssrc(7), copies: 1, slack_ms: 500, seqs: vec![seq] };
    let mut edge = Edge::start(v0_settings(addr));
    edge.handle.nack(nack.clone());
    assert_eq!(edge.repair().await, feed.packet(seq));
    cloud.stop().await;
    edge.disconnected().await;
    let _cloud = Cloud::restart_at(addr, identity, origin, RepairServerSettings::default()).await;
    edge.handle.nack(nack);
    assert_eq!(edge.repair().await, feed.packet(seq));
}

/// The existing cloud: single reads for each half of a request, one answer after the other, none for an
/// unknown SSRC nor for what follows it; it ends if it is left while it owes an answer.
struct OldCloud {
    addr: std::net::SocketAddr,
    /// SSRC and sequence number of each request, or the reason why the existing cloud would fail.
    requests: mpsc::UnboundedReceiver<Result<(u32, u16), &'static str>>,
    _endpoint: quinn::Endpoint,
}

impl OldCloud {
    /// `takes` is the time that each answer takes.
    fn start(origin: OutgoingStreams, takes: Duration) -> Self {
        let config = Identity::generate().unwrap().server_config(&[b"quic-echo-server"]).unwrap();
        let endpoint = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
        let (seen, requests) = mpsc::unbounded_channel();
        let listener = endpoint.clone();
        tokio::spawn(async move {
            while let Some(incoming) = listener.accept().await {
                let connection = incoming.await.unwrap();
                tokio::spawn(serve_old(connection, origin.clone(), seen.clone(), takes));
            }
        });
        Self { addr: endpoint.local_addr().unwrap(), requests, _endpoint: endpoint }
    }

    /// The requests so far. Panics if the cloud would have failed.
    fn seen(&mut self) -> Vec<(u32, u16)> {
        let seen = std::iter::from_fn(|| self.requests.try_recv().ok());
        seen.map(|request| request.expect("the cloud lives on")).collect()
    }
}

async fn serve_old(
    connection: Connection,
    origin: OutgoingStreams,
    seen: mpsc::UnboundedSender<Result<(u32, u16), &'static str>>,
    takes: Duration,
) {
    let (mut data, _data_recv) = connection.open_bi().await.unwrap();
    let Ok((mut info, mut requests)) = connection.accept_bi().await else {
        seen.send(Err("closed before the info stream was seen: nil dereference")).unwrap();
        return;
    };
    loop {
        let (mut ssrc, mut seq) = ([0; 4], [0; 2]);
        match requests.read(&mut ssrc).await {
            Ok(Some(4)) => {}
            Ok(Some(_)) => return seen.send(Err("a short SSRC")).unwrap(),
            _ => return,
        }
        match requests.read(&mut seq).await {
            Ok(Some(2)) => {}
            _ => return seen.send(Err("no sequence number: panic")).unwrap(),
        }
        let (ssrc, seq) = (u32::from_be_bytes(ssrc), u16::from_be_bytes(seq));
        let _ = seen.send(Ok((ssrc, seq)));
        let Some(stream) = origin.stream(Ssrc(ssrc)) else {
            // Stuck.
            connection.closed().await;
            return;
        };
        sleep(takes).await;
        let packet = stream.packet(Seq(seq)).unwrap_or_default();
        let answered = match info.write_all(&(packet.len() as u16).to_be_bytes()).await {
            Ok(()) => data.write_all(&packet).await,
            error => error,
        };
        if answered.is_err() || connection.close_reason().is_some() {
            let _ = seen.send(Err("closed during an answer: panic"));
            return;
        }
    }
}

/// A NACK with plenty of time, for busy machines.
fn nack(ssrc: u32, seqs: &[Seq]) -> Nack {
    Nack { ssrc: Ssrc(ssrc), copies: 1, slack_ms: 10_000, seqs: seqs.to_vec() }
}

async fn repairs(edge: &mut Edge, count: usize) -> Vec<bytes::Bytes> {
    let mut packets = Vec::new();
    while packets.len() < count {
        packets.push(edge.repair().await);
    }
    packets.sort();
    packets
}

fn sorted(feed: &Feed, seqs: &[Seq]) -> Vec<bytes::Bytes> {
    let mut packets: Vec<_> = seqs.iter().map(|seq| feed.packet(*seq)).collect();
    packets.sort();
    packets
}

async fn gone(edge: &mut Edge) -> Vec<Seq> {
    let gone = edge.wait(|event| match event {
        RepairEvent::Gone(gone) => Some(gone),
        _ => None,
    });
    gone.await.seqs
}

#[tokio::test]
async fn edge_does_not_crash_an_existing_cloud() {
    let origin = OutgoingStreams::new();
    let mut feed = Feed::start(&origin, "live/a", 7);
    let seqs = feed.push(300);
    let mut cloud = OldCloud::start(origin, Duration::ZERO);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    edge.wait(|event| {
        matches!(event, RepairEvent::Connected { protocol: Protocol::V0 }).then_some(())
    })
    .await;
    // It stands by, and asks for nothing that the cloud may not know.
    edge.handle.nack(nack(7, &seqs));
    assert_eq!(repairs(&mut edge, 300).await, sorted(&feed, &seqs));
    assert_eq!(cloud.seen().len(), 300, "each once, and nothing else");
    edge.handle.nack(nack(7, &[Seq(1)]));
    assert_eq!(gone(&mut edge).await, [Seq(1)]);
    // What was not held may be held by now: it is not asked for less.
    edge.handle.nack(nack(7, &[Seq(1)]));
    assert_eq!(gone(&mut edge).await, [Seq(1)]);
    edge.shutdown.cancel();
    edge.wait_closed().await;
    assert_eq!(cloud.seen().len(), 2);
}

#[tokio::test]
async fn edge_leaves_only_when_an_existing_cloud_owes_nothing() {
    let origin = OutgoingStreams::new();
    let mut feed = Feed::start(&origin, "live/a", 7);
    let seqs = feed.push(300);
    let mut cloud = OldCloud::start(origin, Duration::from_millis(30));
    let mut edge = Edge::start(v0_settings(cloud.addr));
    edge.handle.nack(nack(7, &seqs));
    edge.repair().await;
    edge.shutdown.cancel();
    let mut answers = 1;
    while let Some(event) = within(edge.events.recv()).await {
        answers += usize::from(matches!(event, RepairEvent::Repair(_)));
    }
    edge.handle.closed().await;
    let asked = cloud.seen().len();
    assert!(asked < 100, "{asked}: no more is asked than comes in time");
    assert_eq!(answers, asked, "every answer was read");
}

#[tokio::test]
async fn requests_go_over_a_new_connection_when_an_existing_cloud_is_stuck() {
    let origin = OutgoingStreams::new();
    let mut feed = Feed::start(&origin, "live/a", 7);
    let seqs = feed.push(3);
    let mut cloud = OldCloud::start(origin, Duration::ZERO);
    let mut edge = Edge::start(v0_settings(cloud.addr));
    // A stream that has just ended.
    edge.handle.nack(nack(99, &[Seq(5)]));
    until(|| cloud.requests.len() == 1).await;
    edge.handle.nack(nack(7, &seqs));
    assert_eq!(edge.disconnected().await, "the cloud does not answer");
    edge.handle.nack(nack(7, &seqs));
    assert_eq!(repairs(&mut edge, 3).await, sorted(&feed, &seqs));
    edge.shutdown.cancel();
    within(edge.handle.closed()).await;
    cloud.seen();
}

#[tokio::test]
async fn edge_closes_a_cloud_with_unrequested_answers() {
    // The cloud answers without a request.
    let config = Identity::generate().unwrap().server_config(&[b"quic-echo-server"]).unwrap();
    let endpoint = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = endpoint.local_addr().unwrap();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let connection = incoming.await.unwrap();
            let (mut data, _recv) = connection.open_bi().await.unwrap();
            let (mut info, _requests) = connection.accept_bi().await.unwrap();
            data.write_all(&[0x80; 20]).await.unwrap();
            info.write_all(&[0, 20]).await.unwrap();
            connection.closed().await;
        }
    });
    let mut edge = Edge::start(v0_settings(addr));
    edge.handle.nack(Nack { ssrc: Ssrc(7), copies: 1, slack_ms: 500, seqs: vec![Seq(1)] });
    assert!(edge.disconnected().await.contains("out of step"));
    assert_eq!(edge.metrics.malformed.get(), 1);
}
