//! The edge's end of the repair connection.

mod backoff;
mod downpour;
mod metrics;
mod v0;

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, Once, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{Connecting, Connection, ConnectionError, Endpoint};
use rustls::pki_types::ServerName;
use tokio::{
    net::lookup_host,
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

pub use metrics::RepairClientMetrics;

use self::backoff::Backoff;
use crate::tls::{ClientTls, TlsError, Trust};
use crate::{
    protocol::{Protocol, close},
    transport,
};
use downpour_media::StreamPattern;
use downpour_media::flv::Headers;
use downpour_repair::rtp::{Seq, Ssrc};
use downpour_repair::{
    control::{MAX_PATTERNS, Report, StreamInfo, Welcome},
    message::{Gone, Heartbeat, Nack},
};

/// Keeps a connection to the cloud, for ever.
pub struct RepairClient {
    settings: RepairClientSettings,
    /// The host in [`RepairClientSettings::cloud`], for the certificate.
    host: String,
    tls: ClientTls,
    /// One for all connections: what servers gave for coming back stays with it.
    config: quinn::ClientConfig,
    /// Whether the last connection spoke `downpour/1`, so that a resumed one will.
    resumes: bool,
    endpoint: Endpoint,
    ipv6: bool,
    shared: Arc<Shared>,
    inbox: Inbox,
    events: EventSender,
    metrics: RepairClientMetrics,
    shutdown: CancellationToken,
    /// Said once, not at each connection.
    told_unpinned: Once,
}

/// What may be set.
#[derive(Debug, Clone)]
pub struct RepairClientSettings {
    /// The cloud's QUIC address, `host:port`; looked up anew for each connection.
    pub cloud: String,
    /// What to speak.
    pub protocol: ProtocolChoice,
    /// How to know the cloud.
    pub trust: Trust,
    /// This node's name, told in `hello`.
    pub node: String,
    /// What the cloud asks of edges, if anything.
    pub token: Option<String>,
    /// The streams wanted at first.
    pub streams: Vec<StreamPattern>,
    /// The UDP port on which this edge takes RTP, if it wants RTP sent there.
    pub rtp_port: Option<u16>,
    /// Over how many paths it wants RTP sent there, 0..=2.
    pub rtp_paths: u8,
    /// The multicast group that it listens to, if it does.
    pub group: Option<SocketAddr>,
    /// Whether it takes parity where it takes RTP.
    pub parity: bool,
    /// How late a packet may come to be of use.
    pub latency: Duration,
}

/// What to speak with the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProtocolChoice {
    /// Whatever the cloud prefers of the two.
    #[default]
    Auto,
    /// Only this one. A v0 cloud is connected to when the first packet is missing.
    Only(Protocol),
}

/// What the cloud says and sends.
#[derive(Debug, Clone, PartialEq)]
pub enum RepairEvent {
    /// There is a connection.
    Connected {
        /// What it speaks.
        protocol: Protocol,
    },
    /// There is none, or an attempt to have one failed. Requests in flight are forgotten.
    Disconnected {
        /// Why, for people.
        reason: String,
    },
    /// The cloud's name, nonce and RTP port.
    Welcome(Welcome),
    /// A wanted stream has begun or was there already. It is told again after a reconnection.
    StreamUp(StreamInfo),
    /// A stream's headers changed.
    StreamUpdate {
        /// The stream.
        ssrc: Ssrc,
        /// All of its headers.
        headers: Headers,
    },
    /// A stream is over.
    StreamEnd {
        /// The stream.
        ssrc: Ssrc,
        /// The last sequence number sent, if any was.
        last_seq: Option<Seq>,
    },
    /// RTP goes to an address that this edge proved to be its own.
    PathUp {
        /// Which of this edge's paths.
        path: u8,
        /// The address, as the cloud sees it.
        address: SocketAddr,
    },
    /// A whole RTP packet.
    Repair(Bytes),
    /// Packets that the cloud no longer holds.
    Gone(Gone),
    /// How far streams have come.
    Heartbeats(Vec<Heartbeat>),
}

