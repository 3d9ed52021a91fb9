//! Repair client: an edge's QUIC connection to its cloud.
//!
//! # States
//!
//! | state | event | next state |
//! |---|---|---|
//! | waiting, with [`ProtocolChoice::Only`] v0, or after a v0 cloud has closed an idle connection | first NACK, or `PROBE_AGAIN` unless v0 is the only choice | connecting |
//! | connecting: resolve, TLS, ALPN | established | v0, or hello sent; [`RepairEvent::Connected`] |
//! | hello sent (with 0-RTT already while connecting) | welcome | running; [`RepairEvent::Welcome`] |
//! | v0, running | messages of the cloud | the same; the other events |
//! | v0 without anything to request | first NACK | connecting, at once |
//! | connecting, hello sent, v0, running | any failure | back-off; [`RepairEvent::Disconnected`] |
//! | back-off | pause over | connecting, or waiting |
//! | any | shutdown, or the receiver of the events is dropped | ended |

mod backoff;
mod disconnect;
mod downpour;
mod handle;
mod metrics;
mod v0;

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Once},
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
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::{
    handle::{RepairHandle, TooManyPatterns},
    metrics::RepairClientMetrics,
};

use self::{
    backoff::Backoff,
    disconnect::{Disconnect, Stopped},
    handle::{Ask, Connected},
};
use crate::tls::{ClientTls, TlsError, Trust};
use crate::{
    protocol::{Protocol, close},
    transport,
};
use downpour_media::StreamPattern;
use downpour_media::flv::{Headers, Tag};
use downpour_repair::rtp::{Seq, Ssrc};
use downpour_repair::{
    control::{Report, StreamInfo, Welcome},
    message::{Gone, Heartbeat, Nack},
};

/// Keeps a connection to the cloud: reconnects until shutdown.
pub struct RepairClient {
    settings: RepairClientSettings,
    /// Host of [`RepairClientSettings::cloud`], which the certificate must name.
    host: String,
    tls: ClientTls,
    /// Shared by all connections, because it caches session tickets.
    config: quinn::ClientConfig,
    /// Whether the last connection spoke `downpour/1`; a resumed one then does, too.
    resumes: bool,
    /// Whether the last connection spoke v0 and had nothing to request.
    is_idle: bool,
    /// v0 connections whose last answers are awaited.
    leaving: TaskTracker,
    endpoint: Endpoint,
    ipv6: bool,
    connected: Arc<Connected>,
    inbox: Inbox,
    events: EventSender,
    metrics: RepairClientMetrics,
    shutdown: CancellationToken,
    /// Limits a warning to one per client.
    unpinned_logged: Once,
}

/// Settings of a [`RepairClient`].
#[derive(Debug, Clone)]
pub struct RepairClientSettings {
    /// The cloud's QUIC address, `host:port`; resolved for each connection.
    pub cloud: String,
    /// Protocols to offer.
    pub protocol: ProtocolChoice,
    /// How to verify the cloud's certificate.
    pub trust: Trust,
    /// This node's name, sent in `hello`.
    pub node: String,
    /// The token that the cloud requires, if any.
    pub token: Option<String>,
    /// The initial subscription.
    pub streams: Vec<StreamPattern>,
    /// UDP port to which the cloud is to send RTP, if it is to.
    pub rtp_port: Option<u16>,
    /// Number of paths on which the cloud is to send RTP, 0..=2.
    pub rtp_paths: u8,
    /// The multicast group on which this edge receives RTP, if any.
    pub group: Option<SocketAddr>,
    /// Whether this edge accepts parity where it receives RTP.
    pub parity: bool,
    /// How late a packet may arrive to be useful.
    pub latency: Duration,
}

/// Protocols to offer to the cloud.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ProtocolChoice {
    /// Both; the cloud chooses.
    #[default]
    Auto,
    /// Only this one. With v0, the client connects when there is a NACK to send.
    Only(Protocol),
}

