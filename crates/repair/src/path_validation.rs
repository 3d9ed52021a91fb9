//! Which addresses edges have proven to be their own, at the cloud.
//!
//! Datagrams and `Instant`s in, what to answer and what changed out.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use ring::hmac;

use super::{
    control::Nonce,
    probe::{Cookie, MAX_PATHS, ProbeMessage, mark},
};

/// The paths of all edges that are connected.
///
/// A cookie is made from a secret, the edge, the path, the address and the time, so nothing is kept
/// for an address that has not proven itself, and probes with forged sources displace nobody.
pub struct PathTable {
    secret: hmac::Key,
    /// Cookies' lifetimes are counted from here.
    start: Instant,
    edges: HashMap<Nonce, [Option<Path>; MAX_PATHS as usize]>,
}

/// What came of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Send this back to where the datagram came from.
    Challenge(ProbeMessage),
    /// This edge gets RTP over this path at this address from now on.
    Proven {
        /// The edge.
        nonce: Nonce,
        /// Its path.
        path: u8,
        /// Where the datagram came from.
        address: SocketAddr,
    },
    /// The edge is where it was.
    Alive {
        /// The edge.
        nonce: Nonce,
        /// Its path.
        path: u8,
    },
    /// A challenge went out on this path a moment ago.
    TooSoon,
    /// No edge has this nonce, or it did not ask for this path.
    UnknownNonce,
    /// A proof with a cookie that is forged, too old, or was sent to another address.
    BadCookie,
    /// A challenge, which only the cloud sends.
    WrongWay,
}

/// How a path stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// No address is proven yet.
    Waiting,
    /// RTP goes to this address.
    Up(SocketAddr),
    /// RTP went to this address, until nothing was heard from it for [`DEAD_AFTER`].
    Lost(SocketAddr),
}

#[derive(Debug, Clone, Copy)]
struct Path {
    state: PathState,
    heard: Instant,
    challenged: Option<Instant>,
}

impl PathTable {
    /// No edge yet. The cookies' secret is to be random and nobody else's.
    pub fn new(now: Instant, secret: [u8; 32]) -> Self {
        Self {
            secret: hmac::Key::new(hmac::HMAC_SHA256, &secret),
            start: now,
            edges: HashMap::new(),
        }
    }

    /// An edge that will prove `paths` addresses, at most [`MAX_PATHS`].
    pub fn insert(&mut self, now: Instant, nonce: Nonce, paths: u8) {
        let path = Path { state: PathState::Waiting, heard: now, challenged: None };
        let paths = std::array::from_fn(|i| (i < usize::from(paths)).then_some(path));
        self.edges.insert(nonce, paths);
    }

    /// Forgets an edge.
    pub fn remove(&mut self, nonce: &Nonce) {
        self.edges.remove(nonce);
    }

    /// Takes a datagram that came from `from`.
    pub fn handle_message(
        &mut self,
        now: Instant,
        from: SocketAddr,
        message: ProbeMessage,
    ) -> Outcome {
        let (path, nonce, cookie) = match message {
            ProbeMessage::Probe { path, nonce } => (path, nonce, None),
            ProbeMessage::Proof { path, nonce, cookie } => (path, nonce, Some(cookie)),
            ProbeMessage::Challenge { .. } => return Outcome::WrongWay,
        };
        let age = now.saturating_duration_since(self.start).as_secs() / COOKIE_LIFE.as_secs();
        let of_age = |age| make_cookie(&self.secret, &nonce, path, from, age);
        let held = self.edges.get_mut(&nonce).and_then(|paths| paths.get_mut(usize::from(path)));
        let Some(Some(held)) = held else { return Outcome::UnknownNonce };
        let known = held.state == PathState::Up(from);
        match cookie {
            _ if known => {
                held.heard = now;
                Outcome::Alive { nonce, path }
            }
            Some(cookie) => {
                // One from the end of the last period is still good.
                if cookie != of_age(age) && Some(cookie) != age.checked_sub(1).map(of_age) {
                    return Outcome::BadCookie;
                }
                held.state = PathState::Up(from);
                held.heard = now;
                Outcome::Proven { nonce, path, address: from }
            }
            None => {
                // An edge could send probes with many sources, to have the cloud spray challenges.
                let due = |at: Instant| now.saturating_duration_since(at) >= CHALLENGE_EVERY;
                if !held.challenged.is_none_or(due) {
                    return Outcome::TooSoon;
                }
                held.challenged = Some(now);
                Outcome::Challenge(ProbeMessage::Challenge {
                    path,
                    mark: mark(&nonce),
                    cookie: of_age(age),
                })
            }
        }
    }

