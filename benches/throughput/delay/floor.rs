//! The least that could be done: a thread for each encoder sends what it reads on over UDP, to all
//! edges in turn, and a thread reads that and writes it to the viewers. No RTMP, no RTP, no repair.

use std::{
    collections::HashMap,
    io::{self, IoSliceMut, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use downpour::udp::{self, Port};
use quinn_udp::{RecvMeta, Transmit, UdpSockRef, UdpSocketState};
use socket2::{Domain, Socket, Type};

/// Takes encoders and viewers, who say their stream's number first, until it is ended. `list` names a
/// file of the addresses to send to, of which `edge` is the one that is read here.
pub fn run(
    publishers: SocketAddr,
    viewers: SocketAddr,
    edge: SocketAddr,
    list: &Path,
) -> io::Result<()> {
    let list: Vec<SocketAddr> = std::fs::read_to_string(list)?
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
    let list = Arc::new(list);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    let sender = udp::sender(any, Port::Own, BUFFER, Default::default())?;
    let sender = Arc::new((UdpSocketState::new(UdpSockRef::from(&sender))?, sender));
    for socket in publishers.incoming() {
        let (mut socket, list, sender) = (socket?, list.clone(), sender.clone());
        let watching = watching.clone();
        thread::Builder::new().stack_size(128 << 10).spawn(move || -> io::Result<()> {
            let stream = stream_number(&mut socket)?;
            relay(&mut socket, stream, &list, &sender)?;
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

/// Sends each frame once it is whole.
fn relay(
    socket: &mut TcpStream,
    stream: u32,
    list: &[SocketAddr],
    (state, sender): &(UdpSocketState, UdpSocket),
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut held = Vec::new();
    let mut datagrams = Vec::new();
    let mut frame = 0u32;
    loop {
        let count = socket.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        held.extend_from_slice(&buffer[..count]);
        while let Some(length) = held.first_chunk::<4>() {
            let whole = 4 + u32::from_be_bytes(*length) as usize;
            if held.len() < whole {
                break;
            }
            datagrams.clear();
            let slices = held[..whole].chunks(STRIDE - HEAD);
            let count = slices.len() as u16;
            for (index, slice) in (0u16..).zip(slices) {
                datagrams.extend_from_slice(&stream.to_be_bytes());
                datagrams.extend_from_slice(&frame.to_be_bytes());
                datagrams.extend_from_slice(&index.to_be_bytes());
                datagrams.extend_from_slice(&count.to_be_bytes());
                datagrams.extend_from_slice(slice);
            }
            frame += 1;
            held.drain(..whole);
            for destination in list {
                for burst in datagrams.chunks(STRIDE * SEGMENTS.min(state.max_gso_segments())) {
                    let transmit = Transmit {
                        destination: *destination,
                        ecn: None,
                        contents: burst,
                        segment_size: (burst.len() > STRIDE).then_some(STRIDE),
                        src_ip: None,
                    };
                    // It waits for room as a blocking socket would.
                    while let Err(error) = state.try_send(UdpSockRef::from(sender), &transmit) {
                        if error.kind() != io::ErrorKind::WouldBlock {
                            return Err(error);
                        }
                        thread::yield_now();
                    }
                }
            }
        }
    }
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
/// Datagrams of one send: 64 KiB at most.
const SEGMENTS: usize = 54;
const BUFFER: usize = 4 << 20;
