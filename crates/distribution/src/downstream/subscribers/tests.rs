use std::time::Duration;

use prometheus::Registry;

use super::*;
use crate::downstream::outgoing::OutgoingStream;
use downpour_repair::{control::DelayReport, history::History, probe::Cookie};

const NONCE: Nonce = Nonce([3; 16]);

/// A [`Subscribers`] and its surroundings, with one edge's outbox of capacity 1.
struct World {
    routes: Routes,
    outgoing: OutgoingStreams,
    edges: Edges,
    subscribers: Subscribers,
    messages: mpsc::Receiver<CloudMessage>,
    outbox: mpsc::Sender<CloudMessage>,
    now: Instant,
}

impl World {
    fn new() -> Self {
        let registry = Registry::new();
        let routes = Routes::new(&registry).unwrap();
        let metrics = ProbeMetrics::register(&registry).unwrap();
        let (outbox, messages) = mpsc::channel(1);
        let (outgoing, edges) = (OutgoingStreams::new(), Edges::default());
        let subscribers =
            Subscribers::new(routes.clone(), outgoing.clone(), edges.clone(), metrics);
        Self { routes, outgoing, edges, subscribers, messages, outbox, now: Instant::now() }
    }

    fn hello(&self, paths: u8) -> Result<Box<dyn EdgeSession>, String> {
        self.subscribers.hello(&EdgeHello {
            peer: address(9),
            node: "edge".into(),
            token: None,
            rtp_port: Some(5222),
            rtp_paths: paths,
            group: None,
            parity: true,
            latency: Duration::from_millis(500),
            nonce: NONCE,
            outbox: self.outbox.clone(),
        })
    }

    fn validate(&mut self, path: u8, from: SocketAddr) {
        self.now += Duration::from_millis(20);
        let probe = ProbeMessage::Probe { path, nonce: NONCE }.encode();
        let [challenge] = &self.subscribers.handle_datagrams(self.now, from, &probe)[..] else {
            panic!("no challenge");
        };
        let Ok((ProbeMessage::Challenge { cookie, .. }, _)) = ProbeMessage::parse(challenge) else {
            panic!("{challenge:?}");
        };
        let proof = ProbeMessage::Proof { path, nonce: NONCE, cookie }.encode();
        assert!(self.subscribers.handle_datagrams(self.now, from, &proof).is_empty());
    }

    fn targets(&self) -> Vec<SocketAddr> {
        let mut route = self.routes.route("live/a".parse().unwrap(), Ssrc(7));
        route.targets(self.now).media.iter().map(|target| target.addr).collect()
    }
}

fn address(port: u16) -> SocketAddr {
    ([10, 0, 0, 1], port).into()
}

#[test]
fn rtp_is_routed_from_the_proof_until_the_connection_ends() {
    let mut world = World::new();
    let mut session = world.hello(2).unwrap();
    session.subscribed(&["live/*".parse().unwrap()]);
    assert!(world.targets().is_empty());
    world.validate(0, address(1));
    assert_eq!(world.targets(), [address(1)]);
    let up = |path, port| CloudMessage::PathUp { path, address: address(port) };
    // The outbox is full: the second message is sent at the next opportunity.
    world.validate(1, address(2));
    assert_eq!(world.messages.try_recv(), Ok(up(0, 1)));
    assert!(world.messages.try_recv().is_err());
    world.subscribers.handle_timeout(world.now);
    assert_eq!(world.messages.try_recv(), Ok(up(1, 2)));
    assert_eq!(world.targets(), [address(1), address(2)]);
    session.subscribed(&[]);
    assert!(world.targets().is_empty());
    session.subscribed(&["*".parse().unwrap()]);
    world.subscribers.handle_timeout(world.now + DEAD_AFTER - Duration::from_millis(10));
    assert_eq!(world.targets(), [address(2)]);
    assert_eq!(world.subscribers.shared.metrics.lost.get(), 1);
    drop(session);
    assert!(world.targets().is_empty());
    let proof = ProbeMessage::Proof { path: 1, nonce: NONCE, cookie: Cookie(1) }.encode();
    world.subscribers.handle_datagrams(world.now, address(2), &proof);
    assert!(world.targets().is_empty());
    assert_eq!(world.subscribers.shared.metrics.unknown_nonce.get(), 1);
    assert!(world.subscribers.shared.state.lock().edges.is_empty());
}

