//! Repair server: the QUIC endpoint at which edges subscribe to streams and request lost packets.
//!
//! A connection passes through these states:
//!
//! ```text
//! incoming ──admit──> handshake ──> v0: serve requests ──────────────────────────> closed
//!    │ full, retry        │    └──> downpour/1: hello ──admit──> session ────────> closed
//!    v                    v                       │ refused          ^
//! refused              refused                    v                  └ control stream (`downpour`)
//!                                              refused                 and datagrams (`repairer`)
//! ```
//!
//! Invariants: at most `max_connections` connections; repairs of one connection stay within its budget,
//! which derives from the byte rate of its streams; no connection waits for another.

mod downpour;
mod heartbeat;
mod metrics;
mod repairer;
mod v0;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use quinn::{
    Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream, ZeroRttAccepted,
};
use tokio::{
    sync::{broadcast, mpsc},
    task::{JoinError, JoinSet},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub use metrics::{ProtocolMetrics, RepairServerMetrics};

use self::heartbeat::{DueHeartbeats, Heartbeats, TICK};
use crate::{
    AddrRange,
    downstream::outgoing::OutgoingStreams,
    tls::{Identity, TlsError},
};
use crate::{
    protocol::{Protocol, close},
    transport,
};
use downpour_media::StreamPattern;
use downpour_repair::{
    bucket::TokenBucket,
    control::{CloudMessage, Nonce, Report},
    multicast_repair::{GroupBudget, MulticastRepair},
};

/// QUIC endpoint that serves repairs over both protocols, `downpour/1` and v0.
pub struct RepairServer {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

/// Settings of a [`RepairServer`].
#[derive(Debug, Clone)]
pub struct RepairServerSettings {
    /// This node's name, sent in `welcome`.
    pub node: String,
    /// Source port of RTP, sent in `welcome`.
    pub rtp_port: u16,
    /// Token that an edge must send in `hello`. v0 edges cannot send one and are not checked: disable
    /// v0 where that matters.
    pub token: Option<String>,
    /// `true` to serve existing (v0) edges.
    pub v0: bool,
    /// Addresses from which v0 edges may connect. Empty allows all.
    pub v0_allow: Vec<AddrRange>,
    /// Limit of concurrent connections. More are refused.
    pub max_connections: usize,
    /// Repair budget of a connection in per cent of the byte rate of its streams: those that the edge
    /// subscribes to, or all streams for a v0 edge and for a multicast group. The budget is at least
    /// 16 KiB per second. 0 means no limit.
    pub repair_budget: u32,
    /// Least size of a burst of repairs in bytes. The burst is ten seconds of budget if that is more.
    /// It must cover a whole GOP, which an edge requests when it joins.
    pub repair_burst: u64,
}

impl Default for RepairServerSettings {
    fn default() -> Self {
        Self {
            node: "cloud".into(),
            rtp_port: 0,
            token: None,
            v0: true,
            v0_allow: Vec::new(),
            max_connections: 1024,
            repair_budget: 100,
            repair_burst: 2 * 1024 * 1024,
        }
    }
}

/// Callbacks for edges that connect.
pub trait EdgeHandler: Send + Sync + 'static {
    /// Admits an edge that sent `hello`, or refuses it.
    ///
    /// # Errors
    /// The reason of the refusal, which is sent to the edge.
    fn hello(&self, edge: &EdgeHello) -> Result<Box<dyn EdgeSession>, String>;

    /// Called when a v0 edge connects. The returned guard is dropped when its connection ends.
    fn v0_connected(&self, _peer: SocketAddr) -> Box<dyn Send> {
        Box::new(())
    }
}

/// Callbacks for one admitted edge. Dropped when its connection ends.
pub trait EdgeSession: Send {
    /// The edge's subscription has changed to `streams`.
    fn subscribed(&mut self, streams: &[StreamPattern]);
    /// The edge has sent a report.
    fn reported(&mut self, report: Report);
}

/// Sender to multicast groups.
pub trait GroupSender: Send + Sync + 'static {
    /// Sends one RTP packet to a group, without blocking. Returns `false` if this node does not send to
    /// that group: an edge must not choose where packets go.
    fn send(&self, group: SocketAddr, packet: Bytes) -> bool;
}