impl RepairClient {
    /// Starts to connect, and goes on until `shutdown`. Must be called inside a tokio runtime.
    ///
    /// `events` should be read promptly: what is lost when it is full (repairs, gone, heartbeats) is
    /// counted, and the rest waits.
    ///
    /// # Errors
    /// If `cloud` is not a `host:port`, the trust file is bad, or there is no UDP socket to be had.
    pub fn spawn(
        settings: RepairClientSettings,
        events: mpsc::Sender<RepairEvent>,
        metrics: RepairClientMetrics,
        shutdown: CancellationToken,
    ) -> Result<RepairHandle, ClientError> {
        let cloud = || ClientError::Cloud(settings.cloud.clone());
        let (host, port) = settings.cloud.rsplit_once(':').ok_or_else(cloud)?;
        let host = host.trim_matches(['[', ']']).to_owned();
        if host.is_empty() || port.parse::<u16>().is_err() {
            return Err(cloud());
        }
        ServerName::try_from(host.as_str()).map_err(|_| cloud())?;

        let (v0, downpour) = (Protocol::V0.alpn(), Protocol::Downpour.alpn());
        let protocols: &[_] = match settings.protocol {
            ProtocolChoice::Auto => &[downpour, v0],
            ProtocolChoice::Only(Protocol::Downpour) => &[downpour],
            ProtocolChoice::Only(Protocol::V0) => &[v0],
        };
        let tls = ClientTls::new(&settings.trust, &settings.cloud, protocols)?;
        let mut config = quinn::ClientConfig::new(tls.crypto());
        config.transport_config(Arc::new(transport::client()));
        let (socket, ipv6) = match transport::bind((Ipv6Addr::UNSPECIFIED, 0).into()) {
            Ok(socket) => (socket, true),
            Err(_) => (
                transport::bind((Ipv4Addr::UNSPECIFIED, 0).into()).map_err(ClientError::Socket)?,
                false,
            ),
        };
        let endpoint = quinn::default_runtime()
            .ok_or_else(|| io::Error::other("no tokio runtime"))
            .and_then(|runtime| Endpoint::new(transport::edge_endpoint(), None, socket, runtime))
            .map_err(ClientError::Socket)?;

        let (nacks, nack_queue) = mpsc::channel(NACK_QUEUE);
        let (report, reports) = watch::channel(Report::default());
        let (wanted, wishes) = watch::channel(settings.streams.clone());
        let shared = Arc::new(Shared::default());
        let handle = RepairHandle {
            nacks,
            report,
            wanted,
            shared: shared.clone(),
            metrics: metrics.clone(),
        };
        let client = Self {
            settings,
            host,
            tls,
            config,
            resumes: false,
            endpoint,
            ipv6,
            shared,
            inbox: Inbox { nacks: nack_queue, reports, wishes },
            events: EventSender { events, metrics: metrics.clone() },
            metrics,
            shutdown,
            told_unpinned: Once::new(),
        };
        tokio::spawn(client.run());
        Ok(handle)
    }

