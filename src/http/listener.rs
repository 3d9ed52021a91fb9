//! The HTTP server: accepts connections and serves viewers, and the API by a router.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use parking_lot::Mutex;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    http::{
        audience::Viewers,
        connection,
        metrics::HttpMetrics,
        viewer::{Connection, ViewerSettings},
    },
    net::{AcceptLoop, AcceptSettings, Accepted, SlotLimits},
};
use downpour_hub::Admission;
use downpour_sys::LogLimit;

/// One listening address of a node.
///
/// `GET`, `HEAD` and `OPTIONS` of `/{app}/{name}.flv` are answered from the hub; any other request
/// goes to the router. A connection serves one request after the other, until one of them makes it a
/// viewer's.
pub struct HttpServer {
    accept: AcceptLoop,
    shared: Arc<Shared>,
}

/// What the connections of a server share.
pub(super) struct Shared {
    /// `None` serves no viewers.
    pub(super) admission: Option<Admission>,
    pub(super) router: Router,
    pub(super) settings: ViewerSettings,
    pub(super) metrics: HttpMetrics,
    pub(super) audience: Arc<Viewers>,
    /// Limit of the log line about viewers that are refused.
    pub(super) viewers_refused: Mutex<LogLimit>,
    /// Cancelled once no more connections are accepted.
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
            limits: SlotLimits::new(connections, settings.max_connections_per_address),
            keepalive: KEEPALIVE,
        };
        let accept = AcceptLoop::new(listener, accept, metrics.accept_counters());
        let audience = Arc::new(Viewers::new(settings.clone(), metrics.clone()));
        let (viewers_refused, closing) = (Mutex::default(), CancellationToken::new());
        let shared =
            Shared { admission, router, settings, metrics, audience, viewers_refused, closing };
        Self { accept, shared: Arc::new(shared) }
    }

    /// Serves until `shutdown` is cancelled. Then it accepts no more connections, closes those that
    /// are kept alive without a request, gives the others `grace` to finish (a viewer does when its
    /// stream ends), and cuts those that have not. If this is dropped before its end, all are cut at
    /// once.
    pub async fn run(self, shutdown: CancellationToken, grace: Duration) {
        let Self { accept, shared } = self;
        // Connections are tasks, which would outlive this one.
        let _cut = shared.audience.cut_at_end();
        let serve = |Accepted { stream, peer, slot }: Accepted| {
            let connection = Connection::new(peer, slot, &shared.metrics);
            shared.audience.spawn(connection::serve(shared.clone(), stream, connection));
        };
        accept.run(shutdown, serve).await;
        shared.closing.cancel();
        if timeout(grace, shared.audience.gone()).await.is_err() {
            shared.audience.cut().await;
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of `getsockname`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.accept.local_addr()
    }
}

/// Connections that are no viewer's: idle, sending their request, or asking for something else than a
/// stream. Viewers cannot take their slots.
pub(crate) const CONNECTIONS_BESIDE_VIEWERS: usize = 1024;
const KEEPALIVE: Duration = Duration::from_secs(30);
