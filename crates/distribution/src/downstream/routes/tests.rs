use proptest::prelude::*;

use super::{table::keep_indices, *};
use downpour_repair::fec::PARITY_PORT_OFFSET;

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

fn media_at(routes: &Routes, key: &str) -> Vec<SocketAddr> {
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
fn an_edge_gets_its_streams_at_its_validated_addresses() {
    let routes = routes();
    routes.set_patterns(edge(1), &patterns(&["live/*"]));
    assert_eq!(media_at(&routes, "live/a"), []);
    routes.set_address(edge(1), 0, addr(1));
    routes.set_address(edge(1), 1, addr(2));
    assert_eq!(media_at(&routes, "live/a"), [addr(1), addr(2)]);
    assert_eq!(media_at(&routes, "other/a"), []);
    assert_eq!(routes.shared.dynamic_targets.get(), 2);
    routes.set_patterns(edge(1), &patterns(&["other/a"]));
    assert_eq!(media_at(&routes, "live/a"), []);
    assert_eq!(media_at(&routes, "other/a"), [addr(1), addr(2)]);
    routes.remove_address(edge(1), 0);
    routes.set_address(edge(1), 2, addr(9));
    assert_eq!(media_at(&routes, "other/a"), [addr(2)]);
    routes.remove(&edge(1));
    assert_eq!(media_at(&routes, "other/a"), []);
    assert_eq!(routes.shared.dynamic_targets.get(), 0);
}

#[test]
fn each_address_is_listed_once() {
    let routes = routes();
    routes.set_fixed([addr(1), addr(2), addr(1)]);
    for n in 1..=3 {
        routes.set_patterns(edge(n), &patterns(&["*", "live/a"]));
        routes.set_address(edge(n), 0, addr(n.max(2)));
        routes.set_address(edge(n), 1, addr(n.max(2)));
    }
    assert_eq!(media_at(&routes, "live/a"), [addr(1), addr(2), addr(3)]);
    assert!(routes.is_fixed(addr(2)) && !routes.is_fixed(addr(3)));
    // Once the address is no longer fixed, the edge's subscription applies.
    routes.set_fixed([] as [SocketAddr; 0]);
    assert_eq!(media_at(&routes, "live/a"), [addr(2), addr(3)]);
    assert!(routes.fixed().is_empty());
}

#[test]
fn a_snapshot_is_shared_until_something_changes() {
    let routes = routes();
    routes.set_patterns(edge(1), &patterns(&["*"]));
    routes.set_address(edge(1), 0, addr(1));
    let mut route = routes.route("live/a".parse().unwrap(), SSRC);
    let now = Instant::now();
    let first = route.targets(now).clone();
    routes.set_patterns(edge(1), &patterns(&["*"]));
    let later = now + MIN_REBUILD_INTERVAL;
    assert!(Arc::ptr_eq(&first, route.targets(later)), "nothing changed");
    routes.remove(&edge(1));
    assert!(route.targets(later).media.is_empty());
    routes.set_fixed([addr(3)]);
    let soon = later + MIN_REBUILD_INTERVAL / 2;
    assert!(route.targets(soon).media.is_empty(), "the snapshot is not yet 10 ms old");
    assert_eq!(route.targets(later + MIN_REBUILD_INTERVAL).media.len(), 1);
}

#[test]
fn parity_goes_to_the_parity_port_of_fixed_addresses_and_to_the_rtp_address_of_edges() {
    let routes = routes();
    let fixed = |n, fec| FixedTarget { addr: addr(n), fec };
    routes.set_fixed([fixed(1, Fec::Fixed(matrix(10, 5))), fixed(2, Fec::Off)]);
    routes.set_edge_fec(Fec::Fixed(matrix(5, 1)));
    for n in 3..=5 {
        routes.set_patterns(edge(n), &patterns(&[if n == 5 { "other/*" } else { "live/*" }]));
        routes.set_takes_parity(edge(n), n != 4);
        routes.set_address(edge(n), 0, addr(n));
        routes.set_address(edge(n), 1, addr(n + 10));
    }
    let parity_port = SocketAddr::new(addr(1).ip(), addr(1).port() + PARITY_PORT_OFFSET);
    let expected = [(matrix(10, 5), vec![parity_port]), (matrix(5, 1), vec![addr(3), addr(13)])];
    assert_eq!(parity_at(&routes, "live/a"), expected);
    assert_eq!(routes.parity_of(&edge(3), None, SSRC), Some(matrix(5, 1)));
    assert_eq!(routes.parity_of(&edge(4), Some(addr(1)), SSRC), None, "accepts no parity");
    // An edge that validated a fixed address gets that address's parity there.
    routes.set_address(edge(3), 0, addr(1));
    let expected = [(matrix(10, 5), vec![addr(1)]), (matrix(5, 1), vec![addr(13)])];
    assert_eq!(parity_at(&routes, "live/a"), expected);
    assert_eq!(routes.parity_of(&edge(3), None, SSRC), Some(matrix(10, 5)));
    routes.remove(&edge(3));
    assert_eq!(parity_at(&routes, "live/a"), [(matrix(10, 5), vec![parity_port])]);
    routes.set_fixed([fixed(1, Fec::Off), fixed(2, Fec::Off)]);
    assert_eq!(parity_at(&routes, "live/a"), []);
}

#[test]
fn adaptive_parity_is_the_choice_and_blind_until_a_receiver_reports() {
    let routes = routes();
    let group = FixedTarget { addr: addr(1), fec: Fec::Auto };
    routes.set_fixed([group]);
    routes.set_edge_fec(Fec::Auto);
    assert!(routes.adapts_fixed());
    assert!(routes.adapted_by(&edge(3), Some(addr(1))).is_empty(), "unknown edge");
    routes.set_patterns(edge(3), &patterns(&["*"]));
    assert!(routes.adapted_by(&edge(3), Some(addr(1))).is_empty(), "accepts no parity");
    routes.set_takes_parity(edge(3), true);
    assert_eq!(routes.adapted_by(&edge(3), Some(addr(1))), [ParityTarget::Fixed(addr(1))]);
    assert!(routes.adapted_by(&edge(3), Some(addr(9))).is_empty(), "unknown group");
    routes.set_address(edge(3), 0, addr(3));
    assert_eq!(routes.adapted_by(&edge(3), None), [ParityTarget::Edge(edge(3))]);

    let used = || -> Vec<_> { parity_at(&routes, "live/a").iter().map(|(m, _)| *m).collect() };
    assert_eq!(used(), []);
    routes.set_blind(HashMap::from([(SSRC, matrix(10, 10)), (Ssrc(8), matrix(5, 1))]));
    assert_eq!(used(), [matrix(10, 10)], "only the group");
    let edge_too = (ParityTarget::Edge(edge(3)), SSRC, Choice::Use(Some(matrix(4, 4))));
    let group_off = (ParityTarget::Fixed(addr(1)), SSRC, Choice::Use(None));
    let nobody = (ParityTarget::Edge(edge(9)), SSRC, Choice::Use(Some(matrix(2, 2))));
    routes.set_choices(&[edge_too, group_off, nobody]);
    assert_eq!(parity_at(&routes, "live/a"), [(matrix(4, 4), vec![addr(3)])]);
    routes.set_choices(&[(ParityTarget::Fixed(addr(1)), SSRC, Choice::Unknown)]);
    assert_eq!(used(), [matrix(10, 10), matrix(4, 4)]);
    // Fixed addresses that stay keep their adapted parity.
    routes.set_choices(&[group_off]);
    routes.set_fixed([group, FixedTarget { addr: addr(2), fec: Fec::Off }]);
    assert_eq!(used(), [matrix(4, 4)]);
    routes.remove(&edge(3));
    assert_eq!(used(), []);
}

#[test]
fn a_fixed_address_without_a_parity_port_gets_no_parity() {
    let routes = routes();
    let last = SocketAddr::from(([10, 0, 0, 1], u16::MAX - 1));
    routes.set_fixed([FixedTarget { addr: last, fec: Fec::Fixed(matrix(5, 1)) }]);
    assert_eq!(parity_at(&routes, "live/a"), []);
}

#[test]
fn remaining_targets_keep_their_indices() {
    let routes = routes();
    routes.set_fixed([addr(250)]);
    let mut route = routes.route("live/a".parse().unwrap(), SSRC);
    let (mut now, mut before) = (Instant::now(), Vec::new());
    let mut next = |route: &mut Route| {
        now += MIN_REBUILD_INTERVAL;
        addrs(&route.targets(now).media)
    };
    let add_edge = |n| {
        routes.set_patterns(edge(n), &patterns(&["*"]));
        routes.set_address(edge(n), 0, addr(n));
    };
    // Each new edge sorts before all others.
    for n in (100..200).rev() {
        add_edge(n);
        let list = next(&mut route);
        assert!(list.starts_with(&before) && list.len() == before.len().max(1) + 1);
        before = list;
    }
    // A removed target is replaced by a new one, or else by the last one.
    routes.remove(&edge(150));
    add_edge(7);
    let list = next(&mut route);
    let moved = list.iter().zip(&before).filter(|(now, before)| now != before);
    assert_eq!(moved.collect::<Vec<_>>(), [(&addr(7), &addr(150))]);
    routes.remove(&edge(150));
    routes.remove(&edge(140));
    let shorter = next(&mut route);
    let moved: Vec<_> = shorter.iter().zip(&list).filter(|(now, before)| now != before).collect();
    assert_eq!((moved, shorter.len()), (vec![(&addr(100), &addr(140))], list.len() - 1));
}

proptest! {
    #[test]
    fn indices_are_kept_while_targets_change(
        lists in prop::collection::vec(prop::collection::btree_set(0..60_u8, 0..50), 1..9),
    ) {
        let mut before: Vec<Target> = Vec::new();
        for list in lists {
            let targets: Vec<Target> = list.iter().map(|n| addr(*n).into()).collect();
            let after = keep_indices(&before, targets.clone());
            let mut sorted = after.clone();
            sorted.sort_unstable_by_key(|target| target.addr);
            prop_assert_eq!(&sorted, &targets);
            let left = before.iter().filter(|target| !targets.contains(target)).count();
            let stayed = before.len() - left;
            let moved = before.iter().enumerate().filter(|(place, target)| {
                targets.contains(target) && after.get(*place) != Some(target)
            });
            // At most as many targets move as the list becomes shorter.
            let shorter = before.len().saturating_sub(after.len());
            prop_assert!(moved.count() <= shorter.min(stayed));
            before = after;
        }
    }

    /// The set matches the same streams as its patterns one by one.
    #[test]
    fn wanted_matches_the_same_streams_as_the_patterns(
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
