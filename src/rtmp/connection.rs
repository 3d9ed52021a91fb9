//! The connection of one encoder: a [`ServerSession`] with its socket, timeouts and log.
//!
//! ```text
//!             publish          accepted
//! waiting ──────────────► admitting ────► publishing
//!    ▲                        │ refused        │ unpublish
//!    └────────────────────────┼────────────────┘
//!                             ▼
//! any state, on a Close ─► closing: last message, wait for the encoder to close
//! ```
//!
//! - waiting: no publication. Its slot may be displaced; `publish_timeout` applies.
//! - admitting: nothing is read; `publish_timeout` applies. Bytes after the request wait in `unread`.
//! - publishing: the slot is pinned; `idle_timeout` applies.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    ServerMetrics,
    arrival::Arrival,
    metrics::{
        REFUSED_ALREADY_LIVE, REFUSED_FULL, REFUSED_NAME, REFUSED_NOT_CONNECTED, REFUSED_PLAY,
        REFUSED_TOO_MANY, REFUSED_UNAUTHORIZED,
    },
};
use crate::rtmp::listener::ServerSettings;
use crate::{net::Slot, rtmp::socket};
use downpour_hub::{
    Admission,
    admission::{self, Publication},
};
use downpour_media::{StreamKey, flv::Tag};
use downpour_rtmp::session::{
    PublishIntent, PublishRefusal, Refusal, ServerEvent, ServerSession, SessionError,
    SessionSettings,
};
use downpour_sys::KeyedLogLimit;

pub(super) struct Connection {
    stream: TcpStream,
    state: ConnectionState,
}

impl Connection {
    #[expect(clippy::too_many_arguments, reason = "one caller, and no two belong together")]
    pub(super) fn new(
        stream: TcpStream,
        peer: SocketAddr,
        slot: Slot,
        settings: ServerSettings,
        admission: Admission,
        metrics: ServerMetrics,
        log: Arc<CloseLog>,
        shutdown: CancellationToken,
    ) -> Self {
        metrics.connections.inc();
        let session = SessionSettings {
            max_message_len: settings.max_message_len,
            chunk_size: settings.chunk_size,
        };
        let now = Instant::now();
        Self {
            stream,
            state: ConnectionState {
                session: ServerSession::new(session, rand::random()),
                unread: Vec::new(),
                publication: None,
                arrival: Arrival::default(),
                last_key: None,
                peer,
                slot,
                settings,
                admission,
                log,
                kick: shutdown.child_token(),
                shutdown,
                opened: now,
                waiting_since: now,
                last_read: now,
                received: 0,
                metrics,
                counted: false,
            },
        }
    }

    /// Serves until the encoder or the node closes the connection.
    pub(super) async fn run(mut self) {
        debug!(peer = %self.state.peer, "RTMP connection open");
        let close = self.serve().await;
        // Now, not after the goodbye.
        match (self.state.publication.take(), &close) {
            (Some(publication), Close::Shutdown | Close::Kicked) => publication.end(),
            // Its stream may wait for the encoder to come back.
            (publication, _) => drop(publication),
        }
        self.state.count_close(&close);
        let last_message = match &close {
            Close::Refused(_) => Ok(()),
            Close::Shutdown => self.state.session.close("the node is shutting down"),
            Close::Kicked => self.state.session.close("the node ended the publication"),
            _ => return,
        };
        if last_message.is_ok() {
            // Best effort: the encoder may not read any longer.
            let _ = time::timeout(GOODBYE, self.say_goodbye()).await;
        }
    }

    async fn serve(&mut self) -> Close {
        let Self { stream, state } = self;
        let mut cancelled = pin!(state.cancellation());
        // Reset only when it fires, not per read.
        let mut due = state.deadline();
        let mut timer = pin!(time::sleep_until(due));
        loop {
            let wake = wake(stream, state, cancelled.as_mut(), timer.as_mut());
            match wake.await {
                Wake::Cancelled => return state.cancelled(),
                Wake::Read(Ok(Some(Ok(Step::Continue)))) => {}
                Wake::Read(Ok(Some(Ok(Step::Close(close))))) => return close,
                Wake::Read(Ok(Some(Ok(Step::Admit(intent))))) => {
                    // Outside of the read, because the decision is awaited.
                    let admitted = tokio::select! {
                        biased;
                        () = &mut cancelled => return state.cancelled(),
                        admitted = state.admit(intent) => admitted,
                    };
                    match admitted {
                        Ok(None) => {}
                        Ok(Some(close)) => return close,
                        Err(error) => return Close::Protocol(error),
                    }
                }
                Wake::Read(Ok(Some(Err(error)))) => return Close::Protocol(error),
                Wake::Read(Ok(None)) => return Close::Eof,
                Wake::Read(Err(error)) => return Close::Io(error),
                Wake::Timer => {
                    due = state.deadline();
                    if due <= Instant::now() {
                        return state.timed_out();
                    }
                    timer.as_mut().reset(due);
                }
            }
            // After a publication the deadline is nearer than during one.
            let deadline = state.deadline();
            if deadline < due {
                due = deadline;
                timer.as_mut().reset(due);
            }
            let output = state.session.take_output();
            if output.is_empty() {
                continue;
            }
            if let Some(close) = write(stream, state, &output, cancelled.as_mut()).await {
                return close;
            }
        }
    }

