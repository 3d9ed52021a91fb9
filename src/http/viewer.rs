//! One viewer of a live stream: a cursor and a socket.

use std::{
    io::{self, IoSlice},
    time::Duration,
};

use prometheus::{
    IntCounter, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};
use tokio::net::TcpStream;

use crate::{
    flv::{FILE_HEADER, Tag, TagKind},
    hub::{Backlog, Reader},
};

/// What a viewer may take, and how long it may take for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewerSettings {
    /// How many viewers there may be at a time; one more is answered with 503.
    pub max_viewers: usize,
    /// How long a viewer waits for a stream that is not live before it is answered with 404.
    pub stream_wait: Duration,
    /// How far a viewer may fall behind before it skips to the newest key frame.
    pub backlog: Backlog,
    /// A viewer that takes no byte for this long is closed.
    pub write_timeout: Duration,
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
            stream_wait: Duration::from_secs(2),
            backlog: Backlog { max_bytes: u64::MAX, max_ms: 5_000 },
            write_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(10),
            send_buffer: None,
        }
    }
}

/// What HTTP connections and viewers do.
#[derive(Debug, Clone)]
pub struct HttpMetrics {
    /// Connections now, viewers included.
    pub connections: IntGauge,
    /// Viewers now.
    pub viewers: IntGauge,
    /// Viewers that were ever admitted.
    pub viewers_total: IntCounter,
    /// Bytes of FLV written to viewers; up to 64 KiB a viewer late.
    pub bytes: IntCounter,
    /// Tags that viewers skipped because they were too slow.
    pub skipped_tags: IntCounter,
    /// Failures to accept a connection, as for want of file descriptors.
    pub accept_errors: IntCounter,
    pub(super) closed: ClosedCounters,
    pub(super) refused: RefusedCounters,
}

#[derive(Debug, Clone)]
pub(super) struct ClosedCounters {
    ended: IntCounter,
    client: IntCounter,
    timeout: IntCounter,
    error: IntCounter,
}

#[derive(Debug, Clone)]
pub(super) struct RefusedCounters {
    pub(super) not_live: IntCounter,
    pub(super) viewers_full: IntCounter,
    pub(super) connections_full: IntCounter,
    pub(super) bad_request: IntCounter,
    pub(super) head_timeout: IntCounter,
}

impl HttpMetrics {
    /// Makes and registers the metrics.
    ///
    /// # Errors
    /// If their names are taken in `registry`.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let gauge =
            |name: &str, help: &str| register_int_gauge_with_registry!(name, help, registry);
        let closed = register_int_counter_vec_with_registry!(
            Opts::new("downpour_http_viewers_closed_total", "Viewers that left, by reason."),
            &["reason"],
            registry
        )?;
        let refused = register_int_counter_vec_with_registry!(
            Opts::new("downpour_http_refused_total", "Requests refused, by reason."),
            &["reason"],
            registry
        )?;
        Ok(Self {
            connections: gauge("downpour_http_connections", "HTTP connections now.")?,
            viewers: gauge("downpour_http_viewers", "HTTP-FLV viewers now.")?,
            viewers_total: counter("downpour_http_viewers_total", "Viewers ever admitted.")?,
            bytes: counter("downpour_http_viewer_bytes_total", "Bytes of FLV sent to viewers.")?,
            skipped_tags: counter(
                "downpour_http_skipped_tags_total",
                "Tags that slow viewers skipped.",
            )?,
            accept_errors: counter(
                "downpour_http_accept_errors_total",
                "Connections that could not be accepted.",
            )?,
            closed: ClosedCounters {
                ended: closed.with_label_values(&["ended"]),
                client: closed.with_label_values(&["client"]),
                timeout: closed.with_label_values(&["timeout"]),
                error: closed.with_label_values(&["error"]),
            },
            refused: RefusedCounters {
                not_live: refused.with_label_values(&["not_live"]),
                viewers_full: refused.with_label_values(&["viewers_full"]),
                connections_full: refused.with_label_values(&["connections_full"]),
                bad_request: refused.with_label_values(&["bad_request"]),
                head_timeout: refused.with_label_values(&["head_timeout"]),
            },
        })
    }
}

