//! One viewer of a live stream: a socket, and how it catches up with the stream.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    time::{Duration, Instant},
};

use prometheus::{IntCounter, IntGauge};
use tokio::{net::TcpStream, task::coop};

use super::metrics::HttpMetrics;
use crate::net::Slot;
use downpour_hub::{MaxLag, ReadOutcome, Reader, Stream, ViewerGuard, admission::Playback};
use downpour_media::flv::{FILE_HEADER, Tag, TagKind};
use downpour_sys::buffer::{Buffer, BufferMut};

/// What a viewer may take, and how long it may take for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewerSettings {
    /// How many viewers there may be at a time, which the slots for connections are made for; admission
    /// enforces it.
    pub max_viewers: usize,
    /// How many connections that are no viewer's one client address may have, at least 1; `None` is
    /// half of all connections. Loopback addresses have no such limit.
    pub max_connections_per_address: Option<usize>,
    /// How far a viewer may fall behind before it skips to the newest key frame.
    pub backlog: MaxLag,
    /// A viewer that takes no byte for this long is closed.
    pub write_timeout: Duration,
    /// A viewer that keeps up is written to at most once in this time; zero is with each frame of
    /// video. A write costs nearly the same whatever its length, so this trades delay, as long as
    /// it says at most, for processor time. Who joins or has fallen behind is not held back.
    pub merge_write: Duration,
    /// How long a connection may take to send the head of its request.
    pub head_timeout: Duration,
    /// The kernel's send buffer (`SO_SNDBUF`) in bytes; `None` leaves it to grow by itself. A small
    /// one makes slow viewers skip sooner, and is what they cost in kernel memory.
    pub send_buffer: Option<usize>,
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
        }
    }
}

/// The client's address and the slot of a connection, which is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer: SocketAddr,
    pub(super) slot: Slot,
    _counted: Counted,
}

impl Connection {
    pub(super) fn new(peer: SocketAddr, slot: Slot, metrics: &HttpMetrics) -> Self {
        Self { peer, slot, _counted: Counted::new(&metrics.connections) }
    }
}

/// A viewer who was admitted, counted until it is dropped. One that is dropped without having been
/// closed was cut off: by a shutdown that did not wait for it, or by a bug.
#[derive(Debug)]
pub(super) struct Viewer {
    socket: TcpStream,
    connection: Connection,
    stream: ViewerGuard,
    began: Instant,
    /// Bytes of FLV written.
    sent: u64,
    /// Whether the first tags have been read.
    joined: bool,
    /// Whether it was told why it is no more.
    told: bool,
    cut: IntCounter,
    _counted: Counted,
    playback: Playback,
}

impl Viewer {
    pub(super) fn new(
        socket: TcpStream,
        connection: Connection,
        playback: Playback,
        metrics: &HttpMetrics,
    ) -> Self {
        metrics.viewers_total.inc();
        let stream = playback.stream();
        tracing::debug!(peer = %connection.peer, stream = %stream.key(), "a viewer came");
        Self {
            socket,
            connection,
            stream: stream.viewer(),
            began: Instant::now(),
            sent: 0,
            joined: false,
            told: false,
            cut: metrics.closed.cut.clone(),
            _counted: Counted::new(&metrics.viewers),
            playback,
        }
    }

    /// Writes the response's head, with which the viewer begins.
    pub(super) async fn greet(&self, timeout: Duration) -> Result<(), Closed> {
        write_all(&self.socket, timeout, RESPONSE_HEAD).await
    }

