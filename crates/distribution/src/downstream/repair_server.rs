//! The cloud's end of the repair connection.

mod downpour;
mod heartbeat;
mod metrics;
mod repairer;
mod v0;

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::{Duration, Instant},
};

use bytes::Bytes;
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

use self::heartbeat::{Beats, Heartbeats, TICK};
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
    multicast_repair::{GroupBudget, GroupRepair},
};

/// A QUIC socket on which edges ask for lost packets, in either protocol.
pub struct RepairServer {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

/// What may be set.
#[derive(Debug, Clone)]
pub struct RepairServerSettings {
    /// This node's name, told in `welcome`.
    pub node: String,
    /// The UDP port from which RTP is sent, told in `welcome`.
    pub rtp_port: u16,
    /// What an edge must send in `hello`, if anything. It does not bind v0 edges, which can send
    /// nothing: switch those off if it matters.
    pub token: Option<String>,
    /// Whether existing (v0) edges are served.
    pub v0: bool,
    /// From where they may come; empty is from anywhere.
    pub v0_allow: Vec<AddrRange>,
    /// Connections at a time; more are refused.
    pub max_connections: usize,
    /// What each connection may be sent again, in per cent of the byte rate of the streams that the
    /// edge subscribes to, of all streams for a v0 edge and for a multicast group; but never under
    /// 16 KiB a second. 0 for no limit.
    pub repair_budget: u32,
    /// Bytes of repairs that may go out at once, where ten seconds' budget is less: an edge that
    /// joins fetches a whole group of pictures.
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

/// Who wants to know about edges that say hello.
pub trait EdgeHandler: Send + Sync + 'static {
    /// Admits an edge, or refuses it with a reason that it is told.
    ///
    /// # Errors
    /// The reason.
    fn hello(&self, edge: &EdgeHello) -> Result<Box<dyn EdgeSession>, String>;

    /// An existing (v0) edge connected, which says nothing of itself. What is given is dropped when
    /// its connection ends.
    fn v0_connected(&self, _peer: SocketAddr) -> Box<dyn Send> {
        Box::new(())
    }
}

/// One admitted edge; dropped when its connection ends.
pub trait EdgeSession: Send {
    /// The edge now wants these streams, and no others.
    fn subscribed(&mut self, streams: &[StreamPattern]);
    /// The edge told how it fares.
    fn reported(&mut self, report: Report);
}

/// Who sends to multicast groups.
pub trait GroupSender: Send + Sync + 'static {
    /// Sends one RTP packet to a group, without waiting. False if this node does not send to that
    /// group: an edge's word alone must not choose where packets go.
    fn send(&self, group: SocketAddr, packet: Bytes) -> bool;
}

/// An edge as it presents itself.
#[derive(Debug, Clone)]
pub struct EdgeHello {
    /// Where its QUIC connection comes from.
    pub peer: SocketAddr,
    /// Its name: at most 128 bytes, no control characters.
    pub node: String,
    /// Its token, which matched if the settings have one.
    pub token: Option<String>,
    /// The UDP port on which it takes RTP.
    pub rtp_port: Option<u16>,
    /// For how many addresses it will send proof.
    pub rtp_paths: u8,
    /// The multicast group that it listens to.
    pub group: Option<SocketAddr>,
    /// Whether it takes parity where it takes RTP.
    pub parity: bool,
    /// How late a packet may come to be of use to it.
    pub latency: Duration,
    /// What it will send from its RTP ports to prove their addresses.
    pub nonce: Nonce,
    /// Messages for it, besides those about streams.
    pub outbox: mpsc::Sender<CloudMessage>,
}

