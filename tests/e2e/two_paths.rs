//! A stream over two paths: a packet that one of them loses arrives over the other.

use std::time::Duration;

use crate::common::{
    SOON,
    compare::{Timestamps, assert_same_to_the_end, assert_same_with_gaps},
    media,
    node::{Site, SiteSettings},
    wait_for,
};
use downpour_netem::{Blackout, LinkSettings};

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);

/// Without repair. Each path loses 10 %, so 1 % is lost on both.
#[test]
fn second_path_replaces_lost_packets() {
    let path = || Some(near(LinkSettings::lossy(0.1)));
    let site = two_paths(path(), path());
    let pulled = watch_without_repair(&site);
    let gaps = assert_same_with_gaps(&media::full().tags, &pulled);
    let sent = site.network.rtp_stats();
    let share = sent.dropped() as f64 / sent.sent as f64;
    assert!(sent.sent > 2000 && (0.07..0.13).contains(&share), "{sent:?}");
    let lost = site.packets("lost");
    println!("{sent:?}: {lost} lost on both, {} gaps", gaps.len());
    // Of 1190 packets, 12 losses are expected, and 119 with one path. More than 30 have a probability
    // of 10⁻⁵.
    assert!((1.0..=30.0).contains(&lost), "{lost} packets lost on both paths");
}

/// One path is cut for half a second. The other one delivers all packets.
#[test]
fn second_path_covers_a_cut_of_the_first() {
    let blackout = Blackout {
        start: Duration::from_millis(750),
        length: Duration::from_millis(500),
        period: None,
    };
    let cut = LinkSettings { blackouts: vec![blackout], ..LinkSettings::default() };
    let site = two_paths(Some(near(cut)), Some(near(LinkSettings::default())));
    let pulled = watch_without_repair(&site);
    assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
    assert_eq!(site.packets("lost"), 0.0);
    let dropped = site.network.rtp_stats().dropped();
    assert!(dropped > 100, "the relay dropped {dropped}");
    assert!(site.packets("duplicate") > 500.0, "the other packets arrived twice");
}

/// A dynamic edge validates both of its addresses, and receives every packet at each.
#[test]
fn edge_validates_two_addresses_behind_two_nats() {
    let path = || Some(near(LinkSettings::lossy(0.05)));
    let settings =
        SiteSettings { dynamic: true, rtp: path(), second: path(), ..SiteSettings::default() };
    let site = settings.with_edge("latency_ms: 1000").start();
    wait_for("both paths are up", SOON, || {
        let up = |path| {
            let metrics = site.edges[0].node.metrics();
            metrics.sum("downpour_edge_path_up", &[("path", path)])
        };
        let targets = site.cloud.node.metrics().sum("downpour_fanout_dynamic_targets", &[]);
        (up("0") == 1.0 && up("1") == 1.0 && targets == 2.0).then_some(())
    });
    site.assert_plays(media::short(), KEY);
    assert!(site.packets("duplicate") > 300.0, "{} duplicates", site.packets("duplicate"));
    assert_eq!(site.packets("lost"), 0.0);
}

/// One edge with two addresses in the cloud's list.
fn two_paths(rtp: Option<LinkSettings>, second: Option<LinkSettings>) -> Site {
    let quic = Some(LinkSettings::default());
    let site = SiteSettings { rtp, second, quic, seed: 41, ..SiteSettings::default() }.start();
    site.edges[0].until_connected();
    site
}

/// Pushes the stream, and cuts QUIC after the stream was announced to the edge. Returns the tags that a
/// viewer received.
#[track_caller]
fn watch_without_repair(site: &Site) -> Vec<downpour_media::flv::Tag> {
    let viewer = site.watch(KEY);
    let push = site.push(media::full(), KEY);
    viewer.wait_tags(5, SOON);
    site.network.cut_quic();
    push.until_done(PUSH);
    // Without QUIC, the edge ends the stream by its silence timeout.
    viewer.until_end(PUSH)
}

/// `path` with a delay of 10 ms.
fn near(path: LinkSettings) -> LinkSettings {
    LinkSettings { delay: Duration::from_millis(10), ..path }
}