/// An edge that asks to be admitted.
#[derive(Debug, Clone)]
pub struct EdgeHello {
    /// Remote address of its QUIC connection.
    pub peer: SocketAddr,
    /// Its name: 1 to 128 bytes, no control characters.
    pub node: String,
    /// Its token. Already checked, if the settings have one.
    pub token: Option<String>,
    /// The UDP port at which it receives RTP.
    pub rtp_port: Option<u16>,
    /// The number of paths that it will validate.
    pub rtp_paths: u8,
    /// The multicast group that it listens to.
    pub group: Option<SocketAddr>,
    /// `true` if it accepts parity at its RTP addresses.
    pub parity: bool,
    /// Its playout latency: a packet that is later is useless to it.
    pub latency: Duration,
    /// The nonce that its path validation probes will contain.
    pub nonce: Nonce,
    /// Queue of messages to the edge, other than announcements of streams.
    pub outbox: mpsc::Sender<CloudMessage>,
}

impl RepairServer {
    /// Binds the UDP socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be bound, or the identity is unusable.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        outgoing: OutgoingStreams,
        settings: RepairServerSettings,
        metrics: RepairServerMetrics,
    ) -> Result<Self, BindError> {
        let config = server_config(identity, settings.v0, settings.max_connections)?;
        let runtime = quinn::default_runtime()
            .ok_or_else(|| BindError::Socket(addr, io::Error::other("no tokio runtime")))?;
        let endpoint = transport::bind(addr)
            .and_then(|socket| {
                Endpoint::new(identity.endpoint_config(), Some(config), socket, runtime)
            })
            .map_err(|error| BindError::Socket(addr, error))?;
        let heartbeats = broadcast::channel(HEARTBEAT_CAPACITY).0;
        let shared = Shared {
            outgoing,
            settings,
            metrics,
            handler: None,
            group_sender: None,
            groups: Mutex::default(),
            edges: AtomicU64::new(0),
            total_rate: Mutex::new((Instant::now(), None)),
            heartbeats,
        };
        Ok(Self { endpoint, shared: Arc::new(shared) })
    }

    /// A handle that replaces the certificate while the server runs.
    pub(super) fn identity_setter(&self) -> IdentitySetter {
        let RepairServerSettings { v0, max_connections, .. } = self.shared.settings;
        IdentitySetter { endpoint: self.endpoint.clone(), v0, max_connections }
    }

    /// Sets the handler that admits edges. Without one, every edge is admitted.
    pub fn with_handler(mut self, handler: Arc<dyn EdgeHandler>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.handler = Some(handler);
        }
        self
    }

    /// Sets the sender for multicast repair: packets that many members of a group request at once are
    /// sent to the group.
    pub fn with_group_sender(mut self, sender: Arc<dyn GroupSender>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.group_sender = Some(sender);
        }
        self
    }

    /// The local address, to which edges connect.
    ///
    /// # Errors
    /// The error of the system call.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `shutdown`. Then announces ended streams, flushes, and closes all connections, all
    /// within two seconds.
    pub async fn run(self, shutdown: CancellationToken) {
        let _heartbeats =
            AbortOnDropHandle::new(tokio::spawn(send_heartbeats(self.shared.clone())));
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(ended) = connections.join_next(), if !connections.is_empty() => {
                    self.shared.reap(ended);
                }
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => self.admit(incoming, &mut connections, &shutdown),
                    None => break,
                },
            }
        }
        self.endpoint.set_server_config(None);
        let drained = timeout(DRAIN_TIMEOUT, async {
            while let Some(ended) = connections.join_next().await {
                self.shared.reap(ended);
            }
        });
        if drained.await.is_err() {
            tracing::debug!("repair connections did not drain in time; closing them");
        }
        self.endpoint.close(close::SHUTDOWN, b"the cloud is shutting down");
        // A timeout only means that an edge did not acknowledge the close.
        let _ = timeout(DRAIN_TIMEOUT, self.endpoint.wait_idle()).await;
    }

    fn admit(
        &self,
        incoming: Incoming,
        connections: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) {
        let max = self.shared.settings.max_connections;
        if connections.len() >= max {
            self.shared.metrics.refused_full.inc();
            let peer = incoming.remote_address();
            tracing::debug!(%peer, max_connections = max, "repair connection refused: too many");
            incoming.refuse();
        } else if connections.len() >= max / 2 && !incoming.remote_address_validated() {
            // From half of the limit on, validate addresses by a Retry, so that forged source
            // addresses cannot take the other half (RFC 9000 §8.1.2).
            if let Err(error) = incoming.retry() {
                tracing::debug!(%error, "QUIC Retry failed");
            }
        } else {
            let shared = self.shared.clone();
            let shutdown = shutdown.clone();
            connections.spawn(async move { shared.serve(incoming, shutdown).await });
        }
    }
}

