//! Loss, reordering, duplicates and cuts on the RTP and repair paths: viewers receive every tag.
//!
//! Each test pushes the stream, whose sequence numbers wrap from 65535 to 0 half way, over a seeded
//! relay on the RTP path and another one on the QUIC path, in both directions. Unless a test depends on
//! real time, it is sent in 2.5 s.

use std::time::Duration;

use crate::common::{
    compare::{
        Timestamps, assert_same_to_the_end, assert_same_while_it_lasted, assert_same_with_gaps,
        media as without_script,
    },
    http::Metrics,
    media,
    node::{Site, SiteSettings},
};
use downpour_media::flv::Tag;
use downpour_netem::{Blackout, Bursts, LinkSettings};

const PUSH: Duration = Duration::from_secs(60);

#[test]
fn viewer_receives_every_tag_at_five_percent_loss() {
    let outcome = push_over(SiteSettings::over(near(LinkSettings::lossy(0.05)), 5), 1000);
    outcome.assert_repaired(20);
}

#[test]
fn viewer_receives_every_tag_at_twenty_percent_loss() {
    let outcome = push_over(SiteSettings::over(near(LinkSettings::lossy(0.2)), 20), 2000);
    outcome.assert_repaired(100);
    assert!(outcome.quic_lost > 20, "QUIC lost only {}", outcome.quic_lost);
}

#[test]
fn viewer_receives_every_tag_with_burst_loss() {
    let bursts = Bursts::covering(0.08, Duration::from_millis(40));
    let path = near(LinkSettings { bursts: Some(bursts), ..LinkSettings::default() });
    push_over(SiteSettings::over(path, 3), 2000).assert_repaired(10);
}

/// The edge waits for reordered packets: none is lost, and few are requested.
#[test]
fn viewer_receives_every_tag_with_reordering() {
    let path = near(LinkSettings {
        reorder: 0.1,
        reorder_delay: Duration::from_millis(3),
        ..LinkSettings::default()
    });
    let outcome = push_over(SiteSettings::over(path, 10), 1000);
    assert!(outcome.rtp.reordered > 50, "{:?}", outcome.rtp);
    assert!(outcome.edge("reordered") > 20.0, "the edge saw little reordering");
}

#[test]
fn viewer_receives_every_tag_once_with_duplicates() {
    let path = near(LinkSettings { duplicate: 0.1, ..LinkSettings::lossy(0.02) });
    let outcome = push_over(SiteSettings::over(path, 11), 1000);
    assert!(outcome.edge("duplicate") > 50.0, "the edge saw few duplicates");
}

/// A round trip of 100 ms: a repair takes that long, and twice as long if it is lost, too.
#[test]
fn viewer_receives_every_tag_over_a_long_path() {
    let path = LinkSettings { delay: Duration::from_millis(50), ..LinkSettings::lossy(0.05) };
    push_over(SiteSettings::over(path, 50), 2000).assert_repaired(20);
}

#[test]
fn viewer_receives_every_tag_with_all_impairments() {
    let path = LinkSettings {
        bursts: Some(Bursts::covering(0.02, Duration::from_millis(40))),
        duplicate: 0.05,
        reorder: 0.1,
        reorder_delay: Duration::from_millis(5),
        delay: Duration::from_millis(50),
        jitter: Duration::from_millis(5),
        ..LinkSettings::lossy(0.05)
    };
    push_over(SiteSettings::over(path, 99), 3000).assert_repaired(20);
}

/// A total loss of one second, which is shorter than the edge's latency.
#[test]
fn viewer_receives_every_tag_after_a_cut_within_the_deadline() {
    let outcome = push_over(
        SiteSettings::over(cut(Duration::from_millis(800), Duration::from_secs(1)), 1),
        6000,
    );
    outcome.assert_repaired(100);
}

/// Repair is cut for 3 s, and the edge's latency is half a second. Media is lost, but the rest is whole
/// and in order, and complete again after the cut.
#[test]
fn stream_recovers_after_a_cut_beyond_the_deadline() {
    let quic = Some(cut(Duration::from_secs(3), Duration::from_secs(3)));
    let site = SiteSettings { quic, ..SiteSettings::over(LinkSettings::lossy(0.05), 1) }.start();
    site.edges[0].until_connected();
    let viewer = site.watch("live/movie");
    let push = site.push(media::full_at(1), "live/movie");
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    let gaps = assert_same_with_gaps(&media::full_at(1).tags, &pulled);
    assert!(!gaps.is_empty(), "nothing was lost");
    let last_second = |tags: &[Tag]| -> Vec<Tag> {
        without_script(tags).into_iter().filter(|tag| tag.timestamp() >= 9000).collect()
    };
    assert_eq!(last_second(&pulled), last_second(&media::full_at(1).tags));
    let metrics = site.edges[0].node.metrics();
    assert!(metrics.sum("downpour_edge_packets_total", &[("fate", "lost")]) > 0.0);
}

