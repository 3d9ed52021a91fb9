//! One encoder's connection: the socket, the timeouts and the log around a [`ServerSession`].

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
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
    alarm::LazyPoll,
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
use downpour_media::StreamKey;
use downpour_rtmp::session::{
    PublishIntent, PublishRefusal, Refusal, ServerEvent, ServerSession, SessionError,
    SessionSettings,
};
use downpour_sys::KeyedLogLimit;

pub struct Connection {
    stream: TcpStream,
    intake: ConnectionState,
}

impl Connection {
    #[expect(clippy::too_many_arguments, reason = "one caller, and each is another's")]
    pub fn new(
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
            intake: ConnectionState {
                session: ServerSession::new(session, rand::random()),
                unread: Vec::new(),
                publication: None,
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

    /// Serves until either side has had enough.
    pub async fn run(mut self) {
        debug!(peer = %self.intake.peer, "RTMP connection open");
        let close = self.serve().await;
        // The stream is over for its viewers now, however long the goodbye takes.
        self.intake.publication = None;
        self.intake.count_close(&close);
        let told = match &close {
            Close::Refused(_) => Ok(()),
            Close::Shutdown => self.intake.session.close("the node is shutting down"),
            Close::Kicked => self.intake.session.close("the node ended the publication"),
            _ => return,
        };
        if told.is_ok() {
            // An encoder that does not listen to the end gets none.
            let _ = time::timeout(GOODBYE, self.say_goodbye()).await;
        }
    }

    async fn serve(&mut self) -> Close {
        let Self { stream, intake } = self;
        let (kicked, displaced) = (intake.kick.clone(), intake.slot.displaced());
        let mut cancelled = pin!(async move {
            tokio::select! {
                () = kicked.cancelled() => {}
                () = displaced => {}
            }
        });
        // Set again only when it fires, not at each read.
        let mut due = intake.deadline();
        let mut timer = pin!(time::sleep_until(due));
        let alarm = LazyPoll::new();
        loop {
            let wake = poll_fn(|cx| {
                let rung = alarm.take(cx);
                let mut quiet = Context::from_waker(alarm.waker());
                if rung && cancelled.as_mut().poll(&mut quiet).is_ready() {
                    return Poll::Ready(Wake::Cancelled);
                }
                if let Poll::Ready(read) = socket::poll_read(stream, cx, |bytes| intake.take(bytes))
                {
                    if rung {
                        // The timer has not been looked at.
                        alarm.ring();
                    }
                    return Poll::Ready(Wake::Read(read));
                }
                match rung && timer.as_mut().poll(&mut quiet).is_ready() {
                    true => Poll::Ready(Wake::Timer),
                    false => Poll::Pending,
                }
            });
            match wake.await {
                Wake::Cancelled => return intake.cancelled(),
                Wake::Read(Ok(Some(Ok(Step::Continue)))) => {}
                Wake::Read(Ok(Some(Ok(Step::Close(close))))) => return close,
                Wake::Read(Ok(Some(Ok(Step::Admit(intent))))) => {
                    // Outside of the read: a decision may take its time.
                    let admitted = tokio::select! {
                        biased;
                        () = &mut cancelled => return intake.cancelled(),
                        admitted = intake.admit(intent) => admitted,
                    };
                    match admitted {
                        Ok(None) => {}
                        Ok(Some(close)) => return close,
                        Err(error) => return Close::Protocol(error),
                    }
                    // It was polled without the alarm's waker.
                    alarm.ring();
                }
                Wake::Read(Ok(Some(Err(error)))) => return Close::Protocol(error),
                Wake::Read(Ok(None)) => return Close::Eof,
                Wake::Read(Err(error)) => return Close::Io(error),
                Wake::Timer => {
                    due = intake.deadline();
                    if due <= Instant::now() {
                        return intake.timed_out();
                    }
                    timer.as_mut().reset(due);
                    alarm.ring();
                }
            }
            // It is nearer after a publication than in one.
            let deadline = intake.deadline();
            if deadline < due {
                due = deadline;
                timer.as_mut().reset(due);
                alarm.ring();
            }
            let output = intake.session.take_output();
            if output.is_empty() {
                continue;
            }
            let write = time::timeout(intake.settings.write_timeout, stream.write_all(&output));
            tokio::select! {
                biased;
                () = &mut cancelled => return intake.cancelled(),
                written = write => match written {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => return Close::Io(error),
                    Err(_) => return Close::WriteTimeout,
                },
            }
            // It was polled without the alarm's waker.
            alarm.ring();
        }
    }

    /// Sends the last words and waits for the encoder to close: closing with bytes unread would
    /// reset the connection, and the encoder would never see why.
    async fn say_goodbye(&mut self) -> io::Result<()> {
        self.stream.write_all(&self.intake.session.take_output()).await?;
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

/// Why a connection's task runs.
enum Wake {
    Cancelled,
    Read(io::Result<Option<Result<Step, SessionError>>>),
    Timer,
}

/// What follows from bytes that came.
enum Step {
    /// To read on.
    Continue,
    /// The connection is over.
    Close(Close),
    /// The encoder wants to publish; the bytes behind its request wait.
    Admit(PublishIntent),
}

/// Everything about a connection but its socket.
struct ConnectionState {
    session: ServerSession,
    /// Bytes behind a `publish` that is being decided on.
    unread: Vec<u8>,
    publication: Option<Publication>,
    /// What is or was last published, for the log.
    last_key: Option<StreamKey>,
    peer: SocketAddr,
    /// Pinned in a publication.
    slot: Slot,
    settings: ServerSettings,
    admission: Admission,
    log: Arc<CloseLog>,
    /// Cancelled by the node's handler, or with `shutdown`.
    kick: CancellationToken,
    /// The server's end.
    shutdown: CancellationToken,
    opened: Instant,
    /// Since when there is no publication.
    waiting_since: Instant,
    last_read: Instant,
    /// Bytes.
    received: u64,
    metrics: ServerMetrics,
    /// Whether the end has been counted.
    counted: bool,
}

impl ConnectionState {
    /// Works on bytes that came.
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

    fn unpublish(&mut self) {
        self.publication = None;
        self.waiting_since = self.last_read;
        self.slot.unpin(self.last_read.into_std(), self.peer.ip());
        let stream = self.last_key.as_ref().map(tracing::field::display);
        info!(peer = %self.peer, stream, "RTMP publication ended");
    }

    /// Decides about a `publish`, and works on the bytes behind it. `Some` closes the connection.
    ///
    /// Nothing is read meanwhile, so an encoder that sends on fills its own socket, not memory here.
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
                self.last_read = Instant::now();
                self.session.accept()?;
                info!(peer = %self.peer, stream = %key, "RTMP publication began");
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

    /// When patience ends.
    fn deadline(&self) -> Instant {
        match self.publication {
            Some(_) => self.last_read + self.settings.idle_timeout,
            None => self.waiting_since + self.settings.publish_timeout,
        }
    }

    fn timed_out(&self) -> Close {
        if self.publication.is_some() { Close::IdleTimeout } else { Close::PublishTimeout }
    }

    /// Why `kick` or the slot has ended the connection.
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
        // A handshake that fails is seldom an encoder's.
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
            // A panic in the handler, or a runtime that stops.
            self.metrics.closed.with_label_values(&[CLOSED_ABORTED]).inc();
        }
    }
}

/// Keeps connections that publish nothing from flooding the log: one line per reason and 10 s.
#[derive(Debug)]
pub struct CloseLog(Mutex<KeyedLogLimit<&'static str>>);

impl CloseLog {
    /// As [`LogLimit::due`](downpour_sys::LogLimit::due). `published` is whether the connection asked
    /// to publish a stream.
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
    #[error("the encoder closed it")]
    Eof,
    #[error("{0}")]
    Io(io::Error),
    #[error("refused: {0}")]
    Refused(String),
    #[error("{0}")]
    Protocol(SessionError),
    #[error("no publication in time")]
    PublishTimeout,
    #[error("nothing came for too long")]
    IdleTimeout,
    #[error("the encoder took no answer for too long")]
    WriteTimeout,
    #[error("the node ended the publication")]
    Kicked,
    #[error("the node is shutting down")]
    Shutdown,
    #[error("another connection needed its slot")]
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

/// All reasons that are counted.
pub const CLOSE_LABELS: [&str; 11] = [
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
/// For the last words, and for the encoder to close after them.
const GOODBYE: Duration = Duration::from_secs(1);
const GOODBYE_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn junk_connections_make_one_log_line_per_reason() {
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
    fn the_end_of_each_publication_is_logged() {
        let log = CloseLog::default();
        let lines = (0..300).filter(|_| log.due(&Close::Eof, true).is_some());
        assert_eq!(lines.count(), 300);
    }
}
