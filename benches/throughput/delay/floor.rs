//! The least that could be done: a thread for each encoder reads whole frames, sends them on over UDP,
//! to all edges in turn, and a thread reads that and writes it to the viewers. Where there are many
//! edges, as many threads send as the machine has processors, each to its part of them. No RTMP, no
//! RTP, no repair.

use std::{
    collections::HashMap,
    io::{self, IoSliceMut, Read, Write},
    net::{SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use downpour_sys::udp;
use quinn_udp::{RecvMeta, UdpSockRef, UdpSocketState};
use socket2::{Domain, Socket, Type};

use crate::bare::Bare;

/// Takes encoders and viewers, who say their stream's number first, until it is ended. `list` names a
/// file of the addresses to send to, of which `edge` is the one that is read here.
pub fn run(
    publishers: SocketAddr,
    viewers: SocketAddr,
    edge: SocketAddr,
    list: &Path,
) -> io::Result<()> {
    let list: Vec<SocketAddrV4> = std::fs::read_to_string(list)?
        .lines()
        .map(|line| line.parse().map_err(io::Error::other))
        .collect::<io::Result<_>>()?;
    let received = udp::receiver(edge, None, BUFFER)?;
    let watching = Arc::<Watching>::default();
    let publishers = listen(publishers)?;
    let viewers = listen(viewers)?;
    let shared = watching.clone();
    thread::spawn(move || receive(&received, &shared));
    let shared = watching.clone();
    thread::spawn(move || -> io::Result<()> {
        for socket in viewers.incoming() {
            let mut socket = socket?;
            socket.set_nodelay(true)?;
            let stream = stream_number(&mut socket)?;
            shared.0.lock().unwrap_or_else(PoisonError::into_inner).insert(stream, socket);
        }
        Ok(())
    });
    println!("listening");
    io::stdout().flush()?;
    let senders = Arc::new(Senders::new(list)?);
    for socket in publishers.incoming() {
        let (mut socket, senders, watching) = (socket?, senders.clone(), watching.clone());
        thread::Builder::new().stack_size(128 << 10).spawn(move || -> io::Result<()> {
            let stream = stream_number(&mut socket)?;
            senders.relay(Frames::of(&mut socket, stream))?;
            // What is on its way over UDP is there first.
            thread::sleep(std::time::Duration::from_millis(200));
            watching.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&stream);
            Ok(())
        })?;
    }
    Ok(())
}

/// All encoders may come at once.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// The viewer of each stream.
#[derive(Default)]
struct Watching(Mutex<HashMap<u32, TcpStream>>);

fn stream_number(socket: &mut TcpStream) -> io::Result<u32> {
    let mut number = [0; 4];
    socket.read_exact(&mut number)?;
    Ok(u32::from_be_bytes(number))
}

/// Who sends to the edges.
enum Senders {
    /// Each encoder's own thread, to this list.
    Own(Vec<SocketAddrV4>),
    /// Threads that are given each frame.
    Threads(Vec<mpsc::Sender<Arc<[u8]>>>),
}

impl Senders {
    fn new(list: Vec<SocketAddrV4>) -> io::Result<Self> {
        let count = thread::available_parallelism()?.get().min(list.len() / SHARE);
        if count < 2 {
            return Ok(Self::Own(list));
        }
        let threads = (0..count).map(|first| {
            let chunks = list.chunks(SHARE).skip(first).step_by(count);
            let mut bare = Bare::new(&chunks.flatten().copied().collect::<Vec<_>>())?;
            let (give, frames) = mpsc::channel::<Arc<[u8]>>();
            let run = move || bare.cut_each(frames.into_iter().map(Ok), STRIDE as u16);
            thread::Builder::new().name(format!("floor-{first}")).spawn(run)?;
            Ok(give)
        });
        Ok(Self::Threads(threads.collect::<io::Result<_>>()?))
    }

    /// Sends each frame once it is whole.
    fn relay(&self, frames: Frames<'_>) -> io::Result<()> {
        match self {
            Self::Own(list) => Bare::new(list)?.cut_each(frames, STRIDE as u16),
            Self::Threads(threads) => {
                for frame in frames {
                    let frame = Arc::<[u8]>::from(frame?);
                    for thread in threads {
                        let given = thread.send(frame.clone());
                        given.map_err(|_| io::Error::other("a thread that sends has failed"))?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// The frames of an encoder, as they come, in datagrams one behind the other.
struct Frames<'a> {
    socket: &'a mut TcpStream,
    stream: u32,
    /// Of the next one.
    number: u32,
    held: Vec<u8>,
    buffer: Vec<u8>,
}

impl<'a> Frames<'a> {
    fn of(socket: &'a mut TcpStream, stream: u32) -> Self {
        Self { socket, stream, number: 0, held: Vec::new(), buffer: vec![0; 64 << 10] }
    }
}

impl Iterator for Frames<'_> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(length) = self.held.first_chunk::<4>() {
                let whole = 4 + u32::from_be_bytes(*length) as usize;
                if self.held.len() >= whole {
                    let frame = cut(self.stream, self.number, &self.held[..whole]);
                    self.number += 1;
                    self.held.drain(..whole);
                    return Some(Ok(frame));
                }
            }
            match self.socket.read(&mut self.buffer) {
                Ok(0) => return None,
                Ok(count) => self.held.extend_from_slice(&self.buffer[..count]),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// A frame's datagrams.
fn cut(stream: u32, number: u32, frame: &[u8]) -> Vec<u8> {
    let mut datagrams = Vec::new();
    let slices = frame.chunks(STRIDE - HEAD);
    let count = slices.len() as u16;
    for (index, slice) in (0u16..).zip(slices) {
        datagrams.extend_from_slice(&stream.to_be_bytes());
        datagrams.extend_from_slice(&number.to_be_bytes());
        datagrams.extend_from_slice(&index.to_be_bytes());
        datagrams.extend_from_slice(&count.to_be_bytes());
        datagrams.extend_from_slice(slice);
    }
    datagrams
}

/// Writes each frame that is whole to its stream's viewer. One of which a datagram was dropped, it
/// leaves out: the kernel does that where more than `net.core.netdev_max_backlog` wait.
fn receive(socket: &UdpSocket, watching: &Watching) -> io::Result<()> {
    let state = UdpSocketState::new(UdpSockRef::from(socket))?;
    socket.set_nonblocking(false)?;
    let size = (state.gro_segments() * 1500).min(usize::from(u16::MAX));
    let mut bytes = vec![0; size];
    // One at a time: for several, a socket that blocks waits until all of them are there.
    let mut meta = [RecvMeta::default()];
    let mut frames: HashMap<u32, Frame> = HashMap::new();
    loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let reads = state.recv(UdpSockRef::from(socket), &mut slices, &mut meta)?;
        for read in &meta[..reads] {
            for datagram in bytes[..read.len].chunks(read.stride.max(1)) {
                let Some((head, slice)) = datagram.split_first_chunk::<HEAD>() else { continue };
                let &[a, b, c, d, e, f, g, h, i, j, k, l] = head;
                let stream = u32::from_be_bytes([a, b, c, d]);
                let number = u32::from_be_bytes([e, f, g, h]);
                let [index, count] = [[i, j], [k, l]].map(u16::from_be_bytes);
                let frame = frames.entry(stream).or_default();
                if index == 0 {
                    frame.bytes.clear();
                    (frame.number, frame.next) = (number, 0);
                }
                if (frame.number, frame.next) != (number, index) {
                    continue;
                }
                frame.bytes.extend_from_slice(slice);
                frame.next += 1;
                if frame.next == count {
                    let mut watching = watching.0.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(viewer) = watching.get_mut(&stream)
                        && viewer.write_all(&frame.bytes).is_err()
                    {
                        watching.remove(&stream);
                    }
                }
            }
        }
    }
}

/// A stream's frame of which more is to come.
#[derive(Default)]
struct Frame {
    number: u32,
    /// Index of the datagram that is next.
    next: u16,
    bytes: Vec<u8>,
}

/// Bytes in front of a datagram's slice: stream, frame, index and count.
const HEAD: usize = 12;
/// Bytes of a datagram, as large as Downpour's RTP packets.
const STRIDE: usize = 1132;
/// Addresses in a row that are one thread's, as Downpour's workers share theirs.
const SHARE: usize = 64;
const BUFFER: usize = 4 << 20;
