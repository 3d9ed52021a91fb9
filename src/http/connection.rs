//! One HTTP connection: request after request, until one of them makes it a viewer's.
//!
//! ```text
//! accepted ─► read a head ─┬─► viewer: a small task takes the socket over
//!                 ▲        ├─► served by the router ──┐
//!                 │        └─► answered here ─────────┤
//!                 └────────────── kept alive ◄────────┴─► closing: lingers, closes
//! ```
//!
//! Under pressure the accept loop displaces connections that are reading a head or linger: they
//! close at once.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Buf, BufMut, BytesMut};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::timeout};

use super::{
    head::{self, BadHead, BodyLen, Head, MAX_HEAD_LEN, Method, Request},
    listener::Shared,
    routed::{self, Outcome},
    viewer::{self, Connection, Viewer},
};
use crate::net::{Idle, Slot};
use downpour_hub::{
    Admission, Hub,
    admission::{self, Refusal},
};
use downpour_media::StreamKey;

/// Serves a connection until it closes or has become a viewer's.
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
        let outcome = match (&head.request, &shared.admission) {
            (Request::Flv { method: Method::Get, key, query }, Some(admission)) => {
                let request = play_request(peer, key, query);
                // A viewer keeps neither the head nor what the client sends behind it.
                drop((bytes, head));
                return shared.watch(socket, connection, request, admission).await;
            }
            (Request::Flv { method, key, .. }, Some(admission)) => {
                bytes.advance(head.len);
                let keep_alive = shared.may_keep_alive(&head);
                shared.answer(&socket, *method, key, admission.hub(), keep_alive).await
            }
            // Boxed, so that a viewer's task has not the size of hyper's.
            _ => Box::pin(shared.route(&mut socket, &mut bytes, &head, &connection)).await,
        };
        idle = Idle::KeptAlive;
        if !connection.slot.set_idle(std::time::Instant::now(), idle) {
            return;
        }
        if outcome == Outcome::Closing {
            return linger(socket, &connection.slot).await;
        }
    }
}

/// What a viewer asks admission for.
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

    /// Makes the connection a viewer's once the stream is live.
    async fn watch(
        self: &Arc<Self>,
        socket: TcpStream,
        mut connection: Connection,
        request: admission::Request,
        admission: &Admission,
    ) {
        let (peer, key) = (connection.peer, request.key.clone());
        if !connection.slot.pin() {
            return;
        }
        let admitted = tokio::select! {
            admitted = admission.play(request) => admitted,
            _ = viewer::client_closed(&socket) => return,
        };
        match admitted {
            Ok(playback) => {
                // It is pinned; this frees memory.
                let _ = connection.slot.pin_for_good();
                // From here on the connection is a small task's, and this one is done.
                let stream = playback.stream().clone();
                let viewer = Viewer::new(socket, connection, playback, &self.metrics);
                self.audience.join(viewer, &stream);
            }
            Err(refusal) => {
                connection.slot.unpin(std::time::Instant::now(), peer.ip());
                self.refuse_viewer(&socket, peer, &key, &refusal).await;
                linger(socket, &connection.slot).await;
            }
        }
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

    /// Answers a request for a stream that is not to watch it.
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
                // As for GET, which has this connection's end for its end.
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

    /// Serves one request by the router.
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
                tracing::debug!(%peer, "HTTP request took too long");
                Outcome::Closing
            }
        }
    }

    /// Answers with a status line's rest (and further header lines).
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
    /// Part of a head arrived, and not the rest.
    Timeout,
    /// The connection was kept alive long enough, or others need its slot.
    Idle,
}

/// Reads until the head is complete. `bytes`, which may hold its beginning, holds it then, and maybe
/// what follows.
async fn read_head(socket: &TcpStream, bytes: &mut BytesMut) -> Result<Head, NoHead> {
    loop {
        let before = bytes.len();
        read_more(socket, bytes).await.map_err(NoHead::Io)?;
        // Only a line's end can finish a head: a peer that sends byte by byte is parsed by lines.
        let news = bytes.get(before..).unwrap_or_default();
        if before > 0 && bytes.len() < MAX_HEAD_LEN && !news.contains(&b'\n') {
            continue;
        }
        if let Some(head) = head::parse(bytes).map_err(NoHead::Bad)? {
            return Ok(head);
        }
    }
}

/// Waits for bytes and adds them to `bytes`, up to [`MAX_HEAD_LEN`]. A connection that waits with
/// `bytes` empty holds no buffer. Dropping the future loses nothing.
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

/// Closes the sending side and waits a little for the peer to do the same: a socket that is closed
/// with bytes unread resets the connection, and the peer may lose the answer (RFC 9112 §9.6).
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

/// How long a connection is kept open for another request.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
const LINGER: Duration = Duration::from_secs(1);
const ROUTED_TIMEOUT: Duration = Duration::from_secs(60);
/// Most requests are shorter.
const READ_LEN: usize = 1024;
