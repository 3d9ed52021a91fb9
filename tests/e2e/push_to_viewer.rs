//! A viewer of the edge gets every tag that an encoder pushes to the cloud, byte for byte.

use std::{process::Command, time::Duration};

use crate::common::{
    compare::{
        Timestamps, assert_same_bodies, assert_same_to_the_end, media as without_script, metadata,
        read_flv,
    },
    media::{self, Media, assert_decodes},
    node::{Site, SiteSettings},
    viewer,
};

const H264_AAC: &[&str] = &["aac", "h264"];
const H264: &[&str] = &["h264"];
const AAC: &[&str] = &["aac"];
const PUSH: Duration = Duration::from_secs(40);

#[test]
fn viewer_gets_every_tag_of_ffmpeg_with_video_and_audio() {
    ffmpeg(media::short(), H264_AAC);
}

#[test]
fn viewer_gets_every_tag_of_ffmpeg_with_video_only() {
    ffmpeg(media::video_only(), H264);
}

#[test]
fn viewer_gets_every_tag_of_ffmpeg_with_audio_only() {
    ffmpeg(media::audio_only(), AAC);
}

#[test]
fn viewer_gets_every_tag_of_downpour_push_with_video_and_audio() {
    our_push(media::short(), H264_AAC);
}

#[test]
fn viewer_gets_every_tag_of_downpour_push_with_video_only() {
    our_push(media::video_only(), H264);
}

#[test]
fn viewer_gets_every_tag_of_downpour_push_with_audio_only() {
    our_push(media::audio_only(), AAC);
}

/// `downpour push --count` names the streams by number.
#[test]
fn push_publishes_three_streams() {
    let site = Site::start();
    let keys = ["live/cam0", "live/cam1", "live/cam2"];
    let viewers = keys.map(|key| site.watch(key));
    let push = site.push_with(media::short(), "live/cam{i}", &["--count", "3"]);
    for viewer in viewers {
        let pulled = viewer.until_end(PUSH);
        assert_from_the_start(media::short(), &pulled, Timestamps::Exact);
    }
    push.until_done(PUSH);
}

/// A late viewer starts with the headers and the newest key frame.
#[test]
fn late_viewer_starts_at_the_newest_key_frame() {
    let site = Site::start();
    let first = site.watch("live/movie");
    let push = site.push(media::short(), "live/movie");
    let four_groups = media::short().tags.iter().filter(|tag| tag.timestamp() < 2000).count();
    first.wait_tags(four_groups, PUSH);
    let late = site.watch("live/movie").until_end(PUSH);
    let from = assert_same_to_the_end(&media::short().tags, &late, Timestamps::Exact);
    let joined = without_script(&media::short().tags)[from].timestamp();
    assert!(joined >= 1500, "it was served from {joined} ms on");
    assert_from_the_start(media::short(), &first.until_end(PUSH), Timestamps::Exact);
    push.until_done(PUSH);
}

/// ffmpeg changes timestamps and interleaving, so the reference is the cloud's recording, which must
/// contain the file's frames.
fn ffmpeg(sent: &Media, codecs: &[&str]) {
    let site = SiteSettings::default().with_cloud("enable_record: true").start();
    let viewer = site.watch("live/movie");
    site.push_ffmpeg(sent, "live/movie").until_done(PUSH);
    let pulled = viewer.until_end(PUSH);
    let recordings = site.cloud.recordings();
    assert_eq!(recordings.len(), 1, "{recordings:?}");
    assert_decodes(&recordings[0], codecs);
    let recorded = read_flv(&recordings[0]);
    assert_same_bodies(&sent.tags, &recorded);
    assert_same_to_the_end(&recorded, &pulled, Timestamps::Rebased);
    assert_eq!(metadata(&pulled), metadata(&recorded), "metadata");
    assert!(metadata(&pulled).is_some(), "no metadata received");
    let file = site.file("pulled", "flv");
    viewer::save(&pulled, &file);
    assert_decodes(&file, codecs);
}

/// `downpour push` sends a file's tags unchanged, and `downpour pull` records them.
fn our_push(sent: &Media, codecs: &[&str]) {
    let site = Site::start();
    let viewer = site.watch("live/movie");
    let push = site.push(sent, "live/movie");
    viewer.wait_tags(1, PUSH);
    let file = site.file("pulled", "flv");
    let url = format!("http://{}/live/movie.flv", site.edges[0].node.http);
    let mut pull = Command::new(env!("CARGO_BIN_EXE_downpour"));
    let output = pull.arg("pull").arg(url).arg("--output").arg(&file).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    push.until_done(PUSH);
    assert_same_to_the_end(&sent.tags, &read_flv(&file), Timestamps::Exact);
    assert_decodes(&file, codecs);
    let pulled = viewer.until_end(PUSH);
    assert_from_the_start(sent, &pulled, Timestamps::Exact);
    assert_eq!(metadata(&pulled), metadata(&sent.tags), "metadata");
}

/// Asserts that a viewer that joined before the stream got it from its start.
#[track_caller]
fn assert_from_the_start(
    sent: &Media,
    pulled: &[downpour_media::flv::Tag],
    timestamps: Timestamps,
) {
    let from = assert_same_to_the_end(&sent.tags, pulled, timestamps);
    let joined = without_script(&sent.tags)[from].timestamp();
    // A group of pictures is half a second long; on a busy machine, one more may be missing.
    assert!(joined <= 1000, "an early viewer was served from {joined} ms on");
}
