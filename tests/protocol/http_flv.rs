//! HTTP-FLV viewers and the API over real sockets.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use downpour::{
    StreamKey,
    flv::{FlvReader, Tag, TagKind},
    http::{
        HttpMetrics, HttpServer, ViewerSettings,
        api::{EdgeState, edge_router},
    },
    hub::{Backlog, Hub, LogLimits, Publisher},
    metrics,
};
use prometheus::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn a_viewer_starts_at_the_newest_gop_and_is_closed_at_the_end() {
    let node = Node::start(settings()).await;
    let mut publisher = node.publish();
    let mut pushed = Vec::new();
    for tag in [metadata(0), video_header(0), audio_header(0), key_frame(0, 10), inter(40, 10)] {
        publisher.push(tag);
    }
    for tag in [key_frame(80, 70_000), audio(85), inter(120, 10)] {
        publisher.push(tag.clone());
        pushed.push(tag);
    }
    let mut viewer = Viewer::get(&node, "/live/movie.flv").await;
    assert!(viewer.head.starts_with("HTTP/1.1 200 OK\r\n"), "{}", viewer.head);
    for line in ["Content-Type: video/x-flv", "Access-Control-Allow-Origin: *", "Connection: close"]
    {
        assert!(viewer.head.lines().any(|have| have == line), "{}", viewer.head);
    }
    // At any other time than 0, FFmpeg takes metadata for a stream of text.
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
async fn a_viewer_that_comes_early_waits_for_its_stream_and_the_url_serves_again() {
    let node =
        Node::start(ViewerSettings { stream_wait: Duration::from_secs(20), ..settings() }).await;
    let mut early = node.connect("GET /live/movie.flv HTTP/1.0\r\n\r\n").await;
    for round in 0..2 {
        let mut publisher = node.publish();
        publisher.push(key_frame(round, 10));
        let mut viewer = Viewer::of(early).await;
        viewer.expect(&[key_frame(round, 10)]).await;
        drop(publisher);
        assert_eq!(viewer.next().await, None);
        early = node.connect("GET /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    }
}

#[tokio::test]
async fn a_slow_viewer_skips_to_key_frames_and_holds_nobody_up() {
    let settings = ViewerSettings {
        backlog: Backlog { max_ms: 1_000, max_bytes: u64::MAX },
        send_buffer: Some(16 * 1024),
        ..settings()
    };
    let node = Node::start(settings).await;
    let mut publisher = node.publish();
    publisher.push(video_header(0));
    publisher.push(key_frame(0, 4_000));
    let mut slow = node.connect_small("GET /live/movie.flv HTTP/1.1\r\n\r\n").await;
    let head = read_until(&mut slow, b"\r\n\r\n").await;
    assert!(head.starts_with(b"HTTP/1.1 200"));
    let mut fast = Viewer::get(&node, "/live/movie.flv").await;
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
    let mut slow = Viewer { head: String::new(), socket: slow, reader: FlvReader::new() };
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
async fn a_hundred_viewers_see_all_while_one_never_reads() {
    let settings = ViewerSettings {
        write_timeout: Duration::from_millis(500),
        send_buffer: Some(16 * 1024),
        ..settings()
    };
    let node = Node::start(settings).await;
    let mut publisher = node.publish();
    let mut all = vec![key_frame(0, 2_000)];
    publisher.push(all[0].clone());
    let dead = node.connect_small("GET /live/movie.flv HTTP/1.1\r\n\r\n").await;
    let mut viewers = Vec::new();
    for _ in 0..99 {
        let mut viewer = Viewer::get(&node, "/live/movie.flv").await;
        viewer.expect(&all[..1]).await;
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
async fn a_viewer_that_leaves_is_noticed_without_any_tag() {
    let node = Node::start(settings()).await;
    let publisher = node.publish();
    let viewer = Viewer::get(&node, "/live/movie.flv").await;
    node.eventually("it is counted", |_| {
        publisher.stream().counters().viewers.load(std::sync::atomic::Ordering::Relaxed) == 1
    })
    .await;
    drop(viewer);
    node.eventually("it is gone", |node| node.metrics.viewers.get() == 0).await;
    assert_eq!(node.counter("downpour_http_viewers_closed_total{reason=\"client\"}"), 1);
}

#[tokio::test]
async fn one_viewer_too_many_is_told_so() {
    let node = Node::start(ViewerSettings { max_viewers: 1, ..settings() }).await;
    let _publisher = node.publish();
    let first = Viewer::get(&node, "/live/movie.flv").await;
    let refused = node.ask("GET /live/movie.flv HTTP/1.1\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    drop(first);
    node.eventually("there is room again", |node| node.metrics.viewers.get() == 0).await;
    let again = Viewer::get(&node, "/live/movie.flv").await;
    assert!(again.head.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn what_is_no_viewer_gets_a_clear_answer() {
    let settings = ViewerSettings { head_timeout: Duration::from_millis(300), ..settings() };
    let node = Node::start(settings).await;
    let _publisher = node.publish();

    let head = node.ask("HEAD /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.ends_with("\r\n\r\n"), "{head}");
    let head = node.ask("HEAD /live/none.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 404 ") && head.ends_with("\r\n\r\n"), "{head}");
    let options = node.ask("OPTIONS /live/movie.flv HTTP/1.1\r\nOrigin: y\r\n\r\n").await;
    assert!(options.starts_with("HTTP/1.1 204 ") && options.contains("Allow-Methods"), "{options}");
    let none = node.ask("GET /live/none.flv HTTP/1.1\r\n\r\n").await;
    assert!(
        none.starts_with("HTTP/1.1 404 ") && none.ends_with("The stream live/none is not live."),
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
async fn shutting_down_lets_viewers_finish_and_cuts_the_rest() {
    let node = Node::start(settings()).await;
    let mut publisher = node.publish();
    publisher.push(key_frame(0, 10));
    let mut viewer = Viewer::get(&node, "/live/movie.flv").await;
    let idle = node.connect("").await;
    node.shutdown.cancel();
    node.eventually_async("it accepts no more", async || {
        TcpStream::connect(node.address).await.is_err()
    })
    .await;
    drop(publisher);
    viewer.expect(&[key_frame(0, 10)]).await;
    assert_eq!(viewer.next().await, None);
    timeout(DEADLINE, node.server).await.expect("the server stops").unwrap();
    drop(idle);
}

struct Node {
    address: SocketAddr,
    hub: Hub,
    metrics: HttpMetrics,
    registry: Registry,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
}

impl Node {
    async fn start(settings: ViewerSettings) -> Self {
        let hub = Hub::new(LogLimits { max_bytes: 64 << 20, max_age: 60_000 });
        let registry = metrics::registry(hub.clone(), None).unwrap();
        let metrics = HttpMetrics::register(&registry).unwrap();
        let router = edge_router(EdgeState {
            hub: hub.clone(),
            registry: registry.clone(),
            started: Instant::now(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server =
            HttpServer::new(listener, Some(hub.clone()), router, settings, metrics.clone());
        let address = server.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(server.run(shutdown.clone(), Duration::from_millis(300)));
        Self { address, hub, metrics, registry, shutdown, server }
    }

    fn publish(&self) -> Publisher {
        let key: StreamKey = "live/movie".parse().unwrap();
        self.hub.publish(key).unwrap()
    }

    async fn connect(&self, request: &str) -> TcpStream {
        let mut socket = TcpStream::connect(self.address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        socket
    }

    /// Connects with a receive buffer so small that the server notices who does not read.
    async fn connect_small(&self, request: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 * 1024).unwrap();
        let mut socket = socket.connect(self.address).await.unwrap();
        socket.write_all(request.as_bytes()).await.unwrap();
        socket
    }

    /// The whole answer to a request, until the server closes.
    async fn ask(&self, request: &str) -> String {
        let mut socket = self.connect(request).await;
        let mut answer = Vec::new();
        timeout(DEADLINE, socket.read_to_end(&mut answer)).await.expect("an answer").unwrap();
        String::from_utf8(answer).unwrap()
    }

    fn counter(&self, series: &str) -> u64 {
        let text = metrics::encode(&self.registry).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(series)).unwrap();
        value.trim().parse().unwrap()
    }

    async fn eventually(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        self.eventually_async(what, async || condition(self)).await;
    }

    async fn eventually_async(&self, what: &str, condition: impl AsyncFn() -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition().await {
            assert!(Instant::now() < deadline, "not in time: {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

struct Viewer {
    head: String,
    socket: TcpStream,
    reader: FlvReader,
}

impl Viewer {
    async fn get(node: &Node, path: &str) -> Self {
        let request = format!("GET {path} HTTP/1.1\r\nHost: edge\r\n\r\n");
        Self::of(node.connect(&request).await).await
    }

    async fn of(mut socket: TcpStream) -> Self {
        let head = read_until(&mut socket, b"\r\n\r\n").await;
        let head = String::from_utf8(head).unwrap();
        Self { head, socket, reader: FlvReader::new() }
    }

    async fn next(&mut self) -> Option<Tag> {
        loop {
            if let Some(tag) = self.reader.next_tag().unwrap() {
                return Some(tag);
            }
            let mut bytes = [0; 64 * 1024];
            match timeout(DEADLINE, self.socket.read(&mut bytes)).await.expect("more").unwrap() {
                0 => {
                    assert!(!self.reader.is_inside_tag(), "the stream ends with a whole tag");
                    return None;
                }
                count => self.reader.push(&bytes[..count]),
            }
        }
    }

    async fn expect(&mut self, tags: &[Tag]) {
        for tag in tags {
            assert_eq!(self.next().await.as_ref(), Some(tag));
        }
    }
}

async fn read_until(socket: &mut TcpStream, end: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(end) {
        let byte = timeout(DEADLINE, socket.read_u8()).await.expect("more").unwrap();
        bytes.push(byte);
    }
    bytes
}

fn settings() -> ViewerSettings {
    ViewerSettings { stream_wait: Duration::ZERO, ..ViewerSettings::default() }
}

fn metadata(timestamp: u32) -> Tag {
    Tag::new(TagKind::Script, timestamp, b"\x02\0\x0aonMetaData\x05").unwrap()
}

fn video_header(timestamp: u32) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[0x17, 0, 0, 0, 0, 1]).unwrap()
}

fn audio_header(timestamp: u32) -> Tag {
    Tag::new(TagKind::Audio, timestamp, &[0xaf, 0, 0x12, 0x10]).unwrap()
}

fn key_frame(timestamp: u32, len: usize) -> Tag {
    frame(0x17, timestamp, len)
}

fn inter(timestamp: u32, len: usize) -> Tag {
    frame(0x27, timestamp, len)
}

fn frame(first: u8, timestamp: u32, len: usize) -> Tag {
    let mut body = vec![timestamp as u8; len];
    body[..5].copy_from_slice(&[first, 1, 0, 0, 0]);
    Tag::new(TagKind::Video, timestamp, &body).unwrap()
}

fn audio(timestamp: u32) -> Tag {
    Tag::new(TagKind::Audio, timestamp, &[0xaf, 1, 7]).unwrap()
}

const DEADLINE: Duration = Duration::from_secs(20);