    async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut last_reason = String::new();
        while !self.shutdown.is_cancelled() && !self.events.events.is_closed() {
            let first_nack = match self.first_nack().await {
                Ok(nack) => nack,
                Err(Stopped) => break,
            };
            let started = Instant::now();
            let result = self.session(first_nack).await;
            self.shared.set(None);
            let reason = match result {
                Ok(()) | Err(Disconnect::Stopped) => break,
                Err(reason) => {
                    self.metrics.count(&reason);
                    reason.to_string()
                }
            };
            if reason != last_reason {
                tracing::warn!(cloud = self.settings.cloud, reason, "no repair connection");
                last_reason.clone_from(&reason);
            }
            if self.events.send(RepairEvent::Disconnected { reason }).await.is_err() {
                break;
            }
            let pause = backoff.next(started.elapsed(), rand::random());
            tokio::select! {
                () = sleep(pause) => {}
                () = self.shutdown.cancelled() => break,
            }
        }
        self.endpoint.close(close::DONE, b"the edge is shutting down");
        // An error only says that the cloud did not acknowledge the close in time.
        let _ = timeout(CLOSE_TIMEOUT, self.endpoint.wait_idle()).await;
    }

    /// With a cloud that speaks v0, waits for something to ask: an existing cloud ends with an error
    /// of its own when a connection is closed on which nothing was ever asked.
    async fn first_nack(&mut self) -> Result<Option<Nack>, Stopped> {
        if self.settings.protocol != ProtocolChoice::Only(Protocol::V0) {
            return Ok(None);
        }
        tokio::select! {
            nack = self.inbox.nacks.recv() => nack.map(Some).ok_or(Stopped),
            () = self.shutdown.cancelled() => Err(Stopped),
            () = self.events.events.closed() => Err(Stopped),
        }
    }

    /// One connection from beginning to end; `Ok` when there shall be no other.
    async fn session(&mut self, first_nack: Option<Nack>) -> Result<(), Disconnect> {
        let connected = tokio::select! {
            connected = self.connect() => connected,
            () = self.shutdown.cancelled() => return Ok(()),
        };
        let Dialed { connection, protocol, greeted } = connected.inspect_err(|_| {
            self.metrics.connect_failures.inc();
        })?;
        self.resumes = protocol == Protocol::Downpour;
        self.metrics.connects.inc();
        let _connected = ConnectedGuard::new(self.metrics.connected(protocol));
        self.shared.set(Some((connection.clone(), protocol)));
        tracing::info!(
            cloud = self.settings.cloud, peer = %connection.remote_address(),
            protocol = protocol.as_str(), "connected to the cloud for repair",
        );
        self.events.send(RepairEvent::Connected { protocol }).await?;

        let result = match protocol {
            Protocol::V0 => v0::run(self, &connection, first_nack).await,
            Protocol::Downpour => downpour::run(self, &connection, greeted).await,
        };
        match &result {
            Ok(()) => connection.close(close::DONE, b"the edge is shutting down"),
            Err(reason @ Disconnect::Malformed(_)) => {
                connection.close(close::MALFORMED, reason.to_string().as_bytes());
            }
            Err(Disconnect::Timeout(reason)) => connection.close(close::TIMEOUT, reason.as_bytes()),
            Err(_) => connection.close(close::DONE, b""),
        }
        result
    }

    async fn connect(&self) -> Result<Dialed, Disconnect> {
        let cloud = &self.settings.cloud;
        let resolved = timeout(CONNECT_TIMEOUT, lookup_host(cloud)).await;
        let addrs: Vec<SocketAddr> = resolved
            .map_err(|_| Disconnect::Resolve(cloud.clone(), "no answer".into()))?
            .map_err(|error| Disconnect::Resolve(cloud.clone(), error.to_string()))?
            .filter(|addr| self.ipv6 || addr.is_ipv4())
            .collect();
        // A name with several addresses: another one each time.
        let pick = rand::random_range(0..addrs.len().max(1));
        let addr = *addrs
            .get(pick)
            .ok_or_else(|| Disconnect::Resolve(cloud.clone(), "it has no address".into()))?;

        self.tls.revalidate(&self.host);
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), addr, &self.host)
            .map_err(|error| Disconnect::Connect(error.to_string()))?;
        let (connection, greeted) = match timeout(CONNECT_TIMEOUT, self.shake(connecting)).await {
            Ok(Ok(shaken)) => shaken,
            Ok(Err(error)) => return Err(self.refusal(error)),
            Err(_) => return Err(Disconnect::Connect(format!("{addr} does not answer"))),
        };
        match Protocol::of(&connection) {
            Some(Protocol::Downpour) => {
                self.tls.pin().map_err(|error| Disconnect::Connect(error.to_string()))?;
                Ok(Dialed { connection, protocol: Protocol::Downpour, greeted })
            }
            // An existing cloud makes a new certificate at each start: to pin it is to refuse it
            // when it comes back. What is pinned already was checked in the handshake.
            Some(Protocol::V0) => {
                if matches!(self.settings.trust, Trust::TrustOnFirstUse(_)) {
                    self.told_unpinned.call_once(|| {
                        tracing::warn!(cloud, "an existing (v0) cloud keeps no certificate to pin");
                    });
                }
                Ok(Dialed { connection, protocol: Protocol::V0, greeted: None })
            }
            None => Err(Disconnect::Malformed("the cloud chose no protocol".into())),
        }
    }

    /// Completes the handshake. A cloud that this edge was connected to before is told hello with
    /// the first packet (0-RTT), so that its welcome is here after one round trip; if it does not
    /// take that, hello is to be said again. Nothing but the hello goes early: `server::Early` says
    /// why that can be.
    async fn shake(
        &self,
        connecting: Connecting,
    ) -> Result<(Connection, Option<downpour::Greeted>), ConnectionError> {
        let connecting = if self.resumes {
            match connecting.into_0rtt() {
                Ok((connection, accepted)) => {
                    let wanted = self.inbox.wishes.borrow().clone();
                    let greeted = downpour::say_hello(&self.settings, wanted, &connection).await;
                    // Also false if there is no connection.
                    let accepted = accepted.await;
                    if let Some(error) = connection.close_reason() {
                        return Err(error);
                    }
                    if accepted {
                        self.metrics.early_hellos.inc();
                    }
                    return Ok((connection, greeted.ok().filter(|_| accepted)));
                }
                Err(connecting) => connecting,
            }
        } else {
            connecting
        };
        Ok((connecting.await?, None))
    }

    /// Why there was no connection, in plain words where it is about who the cloud is.
    fn refusal(&self, error: ConnectionError) -> Disconnect {
        if let Some(refusal) = self.tls.take_refusal() {
            return Disconnect::Certificate(refusal);
        }
        let code = match &error {
            ConnectionError::TransportError(error) => u64::from(error.code),
            ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
            _ => 0,
        };
        // The alert's number (RFC 8446 §6, RFC 7301 §3.2).
        let alert = code.checked_sub(CRYPTO_ERROR).and_then(|alert| u8::try_from(alert).ok());
        match alert {
            Some(42..=46 | 48) => Disconnect::Certificate(format!(
                "the certificate of cloud {} is not trusted: {error}",
                self.settings.cloud
            )),
            Some(120) => Disconnect::Protocol(self.settings.cloud.clone()),
            _ => Disconnect::Connect(error.to_string()),
        }
    }
}

