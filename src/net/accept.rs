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

use super::slots::{Slot, SlotLimits, SlotRefusal, Slots};
use crate::node::limits;
use downpour_sys::LogLimit;

/// Listens for TCP on `addr`, for about `connections` connections at one time; port 0 picks a free
/// one. Must be called within a tokio runtime.
///
/// # Errors
/// Those of bind(2) and listen(2).
pub fn bind(addr: SocketAddr, connections: usize) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    if addr.is_ipv6() {
        // `[::]` is every IPv4 address, too, whatever net.ipv6.bindv6only says.
        SockRef::from(&socket).set_only_v6(false)?;
    }
    socket.bind(addr)?;
    socket.listen(limits::backlog(connections))
}

/// Settings of an accept loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptSettings {
    /// The protocol, for the log: `RTMP`, `HTTP`.
    pub protocol: &'static str,
    /// Connections at one time.
    pub limits: SlotLimits,
    /// Time without data after which TCP probes a connection, and the time between probes.
    pub keepalive: Duration,
}

/// Counters of an accept loop.
#[derive(Debug, Clone)]
pub struct AcceptCounters {
    /// Connections accepted, including those that were then refused.
    pub accepted: IntCounter,
    /// Failures to accept, for example when file descriptors run out.
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
    /// Keep it as long as the connection is open.
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

    /// Passes each connection to `serve`, which must not block, until `shutdown` is cancelled. Then it
    /// frees the address and refuses connections that have not been accepted.
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
                    // Probably the process has run out of file descriptors. Without a pause the loop
                    // would spin until some are closed.
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
        // A dual-stack socket has IPv4 addresses in the form ::ffff:192.0.2.1.
        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
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
                let SlotLimits { total, per_address, .. } = self.settings.limits;
                warn!(
                    protocol, %peer, total, per_address, missed,
                    "idle connection closed for a new one: all connection slots are in use"
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

/// Sets the options of an accepted socket.
fn prepare(stream: TcpStream, keepalive: Duration) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    // A connection that writes nothing would not notice that its peer is gone.
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

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt, sync::mpsc, time::timeout};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    struct Running {
        addr: SocketAddr,
        counters: AcceptCounters,
        accepted: mpsc::UnboundedReceiver<Accepted>,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    impl Running {
        fn start(total: usize) -> Self {
            let counter = || IntCounter::new("a", "b").unwrap();
            let counters = AcceptCounters {
                accepted: counter(),
                errors: counter(),
                refused_total: counter(),
                refused_address: counter(),
                displaced: counter(),
            };
            let settings = AcceptSettings {
                protocol: "test",
                limits: SlotLimits::new(total, None),
                keepalive: Duration::from_secs(7),
            };
            let listener = bind(([127, 0, 0, 1], 0).into(), total).unwrap();
            let accept = AcceptLoop::new(listener, settings, counters.clone());
            let addr = accept.local_addr().unwrap();
            let (sender, accepted) = mpsc::unbounded_channel();
            let shutdown = CancellationToken::new();
            let task = tokio::spawn(accept.run(shutdown.clone(), move |connection| {
                sender.send(connection).unwrap();
            }));
            Self { addr, counters, accepted, shutdown, task }
        }

        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.addr).await.unwrap()
        }

        async fn accepted(&mut self) -> Accepted {
            timeout(SOON, self.accepted.recv()).await.unwrap().unwrap()
        }
    }

    #[tokio::test]
    async fn accepted_sockets_have_nodelay_and_keepalive() {
        let mut running = Running::start(2);
        let client = running.connect().await;
        let Accepted { stream, peer, .. } = running.accepted().await;
        assert_eq!(peer, client.local_addr().unwrap());
        assert!(stream.nodelay().unwrap());
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(7));
    }

    #[tokio::test]
    async fn connection_without_a_slot_is_closed_and_counted() {
        let mut running = Running::start(1);
        let _first = running.connect().await;
        let first = running.accepted().await;
        assert!(first.slot.set_busy());
        let mut second = running.connect().await;
        assert_eq!(timeout(SOON, second.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
        assert_eq!(running.counters.refused_total.get(), 1);
        drop(first);
        let _third = running.connect().await;
        running.accepted().await;
        assert_eq!(running.counters.accepted.get(), 3);
        assert_eq!(running.counters.displaced.get(), 0);
    }

    #[tokio::test]
    async fn idle_connection_is_displaced_by_a_new_one() {
        let mut running = Running::start(1);
        let _first = running.connect().await;
        let first = running.accepted().await;
        let _second = running.connect().await;
        running.accepted().await;
        timeout(SOON, first.slot.displaced()).await.unwrap();
        assert!(first.slot.is_displaced());
        assert_eq!(running.counters.displaced.get(), 1);
    }

    #[tokio::test]
    async fn shutdown_frees_the_address() {
        let running = Running::start(1);
        running.shutdown.cancel();
        timeout(SOON, running.task).await.unwrap().unwrap();
        assert!(TcpStream::connect(running.addr).await.is_err());
        bind(running.addr, 1).unwrap();
    }
}
