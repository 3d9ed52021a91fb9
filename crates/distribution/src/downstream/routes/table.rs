//! The routing table, and the snapshots of one stream's targets that are made from it.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
};

use super::{Snapshot, Target};
use downpour_media::{StreamKey, StreamPattern};
use downpour_repair::{
    control::Nonce,
    fec::{Fec, Matrix, PARITY_PORT_OFFSET},
    probe::MAX_PATHS,
    rtp::Ssrc,
};

/// Routing table.
#[derive(Default)]
pub(super) struct Table {
    /// Addresses that get every stream, in the order of the settings.
    pub(super) fixed: Arc<[Target]>,
    /// The same addresses, with their parity.
    pub(super) fixed_routes: HashMap<SocketAddr, FixedRoute>,
    pub(super) edges: HashMap<Nonce, EdgeRoute>,
    /// Parity of edges that accept parity.
    pub(super) edge_fec: Fec,
    /// Parity per stream of adaptive fixed addresses while no receiver reports.
    pub(super) blind: HashMap<Ssrc, Matrix>,
}

impl Table {
    /// The number of edge addresses that are not fixed ones.
    pub(super) fn dynamic_targets(&self) -> usize {
        let addrs = self.edges.values().flat_map(EdgeRoute::addrs);
        addrs.filter(|addr| !self.fixed_routes.contains_key(addr)).count()
    }

    /// The targets of one stream. Targets in `before` keep their index as far as possible.
    pub(super) fn snapshot(&self, key: &StreamKey, ssrc: Ssrc, before: &Snapshot) -> Snapshot {
        let wanting: Vec<_> = self.edges.values().filter(|edge| edge.wanted.matches(key)).collect();
        let dynamic = self.dynamic(&wanting);
        let media = match dynamic.is_empty() {
            true => self.fixed.clone(),
            false => {
                let all = self.fixed.iter().chain(&dynamic).copied();
                keep_indices(&before.media, all.collect()).into()
            }
        };
        let dynamic = match self.fixed.is_empty() {
            true => Arc::clone(&media),
            false => keep_indices(&before.dynamic, dynamic).into(),
        };
        let (fixed, parity) = (self.fixed.clone(), self.parity(&wanting, ssrc));
        Snapshot { media, fixed, dynamic, parity }
    }

    /// The addresses of edges that are not fixed ones, in order.
    fn dynamic(&self, wanting: &[&EdgeRoute]) -> Vec<Target> {
        let mut targets: Vec<_> = wanting
            .iter()
            .flat_map(|edge| edge.targets())
            .filter(|target| !self.fixed_routes.contains_key(&target.addr))
            .collect();
        targets.sort_unstable_by_key(|target| target.addr);
        // A reconnected edge is in the table twice until its old connection times out.
        targets.dedup_by_key(|target| target.addr);
        targets
    }

    fn parity(&self, wanting: &[&EdgeRoute], ssrc: Ssrc) -> Vec<(Matrix, Arc<[Target]>)> {
        let mut chosen: BTreeMap<SocketAddr, Matrix> = BTreeMap::new();
        let with_parity = |(_, route): &(&SocketAddr, &FixedRoute)| route.fec != Fec::Off;
        let mut fixed = self.fixed_routes.iter().filter(with_parity).peekable();
        // An edge that validated a fixed address receives parity there: it has no socket at the
        // parity port.
        let validated: HashSet<_> = match fixed.peek() {
            Some(_) => {
                self.edges.values().filter(|e| e.takes_parity).flat_map(|e| e.addrs()).collect()
            }
            None => HashSet::new(),
        };
        let fixed = fixed.filter_map(|(addr, route)| {
            let matrix = route.matrix(ssrc, &self.blind)?;
            let port = addr.port().checked_add(PARITY_PORT_OFFSET);
            match validated.contains(addr) {
                true => Some((*addr, matrix)),
                false => port.map(|port| (SocketAddr::new(addr.ip(), port), matrix)),
            }
        });
        let dynamic = wanting.iter().filter(|edge| edge.takes_parity).flat_map(|edge| {
            let matrix = edge.matrix(ssrc, self.edge_fec);
            let own = edge.addrs().filter(|addr| !self.fixed_routes.contains_key(addr));
            own.filter_map(move |addr| Some((addr, matrix?)))
        });
        for (addr, matrix) in fixed.chain(dynamic) {
            let held = chosen.entry(addr).or_insert(matrix);
            if matrix.overhead() > held.overhead() {
                *held = matrix;
            }
        }
        let mut parity: Vec<(Matrix, Vec<Target>)> = Vec::new();
        for (addr, matrix) in chosen {
            // A linear search: there are few distinct matrices, from the settings and the adaptation.
            match parity.iter_mut().find(|(of, _)| *of == matrix) {
                Some((_, targets)) => targets.push(addr.into()),
                None => parity.push((matrix, vec![addr.into()])),
            }
        }
        parity.into_iter().map(|(matrix, targets)| (matrix, targets.into())).collect()
    }
}

