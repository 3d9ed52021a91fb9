//! The emulated network: UDP ports whose datagrams share one pair of [`Link`]s.
//!
//! [`downpour_netem::UdpRelay`] does not fit: Downpour sends media and repairs from two sockets, and
//! both must share the same links, loss bursts and queue, as SRT's and RIST's packets do. The wire
//! also runs on a separate thread with timers finer than tokio's, and records how late it was.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use bytes::Bytes;
use downpour_netem::{Link, LinkSettings};

/// Direction over the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The direction of the media.
    Forward,
    /// The opposite direction.
    Back,
}

/// A UDP port that forwards datagrams between a client and `upstream`.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    pub upstream: SocketAddr,
    /// Direction from the client to the upstream. Replies go in the other direction.
    pub direction: Direction,
}

/// Traffic over the wire.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    /// Datagrams sent in the direction of the media, including those that the link dropped.
    pub forward: Count,
    /// Datagrams sent in the other direction.
    pub back: Count,
    /// Datagrams that the forward link dropped, for any reason.
    pub dropped_forward: u64,
    /// How late each datagram was delivered, in microseconds.
    pub lateness: Vec<u32>,
    /// Datagrams that failed to send, except to closed ports.
    pub errors: u64,
}

#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Count {
    pub datagrams: u64,
    pub bytes: u64,
}

impl Count {
    /// Bytes with the headers of IPv4 and UDP.
    pub fn with_headers(self) -> u64 {
        self.bytes + 28 * self.datagrams
    }
}

/// A running wire. It stops when it is dropped.
#[derive(Debug)]
pub struct Wire {
    addresses: Vec<SocketAddr>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// Opens the routes with the link settings `clean`. `seed` seeds the forward link, and `seed` + 1
    /// the other one.
    pub fn start(routes: &[Route], clean: &LinkSettings, seed: u64) -> io::Result<Self> {
        let routes = routes.iter().map(OpenRoute::open).collect::<io::Result<Vec<_>>>()?;
        let addresses =
            routes.iter().map(|route| route.listen.local_addr()).collect::<io::Result<_>>()?;
        let shared = Arc::<Shared>::default();
        let task = Task {
            routes,
            forward: Link::new(clean.clone(), seed),
            back: Link::new(clean.clone(), seed.wrapping_add(1)),
            shared: shared.clone(),
            buffer: vec![0; 65_536],
        };
        let thread = std::thread::Builder::new().name("wire".into()).spawn(move || task.run())?;
        Ok(Self { addresses, shared, thread: Some(thread) })
    }

    /// The address that clients of route `index` send to.
    pub fn address(&self, index: usize) -> SocketAddr {
        self.addresses[index]
    }

