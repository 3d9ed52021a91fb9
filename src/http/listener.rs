//! Accepts HTTP connections, serves viewers straight on their sockets, and hands the rest to a
//! router.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use bytes::{Bytes, BytesMut};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::http::{
    audience::Viewers,
    head::{self, BadHead, MAX_HEAD_LEN, Method, Request},
    metrics::HttpMetrics,
    viewer::{self, Connection, Viewer, ViewerSettings},
};
use downpour_hub::Hub;
use downpour_media::StreamKey;

/// One listening address of a node.
///
/// `GET`, `HEAD` and `OPTIONS` of `/{app}/{name}.flv` are answered from the hub; any other request
/// goes to the router, one a connection.
pub struct HttpServer {
    listener: TcpListener,
    shared: Arc<Shared>,
}

struct Shared {
    hub: Option<Hub>,
    router: Router,
    settings: ViewerSettings,
    metrics: HttpMetrics,
    audience: Arc<Viewers>,
    /// Places for viewers, and for connections, viewers included.
    viewers: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

impl HttpServer {
    /// A server that will accept on `listener`. Without a `hub`, everything goes to `router`.
    pub fn new(
        listener: TcpListener,
        hub: Option<Hub>,
        router: Router,
        settings: ViewerSettings,
        metrics: HttpMetrics,
    ) -> Self {
        let places = |count: usize| Arc::new(Semaphore::new(count.min(Semaphore::MAX_PERMITS)));
        let viewers = places(settings.max_viewers);
        let connections = places(settings.max_viewers.saturating_add(CONNECTIONS_BESIDE_VIEWERS));
        let audience = Arc::new(Viewers::new(settings.clone(), metrics.clone()));
        let shared = Shared { hub, router, settings, metrics, audience, viewers, connections };
        Self { listener, shared: Arc::new(shared) }
    }

    /// Serves until `shutdown` is cancelled. Then it accepts no more, gives connections `grace` to
    /// finish (a viewer does when its stream ends), and cuts those that have not. If this is dropped
    /// before its end, all are cut at once.
    pub async fn run(self, shutdown: CancellationToken, grace: Duration) {
        // Viewers have tasks of their own, which would go on.
        let _cut = self.shared.audience.cut_at_end();
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                Some(result) = connections.join_next(), if !connections.is_empty() => {
                    if let Err(error) = result {
                        tracing::error!(%error, "an HTTP connection's task failed");
                    }
                    continue;
                }
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((socket, peer)) => {
                    let shared = self.shared.clone();
                    let Ok(permit) = shared.connections.clone().try_acquire_owned() else {
                        shared.metrics.refused.connections_full.inc();
                        tracing::warn!(%peer, "refused an HTTP connection: too many are open");
                        continue;
                    };
                    let connection = Connection::new(peer, permit, &shared.metrics);
                    connections.spawn(async move { shared.connection(socket, connection).await });
                }
                Err(error) => {
                    self.shared.metrics.accept_errors.inc();
                    tracing::warn!(%error, "could not accept an HTTP connection");
                    // Without a pause, a process that is out of descriptors would spin here.
                    if !is_the_peers_fault(&error) {
                        tokio::time::sleep(ACCEPT_RETRY).await;
                    }
                }
            }
        }
        drop(self.listener);
        let finished = async {
            while connections.join_next().await.is_some() {}
            self.shared.audience.gone().await;
        };
        if timeout(grace, finished).await.is_err() {
            connections.shutdown().await;
            self.shared.audience.cut().await;
        }
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Those of `getsockname`.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Shared {
    async fn connection(&self, mut socket: TcpStream, connection: Connection) {
        let peer = connection.peer;
        if let Err(error) = self.prepare(&socket) {
            tracing::debug!(%peer, %error, "could not set socket options");
        }
        let (request, bytes) =
            match timeout(self.settings.head_timeout, read_head(&mut socket)).await {
                Ok(Ok(head)) => head,
                Ok(Err(HeadError::Io(error))) => {
                    tracing::debug!(%peer, %error, "no HTTP request");
                    return;
                }
                Ok(Err(HeadError::Bad(status))) => {
                    self.metrics.refused.bad_request.inc();
                    tracing::debug!(%peer, %status, "refused an HTTP request");
                    return self.refuse(socket, &status.to_string(), "", true).await;
                }
                Err(_) => {
                    self.metrics.refused.head_timeout.inc();
                    tracing::debug!(%peer, "no HTTP request in time");
                    return self.refuse(socket, "408 Request Timeout", "", true).await;
                }
            };
        match (request, &self.hub) {
            (Request::Flv { method, key }, Some(hub)) => {
                drop(bytes);
                self.flv(socket, connection, method, key, hub).await;
            }
            // Boxed, so that a viewer's task has not the size of hyper's.
            _ => Box::pin(self.route(socket, peer, bytes)).await,
        }
    }

    fn prepare(&self, socket: &TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        let socket = socket2::SockRef::from(socket);
        // A stream that stalls writes nothing, so that a peer that is gone would not be noticed.
        socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(KEEPALIVE))?;
        match self.settings.send_buffer {
            Some(bytes) => socket.set_send_buffer_size(bytes),
            None => Ok(()),
        }
    }

