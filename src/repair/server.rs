//! The cloud's end of the repair connection.

mod bucket;
mod downpour;
mod heartbeat;
mod metrics;
mod v0;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::{Connection, Endpoint, Incoming};
use tokio::{
    sync::broadcast,
    task::{JoinError, JoinSet},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

pub use metrics::{ProtocolMetrics, RepairServerMetrics};

use self::{
    bucket::TokenBucket,
    heartbeat::{Heartbeats, TICK},
};
use super::{
    Protocol, close,
    control::{Nonce, Report, StreamPattern},
    message::Heartbeat,
    transport,
};
use crate::{
    origin::Origin,
    tls::{Identity, TlsError},
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
    /// Connections at a time; more are refused.
    pub max_connections: usize,
    /// Bytes of repairs a second for each connection, 0 for no limit.
    pub repair_rate: u64,
    /// Bytes of repairs that may go out at once when [`Self::repair_rate`] is set.
    pub repair_burst: u64,
}

impl Default for RepairServerSettings {
    fn default() -> Self {
        Self {
            node: "cloud".into(),
            rtp_port: 0,
            token: None,
            v0: true,
            max_connections: 1024,
            repair_rate: 0,
            repair_burst: 1024 * 1024,
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
}

/// One admitted edge; dropped when its connection ends.
pub trait EdgeSession: Send {
    /// The edge now wants these streams, and no others.
    fn subscribed(&mut self, streams: &[StreamPattern]);
    /// The edge told how it fares.
    fn reported(&mut self, report: Report);
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
    /// What it will send from that port to prove its address.
    pub nonce: Nonce,
}

impl RepairServer {
    /// Opens the socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be had, or the identity cannot be used.
    pub fn bind(
        addr: SocketAddr,
        identity: &Identity,
        origin: Origin,
        settings: RepairServerSettings,
        metrics: RepairServerMetrics,
    ) -> Result<Self, BindError> {
        let downpour = Protocol::Downpour.alpn();
        let protocols: &[_] =
            if settings.v0 { &[downpour, Protocol::V0.alpn()] } else { &[downpour] };
        let mut config = identity.server_config(protocols)?;
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
        let shared = Shared { origin, settings, metrics, handler: None, heartbeats };
        Ok(Self { endpoint, shared: Arc::new(shared) })
    }

    /// Asks `handler` about every edge that says hello.
    pub fn with_handler(mut self, handler: Arc<dyn EdgeHandler>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.handler = Some(handler);
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
    origin: Origin,
    settings: RepairServerSettings,
    metrics: RepairServerMetrics,
    handler: Option<Arc<dyn EdgeHandler>>,
    heartbeats: broadcast::Sender<Heartbeat>,
}

impl Shared {
    async fn serve(&self, incoming: Incoming, shutdown: CancellationToken) {
        let peer = incoming.remote_address();
        let connection = match timeout(HANDSHAKE_TIMEOUT, async { incoming.await }).await {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                self.metrics.refused_handshake.inc();
                tracing::debug!(%peer, %error, "no repair connection");
                return;
            }
            Err(_) => {
                self.metrics.refused_handshake.inc();
                tracing::debug!(%peer, "the handshake took too long");
                return;
            }
        };
        // The TLS layer refuses any other, and none.
        let Some(protocol) = Protocol::of(&connection) else {
            connection.close(close::MALFORMED, b"unknown protocol");
            return;
        };
        let metrics = self.metrics.of(protocol);
        metrics.accepted.inc();
        metrics.open.inc();
        let open = OpenGuard(metrics.open.clone());
        tracing::info!(%peer, protocol = protocol.as_str(), "edge connected for repair");
        let reason = self.serve_protocol(protocol, &connection, &shutdown).await;
        drop(open);
        tracing::info!(%peer, protocol = protocol.as_str(), reason, "edge disconnected");
    }

    /// Serves until the connection ends; why it did.
    async fn serve_protocol(
        &self,
        protocol: Protocol,
        connection: &Connection,
        shutdown: &CancellationToken,
    ) -> String {
        match protocol {
            Protocol::V0 => match v0::serve(self, connection, shutdown).await {
                Ok(()) => "done".into(),
                Err(error) => {
                    connection.close(close::DONE, b"");
                    error.to_string()
                }
            },
            Protocol::Downpour => match downpour::serve(self, connection, shutdown).await {
                Ok(()) => "done".into(),
                Err(error) => error.to_string(),
            },
        }
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
        let live: Vec<_> = streams
            .iter()
            .filter(|stream| !stream.ended())
            .filter_map(|stream| Some((stream.ssrc(), stream.newest_seq()?)))
            .collect();
        for heartbeat in heartbeats.poll(Instant::now(), &live) {
            // An error only says that nobody listens.
            let _ = shared.heartbeats.send(heartbeat);
        }
    }
}

/// Handshakes that wait for [`RepairServer::run`] to look at them, and the bytes they may hold.
const MAX_INCOMING: usize = 1024;
const INCOMING_BUFFER: u64 = 8 * 1024 * 1024;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_REQUESTS_PER_SECOND: u64 = 100_000;
/// Heartbeats kept for a connection that is busy; it misses older ones.
const HEARTBEAT_BACKLOG: usize = 1024;
