//! One HTTP connection: request after request, until one of them turns it into a viewer.
//!
//! ```text
//! accepted ─► read a head ─┬─► viewer: a small task takes the socket over
//!                 ▲        ├─► served by the router ──┐
//!                 │        └─► answered here ─────────┤
//!                 └────────────── kept alive ◄────────┴─► closing: lingers, closes
//! ```
//!
//! When the slots run out, the accept loop displaces connections that read a head or linger: they
//! close at once.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf, BufMut, BytesMut};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use super::{
    flv::viewer::{self, Connection, Viewer},
    head::{self, BadHead, BodyLen, Head, MAX_HEAD_LEN, Method, Request},
    listener::Shared,
    routed::{self, Outcome},
};
use crate::net::{Idle, Slot};
use downpour_hub::{
    Admission, Hub,
    admission::{self, Refusal},
};
use downpour_media::StreamKey;

/// Serves a connection until it closes or becomes a viewer.
pub(super) async fn serve(shared: Arc<Shared>, mut socket: TcpStream, connection: Connection) {
    let peer = connection.peer;
    if let Some(bytes) = shared.settings.send_buffer
        && let Err(error) = socket2::SockRef::from(&socket).set_send_buffer_size(bytes)
    {
        tracing::debug!(%peer, %error, "cannot set the send buffer of an HTTP connection");
    }
    let mut bytes = BytesMut::new();
    let mut idle = Idle::NoRequest;
    loop {
        let head = match shared.next_head(&socket, &mut bytes, &connection.slot, idle).await {
            Ok(head) => head,
            Err(no_head) => return shared.close(socket, connection, no_head).await,
        };
        if !connection.slot.set_busy() {
            return;
        }
        let is_reserved = connection.slot.is_reserved();
        let outcome = match (&head.request, &shared.admission) {
            (request, _) if is_reserved && *request != Request::Monitoring => {
                return shared.refuse_for_lack_of_slots(socket, &connection).await;
            }
            (Request::Flv { method: Method::Get, key, query }, Some(admission)) => {
                let request = play_request(peer, key, query);
                // Frees memory: a viewer needs neither the head nor the bytes after it.
                drop((bytes, head));
                return shared.watch(socket, connection, request, admission).await;
            }
            (Request::Flv { method, key, .. }, Some(admission)) => {
                bytes.advance(head.len);
                let keep_alive = shared.may_keep_alive(&head);
                shared.answer(&socket, *method, key, admission.hub(), keep_alive).await
            }
            // Boxed, so that hyper's state does not add to the size of a viewer's task.
            _ => Box::pin(shared.route(&mut socket, &mut bytes, &head, &connection)).await,
        };
        idle = Idle::KeptAlive;
        if !connection.slot.set_idle(std::time::Instant::now(), idle) {
            return;
        }
        if outcome == Outcome::Closing || is_reserved {
            return linger(socket, &connection.slot).await;
        }
    }
}

/// Returns a viewer's request to admission.
pub(super) fn play_request(peer: SocketAddr, key: &StreamKey, query: &str) -> admission::Request {
    admission::Request {
        action: admission::Action::Play,
        key: key.clone(),
        protocol: "http-flv",
        peer,
        query: query.to_owned(),
        encrypted: false,
        revoked: None,
    }
}

impl Shared {
    /// Waits for the next request.
    async fn next_head(
        &self,
        socket: &TcpStream,
        bytes: &mut BytesMut,
        slot: &Slot,
        idle: Idle,
    ) -> Result<Head, NoHead> {
        if idle == Idle::KeptAlive && bytes.is_empty() {
            tokio::select! {
                read = timeout(KEEP_ALIVE, read_more(socket, bytes)) => {
                    read.map_err(|_| NoHead::Idle)?.map_err(NoHead::Io)?;
                }
                () = slot.displaced() => return Err(NoHead::Idle),
                () = self.closing.cancelled() => return Err(NoHead::Idle),
            }
        }
        // It may be complete already, when requests are pipelined.
        if let Some(head) = head::parse(bytes).map_err(NoHead::Bad)? {
            return Ok(head);
        }
        tokio::select! {
            head = timeout(self.settings.head_timeout, read_head(socket, bytes)) => {
                head.unwrap_or(Err(NoHead::Timeout))
            }
            () = slot.displaced() => Err(NoHead::Idle),
        }
    }