/// Replaces the certificate of a [`RepairServer`].
pub(super) struct IdentitySetter {
    endpoint: Endpoint,
    v0: bool,
    max_connections: usize,
}

impl IdentitySetter {
    /// Presents `identity` to connections from now on. Sessions of the old one are not resumed.
    pub(super) fn set(&self, identity: &Identity) -> Result<(), TlsError> {
        let config = server_config(identity, self.v0, self.max_connections)?;
        self.endpoint.set_server_config(Some(config));
        Ok(())
    }
}

fn server_config(
    identity: &Identity,
    v0: bool,
    max_connections: usize,
) -> Result<quinn::ServerConfig, TlsError> {
    let downpour = Protocol::Downpour.alpn();
    let protocols: &[_] = if v0 { &[downpour, Protocol::V0.alpn()] } else { &[downpour] };
    let mut config = identity.resuming_server_config(protocols, max_connections)?;
    config
        .transport_config(Arc::new(transport::server()))
        .max_incoming(MAX_INCOMING)
        .incoming_buffer_size_total(INCOMING_BUFFER);
    Ok(config)
}

/// Why a [`RepairServer`] cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be bound.
    #[error("cannot bind the QUIC address {0}: {1}")]
    Socket(SocketAddr, io::Error),
    /// The certificate is unusable.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// State shared by all connections.
struct Shared {
    outgoing: OutgoingStreams,
    settings: RepairServerSettings,
    metrics: RepairServerMetrics,
    handler: Option<Arc<dyn EdgeHandler>>,
    group_sender: Option<Arc<dyn GroupSender>>,
    groups: Mutex<MulticastRepair>,
    /// Number of edges so far, from which each edge gets its number.
    edges: AtomicU64,
    /// Cached byte rate of all streams, and when it was computed.
    total_rate: Mutex<(Instant, Option<u64>)>,
    heartbeats: broadcast::Sender<Arc<DueHeartbeats>>,
}

/// How the connection of an edge ended.
enum Ended {
    /// The edge was not admitted.
    Refused(String),
    Disconnected(String),
}

/// A connection that can be served.
struct Accepted {
    connection: Connection,
    protocol: Protocol,
    /// Set if the edge resumed a session and its control stream arrived before the handshake was
    /// complete.
    early: Option<Early>,
}

/// A control stream that arrived as early data (0-RTT, RFC 8446 §2.3).
///
/// Early data can be replayed by an attacker who recorded it. TLS accepts each session's early data
/// once per process, and does not know sessions of an earlier process. Even a replay would be harmless:
/// a `hello` starts no RTP until the address is validated with the nonce; it causes repairs only on
/// this connection, whose packets the attacker cannot read; and the connection ends if the handshake
/// does not complete.
struct Early {
    control: (SendStream, RecvStream),
    established: ZeroRttAccepted,
}

