//! The cloud's side of path validation: which addresses edges have proven to be their own.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use ring::hmac;

use super::{
    control::Nonce,
    probe::{Cookie, MAX_PATHS, ProbeMessage, nonce_prefix},
};

/// Path states of all connected edges.
///
/// States of a path, and the events between them:
///
/// | from | event | to |
/// |---|---|---|
/// | `Waiting`, `Lost`, `Up(other address)` | probe | unchanged; a challenge is sent |
/// | `Waiting`, `Lost`, `Up(other address)` | proof with a valid cookie | `Up(source address)` |
/// | `Up(address)` | any message from `address` | `Up(address)`, kept alive |
/// | `Up(address)` | silence for [`DEAD_AFTER`] | `Lost(address)` |
///
/// Invariant: a path is `Up` only at an address that returned a cookie sent to it. A cookie is an
/// HMAC over edge, path, address and time. Unproven addresses therefore take no memory, and probes
/// with forged sources displace no proven address.
pub struct PathValidator {
    secret: hmac::Key,
    /// Start of the first cookie period.
    start: Instant,
    edges: HashMap<Nonce, [Option<Path>; MAX_PATHS as usize]>,
}

/// Result of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Send this challenge back to the source of the datagram.
    Challenge(ProbeMessage),
    /// The edge proved an address; RTP for this path goes there from now on.
    Proven {
        /// The edge.
        nonce: Nonce,
        /// Index of the path.
        path: u8,
        /// Source of the datagram.
        address: SocketAddr,
    },
    /// The message came from the proven address and keeps it alive.
    Alive {
        /// The edge.
        nonce: Nonce,
        /// Index of the path.
        path: u8,
    },
    /// Ignored: a challenge was sent for this path within the last 20 ms.
    TooSoon,
    /// No edge has this nonce, or the edge did not request this path.
    UnknownNonce,
    /// A proof whose cookie is forged, expired, or was issued for another address.
    BadCookie,
    /// A challenge, which only the cloud may send.
    WrongDirection,
}

/// State of a path; see [`PathValidator`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PathState {
    /// No address has been proven.
    Waiting,
    /// RTP goes to this address.
    Up(SocketAddr),
    /// The address was proven, then silent for [`DEAD_AFTER`]; RTP stopped.
    Lost(SocketAddr),
}

#[derive(Debug, Clone, Copy)]
struct Path {
    state: PathState,
    last_heard: Instant,
    challenged_at: Option<Instant>,
}

impl PathValidator {
    /// Creates a validator without edges. `secret` authenticates cookies and must be random.
    pub fn new(now: Instant, secret: [u8; 32]) -> Self {
        Self {
            secret: hmac::Key::new(hmac::HMAC_SHA256, &secret),
            start: now,
            edges: HashMap::new(),
        }
    }

    /// Adds an edge that will prove `paths` addresses, at most [`MAX_PATHS`].
    pub fn insert(&mut self, now: Instant, nonce: Nonce, paths: u8) {
        let path = Path { state: PathState::Waiting, last_heard: now, challenged_at: None };
        let paths = std::array::from_fn(|i| (i < usize::from(paths)).then_some(path));
        self.edges.insert(nonce, paths);
    }

    /// Removes an edge.
    pub fn remove(&mut self, nonce: &Nonce) {
        self.edges.remove(nonce);
    }

    /// Handles a message received from the address `from`.
    pub fn handle_message(
        &mut self,
        now: Instant,
        from: SocketAddr,
        message: ProbeMessage,
    ) -> Outcome {
        let (path, nonce, cookie) = match message {
            ProbeMessage::Probe { path, nonce } => (path, nonce, None),
            ProbeMessage::Proof { path, nonce, cookie } => (path, nonce, Some(cookie)),
            ProbeMessage::Challenge { .. } => return Outcome::WrongDirection,
        };
        let period = now.saturating_duration_since(self.start).as_secs() / COOKIE_PERIOD.as_secs();
        let cookie_of = |period| make_cookie(&self.secret, &nonce, path, from, period);
        let entry = self.edges.get_mut(&nonce).and_then(|paths| paths.get_mut(usize::from(path)));
        let Some(Some(current)) = entry else { return Outcome::UnknownNonce };
        let is_proven = current.state == PathState::Up(from);
        match cookie {
            _ if is_proven => {
                current.last_heard = now;
                Outcome::Alive { nonce, path }
            }
            Some(cookie) => {
                // Cookies of the previous period are valid too.
                if cookie != cookie_of(period)
                    && Some(cookie) != period.checked_sub(1).map(cookie_of)
                {
                    return Outcome::BadCookie;
                }
                current.state = PathState::Up(from);
                current.last_heard = now;
                Outcome::Proven { nonce, path, address: from }
            }
            None => {
                // Limits how many challenges an edge can reflect by probes with forged sources.
                let due = |at: Instant| now.saturating_duration_since(at) >= CHALLENGE_INTERVAL;
                if !current.challenged_at.is_none_or(due) {
                    return Outcome::TooSoon;
                }
                current.challenged_at = Some(now);
                Outcome::Challenge(ProbeMessage::Challenge {
                    path,
                    nonce_prefix: nonce_prefix(&nonce),
                    cookie: cookie_of(period),
                })
            }
        }
    }