    /// Closes a connection on which no further request arrives.
    async fn close(&self, socket: TcpStream, connection: Connection, no_head: NoHead) {
        let peer = connection.peer;
        let status = match no_head {
            NoHead::Idle => return,
            NoHead::Io(error) => {
                tracing::debug!(%peer, %error, "HTTP connection closed");
                return;
            }
            NoHead::Bad(bad) => {
                self.metrics.refused.bad_request.inc();
                bad.to_string()
            }
            NoHead::Timeout => {
                self.metrics.refused.head_timeout.inc();
                "408 Request Timeout".into()
            }
        };
        tracing::debug!(%peer, status, "HTTP request refused");
        if self.refuse(&socket, &status, "", true, false).await == Outcome::Closing {
            linger(socket, &connection.slot).await;
        }
    }

    /// `true` if another request may follow this one, as far as its head says.
    fn may_keep_alive(&self, head: &Head) -> bool {
        head.keep_alive && head.body == BodyLen::Known(0) && !self.closing.is_cancelled()
    }

    /// Turns the connection into a viewer if admission allows.
    async fn watch(
        self: &Arc<Self>,
        socket: TcpStream,
        mut connection: Connection,
        request: admission::Request,
        admission: &Admission,
    ) {
        let (peer, key) = (connection.peer, request.key.clone());
        // While its stream is not live, it takes nobody's place.
        if !connection.slot.set_idle(std::time::Instant::now(), Idle::NotLive) {
            return;
        }
        // The client may have closed its sending side behind the request, and still read.
        let admitted = tokio::select! {
            biased;
            admitted = admission.play(request) => admitted,
            _ = viewer::client_reset(&socket) => return,
            () = connection.slot.displaced() => return,
        };
        match admitted {
            Ok(playback) => {
                if !connection.slot.pin_for_good() {
                    return;
                }
                // A smaller task takes the connection over, and this one ends.
                let stream = playback.stream().clone();
                let viewer = Viewer::new(socket, connection, playback, &self.metrics);
                self.viewers.join(viewer, &stream);
            }
            Err(refusal) => {
                self.refuse_viewer(&socket, peer, &key, &refusal).await;
                linger(socket, &connection.slot).await;
            }
        }
    }

    async fn refuse_for_lack_of_slots(&self, socket: TcpStream, connection: &Connection) {
        self.metrics.refused.connections_full.inc();
        let status = "503 Service Unavailable\r\nRetry-After: 5";
        self.refuse(&socket, status, "All connections are in use.", true, false).await;
        linger(socket, &connection.slot).await;
    }

    async fn refuse_viewer(
        &self,
        socket: &TcpStream,
        peer: SocketAddr,
        key: &StreamKey,
        refusal: &Refusal,
    ) {
        let refused = &self.metrics.refused;
        let (status, counter) = match refusal {
            Refusal::Full(_) => {
                ("503 Service Unavailable\r\nRetry-After: 5", &refused.viewers_full)
            }
            Refusal::Unauthorized(_) => ("403 Forbidden", &refused.unauthorized),
            Refusal::NotLive(_) | Refusal::AlreadyLive(_) => ("404 Not Found", &refused.not_live),
        };
        counter.inc();
        let reason = refusal.to_string();
        match refusal {
            Refusal::NotLive(_) | Refusal::AlreadyLive(_) => {
                tracing::debug!(%peer, stream = %key, reason, "viewer refused");
            }
            Refusal::Full(_) | Refusal::Unauthorized(_) => {
                if let Some(missed) = self.viewers_refused.lock().due(std::time::Instant::now()) {
                    tracing::warn!(%peer, stream = %key, reason, missed, "viewer refused");
                }
            }
        }
        self.refuse(socket, status, &reason, true, false).await;
    }

    /// Answers any other request than `GET` for a stream.
    async fn answer(
        &self,
        socket: &TcpStream,
        method: Method,
        key: &StreamKey,
        hub: &Hub,
        keep_alive: bool,
    ) -> Outcome {
        match method {
            Method::Head if hub.stream(key).is_some() => {
                // The body of GET ends with the connection.
                let _ = self.write(socket, viewer::RESPONSE_HEAD).await;
                Outcome::Closing
            }
            Method::Head => {
                self.metrics.refused.not_live.inc();
                self.refuse(socket, "404 Not Found", &not_live(key), false, keep_alive).await
            }
            Method::Options => {
                let connection = if keep_alive { "" } else { "Connection: close\r\n" };
                let response = format!("{OPTIONS_RESPONSE}{connection}\r\n");
                self.outcome(self.write(socket, response.as_bytes()).await, keep_alive)
            }
            Method::Get | Method::Other => {
                self.metrics.refused.bad_request.inc();
                let status = "405 Method Not Allowed\r\nAllow: GET, HEAD, OPTIONS";
                self.refuse(socket, status, "", true, keep_alive).await
            }
        }
    }

