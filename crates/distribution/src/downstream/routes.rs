//! Where each stream and its parity go: the addresses that get everything, and the edges that asked
//! for it.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus::{IntGauge, Registry, register_int_gauge_with_registry};

use downpour_media::{StreamKey, StreamPattern};
use downpour_repair::{
    control::Nonce,
    fec::adaptation::{Adapted, Choice},
    fec::{Fec, Matrix, PARITY_PORT_OFFSET},
    probe::MAX_PATHS,
    rtp::Ssrc,
};

/// One address that a stream is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// An edge or a multicast group.
    pub addr: SocketAddr,
}

impl From<SocketAddr> for Target {
    fn from(addr: SocketAddr) -> Self {
        Self { addr }
    }
}

/// An address that gets every stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedTarget {
    /// An edge or a multicast group.
    pub addr: SocketAddr,
    /// Its parity.
    pub fec: Fec,
}

impl From<SocketAddr> for FixedTarget {
    /// Without parity.
    fn from(addr: SocketAddr) -> Self {
        Self { addr, fec: Fec::Off }
    }
}

/// Where one stream goes at one time.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// Who gets the stream itself, each address once.
    pub media: Arc<[Target]>,
    /// Who gets which parity of it: each matrix once, and each address with one of them.
    pub parity: Vec<(Matrix, Arc<[Target]>)>,
}

/// Who gets what. Cloning shares it.
#[derive(Clone)]
pub struct Routes {
    shared: Arc<Shared>,
}

struct Shared {
    state: RwLock<State>,
    /// Counts changes, so that who sends a burst sees without a lock that there was none.
    generation: AtomicU64,
    dynamic_targets: IntGauge,
}

#[derive(Default)]
struct State {
    fixed: Arc<[Target]>,
    is_fixed: HashMap<SocketAddr, FixedRoute>,
    edges: HashMap<Nonce, EdgeRoute>,
    /// Of edges that take parity.
    edge_fec: Fec,
    /// What adapted fixed addresses get of a stream while nobody reports.
    blind: HashMap<Ssrc, Matrix>,
}