/// An event of the repair connection.
#[derive(Debug, Clone, PartialEq)]
pub enum RepairEvent {
    /// The connection is established.
    Connected {
        /// Its protocol.
        protocol: Protocol,
    },
    /// The connection ended or could not be made. Requests in flight will not be answered.
    Disconnected {
        /// Why, for the log.
        reason: String,
    },
    /// The cloud's name, nonce and RTP port.
    Welcome(Welcome),
    /// A subscribed stream has started, or is live already. Sent again after a reconnection.
    StreamUp(StreamInfo),
    /// A stream's headers changed.
    StreamUpdate {
        /// The stream.
        ssrc: Ssrc,
        /// All of its headers.
        headers: Headers,
    },
    /// Script data in a stream.
    StreamData {
        /// The stream.
        ssrc: Ssrc,
        /// The script tag.
        tag: Tag,
    },
    /// A stream has ended.
    StreamEnd {
        /// The stream.
        ssrc: Ssrc,
        /// The last sequence number sent, if any was.
        last_seq: Option<Seq>,
    },
    /// The cloud is shutting down; the ends that follow are its own.
    Closing,
    /// The cloud sends RTP to an address that this edge has proved to be its own.
    PathUp {
        /// Number of the path, 0 or 1.
        path: u8,
        /// The address as the cloud sees it.
        address: SocketAddr,
    },
    /// A repaired RTP packet.
    Repair(Bytes),
    /// Packets that the cloud no longer holds.
    Gone(Gone),
    /// The highest sequence number of each stream.
    Heartbeats(Vec<Heartbeat>),
}

impl RepairClient {
    /// Spawns the client, which runs until `shutdown`. Must be called inside a tokio runtime.
    ///
    /// Read `events` promptly: when it is full, repairs, gone messages and heartbeats are dropped
    /// and counted, and all other events wait.
    ///
    /// # Errors
    /// If `cloud` is not a `host:port`, the trust file is invalid, or no UDP socket is available.
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
        let (endpoint, ipv6) = bind_endpoint().map_err(ClientError::Socket)?;