impl RepairServer {
    /// Opens the socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be had, or the identity cannot be used.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        origin: OutgoingStreams,
        settings: RepairServerSettings,
        metrics: RepairServerMetrics,
    ) -> Result<Self, BindError> {
        let downpour = Protocol::Downpour.alpn();
        let protocols: &[_] =
            if settings.v0 { &[downpour, Protocol::V0.alpn()] } else { &[downpour] };
        let mut config = identity.resuming_server_config(protocols, settings.max_connections)?;
        config
            .transport_config(Arc::new(transport::server()))
            .max_incoming(MAX_INCOMING)
            .incoming_buffer_size_total(INCOMING_BUFFER);
        let runtime = quinn::default_runtime()
            .ok_or_else(|| BindError::Socket(addr, io::Error::other("no tokio runtime")))?;
        let endpoint = transport::bind(addr)
            .and_then(|socket| {
                Endpoint::new(identity.endpoint_config(), Some(config), socket, runtime)
            })
            .map_err(|error| BindError::Socket(addr, error))?;
        let heartbeats = broadcast::channel(HEARTBEAT_BACKLOG).0;
        let shared = Shared {
            origin,
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

    /// Asks `handler` about every edge that says hello.
    pub fn with_handler(mut self, handler: Arc<dyn EdgeHandler>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.handler = Some(handler);
        }
        self
    }

    /// Answers what many edges of a multicast group ask for at once by sending it to the group.
    pub fn with_group_sender(mut self, sender: Arc<dyn GroupSender>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.group_sender = Some(sender);
        }
        self
    }

    /// The address that edges connect to.
    ///
    /// # Errors
    /// What the system said.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `shutdown`, then tells edges of streams that have ended, lets what is on its
    /// way arrive, and closes all connections, within two seconds.
    pub async fn run(self, shutdown: CancellationToken) {
        let _beats = AbortOnDropHandle::new(tokio::spawn(beat(self.shared.clone())));
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
            tracing::debug!("closing repair connections that did not drain");
        }
        self.endpoint.close(close::SHUTDOWN, b"the cloud is shutting down");
        // An error only says that an edge did not acknowledge the close in time.
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
            tracing::debug!(peer = %incoming.remote_address(), "refused: {max} edges are connected");
            incoming.refuse();
        } else if connections.len() >= max / 2 && !incoming.remote_address_validated() {
            // Half full: forged source addresses shall not fill the rest (RFC 9000 §8.1.2).
            if let Err(error) = incoming.retry() {
                tracing::debug!(%error, "no address validation");
            }
        } else {
            let shared = self.shared.clone();
            let shutdown = shutdown.clone();
            connections.spawn(async move { shared.serve(incoming, shutdown).await });
        }
    }
}

/// Why a [`RepairServer`] cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address is taken, or not ours.
    #[error("the QUIC address {0}: {1}")]
    Socket(SocketAddr, io::Error),
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// What all connections share.
struct Shared {
    origin: OutgoingStreams,
    settings: RepairServerSettings,
    metrics: RepairServerMetrics,
    handler: Option<Arc<dyn EdgeHandler>>,
    group_sender: Option<Arc<dyn GroupSender>>,
    groups: Mutex<GroupRepair>,
    /// Edges so far: each has its number.
    edges: AtomicU64,
    /// Bytes a second of all streams, and when that was found.
    total_rate: Mutex<(Instant, Option<u64>)>,
    heartbeats: broadcast::Sender<Arc<Beats>>,
}

/// What one handshake came to.
struct Accepted {
    connection: Connection,
    protocol: Protocol,
    /// Where the handshake is not complete yet, because the edge was known and spoke at once.
    early: Option<Early>,
}

