//! The sink that sends streams to other nodes: RTP to edges, and repairs on request.
//!
//! ```text
//! hub ─ Tap ─► packetizer ─► history ─► fan-out ─► UDP to edges
//!                               ▲
//!              repair server ───┘ ◄── NACK over QUIC
//! ```

mod announce;
pub mod edges;
pub mod fanout;
pub mod outgoing;
mod parity;
pub mod repair_server;
pub mod routes;
pub mod subscribers;
pub mod tap;

use std::{
    io,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use downpour_hub::Sink;
use downpour_repair::fec::Fec;
use prometheus::Registry;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{
    address::Destination,
    tls::{Fingerprint, Identity, TlsError},
};
use edges::{Edges, metrics::ReportCollector};
use fanout::{Fanout, FanoutMetrics, OnDatagrams};
use outgoing::OutgoingStreams;
use repair_server::{IdentitySetter, RepairServer, RepairServerMetrics, RepairServerSettings};
use routes::Routes;
use subscribers::{ProbeMetrics, Subscribers};
use tap::{SenderMetrics, SenderSettings, StreamSender};

/// The parts that send streams to other nodes, bound and ready to run.
pub struct Downstream {
    sender: StreamSender,
    outgoing: OutgoingStreams,
    edges: Edges,
    /// `None` in debug mode: nothing is sent.
    fanout: Option<Fanout>,
    repair: RepairServer,
    subscribers: Subscribers,
    targets: watch::Sender<Vec<(Destination, Fec)>>,
}

/// Settings of a [`Downstream`].
#[derive(Debug, Clone)]
pub struct Settings {
    /// Limits of each stream.
    pub streams: SenderSettings,
    /// How packets are sent; `None` sends none, for debugging without edges.
    pub fanout: Option<fanout::Settings>,
    /// Addresses that get every stream (`downstream.targets`), and their parity.
    pub targets: Vec<(Destination, Fec)>,
    /// The parity of edges that subscribe.
    pub edge_fec: Fec,
    /// The QUIC address where edges request lost packets.
    pub quic_addr: SocketAddr,
    /// The repair server. Its `rtp_port` is filled in.
    pub repair: RepairServerSettings,
}

/// Why a [`Downstream`] cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The RTP port cannot be bound.
    #[error("the RTP port {0}: {1}")]
    Rtp(u16, io::Error),
    /// The QUIC address cannot be bound.
    #[error("the QUIC address {0}: {1}")]
    Quic(SocketAddr, io::Error),
    /// The certificate cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A metric's name is taken.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

impl Downstream {
    /// Binds the ports. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If a port is taken or the certificate cannot be used.
    pub fn bind(
        settings: Settings,
        identity: &Identity,
        outgoing: OutgoingStreams,
        registry: &Registry,
    ) -> Result<Self, BindError> {
        let routes = Routes::new(registry)?;
        routes.set_edge_fec(settings.edge_fec);
        let edges = Edges::default();
        registry.register(Box::new(ReportCollector::new(edges.clone())?))?;
        let probe_metrics = ProbeMetrics::register(registry)?;
        let subscribers =
            Subscribers::new(routes.clone(), outgoing.clone(), edges.clone(), probe_metrics);
        let fanout_metrics = FanoutMetrics::register(registry)?;
        let fanout = match &settings.fanout {
            None => None,
            Some(fanout) => {
                let probed = subscribers.clone();
                let on_datagrams: OnDatagrams = Arc::new(move |from, bytes| {
                    probed.handle_datagrams(Instant::now(), from, bytes)
                });
                let spawned = Fanout::spawn(fanout, routes, &on_datagrams, fanout_metrics);
                Some(spawned.map_err(|error| BindError::Rtp(fanout.port, error))?)
            }
        };
        let mut repair = settings.repair;
        if let Some(fanout) = &fanout {
            repair.rtp_port = fanout.local_port();
        }
        let metrics = RepairServerMetrics::register(registry)?;
        let mut repair =
            RepairServer::bind(settings.quic_addr, identity, outgoing.clone(), repair, metrics)
                .map_err(|error| match error {
                    repair_server::BindError::Socket(addr, error) => BindError::Quic(addr, error),
                    repair_server::BindError::Tls(error) => BindError::Tls(error),
                })?
                .with_handler(Arc::new(subscribers.clone()));
        if let Some(fanout) = &fanout {
            repair = repair.with_group_sender(Arc::new(fanout.clone()));
        }
        let metrics = SenderMetrics::register(registry)?;
        let sender = StreamSender::new(settings.streams, outgoing.clone(), fanout.clone(), metrics);
        let targets = watch::Sender::new(settings.targets);
        Ok(Self { sender, outgoing, edges, fanout, repair, subscribers, targets })
    }

    /// The sink to add to the hub.
    pub fn sink(&self) -> Arc<dyn Sink> {
        Arc::new(self.sender.clone())
    }

    /// The streams that are sent.
    pub fn outgoing(&self) -> &OutgoingStreams {
        &self.outgoing
    }

    /// The edges that are connected.
    pub fn edges(&self) -> &Edges {
        &self.edges
    }

    /// The address of the repair server.
    ///
    /// # Errors
    /// If the system cannot return the address.
    pub fn quic_addr(&self) -> io::Result<SocketAddr> {
        self.repair.local_addr()
    }

    /// The UDP port from which RTP leaves; `None` in debug mode.
    pub fn rtp_port(&self) -> Option<u16> {
        self.fanout.as_ref().map(Fanout::local_port)
    }

    /// A handle that changes settings while this runs.
    pub fn reload(&self) -> DownstreamReload {
        DownstreamReload { targets: self.targets.clone(), identity: self.repair.identity_setter() }
    }

    /// A handle that waits for queued packets.
    pub fn drain(&self) -> Drain {
        Drain { fanout: self.fanout.clone() }
    }

    /// Serves until `shutdown`. The ports of QUIC and of the HTTP API are announced to the fixed
    /// targets (wire v0). Returns early if one of its parts ends.
    pub async fn run(self, (quic_port, api_port): (u16, u16), shutdown: CancellationToken) {
        let Self { sender, fanout, repair, subscribers, targets, .. } = self;
        // Stops the other parts once one has ended.
        let shutdown = shutdown.child_token();
        let mut parts = JoinSet::new();
        parts.spawn(repair.run(shutdown.clone()));
        parts.spawn(until(shutdown.clone(), {
            let sender = sender.clone();
            async move { sender.drive_parity().await }
        }));
        parts.spawn(until(shutdown.clone(), expire(sender, subscribers)));
        if let Some(fanout) = fanout {
            let watched = fanout.clone();
            parts.spawn(until(shutdown.clone(), async move { watched.failed().await }));
            let ports = (quic_port, api_port);
            parts.spawn(announce::announce(fanout, targets.subscribe(), ports, shutdown.clone()));
        }
        if let Some(Err(error)) = parts.join_next().await {
            tracing::error!(%error, "a task of the RTP sender failed");
        }
        shutdown.cancel();
        while parts.join_next().await.is_some() {}
    }
}

/// Changes settings of a [`Downstream`] while it runs.
pub struct DownstreamReload {
    targets: watch::Sender<Vec<(Destination, Fec)>>,
    identity: IdentitySetter,
}

impl DownstreamReload {
    /// Replaces the addresses that get every stream, and their parity.
    pub fn set_targets(&self, targets: Vec<(Destination, Fec)>) {
        self.targets.send_if_modified(|current| {
            let is_new = *current != targets;
            *current = targets;
            is_new
        });
    }

    /// Reads the certificate and its key again, for new connections. Returns the fingerprint.
    ///
    /// # Errors
    /// Those of [`Identity::load`]; the old certificate stays.
    pub fn reload_certificate(&self, cert: &Path, key: &Path) -> Result<Fingerprint, TlsError> {
        let identity = Identity::load(cert, key)?;
        self.identity.set(&identity)?;
        Ok(identity.fingerprint())
    }
}

/// Waits for queued packets.
pub struct Drain {
    fanout: Option<Fanout>,
}

impl Drain {
    /// Waits until all queued packets are sent, at most for `timeout`. Returns `false` on a timeout.
    pub async fn wait(&self, timeout: Duration) -> bool {
        match &self.fanout {
            Some(fanout) => fanout.drain(timeout).await,
            None => true,
        }
    }
}

async fn until(shutdown: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = work => {}
    }
}

/// Once per second, drops packets that are too old and edges that timed out.
async fn expire(sender: StreamSender, subscribers: Subscribers) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        ticks.tick().await;
        sender.expire(Instant::now());
        subscribers.handle_timeout(Instant::now());
    }
}
