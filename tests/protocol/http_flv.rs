//! HTTP-FLV viewers and the API over real sockets.

use std::time::Duration;

use crate::common::{
    SOON, eventually,
    http_node::{
        FlvViewer, HttpNode, audio, audio_header, inter, key_frame, metadata, video_header,
    },
};
use downpour::http::ViewerSettings;
use downpour_hub::MaxLag;
use tokio::{io::AsyncWriteExt, task::JoinHandle, time::timeout};

#[tokio::test]
async fn viewer_starts_at_the_newest_gop_and_is_closed_at_the_end() {
    let node = HttpNode::start(settings()).await;
    let mut publisher = node.publish();
    let mut pushed = Vec::new();
    for tag in [metadata(0), video_header(0), audio_header(0), key_frame(0, 10), inter(40, 10)] {
        publisher.push(tag);
    }
    for tag in [key_frame(80, 70_000), audio(85), inter(120, 10)] {
        publisher.push(tag.clone());
        pushed.push(tag);
    }
    let mut viewer = node.watch().await;
    assert!(viewer.head.starts_with("HTTP/1.1 200 OK\r\n"), "{}", viewer.head);
    for line in ["Content-Type: video/x-flv", "Access-Control-Allow-Origin: *", "Connection: close"]
    {
        assert!(viewer.head.lines().any(|have| have == line), "{}", viewer.head);
    }
    // With a timestamp other than 0, FFmpeg treats metadata as a text stream.
    viewer.expect(&[metadata(0), video_header(80), audio_header(80)]).await;
    viewer.expect(&pushed).await;
    assert_eq!(node.metrics.viewers.get(), 1);
    let last = inter(160, 20);
    publisher.push(last.clone());
    viewer.expect(&[last]).await;
    drop(publisher);
    assert_eq!(viewer.next().await, None);
    node.eventually("the viewer is gone", |node| node.metrics.viewers.get() == 0).await;
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"ended\"}"), 1);
    assert!(node.metrics.bytes.get() > 70_000);
}

#[tokio::test]
async fn early_viewer_waits_for_its_stream() {
    let node = HttpNode::start_with(settings(), Duration::from_secs(20)).await;
    let mut early = node.connect("GET /live/movie.flv HTTP/1.0\r\n\r\n").await;
    for round in 0..2 {
        let mut publisher = node.publish();
        publisher.push(key_frame(round, 10));
        let mut viewer = FlvViewer::of(early).await;
        viewer.expect(&[key_frame(round, 10)]).await;
        drop(publisher);
        assert_eq!(viewer.next().await, None);
        early = node.connect("GET /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    }
}

#[tokio::test]
async fn slow_viewer_skips_to_key_frames_without_delaying_others() {
    let settings = ViewerSettings {
        backlog: MaxLag { max_ms: 1_000, max_bytes: u64::MAX },
        send_buffer: Some(16 * 1024),
        ..settings()
    };
    let node = HttpNode::start(settings).await;
    let mut publisher = node.publish();
    publisher.push(video_header(0));
    publisher.push(key_frame(0, 4_000));
    let slow = node.connect_with("GET /live/movie.flv HTTP/1.1\r\n\r\n", 4 * 1024).await;
    let mut slow = FlvViewer::of(slow).await;
    assert!(slow.head.starts_with("HTTP/1.1 200"));
    let mut fast = node.watch().await;
    fast.expect(&[video_header(0), key_frame(0, 4_000)]).await;
    let mut pushed = vec![video_header(0), key_frame(0, 4_000)];
    for i in 1..2_000u32 {
        let timestamp = i * 40;
        let tag = if i % 25 == 0 { key_frame(timestamp, 4_000) } else { inter(timestamp, 4_000) };
        publisher.push(tag.clone());
        fast.expect(std::slice::from_ref(&tag)).await;
        pushed.push(tag);
    }
    drop(publisher);
    let mut read = Vec::new();
    while let Some(tag) = slow.next().await {
        read.push(tag);
    }
    let mut next = 0;
    let mut skipped = 0;
    for tag in &read {
        let index = pushed.iter().position(|pushed| pushed == tag).unwrap();
        if index != next {
            assert!(index > next && tag.is_key_frame(), "{tag:?} after a gap");
            skipped += index - next;
        }
        next = index + 1;
    }
    assert!(skipped > 1_000, "{skipped}");
    node.eventually("both are gone", |node| node.metrics.viewers.get() == 0).await;
    assert!(node.metrics.skipped_tags.get() >= skipped as u64);
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"ended\"}"), 2);
}