impl Routes {
    /// Nobody gets anything yet.
    ///
    /// # Errors
    /// If the name of its gauge is taken.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        let dynamic_targets = register_int_gauge_with_registry!(
            "downpour_fanout_dynamic_targets",
            "Addresses that edges proved to be theirs and that RTP goes to",
            registry
        )?;
        let (state, generation) = (RwLock::default(), AtomicU64::new(0));
        Ok(Self { shared: Arc::new(Shared { state, generation, dynamic_targets }) })
    }

    /// The parity of edges that take it; none at first.
    pub fn set_edge_fec(&self, fec: Fec) {
        self.change(|state| state.edge_fec = fec);
    }

    /// Replaces the addresses that get every stream. One that stands there twice counts once.
    pub fn set_fixed(&self, targets: impl IntoIterator<Item = impl Into<FixedTarget>>) {
        self.change(|state| {
            let mut before = std::mem::take(&mut state.is_fixed);
            let mut fixed = Vec::new();
            for FixedTarget { addr, fec } in targets.into_iter().map(Into::into) {
                if let Entry::Vacant(entry) = state.is_fixed.entry(addr) {
                    let adapted = before.remove(&addr).map(|route| route.adapted);
                    entry.insert(FixedRoute { fec, adapted: adapted.unwrap_or_default() });
                    fixed.push(Target { addr });
                }
            }
            state.fixed = fixed.into();
        });
    }

    /// The streams that an edge wants, in place of those that it wanted before.
    pub fn set_patterns(&self, edge: Nonce, patterns: &[StreamPattern]) {
        let wanted = Wanted::new(patterns);
        let held = self.read().edges.get(&edge).map(|edge| edge.wanted == wanted);
        if held != Some(true) {
            self.change(|state| state.edges.entry(edge).or_default().wanted = wanted);
        }
    }

    /// Whether an edge takes parity where it takes RTP; it does not at first.
    pub fn set_takes_parity(&self, edge: Nonce, takes_parity: bool) {
        self.change(|state| state.edges.entry(edge).or_default().takes_parity = takes_parity);
    }

    /// Where an edge takes RTP over one of its paths; `None` takes the address away.
    pub fn set_address(&self, edge: Nonce, path: u8, addr: Option<SocketAddr>) {
        self.change(|state| {
            let edge = state.edges.entry(edge).or_default();
            if let Some(slot) = edge.addrs.get_mut(usize::from(path)) {
                *slot = addr;
            }
        });
    }

    /// Sends an edge nothing more.
    pub fn remove(&self, edge: &Nonce) {
        self.change(|state| {
            state.edges.remove(edge);
        });
    }

    /// What reports call for, of which receiver and stream. Those that are gone are ignored.
    pub fn set_choices(&self, choices: &[(Adapted, Ssrc, Choice)]) {
        if choices.is_empty() {
            return;
        }
        self.change(|state| {
            for (adapted, ssrc, choice) in choices {
                let streams = match adapted {
                    Adapted::Fixed(addr) => state.is_fixed.get_mut(addr).map(|r| &mut r.adapted),
                    Adapted::Edge(nonce) => state.edges.get_mut(nonce).map(|r| &mut r.adapted),
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

    /// What adapted fixed addresses get of each stream while nobody reports, in place of what was
    /// set before.
    pub fn set_blind(&self, blind: HashMap<Ssrc, Matrix>) {
        let same = self.read().blind == blind;
        if !same {
            self.change(|state| state.blind = blind);
        }
    }

    /// The way of one stream.
    pub fn route(&self, key: StreamKey, ssrc: Ssrc) -> Route {
        let (routes, snapshot) = (self.clone(), Arc::default());
        Route { routes, key, ssrc, snapshot, generation: None, made: None }
    }

    /// The addresses that get every stream.
    pub fn fixed(&self) -> Arc<[Target]> {
        self.read().fixed.clone()
    }

    /// Whether an address is one of those that get every stream.
    pub fn is_fixed(&self, addr: SocketAddr) -> bool {
        self.read().is_fixed.contains_key(&addr)
    }

    /// Whether the parity of an address that gets every stream is adapted.
    pub fn adapts_fixed(&self) -> bool {
        self.read().is_fixed.values().any(|route| route.fec == Fec::Auto)
    }

    /// Whose parity an edge's reports set: that of the group which it listens to, and its own.
    pub fn adapted_by(&self, edge: &Nonce, group: Option<SocketAddr>) -> Vec<Adapted> {
        let state = self.read();
        let Some(route) = state.edges.get(edge).filter(|route| route.takes_parity) else {
            return Vec::new();
        };
        let adapts = |addr: &SocketAddr| {
            state.is_fixed.get(addr).is_some_and(|fixed| fixed.fec == Fec::Auto)
        };
        let mut adapted: Vec<_> =
            group.into_iter().chain(route.addrs()).filter(adapts).map(Adapted::Fixed).collect();
        let mut own = route.addrs().filter(|addr| !state.is_fixed.contains_key(addr));
        if state.edge_fec == Fec::Auto && own.next().is_some() {
            adapted.push(Adapted::Edge(*edge));
        }
        adapted
    }

    /// The parity of a stream that an edge gets, at an address of its own or else in its group.
    pub fn parity_of(&self, edge: &Nonce, group: Option<SocketAddr>, ssrc: Ssrc) -> Option<Matrix> {
        let state = self.read();
        let route = state.edges.get(edge).filter(|route| route.takes_parity)?;
        let of = |addr: SocketAddr| match state.is_fixed.get(&addr) {
            Some(fixed) => fixed.matrix(ssrc, &state.blind),
            None => route.matrix(ssrc, state.edge_fec),
        };
        let group = group.and_then(|addr| state.is_fixed.get(&addr));
        let of_group = group.and_then(|fixed| fixed.matrix(ssrc, &state.blind));
        route.addrs().filter_map(of).next().or(of_group)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.write();
        change(&mut state);
        let addrs = state.edges.values().flat_map(EdgeRoute::addrs);
        let dynamic = addrs.filter(|addr| !state.is_fixed.contains_key(addr)).count();
        self.shared.dynamic_targets.set(i64::try_from(dynamic).unwrap_or(i64::MAX));
        self.shared.generation.fetch_add(1, Ordering::Release);
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.shared.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.shared.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One stream's way, held by who sends it.
pub struct Route {
    routes: Routes,
    key: StreamKey,
    ssrc: Ssrc,
    snapshot: Arc<Snapshot>,
    /// Of which state of the routes the snapshot is.
    generation: Option<u64>,
    made: Option<Instant>,
}

impl Route {
    /// Where the stream goes now. As long as nothing changes this costs one atomic read; after a
    /// change, a snapshot is made, at most every 10 ms however many there are.
    pub fn targets(&mut self, now: Instant) -> &Arc<Snapshot> {
        let generation = self.routes.shared.generation.load(Ordering::Acquire);
        let rested = |at: Instant| now.saturating_duration_since(at) >= REMAKE_EVERY;
        if self.generation != Some(generation) && self.made.is_none_or(rested) {
            let before = &self.snapshot.media;
            let snapshot = self.routes.read().snapshot(&self.key, self.ssrc, before);
            self.snapshot = Arc::new(snapshot);
            self.generation = Some(generation);
            self.made = Some(now);
        }
        &self.snapshot
    }
}

impl State {
    fn snapshot(&self, key: &StreamKey, ssrc: Ssrc, before: &[Target]) -> Snapshot {
        let wanting: Vec<_> = self.edges.values().filter(|edge| edge.wanted.matches(key)).collect();
        Snapshot { media: self.media(&wanting, before), parity: self.parity(&wanting, ssrc) }
    }

    fn media(&self, wanting: &[&EdgeRoute], before: &[Target]) -> Arc<[Target]> {
        // An edge that came back is there twice until its old connection is found to be dead.
        let mut addrs: Vec<_> = wanting
            .iter()
            .flat_map(|edge| edge.addrs())
            .filter(|addr| !self.is_fixed.contains_key(addr))
            .collect();
        if addrs.is_empty() {
            return self.fixed.clone();
        }
        addrs.sort_unstable();
        addrs.dedup();
        let dynamic = addrs.into_iter().map(Target::from);
        keep_places(before, self.fixed.iter().copied().chain(dynamic).collect()).into()
    }

    fn parity(&self, wanting: &[&EdgeRoute], ssrc: Ssrc) -> Vec<(Matrix, Arc<[Target]>)> {
        let mut chosen: BTreeMap<SocketAddr, Matrix> = BTreeMap::new();
        let mut listed = self.is_fixed.iter().filter(|(_, route)| route.fec != Fec::Off).peekable();
        // An edge that proved a listed address takes parity there, and has no other socket for it.
        let proven: HashSet<_> = match listed.peek() {
            Some(_) => {
                self.edges.values().filter(|e| e.takes_parity).flat_map(|e| e.addrs()).collect()
            }
            None => HashSet::new(),
        };
        let fixed = listed.filter_map(|(addr, route)| {
            let matrix = route.matrix(ssrc, &self.blind)?;
            let port = addr.port().checked_add(PARITY_PORT_OFFSET);
            match proven.contains(addr) {
                true => Some((*addr, matrix)),
                false => port.map(|port| (SocketAddr::new(addr.ip(), port), matrix)),
            }
        });
        let dynamic = wanting.iter().filter(|edge| edge.takes_parity).flat_map(|edge| {
            let matrix = edge.matrix(ssrc, self.edge_fec);
            let own = edge.addrs().filter(|addr| !self.is_fixed.contains_key(addr));
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
            // Few are distinct: those of the file, and those that adaptation chooses from.
            match parity.iter_mut().find(|(of, _)| *of == matrix) {
                Some((_, targets)) => targets.push(addr.into()),
                None => parity.push((matrix, vec![addr.into()])),
            }
        }
        parity.into_iter().map(|(matrix, targets)| (matrix, targets.into())).collect()
    }
}

/// `targets`, each of which stands where it stood `before`, if it did: by its place it has its
/// worker, and another worker may send the next burst while the first still has the last. New ones
/// take the places of those that have left; if more have left, the last ones do.
fn keep_places(before: &[Target], targets: Vec<Target>) -> Vec<Target> {
    if before.is_empty() {
        return targets;
    }
    let held: HashSet<_> = before.iter().map(|target| target.addr).collect();
    let wanted: HashSet<_> = targets.iter().map(|target| target.addr).collect();
    let mut new = targets.into_iter().filter(|target| !held.contains(&target.addr));
    let mut placed = before.to_vec();
    let mut next = 0;
    while let Some(place) = placed.get_mut(next) {
        if wanted.contains(&place.addr) {
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

struct FixedRoute {
    fec: Fec,
    /// What reports call for, by stream.
    adapted: HashMap<Ssrc, Option<Matrix>>,
}

impl FixedRoute {
    fn matrix(&self, ssrc: Ssrc, blind: &HashMap<Ssrc, Matrix>) -> Option<Matrix> {
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

#[derive(Default)]
struct EdgeRoute {
    wanted: Wanted,
    addrs: [Option<SocketAddr>; MAX_PATHS as usize],
    takes_parity: bool,
    /// What its reports call for, by stream.
    adapted: HashMap<Ssrc, Option<Matrix>>,
}

impl EdgeRoute {
    fn addrs(&self) -> impl Iterator<Item = SocketAddr> + use<> {
        self.addrs.into_iter().flatten()
    }

    /// Until it reports a loss, none: it can ask.
    fn matrix(&self, ssrc: Ssrc, fec: Fec) -> Option<Matrix> {
        match fec {
            Fec::Off => None,
            Fec::Fixed(matrix) => Some(matrix),
            Fec::Auto => self.adapted.get(&ssrc).copied().flatten(),
        }
    }
}

/// Patterns, such that a stream is looked up at once however many there are.
#[derive(Default, PartialEq)]
struct Wanted {
    all: bool,
    apps: HashSet<String>,
    streams: HashSet<StreamKey>,
}

impl Wanted {
    fn new(patterns: &[StreamPattern]) -> Self {
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

    fn matches(&self, key: &StreamKey) -> bool {
        self.all || self.apps.contains(key.app()) || self.streams.contains(key)
    }
}

/// A thousand edges that come at once must not cost a list for each of them and each stream.
const REMAKE_EVERY: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn routes() -> Routes {
        Routes::new(&Registry::new()).unwrap()
    }

    fn addr(n: u8) -> SocketAddr {
        ([10, 0, 0, n], 5222).into()
    }

    fn edge(n: u8) -> Nonce {
        Nonce([n; 16])
    }

    fn patterns(texts: &[&str]) -> Vec<StreamPattern> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn now_at(routes: &Routes, key: &str) -> Vec<SocketAddr> {
        addrs(&snapshot(routes, key).media)
    }

    fn snapshot(routes: &Routes, key: &str) -> Arc<Snapshot> {
        routes.route(key.parse().unwrap(), SSRC).targets(Instant::now()).clone()
    }

    fn addrs(targets: &[Target]) -> Vec<SocketAddr> {
        targets.iter().map(|target| target.addr).collect()
    }

    /// Each matrix with the addresses that get its parity.
    fn parity_at(routes: &Routes, key: &str) -> Vec<(Matrix, Vec<SocketAddr>)> {
        let snapshot = snapshot(routes, key);
        snapshot.parity.iter().map(|(matrix, targets)| (*matrix, addrs(targets))).collect()
    }

    fn matrix(columns: u8, rows: u8) -> Matrix {
        Matrix::new(columns, rows).unwrap()
    }

    const SSRC: Ssrc = Ssrc(7);

    #[test]
    fn an_edge_gets_what_it_wants_where_it_proved_to_be() {
        let routes = routes();
        routes.set_patterns(edge(1), &patterns(&["live/*"]));
        assert_eq!(now_at(&routes, "live/a"), []);
        routes.set_address(edge(1), 0, Some(addr(1)));
        routes.set_address(edge(1), 1, Some(addr(2)));
        assert_eq!(now_at(&routes, "live/a"), [addr(1), addr(2)]);
        assert_eq!(now_at(&routes, "other/a"), []);
        assert_eq!(routes.shared.dynamic_targets.get(), 2);
        routes.set_patterns(edge(1), &patterns(&["other/a"]));
        assert_eq!(now_at(&routes, "live/a"), []);
        assert_eq!(now_at(&routes, "other/a"), [addr(1), addr(2)]);
        routes.set_address(edge(1), 0, None);
        routes.set_address(edge(1), 2, Some(addr(9)));
        assert_eq!(now_at(&routes, "other/a"), [addr(2)]);
        routes.remove(&edge(1));
        assert_eq!(now_at(&routes, "other/a"), []);
        assert_eq!(routes.shared.dynamic_targets.get(), 0);
    }

    #[test]
    fn nobody_is_sent_to_twice() {
        let routes = routes();
        routes.set_fixed([addr(1), addr(2), addr(1)]);
        for n in 1..=3 {
            routes.set_patterns(edge(n), &patterns(&["*", "live/a"]));
            routes.set_address(edge(n), 0, Some(addr(n.max(2))));
            routes.set_address(edge(n), 1, Some(addr(n.max(2))));
        }
        assert_eq!(now_at(&routes, "live/a"), [addr(1), addr(2), addr(3)]);
        assert!(routes.is_fixed(addr(2)) && !routes.is_fixed(addr(3)));
        // When the list no longer has it, the edge gets it for itself.
        routes.set_fixed([] as [SocketAddr; 0]);
        assert_eq!(now_at(&routes, "live/a"), [addr(2), addr(3)]);
        assert!(routes.fixed().is_empty());
    }

    #[test]
    fn a_list_is_shared_until_something_changes() {
        let routes = routes();
        routes.set_patterns(edge(1), &patterns(&["*"]));
        routes.set_address(edge(1), 0, Some(addr(1)));
        let mut route = routes.route("live/a".parse().unwrap(), SSRC);
        let now = Instant::now();
        let first = route.targets(now).clone();
        routes.set_patterns(edge(1), &patterns(&["*"]));
        let later = now + REMAKE_EVERY;
        assert!(Arc::ptr_eq(&first, route.targets(later)), "nothing changed");
        routes.remove(&edge(1));
        assert!(route.targets(later).media.is_empty());
        routes.set_fixed([addr(3)]);
        let soon = later + REMAKE_EVERY / 2;
        assert!(route.targets(soon).media.is_empty(), "it was made a moment ago");
        assert_eq!(route.targets(later + REMAKE_EVERY).media.len(), 1);
    }

    #[test]
    fn parity_goes_beside_the_listed_and_with_the_media_to_edges() {
        let routes = routes();
        let fixed = |n, fec| FixedTarget { addr: addr(n), fec };
        routes.set_fixed([fixed(1, Fec::Fixed(matrix(10, 5))), fixed(2, Fec::Off)]);
        routes.set_edge_fec(Fec::Fixed(matrix(5, 1)));
        for n in 3..=5 {
            routes.set_patterns(edge(n), &patterns(&[if n == 5 { "other/*" } else { "live/*" }]));
            routes.set_takes_parity(edge(n), n != 4);
            routes.set_address(edge(n), 0, Some(addr(n)));
            routes.set_address(edge(n), 1, Some(addr(n + 10)));
        }
        let beside = SocketAddr::new(addr(1).ip(), addr(1).port() + PARITY_PORT_OFFSET);
        let expected = [(matrix(10, 5), vec![beside]), (matrix(5, 1), vec![addr(3), addr(13)])];
        assert_eq!(parity_at(&routes, "live/a"), expected);
        assert_eq!(routes.parity_of(&edge(3), None, SSRC), Some(matrix(5, 1)));
        assert_eq!(routes.parity_of(&edge(4), Some(addr(1)), SSRC), None, "it takes none");
        // Who proves a listed address has it there, by the list's word.
        routes.set_address(edge(3), 0, Some(addr(1)));
        let expected = [(matrix(10, 5), vec![addr(1)]), (matrix(5, 1), vec![addr(13)])];
        assert_eq!(parity_at(&routes, "live/a"), expected);
        assert_eq!(routes.parity_of(&edge(3), None, SSRC), Some(matrix(10, 5)));
        routes.remove(&edge(3));
        assert_eq!(parity_at(&routes, "live/a"), [(matrix(10, 5), vec![beside])]);
        routes.set_fixed([fixed(1, Fec::Off), fixed(2, Fec::Off)]);
        assert_eq!(parity_at(&routes, "live/a"), []);
    }

    #[test]
    fn adapted_parity_is_what_was_chosen_and_blind_where_nobody_reports() {
        let routes = routes();
        let group = FixedTarget { addr: addr(1), fec: Fec::Auto };
        routes.set_fixed([group]);
        routes.set_edge_fec(Fec::Auto);
        assert!(routes.adapts_fixed());
        assert!(routes.adapted_by(&edge(3), Some(addr(1))).is_empty(), "it is not there");
        routes.set_patterns(edge(3), &patterns(&["*"]));
        assert!(routes.adapted_by(&edge(3), Some(addr(1))).is_empty(), "it takes none");
        routes.set_takes_parity(edge(3), true);
        assert_eq!(routes.adapted_by(&edge(3), Some(addr(1))), [Adapted::Fixed(addr(1))]);
        assert!(routes.adapted_by(&edge(3), Some(addr(9))).is_empty(), "no group of ours");
        routes.set_address(edge(3), 0, Some(addr(3)));
        assert_eq!(routes.adapted_by(&edge(3), None), [Adapted::Edge(edge(3))]);

        let used = || -> Vec<_> { parity_at(&routes, "live/a").iter().map(|(m, _)| *m).collect() };
        assert_eq!(used(), []);
        routes.set_blind(HashMap::from([(SSRC, matrix(10, 10)), (Ssrc(8), matrix(5, 1))]));
        assert_eq!(used(), [matrix(10, 10)], "the group's alone");
        let edge_too = (Adapted::Edge(edge(3)), SSRC, Choice::Use(Some(matrix(4, 4))));
        let group_off = (Adapted::Fixed(addr(1)), SSRC, Choice::Use(None));
        let nobody = (Adapted::Edge(edge(9)), SSRC, Choice::Use(Some(matrix(2, 2))));
        routes.set_choices(&[edge_too, group_off, nobody]);
        assert_eq!(parity_at(&routes, "live/a"), [(matrix(4, 4), vec![addr(3)])]);
        routes.set_choices(&[(Adapted::Fixed(addr(1)), SSRC, Choice::Unknown)]);
        assert_eq!(used(), [matrix(10, 10), matrix(4, 4)]);
        // A list that is looked up anew forgets nothing of those that stay.
        routes.set_choices(&[group_off]);
        routes.set_fixed([group, FixedTarget { addr: addr(2), fec: Fec::Off }]);
        assert_eq!(used(), [matrix(4, 4)]);
        routes.remove(&edge(3));
        assert_eq!(used(), []);
    }

    #[test]
    fn there_is_no_parity_where_there_is_no_port_for_it() {
        let routes = routes();
        let last = SocketAddr::from(([10, 0, 0, 1], u16::MAX - 1));
        routes.set_fixed([FixedTarget { addr: last, fec: Fec::Fixed(matrix(5, 1)) }]);
        assert_eq!(parity_at(&routes, "live/a"), []);
    }

    #[test]
    fn who_stays_keeps_its_place() {
        let routes = routes();
        routes.set_fixed([addr(250)]);
        let mut route = routes.route("live/a".parse().unwrap(), SSRC);
        let (mut now, mut before) = (Instant::now(), Vec::new());
        let mut next = |route: &mut Route| {
            now += REMAKE_EVERY;
            addrs(&route.targets(now).media)
        };
        let come = |n| {
            routes.set_patterns(edge(n), &patterns(&["*"]));
            routes.set_address(edge(n), 0, Some(addr(n)));
        };
        // Each before all others by its address.
        for n in (100..200).rev() {
            come(n);
            let list = next(&mut route);
            assert!(list.starts_with(&before) && list.len() == before.len().max(1) + 1);
            before = list;
        }
        // One that leaves makes place for one that comes, or else for the last.
        routes.remove(&edge(150));
        come(7);
        let list = next(&mut route);
        let moved = list.iter().zip(&before).filter(|(now, before)| now != before);
        assert_eq!(moved.collect::<Vec<_>>(), [(&addr(7), &addr(150))]);
        routes.remove(&edge(150));
        routes.remove(&edge(140));
        let shorter = next(&mut route);
        let moved: Vec<_> =
            shorter.iter().zip(&list).filter(|(now, before)| now != before).collect();
        assert_eq!((moved, shorter.len()), (vec![(&addr(100), &addr(140))], list.len() - 1));
    }

    proptest! {
        #[test]
        fn places_are_kept_whoever_comes_and_goes(
            lists in prop::collection::vec(prop::collection::btree_set(0..60_u8, 0..50), 1..9),
        ) {
            let mut before: Vec<Target> = Vec::new();
            for list in lists {
                let targets: Vec<Target> = list.iter().map(|n| addr(*n).into()).collect();
                let after = keep_places(&before, targets.clone());
                let mut sorted = after.clone();
                sorted.sort_unstable_by_key(|target| target.addr);
                prop_assert_eq!(&sorted, &targets);
                let left = before.iter().filter(|target| !targets.contains(target)).count();
                let stayed = before.len() - left;
                let moved = before.iter().enumerate().filter(|(place, target)| {
                    targets.contains(target) && after.get(*place) != Some(target)
                });
                // Where the list becomes shorter, as many as it does.
                let shorter = before.len().saturating_sub(after.len());
                prop_assert!(moved.count() <= shorter.min(stayed));
                before = after;
            }
        }

        /// Looked up quickly or tried one by one, patterns mean the same.
        #[test]
        fn wanted_is_what_the_patterns_match(
            texts in prop::collection::vec("(a|b)/(x|y|\\*)|\\*", 0..6),
            key in "(a|b|c)/(x|y|z)",
        ) {
            let patterns: Vec<StreamPattern> =
                texts.iter().map(|text| text.parse().unwrap()).collect();
            let key: StreamKey = key.parse().unwrap();
            let expected = patterns.iter().any(|pattern| pattern.matches(&key));
            prop_assert_eq!(Wanted::new(&patterns).matches(&key), expected);
        }
    }
}
