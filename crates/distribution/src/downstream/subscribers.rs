//! Edges that said hello: where each takes RTP, and what it wants there.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use bytes::Bytes;
use prometheus::{IntCounter, Opts, Registry, register_int_counter_vec_with_registry};
use tokio::sync::mpsc;

use crate::{
    downstream::{
        edges::{EdgeInfo, Edges, Listed, StreamInfo, unix_ms},
        outgoing::OutgoingStreams,
        repair_server::{EdgeHandler, EdgeHello, EdgeSession},
        routes::Routes,
    },
    protocol::Protocol,
};
use downpour_media::StreamPattern;
use downpour_repair::fec::adaptation::{Adaptation, Reporter, loss_between};
use downpour_repair::{
    control::{CloudMessage, Nonce, PathReport, Report, StreamReport},
    fec::adaptation::{Adapted, Choice},
    path_validation::{Outcome, PathTable},
    probe::{MAX_PATHS, ProbeMessage},
    receiver::DELAY_BOUNDS_MS,
    rtp::Ssrc,
};

/// Turns hellos, subscriptions and probes into routes. Cloning shares it.
#[derive(Clone)]
pub struct Subscribers {
    shared: Arc<Shared>,
}

struct Shared {
    routes: Routes,
    origin: OutgoingStreams,
    edges: Edges,
    metrics: ProbeMetrics,
    state: Mutex<State>,
    adaptation: Mutex<Adaptation>,
}

struct State {
    /// Edges so far.
    count: u64,
    table: PathTable,
    edges: HashMap<Nonce, Edge>,
}

struct Edge {
    node: String,
    outbox: mpsc::Sender<CloudMessage>,
    listed: Listed,
    /// Proven addresses that the edge has not been told of, because its control stream was full.
    untold: [Option<SocketAddr>; MAX_PATHS as usize],
}

impl Subscribers {
    /// Nobody has said hello yet. Who does is listed in `edges`, with reports of the streams of
    /// `origin`.
    pub fn new(
        routes: Routes,
        origin: OutgoingStreams,
        edges: Edges,
        metrics: ProbeMetrics,
    ) -> Self {
        let table = PathTable::new(Instant::now(), rand::random());
        let state = Mutex::new(State { count: 0, table, edges: HashMap::new() });
        let adaptation = Mutex::default();
        Self { shared: Arc::new(Shared { routes, origin, edges, metrics, state, adaptation }) }
    }

    /// Takes what came to the RTP port; gives what is to be sent back.
    pub fn handle_datagrams(&self, now: Instant, from: SocketAddr, datagrams: &[u8]) -> Vec<Bytes> {
        let mut answers = Vec::new();
        let mut rest = datagrams;
        while !rest.is_empty() {
            let Ok((message, after)) = ProbeMessage::parse(rest) else {
                self.shared.metrics.malformed.inc();
                break;
            };
            rest = after;
            answers.extend(self.shared.handle_message(now, from, message));
        }
        answers
    }

    /// Sends nothing more to where nothing has come from for long. Meant to be called once a second.
    pub fn handle_timeout(&self, now: Instant) {
        let mut state = self.shared.lock();
        let State { table, edges, .. } = &mut *state;
        for (nonce, path, address) in table.handle_timeout(now) {
            self.shared.routes.set_address(nonce, path, None);
            self.shared.metrics.lost.inc();
            if let Some(edge) = edges.get(&nonce) {
                edge.list_paths(table, &nonce);
                let node = &edge.node;
                tracing::warn!(node, path, %address, "no word from there: no RTP to it any more");
            }
        }
        for edge in edges.values_mut() {
            edge.tell();
        }
        drop(state);
        self.shared.adapt(now);
    }
}

impl EdgeHandler for Subscribers {
    fn hello(&self, edge: &EdgeHello) -> Result<Box<dyn EdgeSession>, String> {
        if edge.rtp_paths > MAX_PATHS {
            return Err(format!("rtp_paths is {}, when 0 to {MAX_PATHS} can be", edge.rtp_paths));
        }
        let Shared { routes, .. } = &*self.shared;
        let paths = edge.rtp_port.map_or(0, |_| edge.rtp_paths);
        if let Some(group) = edge.group.filter(|group| !routes.is_fixed(*group)) {
            let node = &edge.node;
            tracing::warn!(node, %group, "this edge listens to a group that nothing is sent to");
        }
        let mut state = self.shared.lock();
        state.table.insert(Instant::now(), edge.nonce, paths);
        let (node, outbox) = (edge.node.clone(), edge.outbox.clone());
        let listed = self.shared.edges.insert(EdgeInfo {
            node: Some(node.clone()),
            group: edge.group,
            ..EdgeInfo::new(edge.peer, Protocol::Downpour.as_str())
        });
        let listing = Edge { node, outbox, listed, untold: Default::default() };
        listing.list_paths(&state.table, &edge.nonce);
        state.edges.insert(edge.nonce, listing);
        state.count += 1;
        routes.set_takes_parity(edge.nonce, edge.parity);
        Ok(Box::new(Session {
            shared: self.shared.clone(),
            nonce: edge.nonce,
            // Whatever else it names is none of its business.
            group: edge.group.filter(|group| group.ip().is_multicast()),
            reporter: Reporter { edge: state.count, latency: edge.latency },
            reported: HashMap::new(),
            adapted: HashSet::new(),
        }))
    }

