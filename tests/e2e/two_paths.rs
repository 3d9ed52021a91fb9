//! Two paths, one stream: what one of them loses the other brings.

use std::time::Duration;

use crate::common::{
    SOON,
    compare::{Timestamps, assert_same_to_the_end, assert_same_with_holes},
    media,
    node::{Site, SiteSettings},
    wait_for,
};
use downpour_netem::{Blackout, LinkSettings};

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);

/// Nothing can be asked for: of ten packets in a hundred that each path loses, one is lost on both.
#[test]
fn loss_on_each_of_two_paths_is_lost_on_both_seldom() {
    let path = || Some(near(LinkSettings::lossy(0.1)));
    let site = two_paths(path(), path());
    let pulled = watch_without_repair(&site);
    let holes = assert_same_with_holes(&media::full().tags, &pulled);
    let sent = site.network.rtp_stats();
    let share = sent.dropped() as f64 / sent.sent as f64;
    assert!(sent.sent > 2000 && (0.07..0.13).contains(&share), "{sent:?}");
    let lost = site.packets("lost");
    println!("{sent:?}: {lost} lost on both, {} holes", holes.len());
    // 1190 packets: 12 are to be expected, and 119 on one path. The odds of more than 30 are 10⁻⁵.
    assert!((1.0..=30.0).contains(&lost), "{lost} packets lost on both paths");
}

/// One path is cut for half a second, the other brings everything.
#[test]
fn a_cut_of_one_path_loses_nothing() {
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
    assert!(site.packets("duplicate") > 500.0, "the other packets came twice");
}

/// An edge in no list proves both of its addresses, and each gets every packet.
#[test]
fn an_edge_proves_two_addresses_through_two_nats() {
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
    let viewer = site.watch(KEY);
    let push = site.push(media::short(), KEY);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
    assert!(site.packets("duplicate") > 300.0, "{} came twice", site.packets("duplicate"));
    assert_eq!(site.packets("lost"), 0.0);
}

/// One edge in the cloud's list with two addresses.
fn two_paths(rtp: Option<LinkSettings>, second: Option<LinkSettings>) -> Site {
    let quic = Some(LinkSettings::default());
    let site = SiteSettings { rtp, second, quic, seed: 41, ..SiteSettings::default() }.start();
    site.edges[0].until_connected();
    site
}

/// Pushes the stream; once the edge has been told of it, QUIC is cut off for good. Gives what a
/// viewer saw by the time that all was sent and nothing more can come.
#[track_caller]
fn watch_without_repair(site: &Site) -> Vec<downpour_media::flv::Tag> {
    let viewer = site.watch(KEY);
    let push = site.push(media::full(), KEY);
    viewer.wait_tags(5, SOON);
    site.network.cut_quic();
    push.until_done(PUSH);
    // Nobody can tell the edge that the stream is over: it is when it has been silent for long.
    viewer.until_end(PUSH)
}

/// A short way.
fn near(path: LinkSettings) -> LinkSettings {
    LinkSettings { delay: Duration::from_millis(10), ..path }
}
