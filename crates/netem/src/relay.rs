//! A UDP relay with a [`Link`] per client and direction.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::UdpSocket,
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tracing::{debug, warn};

use super::{Link, LinkSettings, LinkStats};

/// Relays datagrams between clients and one upstream address. Each direction of each client has its
/// own [`Link`].
///
/// The upstream sees each client as a separate port, as behind a NAT. Dropping the relay closes its
/// sockets. The kernel splits GSO batches before they reach the relay, so datagrams are impaired
/// one by one.
///
/// One task reads the listening socket and passes datagrams to the client's task over a bounded
/// channel; the client's task owns both links and the upstream socket. It ends after
/// [`RelaySettings::idle_timeout`] or with the relay.
#[derive(Debug)]
pub struct UdpRelay {
    local_addr: SocketAddr,
    shared: Arc<Shared>,
    paths: watch::Sender<Paths>,
    listener: JoinHandle<()>,
}

impl UdpRelay {
    /// Listens on a free loopback port and relays to `upstream`.
    ///
    /// # Errors
    /// If no socket is available.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(upstream: SocketAddr, settings: RelaySettings) -> io::Result<Self> {
        Self::start_at(loopback(upstream.is_ipv6()), upstream, settings)
    }

    /// Like [`UdpRelay::start`], but listens on `listen`.
    ///
    /// # Errors
    /// If the address is in use.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_at(
        listen: SocketAddr,
        upstream: SocketAddr,
        settings: RelaySettings,
    ) -> io::Result<Self> {
        let socket = bind(listen)?;
        let local_addr = socket.local_addr()?;
        let shared = Arc::new(Shared::default());
        let (paths, changes) = watch::channel(Paths {
            to_upstream: settings.to_upstream.clone(),
            to_client: settings.to_client.clone(),
        });
        let listener = Listener {
            socket: Arc::new(socket),
            upstream,
            settings,
            shared: shared.clone(),
            paths: changes,
            clients: HashMap::new(),
            seen: 0,
        };
        Ok(Self { local_addr, shared, paths, listener: tokio::spawn(listener.run()) })
    }

    /// Changes both directions for all present and future clients. Blackouts count from the next
    /// datagram.
    pub fn set_settings(&self, to_upstream: LinkSettings, to_client: LinkSettings) {
        self.paths.send_replace(Paths { to_upstream, to_client });
    }

    /// Returns the address that clients send to.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Returns the counters of all clients together.
    pub fn stats(&self) -> RelayStats {
        let Totals { to_upstream, to_client } = *self.shared.totals.lock();
        RelayStats {
            to_upstream,
            to_client,
            clients: self.shared.clients.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
            errors: self.shared.errors.load(Ordering::Relaxed),
        }
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        // The listener owns the senders of the clients' channels, so their tasks end with it.
        self.listener.abort();
    }
}

/// Settings of a [`UdpRelay`].
#[derive(Debug, Clone, PartialEq)]
pub struct RelaySettings {
    /// The path from a client to the upstream.
    pub to_upstream: LinkSettings,
    /// The path from the upstream to a client.
    pub to_client: LinkSettings,
    /// Determines all random draws, together with the order in which clients appear.
    pub seed: u64,
    /// Clients at a time. Datagrams of further clients are dropped and counted.
    pub max_clients: usize,
    /// A client without traffic in either direction for this time is removed.
    pub idle_timeout: Duration,
}

impl RelaySettings {
    /// The same path in both directions.
    pub fn symmetric(path: LinkSettings, seed: u64) -> Self {
        Self { to_upstream: path.clone(), to_client: path, seed, ..Self::default() }
    }
}

impl Default for RelaySettings {
    fn default() -> Self {
        Self {
            to_upstream: LinkSettings::default(),
            to_client: LinkSettings::default(),
            seed: 0,
            max_clients: 1024,
            idle_timeout: Duration::from_secs(60),
        }
    }
}

/// Counters of a [`UdpRelay`], all clients together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RelayStats {
    /// From clients to the upstream.
    pub to_upstream: LinkStats,
    /// From the upstream to clients.
    pub to_client: LinkStats,
    /// Present clients.
    pub clients: usize,
    /// Datagrams dropped because there were too many clients, or the queue of a client's task was
    /// full.
    pub refused: u64,
    /// Socket errors, such as a closed upstream port.
    pub errors: u64,
}

#[derive(Debug, Clone)]
struct Paths {
    to_upstream: LinkSettings,
    to_client: LinkSettings,
}

