//! Viewers of one stream that share a group, leave it when they fall behind, and rejoin. Each one
//! receives the log byte by byte, except for skips, which are counted.

use std::{
    net::SocketAddr,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use crate::common::http_node::{
    HttpNode, WATCH, audio, audio_header, connect, inter, key_frame, video_header,
};
use downpour::http::ViewerSettings;
use downpour_hub::MaxLag;
use downpour_media::flv::{FlvReader, Tag};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    io::AsyncReadExt,
    task::JoinSet,
    time::{sleep, timeout},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_file_header_flags_the_media_that_the_stream_has() {
    let node = HttpNode::start(ViewerSettings::default()).await;
    let begin = |first: Vec<Tag>| {
        let mut publisher = node.publish();
        first.into_iter().for_each(|tag| publisher.push(tag));
        publisher
    };
    // Video alone, joined at the start: audio gets a second. It is sent if it comes later.
    let mut publisher = begin(vec![video_header(0), key_frame(0, 100)]);
    let mut viewer = node.watch().await;
    assert_eq!(viewer.next_flags().await, 1);
    viewer.expect(&[video_header(0), key_frame(0, 100)]).await;
    publisher.push(audio_header(2_000));
    publisher.push(audio(2_000));
    publisher.push(inter(2_000, 100));
    viewer.expect(&[audio_header(2_000), audio(2_000), inter(2_000, 100)]).await;
    drop(publisher);
    // Audio alone, and a header that announces audio.
    let audio_alone = (0..60).map(|i| audio(i * 23)).collect();
    for (tags, flags) in [(audio_alone, 4), (vec![audio_header(0), key_frame(0, 100)], 5)] {
        let _publisher = begin(tags);
        assert_eq!(node.watch().await.next_flags().await, flags);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn viewers_of_every_speed_receive_the_log() {
    every_speed(ViewerSettings::default(), 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn viewers_of_every_speed_receive_the_log_with_merged_writes() {
    let merge_write = Duration::from_millis(30);
    every_speed(ViewerSettings { merge_write, ..ViewerSettings::default() }, 2).await;
}

/// 300 viewers, more than a group, with random receive buffers and speeds, join one after the other
/// during the stream.
async fn every_speed(settings: ViewerSettings, seed: u64) {
    let settings = ViewerSettings {
        backlog: MaxLag { max_ms: 2_000, max_bytes: u64::MAX },
        send_buffer: Some(8 * 1024),
        ..settings
    };
    let node = HttpNode::start(settings).await;
    let mut publisher = node.publish();
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut pushed = vec![video_header(0), audio_header(0)];
    pushed.iter().for_each(|tag| publisher.push(tag.clone()));
    let mut viewers = JoinSet::new();
    for frame in 0..600u32 {
        for tag in tags_of(frame, &mut rng) {
            publisher.push(tag.clone());
            pushed.push(tag);
        }
        if frame % 2 == 0 {
            let (address, seed) = (node.address, rng.random());
            viewers.spawn(async move { watch(address, seed).await });
        }
        sleep(Duration::from_millis(3)).await;
    }
    node.eventually("all have joined", |node| node.metrics.viewers_total.get() == 300).await;
    drop(publisher);
    let mut skipped = 0;
    let mut whole = 0;
    while let Some(viewer) = viewers.join_next().await {
        let gaps = follow(&pushed, &viewer.unwrap());
        skipped += gaps;
        whole += usize::from(gaps == 0);
    }
    node.eventually("all are gone", |node| node.metrics.connections.get() == 0).await;
    assert_eq!(node.metrics.viewers_total.get(), 300);
    assert_eq!(node.metrics.skipped_tags.get(), skipped);
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"ended\"}"), 300);
    // The test needs both slow and fast viewers.
    assert!(skipped > 0 && whole > 50, "{skipped} skipped, {whole} whole");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_releases_thousands_of_closed_viewers() {
    let node = HttpNode::start(ViewerSettings::default()).await;
    let mut publisher = node.publish();
    publisher.push(video_header(0));
    let pushing = tokio::spawn(async move {
        let mut rng = SmallRng::seed_from_u64(3);
        for frame in 0.. {
            tags_of(frame, &mut rng).into_iter().for_each(|tag| publisher.push(tag));
            sleep(Duration::from_millis(5)).await;
        }
    });
    let mut rng = SmallRng::seed_from_u64(4);
    for _ in 0..10 {
        let mut crowd = JoinSet::new();
        for _ in 0..300 {
            let (address, bytes) = (node.address, rng.random_range(0..30_000usize));
            crowd.spawn(async move {
                let mut socket = connect(address, WATCH, 0).await;
                let mut read = 0;
                let mut buffer = [0; 4096];
                while read < bytes {
                    let count = timeout(DEADLINE, socket.read(&mut buffer)).await.unwrap().unwrap();
                    assert!(count > 0, "closed");
                    read += count;
                }
            });
        }
        while let Some(viewer) = crowd.join_next().await {
            viewer.unwrap();
        }
    }
    node.eventually("all are gone", |node| node.metrics.connections.get() == 0).await;
    assert_eq!(node.metrics.viewers.get(), 0);
    let stream = node.hub.stream("live/movie").unwrap();
    assert_eq!(stream.counters().viewers.load(Ordering::Relaxed), 0);
    // Another viewer receives the stream like the first.
    let mut last = node.connect(WATCH).await;
    let mut buffer = [0; 64];
    assert!(timeout(DEADLINE, last.read(&mut buffer)).await.unwrap().unwrap() > 0);
    pushing.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_sends_the_last_audio_before_a_stall() {
    let mut node = HttpNode::start(ViewerSettings::default()).await;
    let mut publisher = node.publish();
    publisher.push(video_header(0));
    publisher.push(key_frame(0, 100));
    let mut viewer = node.watch().await;
    for tag in [video_header(0), key_frame(0, 100)] {
        assert_eq!(viewer.next().await, Some(tag));
    }
    // A viewer that has caught up belongs to a group, which wakes for video frames and not for audio.
    let in_a_group =
        |node: &HttpNode| node.metrics.viewers.get() == 1 && node.metrics.viewers_behind.get() == 0;
    node.eventually("it is in a group", in_a_group).await;
    publisher.push(inter(40, 100));
    assert_eq!(viewer.next().await, Some(inter(40, 100)));
    publisher.push(audio(45));
    let began = Instant::now();
    assert_eq!(viewer.next().await, Some(audio(45)));
    assert!(in_a_group(&node), "it left the group");
    assert!(began.elapsed() < Duration::from_secs(5));
    // A shutdown closes viewers of a group, too.
    node.shutdown.cancel();
    timeout(DEADLINE, &mut node.server).await.expect("the server stops").unwrap();
    assert_eq!(node.metrics.viewers.get(), 0);
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"cut\"}"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropped_server_closes_its_viewers() {
    let node = HttpNode::start(ViewerSettings::default()).await;
    let mut publisher = node.publish();
    publisher.push(video_header(0));
    publisher.push(key_frame(0, 100));
    let mut viewer = node.watch().await;
    for tag in [video_header(0), key_frame(0, 100)] {
        assert_eq!(viewer.next().await, Some(tag));
    }
    node.server.abort();
    assert_eq!(viewer.next().await, None);
    node.eventually("no viewer is counted", |node| node.metrics.viewers.get() == 0).await;
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"cut\"}"), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn merged_writes_are_few_and_do_not_delay_the_end() {
    let merge_write = Duration::from_secs(2);
    let node = HttpNode::start(ViewerSettings { merge_write, ..ViewerSettings::default() }).await;
    let mut publisher = node.publish();
    publisher.push(video_header(0));
    publisher.push(key_frame(0, 100));
    let mut viewers = Vec::new();
    for _ in 0..20 {
        let mut viewer = node.watch().await;
        for tag in [video_header(0), key_frame(0, 100)] {
            assert_eq!(viewer.next().await, Some(tag));
        }
        viewers.push(viewer);
    }
    // Less than a period, so there is at most one write for it and one at the end.
    let began = Instant::now();
    for i in 1..=100 {
        publisher.push(inter(i * 40, 100));
        sleep(Duration::from_millis(5)).await;
    }
    let pushed = began.elapsed();
    drop(publisher);
    for mut viewer in viewers {
        for i in 1..=100 {
            assert_eq!(viewer.next().await, Some(inter(i * 40, 100)));
        }
        assert_eq!(viewer.next().await, None);
        if pushed < Duration::from_millis(1900) {
            assert!(viewer.reads <= 6, "{} reads", viewer.reads);
        }
    }
}

/// Reads as a viewer of some speed until the end.
async fn watch(address: SocketAddr, seed: u64) -> Vec<Tag> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let slow = rng.random_bool(0.4);
    let buffer = if slow { rng.random_range(2..16) * 1024 } else { 0 };
    let mut socket = connect(address, WATCH, buffer).await;
    let mut bytes = Vec::new();
    let mut piece = vec![0; rng.random_range(100..40_000)];
    loop {
        if slow && rng.random_bool(0.05) {
            sleep(Duration::from_millis(rng.random_range(0..400))).await;
        }
        match timeout(DEADLINE, socket.read(&mut piece)).await.expect("more").unwrap() {
            0 => break,
            count => bytes.extend_from_slice(&piece[..count]),
        }
    }
    let body = bytes.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
    let mut reader = FlvReader::new();
    reader.push(&bytes[body..]);
    let tags = std::iter::from_fn(|| reader.next_tag().unwrap()).collect();
    assert!(!reader.is_inside_tag(), "the stream ends with a whole tag");
    tags
}

/// Asserts that a viewer received the pushed tags up to the end, with skips to key frames. Returns the
/// number of tags that it missed since it joined.
fn follow(pushed: &[Tag], got: &[Tag]) -> u64 {
    let mut got = got.iter().skip_while(|tag| tag.is_sequence_header());
    let first = got.next().expect("a key frame");
    assert!(first.is_key_frame());
    let mut next = pushed.iter().position(|tag| tag == first).unwrap() + 1;
    let mut missing = 0;
    for tag in got {
        let ahead = pushed[next..].iter().position(|other| other == tag).expect("out of order");
        assert!(ahead == 0 || tag.is_key_frame(), "{tag:?} after a gap");
        missing += ahead as u64;
        next += ahead + 1;
    }
    // The stream may end while the viewer is over its backlog, without another key frame to skip to.
    assert_eq!(next, pushed.len(), "the end is missing");
    missing
}

/// The tags of a frame, audio first. Every 25th frame is a key frame.
fn tags_of(number: u32, rng: &mut SmallRng) -> Vec<Tag> {
    let at = number * 40 + 1;
    let mut tags: Vec<_> = (0..rng.random_range(0..4)).map(|i| audio(at + i)).collect();
    tags.push(match number % 25 {
        0 => key_frame(at, rng.random_range(6_000..30_000)),
        _ => inter(at, rng.random_range(10..3_000)),
    });
    tags
}

const DEADLINE: Duration = Duration::from_secs(30);
