//! Viewers, as cheap as they come: a nap, and then what every socket has is thrown away and counted.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use socket2::{Domain, Socket, Type};

/// What is asked of the process that has the viewers; one at a time.
pub struct Sink(BufReader<TcpStream>);

/// Bytes that a viewer who reads all has got: the least, the most, and that of all of them; and what
/// those got who do not.
#[derive(Debug, Clone, Copy)]
pub struct Count {
    pub least: u64,
    pub most: u64,
    pub all: u64,
    pub slow: u64,
}

impl Sink {
    /// Once the process listens at `address`.
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(2 * PATIENCE))?;
        Ok(Self(BufReader::new(socket)))
    }

    /// Has `count` viewers come to `server`, of which the last `stalled` read nothing. Returns when
    /// each of the others has got something.
    pub fn join(&mut self, server: SocketAddr, count: usize, stalled: usize) -> io::Result<()> {
        self.ask(&format!("join {server} {count} {stalled}")).map(|_| ())
    }

    /// Has those who read nothing read so many bytes a second from now on.
    pub fn go_on(&mut self, speed: f64) -> io::Result<()> {
        self.ask(&format!("read {speed}")).map(|_| ())
    }

    /// Counts from now on.
    pub fn begin(&mut self) -> io::Result<()> {
        self.ask("begin").map(|_| ())
    }

    /// What came since.
    pub fn count(&mut self) -> io::Result<Count> {
        let answer = self.ask("count")?;
        let mut numbers = answer.split_whitespace().map(|word| word.parse().unwrap_or(0));
        let mut next = || numbers.next().unwrap_or(0);
        Ok(Count { least: next(), most: next(), all: next(), slow: next() })
    }

    /// Has all viewers go.
    pub fn leave(&mut self) -> io::Result<()> {
        self.ask("leave").map(|_| ())
    }

    fn ask(&mut self, what: &str) -> io::Result<String> {
        self.0.get_mut().write_all(format!("{what}\n").as_bytes())?;
        let mut answer = String::new();
        self.0.read_line(&mut answer)?;
        match answer.trim_end().strip_prefix("ok") {
            Some(rest) => Ok(rest.to_owned()),
            None => Err(io::Error::other(format!("the viewers, at {what}: {answer}"))),
        }
    }
}

/// Is the process, controlled at `address`.
pub fn run(address: SocketAddr) -> io::Result<()> {
    let (socket, _) = TcpListener::bind(address)?.accept()?;
    socket.set_read_timeout(Some(NAP))?;
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
    reads: Reads,
    bytes: u64,
}

#[derive(Debug, Clone, Copy)]
enum Reads {
    All,
    Nothing,
    /// `speed` bytes a second.
    Slowly {
        since: Instant,
        speed: f64,
        read: f64,
    },
}

impl Viewer {
    fn come(server: SocketAddr, reads: Reads) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        // Who goes resets the connection, so that no port is left waiting.
        socket.set_linger(Some(Duration::ZERO))?;
        if matches!(reads, Reads::Nothing) {
            // So that what the kernel holds for it is full within seconds: how much the other end
            // buffers grows with the segment's size, which is 64 KB on loopback.
            socket.set_recv_buffer_size(4096)?;
            socket.set_tcp_mss(536)?;
        }
        socket.connect(&server.into())?;
        (&socket).write_all(b"GET /live/movie.flv HTTP/1.1\r\nHost: edge\r\n\r\n")?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, reads, bytes: 0 })
    }

    fn reads_all(&self) -> bool {
        matches!(self.reads, Reads::All)
    }

    /// Bytes that it reads now.
    fn room(&self) -> usize {
        match self.reads {
            Reads::All => AT_ONCE,
            Reads::Nothing => 0,
            Reads::Slowly { since, speed, read } => {
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
                let reads = if stalls { Reads::Nothing } else { Reads::All };
                viewers.push(Viewer::come(server, reads)?);
                // What comes faster than it is accepted is tried again only after a second.
                if viewers.len().is_multiple_of(CROWD) {
                    std::thread::sleep(Duration::from_millis(5));
                    drain(viewers)?;
                }
            }
            let began = Instant::now();
            while viewers.iter().any(|viewer| viewer.bytes == 0 && viewer.reads_all()) {
                if began.elapsed() > PATIENCE {
                    return Err(io::Error::other("some viewers get nothing"));
                }
                std::thread::sleep(NAP);
                drain(viewers)?;
            }
        }
        ["read", speed] => {
            let (since, speed) = (Instant::now(), speed.parse().map_err(io::Error::other)?);
            for viewer in viewers.iter_mut().filter(|viewer| !viewer.reads_all()) {
                viewer.reads = Reads::Slowly { since, speed, read: 0.0 };
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
        _ => return Err(io::Error::other("what?")),
    }
    Ok(String::new())
}

fn drain(viewers: &mut [Viewer]) -> io::Result<()> {
    for viewer in viewers {
        let room = viewer.room();
        if room == 0 {
            continue;
        }
        let flags = libc::MSG_TRUNC | libc::MSG_DONTWAIT;
        // SAFETY: with MSG_TRUNC, TCP throws the bytes away and writes to no buffer (tcp(7)).
        let read =
            unsafe { libc::recv(viewer.socket.as_raw_fd(), std::ptr::null_mut(), room, flags) };
        match read {
            0 => return Err(io::Error::other("a viewer was closed")),
            1.. => {
                viewer.bytes += read as u64;
                if let Reads::Slowly { read: total, .. } = &mut viewer.reads {
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

/// Viewers that come at once.
const CROWD: usize = 64;
const NAP: Duration = Duration::from_millis(100);
const AT_ONCE: usize = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(20);