#[tokio::test]
async fn viewers_receive_every_tag_while_one_never_reads() {
    let settings = ViewerSettings {
        write_timeout: Duration::from_millis(500),
        send_buffer: Some(16 * 1024),
        ..settings()
    };
    let node = HttpNode::start(settings).await;
    let mut publisher = node.publish();
    let mut all = vec![audio_header(0), key_frame(0, 2_000)];
    all.iter().for_each(|tag| publisher.push(tag.clone()));
    let dead = node.connect_with("GET /live/movie.flv HTTP/1.1\r\n\r\n", 4 * 1024).await;
    let mut viewers = Vec::new();
    for _ in 0..99 {
        let mut viewer = node.watch().await;
        viewer.expect(&all).await;
        viewers.push(viewer);
    }
    node.eventually("all are admitted", |node| node.metrics.viewers.get() == 100).await;
    let pushed: Vec<_> = (1..200).map(|i| inter(i * 5, 5_000)).collect();
    all.extend(pushed.iter().cloned());
    let reading: Vec<JoinHandle<()>> = viewers
        .into_iter()
        .map(|mut viewer| {
            let pushed = pushed.clone();
            tokio::spawn(async move {
                viewer.expect(&pushed).await;
                assert_eq!(viewer.next().await, None);
            })
        })
        .collect();
    for (i, tag) in pushed.into_iter().enumerate() {
        publisher.push(tag);
        if i % 4 == 0 {
            tokio::task::yield_now().await;
        }
    }
    node.eventually("the dead one is closed", |node| {
        node.counter("downpour_http_viewers_closed_total{reason=\"timeout\"}") == 1
    })
    .await;
    drop(publisher);
    for viewer in reading {
        viewer.await.unwrap();
    }
    drop(dead);
}

#[tokio::test]
async fn server_detects_a_closed_viewer_without_tags() {
    let node = HttpNode::start(settings()).await;
    let publisher = node.publish();
    let viewer = node.watch().await;
    node.eventually("it is counted", |_| {
        publisher.stream().counters().viewers.load(std::sync::atomic::Ordering::Relaxed) == 1
    })
    .await;
    drop(viewer);
    node.eventually("it is gone", |node| node.metrics.viewers.get() == 0).await;
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"client\"}"), 1);
}

#[tokio::test]
async fn a_viewer_that_closes_only_its_sending_side_stays() {
    let node = HttpNode::start(settings()).await;
    // It has closed before its stream starts, and when it joins.
    let mut early = node.connect("GET /live/movie.flv HTTP/1.1\r\n\r\n").await;
    early.shutdown().await.unwrap();
    let mut publisher = node.publish();
    let first = key_frame(0, 100);
    publisher.push(first.clone());
    let mut early = FlvViewer::of(early).await;
    assert!(early.head.starts_with("HTTP/1.1 200"), "{}", early.head);
    early.expect(std::slice::from_ref(&first)).await;
    // It closes in a group. Groups look after their members every second.
    let mut late = node.watch().await;
    late.expect(std::slice::from_ref(&first)).await;
    late.finish_sending().await;
    for i in 1..60u32 {
        let tag = inter(i * 40, 100);
        publisher.push(tag.clone());
        early.expect(std::slice::from_ref(&tag)).await;
        late.expect(std::slice::from_ref(&tag)).await;
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
    assert_eq!(node.metrics.viewers.get(), 2);
    // Once it is gone, the next write shows it.
    drop(early);
    let mut at = 60 * 40;
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while node.metrics.viewers.get() == 2 {
        assert!(std::time::Instant::now() < deadline, "it is still counted");
        at += 40;
        publisher.push(inter(at, 100));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"client\"}"), 1);
    drop(publisher);
}