    /// Serves one request with the router.
    async fn route(
        &self,
        socket: &mut TcpStream,
        bytes: &mut BytesMut,
        head: &Head,
        connection: &Connection,
    ) -> Outcome {
        let peer = connection.peer;
        let (len, keep_alive) = match head.body {
            BodyLen::Known(body) => {
                let len = body.saturating_add(head.len as u64);
                (len, head.keep_alive && !self.closing.is_cancelled())
            }
            BodyLen::Unknown => (u64::MAX, false),
        };
        let serving = routed::serve_request(&self.router, socket, bytes, len, keep_alive);
        match timeout(ROUTED_TIMEOUT, serving).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => {
                tracing::debug!(%peer, %error, "HTTP request failed");
                Outcome::Closing
            }
            Err(_) => {
                tracing::debug!(%peer, "HTTP request timed out");
                Outcome::Closing
            }
        }
    }

    /// Answers with an error. `status` is the rest of the status line, and may have header lines.
    async fn refuse(
        &self,
        socket: &TcpStream,
        status: &str,
        text: &str,
        with_body: bool,
        keep_alive: bool,
    ) -> Outcome {
        let body = if with_body { text } else { "" };
        let connection = if keep_alive { "" } else { "Connection: close\r\n" };
        let response = format!(
            "HTTP/1.1 {status}\r\n\
             Content-Type: text/plain; charset=utf-8\r\n\
             Content-Length: {}\r\n\
             Cache-Control: no-store\r\n\
             Access-Control-Allow-Origin: *\r\n\
             {connection}\r\n{body}",
            text.len(),
        );
        self.outcome(self.write(socket, response.as_bytes()).await, keep_alive)
    }

    fn outcome(&self, written: Result<(), viewer::Closed>, keep_alive: bool) -> Outcome {
        if written.is_ok() && keep_alive { Outcome::Answered } else { Outcome::Closing }
    }

    async fn write(&self, socket: &TcpStream, bytes: &[u8]) -> Result<(), viewer::Closed> {
        viewer::write_all(socket, self.settings.write_timeout, bytes).await
    }
}

/// Why there is no further request.
enum NoHead {
    Bad(BadHead),
    Io(io::Error),
    /// The head was not complete in time.
    Timeout,
    /// The connection was idle for too long, was displaced, or the server shuts down.
    Idle,
}

/// Reads until the head is complete. `bytes` may have its beginning, and may have more than the head
/// afterwards.
async fn read_head(socket: &TcpStream, bytes: &mut BytesMut) -> Result<Head, NoHead> {
    loop {
        let before = bytes.len();
        read_more(socket, bytes).await.map_err(NoHead::Io)?;
        // Only the end of a line completes a head. Parsing per received byte would be quadratic.
        let added = bytes.get(before..).unwrap_or_default();
        if before > 0 && bytes.len() < MAX_HEAD_LEN && !added.contains(&b'\n') {
            continue;
        }
        if let Some(head) = head::parse(bytes).map_err(NoHead::Bad)? {
            return Ok(head);
        }
    }
}

/// Waits for bytes and appends them to `bytes`, up to [`MAX_HEAD_LEN`]. While `bytes` is empty it
/// holds no memory. Cancel-safe.
async fn read_more(socket: &TcpStream, bytes: &mut BytesMut) -> io::Result<()> {
    loop {
        if bytes.is_empty() {
            *bytes = BytesMut::new();
        }
        socket.readable().await?;
        let room = MAX_HEAD_LEN.saturating_sub(bytes.len());
        bytes.reserve(room.min(READ_LEN));
        match socket.try_read_buf(&mut (&mut *bytes).limit(room)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

/// Closes the sending side and waits up to [`LINGER`] for the peer to close. Closing a socket with
/// unread bytes resets the connection, and the peer may lose the answer (RFC 9112 §9.6).
async fn linger(mut socket: TcpStream, slot: &Slot) {
    if socket.shutdown().await.is_ok() {
        tokio::select! {
            _ = timeout(LINGER, viewer::client_closed(&socket)) => {}
            () = slot.displaced() => {}
        }
    }
}

fn not_live(key: &StreamKey) -> String {
    format!("The stream {key} is not live.")
}

const OPTIONS_RESPONSE: &str = "HTTP/1.1 204 No Content\r\n\
    Access-Control-Allow-Origin: *\r\n\
    Access-Control-Allow-Methods: GET, HEAD, OPTIONS\r\n\
    Access-Control-Allow-Headers: *\r\n\
    Access-Control-Max-Age: 86400\r\n\
    Allow: GET, HEAD, OPTIONS\r\n";

/// Time that a connection is kept open for another request.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const LINGER: Duration = Duration::from_secs(1);
const ROUTED_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes per read. Most requests are shorter.
const READ_LEN: usize = 1024;
