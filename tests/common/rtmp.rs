//! RTMP peers that can violate the protocol.
//!
//! Source: *Adobe's Real Time Messaging Protocol* 1.0, §5.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// A connection that sends arbitrary bytes.
pub struct Peer {
    socket: TcpStream,
}

impl Peer {
    /// Connects without sending anything.
    pub fn connect(addr: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect_timeout(&addr, TIMEOUT)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        socket.set_write_timeout(Some(TIMEOUT))?;
        socket.set_nodelay(true)?;
        Ok(Self { socket })
    }

    /// Connects and completes the handshake (§5.2).
    pub fn handshaken(addr: SocketAddr) -> io::Result<Self> {
        let mut peer = Self::connect(addr)?;
        peer.send(&client_hello())?;
        let mut answer = vec![0; 1 + 2 * HANDSHAKE_LEN];
        peer.socket.read_exact(&mut answer)?;
        // C2 echoes S1.
        peer.send(&answer[1..=HANDSHAKE_LEN])?;
        Ok(peer)
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.write_all(bytes)
    }

    /// Sends a message in chunks of `chunk_size`; the length in its header is the body's.
    pub fn message(
        &mut self,
        kind: u8,
        stream: u32,
        body: &[u8],
        chunk_size: usize,
    ) -> io::Result<()> {
        self.send(&message(kind, stream, body, chunk_size))
    }

    /// Sends `connect`, `createStream` and `publish` without reading the answers, as a pipelining
    /// encoder does.
    pub fn publish(&mut self, app: &str, name: &str, chunk_size: usize) -> io::Result<()> {
        let mut connect = string("connect");
        connect.extend(number(1.0));
        connect.push(OBJECT);
        for (key, value) in [("app", app), ("type", "nonprivate"), ("tcUrl", "rtmp://127.0.0.1/")] {
            connect.extend(property(key));
            connect.extend(string(value));
        }
        connect.extend(OBJECT_END);
        self.message(COMMAND, 0, &connect, chunk_size)?;
        let create = [string("createStream"), number(2.0), vec![NULL]].concat();
        self.message(COMMAND, 0, &create, chunk_size)?;
        let publish =
            [string("publish"), number(3.0), vec![NULL], string(name), string("live")].concat();
        self.message(COMMAND, 1, &publish, chunk_size)
    }

    /// Reads until an answer contains `text`, such as a status code.
    pub fn until_answer(&mut self, text: &str) -> io::Result<()> {
        let mut seen = Vec::new();
        let mut buffer = [0; 4096];
        while !seen.windows(text.len()).any(|window| window == text.as_bytes()) {
            match self.socket.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => seen.extend_from_slice(&buffer[..count]),
            }
        }
        Ok(())
    }

    /// Reads until the node closes the connection; an error if it stays open for `deadline`.
    pub fn until_closed(&mut self, deadline: Duration) -> io::Result<()> {
        self.socket.set_read_timeout(Some(deadline))?;
        let mut buffer = [0; 4096];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }
}

/// C0 and C1 of the simple handshake, all 1537 bytes.
pub fn client_hello() -> Vec<u8> {
    let mut hello = vec![3];
    hello.extend([0; 8]);
    hello.extend((0..HANDSHAKE_LEN - 8).map(|at| at as u8));
    hello
}

/// A whole message in chunks of `chunk_size` on chunk stream 3 (§5.3.1).
pub fn message(kind: u8, stream: u32, body: &[u8], chunk_size: usize) -> Vec<u8> {
    let mut bytes = header(3, kind, stream, body.len() as u32).to_vec();
    for (at, chunk) in body.chunks(chunk_size).enumerate() {
        if at > 0 {
            bytes.push(0xc3);
        }
        bytes.extend_from_slice(chunk);
    }
    bytes
}

/// A type-0 chunk header with timestamp 0 that claims a body of `len` bytes (§5.3.1.2.1).
pub fn header(chunk_stream: u8, kind: u8, stream: u32, len: u32) -> [u8; 12] {
    assert!((2..64).contains(&chunk_stream));
    let [_, l0, l1, l2] = len.to_be_bytes();
    let [s0, s1, s2, s3] = stream.to_le_bytes();
    [chunk_stream, 0, 0, 0, l0, l1, l2, kind, s0, s1, s2, s3]
}

/// AMF0 string (§2.4 of AMF0).
pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = vec![2];
    bytes.extend(property(text));
    bytes
}

/// AMF0 number.
pub fn number(value: f64) -> Vec<u8> {
    let mut bytes = vec![0];
    bytes.extend(value.to_be_bytes());
    bytes
}

/// `depth` nested objects without ends, each the only property of its parent.
pub fn nested_objects(depth: usize) -> Vec<u8> {
    [&[OBJECT][..], &property("a")].concat().repeat(depth)
}

/// `depth` nested strict arrays of one item.
pub fn nested_arrays(depth: usize) -> Vec<u8> {
    [10, 0, 0, 0, 1].repeat(depth)
}

fn property(key: &str) -> Vec<u8> {
    let mut bytes = (key.len() as u16).to_be_bytes().to_vec();
    bytes.extend(key.as_bytes());
    bytes
}

/// Set Chunk Size (§5.4.1).
pub const SET_CHUNK_SIZE: u8 = 1;
/// Window Acknowledgement Size (§5.4.4).
pub const WINDOW_SIZE: u8 = 5;
/// Video Message (§7.1.5).
pub const VIDEO: u8 = 9;
/// Data Message in AMF0 (§7.1.2).
pub const DATA: u8 = 18;
/// Command Message in AMF0 (§7.1.1).
pub const COMMAND: u8 = 20;
/// Length of C1, S1, C2 and S2 each.
pub const HANDSHAKE_LEN: usize = 1536;

const OBJECT: u8 = 3;
const NULL: u8 = 5;
const OBJECT_END: [u8; 3] = [0, 0, 9];
const TIMEOUT: Duration = Duration::from_secs(20);