    async fn flv(
        &self,
        socket: TcpStream,
        connection: Connection,
        method: Method,
        key: StreamKey,
        hub: &Hub,
    ) {
        let peer = connection.peer;
        match method {
            Method::Get => {}
            Method::Head if hub.stream(&key).is_some() => {
                let _ = self.write(&socket, viewer::RESPONSE_HEAD).await;
                return linger(socket).await;
            }
            Method::Head => {
                self.metrics.refused.not_live.inc();
                return self.refuse(socket, "404 Not Found", &not_live(&key), false).await;
            }
            Method::Options => {
                let _ = self.write(&socket, OPTIONS_RESPONSE).await;
                return linger(socket).await;
            }
            Method::Other => {
                self.metrics.refused.bad_request.inc();
                let status = "405 Method Not Allowed\r\nAllow: GET, HEAD, OPTIONS";
                return self.refuse(socket, status, "", true).await;
            }
        }
        let Ok(permit) = self.viewers.clone().try_acquire_owned() else {
            self.metrics.refused.viewers_full.inc();
            tracing::warn!(%peer, stream = %key, "refused a viewer: there are too many");
            let status = "503 Service Unavailable\r\nRetry-After: 5";
            return self
                .refuse(socket, status, "This node has no room for more viewers.", true)
                .await;
        };
        let deadline = Instant::now() + self.settings.stream_wait;
        let stream = tokio::select! {
            stream = hub.wait_for(&key, deadline) => stream,
            _ = viewer::client_closed(&socket) => return,
        };
        match stream {
            Some(stream) => {
                // From here on it is a small task's, and this one is done.
                let viewer = Viewer::new(socket, connection, &stream, permit, &self.metrics);
                self.audience.join(viewer, &stream);
            }
            None => {
                drop(permit);
                self.metrics.refused.not_live.inc();
                tracing::debug!(%peer, stream = %key, "a viewer asked for a stream that is not live");
                self.refuse(socket, "404 Not Found", &not_live(&key), true).await;
            }
        }
    }

    async fn route(&self, socket: TcpStream, peer: SocketAddr, bytes: Bytes) {
        let (read, write) = socket.into_split();
        let io = TokioIo::new(tokio::io::join(io::Cursor::new(bytes).chain(read), write));
        // One request a connection: the next one could be a viewer's, which is not hyper's to serve.
        let connection = hyper::server::conn::http1::Builder::new()
            .keep_alive(false)
            .serve_connection(io, TowerToHyperService::new(self.router.clone()));
        match timeout(ROUTED_TIMEOUT, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%peer, %error, "an HTTP request failed"),
            Err(_) => tracing::debug!(%peer, "an HTTP request took too long"),
        }
    }

    /// Answers with a status line's rest (and further header lines), and closes.
    async fn refuse(&self, socket: TcpStream, status: &str, text: &str, with_body: bool) {
        let body = if with_body { text } else { "" };
        let response = format!(
            "HTTP/1.1 {status}\r\n\
             Content-Type: text/plain; charset=utf-8\r\n\
             Content-Length: {}\r\n\
             Cache-Control: no-store\r\n\
             Access-Control-Allow-Origin: *\r\n\
             Connection: close\r\n\r\n{body}",
            text.len(),
        );
        if self.write(&socket, response.as_bytes()).await.is_ok() {
            linger(socket).await;
        }
    }

    async fn write(&self, socket: &TcpStream, bytes: &[u8]) -> Result<(), viewer::Closed> {
        viewer::write_all(socket, self.settings.write_timeout, bytes).await
    }
}

enum HeadError {
    Bad(BadHead),
    Io(io::Error),
}

/// Reads until the head is whole; the bytes may hold the beginning of a body as well.
async fn read_head(socket: &mut TcpStream) -> Result<(Request, Bytes), HeadError> {
    let mut bytes = BytesMut::with_capacity(1024);
    loop {
        let room = MAX_HEAD_LEN.saturating_sub(bytes.len());
        let before = bytes.len();
        let mut limited = bytes::BufMut::limit(&mut bytes, room);
        match socket.read_buf(&mut limited).await {
            Ok(0) => return Err(HeadError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {}
            Err(error) => return Err(HeadError::Io(error)),
        }
        // Only a line's end can finish a head: a peer that sends byte by byte is parsed by lines.
        let news = bytes.get(before..).unwrap_or_default();
        if before > 0 && bytes.len() < MAX_HEAD_LEN && !news.contains(&b'\n') {
            continue;
        }
        if let Some(request) = head::parse(&bytes).map_err(HeadError::Bad)? {
            return Ok((request, bytes.freeze()));
        }
    }
}

/// Closes the sending side and waits a little for the peer to do the same: a socket that is closed
/// with bytes unread resets the connection, and the peer may lose the answer (RFC 9112 §9.6).
async fn linger(mut socket: TcpStream) {
    if socket.shutdown().await.is_ok() {
        let deadline = Instant::now() + LINGER;
        let _ = timeout_at(deadline, viewer::client_closed(&socket)).await;
    }
}

fn not_live(key: &StreamKey) -> String {
    format!("The stream {key} is not live.")
}

fn is_the_peers_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

const OPTIONS_RESPONSE: &[u8] = b"HTTP/1.1 204 No Content\r\n\
    Access-Control-Allow-Origin: *\r\n\
    Access-Control-Allow-Methods: GET, HEAD, OPTIONS\r\n\
    Access-Control-Allow-Headers: *\r\n\
    Access-Control-Max-Age: 86400\r\n\
    Allow: GET, HEAD, OPTIONS\r\n\
    Connection: close\r\n\r\n";

/// Connections that are still sending their request, or ask for something else than a stream.
pub(crate) const CONNECTIONS_BESIDE_VIEWERS: usize = 1024;
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
const KEEPALIVE: Duration = Duration::from_secs(30);
const LINGER: Duration = Duration::from_secs(1);
const ROUTED_TIMEOUT: Duration = Duration::from_secs(60);
