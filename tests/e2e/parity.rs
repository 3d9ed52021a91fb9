//! Parity brings back what nobody can ask for, and what there is no time to ask for; and who does
//! not know of it never sees any.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use crate::common::{
    SOON,
    compare::{Timestamps, assert_same_to_the_end, assert_same_with_holes},
    http::get_json,
    media,
    node::{Site, SiteSettings},
    wait_for,
};
use downpour_netem::LinkSettings;
use downpour_sys::udp;

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);

/// An edge in the list that cannot ask for anything.
#[test]
fn an_edge_without_a_way_back_loses_little_with_parity() {
    let [without, with] = at_once(["off", "{columns: 5, rows: 5}"], watch_one_way);
    println!("without parity {without:?}, with {with:?}");
    // 1190 packets: 36 are lost. Of 5×5, none of ten thousand is, by simulation.
    assert!(without.dropped >= 15 && with.dropped >= 15);
    assert!(without.parity == 0.0 && without.lost >= without.dropped as f64 * 0.7);
    assert!(with.parity >= 10.0 && with.lost <= 3.0);
}

/// An edge at an address of its own, whose requests take twice as long as it waits.
#[test]
fn an_edge_with_no_time_to_ask_loses_little_with_parity() {
    let [without, with] = at_once(["off", "{columns: 5, rows: 1}"], watch_in_a_hurry);
    println!("without parity {without:?}, with {with:?}");
    assert!(without.dropped >= 15 && with.dropped >= 15);
    assert!(without.parity == 0.0 && without.lost >= without.dropped as f64 * 0.5);
    // One in eight of those lost shares its row with another.
    assert!(with.parity >= with.dropped as f64 * 0.5, "{with:?}");
    assert!(with.lost <= without.lost * 0.5, "{with:?}");
}

/// An edge that loses nothing gets none; one that does gets some until it goes.
#[test]
fn auto_begins_when_an_edge_reports_loss() {
    let path = Some(LinkSettings::default());
    let mut site = SiteSettings { dynamic: true, rtp: path, ..SiteSettings::default() }
        .with_cloud("fec: auto")
        .start();
    site.until_targets(1);
    let viewer = site.watch(KEY);
    let _push = site.push_with(media::full(), KEY, &["--loop"]);
    viewer.wait_tags(10, SOON);
    let reported = || -> Option<(u64, bool)> {
        let (_, list) = get_json(site.cloud.node.http, "/api/v1/edges").unwrap();
        let stream = &list["edges"][0]["streams"][0];
        Some((stream["paths"][0]["received"].as_u64()?, stream["fec"].is_object()))
    };
    // Several reports' worth.
    let clean = wait_for("the edge reports", SOON, || reported().filter(|(came, _)| *came > 400));
    assert_eq!((clean.1, made(&site)), (false, 0.0));

    site.network.set_rtp(&LinkSettings::lossy(0.03));
    wait_for("parity is made", SOON, || (made(&site) > 20.0).then_some(()));
    wait_for("the edge's parity is told", SOON, || reported().filter(|(_, fec)| *fec));
    wait_for("the edge rebuilds packets", SOON, || (site.packets("parity") > 0.0).then_some(()));
    let metrics = site.cloud.node.metrics();
    assert!(metrics.sum("downpour_fec_bytes_total", &[]) > 20.0 * 100.0);
    wait_for("its overhead is told", SOON, || {
        let overhead = site.cloud.node.metrics().sum("downpour_fec_overhead_ratio", &[]);
        (overhead > 0.01).then_some(())
    });
    let log = site.cloud.node.log_text();
    assert!(log.contains("parity adapted"), "{log}");

    site.edges[0].node.terminate();
    let built = || site.cloud.node.metrics().sum("downpour_rtp_packets_total", &[]);
    let mut before = (made(&site), built());
    wait_for("no more parity is made, while the stream goes on", SOON, || {
        let now = (made(&site), built());
        let stopped = now.0 == before.0 && now.1 > before.1 + 100.0;
        if now.0 != before.0 {
            before = now;
        }
        stopped.then_some(())
    });
}

