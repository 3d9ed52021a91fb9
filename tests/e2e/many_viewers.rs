//! Viewers do not feel each other, however many they are and however badly one behaves.

use std::{
    io::Read,
    net::TcpStream,
    time::{Duration, Instant},
};

use crate::common::{
    compare::{Timestamps, assert_same_to_the_end, media as without_script},
    http, media,
    node::Site,
    viewer::{Memory, Viewer},
    wait_for,
};
use downpour_media::flv::{FlvReader, Tag};

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);
/// What an edge of this size may take at most: its log is bounded by 32 MiB, the kernel's buffers
/// are not counted here.
const MEMORY_BOUND: u64 = 160 << 20;

#[test]
fn a_hundred_viewers_one_of_which_never_reads() {
    let site = Site::start();
    let memory = Memory::default();
    let edge = site.edges[0].node.http;
    let crowd: Vec<_> = (0..99).map(|_| Viewer::watch_sharing(edge, KEY, &memory)).collect();
    let push = site.push(media::full(), KEY);
    let silent = join(&site);
    for viewer in crowd {
        let pulled = viewer.until_end(PUSH);
        assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
    }
    push.until_done(PUSH);
    let peak = site.edges[0].node.peak_memory();
    assert!(peak < MEMORY_BOUND, "the edge took {} MiB", peak >> 20);
    let metrics = site.edges[0].node.metrics();
    assert_eq!(metrics.sum("downpour_http_viewers_total", &[]), 100.0);
    assert_eq!(metrics.sum("downpour_http_skipped_tags_total", &[]), 0.0);
    drop(silent);
}

/// More media than the kernel buffers: one viewer stops reading for seconds and one for good.
#[test]
fn a_stalled_viewer_skips_to_a_key_frame_and_a_dead_one_is_closed() {
    let site = Site::start();
    let sent = &media::heavy().tags;
    let good = site.watch(KEY);
    let push = site.push(media::heavy(), KEY);
    // The kernel's buffers take about 3 MB for each, as much as 3 s of media.
    let mut stalled = join(&site);
    let dead = join(&site);
    // The stalled one reads on when the newest media is 13 s old, which is over its backlog of 5 s
    // and what the kernel holds for it.
    let late = sent.iter().filter(|tag| tag.timestamp() < 13_000).count();
    good.wait_tags(late, PUSH);
    let resumed = read_all(&mut stalled);
    let from = assert_same_to_the_end(sent, &good.until_end(PUSH), Timestamps::Exact);
    assert!(from < sent.len() / 4, "the good viewer came late");
    push.until_done(PUSH);
    assert_skips_to_a_key_frame(&without_script(sent), &without_script(&resumed));
    let node = &site.edges[0].node;
    assert!(node.metrics().sum("downpour_http_skipped_tags_total", &[]) > 0.0);
    wait_for("the dead viewer is closed", Duration::from_secs(60), || {
        let closed = node.metrics();
        (closed.sum("downpour_http_viewers_closed_total", &[("reason", "timeout")]) == 1.0
            && closed.sum("downpour_http_viewers", &[]) == 0.0)
            .then_some(())
    });
    let peak = node.peak_memory();
    assert!(peak < MEMORY_BOUND, "the edge took {} MiB", peak >> 20);
    drop(dead);
}

/// Joins and reads nothing of the body.
fn join(site: &Site) -> TcpStream {
    let until = Instant::now() + PUSH;
    loop {
        assert!(Instant::now() < until, "the stream did not come up");
        let Ok(mut socket) = http::request(site.edges[0].node.http, &format!("/{KEY}.flv")) else {
            continue;
        };
        if http::read_head(&mut socket).is_ok_and(|head| head.status == 200) {
            return socket;
        }
    }
}

/// Everything up to the end of the stream; each tag must be whole.
fn read_all(socket: &mut TcpStream) -> Vec<Tag> {
    let mut body = Vec::new();
    socket.read_to_end(&mut body).expect("the stalled viewer was closed");
    let mut reader = FlvReader::new();
    reader.push(&body);
    let tags = std::iter::from_fn(|| reader.next_tag().expect("not FLV")).collect();
    assert!(!reader.is_inside_tag(), "the stream ended inside a tag");
    tags
}

/// `received` is `sent` with holes, and goes on with a key frame behind each.
#[track_caller]
fn assert_skips_to_a_key_frame(sent: &[Tag], received: &[Tag]) {
    let frames: Vec<_> = received.iter().filter(|tag| !tag.is_sequence_header()).collect();
    let mut holes = 0;
    let mut next = sent.iter().position(|tag| tag == frames[0]).expect("never sent");
    for frame in frames {
        if sent[next] != *frame {
            let ahead = sent[next..].iter().position(|tag| tag == frame).expect("out of order");
            assert!(frame.is_key_frame(), "resumed at {frame:?}");
            next += ahead;
            holes += 1;
        }
        next += 1;
    }
    assert!(holes > 0, "nothing was skipped");
}