    fn v0_connected(&self, peer: SocketAddr) -> Box<dyn Send> {
        Box::new(self.shared.edges.insert(EdgeInfo::new(peer, Protocol::V0.as_str())))
    }
}

/// What became of datagrams at the RTP port.
#[derive(Clone)]
pub struct ProbeMetrics {
    challenged: IntCounter,
    proven: IntCounter,
    alive: IntCounter,
    too_soon: IntCounter,
    unknown_nonce: IntCounter,
    bad_cookie: IntCounter,
    malformed: IntCounter,
    lost: IntCounter,
}

impl ProbeMetrics {
    /// Makes the handles and registers them.
    ///
    /// # Errors
    /// If their names are taken.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let outcomes = register_int_counter_vec_with_registry!(
            Opts::new(
                "downpour_probes_total",
                "Datagrams with which edges prove their addresses, by what came of them; and \
                 addresses lost to silence"
            ),
            &["outcome"],
            registry
        )?;
        let outcome = |label: &str| outcomes.with_label_values(&[label]);
        Ok(Self {
            challenged: outcome("challenged"),
            proven: outcome("proven"),
            alive: outcome("alive"),
            too_soon: outcome("too_soon"),
            unknown_nonce: outcome("unknown_nonce"),
            bad_cookie: outcome("bad_cookie"),
            malformed: outcome("malformed"),
            lost: outcome("lost"),
        })
    }
}

impl Shared {
    fn handle_message(
        &self,
        now: Instant,
        from: SocketAddr,
        message: ProbeMessage,
    ) -> Option<Bytes> {
        let mut state = self.lock();
        let State { table, edges, .. } = &mut *state;
        let (counter, answer) = match table.handle_message(now, from, message) {
            Outcome::Challenge(challenge) => (&self.metrics.challenged, Some(challenge.encode())),
            Outcome::Proven { nonce, path, address } => {
                self.routes.set_address(nonce, path, Some(address));
                if let Some(edge) = edges.get_mut(&nonce) {
                    tracing::info!(node = edge.node, path, %address, "RTP goes to this edge");
                    if let Some(untold) = edge.untold.get_mut(usize::from(path)) {
                        *untold = Some(address);
                    }
                    edge.tell();
                    edge.list_paths(table, &nonce);
                }
                (&self.metrics.proven, None)
            }
            Outcome::Alive { nonce, .. } => {
                if let Some(edge) = edges.get_mut(&nonce) {
                    edge.tell();
                }
                (&self.metrics.alive, None)
            }
            Outcome::TooSoon => (&self.metrics.too_soon, None),
            Outcome::UnknownNonce => (&self.metrics.unknown_nonce, None),
            Outcome::BadCookie => (&self.metrics.bad_cookie, None),
            Outcome::WrongWay => (&self.metrics.malformed, None),
        };
        counter.inc();
        answer
    }

    /// Gives out the parity that reports call for.
    fn adapt(&self, now: Instant) {
        let streams = self.origin.streams();
        let live = streams.iter().filter(|stream| !stream.ended());
        let rates = live.map(|stream| (stream.ssrc(), stream.packet_rate())).collect();
        let mut adaptation = self.adaptation();
        let changes = adaptation.decide(now, &rates);
        if self.routes.adapts_fixed() {
            self.routes.set_blind(adaptation.decide_blind(&rates).clone());
        }
        drop(adaptation);
        for change in &changes {
            let Choice::Use(after) = change.choice else { continue };
            if after == change.before {
                continue;
            }
            let Some(stream) = self.origin.stream(change.ssrc) else { continue };
            let to = match change.adapted {
                Adapted::Fixed(addr) => addr.to_string(),
                Adapted::Edge(nonce) => {
                    self.lock().edges.get(&nonce).map(|edge| edge.node.clone()).unwrap_or_default()
                }
            };
            let [before, after] =
                [change.before, after].map(|m| m.map_or("off".into(), |m| m.to_string()));
            tracing::info!(stream = %stream.key(), to, before, after, "parity is adapted");
        }
        let choices: Vec<_> = changes.iter().map(|c| (c.adapted, c.ssrc, c.choice)).collect();
        self.routes.set_choices(&choices);
    }