/// On the group's port there is what there was before: RTP and the announcement.
#[test]
fn who_does_not_know_of_parity_sees_none() {
    let cases = [("off", false), ("{columns: 5, rows: 5}", true), ("auto", true)];
    at_once(cases, |(fec, expected)| {
        let site = SiteSettings { multicast: true, ..SiteSettings::default() }
            .with_cloud(&format!("fec: {fec}"))
            .with_edge("disable_quic: true")
            .with_edge("latency_ms: 1000")
            .with_edge("pack_loss: 0.03")
            .start();
        let group = site.destinations[0];
        let [v0, beside] = [group, SocketAddr::new(group.ip(), group.port() + 2)].map(listen);
        let viewer = site.watch(KEY);
        let push = site.push(media::full_at(2), KEY);
        viewer.wait_tags(10, SOON);
        push.until_done(PUSH);
        let mut media = 0;
        for datagram in received(&v0) {
            match datagram[..] {
                [0x80, second, ..] if second & 0x7f == 100 => media += 1,
                [b'0', b'0', b'0', b'1', ..] if datagram.len() == 8 => {}
                _ => panic!("fec: {fec}: {datagram:?} on the port of RTP"),
            }
        }
        let parity = received(&beside);
        assert!(parity.iter().all(|parity| parity[1] & 0x7f == 109), "fec: {fec}");
        println!("fec: {fec}: {media} of media, {} of parity", parity.len());
        assert!(media > 1000, "fec: {fec}: {media}");
        assert_eq!(parity.len() > 100, expected, "fec: {fec}: {} of parity", parity.len());
        if expected {
            assert!(site.packets("parity") > 5.0, "fec: {fec}");
        } else {
            assert_eq!(parity.len(), 0);
        }
    });
}

/// The port of parity is somebody else's: all but parity works.
#[test]
fn a_port_that_is_taken_costs_parity_only() {
    let taken = crate::common::ports::free_for_rtp();
    let _somebody = UdpSocket::bind((Ipv4Addr::LOCALHOST, taken + 2)).unwrap();
    let site = SiteSettings::default()
        .with_cloud(&format!("client_addr_list: [{{addr: \"127.0.0.1:{taken}\", fec: auto}}]"))
        .with_edge(&format!("udp_addr: 127.0.0.1:{taken}"))
        .start();
    site.edges[0].until_connected();
    let viewer = site.watch(KEY);
    let push = site.push(media::short(), KEY);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
    let log = site.edges[0].node.log_text();
    assert!(log.contains("parity is off"), "{log}");
}

/// What became of one push.
#[derive(Debug)]
struct Outcome {
    /// Datagrams that the relays lost, parity included.
    dropped: u64,
    /// Packets that were never there.
    lost: f64,
    /// Packets made anew.
    parity: f64,
}

/// Does the same with each item, on a thread each.
fn at_once<T: Send, R: Send, const N: usize>(items: [T; N], act: impl Fn(T) -> R + Sync) -> [R; N] {
    thread::scope(|scope| {
        let act = &act;
        let threads = items.map(|item| scope.spawn(move || act(item)));
        threads.map(|thread| thread.join().expect("one of them failed"))
    })
}

fn watch_one_way(fec: &str) -> Outcome {
    let path = Some(LinkSettings::default());
    let site = SiteSettings { rtp: path, parity: true, seed: 3, ..SiteSettings::default() }
        .with_cloud(&format!("fec: {fec}"))
        .with_edge("disable_quic: true")
        .with_edge("latency_ms: 1000")
        .start();
    watch_under_loss(&site, &LinkSettings::lossy(0.03))
}

fn watch_in_a_hurry(fec: &str) -> Outcome {
    let path = LinkSettings { delay: Duration::from_millis(100), ..LinkSettings::default() };
    let settings = SiteSettings { dynamic: true, seed: 5, ..SiteSettings::default() };
    let site = SiteSettings { rtp: Some(path.clone()), quic: Some(path.clone()), ..settings }
        .with_cloud(&format!("fec: {fec}"))
        .with_edge("latency_ms: 100")
        .start();
    site.until_targets(1);
    watch_under_loss(&site, &LinkSettings { loss: 0.03, ..path })
}

/// Pushes the stream; once it has begun at the viewer, RTP is lost. What comes must be right.
#[track_caller]
fn watch_under_loss(site: &Site, path: &LinkSettings) -> Outcome {
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(1), KEY);
    viewer.wait_tags(10, SOON);
    site.network.set_rtp(path);
    push.until_done(PUSH);
    let pulled = viewer.until_end(PUSH);
    let holes = assert_same_with_holes(&media::full_at(1).tags, &pulled);
    let lost = site.packets("lost");
    assert!(lost == 0.0 || !holes.is_empty() || lost < 3.0, "{lost} lost, {holes:?}");
    let dropped = site.network.rtp_stats().dropped();
    Outcome { dropped, lost, parity: site.packets("parity") }
}

/// Hears what is sent to a group.
fn listen(group: SocketAddr) -> UdpSocket {
    let socket = udp::receiver(group, Some(Ipv4Addr::LOCALHOST), 4 << 20).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// All that has come.
fn received(socket: &UdpSocket) -> Vec<Vec<u8>> {
    let mut buffer = [0; 2000];
    std::iter::from_fn(|| socket.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())).collect()
}

/// Parity packets that the cloud has made.
fn made(site: &Site) -> f64 {
    site.cloud.node.metrics().sum("downpour_fec_packets_total", &[])
}