/// A connection whose handshake is complete.
struct Dialed {
    connection: Connection,
    protocol: Protocol,
    /// There if hello went with the first packet.
    greeted: Option<downpour::Greeted>,
}

/// Talks to a [`RepairClient`]; cloning shares it.
#[derive(Clone)]
pub struct RepairHandle {
    nacks: mpsc::Sender<Nack>,
    report: watch::Sender<Report>,
    wanted: watch::Sender<Vec<StreamPattern>>,
    shared: Arc<Shared>,
    metrics: RepairClientMetrics,
}

impl RepairHandle {
    /// Asks for packets, without ever waiting. What cannot be asked now is dropped and counted; the
    /// answers come as events.
    pub fn nack(&self, nack: Nack) {
        if let Err(error) = self.nacks.try_send(nack) {
            let (mpsc::error::TrySendError::Full(nack) | mpsc::error::TrySendError::Closed(nack)) =
                error;
            self.metrics.dropped_nacks.inc_by(nack.seqs.len() as u64);
        }
    }

    /// Waits until the client has ended, and the cloud been told so if it answers.
    pub async fn closed(&self) {
        self.nacks.closed().await;
    }

    /// Tells the cloud how this edge fares, in as many messages as it takes. A report that is not
    /// under way when the next one comes is not told; a v0 cloud gets none.
    pub fn report(&self, report: Report) {
        self.metrics.round_trip.set(report.round_trip_us as f64 / 1e6);
        self.report.send_replace(report);
    }

    /// Wants more streams, now and after each reconnection. A v0 cloud is not told.
    ///
    /// # Errors
    /// If there would be more than [`MAX_PATTERNS`]; nothing is changed then.
    pub fn subscribe(&self, patterns: &[StreamPattern]) -> Result<(), TooManyPatterns> {
        let mut fits = true;
        self.wanted.send_if_modified(|wanted| {
            let mut more: Vec<StreamPattern> = Vec::new();
            for pattern in patterns {
                if !wanted.contains(pattern) && !more.contains(pattern) {
                    more.push(pattern.clone());
                }
            }
            fits = wanted.len() + more.len() <= MAX_PATTERNS;
            if fits {
                wanted.extend_from_slice(&more);
            }
            fits && !more.is_empty()
        });
        if fits { Ok(()) } else { Err(TooManyPatterns) }
    }

    /// Wants some streams no more, each as it was subscribed to: the cloud tells nothing of them
    /// from then on, not even their end.
    pub fn unsubscribe(&self, patterns: &[StreamPattern]) {
        self.wanted.send_if_modified(|wanted| {
            let before = wanted.len();
            wanted.retain(|pattern| !patterns.contains(pattern));
            wanted.len() < before
        });
    }

    /// The smoothed round-trip time to the cloud, while connected.
    pub fn rtt(&self) -> Option<Duration> {
        self.shared.lock().as_ref().map(|(connection, _)| connection.rtt())
    }

    /// What is spoken with the cloud, while connected.
    pub fn protocol(&self) -> Option<Protocol> {
        self.shared.lock().as_ref().map(|(_, protocol)| *protocol)
    }
}

/// More patterns than the cloud takes from one edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_PATTERNS} stream patterns")]
pub struct TooManyPatterns;

