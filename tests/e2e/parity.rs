//! Parity recovers packets that an edge cannot request, or not in time. Receivers without parity
//! support are not affected.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use crate::common::{
    SOON,
    compare::assert_same_with_gaps,
    http::get_json,
    media,
    node::{Site, SiteSettings},
    wait_for,
};
use downpour_netem::LinkSettings;
use downpour_sys::udp;

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);

/// A listed edge without a return path.
#[test]
fn parity_recovers_losses_without_a_return_path() {
    let [without, with] = in_parallel(["off", "{columns: 5, rows: 5}"], watch_one_way);
    println!("without parity {without:?}, with {with:?}");
    // Of 1190 packets, 36 are lost. By simulation, 5×5 loses none of ten thousand.
    assert!(without.dropped >= 15 && with.dropped >= 15);
    assert!(without.parity == 0.0 && without.lost >= without.dropped as f64 * 0.7);
    assert!(with.parity >= 10.0 && with.lost <= 3.0);
}

/// A dynamic edge whose round trip is twice its latency.
#[test]
fn parity_recovers_losses_with_a_low_latency() {
    let [without, with] = in_parallel(["off", "{columns: 5, rows: 1}"], watch_with_low_latency);
    println!("without parity {without:?}, with {with:?}");
    assert!(without.dropped >= 15 && with.dropped >= 15);
    assert!(without.parity == 0.0 && without.lost >= without.dropped as f64 * 0.5);
    // One in eight lost packets shares its row with another.
    assert!(with.parity >= with.dropped as f64 * 0.5, "{with:?}");
    assert!(with.lost <= without.lost * 0.5, "{with:?}");
}

/// The cloud makes no parity for an edge without loss. It starts with the loss, and ends when the edge
/// leaves.
#[test]
fn auto_parity_starts_with_reported_loss() {
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
    // Several reports.
    let clean =
        wait_for("the edge reports", SOON, || reported().filter(|(packets, _)| *packets > 400));
    assert_eq!((clean.1, made(&site)), (false, 0.0));

    site.network.set_rtp(&LinkSettings::lossy(0.03));
    wait_for("parity is made", SOON, || (made(&site) > 20.0).then_some(()));
    wait_for("the API shows the edge's parity", SOON, || reported().filter(|(_, fec)| *fec));
    wait_for("the edge rebuilds packets", SOON, || (site.packets("parity") > 0.0).then_some(()));
    let metrics = site.cloud.node.metrics();
    assert!(metrics.sum("downpour_fec_bytes_total", &[]) > 20.0 * 100.0);
    wait_for("the overhead is exported", SOON, || {
        let overhead = site.cloud.node.metrics().sum("downpour_fec_overhead_ratio", &[]);
        (overhead > 0.01).then_some(())
    });
    let log = site.cloud.node.log_text();
    assert!(log.contains("parity adapted"), "{log}");

    site.edges[0].node.terminate();
    let mut stopped = site.has_stopped(100.0, || made(&site));
    wait_for("no more parity of the live stream", SOON, || stopped().then_some(()));
}

/// The port of a group gets only RTP and announcements.
#[test]
fn receivers_without_parity_see_only_media() {
    let cases = [("off", false), ("{columns: 5, rows: 5}", true), ("auto", true)];
    in_parallel(cases, |(fec, expected)| {
        let site = SiteSettings { multicast: true, ..SiteSettings::default() }
            .with_cloud(&format!("fec: {fec}"))
            .with_edge("disable_quic: true")
            .with_edge("latency_ms: 1000")
            .with_edge("pack_loss: 0.03")
            .start();
        let group = site.destinations[0];
        let [v0, parity] = [group, SocketAddr::new(group.ip(), group.port() + 2)].map(listen);
        let viewer = site.watch(KEY);
        let push = site.push(media::full_at(2), KEY);
        viewer.wait_tags(10, SOON);
        push.until_done(PUSH);
        let mut media = 0;
        for datagram in received(&v0) {
            match datagram[..] {
                [0x80, second, ..] if second & 0x7f == 100 => media += 1,
                [b'0', b'0', b'0', b'1', ..] if datagram.len() == 8 => {}
                _ => panic!("fec: {fec}: {datagram:?} on the RTP port"),
            }
        }
        let parity = received(&parity);
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

/// The parity port is in use: the edge works without parity.
#[test]
fn edge_runs_without_parity_if_its_port_is_taken() {
    let taken = crate::common::ports::free_for_rtp();
    let _other = UdpSocket::bind((Ipv4Addr::LOCALHOST, taken + 2)).unwrap();
    let site = SiteSettings::default()
        .with_cloud(&format!("client_addr_list: [{{addr: \"127.0.0.1:{taken}\", fec: auto}}]"))
        .with_edge(&format!("udp_addr: 127.0.0.1:{taken}"))
        .start();
    site.edges[0].until_connected();
    site.assert_plays(media::short(), KEY);
    let log = site.edges[0].node.log_text();
    assert!(log.contains("parity is off"), "{log}");
}

/// The result of one push.
#[derive(Debug)]
struct Outcome {
    /// Datagrams that the relays dropped, parity included.
    dropped: u64,
    /// Packets that the edge lost.
    lost: f64,
    /// Packets recovered by parity.
    parity: f64,
}

/// Calls `act` with each item, each on a thread.
fn in_parallel<T: Send, R: Send, const N: usize>(
    items: [T; N],
    act: impl Fn(T) -> R + Sync,
) -> [R; N] {
    thread::scope(|scope| {
        let act = &act;
        let threads = items.map(|item| scope.spawn(move || act(item)));
        threads.map(|thread| thread.join().expect("a thread panicked"))
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

fn watch_with_low_latency(fec: &str) -> Outcome {
    let path = LinkSettings { delay: Duration::from_millis(100), ..LinkSettings::default() };
    let settings = SiteSettings { dynamic: true, seed: 5, ..SiteSettings::default() };
    let site = SiteSettings { rtp: Some(path.clone()), quic: Some(path.clone()), ..settings }
        .with_cloud(&format!("fec: {fec}"))
        .with_edge("latency_ms: 100")
        .start();
    site.until_targets(1);
    watch_under_loss(&site, &LinkSettings { loss: 0.03, ..path })
}

/// Pushes the stream. RTP loss starts after the viewer has received the first tags. Asserts that all
/// received tags are correct.
#[track_caller]
fn watch_under_loss(site: &Site, path: &LinkSettings) -> Outcome {
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(1), KEY);
    viewer.wait_tags(10, SOON);
    site.network.set_rtp(path);
    push.until_done(PUSH);
    let pulled = viewer.until_end(PUSH);
    let gaps = assert_same_with_gaps(&media::full_at(1).tags, &pulled);
    let lost = site.packets("lost");
    assert!(lost == 0.0 || !gaps.is_empty() || lost < 3.0, "{lost} lost, {gaps:?}");
    let dropped = site.network.rtp_stats().dropped();
    Outcome { dropped, lost, parity: site.packets("parity") }
}

/// Returns a socket that receives from a group.
fn listen(group: SocketAddr) -> UdpSocket {
    let socket = udp::receiver(group, Some(Ipv4Addr::LOCALHOST), 4 << 20).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

/// Returns the received datagrams.
fn received(socket: &UdpSocket) -> Vec<Vec<u8>> {
    let mut buffer = [0; 2000];
    std::iter::from_fn(|| socket.recv(&mut buffer).ok().map(|len| buffer[..len].to_vec())).collect()
}

/// Number of parity packets of the cloud.
fn made(site: &Site) -> f64 {
    site.cloud.node.metrics().sum("downpour_fec_packets_total", &[])
}
