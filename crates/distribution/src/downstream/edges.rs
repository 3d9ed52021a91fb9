//! The edges that are connected, as the API and the metrics tell of them.

pub mod metrics;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use downpour_media::{StreamKey, StreamPattern};
use downpour_repair::{control::StreamReport, fec::Matrix, path_validation::PathState};

/// All connected edges, in the order of their coming. Cloning shares them.
#[derive(Clone, Default)]
pub struct Edges {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    edges: BTreeMap<u64, EdgeInfo>,
    next_id: u64,
}

/// One edge, as the API tells of it.
#[derive(Debug, Clone, Serialize)]
pub struct EdgeInfo {
    /// Its name; none under v0.
    pub node: Option<String>,
    /// Where its QUIC connection comes from.
    pub peer: SocketAddr,
    /// What it speaks: `downpour` or `v0`.
    pub protocol: &'static str,
    /// Unix time at which it connected, in milliseconds.
    pub connected_unix_ms: u64,
    /// The round trip to it as it told last, in microseconds.
    pub round_trip_us: Option<u64>,
    /// The streams that it wants.
    pub patterns: Vec<StreamPattern>,
    /// The multicast group that it listens to.
    pub group: Option<SocketAddr>,
    /// The addresses that it proves.
    pub paths: Vec<PathInfo>,
    /// Unix time of its last report, in milliseconds.
    pub reported_unix_ms: Option<u64>,
    /// What it reported.
    pub streams: Vec<StreamInfo>,
}

/// One path of an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PathInfo {
    /// `waiting` for proof, `up`, or `lost` when nothing came from there for long.
    pub state: &'static str,
    /// Where RTP goes, or went.
    pub address: Option<SocketAddr>,
}

/// One stream at an edge.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamInfo {
    /// Its name.
    pub key: StreamKey,
    /// The parity that the edge is sent, if any.
    pub fec: Option<Matrix>,
    /// How it fares.
    #[serde(flatten)]
    pub report: StreamReport,
}

impl Edges {
    /// Lists an edge until what is given is dropped.
    pub fn insert(&self, info: EdgeInfo) -> Listed {
        let mut shared = self.lock();
        let id = shared.next_id;
        shared.next_id += 1;
        shared.edges.insert(id, info);
        Listed { edges: self.clone(), id }
    }

    /// All of them, as they are now.
    pub fn list(&self) -> Vec<EdgeInfo> {
        self.lock().edges.values().cloned().collect()
    }

    /// Looks at each of them while none changes.
    pub fn for_each(&self, look: impl FnMut(&EdgeInfo)) {
        self.lock().edges.values().for_each(look);
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps an edge in the list.
pub struct Listed {
    edges: Edges,
    id: u64,
}

impl Listed {
    /// Changes what is told of the edge.
    pub fn update(&self, change: impl FnOnce(&mut EdgeInfo)) {
        if let Some(info) = self.edges.lock().edges.get_mut(&self.id) {
            change(info);
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.edges.lock().edges.remove(&self.id);
    }
}

impl EdgeInfo {
    /// An edge that has just connected.
    pub fn new(peer: SocketAddr, protocol: &'static str) -> Self {
        Self {
            node: None,
            peer,
            protocol,
            connected_unix_ms: unix_ms(),
            round_trip_us: None,
            patterns: Vec::new(),
            group: None,
            paths: Vec::new(),
            reported_unix_ms: None,
            streams: Vec::new(),
        }
    }
}

impl From<PathState> for PathInfo {
    fn from(state: PathState) -> Self {
        match state {
            PathState::Waiting => Self { state: "waiting", address: None },
            PathState::Up(address) => Self { state: "up", address: Some(address) },
            PathState::Lost(address) => Self { state: "lost", address: Some(address) },
        }
    }
}

/// The wall clock in milliseconds of Unix time.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