/// What came as early data (0-RTT, RFC 8446 §2.3).
///
/// Someone who recorded it could send it again. TLS takes each session's early data once, as long
/// as this process lives, and a session of an earlier process is unknown. Should it come twice all
/// the same, no harm is done: it is a hello, which starts no RTP before its address is proven with
/// the nonce, and brings repairs only on this connection, whose packets nobody else can read and
/// which ends if its handshake does not.
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
                tracing::info!(%peer, %error, "an edge's handshake failed");
                return;
            }
            Err(_) => {
                self.metrics.refused_handshake.inc();
                tracing::debug!(%peer, "the handshake took too long");
                return;
            }
        };
        let Accepted { connection, protocol, early } = accepted;
        if protocol == Protocol::V0 && !self.allows_v0(peer) {
            self.metrics.refused_v0_address.inc();
            tracing::info!(%peer, "a v0 edge was refused: v0_allow does not name its address");
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
        tracing::info!(%peer, protocol = protocol.as_str(), resumed, "edge connected for repair");
        let reason = self.serve_protocol(protocol, &connection, early, &shutdown).await;
        drop(open);
        tracing::info!(%peer, protocol = protocol.as_str(), reason, "edge disconnected");
    }

    /// Serves until the connection ends; why it did.
    async fn serve_protocol(
        &self,
        protocol: Protocol,
        connection: &Connection,
        early: Option<Early>,
        shutdown: &CancellationToken,
    ) -> String {
        match protocol {
            Protocol::V0 => {
                let peer = connection.remote_address();
                let _listed = self.handler.as_ref().map(|handler| handler.v0_connected(peer));
                match v0::serve(self, connection, shutdown).await {
                    Ok(()) => "done".into(),
                    Err(error) => {
                        connection.close(close::DONE, b"");
                        error.to_string()
                    }
                }
            }
            Protocol::Downpour => match downpour::serve(self, connection, early, shutdown).await {
                Ok(()) => "done".into(),
                Err(error) => error.to_string(),
            },
        }
    }

    fn allows_v0(&self, peer: SocketAddr) -> bool {
        let allowed = &self.settings.v0_allow;
        allowed.is_empty() || allowed.iter().any(|range| range.contains(peer.ip()))
    }

    /// What may be sent again to a peer that gets streams of `rate` bytes a second: bytes a second,
    /// 0 for no limit, and bytes at once.
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
        let mut total = self.total_rate.lock().unwrap_or_else(PoisonError::into_inner);
        let (found, known) = *total;
        let rate = match known {
            Some(rate) if now.saturating_duration_since(found) < BUDGET_AGE => rate,
            _ => {
                let streams = self.origin.streams();
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

    fn groups(&self) -> MutexGuard<'_, GroupRepair> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No edge needs more sequence numbers a second; looking each one up is what one could make
    /// us do for a few bytes.
    fn request_bucket(&self) -> TokenBucket {
        TokenBucket::new(Instant::now(), MAX_REQUESTS_PER_SECOND, MAX_REQUESTS_PER_SECOND)
    }

    fn reap(&self, ended: Result<(), JoinError>) {
        if ended.is_err_and(|error| error.is_panic()) {
            self.metrics.panics.inc();
            tracing::error!("a repair connection's task panicked");
        }
    }
}

/// Takes a connection up to where it can be served: to the end of its handshake, or to its first
/// words if they came with the first packet.
async fn accept(incoming: Incoming) -> Result<Accepted, AcceptError> {
    let mut connecting = incoming.accept()?;
    let handshake = connecting.handshake_data().await?;
    // The TLS layer refuses any other, and none.
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
        // What it resolves to means nothing at this end.
        _ = &mut established => match connection.close_reason() {
            Some(error) => return Err(error.into()),
            None => None,
        },
        control = connection.accept_bi() => Some(control?),
    };
    let early = control.map(|control| Early { control, established });
    Ok(Accepted { connection, protocol, early })
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum AcceptError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("unknown protocol")]
    Protocol,
}

/// Counts a connection as closed however its task ends.
struct OpenGuard(prometheus::IntGauge);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Works out the heartbeats of all streams once for all edges.
async fn beat(shared: Arc<Shared>) {
    let mut heartbeats = Heartbeats::default();
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        if shared.heartbeats.receiver_count() == 0 {
            continue;
        }
        let streams = shared.origin.streams();
        let live = streams
            .iter()
            .filter(|stream| !stream.ended())
            .filter_map(|stream| Some((stream.ssrc(), stream.left_seq()?)));
        let due = heartbeats.poll(Instant::now(), live);
        if !due.is_empty() {
            // An error only says that nobody listens.
            let _ = shared.heartbeats.send(Arc::new(due));
        }
    }
}

/// Handshakes that wait for [`RepairServer::run`] to look at them, and the bytes they may hold.
const MAX_INCOMING: usize = 1024;
const INCOMING_BUFFER: u64 = 8 * 1024 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_REQUESTS_PER_SECOND: u64 = 100_000;
/// Bytes a second that even a whisper of a stream gets: a packet in 70 ms.
const MIN_REPAIR_RATE: u64 = 16 * 1024;
/// Of budget that may be spent at once: as long as the ring holds packets by default.
const BURST_SECONDS: u64 = 10;
/// How old a budget may be before it is worked out anew.
const BUDGET_AGE: Duration = Duration::from_secs(1);
/// Rounds of heartbeats kept for a connection that is busy; it misses older ones.
const HEARTBEAT_BACKLOG: usize = 16;