impl ClosedCounters {
    pub(super) fn count(&self, reason: &Closed) {
        match reason {
            Closed::Ended => &self.ended,
            Closed::Client => &self.client,
            Closed::Timeout => &self.timeout,
            Closed::Error(_) => &self.error,
        }
        .inc();
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

/// Sends the response's head and then the stream, until it ends or the viewer does.
pub(super) async fn serve(
    socket: &TcpStream,
    reader: &mut Reader,
    settings: &ViewerSettings,
    metrics: &HttpMetrics,
    sent: &mut Sent,
) -> Closed {
    match stream(socket, reader, settings.write_timeout, metrics, sent).await {
        Ok(never) => match never {},
        Err(closed) => closed,
    }
}

async fn stream(
    socket: &TcpStream,
    reader: &mut Reader,
    write_timeout: Duration,
    metrics: &HttpMetrics,
    sent: &mut Sent,
) -> Result<std::convert::Infallible, Closed> {
    write_all(socket, write_timeout, RESPONSE_HEAD).await?;
    write_all(socket, write_timeout, &FILE_HEADER).await?;
    sent.add(FILE_HEADER.len(), metrics);
    let mut batch = Batch::default();
    let mut joined = false;
    loop {
        let count = tokio::select! {
            biased;
            count = reader.read(&mut batch.tags, BATCH_BYTES) => {
                count.map_err(|_| Closed::Ended)?
            }
            closed = client_closed(socket) => return Err(closed),
        };
        if !joined {
            batch.put_metadata_at_zero();
            joined = true;
        }
        if count.skipped > 0 {
            metrics.skipped_tags.inc_by(count.skipped);
            tracing::debug!(skipped = count.skipped, stream = %reader.stream().key(), "a viewer is too slow");
        }
        while !batch.is_done() {
            match batch.try_write(socket) {
                Ok(0) => return Err(Closed::Client),
                Ok(bytes) => sent.add(bytes, metrics),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    writable(socket, write_timeout).await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        batch.clear();
    }
}

/// Bytes written to one viewer. They reach the shared counter in large steps: a counter that each
/// viewer touches for each frame is a cache line that all cores fight for.
#[derive(Debug, Default)]
pub(super) struct Sent {
    pub(super) total: u64,
    uncounted: u64,
}

impl Sent {
    fn add(&mut self, bytes: usize, metrics: &HttpMetrics) {
        self.total += bytes as u64;
        self.uncounted += bytes as u64;
        if self.uncounted >= COUNT_STEP {
            self.flush(metrics);
        }
    }

    pub(super) fn flush(&mut self, metrics: &HttpMetrics) {
        metrics.bytes.inc_by(std::mem::take(&mut self.uncounted));
    }
}

/// Tags on their way into a socket. They share their bytes with the stream's log.
#[derive(Default)]
struct Batch {
    tags: Vec<Tag>,
    /// Tags that are written whole.
    done: usize,
    /// Bytes of the next one that are written.
    offset: usize,
}

impl Batch {
    fn try_write(&mut self, socket: &TcpStream) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let mut used = 0;
        for (slice, tag) in slices.iter_mut().zip(self.tags.get(self.done..).unwrap_or_default()) {
            let written = if used == 0 { self.offset } else { 0 };
            *slice = IoSlice::new(tag.framed().get(written..).unwrap_or_default());
            used += 1;
        }
        let written = socket.try_write_vectored(slices.get(..used).unwrap_or_default())?;
        self.advance(written);
        Ok(written)
    }

    fn advance(&mut self, written: usize) {
        self.offset += written;
        while let Some(tag) = self.tags.get(self.done)
            && self.offset >= tag.framed().len()
        {
            self.offset -= tag.framed().len();
            self.done += 1;
        }
    }

    /// Gives the metadata in front the time 0, wherever in the stream the viewer joins: FFmpeg
    /// takes metadata at any other time for the first packet of a stream of text.
    fn put_metadata_at_zero(&mut self) {
        if let Some(first) = self.tags.first_mut().filter(|tag| tag.kind() == TagKind::Script) {
            *first = first.with_timestamp(0);
        }
    }

    fn is_done(&self) -> bool {
        self.done >= self.tags.len()
    }

    fn clear(&mut self) {
        self.tags.clear();
        self.tags.shrink_to(KEPT_TAGS);
        self.done = 0;
        self.offset = 0;
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

async fn writable(socket: &TcpStream, timeout: Duration) -> Result<(), Closed> {
    match tokio::time::timeout(timeout, socket.writable()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Closed::Timeout),
    }
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
/// Room for tags that a viewer keeps between batches.
const KEPT_TAGS: usize = 16;
const COUNT_STEP: u64 = 64 * 1024;
