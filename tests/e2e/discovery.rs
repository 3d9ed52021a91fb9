//! An edge that is told nothing about its cloud, and a cloud that is told to keep quiet.

use std::time::Duration;

use crate::common::{
    SOON,
    compare::{Timestamps, assert_same_to_the_end},
    media,
    node::SiteSettings,
    wait_for,
};

#[test]
fn the_announcement_says_where_the_cloud_is() {
    // The ports are wrong, so that only the announcement can have told the right ones.
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
fn an_edge_without_repair_takes_names_from_the_api() {
    let site = SiteSettings::default().with_edge("disable_quic: true").start();
    let viewer = site.watch("live/movie");
    let push = site.push(media::short(), "live/movie");
    push.until_done(Duration::from_secs(60));
    // Nothing tells it of the end but silence, or the API's list.
    let pulled = viewer.until_end(Duration::from_secs(60));
    assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
}

#[test]
fn a_cloud_in_debug_mode_lists_the_stream_and_sends_nothing() {
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
