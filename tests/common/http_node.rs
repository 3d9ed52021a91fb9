//! An HTTP server with a hub, viewers that read tag by tag, and tags to publish.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use downpour::{
    http::{
        HttpMetrics, HttpServer, ViewerSettings,
        api::{self, ApiState},
        readiness::Readiness,
    },
    node::metrics,
};
use downpour_hub::{Admission, Hub, LogLimits, Publisher, admission};
use downpour_media::flv::{FlvReader, Tag, TagKind};
use prometheus::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{SOON, eventually};

/// An edge's HTTP server on a port that the kernel chose, and the hub that it serves.
pub struct HttpNode {
    pub address: SocketAddr,
    pub hub: Hub,
    pub admission: Admission,
    pub metrics: HttpMetrics,
    pub shutdown: CancellationToken,
    pub server: JoinHandle<()>,
    registry: Registry,
}

impl HttpNode {
    /// A node whose players do not wait for a stream that is not live.
    pub async fn start(settings: ViewerSettings) -> Self {
        Self::start_with(settings, Duration::ZERO).await
    }

    /// The same, with players that wait for `stream_wait`.
    pub async fn start_with(settings: ViewerSettings, stream_wait: Duration) -> Self {
        let hub = Hub::new(LogLimits { max_bytes: 64 << 20, max_age: 60_000 });
        let max_players = settings.max_viewers;
        let limits = admission::Settings { max_players, stream_wait, ..Default::default() };
        let admission = Admission::new(hub.clone(), limits);
        let registry = metrics::registry(&admission, None).unwrap();
        let metrics = HttpMetrics::register(&registry).unwrap();
        let router = api::router(ApiState {
            hub: hub.clone(),
            registry: registry.clone(),
            started: Instant::now(),
            readiness: Readiness::default(),
            downstream: None,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server =
            HttpServer::new(listener, Some(admission.clone()), router, settings, metrics.clone());
        let shutdown = CancellationToken::new();
        let server = tokio::spawn(server.run(shutdown.clone(), DRAIN));
        Self { address, hub, admission, metrics, shutdown, server, registry }
    }

    /// Publishes `live/movie`.
    pub fn publish(&self) -> Publisher {
        self.hub.publish("live/movie".parse().unwrap()).unwrap()
    }

    /// Connects and sends a request.
    pub async fn connect(&self, request: &str) -> TcpStream {
        self.connect_with(request, 0).await
    }

    /// The same with a receive buffer of this many bytes, if not 0. With a small one, the server soon
    /// notices that the viewer does not read.
    pub async fn connect_with(&self, request: &str, receive_buffer: u32) -> TcpStream {
        connect(self.address, request, receive_buffer).await
    }

    /// Sends a request, and reads the response until the server closes.
    pub async fn ask(&self, request: &str) -> String {
        let request = request.replacen(" HTTP/1.1\r\n", " HTTP/1.1\r\nConnection: close\r\n", 1);
        let mut socket = self.connect(&request).await;
        let mut answer = Vec::new();
        timeout(SOON, socket.read_to_end(&mut answer)).await.expect("a response").unwrap();
        String::from_utf8(answer).unwrap()
    }

    /// Joins `live/movie`.
    pub async fn watch(&self) -> FlvViewer {
        FlvViewer::of(self.connect(WATCH).await).await
    }

    /// The value of the metric that is printed as `series`, labels included.
    pub fn counter(&self, series: &str) -> u64 {
        let text = metrics::encode(&self.registry).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(series)).unwrap();
        value.trim().parse().unwrap()
    }

    /// Waits until a condition holds.
    pub async fn eventually(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        eventually(what, || condition(self)).await;
    }
}

impl Drop for HttpNode {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Connects, with a receive buffer of this many bytes if not 0, and sends a request.
pub async fn connect(address: SocketAddr, request: &str, receive_buffer: u32) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    if receive_buffer > 0 {
        socket.set_recv_buffer_size(receive_buffer).unwrap();
    }
    let mut socket = timeout(SOON, socket.connect(address)).await.unwrap().unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    socket
}

/// An HTTP-FLV connection that is read tag by tag.
pub struct FlvViewer {
    /// The response up to its body.
    pub head: String,
    /// Reads that returned some of the body.
    pub reads: usize,
    socket: TcpStream,
    reader: FlvReader,
}

impl FlvViewer {
    /// Reads the head of the response.
    pub async fn of(mut socket: TcpStream) -> Self {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(SOON, socket.read_u8()).await.expect("more").unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        Self { head, reads: 0, socket, reader: FlvReader::new() }
    }

    /// The flags of the file header. Call it before anything else is read.
    pub async fn next_flags(&mut self) -> u8 {
        let mut start = [0; 5];
        timeout(SOON, self.socket.read_exact(&mut start)).await.expect("a header").unwrap();
        self.reader.push(&start);
        start[4]
    }

    /// The next tag, or `None` at the end, which must not be inside a tag.
    pub async fn next(&mut self) -> Option<Tag> {
        loop {
            if let Some(tag) = self.reader.next_tag().unwrap() {
                return Some(tag);
            }
            let mut bytes = [0; 64 * 1024];
            match timeout(SOON, self.socket.read(&mut bytes)).await.expect("more").unwrap() {
                0 => {
                    assert!(!self.reader.is_inside_tag(), "the stream ends with a whole tag");
                    return None;
                }
                count => self.reader.push(&bytes[..count]),
            }
            self.reads += 1;
        }
    }

    /// Closes the sending side.
    pub async fn finish_sending(&mut self) {
        self.socket.shutdown().await.unwrap();
    }

    /// Asserts that the next tags are `tags`.
    pub async fn expect(&mut self, tags: &[Tag]) {
        for tag in tags {
            assert_eq!(self.next().await.as_ref(), Some(tag));
        }
    }
}

pub fn metadata(timestamp: u32) -> Tag {
    Tag::new(TagKind::Script, timestamp, b"\x02\0\x0aonMetaData\x05").unwrap()
}

pub fn video_header(timestamp: u32) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[0x17, 0, 0, 0, 0, 1]).unwrap()
}

pub fn audio_header(timestamp: u32) -> Tag {
    Tag::new(TagKind::Audio, timestamp, &[0xaf, 0, 0x12, 0x10]).unwrap()
}

pub fn key_frame(timestamp: u32, len: usize) -> Tag {
    frame(0x17, timestamp, len)
}

pub fn inter(timestamp: u32, len: usize) -> Tag {
    frame(0x27, timestamp, len)
}

pub fn audio(timestamp: u32) -> Tag {
    Tag::new(TagKind::Audio, timestamp, &[0xaf, 1, 7]).unwrap()
}

fn frame(first: u8, timestamp: u32, len: usize) -> Tag {
    let mut body = vec![timestamp as u8; len];
    body[..5].copy_from_slice(&[first, 1, 0, 0, 0]);
    Tag::new(TagKind::Video, timestamp, &body).unwrap()
}

/// A request for the stream of [`HttpNode::publish`].
pub const WATCH: &str = "GET /live/movie.flv HTTP/1.1\r\nHost: edge\r\n\r\n";
/// Time that connections may stay open after the shutdown.
const DRAIN: Duration = Duration::from_millis(300);
