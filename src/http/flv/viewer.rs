//! One viewer of a live stream: its socket, and how it catches up with the stream.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    time::{Duration, Instant},
};

use prometheus::{IntCounter, IntGauge};
use tokio::{io::Interest, net::TcpStream, task::coop};

use super::super::metrics::HttpMetrics;
use crate::net::Slot;
use downpour_hub::{MaxLag, ReadOutcome, Reader, Stream, ViewerGuard, admission::Playback};
use downpour_media::flv::{Tag, TagKind, Tracks};
use downpour_sys::buffer::{Buffer, BufferMut};

/// Limits of viewers and of HTTP connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewerSettings {
    /// Viewers at one time. It determines the number of connection slots; admission enforces it.
    pub max_viewers: usize,
    /// Connections of one client address that are not viewers, at least 1; `None` is half of all
    /// connections. Loopback addresses have no such limit.
    pub max_connections_per_address: Option<usize>,
    /// The maximum lag of a viewer. Beyond it the viewer skips to the newest key frame.
    pub backlog: MaxLag,
    /// A viewer that reads nothing for this time is closed.
    pub write_timeout: Duration,
    /// Least time between two writes to a viewer that keeps up; zero writes each video frame at once.
    /// A write costs nearly the same whatever its length, so this saves processor time and adds delay
    /// of at most this value. Viewers that join or have fallen behind are not delayed.
    pub merge_write: Duration,
    /// Time in which a connection must send the head of a request.
    pub head_timeout: Duration,
    /// The kernel's send buffer (`SO_SNDBUF`) in bytes; `None` lets the kernel tune it. It limits the
    /// bytes in flight, too.
    pub send_buffer: Option<usize>,
    /// Bytes that the kernel takes for a viewer ahead of what it sends (`TCP_NOTSENT_LOWAT`); `None` is
    /// 1.5 s of the stream. It bounds the kernel memory of a viewer that does not read, and keeps
    /// `backlog` honest. Unlike a small send buffer it does not slow down viewers far away.
    pub unsent: Option<u32>,
}

impl Default for ViewerSettings {
    fn default() -> Self {
        Self {
            max_viewers: 10_000,
            max_connections_per_address: None,
            backlog: MaxLag { max_bytes: u64::MAX, max_ms: 5_000 },
            write_timeout: Duration::from_secs(30),
            merge_write: Duration::ZERO,
            head_timeout: Duration::from_secs(10),
            send_buffer: None,
            unsent: None,
        }
    }
}

/// The client address and the slot of a connection. The connection is counted until this is dropped.
#[derive(Debug)]
pub(in crate::http) struct Connection {
    pub(in crate::http) peer: SocketAddr,
    pub(in crate::http) slot: Slot,
    _counted: Counted,
}

impl Connection {
    pub(in crate::http) fn new(peer: SocketAddr, slot: Slot, metrics: &HttpMetrics) -> Self {
        Self { peer, slot, _counted: Counted::new(&metrics.connections) }
    }
}

/// An admitted viewer, counted until it is dropped. If it is dropped without [`Viewer::close`], it was
/// cut: by a shutdown that did not wait for it, or by a panic.
#[derive(Debug)]
pub(in crate::http) struct Viewer {
    socket: TcpStream,
    connection: Connection,
    stream: ViewerGuard,
    began: Instant,
    /// Bytes of FLV written.
    sent: u64,
    /// `true` once the first tag has been read.
    joined: bool,
    /// Set once the client has closed its sending side: when that was seen, or the last write since.
    half_closed: Option<Instant>,
    /// `true` once its end has been logged.
    logged: bool,
    cut: IntCounter,
    _counted: Counted,
    playback: Playback,
}

impl Viewer {
    pub(in crate::http) fn new(
        socket: TcpStream,
        connection: Connection,
        playback: Playback,
        metrics: &HttpMetrics,
    ) -> Self {
        metrics.viewers_total.inc();
        let stream = playback.stream();
        tracing::debug!(peer = %connection.peer, stream = %stream.key(), "viewer joined");
        Self {
            socket,
            connection,
            stream: stream.viewer(),
            began: Instant::now(),
            sent: 0,
            joined: false,
            half_closed: None,
            logged: false,
            cut: metrics.closed.cut.clone(),
            _counted: Counted::new(&metrics.viewers),
            playback,
        }
    }

