//! The floor: a minimal relay. One thread per encoder reads whole frames and sends them over UDP to
//! each edge; one thread receives them at one of the edges and writes them to the viewers. If there
//! are many edges, there is one sending thread per processor, each with a part of the edges. No
//! RTMP, RTP or repair.

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

/// Accepts encoders and viewers, which first send the number of their stream. Runs until it is killed.
/// `list` is a file of the edges' addresses, of which `edge` is received here.
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
    let viewer_sockets = Arc::<Viewers>::default();
    let publishers = listen(publishers)?;
    let viewers = listen(viewers)?;
    let shared = viewer_sockets.clone();
    thread::spawn(move || receive(&received, &shared));
    let shared = viewer_sockets.clone();
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
        let (mut socket, senders) = (socket?, senders.clone());
        let viewer_sockets = viewer_sockets.clone();
        thread::Builder::new().stack_size(128 << 10).spawn(move || -> io::Result<()> {
            let stream = stream_number(&mut socket)?;
            senders.relay(Frames::of(&mut socket, stream))?;
            // The last datagrams arrive before the viewer is closed.
            thread::sleep(std::time::Duration::from_millis(200));
            viewer_sockets.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&stream);
            Ok(())
        })?;
    }
    Ok(())
}

/// Listens with a backlog for all encoders at once.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(4096)?;
    Ok(socket.into())
}

/// The viewer of each stream.
#[derive(Default)]
struct Viewers(Mutex<HashMap<u32, TcpStream>>);

fn stream_number(socket: &mut TcpStream) -> io::Result<u32> {
    let mut number = [0; 4];
    socket.read_exact(&mut number)?;
    Ok(u32::from_be_bytes(number))
}

/// The threads that send to the edges.
enum Senders {
    /// The encoder's thread sends to this list.
    Encoder(Vec<SocketAddrV4>),
    /// Separate threads, which get each frame.
    Threads(Vec<mpsc::Sender<Arc<[u8]>>>),
}

impl Senders {
    fn new(list: Vec<SocketAddrV4>) -> io::Result<Self> {
        let count = thread::available_parallelism()?.get().min(list.len() / SHARE);
        if count < 2 {
            return Ok(Self::Encoder(list));
        }
        let threads = (0..count).map(|first| {
            let chunks = list.chunks(SHARE).skip(first).step_by(count);
            let mut bare = Bare::new(&chunks.flatten().copied().collect::<Vec<_>>())?;
            let (sender, frames) = mpsc::channel::<Arc<[u8]>>();
            let run = move || bare.send_frames(frames.into_iter().map(Ok), STRIDE as u16);
            thread::Builder::new().name(format!("floor-{first}")).spawn(run)?;
            Ok(sender)
        });
        Ok(Self::Threads(threads.collect::<io::Result<_>>()?))
    }

    /// Sends each frame as soon as it is complete.
    fn relay(&self, frames: Frames<'_>) -> io::Result<()> {
        match self {
            Self::Encoder(list) => Bare::new(list)?.send_frames(frames, STRIDE as u16),
            Self::Threads(threads) => {
                for frame in frames {
                    let frame = Arc::<[u8]>::from(frame?);
                    for thread in threads {
                        let sent = thread.send(frame.clone());
                        sent.map_err(|_| io::Error::other("a sending thread has failed"))?;
                    }
                }
                Ok(())
            }
        }
    }
}

/// Iterator over an encoder's frames, each as consecutive datagrams.
struct Frames<'a> {
    socket: &'a mut TcpStream,
    stream: u32,
    /// Number of the next frame.
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
                    let frame = datagrams(self.stream, self.number, &self.held[..whole]);
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

/// Splits a frame into datagrams.
fn datagrams(stream: u32, number: u32, frame: &[u8]) -> Vec<u8> {
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

/// Writes each complete frame to its stream's viewer. It skips frames with a lost datagram: the kernel
/// drops datagrams when more than `net.core.netdev_max_backlog` are queued.
fn receive(socket: &UdpSocket, viewers: &Viewers) -> io::Result<()> {
    let state = UdpSocketState::new(UdpSockRef::from(socket))?;
    socket.set_nonblocking(false)?;
    let size = (state.gro_segments() * 1500).min(usize::from(u16::MAX));
    let mut bytes = vec![0; size];
    // One message per call: a blocking socket would wait for several.
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
                    let mut viewers = viewers.0.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(viewer) = viewers.get_mut(&stream)
                        && viewer.write_all(&frame.bytes).is_err()
                    {
                        viewers.remove(&stream);
                    }
                }
            }
        }
    }
}

/// An incomplete frame of a stream.
#[derive(Default)]
struct Frame {
    number: u32,
    /// Index of the next datagram.
    next: u16,
    bytes: Vec<u8>,
}

/// Length of a datagram's header: stream, frame, index and count.
const HEAD: usize = 12;
/// Length of a datagram, the same as of Downpour's RTP packets.
const STRIDE: usize = 1132;
/// Consecutive addresses per thread, as in Downpour's fan-out.
const SHARE: usize = 64;
const BUFFER: usize = 4 << 20;