#[test]
fn connected_edges_are_listed_with_their_reports() {
    let mut world = World::new();
    let history = History::new(10, Duration::from_secs(1));
    let stream = OutgoingStream::new("live/a".parse().unwrap(), Ssrc(7), 0, history);
    world.outgoing.insert(Arc::new(stream));
    let old = world.subscribers.v0_connected(address(8));
    let mut session = world.hello(2).unwrap();
    session.subscribed(&["live/*".parse().unwrap()]);
    world.validate(1, address(1));
    let about = |ssrc, received| StreamReport {
        ssrc,
        received,
        delays: DelayReport { counts: vec![1; 500], sum_us: 1 },
        ..Default::default()
    };
    let streams = vec![about(7, 5), about(7, 6), about(8, 1)];
    session.reported(Report { round_trip_us: 900, streams });
    let [v0, edge] = &world.edges.list()[..] else { panic!("{:?}", world.edges.list()) };
    assert_eq!((v0.protocol, v0.peer, &v0.node), ("v0", address(8), &None));
    assert_eq!((edge.protocol, edge.round_trip_us), ("downpour", Some(900)));
    assert_eq!(edge.patterns, ["live/*".parse().unwrap()]);
    let paths: Vec<_> = edge.paths.iter().map(|path| (path.state, path.address)).collect();
    assert_eq!(paths, [("waiting", None), ("up", Some(address(1)))]);
    let [stream] = &edge.streams[..] else { panic!("{:?}", edge.streams) };
    assert_eq!((stream.key.as_str(), stream.report.received), ("live/a", 6));
    assert_eq!(stream.report.delays.counts.len(), DELAY_BOUNDS_MS.len() + 1);
    drop((session, old));
    assert!(world.edges.list().is_empty());
}

#[test]
fn a_report_in_parts_updates_the_reports_of_live_streams() {
    let world = World::new();
    let mut session = world.hello(1).unwrap();
    session.subscribed(&["live/*".parse().unwrap(), "tv/*".parse().unwrap()]);
    let stream = |key: String, ssrc| {
        let history = History::new(10, Duration::from_secs(1));
        let stream = OutgoingStream::new(key.parse().unwrap(), Ssrc(ssrc), 0, history);
        let stream = Arc::new(stream);
        world.outgoing.insert(stream.clone());
        stream
    };
    let streams: Vec<_> = (0..3000).map(|i| stream(format!("live/{i:04}"), i)).collect();
    stream("tv/a".into(), 3000);
    let mut report = |ssrcs: std::ops::Range<u32>, received| {
        let about = |ssrc| StreamReport { ssrc, received, ..Default::default() };
        let whole = Report { round_trip_us: 900, streams: ssrcs.map(about).collect() };
        whole.split().for_each(|part| session.reported(part));
    };
    let reported = || {
        let [edge] = &world.edges.list()[..] else { panic!("{:?}", world.edges.list()) };
        assert!(edge.streams.is_sorted_by_key(|stream| stream.key.clone()));
        edge.streams.iter().map(|s| (s.report.ssrc, s.report.received)).collect::<Vec<_>>()
    };
    report(0..3001, 1);
    assert_eq!(reported(), (0..3001).map(|ssrc| (ssrc, 1)).collect::<Vec<_>>());
    report(100..200, 2);
    let twice = |ssrc: u32| (ssrc, 1 + u64::from((100..200).contains(&ssrc)));
    assert_eq!(reported(), (0..3001).map(twice).collect::<Vec<_>>());
    // One stream has ended, another one is removed.
    world.outgoing.end(&streams[150]);
    world.outgoing.remove(Ssrc(7));
    report(0..10, 3);
    report(150..151, 3);
    assert_eq!(reported().len(), 2999);
    assert!(reported().iter().all(|(ssrc, _)| ![7, 150].contains(ssrc)));
    session.subscribed(&["tv/*".parse().unwrap()]);
    assert_eq!(reported(), [(3000, 1)]);
}

#[test]
fn invalid_probes_are_counted_and_not_answered() {
    let world = World::new();
    let _session = world.hello(1).unwrap();
    for junk in [&b"hello"[..], &[0x80; 40], b"DP"] {
        assert!(world.subscribers.handle_datagrams(world.now, address(1), junk).is_empty());
    }
    let probe = ProbeMessage::Probe { path: 0, nonce: Nonce([9; 16]) }.encode();
    assert!(world.subscribers.handle_datagrams(world.now, address(1), &probe).is_empty());
    let metrics = &world.subscribers.shared.metrics;
    assert_eq!((metrics.malformed.get(), metrics.unknown_nonce.get()), (3, 1));
}

#[test]
fn too_many_paths_are_refused() {
    let refused = World::new().hello(3).err().unwrap();
    assert_eq!(refused, "rtp_paths is 3, but must be 0 to 2");
}

#[test]
fn an_address_that_gets_every_stream_is_challenged_only_if_the_edge_declared_it() {
    let mut world = World::new();
    // The address of the edge's connection and its RTP port, and that of a Go edge.
    let (own, of_go_edge) = (address(5222), address(5224));
    world.routes.set_fixed([own, of_go_edge]);
    let _session = world.hello(1).unwrap();
    let probe = |nonce| ProbeMessage::Probe { path: 0, nonce }.encode();
    for nonce in [NONCE, Nonce([4; 16])] {
        let answers = world.subscribers.handle_datagrams(world.now, of_go_edge, &probe(nonce));
        assert_eq!(answers.len(), 0, "it would end a Go edge");
    }
    assert_eq!(world.subscribers.shared.metrics.at_target.get(), 2);
    world.validate(0, own);
    assert_eq!(world.targets(), [own, of_go_edge]);
}