    /// Limits the bytes that the kernel holds for this viewer. The speed of the stream is known about a
    /// second after its start, so this is called whenever the viewer has to catch up.
    fn limit_unsent(&self, setting: Option<u32>) {
        let stream = self.stream.stream();
        let bytes = setting.unwrap_or_else(|| {
            match (stream.video_speed() + stream.audio_speed()).saturating_mul(UNSENT_MS) {
                0 => UNSENT_UNKNOWN,
                bytes => bytes.clamp(MIN_UNSENT.into(), MAX_UNSENT.into()) as u32,
            }
        });
        let socket = socket2::SockRef::from(&self.socket);
        if let Err(error) = socket.set_tcp_notsent_lowat(bytes) {
            tracing::debug!(peer = %self.connection.peer, %error, "cannot limit unsent bytes");
        }
    }

    /// Writes the head of the response.
    pub(in crate::http) async fn greet(&self, timeout: Duration) -> Result<(), Closed> {
        write_all(&self.socket, timeout, RESPONSE_HEAD).await
    }

    /// Waits until it is known which kinds of media the stream has. Returns the FLV header that says
    /// so: a player in a browser waits for both if both are flagged, and without end if one is missing.
    pub(in crate::http) async fn file_header(
        &self,
        reader: &mut Reader,
    ) -> Result<WriteQueue, Closed> {
        let mut deadline = std::pin::pin!(tokio::time::sleep(TRACKS_WAIT));
        loop {
            let stream = reader.stream().clone();
            let is_last_chance = deadline.is_elapsed() || stream.ended();
            let tracks = match reader.settled_tracks() {
                None if is_last_chance => Some(reader.tracks()).filter(|it| !it.is_empty()),
                settled => settled,
            };
            if let Some(tracks) = tracks {
                return Ok(WriteQueue::file_header(tracks));
            }
            if stream.ended() {
                return Ok(WriteQueue::file_header(Tracks::BOTH));
            }
            if self.playback.is_revoked() {
                return Err(Closed::Revoked);
            }
            tokio::select! {
                () = reader.woken() => {}
                () = stream.over() => {}
                () = &mut deadline, if !deadline.is_elapsed() => {}
                closed = client_closed(&self.socket) => return Err(closed),
            }
        }
    }