    /// Sends the last message and waits for the encoder to close. Closing with unread bytes would
    /// reset the connection, and the encoder might lose the message.
    async fn say_goodbye(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.state.session.take_output()).await?;
        self.stream.shutdown().await?;
        let mut left = GOODBYE_BYTES;
        while let Some(len) = socket::read(&mut self.stream, <[u8]>::len).await? {
            left = match left.checked_sub(len) {
                Some(left) => left,
                None => break,
            };
        }
        Ok(())
    }
}

/// Waits until the task has something to do. Cancel-safe.
async fn wake(
    stream: &mut TcpStream,
    state: &mut ConnectionState,
    mut cancelled: Pin<&mut impl Future<Output = ()>>,
    mut timer: Pin<&mut time::Sleep>,
) -> Wake {
    poll_fn(|cx| {
        if cancelled.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Wake::Cancelled);
        }
        if let Poll::Ready(read) = socket::poll_read(stream, cx, |bytes| state.take(bytes)) {
            return Poll::Ready(Wake::Read(read));
        }
        timer.as_mut().poll(cx).map(|()| Wake::Timer)
    })
    .await
}

/// Writes to the encoder. Returns why to close the connection, or `None` to continue.
async fn write(
    stream: &mut TcpStream,
    state: &ConnectionState,
    output: &[u8],
    cancelled: Pin<&mut impl Future<Output = ()>>,
) -> Option<Close> {
    let write = time::timeout(state.settings.write_timeout, stream.write_all(output));
    tokio::select! {
        biased;
        () = cancelled => Some(state.cancelled()),
        written = write => match written {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(Close::Io(error)),
            Err(_) => Some(Close::WriteTimeout),
        },
    }
}

/// Why the task of a connection runs.
enum Wake {
    Cancelled,
    Read(io::Result<Option<Result<Step, SessionError>>>),
    Timer,
}

/// The result of handling received bytes.
enum Step {
    /// Continue to read.
    Continue,
    /// Close the connection.
    Close(Close),
    /// The encoder requests to publish. The bytes after the request are in `unread`.
    Admit(PublishIntent),
}

/// The state of a connection, except for its socket.
struct ConnectionState {
    session: ServerSession,
    /// Bytes after a `publish` that admission is deciding on.
    unread: Vec<u8>,
    publication: Option<Publication>,
    /// What the publication sends, until it is logged.
    arrival: Arrival,
    /// The key of the current or the last publication, for the log.
    last_key: Option<StreamKey>,
    peer: SocketAddr,
    /// Pinned during a publication.
    slot: Slot,
    settings: ServerSettings,
    admission: Admission,
    log: Arc<CloseLog>,
    /// Cancelled when admission revokes the publication, and with `shutdown`.
    kick: CancellationToken,
    /// Cancelled when the server shuts down.
    shutdown: CancellationToken,
    opened: Instant,
    /// When the connection was opened, or its last publication ended.
    waiting_since: Instant,
    last_read: Instant,
    /// Bytes received.
    received: u64,
    metrics: ServerMetrics,
    /// `true` once the close has been counted.
    counted: bool,
}

impl ConnectionState {
    /// Handles received bytes.
    fn take(&mut self, bytes: &[u8]) -> Result<Step, SessionError> {
        self.last_read = Instant::now();
        self.received += bytes.len() as u64;
        self.metrics.received_bytes.inc_by(bytes.len() as u64);
        self.work_on(bytes)
    }

