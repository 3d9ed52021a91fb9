//! Encoders and clouds that are gone for a moment: viewers stay on the same response.

use std::time::Duration;

use crate::common::{
    SOON,
    compare::media as without_script,
    media,
    node::{Site, SiteSettings},
    viewer::Viewer,
    wait_for,
};
use downpour_media::flv::Tag;

const PUSH: Duration = Duration::from_secs(40);
const KEY: &str = "live/movie";

#[test]
fn viewers_stay_while_their_encoder_is_gone() {
    let site = SiteSettings::default().with_cloud("enable_record: true").start();
    site.edges[0].until_connected();
    let at_edge = site.watch(KEY);
    let push = site.push(media::full_at(2), KEY);
    at_edge.wait_tags(100, SOON);
    let at_cloud = Viewer::watch(site.cloud.node.http, KEY);
    at_cloud.wait_tags(20, SOON);
    let publications = site.cloud.publications();
    push.kill();
    wait_for("the stream waits for its encoder", SOON, || {
        let metrics = site.cloud.node.metrics();
        (metrics.sum("downpour_rtmp_connections", &[]) == 0.0).then_some(())
    });
    let push = site.push(media::short(), KEY);
    push.until_done(PUSH);
    assert_eq!(site.cloud.publications(), publications, "the same publication");
    let metrics = site.cloud.node.metrics();
    assert_eq!(metrics.sum("downpour_publications_resumed_total", &[]), 1.0);
    // It ends once the encoder stays away.
    for viewer in [at_edge, at_cloud] {
        assert_continues_with_short(&viewer.until_end(SOON));
    }
    assert_eq!(site.cloud.recordings().len(), 1);
}

#[test]
fn viewers_of_an_edge_stay_while_its_cloud_restarts() {
    let mut site = Site::start();
    site.edges[0].until_connected();
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(100, SOON);
    let (status, _) = site.cloud.node.terminate();
    assert_eq!(status.code(), Some(0));
    drop(push);
    site.cloud.node.restart();
    let push = site.push(media::short(), KEY);
    push.until_done(PUSH);
    assert_continues_with_short(&viewer.until_end(SOON));
}

/// Asserts that a viewer got some media, and then [`media::short`] from its first key frame on, without a
/// hole or a step back in time.
#[track_caller]
fn assert_continues_with_short(pulled: &[Tag]) {
    let frames = |tags: &[Tag]| -> Vec<Tag> {
        without_script(tags).into_iter().filter(|tag| !tag.is_header()).collect()
    };
    let (pulled, mut short) = (frames(pulled), frames(&media::short().tags));
    // An edge that connects after the first tags starts at the key frame.
    short.drain(..short.iter().position(Tag::is_key_frame).expect("a key frame"));
    assert!(pulled.len() > short.len() + 20, "{} of {}", pulled.len(), short.len());
    let from = pulled.len() - short.len();
    for (pulled, pushed) in pulled[from..].iter().zip(&short) {
        assert_eq!((pulled.kind(), pulled.body()), (pushed.kind(), pushed.body()));
    }
    for pair in pulled.windows(2) {
        let step = i64::from(pair[1].timestamp()) - i64::from(pair[0].timestamp());
        assert!((-100..=500).contains(&step), "{pair:?}");
    }
}