        let (asks, ask_queue) = mpsc::channel(NACK_QUEUE);
        let (report, reports) = watch::channel(Report::default());
        let (wanted, wanted_changes) = watch::channel(settings.streams.clone());
        let connected = Arc::new(Connected::default());
        let handle = RepairHandle {
            asks,
            report,
            wanted,
            connected: connected.clone(),
            metrics: metrics.clone(),
        };
        let client = Self {
            settings,
            host,
            tls,
            config,
            resumes: false,
            is_idle: false,
            leaving: TaskTracker::new(),
            endpoint,
            ipv6,
            connected,
            inbox: Inbox { asks: ask_queue, reports, wanted: wanted_changes },
            events: EventSender { events, metrics: metrics.clone() },
            metrics,
            shutdown,
            unpinned_logged: Once::new(),
        };
        tokio::spawn(client.run());
        Ok(handle)
    }

    async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut last_reason = String::new();
        let mut redial = None;
        while !self.shutdown.is_cancelled() && !self.events.events.is_closed() {
            let first_nack = match redial.take() {
                Some(nack) => Some(nack),
                None => match self.first_nack().await {
                    Ok(nack) => nack,
                    Err(Stopped) => break,
                },
            };
            let started = Instant::now();
            let result = self.session(first_nack).await;
            self.connected.set(None);
            self.is_idle = matches!(result, Ok(After::Idle));
            let reason = match result {
                Ok(After::Stopped) | Err(Disconnect::Stopped) => break,
                Ok(After::Idle) => continue,
                Ok(After::Redial(nack)) => {
                    redial = Some(nack);
                    continue;
                }
                Err(reason) => {
                    self.metrics.count(&reason);
                    reason.to_string()
                }
            };
            if reason != last_reason {
                tracing::warn!(
                    cloud = self.settings.cloud,
                    reason,
                    "no repair connection; retrying"
                );
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
        self.leaving.close();
        if timeout(LEAVE_TIMEOUT, self.leaving.wait()).await.is_err() {
            // A close could bring down a v0 cloud that still answers: let the path fall silent instead.
            tracing::debug!("v0 repair connections end without a close: answers are missing");
            return;
        }
        self.endpoint.close(close::DONE, b"the edge is shutting down");
        // On a timeout, the cloud has not acknowledged the close; nothing is left to do.
        let _ = timeout(CLOSE_TIMEOUT, self.endpoint.wait_idle()).await;
    }

    /// With a v0 cloud, waits for a NACK before connecting, as existing edges do. Returns `None` if it
    /// is time to see whether the cloud speaks `downpour/1` by now.
    async fn first_nack(&mut self) -> Result<Option<Nack>, Stopped> {
        let only_v0 = self.settings.protocol == ProtocolChoice::Only(Protocol::V0);
        if !only_v0 && !self.is_idle {
            return Ok(None);
        }
        tokio::select! {
            nack = self.inbox.next_nack() => nack.map(Some).ok_or(Stopped),
            () = sleep(PROBE_AGAIN), if !only_v0 => Ok(None),
            () = self.shutdown.cancelled() => Err(Stopped),
            () = self.events.events.closed() => Err(Stopped),
        }
    }

    /// Makes one connection and runs it to its end.
    async fn session(&mut self, first_nack: Option<Nack>) -> Result<After, Disconnect> {
        let connected = tokio::select! {
            connected = self.connect() => connected,
            () = self.shutdown.cancelled() => return Ok(After::Stopped),
        };
        let Established { connection, protocol, greeted } = connected.inspect_err(|_| {
            self.metrics.connect_failures.inc();
        })?;
        self.resumes = protocol == Protocol::Downpour;
        self.metrics.connects.inc();
        let _connected = ConnectedGuard::new(self.metrics.connected(protocol));
        self.connected.set(Some((connection.clone(), protocol)));
        if protocol == Protocol::V0 {
            log_connected(&self.settings.cloud, &connection, protocol);
        }
        self.events.send(RepairEvent::Connected { protocol }).await?;

        let result = match (protocol, first_nack) {
            // These close the connection themselves.
            (Protocol::V0, Some(nack)) => return v0::run(self, &connection, nack).await,
            (Protocol::V0, None) => return v0::stand_by(self, &connection).await,
            (Protocol::Downpour, _) => downpour::run(self, &connection, greeted).await,
        };
        match &result {
            Ok(()) => connection.close(close::DONE, b"the edge is shutting down"),
            Err(reason @ Disconnect::Malformed(_)) => {
                connection.close(close::MALFORMED, reason.to_string().as_bytes());
            }
            Err(Disconnect::Timeout(reason)) => connection.close(close::TIMEOUT, reason.as_bytes()),
            Err(_) => connection.close(close::DONE, b""),
        }
        result.map(|()| After::Stopped)
    }

    async fn connect(&self) -> Result<Established, Disconnect> {
        let cloud = &self.settings.cloud;
        let resolved = timeout(CONNECT_TIMEOUT, lookup_host(cloud)).await;
        let addrs: Vec<SocketAddr> = resolved
            .map_err(|_| Disconnect::Resolve(cloud.clone(), "no answer".into()))?
            .map_err(|error| Disconnect::Resolve(cloud.clone(), error.to_string()))?
            .filter(|addr| self.ipv6 || addr.is_ipv4())
            .collect();
        // Spread the edges, and their retries, over all addresses of the name.
        let pick = rand::random_range(0..addrs.len().max(1));
        let addr = *addrs
            .get(pick)
            .ok_or_else(|| Disconnect::Resolve(cloud.clone(), "it has no address".into()))?;

        self.tls.revalidate(&self.host);
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), addr, &self.host)
            .map_err(|error| Disconnect::Connect(error.to_string()))?;
        let (connection, greeted) = match timeout(CONNECT_TIMEOUT, self.handshake(connecting)).await
        {
            Ok(Ok(established)) => established,
            Ok(Err(error)) => return Err(self.refusal(error)),
            Err(_) => return Err(Disconnect::Connect(format!("{addr} does not answer"))),
        };
        match Protocol::of(&connection) {
            Some(Protocol::Downpour) => {
                self.tls.pin().map_err(|error| Disconnect::Connect(error.to_string()))?;
                Ok(Established { connection, protocol: Protocol::Downpour, greeted })
            }
            // A v0 cloud makes a new certificate at each start, so a pin would refuse it after its
            // next restart. An existing pin was checked in the handshake.
            Some(Protocol::V0) => {
                if matches!(self.settings.trust, Trust::TrustOnFirstUse(_)) {
                    self.unpinned_logged.call_once(|| {
                        tracing::warn!(
                            cloud,
                            "certificate not pinned: v0 cloud replaces it at each start"
                        );
                    });
                }
                Ok(Established { connection, protocol: Protocol::V0, greeted: None })
            }
            None => Err(Disconnect::Malformed("the cloud chose no protocol".into())),
        }
    }

    /// Completes the handshake. When it resumes a session, it sends hello as 0-RTT data, so that
    /// the welcome arrives after one round trip. Returns the control stream if the cloud accepted
    /// that. Only hello is sent as 0-RTT data: the repair server's `Early` documents why a replay
    /// is harmless.
    async fn handshake(
        &self,
        connecting: Connecting,
    ) -> Result<(Connection, Option<downpour::Greeted>), ConnectionError> {
        let connecting = if self.resumes {
            match connecting.into_0rtt() {
                Ok((connection, accepted)) => {
                    let wanted = self.inbox.wanted.borrow().clone();
                    let greeted = downpour::send_hello(&self.settings, wanted, &connection).await;
                    // Also `false` if the connection failed.
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

    /// Explains a failed handshake, with the TLS alert where it is about identity or protocol.
    fn refusal(&self, error: ConnectionError) -> Disconnect {
        if let Some(refusal) = self.tls.take_refusal() {
            return Disconnect::Certificate(refusal);
        }
        let code = match &error {
            ConnectionError::TransportError(error) => u64::from(error.code),
            ConnectionError::ConnectionClosed(close) => u64::from(close.error_code),
            _ => 0,
        };
        // TLS alert numbers: RFC 8446 §6, RFC 7301 §3.2.
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

/// Under `downpour/1` only after the cloud's welcome: before that it may refuse this edge.
fn log_connected(cloud: &str, connection: &Connection, protocol: Protocol) {
    let peer = connection.remote_address();
    let protocol = protocol.as_str();
    tracing::info!(cloud, %peer, protocol, "repair connection established");
}

/// Binds a UDP socket of any port. Returns whether it is an IPv6 socket, which reaches IPv4, too.
fn bind_endpoint() -> io::Result<(Endpoint, bool)> {
    let (socket, ipv6) = match transport::bind((Ipv6Addr::UNSPECIFIED, 0).into()) {
        Ok(socket) => (socket, true),
        Err(_) => (transport::bind((Ipv4Addr::UNSPECIFIED, 0).into())?, false),
    };
    let runtime = quinn::default_runtime().ok_or_else(|| io::Error::other("no tokio runtime"))?;
    let endpoint = Endpoint::new(transport::edge_endpoint(), None, socket, runtime)?;
    Ok((endpoint, ipv6))
}

/// What follows a connection that ended in order.
enum After {
    /// Nothing: the client ends.
    Stopped,
    /// A v0 connection was closed while there was nothing to request.
    Idle,
    /// There is something to request on a new connection.
    Redial(Nack),
}

/// A connection whose handshake is complete.
struct Established {
    connection: Connection,
    protocol: Protocol,
    /// Set if the cloud accepted hello as 0-RTT data.
    greeted: Option<downpour::Greeted>,
}

/// Why a [`RepairClient`] cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not a `host:port`.
    #[error("the cloud's QUIC address {0:?} is not host:port")]
    Cloud(String),
    /// The trust settings are invalid.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No UDP socket is available.
    #[error("no UDP socket: {0}")]
    Socket(io::Error),
}

/// Receiving ends of the handle's channels.
struct Inbox {
    asks: mpsc::Receiver<Ask>,
    reports: watch::Receiver<Report>,
    wanted: watch::Receiver<Vec<StreamPattern>>,
}

impl Inbox {
    /// Discards NACKs from before the connection. The receiver repeats those that still matter.
    fn discard_nacks(&mut self, metrics: &RepairClientMetrics) {
        while let Ok(ask) = self.asks.try_recv() {
            if let Ask::Nack(nack) = ask {
                metrics.dropped_nacks.inc_by(nack.seqs.len() as u64);
            }
        }
    }

    /// Waits for the next NACK; `None` if the handle is dropped.
    async fn next_nack(&mut self) -> Option<Nack> {
        loop {
            match self.asks.recv().await? {
                Ask::Nack(nack) => return Some(nack),
                Ask::Withdraw(..) => {}
            }
        }
    }
}

/// Sender of [`RepairEvent`]s.
#[derive(Clone)]
struct EventSender {
    events: mpsc::Sender<RepairEvent>,
    metrics: RepairClientMetrics,
}

impl EventSender {
    /// Sends an event that must not be lost: waits while the channel is full.
    async fn send(&self, event: RepairEvent) -> Result<(), Stopped> {
        self.events.send(event).await.map_err(|_| Stopped)
    }

    /// Sends an event that is repeated or requested again: drops and counts it if the channel is
    /// full.
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

/// Sets a gauge to 1, and to 0 when dropped.
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

/// NACKs that may wait for the connection.
const NACK_QUEUE: usize = 256;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a shutdown waits for the answers that a v0 cloud owes.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(1500);
/// How often a v0 cloud without anything to request is asked for its protocol.
const PROBE_AGAIN: Duration = Duration::from_secs(30);
/// QUIC error code of TLS alert 0 (RFC 9001 §4.8).
const CRYPTO_ERROR: u64 = 0x100;