    /// Moves the paths that were silent for [`DEAD_AFTER`] to [`PathState::Lost`] and returns them:
    /// edge, path index, address.
    pub fn handle_timeout(&mut self, now: Instant) -> Vec<(Nonce, u8, SocketAddr)> {
        let mut dead = Vec::new();
        for (nonce, paths) in &mut self.edges {
            for (i, path) in (0..).zip(paths) {
                if let Some(path) = path
                    && let PathState::Up(address) = path.state
                    && now.saturating_duration_since(path.last_heard) >= DEAD_AFTER
                {
                    path.state = PathState::Lost(address);
                    dead.push((*nonce, i, address));
                }
            }
        }
        dead
    }

    /// Returns the states of the paths that an edge requested, by index.
    pub fn states(&self, nonce: &Nonce) -> impl Iterator<Item = PathState> {
        self.edges.get(nonce).into_iter().flatten().flatten().map(|path| path.state)
    }
}

fn make_cookie(
    secret: &hmac::Key,
    nonce: &Nonce,
    path: u8,
    address: SocketAddr,
    period: u64,
) -> Cookie {
    let mut context = hmac::Context::with_key(secret);
    context.update(&nonce.0);
    context.update(&[path]);
    match address.ip() {
        IpAddr::V4(ip) => context.update(&ip.to_ipv6_mapped().octets()),
        IpAddr::V6(ip) => context.update(&ip.octets()),
    }
    context.update(&address.port().to_be_bytes());
    context.update(&period.to_be_bytes());
    let tag = context.sign();
    let head = tag.as_ref().first_chunk().copied().unwrap_or_default();
    Cookie(u64::from_be_bytes(head))
}