/// An edge that uses v0, as with an existing cloud: one answer per request, names from the HTTP API, and
/// no notification of the end of a stream.
#[test]
fn five_percent_loss_repaired_over_v0() {
    let site = SiteSettings::over(near(LinkSettings::lossy(0.05)), 4)
        .with_edge("repair_protocol: v0")
        .with_edge("latency_ms: 1000")
        .start();
    let viewer = site.watch("live/movie");
    site.push(media::full_at(1), "live/movie").until_done(PUSH);
    let pulled = viewer.until_end(PUSH);
    assert_same_while_it_lasted(&media::full_at(1).tags, &pulled, Timestamps::Exact);
    // Losses after the last received packet are not detected.
    let (sent, received) = (media::full_at(1).tags.len(), pulled.len());
    assert!(received + 20 > sent, "{received} of {sent} tags");
    let metrics = site.edges[0].node.metrics();
    let connected = metrics.sum("downpour_repair_client_connected", &[("protocol", "v0")]);
    assert_eq!(connected, 1.0, "connections over v0");
    let packets = |fate| metrics.sum("downpour_edge_packets_total", &[("fate", fate)]);
    assert_eq!(packets("lost"), 0.0, "packets given up");
    assert!(packets("repaired_1") > 20.0, "{} repaired", packets("repaired_1"));
}

/// Sequence numbers, gaps and requests are separate per stream.
#[test]
fn viewers_of_three_streams_receive_every_tag_at_ten_percent_loss() {
    let site = SiteSettings::over(near(LinkSettings::lossy(0.1)), 33)
        .with_edge("latency_ms: 2000")
        .start();
    site.edges[0].until_connected();
    let viewers = [0, 1, 2].map(|number| site.watch(&format!("live/cam{number}")));
    let push = site.push_with(media::full(), "live/cam{i}", &["--count", "3"]);
    for viewer in viewers {
        let pulled = viewer.until_end(PUSH);
        assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
    }
    push.until_done(PUSH);
    let lost = site.network.rtp_stats().dropped();
    assert!(lost > 150, "the relay lost {lost}");
}

struct Outcome {
    rtp: downpour_netem::LinkStats,
    quic_lost: u64,
    edge: Metrics,
    /// Repairs that the cloud sent.
    cloud_sent: f64,
    /// The last value of the stream's counter of repairs, which ends with the stream.
    stream_served: f64,
}

impl Outcome {
    /// The edge's packets with this `fate` label.
    fn edge(&self, fate: &str) -> f64 {
        self.edge.sum("downpour_edge_packets_total", &[("fate", fate)])
    }

    /// Asserts that at least `at_least` packets were lost, and that the edge repaired them.
    #[track_caller]
    fn assert_repaired(&self, at_least: u64) {
        assert!(self.rtp.dropped() >= at_least, "the relay lost {}", self.rtp.dropped());
        let repaired: f64 =
            ["repaired_1", "repaired_2", "repaired_3"].iter().map(|fate| self.edge(fate)).sum();
        // Packets from before the edge knew the stream are part of its first request.
        assert!(repaired >= at_least as f64 / 2.0, "{repaired} repaired");
        assert!(self.cloud_sent >= repaired, "{} repairs sent", self.cloud_sent);
        assert!(self.stream_served > 0.0, "the stream's own count of repairs stayed 0");
    }
}

/// Pushes the stream over a bad network and asserts that a viewer gets all of it.
#[track_caller]
fn push_over(settings: SiteSettings, latency_ms: u32) -> Outcome {
    let site = settings.with_edge(&format!("latency_ms: {latency_ms}")).start();
    site.edges[0].until_connected();
    let viewer = site.watch("live/movie");
    let push = site.push(media::full(), "live/movie");
    let stream_served = served_until_the_end(&site, &viewer);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
    let edge = site.edges[0].node.metrics();
    assert!(edge.has("downpour_edge_packets_total"), "{}", edge.text());
    let (to_cloud, to_edge) = site.network.quic_stats();
    let outcome = Outcome {
        rtp: site.network.rtp_stats(),
        quic_lost: to_cloud.dropped() + to_edge.dropped(),
        edge,
        cloud_sent: site.cloud.node.metrics().sum("downpour_repair_server_repairs_total", &[]),
        stream_served,
    };
    assert_eq!(outcome.edge("lost"), 0.0, "packets given up");
    println!("{:?}, QUIC lost {}, repairs {}", outcome.rtp, outcome.quic_lost, outcome.cloud_sent);
    for fate in ["received", "reordered", "duplicate", "repaired_1", "repaired_2", "repaired_3"] {
        println!("{fate} {}", outcome.edge(fate));
    }
    // 65000 to 65535 are 536 packets.
    assert!(outcome.rtp.sent > 1000, "only {} packets: no wrap", outcome.rtp.sent);
    outcome
}

/// Polls the stream's counter of repairs until the stream ends. Returns its last value.
fn served_until_the_end(site: &Site, viewer: &crate::common::viewer::Viewer) -> f64 {
    let mut served = 0.0_f64;
    crate::common::wait_for("the stream ends", PUSH, || {
        let metrics = site.cloud.node.metrics();
        served = served.max(metrics.sum("downpour_repair_served_total", &[]));
        viewer.has_ended().then_some(())
    });
    served
}

/// A total loss of `length`, from `start` after the first packet.
fn cut(start: Duration, length: Duration) -> LinkSettings {
    let blackout = Blackout { start, length, period: None };
    near(LinkSettings { blackouts: vec![blackout], ..LinkSettings::default() })
}

/// `path` with a delay of 10 ms.
fn near(path: LinkSettings) -> LinkSettings {
    LinkSettings { delay: Duration::from_millis(10), ..path }
}
