//! Table of the connected edges, for the API and the metrics.

pub mod metrics;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde::Serialize;

use downpour_media::{StreamKey, StreamPattern};
use downpour_repair::{control::StreamReport, fec::Matrix, path_validation::PathState};

/// All connected edges, in the order in which they connected. Clones share the table.
#[derive(Clone, Default)]
pub struct Edges {
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    edges: BTreeMap<u64, EdgeInfo>,
    next_id: u64,
}

/// An edge as the API shows it.
#[derive(Debug, Clone, Serialize)]
pub struct EdgeInfo {
    /// Its name; `None` for v0 edges.
    pub node: Option<String>,
    /// Remote address of its QUIC connection.
    pub peer: SocketAddr,
    /// The protocol: `downpour` or `v0`.
    pub protocol: &'static str,
    /// Unix time at which it connected, in milliseconds.
    pub connected_unix_ms: u64,
    /// The round-trip time in its latest report, in microseconds.
    pub round_trip_us: Option<u64>,
    /// The streams that it subscribes to.
    pub patterns: Vec<StreamPattern>,
    /// The multicast group that it listens to.
    pub group: Option<SocketAddr>,
    /// Its paths, by number.
    pub paths: Vec<PathInfo>,
    /// Unix time of its latest report, in milliseconds.
    pub reported_unix_ms: Option<u64>,
    /// Its latest report of each live stream.
    pub streams: Vec<StreamInfo>,
}

/// One path of an edge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PathInfo {
    /// `waiting` for validation, `up`, or `lost` after too long a silence.
    pub state: &'static str,
    /// The address that RTP is sent to, or was sent to before the path was lost.
    pub address: Option<SocketAddr>,
}

/// One stream at an edge.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StreamInfo {
    /// The stream's name.
    pub key: StreamKey,
    /// The parity that is sent to the edge, if any.
    pub fec: Option<Matrix>,
    /// The edge's latest report.
    #[serde(flatten)]
    pub report: StreamReport,
}

impl Edges {
    /// Adds an edge. It is removed when the returned guard is dropped.
    pub fn insert(&self, info: EdgeInfo) -> Listed {
        let mut shared = self.shared.lock();
        let id = shared.next_id;
        shared.next_id += 1;
        shared.edges.insert(id, info);
        Listed { edges: self.clone(), id }
    }

    /// A copy of all edges.
    pub fn list(&self) -> Vec<EdgeInfo> {
        self.shared.lock().edges.values().cloned().collect()
    }

    /// Calls `visit` for each edge, under the lock of the table.
    pub fn for_each(&self, visit: impl FnMut(&EdgeInfo)) {
        self.shared.lock().edges.values().for_each(visit);
    }
}

/// Guard that keeps an edge in the table.
pub struct Listed {
    edges: Edges,
    id: u64,
}

impl Listed {
    /// Changes the edge's entry.
    pub fn update(&self, change: impl FnOnce(&mut EdgeInfo)) {
        if let Some(info) = self.edges.shared.lock().edges.get_mut(&self.id) {
            change(info);
        }
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.edges.shared.lock().edges.remove(&self.id);
    }
}

impl EdgeInfo {
    /// An edge that connects now.
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

/// The current Unix time in milliseconds.
pub fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}
