//! The viewers, with little overhead: the process sleeps, then counts and discards the queued bytes
//! of every socket.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

/// The control connection to the process of the viewers.
pub struct Sink(BufReader<TcpStream>);

/// Received bytes.
#[derive(Debug, Clone, Copy)]
pub struct Count {
    /// Minimum per viewer that reads everything.
    pub least: u64,
    /// Maximum per viewer that reads everything.
    pub most: u64,
    /// Sum over the viewers that read everything.
    pub all: u64,
    /// Sum over the slow and stalled viewers.
    pub slow: u64,
}

impl Sink {
    /// Connects to the process, which must listen at `address`.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(2 * PATIENCE))?;
        Ok(Self(BufReader::new(socket)))
    }

    /// Connects `count` viewers to `server`, of which the last `stalled` read nothing. Returns when
    /// each of the others has received data.
    pub fn join(&mut self, server: SocketAddr, count: usize, stalled: usize) -> io::Result<()> {
        self.request(&format!("join {server} {count} {stalled}")).map(|_| ())
    }

    /// Lets the stalled viewers read at `speed` bytes per second.
    pub fn read_slowly(&mut self, speed: f64) -> io::Result<()> {
        self.request(&format!("read {speed}")).map(|_| ())
    }

    /// Resets the counters.
    pub fn begin(&mut self) -> io::Result<()> {
        self.request("begin").map(|_| ())
    }

    /// Returns the bytes received since [`Sink::begin`].
    pub fn count(&mut self) -> io::Result<Count> {
        let answer = self.request("count")?;
        let mut numbers = answer.split_whitespace().map(|word| word.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Ok(Count { least: next(), most: next(), all: next(), slow: next() })
    }

    /// Disconnects all viewers.
    pub fn leave(&mut self) -> io::Result<()> {
        self.request("leave").map(|_| ())
    }

    fn request(&mut self, command: &str) -> io::Result<String> {
        self.0.get_mut().write_all(format!("{command}\n").as_bytes())?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        match answer.trim_end().strip_prefix("ok") {
            Some(rest) => Ok(rest.to_owned()),
            None => Err(io::Error::other(format!("viewers: command {command} failed: {answer}"))),
        }
    }
}

/// Runs the process of the viewers. Its control connection is accepted at `address`.
pub fn run(address: SocketAddr) -> io::Result<()> {
    let (socket, _) = TcpListener::bind(address)?.accept()?;
    socket.set_read_timeout(Some(POLL))?;
    let mut control = BufReader::new(socket);
    let mut viewers = Vec::new();
    let mut line = String::new();
    loop {
        match control.read_line(&mut line) {
            Ok(0) => return Ok(()),
            Ok(_) => {
                drain(&mut viewers)?;
                let answer = match answer(&line, &mut viewers) {
                    Ok(answer) => format!("ok {answer}\n"),
                    Err(error) => format!("{error}\n"),
                };
                control.get_mut().write_all(answer.as_bytes())?;
                line.clear();
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => drain(&mut viewers)?,
            Err(error) => return Err(error),
        }
    }
}

struct Viewer {
    socket: Socket,
    speed: Speed,
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
enum Speed {
    /// Reads everything that is queued.
    Full,
    /// Reads nothing.
    Stalled,
    /// Reads `speed` bytes per second.
    Slow { since: Instant, speed: f64, read: f64 },
}

impl Viewer {
    fn connect(server: SocketAddr, speed: Speed) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // Closing resets the connection, so that no port stays in TIME_WAIT.
        socket.set_linger(Some(Duration::ZERO))?;
        if matches!(speed, Speed::Stalled) {
            // Small buffers, which fill within seconds. The sender's buffer grows with the segment
            // size, which is 64 KB on loopback.
            socket.set_recv_buffer_size(4096)?;
            socket.set_tcp_mss(536)?;
        }
        socket.connect(&server.into())?;
        (&socket).write_all(b"GET /live/movie.flv HTTP/1.1\r\nHost: edge\r\n\r\n")?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, speed, bytes: 0 })
    }

    fn reads_all(&self) -> bool {
        matches!(self.speed, Speed::Full)
    }

    /// Maximum number of bytes to read now.
    fn read_limit(&self) -> usize {
        match self.speed {
            Speed::Full => MAX_READ,
            Speed::Stalled => 0,
            Speed::Slow { since, speed, read } => {
                (since.elapsed().as_secs_f64() * speed - read) as usize
            }
        }
    }
}

fn answer(line: &str, viewers: &mut Vec<Viewer>) -> io::Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["join", server, count, stalled] => {
            let number = |word: &str| word.parse::<usize>().map_err(io::Error::other);
            let (count, stalled) = (number(count)?, number(stalled)?);
            let server = server.parse().map_err(io::Error::other)?;
            for index in 0..count {
                let stalls = index + stalled >= count;
                let speed = if stalls { Speed::Stalled } else { Speed::Full };
                viewers.push(Viewer::connect(server, speed)?);
                // If connections arrive faster than the server accepts them, the kernel retries only
                // after a second.
                if viewers.len().is_multiple_of(CONNECT_BATCH) {
                    std::thread::sleep(Duration::from_millis(5));
                    drain(viewers)?;
                }
            }
            let began = Instant::now();
            while viewers.iter().any(|viewer| viewer.bytes == 0 && viewer.reads_all()) {
                if began.elapsed() > PATIENCE {
                    return Err(io::Error::other("some viewers receive nothing"));
                }
                std::thread::sleep(POLL);
                drain(viewers)?;
            }
        }
        ["read", speed] => {
            let (since, speed) = (Instant::now(), speed.parse().map_err(io::Error::other)?);
            for viewer in viewers.iter_mut().filter(|viewer| !viewer.reads_all()) {
                viewer.speed = Speed::Slow { since, speed, read: 0.0 };
            }
        }
        ["begin"] => viewers.iter_mut().for_each(|viewer| viewer.bytes = 0),
        ["count"] => {
            let counts = || viewers.iter().filter(|viewer| viewer.reads_all()).map(|v| v.bytes);
            let slow: u64 = viewers.iter().filter(|v| !v.reads_all()).map(|v| v.bytes).sum();
            let (least, most) = (counts().min().unwrap_or(0), counts().max().unwrap_or(0));
            return Ok(format!("{least} {most} {} {slow}", counts().sum::<u64>()));
        }
        ["leave"] => viewers.clear(),
        _ => return Err(io::Error::other("unknown command")),
    }
    Ok(String::new())
}

fn drain(viewers: &mut [Viewer]) -> io::Result<()> {
    for viewer in viewers {
        let limit = viewer.read_limit();
        if limit == 0 {
            continue;
        }
        let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
        // SAFETY: with MSG_TRUNC, TCP discards the bytes and does not write to the buffer (tcp(7)).
        let read =
            unsafe { libc::recv(viewer.socket.as_raw_fd(), std::ptr::null_mut(), limit, flags) };
        match read {
            0 => return Err(io::Error::other("a viewer was closed")),
            1.. => {
                viewer.bytes += read as u64;
                if let Speed::Slow { read: total, .. } = &mut viewer.speed {
                    *total += read as f64;
                }
            }
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Viewers that connect without a pause.
const CONNECT_BATCH: usize = 64;
const POLL: Duration = Duration::from_millis(100);
const MAX_READ: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
