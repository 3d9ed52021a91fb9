//! An edge without the address of its cloud, and a cloud in debug mode.

use std::time::Duration;

use crate::common::{
    SOON,
    compare::{Timestamps, assert_same_to_the_end},
    media,
    node::SiteSettings,
    wait_for,
};

#[test]
fn edge_finds_the_cloud_by_its_announcement() {
    // The configured ports are wrong, so the edge must use those of the announcement.
    let site = SiteSettings::default()
        .with_edge("cloud_host: \"\"")
        .with_edge("quic_addr: :9")
        .with_edge("api_addr: :9")
        .start();
    site.edges[0].until_connected();
    let viewer = site.watch("live/movie");
    let push = site.push(media::short(), "live/movie");
    let pulled = viewer.until_end(Duration::from_secs(60));
    assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
    push.until_done(SOON);
}

#[test]
fn edge_without_repair_reads_names_from_the_api() {
    let site = SiteSettings::default().with_edge("disable_quic: true").start();
    let viewer = site.watch("live/movie");
    let push = site.push(media::short(), "live/movie");
    push.until_done(Duration::from_secs(60));
    // The edge detects the end by silence or by the API's list.
    let pulled = viewer.until_end(Duration::from_secs(60));
    assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
}

#[test]
fn cloud_in_debug_mode_lists_streams_without_sending() {
    let settings = SiteSettings::default().with_cloud("debug: true");
    let site = settings.with_edge("disable_quic: true").start();
    let push = site.push(media::short(), "live/movie");
    wait_for("the stream is listed", SOON, || {
        let publications = site.cloud.publications();
        (publications.len() == 1 && publications[0].0 == "live/movie").then_some(())
    });
    push.until_done(Duration::from_secs(60));
    let sent = site.cloud.node.metrics();
    assert_eq!(sent.sum("downpour_fanout_datagrams_total", &[]), 0.0);
    let received = site.edges[0].node.metrics();
    assert_eq!(received.sum("downpour_edge_packets_total", &[("fate", "received")]), 0.0);
}