    fn work_on(&mut self, mut bytes: &[u8]) -> Result<Step, SessionError> {
        let step = loop {
            match self.session.receive(&mut bytes)? {
                None => break Step::Continue,
                Some(ServerEvent::Tag(tag)) => {
                    self.metrics.tags(tag.kind()).inc();
                    self.note_arrival(&tag);
                    if let Some(publication) = &mut self.publication {
                        publication.push(tag);
                    }
                }
                Some(ServerEvent::Publish(intent)) => {
                    self.unread = bytes.to_vec();
                    break Step::Admit(intent);
                }
                Some(ServerEvent::Unpublish) => self.unpublish(),
                Some(ServerEvent::Refused(refusal)) => {
                    let label = match refusal {
                        Refusal::Play => REFUSED_PLAY,
                        Refusal::Name(_) => REFUSED_NAME,
                        Refusal::NotConnected => REFUSED_NOT_CONNECTED,
                        Refusal::TooMany => REFUSED_TOO_MANY,
                    };
                    self.metrics.refused.with_label_values(&[label]).inc();
                    break Step::Close(Close::Refused(refusal.to_string()));
                }
            }
        };
        match self.session.take_ignored() {
            0 => {}
            ignored => self.metrics.ignored_messages.inc_by(ignored),
        }
        Ok(step)
    }

    /// Logs codecs, size and rate of a new publication once they are known.
    fn note_arrival(&mut self, tag: &Tag) {
        let now = self.last_read.into_std();
        if let Some(publication) = &self.publication
            && self.arrival.push(now, tag)
        {
            self.arrival.log(now, self.peer, publication.key());
        }
    }

    fn unpublish(&mut self) {
        if let Some(publication) = self.publication.take() {
            publication.unpublish();
        }
        self.waiting_since = self.last_read;
        self.slot.unpin(self.last_read.into_std(), self.peer.ip());
        let stream = self.last_key.as_ref().map(tracing::field::display);
        info!(peer = %self.peer, stream, "RTMP publication ended");
    }

    /// Awaits the decision on a `publish`, and handles the bytes after it. Returns why to close the
    /// connection, or `None` to continue.
    ///
    /// Nothing is read meanwhile: backpressure stops an encoder that continues to send.
    async fn admit(&mut self, intent: PublishIntent) -> Result<Option<Close>, SessionError> {
        let mut intent = intent;
        loop {
            if let Some(close) = self.publish(intent).await? {
                return Ok(Some(close));
            }
            let bytes = std::mem::take(&mut self.unread);
            match self.work_on(&bytes)? {
                Step::Continue => return Ok(None),
                Step::Close(close) => return Ok(Some(close)),
                Step::Admit(next) => intent = next,
            }
        }
    }

    async fn publish(&mut self, intent: PublishIntent) -> Result<Option<Close>, SessionError> {
        let PublishIntent { key, query } = intent;
        self.last_key = Some(key.clone());
        if !self.slot.pin() {
            return Ok(Some(Close::Displaced));
        }
        let request = admission::Request {
            action: admission::Action::Publish,
            key: key.clone(),
            protocol: "rtmp",
            peer: self.peer,
            query,
            encrypted: false,
            revoked: Some(self.kick.clone()),
        };
        let decision = self.admission.publish(request);
        match time::timeout(self.settings.publish_timeout, decision).await {
            Err(_) => Ok(Some(Close::PublishTimeout)),
            Ok(Ok(publication)) => {
                self.publication = Some(publication);
                self.arrival = Arrival::default();
                self.last_read = Instant::now();
                self.session.accept()?;
                info!(peer = %self.peer, stream = %key, "RTMP publication started");
                Ok(None)
            }
            Ok(Err(refusal)) => {
                let (label, reason) = match refusal {
                    admission::Refusal::AlreadyLive(_) => {
                        (REFUSED_ALREADY_LIVE, PublishRefusal::BadName)
                    }
                    admission::Refusal::Unauthorized(_) => {
                        (REFUSED_UNAUTHORIZED, PublishRefusal::Unauthorized)
                    }
                    admission::Refusal::Full(_) | admission::Refusal::NotLive(_) => {
                        (REFUSED_FULL, PublishRefusal::Failed)
                    }
                };
                self.metrics.refused.with_label_values(&[label]).inc();
                self.session.refuse(reason, &refusal.to_string())?;
                Ok(Some(Close::Refused(refusal.to_string())))
            }
        }
    }

    /// When the connection times out.
    fn deadline(&self) -> Instant {
        match self.publication {
            Some(_) => self.last_read + self.settings.idle_timeout,
            None => self.waiting_since + self.settings.publish_timeout,
        }
    }

    fn timed_out(&self) -> Close {
        if self.publication.is_some() { Close::IdleTimeout } else { Close::PublishTimeout }
    }

    /// Waits until the connection is kicked, its server shuts down, or its slot is displaced.
    fn cancellation(&self) -> impl Future<Output = ()> + Send + use<> {
        let (kicked, displaced) = (self.kick.clone(), self.slot.displaced());
        async move {
            tokio::select! {
                () = kicked.cancelled() => {}
                () = displaced => {}
            }
        }
    }

    /// Why the connection was cancelled: by `shutdown`, `kick` or its slot.
    fn cancelled(&self) -> Close {
        match () {
            () if self.shutdown.is_cancelled() => Close::Shutdown,
            () if self.slot.is_displaced() => Close::Displaced,
            () => Close::Kicked,
        }
    }