    /// Takes down the paths from which nothing was heard for [`DEAD_AFTER`], and tells them.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<(Nonce, u8, SocketAddr)> {
        let mut dead = Vec::new();
        for (nonce, paths) in &mut self.edges {
            for (i, path) in (0..).zip(paths) {
                if let Some(path) = path
                    && let PathState::Up(address) = path.state
                    && now.saturating_duration_since(path.heard) >= DEAD_AFTER
                {
                    path.state = PathState::Lost(address);
                    dead.push((*nonce, i, address));
                }
            }
        }
        dead
    }

    /// The paths that an edge asked for, in order.
    pub fn states(&self, nonce: &Nonce) -> impl Iterator<Item = PathState> {
        self.edges.get(nonce).into_iter().flatten().flatten().map(|path| path.state)
    }
}

fn make_cookie(
    secret: &hmac::Key,
    nonce: &Nonce,
    path: u8,
    address: SocketAddr,
    age: u64,
) -> Cookie {
    let mut context = hmac::Context::with_key(secret);
    context.update(&nonce.0);
    context.update(&[path]);
    match address.ip() {
        IpAddr::V4(ip) => context.update(&ip.to_ipv6_mapped().octets()),
        IpAddr::V6(ip) => context.update(&ip.octets()),
    }
    context.update(&address.port().to_be_bytes());
    context.update(&age.to_be_bytes());
    let tag = context.sign();
    let head = tag.as_ref().first_chunk().copied().unwrap_or_default();
    Cookie(u64::from_be_bytes(head))
}

