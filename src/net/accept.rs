//! The accept loop of all TCP listeners: limits, back-off, socket options, counters and log.

use std::{
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use prometheus::IntCounter;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    time::sleep,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    log_limit::LogLimit,
    slots::{Slot, SlotLimits, SlotRefusal, Slots},
};
use crate::limits;

/// Listens for TCP on `addr`, for about `connections` connections at one time; port 0 picks a free
/// one. Must be called within a tokio runtime.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub fn bind(addr: SocketAddr, connections: usize) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(limits::backlog(connections))
}

/// What differs between listeners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptSettings {
    /// The protocol, for the log: `RTMP`, `HTTP`.
    pub protocol: &'static str,
    /// How many connections are served at one time.
    pub limits: SlotLimits,
    /// How long a connection may carry nothing before TCP probes it, and the time between probes.
    pub keepalive: Duration,
}

/// What an accept loop counts.
#[derive(Debug, Clone)]
pub struct AcceptCounters {
    /// Connections accepted, those included that were then refused.
    pub accepted: IntCounter,
    /// Failures to accept, as when file descriptors run out.
    pub errors: IntCounter,
    /// Connections refused because all slots were in use.
    pub refused_total: IntCounter,
    /// Connections refused because all slots of their address were in use.
    pub refused_address: IntCounter,
    /// Idle connections that lost their slot to a new one.
    pub displaced: IntCounter,
}

/// A connection that was accepted and has a slot.
#[derive(Debug)]
pub struct Accepted {
    /// The connection.
    pub stream: TcpStream,
    /// The client's address.
    pub peer: SocketAddr,
    /// To be held as long as the connection is open.
    pub slot: Slot,
}

/// Accepts the connections of one listener.
#[derive(Debug)]
pub struct AcceptLoop {
    listener: TcpListener,
    settings: AcceptSettings,
    counters: AcceptCounters,
    slots: Slots,
    refused: LogLimit,
    displaced: LogLimit,
    failed: LogLimit,
}

impl AcceptLoop {
    /// A loop that will accept on `listener`.
    pub fn new(listener: TcpListener, settings: AcceptSettings, counters: AcceptCounters) -> Self {
        Self {
            listener,
            settings,
            counters,
            slots: Slots::new(settings.limits),
            refused: LogLimit::new(),
            displaced: LogLimit::new(),
            failed: LogLimit::new(),
        }
    }

    /// Passes each connection to `serve`, which must not block, until `shutdown` is cancelled. Then
    /// the address is free, and connections that were not accepted yet are refused.
    pub async fn run(mut self, shutdown: CancellationToken, mut serve: impl FnMut(Accepted)) {
        let mut backoff = MIN_BACKOFF;
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    backoff = MIN_BACKOFF;
                    self.counters.accepted.inc();
                    if let Some(accepted) = self.admit(Instant::now(), stream, peer) {
                        serve(accepted);
                    }
                }
                Err(error) => {
                    self.log_failure(Instant::now(), &error);
                    if is_the_clients(&error) {
                        continue;
                    }
                    // Most likely the process is out of file descriptors. That passes, and without
                    // a pause the loop would spin until then.
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        () = sleep(backoff) => backoff = (backoff * 2).min(MAX_BACKOFF),
                    }
                }
            }
        }
    }

    /// The address that is listened on.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    fn admit(&mut self, now: Instant, stream: TcpStream, peer: SocketAddr) -> Option<Accepted> {
        let protocol = self.settings.protocol;
        let (slot, displaced) = match self.slots.admit(now, peer.ip()) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                self.log_refusal(now, peer, refusal);
                return None;
            }
        };
        if displaced {
            self.counters.displaced.inc();
            if let Some(missed) = self.displaced.due(now) {
                let SlotLimits { total, per_address } = self.settings.limits;
                warn!(
                    protocol, %peer, total, per_address, missed,
                    "connection slots are in use: an idle connection is closed for a new one"
                );
            }
        }
        match prepare(stream, self.settings.keepalive) {
            Ok(stream) => Some(Accepted { stream, peer, slot }),
            Err(error) => {
                debug!(protocol, %peer, %error, "connection was lost before it was served");
                None
            }
        }
    }

    fn log_refusal(&mut self, now: Instant, peer: SocketAddr, refusal: SlotRefusal) {
        let (counter, limit) = match refusal {
            SlotRefusal::Total => (&self.counters.refused_total, self.settings.limits.total),
            SlotRefusal::Address => {
                (&self.counters.refused_address, self.settings.limits.per_address)
            }
        };
        counter.inc();
        if let Some(missed) = self.refused.due(now) {
            let protocol = self.settings.protocol;
            warn!(protocol, %peer, reason = %refusal, limit, missed, "connection refused");
        }
    }

    fn log_failure(&mut self, now: Instant, error: &io::Error) {
        self.counters.errors.inc();
        if let Some(missed) = self.failed.due(now) {
            warn!(protocol = self.settings.protocol, %error, missed, "cannot accept connections");
        }
    }
}

/// Makes an accepted socket ready to be served.
fn prepare(stream: TcpStream, keepalive: Duration) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    // A connection that writes nothing does not notice that its peer is gone.
    let keepalive = TcpKeepalive::new().with_time(keepalive).with_interval(keepalive);
    SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
    Ok(stream)
}

/// `true` for the errors of accept(2) that concern the one connection.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

const MIN_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
