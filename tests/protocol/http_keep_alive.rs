//! HTTP keep-alive, and idle connections.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Router,
    routing::{get, post},
};
use downpour::http::{HttpMetrics, HttpServer, ViewerSettings};
use downpour_hub::{Admission, Hub, LogLimits, Publisher, admission};
use downpour_media::flv::{FlvReader, Tag, TagKind, Tracks};
use prometheus::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

#[tokio::test]
async fn connection_serves_many_requests() {
    let node = Node::start(settings()).await;
    let mut client = node.connect().await;
    for _ in 0..5 {
        client.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(client.answer().await, (200, "well".into()));
        client.send("POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nagain").await;
        assert_eq!(client.answer().await, (200, "again".into()));
        client.send("GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(client.answer().await.0, 404);
    }
    assert_eq!((node.metrics.accepted.get(), node.metrics.connections.get()), (1, 1));
}

#[tokio::test]
async fn second_request_may_play_a_stream() {
    let node = Node::start(settings()).await;
    let mut publisher = node.publish();
    publisher.push(key_frame(0));
    let mut client = node.connect().await;
    client.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(client.answer().await, (200, "well".into()));
    client.send("OPTIONS /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(client.answer().await.0, 204);
    client.send("HEAD /live/none.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(client.head().await.starts_with("HTTP/1.1 404 "));
    client.send("GET /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n").await;
    client.expect_stream(&[key_frame(0)]).await;
    publisher.push(key_frame(40));
    drop(publisher);
    client.expect_end(&[key_frame(40)]).await;
}

#[tokio::test]
async fn server_answers_pipelined_requests_in_order() {
    let requests = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n\
        POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 34\r\n\r\n\
        GET /healthz HTTP/1.1\r\nHost: y\r\n\r\n\
        OPTIONS /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n\
        GET /large HTTP/1.1\r\nHost: x\r\n\r\n\
        GET /live/movie.flv HTTP/1.1\r\nHost: x\r\n\r\n";
    // In one segment, and in segments that end anywhere.
    for len in [requests.len(), 1, 7, 50] {
        let node = Node::start(settings()).await;
        let mut publisher = node.publish();
        publisher.push(key_frame(0));
        let mut client = node.connect().await;
        for part in requests.as_bytes().chunks(len) {
            client.socket.write_all(part).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert_eq!(client.answer().await, (200, "well".into()));
        assert_eq!(client.answer().await.1, "GET /healthz HTTP/1.1\r\nHost: y\r\n\r\n");
        assert_eq!(client.answer().await.0, 204);
        assert_eq!(client.answer().await, (200, large()));
        client.expect_stream(&[key_frame(0)]).await;
    }
}

#[tokio::test]
async fn server_reads_the_next_request_after_a_slowly_read_response() {
    let node = Node::start(settings()).await;
    let mut client = node.connect().await;
    client.send("GET /large HTTP/1.1\r\nHost: x\r\n\r\n").await;
    client.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
    // The server has filled the socket buffers.
    client.socket.readable().await.unwrap();
    assert_eq!(client.answer().await, (200, large()));
    assert_eq!(client.answer().await, (200, "well".into()));
}

#[tokio::test]
async fn server_closes_the_connection_on_request() {
    let node = Node::start(settings()).await;
    for request in [
        "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        "GET /healthz HTTP/1.0\r\n\r\n",
        "OPTIONS /live/movie.flv HTTP/1.1\r\nConnection: close\r\n\r\n",
        "HEAD /live/none.flv HTTP/1.0\r\n\r\n",
        "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    ] {
        let mut client = node.connect().await;
        client.send(request).await;
        let mut answer = Vec::new();
        let read = timeout(DEADLINE, client.socket.read_to_end(&mut answer));
        read.await.unwrap_or_else(|_| panic!("not closed: {request}")).unwrap();
        let answer = String::from_utf8(answer).unwrap().to_lowercase();
        // HTTP/1.0 closes unless the client requests keep-alive.
        let says = answer.contains("connection: close\r\n") || request.contains("HTTP/1.0");
        assert!(says && answer.starts_with("http/1."), "{request}: {answer}");
    }
    node.eventually("all are gone", |node| node.metrics.connections.get() == 0).await;
}

#[tokio::test]
async fn server_does_not_parse_an_unread_body_as_a_request() {
    let node = Node::start(settings()).await;
    let mut client = node.connect().await;
    client.send("GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 46\r\n\r\n").await;
    assert_eq!(client.answer().await, (200, "well".into()));
    // The response was sent before the body, so the connection cannot be reused.
    client.socket.write_all(b"GET /healthz HTTP/1.1\r\nHost: y\r\nContent-A: b\r\n").await.unwrap();
    let mut rest = Vec::new();
    timeout(DEADLINE, client.socket.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"");
}

#[tokio::test]
async fn server_answers_408_to_a_partial_second_request() {
    let head_timeout = Duration::from_millis(100);
    let node = Node::start(ViewerSettings { head_timeout, ..settings() }).await;
    let mut client = node.connect().await;
    client.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(client.answer().await.0, 200);
    client.send("GET /healthz HTTP/1.1\r\n").await;
    assert!(client.head().await.starts_with("HTTP/1.1 408 "));
}

#[tokio::test]
async fn shutdown_closes_idle_connections_at_once() {
    let node = Node::start(settings()).await;
    let mut client = node.connect().await;
    client.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!(client.answer().await.0, 200);
    node.shutdown.cancel();
    assert_eq!(timeout(DEADLINE, client.socket.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
    let grace = timeout(GRACE / 2, node.server).await;
    grace.expect("the server does not wait for its grace").unwrap();
}

#[tokio::test]
async fn idle_connections_of_a_client_do_not_block_healthz() {
    raise_descriptors();
    // As at a cloud: 1024 connections at one time.
    let node = Node::start(ViewerSettings { max_viewers: 0, ..settings() }).await;
    for first_bytes in ["", "GET /healthz HTTP/1.1\r\n", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"]
    {
        let mut idle = Vec::new();
        for _ in 0..1100 {
            let mut client = node.connect().await;
            client.send(first_bytes).await;
            if first_bytes.ends_with("\r\n\r\n") {
                assert_eq!(client.answer().await.0, 200);
            }
            idle.push(client);
        }
        let mut client = node.connect().await;
        let sent = Instant::now();
        client.send("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert_eq!(client.answer().await, (200, "well".into()));
        assert!(sent.elapsed() < Duration::from_secs(2), "{:?}", sent.elapsed());
    }
    assert!(node.metrics.displaced.get() >= 3 * (1101 - 1024), "{}", node.metrics.displaced.get());
}

/// A policy that admits every player, or never decides.
fn admission(hub: &Hub, max_players: usize, stream_wait: Duration) -> Admission {
    let settings = admission::Settings { max_players, stream_wait, ..Default::default() };
    Admission::new(hub.clone(), settings)
}

struct Node {
    address: SocketAddr,
    hub: Hub,
    metrics: HttpMetrics,
    shutdown: CancellationToken,
    server: JoinHandle<()>,
}

impl Node {
    async fn start(settings: ViewerSettings) -> Self {
        let hub = Hub::new(LogLimits { max_bytes: 64 << 20, max_age: 60_000 });
        let admission = admission(&hub, settings.max_viewers, Duration::ZERO);
        let metrics = HttpMetrics::register(&Registry::new()).unwrap();
        let router = Router::new()
            .route("/healthz", get(async || "well"))
            .route("/large", get(async || large()))
            .route("/echo", post(async |body: String| body));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = HttpServer::new(listener, Some(admission), router, settings, metrics.clone());
        let address = server.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(server.run(shutdown.clone(), GRACE));
        Self { address, hub, metrics, shutdown, server }
    }

    fn publish(&self) -> Publisher {
        self.hub.publish("live/movie".parse().unwrap()).unwrap()
    }

    async fn connect(&self) -> Client {
        Client { socket: TcpStream::connect(self.address).await.unwrap() }
    }

    async fn eventually(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(Instant::now() < deadline, "not in time: {what}");
            sleep(Duration::from_millis(5)).await;
        }
    }
}

struct Client {
    socket: TcpStream,
}

impl Client {
    async fn send(&mut self, bytes: &str) {
        self.socket.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// Reads the head of a response.
    async fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let byte = timeout(DEADLINE, self.socket.read_u8()).await.expect("an answer").unwrap();
            head.push(byte);
        }
        String::from_utf8(head).unwrap()
    }

    /// Reads a response with a content length. Returns its status and body.
    async fn answer(&mut self) -> (u16, String) {
        let head = self.head().await.to_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap();
        assert!(!head.contains("connection: close"), "{head}");
        let len = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let mut body = vec![0; len.map_or(0, |len| len.parse().unwrap())];
        let read = self.socket.read_exact(&mut body);
        timeout(DEADLINE, read).await.expect("the whole body").unwrap();
        (status, String::from_utf8(body).unwrap())
    }

    /// Reads the head of a stream and its first tags.
    async fn expect_stream(&mut self, tags: &[Tag]) {
        let head = self.head().await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        let mut tracks = Tracks::default();
        tags.iter().for_each(|tag| tracks.add(tag.kind()));
        let mut flv = tracks.file_header().to_vec();
        tags.iter().for_each(|tag| flv.extend_from_slice(tag.framed()));
        let mut read = vec![0; flv.len()];
        timeout(DEADLINE, self.socket.read_exact(&mut read)).await.expect("tags").unwrap();
        assert_eq!(read, flv);
    }

    /// Reads these tags and the end of the stream.
    async fn expect_end(&mut self, tags: &[Tag]) {
        let mut rest = Vec::new();
        timeout(DEADLINE, self.socket.read_to_end(&mut rest)).await.expect("the end").unwrap();
        let mut reader = FlvReader::new();
        reader.push(&downpour_media::flv::FILE_HEADER);
        reader.push(&rest);
        for tag in tags {
            assert_eq!(reader.next_tag().unwrap().as_ref(), Some(tag));
        }
        assert_eq!(reader.next_tag().unwrap(), None);
        assert!(!reader.is_inside_tag());
    }
}

fn key_frame(timestamp: u32) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[0x17, 1, 0, 0, 0, 9]).unwrap()
}

/// More than the socket buffers hold.
fn large() -> String {
    "large".repeat(2_500_000)
}

/// Both ends of the connections are in this process.
fn raise_descriptors() {
    let limit = libc::rlimit { rlim_cur: 4096, rlim_max: 0 };
    let mut now = limit;
    // SAFETY: both calls get a pointer to a live limit.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut now), 0);
        now.rlim_cur = now.rlim_cur.max(4096).min(now.rlim_max);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const now), 0);
    }
}

fn settings() -> ViewerSettings {
    ViewerSettings::default()
}

const DEADLINE: Duration = Duration::from_secs(30);
/// Longer than any test takes.
const GRACE: Duration = Duration::from_secs(60);
