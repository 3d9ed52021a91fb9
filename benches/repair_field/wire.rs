//! The emulated link as a process sees it: UDP ports whose datagrams share one pair of
//! [`Link`]s.
//!
//! It is not [`downpour_netem::UdpRelay`] because Downpour sends media and repairs from two
//! sockets: both must share the same line, lose in the same bursts and fill the same queue, as the
//! rivals' do. It also has a thread of its own with timers finer than tokio's, and tells how late
//! it was.

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

/// Which of the two links carries something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// With the media.
    Forward,
    /// Against it.
    Back,
}

/// An address that clients send to, and where that leads.
#[derive(Debug, Clone, Copy)]
pub struct Door {
    pub upstream: SocketAddr,
    /// The way from the client to the upstream; answers go the other way.
    pub way: Way,
}

/// What went over the link.
#[derive(Debug, Clone, Default)]
pub struct Traffic {
    /// Put in with the media's direction, what the link then lost included.
    pub forward: Count,
    /// The same against it.
    pub back: Count,
    /// Lost forward, for whatever cause.
    pub dropped_forward: u64,
    /// By how much datagrams came out later than they should have, in microseconds.
    pub lateness: Vec<u32>,
    /// Datagrams that a socket did not take; not those to a port that nobody listens on.
    pub errors: u64,
}

#[derive(Debug, Clone, Copy, Default, serde::Serialize)]
pub struct Count {
    pub datagrams: u64,
    pub bytes: u64,
}

impl Count {
    /// With the headers of IPv4 and UDP.
    pub fn on_the_wire(self) -> u64 {
        self.bytes + 28 * self.datagrams
    }
}

/// A running link. Dropping it closes it.
#[derive(Debug)]
pub struct Wire {
    doors: Vec<SocketAddr>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// `seed` decides every draw of the forward link, and the next number those of the other one.
    pub fn start(doors: &[Door], clean: &LinkSettings, seed: u64) -> io::Result<Self> {
        let open = doors.iter().map(OpenDoor::open).collect::<io::Result<Vec<_>>>()?;
        let addresses =
            open.iter().map(|door| door.listen.local_addr()).collect::<io::Result<_>>()?;
        let shared = Arc::<Shared>::default();
        let task = Task {
            doors: open,
            forward: Link::new(clean.clone(), seed),
            back: Link::new(clean.clone(), seed.wrapping_add(1)),
            shared: shared.clone(),
            buffer: vec![0; 65_536],
        };
        let thread = std::thread::Builder::new().name("wire".into()).spawn(move || task.run())?;
        Ok(Self { doors: addresses, shared, thread: Some(thread) })
    }

    /// Where clients send to.
    pub fn door(&self, index: usize) -> SocketAddr {
        self.doors[index]
    }

    /// Changes both directions; done when it returns.
    pub fn set(&self, forward: &LinkSettings, back: &LinkSettings) {
        self.shared.state().change = Some((forward.clone(), back.clone()));
        while self.shared.state().change.is_some() {
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// What happened since the last call.
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

struct OpenDoor {
    way: Way,
    listen: UdpSocket,
    upstream: UdpSocket,
    client: Option<SocketAddr>,
}

impl OpenDoor {
    fn open(door: &Door) -> io::Result<Self> {
        let upstream = socket()?;
        upstream.connect(door.upstream)?;
        Ok(Self { way: door.way, listen: socket()?, upstream, client: None })
    }
}

struct Task {
    doors: Vec<OpenDoor>,
    forward: Link,
    back: Link,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
}

impl Task {
    fn run(mut self) {
        let mut polled: Vec<_> = self
            .doors
            .iter()
            .flat_map(|door| [door.listen.as_raw_fd(), door.upstream.as_raw_fd()])
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
            let wait = next.map_or(GLANCE, |due| due.saturating_duration_since(Instant::now()));
            poll(&mut polled, wait.min(GLANCE));
        }
    }

    /// Takes what has come to each socket.
    fn receive(&mut self, traffic: &mut Traffic) {
        for index in 0..self.doors.len() {
            for from_client in [true, false] {
                for _ in 0..BATCH {
                    let door = &mut self.doors[index];
                    let received = match from_client {
                        true => door.listen.recv_from(&mut self.buffer).map(|(len, client)| {
                            door.client = Some(client);
                            len
                        }),
                        false => door.upstream.recv(&mut self.buffer),
                    };
                    let len = match received {
                        Ok(len) => len,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        // Nobody listens there yet, or any more.
                        Err(_) => continue,
                    };
                    let forward = (door.way == Way::Forward) == from_client;
                    // A datagram carries its door's number through the link.
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

    /// Passes on what has reached its end.
    fn deliver(&mut self, traffic: &mut Traffic) {
        for (link, way) in [(&mut self.forward, Way::Forward), (&mut self.back, Way::Back)] {
            loop {
                let now = Instant::now();
                let Some(due) = link.next_deadline().filter(|due| *due <= now) else { break };
                let Some(datagram) = link.poll_output(now) else { break };
                traffic.lateness.push((now - due).as_micros() as u32);
                let Some((index, payload)) = datagram.split_first() else { continue };
                let door = &self.doors[usize::from(*index)];
                let sent = match (door.way == way, door.client) {
                    (true, _) => door.upstream.send(payload),
                    (false, Some(client)) => door.listen.send_to(payload, client),
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
    // SAFETY: the descriptors are those of sockets that live as long as this loop, the pointers are
    // to live values, and no signal mask is given. Whatever it answers, the sockets are tried.
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

/// How long a change waits at most.
const GLANCE: Duration = Duration::from_millis(2);
/// Datagrams taken from one socket before the next gets its turn.
const BATCH: usize = 64;
const SOCKET_BUFFER: usize = 4 << 20;
