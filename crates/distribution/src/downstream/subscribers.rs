//! Admitted edges: keeps the routes in step with their subscriptions, validated addresses and loss
//! reports.
//!
//! The state of an edge's path ([`PathValidator`] has the details):
//!
//! ```text
//! hello ─> waiting ──probe──> challenged ──proof──> up ──silence──> lost
//!                                                   ^ RTP route      │
//!                                                   └─────proof──────┘
//! ```
//!
//! Invariants: RTP is sent only to an address that the edge validated with its nonce; the route, the
//! entry in the table of edges and the path table entry exist exactly while the session exists.

mod metrics;

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::Instant,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::mpsc;

pub use self::metrics::ProbeMetrics;

use crate::{
    downstream::{
        edges::{EdgeInfo, Edges, Listed, StreamInfo, unix_ms},
        outgoing::OutgoingStreams,
        repair_server::{EdgeHandler, EdgeHello, EdgeSession},
        routes::{Routes, Target},
    },
    protocol::Protocol,
};
use downpour_media::StreamPattern;
use downpour_repair::fec::adaptation::{Adaptation, Reporter, loss_between};
use downpour_repair::{
    control::{CloudMessage, Nonce, PathReport, Report, StreamReport},
    fec::adaptation::{Choice, ParityTarget},
    path_validation::{DEAD_AFTER, Outcome, PathValidator},
    probe::{MAX_PATHS, ProbeMessage},
    receiver::DELAY_BOUNDS_MS,
    rtp::Ssrc,
};

/// Handle of the admitted edges. Clones share the state.
#[derive(Clone)]
pub struct Subscribers {
    shared: Arc<Shared>,
}

struct Shared {
    routes: Routes,
    outgoing: OutgoingStreams,
    edges: Edges,
    metrics: ProbeMetrics,
    state: Mutex<State>,
    adaptation: Mutex<Adaptation>,
}

struct State {
    /// Number of edges admitted so far.
    count: u64,
    table: PathValidator,
    edges: HashMap<Nonce, Edge>,
}

struct Edge {
    node: String,
    /// The RTP port at the address of its QUIC connection.
    declared: Option<SocketAddr>,
    outbox: mpsc::Sender<CloudMessage>,
    listed: Listed,
    /// Validated addresses by path that are not announced to the edge yet, because its outbox was full.
    unannounced: [Option<SocketAddr>; MAX_PATHS as usize],
}

impl Subscribers {
    /// No edges yet. Admitted edges are added to `edges`, with their reports of the streams in
    /// `outgoing`.
    pub fn new(
        routes: Routes,
        outgoing: OutgoingStreams,
        edges: Edges,
        metrics: ProbeMetrics,
    ) -> Self {
        let table = PathValidator::new(Instant::now(), rand::random());
        let state = Mutex::new(State { count: 0, table, edges: HashMap::new() });
        let adaptation = Mutex::default();
        Self { shared: Arc::new(Shared { routes, outgoing, edges, metrics, state, adaptation }) }
    }