    /// Writes `queue` and then the rest of the log, as fast as the viewer reads. Returns once the
    /// viewer has caught up.
    pub(in crate::http) async fn catch_up(
        &mut self,
        reader: &mut Reader,
        mut queue: WriteQueue,
        settings: &ViewerSettings,
        metrics: &HttpMetrics,
    ) -> Result<(), Closed> {
        self.limit_unsent(settings.unsent);
        loop {
            while !queue.is_done() {
                match self.socket.try_write_vectored(&queue.slices()) {
                    Ok(0) => return Err(Closed::Client),
                    Ok(bytes) => {
                        queue.advance(bytes);
                        self.sent += bytes as u64;
                        metrics.bytes.inc_by(bytes as u64);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        writable(&self.socket, settings.write_timeout).await?;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if self.playback.is_revoked() {
                return Err(Closed::Revoked);
            }
            coop::consume_budget().await;
            match queue.refill(reader, &mut self.joined) {
                ReadOutcome::Read(count) => note_skip(reader.stream(), count.skipped, 1, metrics),
                ReadOutcome::Ended => return Err(Closed::Ended),
                ReadOutcome::Pending if reader.position().is_some() => return Ok(()),
                ReadOutcome::Pending => tokio::select! {
                    () = reader.woken() => {}
                    closed = client_gone(&self.socket) => return Err(closed),
                },
            }
        }
    }

    /// Writes as much of `bytes` as the socket takes without blocking. Returns the number of bytes.
    pub(in crate::http) fn offer(&mut self, bytes: &[u8]) -> Result<usize, Closed> {
        self.check()?;
        match self.socket.try_write(bytes) {
            Ok(0) => Err(Closed::Client),
            Ok(written) => {
                self.sent += written as u64;
                if let Some(since) = &mut self.half_closed {
                    *since = Instant::now();
                }
                Ok(written)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Fails if the client has reset the connection, or has closed its side and got nothing for
    /// [`HALF_CLOSED_WAIT`]. Makes no system call unless the client has closed or sent something.
    ///
    /// A client that closes only its sending side still reads. One that is gone answers the next write
    /// with a reset, which is the only difference.
    pub(in crate::http) fn check(&mut self) -> Result<(), Closed> {
        match self.socket.try_read(&mut [0; 64]) {
            Ok(0) => match self.half_closed.get_or_insert_with(Instant::now).elapsed() {
                silent if silent > HALF_CLOSED_WAIT => Err(Closed::Client),
                _ => Ok(()),
            },
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// As [`Viewer::check`], and fails if the playback was revoked. Not per frame: it reads cold memory.
    pub(in crate::http) fn check_all(&mut self) -> Result<(), Closed> {
        if self.playback.is_revoked() {
            return Err(Closed::Revoked);
        }
        self.check()
    }

    /// Closes the connection, and counts and logs the reason.
    pub(in crate::http) fn close(mut self, reason: &Closed, metrics: &HttpMetrics) {
        metrics.closed.count(reason);
        self.log_end(reason);
    }

    fn log_end(&mut self, reason: &dyn std::fmt::Display) {
        self.logged = true;
        tracing::info!(
            peer = %self.connection.peer,
            stream = %self.stream.stream().key(),
            bytes = self.sent,
            seconds = self.began.elapsed().as_secs(),
            %reason,
            "viewer closed"
        );
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        if !self.logged {
            self.cut.inc();
            self.log_end(&"the node cut the connection");
        }
    }
}

/// Why a viewer is closed.
#[derive(Debug, thiserror::Error)]
pub(in crate::http) enum Closed {
    #[error("the stream ended")]
    Ended,
    #[error("the client closed the connection")]
    Client,
    #[error("the client read nothing in time")]
    Timeout,
    #[error("the playback was revoked")]
    Revoked,
    #[error(transparent)]
    Error(io::Error),
}

impl From<io::Error> for Closed {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted => Self::Client,
            _ => Self::Error(error),
        }
    }
}

/// Tags to write to a socket. They share their bytes with the stream's log.
#[derive(Debug)]
pub(in crate::http) struct WriteQueue {
    tags: Vec<Buffer>,
    /// Number of tags that are written.
    done: usize,
    /// Bytes of the next tag that are written.
    offset: usize,
}

impl WriteQueue {
    /// Nothing to write.
    pub(in crate::http) const EMPTY: Self = Self { tags: Vec::new(), done: 0, offset: 0 };

    /// The FLV header, which precedes the first tag.
    fn file_header(tracks: Tracks) -> Self {
        Self::new(vec![BufferMut::from(&tracks.file_header()[..]).freeze()], 0)
    }

    /// `tags`, of which the first `written` bytes are written.
    pub(in crate::http) fn new(tags: Vec<Buffer>, written: usize) -> Self {
        let mut queue = Self { tags, done: 0, offset: 0 };
        queue.advance(written);
        queue
    }

    /// Replaces the written tags with the next ones from the log.
    fn refill(&mut self, reader: &mut Reader, joined: &mut bool) -> ReadOutcome {
        self.tags.clear();
        (self.done, self.offset) = (0, 0);
        reader.try_read_each(BATCH_BYTES, |_, tag| {
            let first = !std::mem::replace(joined, true);
            self.tags.push(if first { at_zero(tag) } else { tag.framed().clone() });
        })
    }

    fn slices(&self) -> Vec<IoSlice<'_>> {
        let mut written = self.offset;
        let rest = self.tags.iter().skip(self.done).take(MAX_SLICES);
        rest.map(|tag| IoSlice::new(tag.get(std::mem::take(&mut written)..).unwrap_or_default()))
            .collect()
    }

    fn advance(&mut self, written: usize) {
        self.offset += written;
        while let Some(tag) = self.tags.get(self.done)
            && self.offset >= tag.len()
        {
            self.offset -= tag.len();
            self.done += 1;
        }
    }

    fn is_done(&self) -> bool {
        self.done >= self.tags.len()
    }
}

/// Increments a gauge until it is dropped.
#[derive(Debug)]
pub(in crate::http) struct Counted(IntGauge);

impl Counted {
    pub(in crate::http) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts the tags that `viewers` viewers skipped, in total.
pub(in crate::http) fn note_skip(
    stream: &Stream,
    skipped: u64,
    viewers: usize,
    metrics: &HttpMetrics,
) {
    if skipped > 0 {
        stream.count_skipped(skipped);
        metrics.skipped_tags.inc_by(skipped);
        tracing::debug!(
            skipped,
            viewers,
            stream = %stream.key(),
            "viewers skipped tags: they are too slow"
        );
    }
}

/// Writes all of `bytes`. Fails if the peer reads nothing for `timeout`.
pub(in crate::http) async fn write_all(
    socket: &TcpStream,
    timeout: Duration,
    mut bytes: &[u8],
) -> Result<(), Closed> {
    while !bytes.is_empty() {
        match socket.try_write(bytes) {
            Ok(0) => return Err(Closed::Client),
            Ok(written) => bytes = bytes.get(written..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                writable(socket, timeout).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits until the client resets the connection, or for [`HALF_CLOSED_WAIT`] once it has closed its
/// side, see [`Viewer::check`].
async fn client_gone(socket: &TcpStream) -> Closed {
    let closed = client_closed(socket).await;
    tokio::select! {
        () = tokio::time::sleep(HALF_CLOSED_WAIT) => closed,
        closed = client_reset(socket) => closed,
    }
}

/// Waits until the client resets the connection. That it closes its side is no reset.
pub(in crate::http) async fn client_reset(socket: &TcpStream) -> Closed {
    client_closed(socket).await;
    match socket.ready(Interest::ERROR).await {
        Ok(_) => Closed::Client,
        Err(error) => error.into(),
    }
}

/// Waits until the client closes its side. Bytes that it sends meanwhile are ignored.
pub(in crate::http) async fn client_closed(socket: &TcpStream) -> Closed {
    loop {
        if let Err(error) = socket.readable().await {
            return error.into();
        }
        match socket.try_read(&mut [0; 512]) {
            Ok(0) => return Closed::Client,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return error.into(),
        }
    }
}

async fn writable(socket: &TcpStream, timeout: Duration) -> Result<(), Closed> {
    match tokio::time::timeout(timeout, socket.writable()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Closed::Timeout),
    }
}

/// The first tag of a viewer. Metadata gets the timestamp 0, wherever in the stream the viewer joins:
/// FFmpeg takes metadata at any other time for the first packet of a text stream.
fn at_zero(tag: &Tag) -> Buffer {
    match tag.kind() {
        TagKind::Script => tag.with_timestamp(0).framed().clone(),
        TagKind::Audio | TagKind::Video => tag.framed().clone(),
    }
}

/// The head of a live response. The body is not chunked and ends with the connection (RFC 9112 §6.3,
/// rule 8): every player supports that, and it needs no copy.
pub(in crate::http) const RESPONSE_HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n\
    Content-Type: video/x-flv\r\n\
    Cache-Control: no-store\r\n\
    Access-Control-Allow-Origin: *\r\n\
    Connection: close\r\n\r\n";

/// Time without a write after which a viewer that has closed its sending side counts as gone.
const HALF_CLOSED_WAIT: Duration = Duration::from_secs(10);
/// Time of the stream that the kernel may hold unsent, in milliseconds.
pub(in crate::http) const UNSENT_MS: u64 = 1500;
/// Limit of unsent bytes while the speed of a stream is not known: 1.5 s at 1.4 Mbit/s.
const UNSENT_UNKNOWN: u32 = 256 << 10;
const MIN_UNSENT: u32 = 64 << 10;
const MAX_UNSENT: u32 = 16 << 20;
/// The longest time in which a viewer waits for the second kind of media of a stream that has one.
const TRACKS_WAIT: Duration = Duration::from_secs(1);
/// Bytes that a viewer reads from the log at once; whole tags, so it may be more.
const BATCH_BYTES: usize = 64 * 1024;
/// Tags per `writev`. The kernel allows 1024, and most frames need only a few.
const MAX_SLICES: usize = 64;