    fn count_close(&mut self, close: &Close) {
        self.counted = true;
        self.metrics.closed.with_label_values(&[close.label()]).inc();
        if let Close::Protocol(error) = close {
            self.metrics.protocol_errors.with_label_values(&[error.label()]).inc();
        }
        let peer = self.peer;
        let stream = self.last_key.as_ref().map(tracing::field::display);
        let seconds = self.opened.elapsed().as_secs_f64();
        let bytes = self.received;
        let Some(missed) = self.log.due(close, self.last_key.is_some()) else {
            debug!(%peer, stream, reason = %close, seconds, bytes, "RTMP connection closed");
            return;
        };
        // A client that fails the handshake is seldom an encoder.
        let by_encoder = |error: &SessionError| !matches!(error, SessionError::Handshake(_));
        if matches!(close, Close::Protocol(error) if by_encoder(error)) {
            warn!(%peer, stream, reason = %close, seconds, bytes, missed, "RTMP connection closed");
        } else {
            info!(%peer, stream, reason = %close, seconds, bytes, missed, "RTMP connection closed");
        }
    }
}

impl Drop for ConnectionState {
    fn drop(&mut self) {
        self.metrics.connections.dec();
        if !self.counted {
            // A panic, or a runtime that shuts down.
            self.metrics.closed.with_label_values(&[CLOSED_ABORTED]).inc();
        }
    }
}

/// Limits the log lines about connections that publish nothing: one line per reason and 10 s.
#[derive(Debug)]
pub(super) struct CloseLog(Mutex<KeyedLogLimit<&'static str>>);

impl CloseLog {
    /// As [`LogLimit::due`](downpour_sys::LogLimit::due). `published` is `true` if the connection
    /// requested to publish a stream.
    fn due(&self, close: &Close, published: bool) -> Option<u64> {
        match close {
            Close::Refused(_) | Close::Protocol(_) => {}
            // Port scans and health checks.
            Close::Eof | Close::Io(_) | Close::PublishTimeout if !published => return None,
            _ if published => return Some(0),
            _ => {}
        }
        self.0.lock().due(std::time::Instant::now(), close.label())
    }
}

impl Default for CloseLog {
    fn default() -> Self {
        Self(Mutex::new(KeyedLogLimit::new(CLOSE_LABELS.len())))
    }
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum Close {
    #[error("the encoder closed the connection")]
    Eof,
    #[error("{0}")]
    Io(io::Error),
    #[error("refused: {0}")]
    Refused(String),
    #[error("{0}")]
    Protocol(SessionError),
    #[error("no publication in time")]
    PublishTimeout,
    #[error("the encoder sent nothing in time")]
    IdleTimeout,
    #[error("the encoder did not read in time")]
    WriteTimeout,
    #[error("the node ended the publication")]
    Kicked,
    #[error("the node is shutting down")]
    Shutdown,
    #[error("a new connection took its slot")]
    Displaced,
}

impl Close {
    fn label(&self) -> &'static str {
        match self {
            Self::Eof => "eof",
            Self::Io(_) => "io",
            Self::Refused(_) => "refused",
            Self::Protocol(_) => "protocol",
            Self::PublishTimeout => "publish_timeout",
            Self::IdleTimeout => "idle_timeout",
            Self::WriteTimeout => "write_timeout",
            Self::Kicked => "kicked",
            Self::Shutdown => "shutdown",
            Self::Displaced => "displaced",
        }
    }
}

/// The values of the label `reason` of closed connections.
pub(super) const CLOSE_LABELS: [&str; 11] = [
    "eof",
    "io",
    "refused",
    "protocol",
    "publish_timeout",
    "idle_timeout",
    "write_timeout",
    "kicked",
    "shutdown",
    "displaced",
    CLOSED_ABORTED,
];

const CLOSED_ABORTED: &str = "aborted";
/// Time for the last message, and for the encoder to close.
const GOODBYE: Duration = Duration::from_secs(1);
const GOODBYE_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_without_publication_log_one_line_per_reason() {
        let log = CloseLog::default();
        let lines = (0..300).filter(|i| {
            let close = match i % 3 {
                0 => Close::Refused("already live".into()),
                1 => Close::Eof,
                _ => Close::WriteTimeout,
            };
            log.due(&close, false).is_some()
        });
        assert_eq!(lines.count(), 2);
    }

    #[test]
    fn close_after_each_publication_is_logged() {
        let log = CloseLog::default();
        let lines = (0..300).filter(|_| log.due(&Close::Eof, true).is_some());
        assert_eq!(lines.count(), 300);
    }
}