    /// Changes the settings of both links. Returns after the change.
    pub fn set(&self, forward: &LinkSettings, back: &LinkSettings) {
        self.shared.state().change = Some((forward.clone(), back.clone()));
        while self.shared.state().change.is_some() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Returns the traffic since the last call.
    pub fn take_traffic(&self) -> Traffic {
        std::mem::take(&mut self.shared.state().traffic)
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    change: Option<(LinkSettings, LinkSettings)>,
    traffic: Traffic,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct OpenRoute {
    direction: Direction,
    listen: UdpSocket,
    upstream: UdpSocket,
    client: Option<SocketAddr>,
}

impl OpenRoute {
    fn open(route: &Route) -> io::Result<Self> {
        let upstream = socket()?;
        upstream.connect(route.upstream)?;
        Ok(Self { direction: route.direction, listen: socket()?, upstream, client: None })
    }
}

struct Task {
    routes: Vec<OpenRoute>,
    forward: Link,
    back: Link,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
}

impl Task {
    fn run(mut self) {
        let mut polled: Vec<_> = self
            .routes
            .iter()
            .flat_map(|route| [route.listen.as_raw_fd(), route.upstream.as_raw_fd()])
            .map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 })
            .collect();
        let mut traffic = Traffic::default();
        while !self.shared.stop.load(Ordering::Relaxed) {
            {
                let mut state = self.shared.state();
                if let Some((forward, back)) = state.change.take() {
                    self.forward.set_settings(forward);
                    self.back.set_settings(back);
                }
                add(&mut state.traffic, &mut traffic);
            }
            self.receive(&mut traffic);
            self.deliver(&mut traffic);
            let next = [self.forward.next_deadline(), self.back.next_deadline()];
            let next = next.into_iter().flatten().min();
            let wait = next.map_or(MAX_WAIT, |due| due.saturating_duration_since(Instant::now()));
            poll(&mut polled, wait.min(MAX_WAIT));
        }
    }

    /// Reads the sockets and sends the datagrams into the links.
    fn receive(&mut self, traffic: &mut Traffic) {
        for index in 0..self.routes.len() {
            for from_client in [true, false] {
                for _ in 0..BATCH {
                    let route = &mut self.routes[index];
                    let received = match from_client {
                        true => route.listen.recv_from(&mut self.buffer).map(|(len, client)| {
                            route.client = Some(client);
                            len
                        }),
                        false => route.upstream.recv(&mut self.buffer),
                    };
                    let len = match received {
                        Ok(len) => len,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        // The port of an earlier datagram is closed.
                        Err(_) => continue,
                    };
                    let forward = (route.direction == Direction::Forward) == from_client;
                    // The first byte in the link is the index of the route.
                    let mut datagram = Vec::with_capacity(len + 1);
                    datagram.push(index as u8);
                    datagram.extend_from_slice(&self.buffer[..len]);
                    let (link, count) = match forward {
                        true => (&mut self.forward, &mut traffic.forward),
                        false => (&mut self.back, &mut traffic.back),
                    };
                    count.datagrams += 1;
                    count.bytes += len as u64;
                    link.send(Instant::now(), Bytes::from(datagram));
                }
            }
        }
        traffic.dropped_forward += self.forward.take_stats().dropped();
    }

    /// Sends the datagrams that have left the links.
    fn deliver(&mut self, traffic: &mut Traffic) {
        for (link, direction) in
            [(&mut self.forward, Direction::Forward), (&mut self.back, Direction::Back)]
        {
            loop {
                let now = Instant::now();
                let Some(due) = link.next_deadline().filter(|due| *due <= now) else { break };
                let Some(datagram) = link.poll_output(now) else { break };
                traffic.lateness.push((now - due).as_micros() as u32);
                let Some((index, payload)) = datagram.split_first() else { continue };
                let route = &self.routes[usize::from(*index)];
                let sent = match (route.direction == direction, route.client) {
                    (true, _) => route.upstream.send(payload),
                    (false, Some(client)) => route.listen.send_to(payload, client),
                    (false, None) => continue,
                };
                if sent.is_err_and(|error| error.kind() != io::ErrorKind::ConnectionRefused) {
                    traffic.errors += 1;
                }
            }
        }
    }
}

fn add(to: &mut Traffic, from: &mut Traffic) {
    for (to, from) in [(&mut to.forward, from.forward), (&mut to.back, from.back)] {
        to.datagrams += from.datagrams;
        to.bytes += from.bytes;
    }
    to.dropped_forward += from.dropped_forward;
    to.errors += from.errors;
    to.lateness.append(&mut from.lateness);
    *from = Traffic { lateness: std::mem::take(&mut from.lateness), ..Traffic::default() };
}

fn poll(polled: &mut [libc::pollfd], wait: Duration) {
    let wait = libc::timespec {
        tv_sec: wait.as_secs() as libc::time_t,
        tv_nsec: wait.subsec_nanos() as libc::c_long,
    };
    // SAFETY: the sockets of the descriptors outlive the call, the pointers are to live values, and
    // a null signal mask is allowed. The result does not matter: all sockets are read.
    unsafe {
        libc::ppoll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, &wait, std::ptr::null());
    }
}

fn socket() -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let options = socket2::SockRef::from(&socket);
    options.set_recv_buffer_size(SOCKET_BUFFER)?;
    options.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Maximum delay of a change of settings.
const MAX_WAIT: Duration = Duration::from_millis(2);
/// Maximum number of datagrams read from one socket before the next one.
const BATCH: usize = 64;
const SOCKET_BUFFER: usize = 4 << 20;
