//! Routes: the addresses that each stream and its parity are sent to. Some addresses get every stream;
//! edges get the streams that they subscribe to.

mod table;

use std::{
    collections::{HashMap, hash_map::Entry},
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{RwLock, RwLockReadGuard};
use prometheus::{IntGauge, Registry, register_int_gauge_with_registry};

use self::table::{FixedRoute, Table, Wanted};
use downpour_media::{StreamKey, StreamPattern};
use downpour_repair::{
    control::Nonce,
    fec::adaptation::{Choice, ParityTarget},
    fec::{Fec, Matrix},
    rtp::Ssrc,
};

/// One address that a stream is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Address of an edge or a multicast group.
    pub addr: SocketAddr,
    /// The address of this host to send from: the one that the edge asked; `None` lets the routing table
    /// choose.
    pub from: Option<IpAddr>,
}

impl From<SocketAddr> for Target {
    fn from(addr: SocketAddr) -> Self {
        Self { addr, from: None }
    }
}

/// An address that gets every stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedTarget {
    /// Address of an edge or a multicast group.
    pub addr: SocketAddr,
    /// The parity that is sent to it.
    pub fec: Fec,
}

impl From<SocketAddr> for FixedTarget {
    /// A target without parity.
    fn from(addr: SocketAddr) -> Self {
        Self { addr, fec: Fec::Off }
    }
}

/// The targets of one stream at one time.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Targets of the stream itself. Each address is listed once.
    pub media: Arc<[Target]>,
    /// Those of `media` that get every stream.
    pub fixed: Arc<[Target]>,
    /// Those of `media` that edges proved.
    pub dynamic: Arc<[Target]>,
    /// Targets of the stream's parity, by matrix. Each address gets one matrix.
    pub parity: Vec<(Matrix, Arc<[Target]>)>,
}

/// Handle of the routing table. Clones share it.
#[derive(Clone)]
pub struct Routes {
    shared: Arc<Shared>,
}

struct Shared {
    table: RwLock<Table>,
    /// Incremented per change, so that a [`Route`] detects changes without the lock.
    generation: AtomicU64,
    dynamic_targets: IntGauge,
}

