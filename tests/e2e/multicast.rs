//! Two edges of one multicast group, each with its own losses.

use std::time::Duration;

use crate::common::{
    compare::{Timestamps, assert_same_to_the_end},
    media,
    node::SiteSettings,
};

#[test]
fn edges_of_a_group_repair_their_own_losses() {
    let settings = SiteSettings { edges: 2, multicast: true, ..SiteSettings::default() };
    let site = settings.with_edge("pack_loss: 0.05").with_edge("latency_ms: 1000").start();
    for edge in &site.edges {
        edge.until_connected();
    }
    let viewers: Vec<_> = site.edges.iter().map(|edge| edge.watch("live/movie")).collect();
    let push = site.push(media::full(), "live/movie");
    for viewer in viewers {
        let pulled = viewer.until_end(Duration::from_secs(60));
        assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
    }
    push.until_done(Duration::from_secs(30));
    for edge in &site.edges {
        let metrics = edge.node.metrics();
        let packets = |fate| metrics.sum("downpour_edge_packets_total", &[("fate", fate)]);
        assert!(metrics.sum("downpour_edge_pack_loss_total", &[]) > 20.0, "no loss at an edge");
        assert!(packets("repaired_1") > 10.0, "no repair at an edge");
        assert_eq!(packets("lost"), 0.0, "packets given up");
    }
}
