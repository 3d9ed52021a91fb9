//! The least that an edge could do: read, many datagrams a call, and count.

use std::{
    io::{self, IoSliceMut, Write},
    net::{SocketAddr, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use downpour::udp;
use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSockRef, UdpSocketState};

/// Reads at `address` until it is asked how many datagrams there were, and prints that.
pub fn run(address: SocketAddr) -> io::Result<()> {
    let socket = udp::receiver(address, None, BUFFER)?;
    let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
    // It has nothing else to wait for.
    socket.set_nonblocking(false)?;
    let size = (state.gro_segments() * 1500).min(usize::from(u16::MAX));
    let mut bytes = vec![0; size * BATCH_SIZE];
    let mut meta = [RecvMeta::default(); BATCH_SIZE];
    let mut count = 0u64;
    loop {
        let mut chunks = bytes.chunks_exact_mut(size);
        let mut slices: [_; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(chunks.next().unwrap_or_default()));
        let reads = state.recv(UdpSockRef::from(&socket), &mut slices, &mut meta)?;
        for (read, bytes) in meta[..reads].iter().zip(bytes.chunks_exact(size)) {
            if &bytes[..read.len] == QUESTION {
                println!("{count}");
                return io::stdout().flush();
            }
            count += read.len.div_ceil(read.stride.max(1)) as u64;
        }
    }
}

/// Asks the floor at `address`, which writes to `log`, how many datagrams it read. It ends then.
pub fn ask_count(address: SocketAddr, log: &Path) -> io::Result<u64> {
    let socket = UdpSocket::bind((address.ip(), 0))?;
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        // Refused once the floor has ended.
        let _ = socket.send_to(QUESTION, address);
        std::thread::sleep(Duration::from_millis(100));
        if let Some(count) =
            std::fs::read_to_string(log)?.lines().last().and_then(|line| line.parse().ok())
        {
            return Ok(count);
        }
    }
    Err(io::Error::other("the floor does not answer"))
}

const QUESTION: &[u8] = b"how many";
const BUFFER: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(5);