    fn adaptation(&self) -> MutexGuard<'_, Adaptation> {
        self.adaptation.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Edge {
    fn list_paths(&self, table: &PathTable, nonce: &Nonce) {
        let paths = table.states(nonce).map(Into::into).collect();
        self.listed.update(|info| info.paths = paths);
    }

    fn tell(&mut self) {
        for (path, untold) in (0..).zip(&mut self.untold) {
            if let Some(address) = *untold
                && self.outbox.try_send(CloudMessage::PathUp { path, address }).is_ok()
            {
                *untold = None;
            }
        }
    }
}

/// One edge's connection.
struct Session {
    shared: Arc<Shared>,
    nonce: Nonce,
    group: Option<SocketAddr>,
    reporter: Reporter,
    /// What it reported last of each stream's paths.
    reported: HashMap<Ssrc, [PathReport; MAX_PATHS as usize]>,
    /// Whose parity its reports were taken for.
    adapted: HashSet<Adapted>,
}

impl Session {
    /// Takes what the edge's paths lost since its last report.
    fn adapt<'a>(&mut self, now: Instant, reports: impl Iterator<Item = &'a StreamReport>) {
        let adapted = self.shared.routes.adapted_by(&self.nonce, self.group);
        let mut adaptation = self.shared.adaptation();
        for report in reports {
            let ssrc = Ssrc(report.ssrc);
            // The first one may be of a long time before this connection.
            let Some(before) = self.reported.insert(ssrc, report.paths) else { continue };
            let Some(loss) = loss_between(&before, &report.paths) else { continue };
            for adapted in &adapted {
                adaptation.handle_report(now, *adapted, ssrc, self.reporter, loss);
            }
        }
        drop(adaptation);
        self.adapted.extend(adapted);
    }
}

impl EdgeSession for Session {
    fn subscribed(&mut self, streams: &[StreamPattern]) {
        self.shared.routes.set_patterns(self.nonce, streams);
        if let Some(edge) = self.shared.lock().edges.get(&self.nonce) {
            edge.listed.update(|info| {
                info.patterns = streams.to_vec();
                info.streams.retain(|stream| streams.iter().any(|p| p.matches(&stream.key)));
            });
        }
    }