/// Reorders `targets` so that each target has the index that it had in `before`.
///
/// The index decides which fan-out worker sends to the target, and with another worker the next burst
/// could overtake the last one. New targets fill the gaps of removed ones. If more were removed than
/// added, targets from the end of the list move into the gaps.
pub(super) fn keep_indices(before: &[Target], targets: Vec<Target>) -> Vec<Target> {
    if before.is_empty() {
        return targets;
    }
    let held: HashSet<_> = before.iter().map(|target| target.addr).collect();
    let wanted: HashMap<_, _> = targets.iter().map(|target| (target.addr, *target)).collect();
    let mut new = targets.into_iter().filter(|target| !held.contains(&target.addr));
    let mut placed = before.to_vec();
    let mut next = 0;
    while let Some(place) = placed.get_mut(next) {
        if let Some(target) = wanted.get(&place.addr) {
            *place = *target;
            next += 1;
        } else if let Some(target) = new.next() {
            *place = target;
            next += 1;
        } else {
            placed.swap_remove(next);
        }
    }
    placed.extend(new);
    placed
}

/// A fixed address's parity.
pub(super) struct FixedRoute {
    pub(super) fec: Fec,
    /// Parity that receiver reports call for, by stream.
    pub(super) adapted: HashMap<Ssrc, Option<Matrix>>,
}

impl FixedRoute {
    /// The parity of a stream. Adaptive addresses get the `blind` parity until a receiver reports.
    pub(super) fn matrix(&self, ssrc: Ssrc, blind: &HashMap<Ssrc, Matrix>) -> Option<Matrix> {
        match self.fec {
            Fec::Off => None,
            Fec::Fixed(matrix) => Some(matrix),
            Fec::Auto => {
                let adapted = self.adapted.get(&ssrc).copied();
                adapted.unwrap_or_else(|| blind.get(&ssrc).copied())
            }
        }
    }
}

/// An edge's subscription, addresses and parity.
#[derive(Default)]
pub(super) struct EdgeRoute {
    pub(super) wanted: Wanted,
    /// Validated RTP addresses, by path.
    pub(super) targets: [Option<Target>; MAX_PATHS as usize],
    pub(super) takes_parity: bool,
    /// Parity that the edge's reports call for, by stream.
    pub(super) adapted: HashMap<Ssrc, Option<Matrix>>,
}

impl EdgeRoute {
    pub(super) fn addrs(&self) -> impl Iterator<Item = SocketAddr> + use<> {
        self.targets().map(|target| target.addr)
    }

    fn targets(&self) -> impl Iterator<Item = Target> + use<> {
        self.targets.into_iter().flatten()
    }

    /// The parity of a stream. An adaptive edge gets none until it reports a loss: it can send NACKs.
    pub(super) fn matrix(&self, ssrc: Ssrc, fec: Fec) -> Option<Matrix> {
        match fec {
            Fec::Off => None,
            Fec::Fixed(matrix) => Some(matrix),
            Fec::Auto => self.adapted.get(&ssrc).copied().flatten(),
        }
    }
}

/// Set of stream patterns with constant-time lookup.
#[derive(Default, PartialEq)]
pub(super) struct Wanted {
    all: bool,
    apps: HashSet<String>,
    streams: HashSet<StreamKey>,
}

impl Wanted {
    pub(super) fn new(patterns: &[StreamPattern]) -> Self {
        let mut wanted = Self::default();
        for pattern in patterns {
            match pattern {
                StreamPattern::All => wanted.all = true,
                StreamPattern::App(app) => {
                    wanted.apps.insert(app.clone());
                }
                StreamPattern::Stream(key) => {
                    wanted.streams.insert(key.clone());
                }
            }
        }
        wanted
    }

    pub(super) fn matches(&self, key: &StreamKey) -> bool {
        self.all || self.apps.contains(key.app()) || self.streams.contains(key)
    }
}