/// A path is lost after this silence: the edge is gone, or four of its keep-alives were lost.
pub const DEAD_AFTER: Duration = Duration::from_secs(20);
/// Length of a cookie period. A cookie is valid for the rest of its period and the next one.
const COOKIE_PERIOD: Duration = Duration::from_secs(10);
/// Shortest interval between challenges on one path. An honest edge probes at most every 50 ms.
const CHALLENGE_INTERVAL: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EDGE: Nonce = Nonce([7; 16]);

    fn table(now: Instant, paths: u8) -> PathValidator {
        let mut table = PathValidator::new(now, [1; 32]);
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

    /// Probes from an address and returns the proof for the challenge.
    #[track_caller]
    fn challenge(
        table: &mut PathValidator,
        now: Instant,
        from: SocketAddr,
        path: u8,
    ) -> ProbeMessage {
        match table.handle_message(now, from, probe(path)) {
            Outcome::Challenge(ProbeMessage::Challenge {
                path: named,
                nonce_prefix: prefix,
                cookie,
            }) => {
                assert_eq!((named, prefix), (path, nonce_prefix(&EDGE)));
                ProbeMessage::Proof { path, nonce: EDGE, cookie }
            }
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn prove(table: &mut PathValidator, now: Instant, from: SocketAddr, path: u8) {
        let proof = challenge(table, now, from, path);
        let proven = Outcome::Proven { nonce: EDGE, path, address: from };
        assert_eq!(table.handle_message(now, from, proof), proven);
    }

    fn states(table: &PathValidator) -> Vec<PathState> {
        table.states(&EDGE).collect()
    }

    #[test]
    fn an_address_is_up_once_it_is_proven() {
        let now = Instant::now();
        let mut table = table(now, 1);
        assert_eq!(states(&table), [PathState::Waiting]);
        prove(&mut table, now, address(1), 0);
        assert_eq!(states(&table), [PathState::Up(address(1))]);
        let alive = Outcome::Alive { nonce: EDGE, path: 0 };
        assert_eq!(table.handle_message(now + ms(1), address(1), probe(0)), alive);
        // The edge disconnects, and its nonce becomes invalid.
        table.remove(&EDGE);
        assert_eq!(table.handle_message(now, address(1), probe(0)), Outcome::UnknownNonce);
    }

    #[test]
    fn a_subscriber_cannot_aim_a_stream_at_another_address() {
        let now = Instant::now();
        let mut table = table(now, 1);
        let (own, victim) = (address(1), address(2));
        // The challenge goes to the victim, where the attacker cannot read it.
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
    fn a_cookie_is_valid_for_one_edge_one_path_and_a_short_time() {
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
        let late = now + 2 * COOKIE_PERIOD;
        assert_eq!(table.handle_message(late, address(1), proof), Outcome::BadCookie);
        // A slow path has at least one period to answer.
        let proof = challenge(&mut table, now + COOKIE_PERIOD - ms(1), address(1), 0);
        let outcome = table.handle_message(now + 2 * COOKIE_PERIOD - ms(1), address(1), proof);
        assert!(matches!(outcome, Outcome::Proven { .. }), "{outcome:?}");
    }

    #[test]
    fn a_new_address_behind_a_nat_takes_over_once_it_is_proven() {
        let now = Instant::now();
        let mut table = table(now, 1);
        prove(&mut table, now, address(1), 0);
        let later = now + Duration::from_secs(5);
        let proof = challenge(&mut table, later, address(2), 0);
        assert_eq!(
            states(&table),
            [PathState::Up(address(1))],
            "unchanged until the new address is proven"
        );
        table.handle_message(later, address(2), proof);
        assert_eq!(states(&table), [PathState::Up(address(2))]);
        // A late datagram from the old address is challenged like any other.
        assert!(matches!(
            table.handle_message(later + ms(20), address(1), probe(0)),
            Outcome::Challenge(_)
        ));
        assert_eq!(states(&table), [PathState::Up(address(2))]);
    }

    #[test]
    fn a_silent_path_is_lost_until_it_is_proven_again() {
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
        // A new proof is required: the address may have a new owner.
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
    fn only_requested_paths_can_be_proven() {
        let now = Instant::now();
        for (paths, path) in [(0, 0), (1, 1)] {
            let mut table = table(now, paths);
            assert_eq!(table.handle_message(now, address(1), probe(path)), Outcome::UnknownNonce);
        }
        let mut table = table(now, 200);
        assert_eq!(states(&table).len(), 2);
        let cookie = ProbeMessage::Challenge {
            path: 0,
            nonce_prefix: nonce_prefix(&EDGE),
            cookie: Cookie(1),
        };
        assert_eq!(table.handle_message(now, address(1), cookie), Outcome::WrongDirection);
    }

    #[test]
    fn challenges_are_rate_limited() {
        let now = Instant::now();
        let mut table = table(now, 1);
        let sent = (0..10_000).filter(|i| {
            let at = now + Duration::from_micros(100 * i);
            let from = address(*i as u16);
            matches!(table.handle_message(at, from, probe(0)), Outcome::Challenge(_))
        });
        assert_eq!(sent.count(), 50, "challenges in one second");
    }

    proptest! {
        /// An address is up only if it returned its own cookie, for any sequence of messages.
        #[test]
        fn no_address_is_up_without_proof(
            steps in prop::collection::vec((0u64..3000, 0u16..3, 0u16..3, 0u8..2, 0..3), 0..200),
        ) {
            let mut now = Instant::now();
            let mut table = table(now, 2);
            let mut cookies = HashMap::new();
            for (wait, from, claimed, path, kind) in steps {
                now += ms(wait);
                let (from, claimed) = (address(from), address(claimed));
                let cookie = cookies.get(&(claimed, path)).copied().unwrap_or(Cookie(5));
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
                        cookies.insert((from, path), cookie);
                    }
                    Outcome::Proven { address, .. } => {
                        prop_assert_eq!(cookies.get(&(address, path)), Some(&cookie));
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