    /// Keeps what is about streams that are live, each once: an edge must not fill the memory. What
    /// this report does not name stays as it was told before, for a report may come in parts.
    fn reported(&mut self, report: Report) {
        let origin = self.shared.origin.clone();
        let live = |ssrc| origin.stream(Ssrc(ssrc)).filter(|stream| !stream.ended());
        let mut told = HashMap::new();
        for mut report in report.streams {
            let Some(stream) = live(report.ssrc) else { continue };
            for delays in [&mut report.delays, &mut report.waits] {
                delays.counts.truncate(DELAY_BOUNDS_MS.len() + 1);
                delays.counts.shrink_to_fit();
            }
            let fec = self.shared.routes.parity_of(&self.nonce, self.group, stream.ssrc());
            let key = stream.key().clone();
            told.insert(report.ssrc, StreamInfo { key, fec, report });
        }
        self.adapt(Instant::now(), told.values().map(|stream| &stream.report));
        self.reported.retain(|ssrc, _| live(ssrc.0).is_some());
        if let Some(edge) = self.shared.lock().edges.get(&self.nonce) {
            edge.listed.update(|info| {
                info.round_trip_us = Some(report.round_trip_us).filter(|micros| *micros > 0);
                info.reported_unix_ms = Some(unix_ms());
                info.streams.retain_mut(|stream| match told.remove(&stream.report.ssrc) {
                    Some(newer) => {
                        *stream = newer;
                        true
                    }
                    None => live(stream.report.ssrc).is_some(),
                });
                info.streams.extend(told.into_values());
                info.streams.sort_by(|a, b| a.key.cmp(&b.key));
            });
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.adaptation().remove_edge(self.reporter.edge, &self.adapted);
        let mut state = self.shared.lock();
        state.table.remove(&self.nonce);
        state.edges.remove(&self.nonce);
        // Under the lock: a proof that is being taken must not bring the route back.
        self.shared.routes.remove(&self.nonce);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::downstream::outgoing::OutgoingStream;
    use downpour_repair::{
        control::DelayReport, history::History, path_validation::DEAD_AFTER, probe::Cookie,
    };

    const NONCE: Nonce = Nonce([3; 16]);

    struct World {
        routes: Routes,
        origin: OutgoingStreams,
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
            let (origin, edges) = (OutgoingStreams::new(), Edges::default());
            let subscribers =
                Subscribers::new(routes.clone(), origin.clone(), edges.clone(), metrics);
            Self { routes, origin, edges, subscribers, messages, outbox, now: Instant::now() }
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

        fn prove(&mut self, path: u8, from: SocketAddr) {
            self.now += Duration::from_millis(20);
            let probe = ProbeMessage::Probe { path, nonce: NONCE }.encode();
            let [challenge] = &self.subscribers.handle_datagrams(self.now, from, &probe)[..] else {
                panic!("no challenge");
            };
            let Ok((ProbeMessage::Challenge { cookie, .. }, _)) = ProbeMessage::parse(challenge)
            else {
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
    fn an_edge_is_sent_to_from_its_proof_until_its_connection_ends() {
        let mut world = World::new();
        let mut session = world.hello(2).unwrap();
        session.subscribed(&["live/*".parse().unwrap()]);
        assert!(world.targets().is_empty());
        world.prove(0, address(1));
        assert_eq!(world.targets(), [address(1)]);
        let up = |path, port| CloudMessage::PathUp { path, address: address(port) };
        // The second message finds no room and goes out with the next sign of life.
        world.prove(1, address(2));
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
        assert!(world.subscribers.shared.lock().edges.is_empty());
    }

    #[test]
    fn who_is_connected_is_listed_with_what_it_tells() {
        let mut world = World::new();
        let history = History::new(10, Duration::from_secs(1));
        let stream = OutgoingStream::new("live/a".parse().unwrap(), Ssrc(7), 0, history);
        world.origin.insert(Arc::new(stream));
        let old = world.subscribers.v0_connected(address(8));
        let mut session = world.hello(2).unwrap();
        session.subscribed(&["live/*".parse().unwrap()]);
        world.prove(1, address(1));
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
    fn a_report_in_parts_updates_what_was_told_of_live_streams() {
        let world = World::new();
        let mut session = world.hello(1).unwrap();
        session.subscribed(&["live/*".parse().unwrap(), "tv/*".parse().unwrap()]);
        let stream = |key: String, ssrc| {
            let history = History::new(10, Duration::from_secs(1));
            let stream = OutgoingStream::new(key.parse().unwrap(), Ssrc(ssrc), 0, history);
            let stream = Arc::new(stream);
            world.origin.insert(stream.clone());
            stream
        };
        let streams: Vec<_> = (0..3000).map(|i| stream(format!("live/{i:04}"), i)).collect();
        stream("tv/a".into(), 3000);
        let mut report = |ssrcs: std::ops::Range<u32>, received| {
            let about = |ssrc| StreamReport { ssrc, received, ..Default::default() };
            let whole = Report { round_trip_us: 900, streams: ssrcs.map(about).collect() };
            whole.split().for_each(|part| session.reported(part));
        };
        let told = || {
            let [edge] = &world.edges.list()[..] else { panic!("{:?}", world.edges.list()) };
            assert!(edge.streams.is_sorted_by_key(|stream| stream.key.clone()));
            edge.streams.iter().map(|s| (s.report.ssrc, s.report.received)).collect::<Vec<_>>()
        };
        report(0..3001, 1);
        assert_eq!(told(), (0..3001).map(|ssrc| (ssrc, 1)).collect::<Vec<_>>());
        report(100..200, 2);
        let twice = |ssrc: u32| (ssrc, 1 + u64::from((100..200).contains(&ssrc)));
        assert_eq!(told(), (0..3001).map(twice).collect::<Vec<_>>());
        // Ended, though its packets are still held, and taken away.
        world.origin.end(&streams[150]);
        world.origin.remove(Ssrc(7));
        report(0..10, 3);
        report(150..151, 3);
        assert_eq!(told().len(), 2999);
        assert!(told().iter().all(|(ssrc, _)| ![7, 150].contains(ssrc)));
        session.subscribed(&["tv/*".parse().unwrap()]);
        assert_eq!(told(), [(3000, 1)]);
    }

    #[test]
    fn what_is_no_probe_is_counted_and_not_answered() {
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
    fn more_paths_than_there_are_is_refused() {
        let refused = World::new().hello(3).err().unwrap();
        assert_eq!(refused, "rtp_paths is 3, when 0 to 2 can be");
    }
}
