//! Many viewers, some of which do not read: they do not affect each other.

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
/// Maximum memory of the edge: its log is bounded by 32 MiB, and the kernel's buffers do not count.
const MEMORY_BOUND: u64 = 160 << 20;

#[test]
fn viewers_are_not_affected_by_one_that_never_reads() {
    let site = Site::start();
    let memory = Memory::default();
    let edge = site.edges[0].node.http;
    let viewers: Vec<_> = (0..99).map(|_| Viewer::watch_sharing(edge, KEY, &memory)).collect();
    let push = site.push(media::full(), KEY);
    let silent = join(&site);
    for viewer in viewers {
        let pulled = viewer.until_end(PUSH);
        assert_same_to_the_end(&media::full().tags, &pulled, Timestamps::Exact);
    }
    push.until_done(PUSH);
    let peak = site.edges[0].node.peak_memory();
    assert!(peak < MEMORY_BOUND, "the edge used {} MiB", peak >> 20);
    let metrics = site.edges[0].node.metrics();
    assert_eq!(metrics.sum("downpour_http_viewers_total", &[]), 100.0);
    assert_eq!(metrics.sum("downpour_http_skipped_tags_total", &[]), 0.0);
    drop(silent);
}

/// More media than the kernel buffers: one viewer stops reading for seconds, and one permanently.
#[test]
fn a_stalled_viewer_skips_to_a_key_frame_and_a_dead_one_is_closed() {
    let site = Site::start();
    let sent = &media::heavy().tags;
    let good = site.watch(KEY);
    let push = site.push(media::heavy(), KEY);
    // The kernel's buffers take about 3 MB for each, as much as 3 s of media.
    let mut stalled = join(&site);
    let dead = join(&site);
    // The stalled viewer continues when 13 s of media have been sent, more than its backlog of 5 s and
    // the kernel's buffers.
    let late = sent.iter().filter(|tag| tag.timestamp() < 13_000).count();
    good.wait_tags(late, PUSH);
    let resumed = read_all(&mut stalled);
    let from = assert_same_to_the_end(sent, &good.until_end(PUSH), Timestamps::Exact);
    assert!(from < sent.len() / 4, "the good viewer joined late");
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
    assert!(peak < MEMORY_BOUND, "the edge used {} MiB", peak >> 20);
    drop(dead);
}

/// Joins without reading the body.
fn join(site: &Site) -> TcpStream {
    let until = Instant::now() + PUSH;
    loop {
        assert!(Instant::now() < until, "the stream is not live");
        let Ok(mut socket) = http::request(site.edges[0].node.http, &format!("/{KEY}.flv")) else {
            continue;
        };
        if http::read_head(&mut socket).is_ok_and(|head| head.status == 200) {
            return socket;
        }
    }
}

/// Reads to the end of the stream, which must be the end of a tag.
fn read_all(socket: &mut TcpStream) -> Vec<Tag> {
    let mut body = Vec::new();
    socket.read_to_end(&mut body).expect("the stalled viewer was closed");
    let mut reader = FlvReader::new();
    reader.push(&body);
    let tags = std::iter::from_fn(|| reader.next_tag().expect("not FLV")).collect();
    assert!(!reader.is_inside_tag(), "the stream ended inside a tag");
    tags
}

/// Asserts that `received` is `sent` with gaps, each followed by a key frame.
#[track_caller]
fn assert_skips_to_a_key_frame(sent: &[Tag], received: &[Tag]) {
    let frames: Vec<_> = received.iter().filter(|tag| !tag.is_sequence_header()).collect();
    let mut gaps = 0;
    let mut next = sent.iter().position(|tag| tag == frames[0]).expect("never sent");
    for frame in frames {
        if sent[next] != *frame {
            let ahead = sent[next..].iter().position(|tag| tag == frame).expect("out of order");
            assert!(frame.is_key_frame(), "resumed at {frame:?}");
            next += ahead;
            gaps += 1;
        }
        next += 1;
    }
    assert!(gaps > 0, "nothing was skipped");
}