impl Shared {
    async fn serve(&self, incoming: Incoming, shutdown: CancellationToken) {
        let peer = incoming.remote_address();
        let accepted = match timeout(HANDSHAKE_TIMEOUT, accept(incoming)).await {
            Ok(Ok(accepted)) => accepted,
            Ok(Err(error)) => {
                self.metrics.refused_handshake.inc();
                tracing::info!(%peer, %error, "repair connection handshake failed");
                return;
            }
            Err(_) => {
                self.metrics.refused_handshake.inc();
                tracing::debug!(%peer, "repair connection handshake timed out");
                return;
            }
        };
        let Accepted { connection, protocol, early } = accepted;
        if protocol == Protocol::V0 && !self.allows_v0(peer) {
            self.metrics.refused_v0_address.inc();
            tracing::info!(%peer, "v0 edge refused: its address is not in v0_allow");
            connection.close(close::REFUSED, b"v0 repair is not allowed from this address");
            return;
        }
        let metrics = self.metrics.of(protocol);
        metrics.accepted.inc();
        metrics.open.inc();
        let open = OpenGuard(metrics.open.clone());
        let resumed = early.is_some();
        if resumed {
            self.metrics.early_hellos.inc();
        }
        // An edge of downpour/1 is logged as connected once its hello is admitted.
        match protocol {
            Protocol::V0 => tracing::info!(%peer, protocol = protocol.as_str(), "edge connected"),
            Protocol::Downpour => tracing::debug!(%peer, resumed, "connection of an edge open"),
        }
        let ended = self.serve_protocol(protocol, &connection, early, &shutdown).await;
        drop(open);
        let protocol = protocol.as_str();
        match ended {
            Ended::Refused(reason) => tracing::warn!(%peer, protocol, reason, "edge refused"),
            Ended::Disconnected(reason) => {
                tracing::info!(%peer, protocol, reason, "edge disconnected");
            }
        }
    }

    /// Serves until the connection ends.
    async fn serve_protocol(
        &self,
        protocol: Protocol,
        connection: &Connection,
        early: Option<Early>,
        shutdown: &CancellationToken,
    ) -> Ended {
        match protocol {
            Protocol::V0 => {
                let peer = connection.remote_address();
                let _listed = self.handler.as_ref().map(|handler| handler.v0_connected(peer));
                Ended::Disconnected(match v0::serve(self, connection, shutdown).await {
                    Ok(()) => "done".into(),
                    Err(error) => {
                        connection.close(close::DONE, b"");
                        error.to_string()
                    }
                })
            }
            Protocol::Downpour => match downpour::serve(self, connection, early, shutdown).await {
                Ok(()) => Ended::Disconnected("done".into()),
                Err(error) if error.is_refusal() => Ended::Refused(error.to_string()),
                Err(error) => Ended::Disconnected(error.to_string()),
            },
        }
    }

    fn allows_v0(&self, peer: SocketAddr) -> bool {
        let allowed = &self.settings.v0_allow;
        allowed.is_empty() || allowed.iter().any(|range| range.contains(peer.ip()))
    }

    /// The repair budget of a peer whose streams have `rate` bytes per second: its rate in bytes per
    /// second (0 for no limit) and its burst in bytes.
    fn budget(&self, rate: u64) -> (u64, u64) {
        let percent = u64::from(self.settings.repair_budget);
        if percent == 0 {
            return (0, 0);
        }
        let rate = (rate.saturating_mul(percent) / 100).max(MIN_REPAIR_RATE);
        (rate, rate.saturating_mul(BURST_SECONDS).max(self.settings.repair_burst))
    }

    /// [`Shared::budget`] for all streams.
    fn total_budget(&self, now: Instant) -> (u64, u64) {
        let mut total = self.total_rate.lock();
        let (computed, known) = *total;
        let rate = match known {
            Some(rate) if now.saturating_duration_since(computed) < BUDGET_AGE => rate,
            _ => {
                let streams = self.outgoing.streams();
                let live = streams.iter().filter(|stream| !stream.ended());
                let rate = live.map(|stream| stream.byte_rate()).fold(0, u64::saturating_add);
                *total = (now, Some(rate));
                rate
            }
        };
        drop(total);
        self.budget(rate)
    }

