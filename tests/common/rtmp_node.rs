//! An RTMP server that records its publications, and an encoder that sends arbitrary messages.

use std::{
    collections::HashMap,
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    path::Path,
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use bytes::BytesMut;
use downpour::rtmp::{
    ServerMetrics,
    listener::{Server, ServerSettings},
};
use downpour_hub::{
    Admission, Hub, LogLimits, Sink, Stream, Tap,
    admission::{self, Decision, Policy, Refusal, Request},
};
use downpour_media::{
    StreamKey,
    amf0::{Decoder, Value},
    flv::Tag,
};
use downpour_rtmp::{
    chunk::{COMMAND_AMF0, ChunkReader, ChunkWriter, MessageHead},
    url::RtmpUrl,
};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio_util::sync::CancellationToken;

use super::{SOON, eventually};

/// A server with a [`Recorder`] behind it, stopped when dropped.
pub struct RtmpServer {
    pub addr: SocketAddr,
    /// Decides for the server; other sources share its hub.
    pub admission: Admission,
    pub recorder: Arc<Recorder>,
    pub shutdown: CancellationToken,
    pub task: Option<tokio::task::JoinHandle<()>>,
    registry: Registry,
}

impl RtmpServer {
    pub fn start(settings: ServerSettings) -> Self {
        let registry = Registry::new();
        let server = Server::bind("127.0.0.1:0".parse().unwrap(), settings)
            .unwrap()
            .with_metrics(ServerMetrics::register(&registry).unwrap());
        let addr = server.local_addr().unwrap();
        let (recorder, shutdown) = (Arc::new(Recorder::default()), CancellationToken::new());
        let hub = Hub::new(LogLimits { max_bytes: 0, max_age: 0 });
        let handler = Arc::new(Handler(recorder.clone()));
        hub.add_sink(handler.clone());
        let limits = admission::Settings { max_streams: usize::MAX, ..Default::default() };
        let admission = Admission::new(hub, limits);
        admission.add_policy(handler);
        let task = tokio::spawn(server.run(admission.clone(), shutdown.clone()));
        Self { addr, admission, recorder, shutdown, task: Some(task), registry }
    }

    pub fn url(&self, path: &str) -> RtmpUrl {
        format!("rtmp://{}/{path}", self.addr).parse().unwrap()
    }

    /// The value of the metric that is printed as `name`, labels included.
    pub fn metric(&self, name: &str) -> f64 {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
            .unwrap_or_else(|| panic!("no metric {name} in\n{text}"))
    }

    /// Waits until a metric has a value.
    pub async fn metric_reaches(&self, name: &str, value: f64) {
        eventually(name, || self.metric(name) == value).await;
    }
}

impl Drop for RtmpServer {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// Records the publications of each key.
#[derive(Default)]
pub struct Recorder {
    streams: Mutex<HashMap<String, Vec<Recorded>>>,
    /// Query and revocation of the newest request per key.
    requests: Mutex<HashMap<String, (String, CancellationToken)>>,
}

/// One publication.
pub struct Recorded {
    pub tags: Vec<Tag>,
    pub query: String,
    pub kick: CancellationToken,
    pub ended: bool,
}

impl Recorder {
    /// All publications of a key so far.
    pub fn recorded<T>(&self, key: &str, f: impl FnOnce(&[Recorded]) -> T) -> T {
        f(self.lock().get(key).map_or(&[][..], Vec::as_slice))
    }

    /// Ends the first publication of `key` once its stream has started.
    pub async fn kick(&self, key: &str) {
        let started = |all: &[Recorded]| all.first().map(|first| first.kick.clone());
        eventually("the publication", || self.recorded(key, started).is_some()).await;
        self.recorded(key, started).expect("it has started").cancel();
    }

    /// Waits until `count` publications of `key` have ended, and returns the tags of the last.
    pub async fn ended(&self, key: &str, count: usize) -> Vec<Tag> {
        let done = |recorded: &[Recorded]| recorded.iter().filter(|r| r.ended).count() >= count;
        eventually("the publication's end", || self.recorded(key, done)).await;
        self.recorded(key, |recorded| recorded[count - 1].tags.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Vec<Recorded>>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The policy and the sink of the server.
struct Handler(Arc<Recorder>);

/// The tap of a publication.
struct Recording(Arc<Recorder>, StreamKey, usize);

impl Policy for Handler {
    fn decide<'a>(&'a self, request: &'a Request) -> Decision<'a> {
        let decided = match request.query.contains("denied") {
            true => Err(Refusal::Unauthorized("not you".into())),
            false => Ok(()),
        };
        assert!(!request.key.name().starts_with("panic"), "a panic for a test");
        let revoked = request.revoked.clone().expect("encoders can be revoked");
        let asked = (request.query.clone(), revoked);
        self.0.requests.lock().unwrap().insert(request.key.to_string(), asked);
        Box::pin(async move { decided })
    }
}

impl Sink for Handler {
    fn stream_up(&self, stream: &Arc<Stream>) -> Option<Box<dyn Tap>> {
        let key = stream.key();
        // Streams of other sources are not recorded.
        let (query, kick) = self.0.requests.lock().unwrap().get(key.as_str())?.clone();
        let mut streams = self.0.lock();
        let recorded = streams.entry(key.to_string()).or_default();
        assert!(recorded.last().is_none_or(|last| last.ended), "one publisher at a time");
        let index = recorded.len();
        recorded.push(Recorded { tags: Vec::new(), query, kick, ended: false });
        Some(Box::new(Recording(self.0.clone(), key.clone(), index)))
    }
}

impl Recording {
    fn with(&self, f: impl FnOnce(&mut Recorded)) {
        let mut streams = self.0.lock();
        if let Some(recorded) =
            streams.get_mut(&self.1.to_string()).and_then(|all| all.get_mut(self.2))
        {
            f(recorded);
        }
    }
}

impl Tap for Recording {
    fn push(&mut self, _: Instant, tag: &Tag) {
        self.with(|recorded| recorded.tags.push(tag.clone()));
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.with(|recorded| recorded.ended = true);
    }
}

/// Runs ffmpeg off the runtime's threads.
pub async fn ffmpeg(arguments: &[&str]) -> Output {
    let mut command = ffmpeg_command(arguments);
    tokio::task::spawn_blocking(move || command.output().expect("ffmpeg runs")).await.unwrap()
}

pub fn ffmpeg_command(arguments: &[&str]) -> Command {
    let mut command = Command::new("ffmpeg");
    command.args(["-hide_banner", "-nostdin", "-y"]).args(arguments).stdin(Stdio::null());
    command
}

/// Two seconds of H.264 and AAC as an FLV file.
pub async fn make_flv(path: &Path) {
    let output = ffmpeg(&[
        "-f",
        "lavfi",
        "-i",
        "testsrc=size=320x180:rate=25",
        "-f",
        "lavfi",
        "-i",
        "sine=frequency=440:sample_rate=44100",
        "-t",
        "2",
        "-c:v",
        "libx264",
        "-preset",
        "ultrafast",
        "-g",
        "25",
        "-c:a",
        "aac",
        "-f",
        "flv",
        path.to_str().unwrap(),
    ])
    .await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A client that writes chunks directly.
pub struct RawEncoder {
    pub stream: TcpStream,
    pub writer: ChunkWriter,
    pub out: BytesMut,
}

impl RawEncoder {
    /// Connects and completes the handshake.
    pub fn connect(addr: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(&SIMPLE_HANDSHAKE).unwrap();
        stream.read_exact(&mut [0; 1 + 2 * 1536]).unwrap();
        Self { stream, writer: ChunkWriter::new(), out: BytesMut::new() }
    }

    /// Publishes, and reads all answers.
    pub fn publish(addr: SocketAddr, app: &str, name: &str) -> Self {
        let mut encoder = Self::connect(addr);
        encoder.command(0, "connect", 1.0, &[Value::object([("app", app.into())])]);
        encoder.command(0, "createStream", 2.0, &[Value::Null]);
        encoder.command(1, "publish", 3.0, &[Value::Null, name.into(), "live".into()]);
        encoder.send().unwrap();
        let mut codes = encoder.statuses();
        assert_eq!(codes.next().as_deref(), Some("NetStream.Publish.Start"));
        drop(codes);
        encoder
    }

    pub fn command(&mut self, stream_id: u32, name: &str, id: f64, arguments: &[Value]) {
        let mut body = BytesMut::new();
        Value::from(name).encode(&mut body).unwrap();
        Value::from(id).encode(&mut body).unwrap();
        for argument in arguments {
            argument.encode(&mut body).unwrap();
        }
        let head = MessageHead { kind: COMMAND_AMF0, stream_id, timestamp: 0 };
        self.writer.write(3, head, &body, &mut self.out).unwrap();
    }

    pub fn message(&mut self, kind: u8, timestamp: u32, body: &[u8]) {
        let head = MessageHead { kind, stream_id: 1, timestamp };
        self.writer.write(4, head, body, &mut self.out).unwrap();
    }

    /// Sends the written chunks.
    pub fn send(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.out.split())
    }

    /// The codes of the `onStatus` messages until the server closes.
    pub fn statuses(&mut self) -> impl Iterator<Item = String> {
        let mut reader = ChunkReader::new(Tag::MAX_BODY_LEN);
        let mut buffer = BytesMut::new();
        let stream = &mut self.stream;
        std::iter::from_fn(move || {
            loop {
                let mut rest = &buffer[..];
                let message = reader.read(&mut rest).unwrap();
                let used = buffer.len() - rest.len();
                drop(buffer.split_to(used));
                let Some(message) = message else {
                    let mut bytes = [0; 4096];
                    let len = stream.read(&mut bytes).ok().filter(|len| *len > 0)?;
                    buffer.extend_from_slice(&bytes[..len]);
                    continue;
                };
                let values: Vec<Value> =
                    Decoder::new(message.body()).map_while(Result::ok).collect();
                if values.first().and_then(Value::as_str) == Some("onStatus") {
                    return Some(values[3].property("code")?.as_str()?.to_owned());
                }
            }
        })
    }

    /// `true` if the server closes the connection within [`SOON`].
    pub fn is_closed(&mut self) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == ErrorKind::ConnectionReset,
            }
        }
    }

    pub fn hang_up(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// C0, C1 without digest, C2.
pub const SIMPLE_HANDSHAKE: [u8; 1 + 2 * 1536] = {
    let mut bytes = [0; 1 + 2 * 1536];
    bytes[0] = 3;
    bytes
};