impl Routes {
    /// An empty table.
    ///
    /// # Errors
    /// If `registry` already has a metric of the same name.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let dynamic_targets = register_int_gauge_with_registry!(
            "downpour_fanout_dynamic_targets",
            "Addresses of edges, proven by path validation, that RTP is sent to",
            registry
        )?;
        let (table, generation) = (RwLock::default(), AtomicU64::new(0));
        Ok(Self { shared: Arc::new(Shared { table, generation, dynamic_targets }) })
    }

    /// Sets the parity of edges that accept parity. Initially off.
    pub fn set_edge_fec(&self, fec: Fec) {
        self.change(|table| table.edge_fec = fec);
    }

    /// Replaces the addresses that get every stream. Duplicates are ignored. Addresses that stay keep
    /// their adapted parity.
    pub fn set_fixed(&self, targets: impl IntoIterator<Item = impl Into<FixedTarget>>) {
        self.change(|table| {
            let mut before = std::mem::take(&mut table.fixed_routes);
            let mut fixed = Vec::new();
            for FixedTarget { addr, fec } in targets.into_iter().map(Into::into) {
                if let Entry::Vacant(entry) = table.fixed_routes.entry(addr) {
                    let adapted = before.remove(&addr).map(|route| route.adapted);
                    entry.insert(FixedRoute { fec, adapted: adapted.unwrap_or_default() });
                    fixed.push(addr.into());
                }
            }
            table.fixed = fixed.into();
        });
    }

    /// Replaces the streams that an edge subscribes to.
    pub fn set_patterns(&self, edge: Nonce, patterns: &[StreamPattern]) {
        let wanted = Wanted::new(patterns);
        let held = self.read().edges.get(&edge).map(|edge| edge.wanted == wanted);
        if held != Some(true) {
            self.change(|table| table.edges.entry(edge).or_default().wanted = wanted);
        }
    }

    /// Sets whether an edge accepts parity at its RTP addresses. Initially `false`.
    pub fn set_takes_parity(&self, edge: Nonce, takes_parity: bool) {
        self.change(|table| table.edges.entry(edge).or_default().takes_parity = takes_parity);
    }

    /// Sets the RTP address of an edge on one of its paths.
    pub fn set_address(&self, edge: Nonce, path: u8, target: impl Into<Target>) {
        self.set_target(edge, path, Some(target.into()));
    }

    /// Removes the RTP address of an edge on one of its paths.
    pub fn remove_address(&self, edge: Nonce, path: u8) {
        self.set_target(edge, path, None);
    }

    fn set_target(&self, edge: Nonce, path: u8, target: Option<Target>) {
        self.change(|table| {
            let edge = table.edges.entry(edge).or_default();
            if let Some(slot) = edge.targets.get_mut(usize::from(path)) {
                *slot = target;
            }
        });
    }

    /// Removes an edge.
    pub fn remove(&self, edge: &Nonce) {
        self.change(|table| {
            table.edges.remove(edge);
        });
    }

    /// Sets the parity that receiver reports call for, per receiver and stream. Receivers that are no
    /// longer in the table are ignored.
    pub fn set_choices(&self, choices: &[(ParityTarget, Ssrc, Choice)]) {
        if choices.is_empty() {
            return;
        }
        self.change(|table| {
            for (adapted, ssrc, choice) in choices {
                let streams = match adapted {
                    ParityTarget::Fixed(addr) => {
                        table.fixed_routes.get_mut(addr).map(|route| &mut route.adapted)
                    }
                    ParityTarget::Edge(nonce) => {
                        table.edges.get_mut(nonce).map(|route| &mut route.adapted)
                    }
                };
                match (streams, choice) {
                    (Some(streams), Choice::Use(matrix)) => {
                        streams.insert(*ssrc, *matrix);
                    }
                    (Some(streams), Choice::Unknown) => {
                        streams.remove(ssrc);
                    }
                    (None, _) => {}
                }
            }
        });
    }

    /// Replaces the blind parity per stream: the parity of adaptive fixed addresses while no receiver
    /// reports.
    pub fn set_blind(&self, blind: HashMap<Ssrc, Matrix>) {
        let same = self.read().blind == blind;
        if !same {
            self.change(|table| table.blind = blind);
        }
    }

    /// The route of one stream.
    pub fn route(&self, key: StreamKey, ssrc: Ssrc) -> Route {
        let (routes, snapshot) = (self.clone(), Arc::default());
        Route { routes, key, ssrc, snapshot, generation: None, made: None }
    }

    /// The addresses that get every stream.
    pub fn fixed(&self) -> Arc<[Target]> {
        self.read().fixed.clone()
    }

    /// `true` if `addr` gets every stream.
    pub fn is_fixed(&self, addr: SocketAddr) -> bool {
        self.read().fixed_routes.contains_key(&addr)
    }

    /// `true` if the parity of at least one fixed address is adaptive.
    pub fn adapts_fixed(&self) -> bool {
        self.read().fixed_routes.values().any(|route| route.fec == Fec::Auto)
    }

    /// The receivers whose parity is adapted by an edge's reports: the multicast `group` that it
    /// listens to, and the edge itself.
    pub fn adapted_by(&self, edge: &Nonce, group: Option<SocketAddr>) -> Vec<ParityTarget> {
        let table = self.read();
        let Some(route) = table.edges.get(edge).filter(|route| route.takes_parity) else {
            return Vec::new();
        };
        let adapts = |addr: &SocketAddr| {
            table.fixed_routes.get(addr).is_some_and(|fixed| fixed.fec == Fec::Auto)
        };
        let mut adapted: Vec<_> = group
            .into_iter()
            .chain(route.addrs())
            .filter(adapts)
            .map(ParityTarget::Fixed)
            .collect();
        let mut own = route.addrs().filter(|addr| !table.fixed_routes.contains_key(addr));
        if table.edge_fec == Fec::Auto && own.next().is_some() {
            adapted.push(ParityTarget::Edge(*edge));
        }
        adapted
    }

    /// The parity of a stream that an edge receives, at one of its addresses or else in its
    /// multicast `group`.
    pub fn parity_of(&self, edge: &Nonce, group: Option<SocketAddr>, ssrc: Ssrc) -> Option<Matrix> {
        let table = self.read();
        let route = table.edges.get(edge).filter(|route| route.takes_parity)?;
        let at = |addr: SocketAddr| match table.fixed_routes.get(&addr) {
            Some(fixed) => fixed.matrix(ssrc, &table.blind),
            None => route.matrix(ssrc, table.edge_fec),
        };
        let group = group.and_then(|addr| table.fixed_routes.get(&addr));
        let in_group = group.and_then(|fixed| fixed.matrix(ssrc, &table.blind));
        route.addrs().filter_map(at).next().or(in_group)
    }

    fn change(&self, change: impl FnOnce(&mut Table)) {
        let mut table = self.shared.table.write();
        change(&mut table);
        let dynamic = i64::try_from(table.dynamic_targets()).unwrap_or(i64::MAX);
        self.shared.dynamic_targets.set(dynamic);
        self.shared.generation.fetch_add(1, Ordering::Release);
    }

    fn read(&self) -> RwLockReadGuard<'_, Table> {
        self.shared.table.read()
    }
}

/// Cached route of one stream, owned by the task that sends the stream.
pub struct Route {
    routes: Routes,
    key: StreamKey,
    ssrc: Ssrc,
    snapshot: Arc<Snapshot>,
    /// The generation of the table that the snapshot was made from.
    generation: Option<u64>,
    made: Option<Instant>,
}

impl Route {
    /// The targets as they were at the last call of [`Route::targets`].
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// The targets of the stream. Costs one atomic load while the table does not change. After
    /// changes, the snapshot is rebuilt at most every 10 ms.
    pub fn targets(&mut self, now: Instant) -> &Arc<Snapshot> {
        let generation = self.routes.shared.generation.load(Ordering::Acquire);
        let is_old = |at: Instant| now.saturating_duration_since(at) >= MIN_REBUILD_INTERVAL;
        if self.generation != Some(generation) && self.made.is_none_or(is_old) {
            let before = &self.snapshot;
            let snapshot = self.routes.read().snapshot(&self.key, self.ssrc, before);
            self.snapshot = Arc::new(snapshot);
            self.generation = Some(generation);
            self.made = Some(now);
        }
        &self.snapshot
    }
}

/// Limits the cost of a thousand edges that connect at once: without it, each would cause one snapshot
/// per stream.
const MIN_REBUILD_INTERVAL: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests;