    /// Writes `batch` and then what the log holds, until there is no more, as fast as the viewer
    /// takes it.
    pub(super) async fn catch_up(
        &mut self,
        reader: &mut Reader,
        mut batch: Batch,
        settings: &ViewerSettings,
        metrics: &HttpMetrics,
    ) -> Result<(), Closed> {
        loop {
            while !batch.is_done() {
                match self.socket.try_write_vectored(&batch.slices()) {
                    Ok(0) => return Err(Closed::Client),
                    Ok(bytes) => {
                        batch.advance(bytes);
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
            match batch.refill(reader, &mut self.joined) {
                ReadOutcome::Read(count) => note_skip(reader.stream(), count.skipped, 1, metrics),
                ReadOutcome::Ended => return Err(Closed::Ended),
                ReadOutcome::Pending if reader.position().is_some() => return Ok(()),
                ReadOutcome::Pending => tokio::select! {
                    () = reader.woken() => {}
                    closed = client_closed(&self.socket) => return Err(closed),
                },
            }
        }
    }

    /// Writes what the socket takes of `bytes` at once; tells how much that was.
    pub(super) fn offer(&mut self, bytes: &[u8]) -> Result<usize, Closed> {
        self.check()?;
        match self.socket.try_write(bytes) {
            Ok(0) => Err(Closed::Client),
            Ok(written) => {
                self.sent += written as u64;
                Ok(written)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Looks whether the client has closed its side. Makes no system call unless the client has
    /// closed or sent something.
    pub(super) fn check(&self) -> Result<(), Closed> {
        match self.socket.try_read(&mut [0; 64]) {
            Ok(0) => Err(Closed::Client),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The same, and whether the viewer was revoked: for now and then, since this is in cold memory.
    pub(super) fn check_all(&self) -> Result<(), Closed> {
        if self.playback.is_revoked() {
            return Err(Closed::Revoked);
        }
        self.check()
    }

    /// Closes the connection, and says why.
    pub(super) fn close(mut self, reason: &Closed, metrics: &HttpMetrics) {
        metrics.closed.count(reason);
        self.tell(reason);
    }

    fn tell(&mut self, reason: &dyn std::fmt::Display) {
        self.told = true;
        tracing::info!(
            peer = %self.connection.peer,
            stream = %self.stream.stream().key(),
            bytes = self.sent,
            seconds = self.began.elapsed().as_secs(),
            %reason,
            "a viewer is done"
        );
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        if !self.told {
            self.cut.inc();
            self.tell(&"it was cut off");
        }
    }
}

/// Why a viewer is no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Closed {
    #[error("the stream has ended")]
    Ended,
    #[error("the viewer left")]
    Client,
    #[error("the viewer took nothing for too long")]
    Timeout,
    #[error("the node ended the playback")]
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

/// Tags on their way into a socket. They share their bytes with the stream's log.
#[derive(Debug)]
pub(super) struct Batch {
    tags: Vec<Buffer>,
    /// Tags that are written whole.
    done: usize,
    /// Bytes of the next one that are written.
    offset: usize,
}

impl Batch {
    /// Nothing to write.
    pub(super) const EMPTY: Self = Self { tags: Vec::new(), done: 0, offset: 0 };

    /// What stands in front of the first tag.
    pub(super) fn beginning() -> Self {
        Self::new(vec![BufferMut::from(&FILE_HEADER[..]).freeze()], 0)
    }

    /// `tags`, of which the first `written` bytes need not be written.
    pub(super) fn new(tags: Vec<Buffer>, written: usize) -> Self {
        let mut batch = Self { tags, done: 0, offset: 0 };
        batch.advance(written);
        batch
    }

    /// Takes what comes next from the log, in place of what has been written.
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

/// Raises a gauge as long as it lives.
#[derive(Debug)]
pub(super) struct Counted(IntGauge);

impl Counted {
    pub(super) fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Counts the tags that `viewers` viewers had to leave out, all together.
pub(super) fn note_skip(stream: &Stream, skipped: u64, viewers: usize, metrics: &HttpMetrics) {
    if skipped > 0 {
        stream.count_skipped(skipped);
        metrics.skipped_tags.inc_by(skipped);
        tracing::debug!(
            skipped,
            viewers,
            stream = %stream.key(),
            "viewers are too slow"
        );
    }
}

/// Writes all of `bytes`, giving up when the peer takes none for `timeout`.
pub(super) async fn write_all(
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

/// Waits until the client closes its side. What it sends meanwhile means nothing, and is dropped.
pub(super) async fn client_closed(socket: &TcpStream) -> Closed {
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

/// A viewer's first tag, which if it is metadata has the time 0, wherever in the stream the viewer
/// joins: FFmpeg takes metadata at any other time for the first packet of a stream of text.
fn at_zero(tag: &Tag) -> Buffer {
    match tag.kind() {
        TagKind::Script => tag.with_timestamp(0).framed().clone(),
        TagKind::Audio | TagKind::Video => tag.framed().clone(),
    }
}

/// The head of a live body: unchunked until the connection closes (RFC 9112 §6.3, rule 8), which
/// every player reads and which costs no copy.
pub(super) const RESPONSE_HEAD: &[u8] = b"HTTP/1.1 200 OK\r\n\
    Content-Type: video/x-flv\r\n\
    Cache-Control: no-store\r\n\
    Access-Control-Allow-Origin: *\r\n\
    Connection: close\r\n\r\n";

/// What a viewer takes out of the log at once; whole tags, so it may be more.
const BATCH_BYTES: usize = 64 * 1024;
/// Tags in one `writev`; the kernel takes up to 1024, and few frames need more than a handful.
const MAX_SLICES: usize = 64;
