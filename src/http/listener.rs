//! The HTTP server: viewers of live streams, and all other requests by a router.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use parking_lot::Mutex;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    http::{
        connection,
        flv::{
            Viewers,
            viewer::{Connection, ViewerSettings},
        },
        metrics::HttpMetrics,
    },
    net::{AcceptLoop, AcceptSettings, Accepted, SlotLimits},
};
use downpour_hub::Admission;
use downpour_sys::LogLimit;

/// An HTTP server on one address.
///
/// `/{app}/{name}.flv` is served from the hub, any other path by the router. A connection serves one
/// request after the other, until one of them turns it into a viewer.
pub struct HttpServer {
    accept: AcceptLoop,
    shared: Arc<Shared>,
}

/// State that the connections of a server share.
pub(super) struct Shared {
    /// `None` on a server without viewers.
    pub(super) admission: Option<Admission>,
    pub(super) router: Router,
    pub(super) settings: ViewerSettings,
    pub(super) metrics: HttpMetrics,
    pub(super) viewers: Arc<Viewers>,
    /// Limits the log lines about refused viewers.
    pub(super) viewers_refused: Mutex<LogLimit>,
    /// Cancelled once the server has stopped accepting.
    pub(super) closing: CancellationToken,
}

impl HttpServer {
    /// A server that will accept on `listener`. Without `admission`, every request goes to `router`.
    pub fn new(
        listener: TcpListener,
        admission: Option<Admission>,
        router: Router,
        settings: ViewerSettings,
        metrics: HttpMetrics,
    ) -> Self {
        let connections = settings.max_viewers.saturating_add(CONNECTIONS_BESIDE_VIEWERS);
        let accept = AcceptSettings {
            protocol: "HTTP",
            limits: SlotLimits::new(connections, settings.max_connections_per_address)
                .with_reserved(RESERVED_CONNECTIONS),
            keepalive: KEEPALIVE,
        };
        let accept = AcceptLoop::new(listener, accept, metrics.accept_counters());
        let viewers = Arc::new(Viewers::new(settings.clone(), metrics.clone()));
        let (viewers_refused, closing) = (Mutex::default(), CancellationToken::new());
        let shared =
            Shared { admission, router, settings, metrics, viewers, viewers_refused, closing };
        Self { accept, shared: Arc::new(shared) }
    }

    /// Serves until `shutdown` is cancelled. Then it stops accepting, closes connections without a
    /// request, gives the others `grace` to finish (a viewer finishes when its stream ends), and cuts
    /// the rest. Dropping the future cuts all connections.
    pub async fn run(self, shutdown: CancellationToken, grace: Duration) {
        let Self { accept, shared } = self;
        // Connections are tasks that would outlive this one.
        let _cut = shared.viewers.cut_at_end();
        let serve = |Accepted { stream, peer, slot }: Accepted| {
            let connection = Connection::new(peer, slot, &shared.metrics);
            shared.viewers.spawn(connection::serve(shared.clone(), stream, connection));
        };
        accept.run(shutdown, serve).await;
        shared.closing.cancel();
        if timeout(grace, shared.viewers.gone()).await.is_err() {
            shared.viewers.cut().await;
        }
    }

    /// The address that the server listens on.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.accept.local_addr()
    }
}

/// Slots for connections that are not viewers: idle ones, and requests to the router. Viewers cannot
/// take them.
pub(crate) const CONNECTIONS_BESIDE_VIEWERS: usize = 1024;
/// Further slots, in which only `/healthz`, `/readyz` and `/metrics` are served.
const RESERVED_CONNECTIONS: usize = 16;
/// Time without data after which TCP probes a connection.
const KEEPALIVE: Duration = Duration::from_secs(30);