    fn group_budget(&self, now: Instant) -> GroupBudget {
        let (rate, burst) = self.total_budget(now);
        GroupBudget { rate, burst }
    }

    fn groups(&self) -> MutexGuard<'_, MulticastRepair> {
        self.groups.lock()
    }

    /// Token bucket of one edge's requested sequence numbers. Each costs a lookup, which an edge could
    /// otherwise cause in great number with a few bytes.
    fn request_bucket(&self) -> TokenBucket {
        TokenBucket::new(Instant::now(), MAX_REQUESTS_PER_SECOND, MAX_REQUESTS_PER_SECOND)
    }

    fn reap(&self, ended: Result<(), JoinError>) {
        if ended.is_err_and(|error| error.is_panic()) {
            self.metrics.panics.inc();
            tracing::error!("repair connection task panicked");
        }
    }
}

/// Accepts a connection: waits for the end of its handshake, or for its control stream if that arrives
/// as early data.
async fn accept(incoming: Incoming) -> Result<Accepted, AcceptError> {
    let mut connecting = incoming.accept()?;
    let handshake = connecting.handshake_data().await?;
    // The TLS layer has already refused other protocols.
    let protocol = Protocol::of_handshake(handshake).ok_or(AcceptError::Protocol)?;
    let (connection, mut established) = match protocol {
        Protocol::V0 => {
            let connection = connecting.await?;
            return Ok(Accepted { connection, protocol, early: None });
        }
        Protocol::Downpour => match connecting.into_0rtt() {
            Ok(opened) => opened,
            Err(connecting) => {
                let connection = connecting.await?;
                return Ok(Accepted { connection, protocol, early: None });
            }
        },
    };
    let control = tokio::select! {
        biased;
        // On the server, the value of `established` has no meaning.
        _ = &mut established => match connection.close_reason() {
            Some(error) => return Err(error.into()),
            None => None,
        },
        control = connection.accept_bi() => Some(control?),
    };
    let early = control.map(|control| Early { control, established });
    Ok(Accepted { connection, protocol, early })
}

/// Why a connection could not be accepted.
#[derive(Debug, thiserror::Error)]
enum AcceptError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("unknown protocol")]
    Protocol,
}

/// Decrements the gauge of open connections when the connection's task ends, also by a panic.
struct OpenGuard(prometheus::IntGauge);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Computes the heartbeats of all streams, once for all edges.
async fn send_heartbeats(shared: Arc<Shared>) {
    let mut heartbeats = Heartbeats::default();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        if shared.heartbeats.receiver_count() == 0 {
            continue;
        }
        let streams = shared.outgoing.streams();
        let live = streams
            .iter()
            .filter(|stream| !stream.ended())
            .filter_map(|stream| Some((stream.ssrc(), stream.sent_seq()?)));
        let due = heartbeats.poll(Instant::now(), live);
        if !due.is_empty() {
            // Fails only without subscribers.
            let _ = shared.heartbeats.send(Arc::new(due));
        }
    }
}

/// Most incoming connections that [`RepairServer::run`] has not accepted yet.
const MAX_INCOMING: usize = 1024;
/// Bytes that incoming connections may buffer, all together.
const INCOMING_BUFFER: u64 = 8 * 1024 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
/// Sequence numbers per second and edge; more than an edge ever needs.
const MAX_REQUESTS_PER_SECOND: u64 = 100_000;
/// Least repair rate in bytes per second, also for streams of a low rate: one packet per 70 ms.
const MIN_REPAIR_RATE: u64 = 16 * 1024;
/// Seconds of budget in a burst: the default age limit of the history.
const BURST_SECONDS: u64 = 10;
/// Interval at which budgets are recomputed.
const BUDGET_AGE: Duration = Duration::from_secs(1);
/// Rounds of heartbeats kept for a busy connection. It misses older ones.
const HEARTBEAT_CAPACITY: usize = 16;