/// Why a [`RepairClient`] cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Not a `host:port`.
    #[error("the cloud's QUIC address {0:?} is not host:port")]
    Cloud(String),
    /// The trust settings do not work.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The system gives no socket.
    #[error("no UDP socket: {0}")]
    Socket(io::Error),
}

/// Why a connection ended or did not come about.
#[derive(Debug, thiserror::Error)]
enum Disconnect {
    #[error("cannot find {0}: {1}")]
    Resolve(String, String),
    #[error("{0}")]
    Connect(String),
    /// The cloud is not who it should be.
    #[error("{0}")]
    Certificate(String),
    #[error("cloud {0} does not speak the protocol that was asked for")]
    Protocol(String),
    /// The cloud does not want this edge.
    #[error("{message}")]
    Refused { token: bool, message: String },
    #[error("{0}")]
    Lost(String),
    #[error("{0}")]
    Timeout(&'static str),
    #[error("the cloud broke the protocol: {0}")]
    Malformed(String),
    /// Nobody reads the events any more.
    #[error("stopped")]
    Stopped,
}

impl Disconnect {
    /// Waits a moment for the reason with which the cloud closes the connection: it says more than
    /// that a stream came to its end.
    async fn explain(result: Result<(), Self>, connection: &Connection) -> Result<(), Self> {
        if matches!(result, Err(Self::Lost(_)))
            && let Ok(reason) = timeout(CLOSE_TIMEOUT, connection.closed()).await
        {
            return Err(reason.into());
        }
        result
    }
}

impl From<ConnectionError> for Disconnect {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) if close.error_code == close::REFUSED => {
                let message = String::from_utf8_lossy(&close.reason).into_owned();
                Self::Refused { token: false, message }
            }
            ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
                Self::Lost(String::from_utf8_lossy(&close.reason).into_owned())
            }
            error => Self::Lost(error.to_string()),
        }
    }
}

impl From<Stopped> for Disconnect {
    fn from(_: Stopped) -> Self {
        Self::Stopped
    }
}

/// Nobody reads the events any more, or asks anything.
struct Stopped;

/// What the handle sends.
struct Inbox {
    nacks: mpsc::Receiver<Nack>,
    reports: watch::Receiver<Report>,
    wishes: watch::Receiver<Vec<StreamPattern>>,
}

impl Inbox {
    /// Forgets nacks from before there was a connection; what still matters is asked again.
    fn forget(&mut self, metrics: &RepairClientMetrics) {
        while let Ok(nack) = self.nacks.try_recv() {
            metrics.dropped_nacks.inc_by(nack.seqs.len() as u64);
        }
    }
}

#[derive(Clone)]
struct EventSender {
    events: mpsc::Sender<RepairEvent>,
    metrics: RepairClientMetrics,
}

impl EventSender {
    /// For what must not be lost: waits for room.
    async fn send(&self, event: RepairEvent) -> Result<(), Stopped> {
        self.events.send(event).await.map_err(|_| Stopped)
    }

    /// For what comes again or is asked for again: counts it if there is no room.
    fn offer(&self, event: RepairEvent) -> Result<(), Stopped> {
        match &event {
            RepairEvent::Repair(packet) => {
                self.metrics.repairs.inc();
                self.metrics.repair_bytes.inc_by(packet.len() as u64);
            }
            RepairEvent::Gone(gone) => self.metrics.gone.inc_by(gone.seqs.len() as u64),
            _ => {}
        }
        match self.events.try_send(event) {
            Ok(()) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.metrics.dropped_events.inc();
                Ok(())
            }
            Err(mpsc::error::TrySendError::Closed(_)) => Err(Stopped),
        }
    }
}

/// The connection, for who asks about it.
#[derive(Default)]
struct Shared(Mutex<Option<(Connection, Protocol)>>);

impl Shared {
    fn set(&self, connection: Option<(Connection, Protocol)>) {
        *self.lock() = connection;
    }

    fn lock(&self) -> MutexGuard<'_, Option<(Connection, Protocol)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the gauge right however a session ends.
struct ConnectedGuard(prometheus::IntGauge);

impl ConnectedGuard {
    fn new(gauge: &prometheus::IntGauge) -> Self {
        gauge.set(1);
        Self(gauge.clone())
    }
}

impl Drop for ConnectedGuard {
    fn drop(&mut self) {
        self.0.set(0);
    }
}

/// Nacks that may wait for a connection to take them.
const NACK_QUEUE: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// Where TLS alerts begin among QUIC's error codes (RFC 9001 §4.8).
const CRYPTO_ERROR: u64 = 0x100;