    /// Handles path validation messages that arrived at the RTP port, back to back in `datagrams`. `from`
    /// is their sender and the local address that they were sent to, from which its RTP will leave.
    /// Returns the answers to send back.
    pub fn handle_datagrams(
        &self,
        now: Instant,
        from: impl Into<Target>,
        datagrams: &[u8],
    ) -> Vec<Bytes> {
        let from = from.into();
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

    /// Removes the routes of silent paths, and adapts the parity. To be called once per second.
    pub fn handle_timeout(&self, now: Instant) {
        let mut state = self.shared.state.lock();
        let State { table, edges, .. } = &mut *state;
        for (nonce, path, address) in table.handle_timeout(now) {
            self.shared.routes.remove_address(nonce, path);
            self.shared.metrics.lost.inc();
            if let Some(edge) = edges.get(&nonce) {
                edge.list_paths(table, &nonce);
                let (node, silent_s) = (&edge.node, DEAD_AFTER.as_secs());
                tracing::warn!(node, path, %address, silent_s, "edge path timed out; RTP stopped");
            }
        }
        for edge in edges.values_mut() {
            edge.announce_paths();
        }
        drop(state);
        self.shared.adapt(now);
    }
}

impl EdgeHandler for Subscribers {
    fn hello(&self, edge: &EdgeHello) -> Result<Box<dyn EdgeSession>, String> {
        if edge.rtp_paths > MAX_PATHS {
            return Err(format!("rtp_paths is {}, but must be 0 to {MAX_PATHS}", edge.rtp_paths));
        }
        let Shared { routes, .. } = &*self.shared;
        let paths = edge.rtp_port.map_or(0, |_| edge.rtp_paths);
        if let Some(group) = edge.group.filter(|group| !routes.is_fixed(*group)) {
            let node = &edge.node;
            tracing::warn!(node, %group, "edge listens to a multicast group that this node does not send to");
        }
        let mut state = self.shared.state.lock();
        state.table.insert(Instant::now(), edge.nonce, paths);
        let (node, outbox) = (edge.node.clone(), edge.outbox.clone());
        let listed = self.shared.edges.insert(EdgeInfo {
            node: Some(node.clone()),
            group: edge.group,
            ..EdgeInfo::new(edge.peer, Protocol::Downpour.as_str())
        });
        let declared =
            edge.rtp_port.map(|port| SocketAddr::new(edge.peer.ip().to_canonical(), port));
        let admitted = Edge { node, declared, outbox, listed, unannounced: Default::default() };
        admitted.list_paths(&state.table, &edge.nonce);
        state.edges.insert(edge.nonce, admitted);
        state.count += 1;
        routes.set_takes_parity(edge.nonce, edge.parity);
        Ok(Box::new(Session {
            shared: self.shared.clone(),
            nonce: edge.nonce,
            // An edge must not affect the parity of a unicast address of another edge.
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

impl Shared {
    fn handle_message(&self, now: Instant, from: Target, message: ProbeMessage) -> Option<Bytes> {
        let mut state = self.state.lock();
        let State { table, edges, .. } = &mut *state;
        if let ProbeMessage::Probe { nonce, .. } = message
            && self.routes.is_fixed(from.addr)
            && edges.get(&nonce).is_none_or(|edge| edge.declared != Some(from.addr))
        {
            // A Go edge may be there, which a challenge would end. Only an edge that is known to hold
            // the address is asked for proof.
            self.metrics.at_target.inc();
            return None;
        }
        let (counter, answer) = match table.handle_message(now, from.addr, message) {
            Outcome::Challenge(challenge) => (&self.metrics.challenged, Some(challenge.encode())),
            Outcome::Proven { nonce, path, address } => {
                self.routes.set_address(nonce, path, Target { addr: address, ..from });
                if let Some(edge) = edges.get_mut(&nonce) {
                    tracing::info!(node = edge.node, path, %address, "edge path validated; RTP started");
                    if let Some(unannounced) = edge.unannounced.get_mut(usize::from(path)) {
                        *unannounced = Some(address);
                    }
                    edge.announce_paths();
                    edge.list_paths(table, &nonce);
                }
                (&self.metrics.proven, None)
            }
            Outcome::Alive { nonce, .. } => {
                if let Some(edge) = edges.get_mut(&nonce) {
                    edge.announce_paths();
                }
                (&self.metrics.alive, None)
            }
            Outcome::TooSoon => (&self.metrics.too_soon, None),
            Outcome::UnknownNonce => (&self.metrics.unknown_nonce, None),
            Outcome::BadCookie => (&self.metrics.bad_cookie, None),
            Outcome::WrongDirection => (&self.metrics.malformed, None),
        };
        counter.inc();
        answer
    }

    /// Applies the parity that the reports call for.
    fn adapt(&self, now: Instant) {
        let streams = self.outgoing.streams();
        let live = streams.iter().filter(|stream| !stream.ended());
        let rates = live.map(|stream| (stream.ssrc(), stream.packet_rate())).collect();
        let mut adaptation = self.adaptation.lock();
        let changes = adaptation.decide(now, &rates);
        if self.routes.adapts_fixed() {
            self.routes.set_blind(adaptation.decide_without_reports(&rates).clone());
        }
        drop(adaptation);
        for change in &changes {
            let Choice::Use(after) = change.choice else { continue };
            if after == change.before {
                continue;
            }
            let Some(stream) = self.outgoing.stream(change.ssrc) else { continue };
            let to = match change.target {
                ParityTarget::Fixed(addr) => addr.to_string(),
                ParityTarget::Edge(nonce) => {
                    let state = self.state.lock();
                    state.edges.get(&nonce).map(|edge| edge.node.clone()).unwrap_or_default()
                }
            };
            let [before, after] =
                [change.before, after].map(|m| m.map_or("off".into(), |m| m.to_string()));
            tracing::info!(stream = %stream.key(), to, before, after, "parity adapted");
        }
        let choices: Vec<_> = changes.iter().map(|c| (c.target, c.ssrc, c.choice)).collect();
        self.routes.set_choices(&choices);
    }
}

impl Edge {
    /// Updates the paths in the table of edges.
    fn list_paths(&self, table: &PathValidator, nonce: &Nonce) {
        let paths = table.states(nonce).map(Into::into).collect();
        self.listed.update(|info| info.paths = paths);
    }

    /// Sends the `path_up` messages that are due, as far as the outbox has room.
    fn announce_paths(&mut self) {
        for (path, unannounced) in (0..).zip(&mut self.unannounced) {
            if let Some(address) = *unannounced
                && self.outbox.try_send(CloudMessage::PathUp { path, address }).is_ok()
            {
                *unannounced = None;
            }
        }
    }
}

/// Session of one admitted edge.
struct Session {
    shared: Arc<Shared>,
    nonce: Nonce,
    group: Option<SocketAddr>,
    reporter: Reporter,
    /// The path counters of each stream in its latest report.
    reported: HashMap<Ssrc, [PathReport; MAX_PATHS as usize]>,
    /// The receivers whose parity the edge's reports have influenced.
    adapted: HashSet<ParityTarget>,
}

impl Session {
    /// Passes the losses since the previous report to the parity adaptation.
    fn adapt<'a>(&mut self, now: Instant, reports: impl Iterator<Item = &'a StreamReport>) {
        let adapted = self.shared.routes.adapted_by(&self.nonce, self.group);
        let mut adaptation = self.shared.adaptation.lock();
        for report in reports {
            let ssrc = Ssrc(report.ssrc);
            // The counters of the first report may date from long before this connection.
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
        if let Some(edge) = self.shared.state.lock().edges.get(&self.nonce) {
            edge.listed.update(|info| {
                info.patterns = streams.to_vec();
                info.streams.retain(|stream| streams.iter().any(|p| p.matches(&stream.key)));
            });
        }
    }

    /// Stores the reports of live streams, one per stream, so that an edge cannot exhaust the memory.
    /// Streams that this report does not contain keep their previous one: a report may arrive in parts.
    fn reported(&mut self, report: Report) {
        let outgoing = self.shared.outgoing.clone();
        let live = |ssrc| outgoing.stream(Ssrc(ssrc)).filter(|stream| !stream.ended());
        let mut reports = HashMap::new();
        for mut report in report.streams {
            let Some(stream) = live(report.ssrc) else { continue };
            for delays in [&mut report.delays, &mut report.waits] {
                delays.counts.truncate(DELAY_BOUNDS_MS.len() + 1);
                delays.counts.shrink_to_fit();
            }
            let fec = self.shared.routes.parity_of(&self.nonce, self.group, stream.ssrc());
            let key = stream.key().clone();
            reports.insert(report.ssrc, StreamInfo { key, fec, report });
        }
        self.adapt(Instant::now(), reports.values().map(|stream| &stream.report));
        self.reported.retain(|ssrc, _| live(ssrc.0).is_some());
        if let Some(edge) = self.shared.state.lock().edges.get(&self.nonce) {
            edge.listed.update(|info| {
                info.round_trip_us = Some(report.round_trip_us).filter(|micros| *micros > 0);
                info.reported_unix_ms = Some(unix_ms());
                info.streams.retain_mut(|stream| match reports.remove(&stream.report.ssrc) {
                    Some(newer) => {
                        *stream = newer;
                        true
                    }
                    None => live(stream.report.ssrc).is_some(),
                });
                info.streams.extend(reports.into_values());
                info.streams.sort_by(|a, b| a.key.cmp(&b.key));
            });
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.shared.adaptation.lock().remove_edge(self.reporter.edge, &self.adapted);
        let mut state = self.shared.state.lock();
        state.table.remove(&self.nonce);
        state.edges.remove(&self.nonce);
        // Under the lock, so that a concurrent proof cannot add the route again.
        self.shared.routes.remove(&self.nonce);
    }
}

#[cfg(test)]
mod tests;