#[tokio::test]
async fn a_viewer_that_never_reads_costs_little_kernel_memory() {
    let unsent = 128 * 1024;
    let node = HttpNode::start(ViewerSettings { unsent: Some(unsent), ..settings() }).await;
    let mut publisher = node.publish();
    publisher.push(key_frame(0, 2_000));
    let _dead = node.connect_with("GET /live/movie.flv HTTP/1.1\r\n\r\n", 4 * 1024).await;
    node.eventually("it has joined", |node| node.metrics.viewers.get() == 1).await;
    // 8 MB in steps that a viewer could take, until the kernel takes no more.
    for i in 1..=800u32 {
        publisher.push(inter(i * 5, 10_000));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let taken = node.metrics.bytes.get();
    // One write may exceed the limit by a buffer of the kernel. The client's window is below 64 KiB.
    assert!((10_000..=u64::from(unsent) + 192 * 1024).contains(&taken), "{taken} bytes");
}

#[tokio::test]
async fn server_refuses_too_many_viewers() {
    let node = HttpNode::start(ViewerSettings { max_viewers: 1, ..settings() }).await;
    let _publisher = node.publish();
    let first = node.watch().await;
    let refused = node.ask("GET /live/movie.flv HTTP/1.1\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    drop(first);
    node.eventually("a viewer can join again", |node| node.metrics.viewers.get() == 0).await;
    let again = node.watch().await;
    assert!(again.head.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn server_answers_other_requests() {
    let settings = ViewerSettings { head_timeout: Duration::from_millis(300), ..settings() };
    let node = HttpNode::start(settings).await;
    let _publisher = node.publish();

    let head = node.ask("HEAD /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    let head = node.ask("HEAD /live/none.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 404 ") && head.ends_with("\r\n\r\n"), "{head}");
    let options = node.ask("OPTIONS /live/movie.flv HTTP/1.1\r\nOrigin: y\r\n\r\n").await;
    assert!(options.starts_with("HTTP/1.1 204 ") && options.contains("Allow-Methods"), "{options}");
    let none = node.ask("GET /live/none.flv HTTP/1.1\r\n\r\n").await;
    assert!(
        none.starts_with("HTTP/1.1 404 ") && none.ends_with("the stream live/none is not live"),
        "{none}"
    );
    let post = node.ask("POST /live/movie.flv HTTP/1.1\r\nContent-Length: 0\r\n\r\n").await;
    assert!(post.starts_with("HTTP/1.1 405 "), "{post}");
    let garbage = node.ask("\u{16}\u{3}\u{1}garbage\r\n\r\n").await;
    assert!(garbage.starts_with("HTTP/1.1 400 "), "{garbage}");
    let large = node.ask(&format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(9_000))).await;
    assert!(large.starts_with("HTTP/1.1 431 "), "{large}");
    let slow = node.ask("GET /live/movie.flv HTTP/1.1\r\n").await;
    assert!(slow.starts_with("HTTP/1.1 408 "), "{slow}");

    let health = node.ask("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(health.starts_with("HTTP/1.1 200 ") && health.contains(r#""streams":1"#), "{health}");
    let time = node.ask("GET /stats/time?stream=live/movie HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(time.contains(r#""streamUrl":"live/movie""#), "{time}");
    let missing = node.ask("GET /live/../etc.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(missing.starts_with("HTTP/1.1 404 "), "{missing}");
    node.eventually("no connection is left", |node| node.metrics.connections.get() == 0).await;
    assert_eq!(node.counter("downpour_http_refused_total{reason=\"bad_request\"}"), 3);
    assert_eq!(node.counter("downpour_http_refused_total{reason=\"head_timeout\"}"), 1);
    assert_eq!(node.counter("downpour_http_refused_total{reason=\"not_live\"}"), 2);
}

#[tokio::test]
async fn shutdown_drains_viewers_and_closes_the_rest() {
    let mut node = HttpNode::start(settings()).await;
    let mut publisher = node.publish();
    publisher.push(key_frame(0, 10));
    let mut viewer = node.watch().await;
    let idle = node.connect("").await;
    node.shutdown.cancel();
    eventually("it accepts no connection", || std::net::TcpStream::connect(node.address).is_err())
        .await;
    drop(publisher);
    viewer.expect(&[key_frame(0, 10)]).await;
    assert_eq!(viewer.next().await, None);
    timeout(SOON, &mut node.server).await.expect("the server stops").unwrap();
    drop(idle);
}

fn settings() -> ViewerSettings {
    ViewerSettings::default()
}
