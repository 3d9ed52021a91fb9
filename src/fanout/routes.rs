//! Where each stream goes: the addresses that get everything, and the edges that asked for it.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use prometheus::{IntGauge, Registry, register_int_gauge_with_registry};

use crate::{
    StreamKey,
    repair::{
        control::{Nonce, StreamPattern},
        probe::MAX_PATHS,
    },
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
    is_fixed: HashSet<SocketAddr>,
    edges: HashMap<Nonce, EdgeRoute>,
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

    /// Replaces the addresses that get every stream. One that stands there twice counts once.
    pub fn set_fixed(&self, addrs: impl IntoIterator<Item = SocketAddr>) {
        let mut seen = HashSet::new();
        let fixed = addrs.into_iter().filter(|addr| seen.insert(*addr)).map(Target::from).collect();
        self.change(|state| {
            state.fixed = fixed;
            state.is_fixed = seen;
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

    /// The way of one stream.
    pub fn route(&self, key: StreamKey) -> Route {
        Route { routes: self.clone(), key, targets: Arc::new([]), generation: None, made: None }
    }

    /// The addresses that get every stream.
    pub fn fixed(&self) -> Arc<[Target]> {
        self.read().fixed.clone()
    }

    /// Whether an address is one of those that get every stream.
    pub fn is_fixed(&self, addr: SocketAddr) -> bool {
        self.read().is_fixed.contains(&addr)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.write();
        change(&mut state);
        let addrs = state.edges.values().flat_map(EdgeRoute::addrs);
        let dynamic = addrs.filter(|addr| !state.is_fixed.contains(addr)).count();
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
    targets: Arc<[Target]>,
    /// Of which state of the routes the targets are.
    generation: Option<u64>,
    made: Option<Instant>,
}

impl Route {
    /// Where the stream goes now, each address once. As long as nothing changes this costs one
    /// atomic read; after a change, a list is made, at most every 10 ms however many there are.
    pub fn targets(&mut self, now: Instant) -> Arc<[Target]> {
        let generation = self.routes.shared.generation.load(Ordering::Acquire);
        let rested = |at: Instant| now.saturating_duration_since(at) >= REMAKE_EVERY;
        if self.generation != Some(generation) && self.made.is_none_or(rested) {
            self.targets = self.routes.read().targets(&self.key);
            self.generation = Some(generation);
            self.made = Some(now);
        }
        self.targets.clone()
    }
}

impl State {
    fn targets(&self, key: &StreamKey) -> Arc<[Target]> {
        let wanting = self.edges.values().filter(|edge| edge.wanted.matches(key));
        // An edge that came back is there twice until its old connection is found to be dead.
        let mut addrs: Vec<_> = wanting
            .flat_map(EdgeRoute::addrs)
            .filter(|addr| !self.is_fixed.contains(addr))
            .collect();
        if addrs.is_empty() {
            return self.fixed.clone();
        }
        addrs.sort_unstable();
        addrs.dedup();
        self.fixed.iter().copied().chain(addrs.into_iter().map(Target::from)).collect()
    }
}

#[derive(Default)]
struct EdgeRoute {
    wanted: Wanted,
    addrs: [Option<SocketAddr>; MAX_PATHS as usize],
}

impl EdgeRoute {
    fn addrs(&self) -> impl Iterator<Item = SocketAddr> {
        self.addrs.into_iter().flatten()
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
        let targets = routes.route(key.parse().unwrap()).targets(Instant::now());
        targets.iter().map(|target| target.addr).collect()
    }

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
        routes.set_fixed([]);
        assert_eq!(now_at(&routes, "live/a"), [addr(2), addr(3)]);
        assert!(routes.fixed().is_empty());
    }

    #[test]
    fn a_list_is_shared_until_something_changes() {
        let routes = routes();
        routes.set_patterns(edge(1), &patterns(&["*"]));
        routes.set_address(edge(1), 0, Some(addr(1)));
        let mut route = routes.route("live/a".parse().unwrap());
        let now = Instant::now();
        let first = route.targets(now);
        routes.set_patterns(edge(1), &patterns(&["*"]));
        let later = now + REMAKE_EVERY;
        assert!(Arc::ptr_eq(&first, &route.targets(later)), "nothing changed");
        routes.remove(&edge(1));
        assert!(route.targets(later).is_empty());
        routes.set_fixed([addr(3)]);
        let soon = later + REMAKE_EVERY / 2;
        assert!(route.targets(soon).is_empty(), "it was made a moment ago");
        assert_eq!(route.targets(later + REMAKE_EVERY).len(), 1);
    }

    proptest! {
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
