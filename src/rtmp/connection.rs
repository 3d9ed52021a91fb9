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

use socket2::{SockRef, TcpKeepalive};
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
use crate::rtmp::socket;
use downpour_hub::admission::{Publication, PublishError, PublishHandler, PublishRequest};
use downpour_media::StreamKey;
use downpour_rtmp::session::{
    PublishIntent, PublishRefusal, Refusal, ServerEvent, ServerSession, SessionError,
    SessionSettings,
};

pub struct Connection {
    stream: TcpStream,
    intake: ConnectionState,
}

impl Connection {
    pub fn new(
        stream: TcpStream,
        peer: SocketAddr,
        settings: ServerSettings,
        handler: Arc<dyn PublishHandler>,
        metrics: ServerMetrics,
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
                publication: None,
                last_key: None,
                peer,
                settings,
                handler,
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
        let close = match self.prepare() {
            Ok(()) => self.serve().await,
            Err(error) => Close::Io(error),
        };
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

    fn prepare(&self) -> io::Result<()> {
        self.stream.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE);
        SockRef::from(&self.stream).set_tcp_keepalive(&keepalive)
    }

    async fn serve(&mut self) -> Close {
        let Self { stream, intake } = self;
        let mut cancelled = pin!(intake.kick.clone().cancelled_owned());
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
                Wake::Read(Ok(Some(Ok(None)))) => {}
                Wake::Read(Ok(Some(Ok(Some(close))))) => return close,
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
    Read(io::Result<Option<Result<Option<Close>, SessionError>>>),
    Timer,
}

/// Everything about a connection but its socket.
struct ConnectionState {
    session: ServerSession,
    publication: Option<Box<dyn Publication>>,
    /// What is or was last published, for the log.
    last_key: Option<StreamKey>,
    peer: SocketAddr,
    settings: ServerSettings,
    handler: Arc<dyn PublishHandler>,
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
    /// Works on what came. `Some` closes the connection.
    fn take(&mut self, mut bytes: &[u8]) -> Result<Option<Close>, SessionError> {
        self.last_read = Instant::now();
        self.received += bytes.len() as u64;
        self.metrics.received_bytes.inc_by(bytes.len() as u64);
        let close = loop {
            match self.session.receive(&mut bytes)? {
                None => break None,
                Some(ServerEvent::Tag(tag)) => {
                    self.metrics.tags(tag.kind()).inc();
                    if let Some(publication) = &mut self.publication {
                        publication.tag(tag);
                    }
                }
                Some(ServerEvent::Publish(intent)) => {
                    if let Some(close) = self.publish(intent)? {
                        break Some(close);
                    }
                }
                Some(ServerEvent::Unpublish) => {
                    self.publication = None;
                    self.waiting_since = self.last_read;
                    let stream = self.last_key.as_ref().map(tracing::field::display);
                    info!(peer = %self.peer, stream, "RTMP publication ended");
                }
                Some(ServerEvent::Refused(refusal)) => {
                    let label = match refusal {
                        Refusal::Play => REFUSED_PLAY,
                        Refusal::Name(_) => REFUSED_NAME,
                        Refusal::NotConnected => REFUSED_NOT_CONNECTED,
                        Refusal::TooMany => REFUSED_TOO_MANY,
                    };
                    self.metrics.refused.with_label_values(&[label]).inc();
                    break Some(Close::Refused(refusal.to_string()));
                }
            }
        };
        match self.session.take_ignored() {
            0 => {}
            ignored => self.metrics.ignored_messages.inc_by(ignored),
        }
        Ok(close)
    }

    fn publish(&mut self, intent: PublishIntent) -> Result<Option<Close>, SessionError> {
        let PublishIntent { key, query } = intent;
        self.last_key = Some(key.clone());
        let request =
            PublishRequest { key: key.clone(), query, peer: self.peer, kick: self.kick.clone() };
        match self.handler.publish(request) {
            Ok(publication) => {
                self.publication = Some(publication);
                self.session.accept()?;
                info!(peer = %self.peer, stream = %key, "RTMP publication began");
                Ok(None)
            }
            Err(error) => {
                let (label, reason) = match error {
                    PublishError::AlreadyLive(_) => (REFUSED_ALREADY_LIVE, PublishRefusal::BadName),
                    PublishError::Unauthorized(_) => {
                        (REFUSED_UNAUTHORIZED, PublishRefusal::Unauthorized)
                    }
                    PublishError::Full(_) => (REFUSED_FULL, PublishRefusal::Failed),
                };
                self.metrics.refused.with_label_values(&[label]).inc();
                self.session.refuse(reason, &error.to_string())?;
                Ok(Some(Close::Refused(error.to_string())))
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

    /// Tells the server's end from a kick.
    fn cancelled(&self) -> Close {
        if self.shutdown.is_cancelled() { Close::Shutdown } else { Close::Kicked }
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
        match close {
            Close::Protocol(error) if !matches!(error, SessionError::Handshake(_)) => {
                warn!(%peer, stream, reason = %close, seconds, bytes, "RTMP connection closed");
            }
            // Port scans and health checks.
            Close::Eof | Close::Io(_) | Close::PublishTimeout if self.last_key.is_none() => {
                debug!(%peer, stream, reason = %close, seconds, bytes, "RTMP connection closed");
            }
            _ => info!(%peer, stream, reason = %close, seconds, bytes, "RTMP connection closed"),
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
        }
    }
}

/// All reasons that are counted.
pub const CLOSE_LABELS: [&str; 10] = [
    "eof",
    "io",
    "refused",
    "protocol",
    "publish_timeout",
    "idle_timeout",
    "write_timeout",
    "kicked",
    "shutdown",
    CLOSED_ABORTED,
];

const CLOSED_ABORTED: &str = "aborted";
const KEEPALIVE: Duration = Duration::from_secs(15);
/// For the last words, and for the encoder to close after them.
const GOODBYE: Duration = Duration::from_secs(1);
const GOODBYE_BYTES: usize = 4 << 20;
