//! Killed encoders, edges and clouds recover after a restart, without leftovers of the old process.

use std::time::{Duration, Instant};

use crate::common::{
    SOON,
    compare::{
        Timestamps, assert_same_to_the_end, assert_same_while_it_lasted, media as without_script,
        read_flv, read_flv_prefix,
    },
    media::{self, assert_decodes},
    node::{Site, SiteSettings},
    wait_for,
};

/// Time until viewers can play again, on a busy machine.
const SECONDS: Duration = Duration::from_secs(10);
const PUSH: Duration = Duration::from_secs(40);
const KEY: &str = "live/movie";

#[test]
fn stream_recovers_from_a_killed_encoder() {
    let site = Site::start();
    site.edges[0].until_connected();
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(100, SOON);
    let first = only_publication(&site);
    push.kill();
    let pulled = viewer.until_end(SECONDS);
    assert_same_while_it_lasted(&media::full_at(2).tags, &pulled, Timestamps::Exact);

    let viewer = site.watch(KEY);
    let killed = Instant::now();
    let push = site.push(media::short(), KEY);
    viewer.wait_tags(10, SECONDS);
    assert!(killed.elapsed() < SECONDS);
    assert_ne!(only_publication(&site), first, "the SSRC of a new publication");
    assert_one_stream(&site);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::short().tags, &viewer.until_end(PUSH), Timestamps::Exact);
    assert_no_stream(&site);
}

/// An encoder that loses power does not close its connection. Until its timeout, no other encoder can
/// publish the stream.
#[test]
fn cloud_refuses_a_second_encoder_until_the_first_is_silent() {
    let settings = SiteSettings::default().with_cloud("publisher_silence_ms: 2000");
    let site = settings.with_cloud("publish_grace_ms: 0").start();
    site.edges[0].until_connected();
    let viewer = site.watch(KEY);
    let first = site.push(media::full_at(2), KEY);
    viewer.wait_tags(50, SOON);
    let ssrc = only_publication(&site);
    site.push(media::short(), KEY).until_failed(SOON);
    assert_eq!(only_publication(&site), ssrc, "the first encoder's stream is still live");
    let refused = site.cloud.node.metrics();
    let reason = [("reason", "already_live")];
    assert_eq!(refused.sum("downpour_rtmp_refused_total", &reason), 1.0);

    first.freeze();
    let again = wait_for("the stream is free", SOON, || {
        let mut push = site.push(media::short(), KEY);
        wait_for("the cloud decides", SOON, || {
            // Between the old stream's end and the new one's first tag there is none.
            let publications = site.cloud.publications();
            let is_over = publications.iter().all(|(_, other)| *other != ssrc);
            (push.has_ended() || is_over).then_some(())
        });
        (!push.has_ended()).then_some(push)
    });
    let pulled = viewer.until_end(SECONDS);
    assert_same_while_it_lasted(&media::full_at(2).tags, &pulled, Timestamps::Exact);
    let viewer = site.watch(KEY);
    assert_same_to_the_end(&media::short().tags, &viewer.until_end(PUSH), Timestamps::Exact);
    again.until_done(PUSH);
    drop(first);
    assert_no_stream(&site);
}

#[test]
fn edge_recovers_from_a_kill_within_a_gop() {
    let mut site = Site::start();
    site.edges[0].until_connected();
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(2), KEY);
    // Half a group of pictures behind a key frame.
    let until = without_script(&media::full_at(2).tags);
    viewer.wait_tags(until.iter().filter(|tag| tag.timestamp() < 1250).count(), SOON);
    site.edges[0].node.kill();
    let pulled = viewer.leave();
    assert_same_while_it_lasted(&media::full_at(2).tags, &pulled, Timestamps::Exact);

    let killed = Instant::now();
    site.edges[0].node.restart();
    let viewer = site.watch(KEY);
    viewer.wait_tags(10, SECONDS);
    assert!(killed.elapsed() < SECONDS, "back after {:?}", killed.elapsed());
    assert_one_stream(&site);
    push.until_done(PUSH);
    // The rest of the stream, with headers that were sent before the edge started.
    assert_same_to_the_end(&media::full_at(2).tags, &viewer.until_end(PUSH), Timestamps::Exact);
    assert_no_stream(&site);
}