#[derive(Debug, Default)]
struct Shared {
    totals: Mutex<Totals>,
    clients: AtomicUsize,
    refused: AtomicU64,
    errors: AtomicU64,
}

#[derive(Debug, Default)]
struct Totals {
    to_upstream: LinkStats,
    to_client: LinkStats,
}

/// Reads the clients' datagrams and passes them to the clients' tasks.
struct Listener {
    socket: Arc<UdpSocket>,
    upstream: SocketAddr,
    settings: RelaySettings,
    shared: Arc<Shared>,
    paths: watch::Receiver<Paths>,
    clients: HashMap<SocketAddr, mpsc::Sender<Bytes>>,
    /// Clients seen so far: determines the seed of the next one.
    seen: u64,
}

impl Listener {
    async fn run(mut self) {
        let mut buffer = vec![0; MAX_DATAGRAM];
        loop {
            match self.socket.recv_from(&mut buffer).await {
                Ok((len, client)) => self.datagram(client, Bytes::copy_from_slice(&buffer[..len])),
                Err(error) => {
                    self.shared.errors.fetch_add(1, Ordering::Relaxed);
                    debug!(%error, "relay receive failed");
                    // A persistent error must not cause a busy loop.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        }
    }

    fn datagram(&mut self, client: SocketAddr, datagram: Bytes) {
        let datagram = match self.clients.get(&client) {
            Some(queue) => match queue.try_send(datagram) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(_)) => return self.refuse(),
                Err(mpsc::error::TrySendError::Closed(datagram)) => datagram,
            },
            None => datagram,
        };
        self.clients.retain(|_, queue| !queue.is_closed());
        if self.clients.len() >= self.settings.max_clients {
            return self.refuse();
        }
        let upstream = match self.connect() {
            Ok(upstream) => upstream,
            Err(error) => {
                warn!(peer = %client, %error, "relay socket for client failed");
                self.shared.errors.fetch_add(1, Ordering::Relaxed);
                return;
            }
        };
        let (queue, received) = mpsc::channel(CLIENT_QUEUE);
        // Cannot fail: the queue is empty.
        let _ = queue.try_send(datagram);
        self.clients.insert(client, queue);
        let mut paths = self.paths.clone();
        let Paths { to_upstream, to_client } = paths.borrow_and_update().clone();
        let seed = self.settings.seed.wrapping_add(self.seen.wrapping_mul(2));
        self.seen += 1;
        let task = Client {
            address: client,
            listen: self.socket.clone(),
            upstream,
            to_upstream: Link::new(to_upstream, seed),
            to_client: Link::new(to_client, seed.wrapping_add(1)),
            shared: self.shared.clone(),
            idle_timeout: self.settings.idle_timeout,
        };
        self.shared.clients.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(task.run(received, paths));
    }

    fn refuse(&self) {
        self.shared.refused.fetch_add(1, Ordering::Relaxed);
    }

    fn connect(&self) -> io::Result<UdpSocket> {
        let local = match (self.upstream.is_ipv6(), self.upstream.ip().is_loopback()) {
            (v6, true) => loopback(v6),
            (false, false) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            (true, false) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let socket = bind(local)?;
        socket2::SockRef::from(&socket).connect(&self.upstream.into())?;
        Ok(socket)
    }
}

/// The task of one client: both directions.
struct Client {
    address: SocketAddr,
    listen: Arc<UdpSocket>,
    upstream: UdpSocket,
    to_upstream: Link,
    to_client: Link,
    shared: Arc<Shared>,
    idle_timeout: Duration,
}

impl Client {
    async fn run(mut self, mut received: mpsc::Receiver<Bytes>, mut paths: watch::Receiver<Paths>) {
        let mut buffer = vec![0; MAX_DATAGRAM];
        let mut batch = Vec::with_capacity(BATCH);
        let mut sleep = pin!(tokio::time::sleep(Duration::ZERO));
        let mut active = Instant::now();
        loop {
            let idle_at = active + self.idle_timeout;
            let next = [self.to_upstream.next_deadline(), self.to_client.next_deadline()];
            let wake = next.into_iter().flatten().fold(idle_at, Instant::min);
            sleep.as_mut().reset(wake.into());
            // New settings come first: a test that cuts the path expects the cut to apply to the
            // datagrams that it sends afterwards.
            tokio::select! {
                biased;
                changed = paths.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let Paths { to_upstream, to_client } = paths.borrow_and_update().clone();
                    self.to_upstream.set_settings(to_upstream);
                    self.to_client.set_settings(to_client);
                }
                count = received.recv_many(&mut batch, BATCH) => {
                    if count == 0 {
                        break;
                    }
                    active = Instant::now();
                    batch.drain(..).for_each(|datagram| self.to_upstream.send(active, datagram));
                }
                readable = self.upstream.readable() => {
                    active = Instant::now();
                    if let Err(error) = readable {
                        self.error(&error).await;
                    }
                    self.receive(active, &mut buffer).await;
                }
                () = &mut sleep => {
                    if Instant::now() >= idle_at {
                        break;
                    }
                }
            }
            self.deliver(Instant::now()).await;
        }
        self.shared.clients.fetch_sub(1, Ordering::Relaxed);
    }

    /// Reads up to a batch of datagrams from the upstream, so that neither direction starves.
    async fn receive(&mut self, now: Instant, buffer: &mut [u8]) {
        for _ in 0..BATCH {
            match self.upstream.try_recv(buffer) {
                Ok(len) => self.to_client.send(now, Bytes::copy_from_slice(&buffer[..len])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.error(&error).await,
            }
        }
    }

    async fn deliver(&mut self, now: Instant) {
        while let Some(datagram) = self.to_upstream.poll_output(now) {
            if let Err(error) = self.upstream.send(&datagram).await {
                self.error(&error).await;
                // The error belongs to an earlier datagram; this one has not been sent.
                if error.kind() == io::ErrorKind::ConnectionRefused {
                    let _ = self.upstream.send(&datagram).await;
                }
            }
        }
        while let Some(datagram) = self.to_client.poll_output(now) {
            if let Err(error) = self.listen.send_to(&datagram, self.address).await {
                self.error(&error).await;
            }
        }
        let mut totals = self.shared.totals.lock();
        totals.to_upstream += self.to_upstream.take_stats();
        totals.to_client += self.to_client.take_stats();
    }

    async fn error(&self, error: &io::Error) {
        self.shared.errors.fetch_add(1, Ordering::Relaxed);
        // ICMP port unreachable: the upstream may come back, so the path stays.
        if error.kind() != io::ErrorKind::ConnectionRefused {
            debug!(peer = %self.address, %error, "relay socket failed");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn loopback(v6: bool) -> SocketAddr {
    let ip: IpAddr = if v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
    (ip, 0).into()
}

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    // The kernel may grant less. Bursts can then overflow it, which `LinkStats` does not count.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    UdpSocket::from_std(socket.into())
}

/// The longest UDP datagram in bytes.
const MAX_DATAGRAM: usize = 65_535;
/// Requested kernel buffer per direction, in bytes.
const SOCKET_BUFFER: usize = 4 << 20;
/// Datagrams queued for a client's task.
const CLIENT_QUEUE: usize = 4096;
/// Datagrams read from one side before the other gets its turn.
const BATCH: usize = 64;

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const WAIT: Duration = Duration::from_secs(20);

    async fn socket() -> UdpSocket {
        bind(loopback(false)).unwrap()
    }

    async fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
        let mut buffer = vec![0; 2048];
        let (len, from) = timeout(WAIT, socket.recv_from(&mut buffer)).await.unwrap().unwrap();
        buffer.truncate(len);
        (buffer, from)
    }

    /// Waits until `condition` holds of the relay's statistics.
    async fn until(relay: &UdpRelay, condition: impl Fn(&RelayStats) -> bool) {
        let deadline = Instant::now() + WAIT;
        while !condition(&relay.stats()) {
            assert!(Instant::now() < deadline, "{:?}", relay.stats());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    #[tokio::test]
    async fn each_client_receives_its_replies() {
        let upstream = socket().await;
        let relay =
            UdpRelay::start(upstream.local_addr().unwrap(), RelaySettings::default()).unwrap();
        let clients = [socket().await, socket().await, socket().await];
        for (i, client) in clients.iter().enumerate() {
            client.send_to(&[i as u8], relay.local_addr()).await.unwrap();
            let (datagram, from) = receive(&upstream).await;
            upstream.send_to(&[datagram[0] + 100], from).await.unwrap();
        }
        for (i, client) in clients.iter().enumerate() {
            let (datagram, from) = receive(client).await;
            assert_eq!(datagram, [i as u8 + 100]);
            assert_eq!(from, relay.local_addr());
        }
        until(&relay, |s| s.clients == 3 && s.to_client.delivered == 3).await;
    }

    #[tokio::test]
    async fn settings_apply_to_a_running_path() {
        let upstream = socket().await;
        let relay =
            UdpRelay::start(upstream.local_addr().unwrap(), RelaySettings::default()).unwrap();
        let client = socket().await;
        client.send_to(b"1", relay.local_addr()).await.unwrap();
        assert_eq!(receive(&upstream).await.0, b"1");
        relay.set_settings(LinkSettings::cut(), LinkSettings::default());
        client.send_to(b"2", relay.local_addr()).await.unwrap();
        until(&relay, |s| s.to_upstream.dropped_random == 1).await;
        relay.set_settings(LinkSettings::default(), LinkSettings::default());
        client.send_to(b"3", relay.local_addr()).await.unwrap();
        assert_eq!(receive(&upstream).await.0, b"3");
    }

    #[tokio::test]
    async fn clients_are_bounded_and_idle_ones_are_removed() {
        let upstream = socket().await;
        let settings = RelaySettings {
            max_clients: 1,
            idle_timeout: Duration::from_millis(50),
            ..RelaySettings::default()
        };
        let relay = UdpRelay::start(upstream.local_addr().unwrap(), settings).unwrap();
        let (first, second) = (socket().await, socket().await);
        // The second is refused unless the listener sees it after the first has timed out.
        first.send_to(b"1", relay.local_addr()).await.unwrap();
        second.send_to(b"2", relay.local_addr()).await.unwrap();
        assert_eq!(receive(&upstream).await.0, b"1");
        until(&relay, |s| s.refused == 1 || s.to_upstream.sent == 2).await;
        until(&relay, |s| s.clients == 0).await;
        second.send_to(b"3", relay.local_addr()).await.unwrap();
        loop {
            if receive(&upstream).await.0 == b"3" {
                break;
            }
        }
    }

    #[tokio::test]
    async fn client_reaches_a_restarted_upstream() {
        let gone = socket().await;
        let address = gone.local_addr().unwrap();
        drop(gone);
        let relay = UdpRelay::start(address, RelaySettings::default()).unwrap();
        let client = socket().await;
        client.send_to(b"1", relay.local_addr()).await.unwrap();
        until(&relay, |s| s.to_upstream.delivered == 1).await;
        let upstream = bind(address).unwrap();
        client.send_to(b"2", relay.local_addr()).await.unwrap();
        assert_eq!(receive(&upstream).await.0, b"2");
        until(&relay, |s| s.errors == 1).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn relay_carries_20000_packets_per_second_with_the_requested_loss() {
        let upstream = socket().await;
        let settings = RelaySettings {
            to_upstream: LinkSettings {
                delay: Duration::from_millis(20),
                ..LinkSettings::lossy(0.05)
            },
            seed: 42,
            ..RelaySettings::default()
        };
        let relay = UdpRelay::start(upstream.local_addr().unwrap(), settings).unwrap();
        let client = socket().await;
        let count = 20_000u64;
        let got = Arc::new(AtomicU64::new(0));
        let reader = tokio::spawn({
            let got = got.clone();
            async move {
                let mut buffer = [0; 2048];
                while upstream.recv(&mut buffer).await.is_ok() {
                    got.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let started = Instant::now();
        let mut pace = tokio::time::interval(Duration::from_millis(1));
        for sent in (0..count).step_by(20) {
            pace.tick().await;
            for _ in 0..20 {
                client.send_to(&[7; 1132], relay.local_addr()).await.unwrap();
            }
            // On a slow machine, wait rather than overflow the kernel's buffers.
            let done = || got.load(Ordering::Relaxed) + relay.stats().to_upstream.dropped();
            until(&relay, |_| done() + 1500 > sent).await;
        }
        let took = started.elapsed();
        let done = || got.load(Ordering::Relaxed) + relay.stats().to_upstream.dropped();
        until(&relay, |_| done() == count).await;
        reader.abort();
        let stats = relay.stats();
        // Nothing is lost in the relay's queues and sockets.
        assert_eq!(stats.to_upstream.sent, count);
        assert_eq!(stats.refused, 0);
        assert_eq!(stats.errors, 0);
        // One second on an idle machine.
        assert!(took < Duration::from_secs(10), "{took:?}");
        let lost = stats.to_upstream.dropped_random;
        assert!((850..1150).contains(&lost), "{lost}");
    }
}