/// An address that is silent for so long gets nothing any more: four keep-alives of an edge were
/// lost, or it is gone.
pub const DEAD_AFTER: Duration = Duration::from_secs(20);
/// A cookie is good for one to two of these.
const COOKIE_LIFE: Duration = Duration::from_secs(10);
/// Between two challenges on one path: an honest edge probes every 50 ms at most.
const CHALLENGE_EVERY: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EDGE: Nonce = Nonce([7; 16]);

    fn table(now: Instant, paths: u8) -> PathTable {
        let mut table = PathTable::new(now, [1; 32]);
        table.insert(now, EDGE, paths);
        table
    }

    fn address(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    fn probe(path: u8) -> ProbeMessage {
        ProbeMessage::Probe { path, nonce: EDGE }
    }

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// What the cloud wants back from an address.
    #[track_caller]
    fn challenge(table: &mut PathTable, now: Instant, from: SocketAddr, path: u8) -> ProbeMessage {
        match table.handle_message(now, from, probe(path)) {
            Outcome::Challenge(ProbeMessage::Challenge { path: told, mark: part, cookie }) => {
                assert_eq!((told, part), (path, mark(&EDGE)));
                ProbeMessage::Proof { path, nonce: EDGE, cookie }
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn prove(table: &mut PathTable, now: Instant, from: SocketAddr, path: u8) {
        let proof = challenge(table, now, from, path);
        let proven = Outcome::Proven { nonce: EDGE, path, address: from };
        assert_eq!(table.handle_message(now, from, proof), proven);
    }

    fn states(table: &PathTable) -> Vec<PathState> {
        table.states(&EDGE).collect()
    }

    #[test]
    fn an_address_is_sent_to_once_it_is_proven() {
        let now = Instant::now();
        let mut table = table(now, 1);
        assert_eq!(states(&table), [PathState::Waiting]);
        prove(&mut table, now, address(1), 0);
        assert_eq!(states(&table), [PathState::Up(address(1))]);
        let alive = Outcome::Alive { nonce: EDGE, path: 0 };
        assert_eq!(table.handle_message(now + ms(1), address(1), probe(0)), alive);
        // The edge leaves: its nonce is worth nothing any more.
        table.remove(&EDGE);
        assert_eq!(table.handle_message(now, address(1), probe(0)), Outcome::UnknownNonce);
    }

    #[test]
    fn a_subscriber_cannot_aim_a_stream_at_somebody_else() {
        let now = Instant::now();
        let mut table = table(now, 1);
        let (own, victim) = (address(1), address(2));
        // The victim gets a challenge, and nobody gets it to answer.
        challenge(&mut table, now, victim, 0);
        let proof = challenge(&mut table, now + ms(20), own, 0);
        assert_eq!(table.handle_message(now, victim, proof), Outcome::BadCookie);
        for guess in [0, 1, u64::MAX] {
            let proof = ProbeMessage::Proof { path: 0, nonce: EDGE, cookie: Cookie(guess) };
            assert_eq!(table.handle_message(now, victim, proof), Outcome::BadCookie);
        }
        assert_eq!(states(&table), [PathState::Waiting]);
    }

    #[test]
    fn a_cookie_is_for_one_edge_one_path_and_a_short_time() {
        let now = Instant::now();
        let mut table = table(now, 2);
        let other = Nonce([8; 16]);
        table.insert(now, other, 2);
        let proof = challenge(&mut table, now, address(1), 0);
        let ProbeMessage::Proof { cookie, .. } = proof else { panic!() };
        for (path, nonce) in [(1, EDGE), (0, other)] {
            let stolen = ProbeMessage::Proof { path, nonce, cookie };
            assert_eq!(table.handle_message(now, address(1), stolen), Outcome::BadCookie);
        }
        let late = now + 2 * COOKIE_LIFE;
        assert_eq!(table.handle_message(late, address(1), proof), Outcome::BadCookie);
        // A slow path has at least one period.
        let proof = challenge(&mut table, now + COOKIE_LIFE - ms(1), address(1), 0);
        let outcome = table.handle_message(now + 2 * COOKIE_LIFE - ms(1), address(1), proof);
        assert!(matches!(outcome, Outcome::Proven { .. }), "{outcome:?}");
    }

    #[test]
    fn a_new_address_behind_a_nat_takes_over_when_it_is_proven() {
        let now = Instant::now();
        let mut table = table(now, 1);
        prove(&mut table, now, address(1), 0);
        let later = now + Duration::from_secs(5);
        let proof = challenge(&mut table, later, address(2), 0);
        assert_eq!(states(&table), [PathState::Up(address(1))], "until it is proven");
        table.handle_message(later, address(2), proof);
        assert_eq!(states(&table), [PathState::Up(address(2))]);
        // A straggler from the old one is challenged like any other.
        assert!(matches!(
            table.handle_message(later + ms(20), address(1), probe(0)),
            Outcome::Challenge(_)
        ));
        assert_eq!(states(&table), [PathState::Up(address(2))]);
    }

    #[test]
    fn silence_takes_a_path_down_and_a_proof_brings_it_back() {
        let now = Instant::now();
        let mut table = table(now, 2);
        prove(&mut table, now, address(1), 0);
        prove(&mut table, now, address(2), 1);
        let mut later = now;
        for _ in 0..4 {
            later += Duration::from_secs(5);
            assert!(table.handle_timeout(later - ms(1)).is_empty());
            table.handle_message(later, address(1), probe(0));
        }
        assert_eq!(table.handle_timeout(later), [(EDGE, 1, address(2))]);
        assert_eq!(table.handle_timeout(later), []);
        assert_eq!(states(&table), [PathState::Up(address(1)), PathState::Lost(address(2))]);
        // It must prove itself again: the address may be another's by now.
        prove(&mut table, later, address(2), 1);
    }

    #[test]
    fn probes_with_forged_sources_do_not_keep_a_path_up() {
        let now = Instant::now();
        let mut table = table(now, 1);
        prove(&mut table, now, address(1), 0);
        table.handle_message(now + Duration::from_secs(19), address(9), probe(0));
        assert_eq!(table.handle_timeout(now + DEAD_AFTER).len(), 1);
    }

    #[test]
    fn only_paths_that_were_asked_for_can_be_proven() {
        let now = Instant::now();
        for (paths, path) in [(0, 0), (1, 1)] {
            let mut table = table(now, paths);
            assert_eq!(table.handle_message(now, address(1), probe(path)), Outcome::UnknownNonce);
        }
        let mut table = table(now, 200);
        assert_eq!(states(&table).len(), 2);
        let cookie = ProbeMessage::Challenge { path: 0, mark: mark(&EDGE), cookie: Cookie(1) };
        assert_eq!(table.handle_message(now, address(1), cookie), Outcome::WrongWay);
    }

    #[test]
    fn challenges_are_few_however_many_probes_come() {
        let now = Instant::now();
        let mut table = table(now, 1);
        let sent = (0..10_000).filter(|i| {
            let at = now + Duration::from_micros(100 * i);
            let from = address(*i as u16);
            matches!(table.handle_message(at, from, probe(0)), Outcome::Challenge(_))
        });
        assert_eq!(sent.count(), 50, "in one second");
    }

    proptest! {
        /// Whatever comes in whatever order, an address is up only if its own cookie came from it.
        #[test]
        fn nothing_is_up_that_was_not_proven(
            steps in prop::collection::vec((0u64..3000, 0u16..3, 0u16..3, 0u8..2, 0..3), 0..200),
        ) {
            let mut now = Instant::now();
            let mut table = table(now, 2);
            let mut told = HashMap::new();
            for (wait, from, claimed, path, kind) in steps {
                now += ms(wait);
                let (from, claimed) = (address(from), address(claimed));
                let cookie = told.get(&(claimed, path)).copied().unwrap_or(Cookie(5));
                let message = match kind {
                    0 => probe(path),
                    1 => ProbeMessage::Proof { path, nonce: EDGE, cookie },
                    _ => {
                        for (_, path, address) in table.handle_timeout(now) {
                            let lost = PathState::Lost(address);
                            prop_assert_eq!(states(&table)[usize::from(path)], lost);
                        }
                        continue;
                    }
                };
                match table.handle_message(now, from, message) {
                    Outcome::Challenge(ProbeMessage::Challenge { cookie, .. }) => {
                        told.insert((from, path), cookie);
                    }
                    Outcome::Proven { address, .. } => {
                        prop_assert_eq!(told.get(&(address, path)), Some(&cookie));
                        prop_assert_eq!(address, from);
                    }
                    Outcome::Alive { .. } => {
                        let up = PathState::Up(from);
                        prop_assert_eq!(states(&table)[usize::from(path)], up);
                    }
                    _ => {}
                }
            }
        }
    }
}