/// The recording of the killed cloud must be whole up to its last tag, too.
#[test]
fn cloud_recovers_from_a_kill() {
    let settings = SiteSettings::default().with_cloud("enable_record: true");
    let mut site = settings.with_edge("publish_grace_ms: 0").start();
    site.edges[0].until_connected();
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(400, SOON);
    let first = only_publication(&site);
    site.cloud.node.kill();
    let seen = viewer.len();
    drop(push);

    let killed = Instant::now();
    site.cloud.node.restart();
    let push = site.push(media::full_at(2), KEY);
    // The viewers of the old publication are closed, so that players reconnect.
    let old = viewer.until_end(SECONDS);
    assert_same_while_it_lasted(&media::full_at(2).tags, &old, Timestamps::Exact);
    let viewer = site.watch(KEY);
    viewer.wait_tags(10, SECONDS);
    assert!(killed.elapsed() < SECONDS, "back after {:?}", killed.elapsed());
    assert_ne!(only_publication(&site), first, "the SSRC of a restarted cloud");
    assert_one_stream(&site);

    // The first file was not overwritten.
    let recordings = wait_for("there is a second recording", SOON, || {
        Some(site.cloud.recordings()).filter(|recordings| recordings.len() == 2)
    });
    let (recorded, _) = read_flv_prefix(&recordings[0]);
    assert_same_while_it_lasted(&media::full_at(2).tags, &recorded, Timestamps::Rebased);
    let recorded = without_script(&recorded);
    // The recording has all tags that the viewer received, except for one second of buffered media.
    assert!(recorded.len() + 200 >= seen, "{} tags recorded, {seen} seen", recorded.len());

    let pulled = viewer.until_end(PUSH);
    assert_same_to_the_end(&media::full_at(2).tags, &pulled, Timestamps::Exact);
    push.until_done(PUSH);
    assert_no_stream(&site);
    assert_decodes(&recordings[1], &["aac", "h264"]);
    assert_same_to_the_end(&media::full_at(2).tags, &read_flv(&recordings[1]), Timestamps::Rebased);
}

/// SIGTERM while a stream runs: the viewers see its end, files are whole, the exit code is 0.
#[test]
fn sigterm_drains_cloud_and_edge() {
    let grace = Duration::from_millis(5000);
    let settings = SiteSettings { edges: 2, ..SiteSettings::default() };
    let mut site =
        settings.with_cloud("enable_record: true").with_edge("enable_record: true").start();
    for edge in &site.edges {
        edge.until_connected();
    }
    let [first, second] = [0, 1].map(|edge| site.edges[edge].watch(KEY));
    let _push = site.push(media::full_at(2), KEY);
    first.wait_tags(100, SOON);
    second.wait_tags(100, SOON);

    let (status, took) = site.edges[0].node.terminate();
    assert_eq!(status.code(), Some(0), "the edge's exit code");
    assert!(took < grace + Duration::from_secs(1), "the edge took {took:?}");
    let pulled = first.until_end(SECONDS);
    assert_same_while_it_lasted(&media::full_at(2).tags, &pulled, Timestamps::Exact);

    let (status, took) = site.cloud.node.terminate();
    assert_eq!(status.code(), Some(0), "the cloud's exit code");
    assert!(took < grace + Duration::from_secs(1), "the cloud took {took:?}");
    let pulled = second.until_end(SECONDS);
    assert_same_while_it_lasted(&media::full_at(2).tags, &pulled, Timestamps::Exact);

    let recordings = site.cloud.recordings();
    assert_eq!(recordings.len(), 1, "{recordings:?}");
    assert_decodes(&recordings[0], &["aac", "h264"]);
    let recorded = read_flv(&recordings[0]);
    assert_same_while_it_lasted(&media::full_at(2).tags, &recorded, Timestamps::Rebased);
    // The cloud notified the edge of the end, and the edge had the whole stream.
    assert_same_to_the_end(&recorded, &pulled, Timestamps::Rebased);
    for edge in &site.edges {
        let files = edge.node.recordings();
        assert_eq!(files.len(), 1, "{files:?}");
        assert_decodes(&files[0], &["aac", "h264"]);
        let recorded = read_flv(&files[0]);
        assert_same_while_it_lasted(&media::full_at(2).tags, &recorded, Timestamps::Rebased);
    }
}

/// The SSRC of the only live stream.
#[track_caller]
fn only_publication(site: &Site) -> u64 {
    let publications = site.cloud.publications();
    let [(key, ssrc)] = &publications[..] else { panic!("{publications:?}") };
    assert_eq!(key, KEY);
    *ssrc
}

/// Asserts that all lists and metrics of cloud and edge show exactly one stream.
#[track_caller]
fn assert_one_stream(site: &Site) {
    for node in [&site.cloud.node, &site.edges[0].node] {
        assert_eq!(node.streams(), 1);
        assert_eq!(node.metrics().sum("downpour_streams", &[]), 1.0);
    }
    wait_for("the edge's own series show one stream", SOON, || {
        let metrics = site.edges[0].node.metrics();
        let series = |line: &&str| line.starts_with("downpour_edge_stream_pending_packets{");
        (metrics.text().lines().filter(series).count() == 1).then_some(())
    });
}

/// Waits until no list or metric shows the stream, which takes until its history has expired.
#[track_caller]
fn assert_no_stream(site: &Site) {
    for node in [&site.cloud.node, &site.edges[0].node] {
        wait_for("a stream is gone", SECONDS, || (node.streams() == 0).then_some(()));
        wait_for("a stream's metrics are gone", SECONDS, || {
            let metrics = node.metrics();
            let gone = !metrics.text().contains(KEY);
            (gone && metrics.has("downpour_streams")).then_some(())
        });
    }
    assert_eq!(site.cloud.publications(), []);
    let edge = site.edges[0].node.http;
    let (status, _) =
        crate::common::http::get_json(edge, &format!("/stats/time?stream={KEY}")).unwrap();
    assert_eq!(status, 404);
}
