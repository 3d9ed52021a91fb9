//! Many encoders in one process with little overhead.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use downpour_rtmp::session::{ClientEvent, ClientSession, Purpose};

use super::media::{Media, Timeline};

/// Publishes `count` streams at `server` in real time, one write per tag, until it is killed. Once per
/// second it prints the number of tags sent and the maximum lateness in microseconds.
pub fn run(server: SocketAddr, count: usize) -> io::Result<()> {
    let media = Media::new()?;
    let chunks = media.chunks()?;
    let began = Instant::now();
    let mut sockets = connect_all(server, count)?;
    for socket in &mut sockets {
        socket.write_all(&chunks.headers)?;
    }
    println!("connected in {} ms", began.elapsed().as_millis());
    let mut timeline = Timeline::new(&media, count);
    let start = Instant::now();
    let mut report = start + REPORT;
    let (mut sent, mut latest) = (0u64, Duration::ZERO);
    loop {
        let due = timeline.next();
        let mut now = Instant::now();
        while let Some(early) = (start + due.at).checked_duration_since(now) {
            std::thread::sleep(early);
            now = Instant::now();
        }
        latest = latest.max(now.saturating_duration_since(start + due.at));
        let group = if due.group == 0 { &chunks.first } else { &chunks.later };
        sockets[due.stream].write_all(&group[due.tag])?;
        sent += 1;
        if now >= report {
            println!("{sent} {}", latest.as_micros());
            (report, latest) = (now + REPORT, Duration::ZERO);
        }
    }
}

/// Connects all at once, as encoders do after an outage of their network.
fn connect_all(server: SocketAddr, count: usize) -> io::Result<Vec<TcpStream>> {
    let connecting: io::Result<Vec<_>> = (0..count)
        .map(|number| {
            let thread = std::thread::Builder::new().stack_size(STACK);
            thread.spawn(move || {
                connect(server, number).map_err(|error| {
                    io::Error::new(error.kind(), format!("stream {number}: {error}"))
                })
            })
        })
        .collect();
    let connected = connecting?.into_iter().map(|thread| {
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a connecting thread panicked")))
    });
    connected.collect()
}

/// Connects and publishes. Returns once the server has accepted.
fn connect(server: SocketAddr, number: usize) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect(server)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let url = format!("rtmp://{server}/live/{number}").parse().map_err(io::Error::other)?;
    let mut session = ClientSession::new(url, Purpose::Publish, number as u64);
    let mut buffer = [0; 8192];
    loop {
        socket.write_all(&session.take_output())?;
        let len = socket.read(&mut buffer)?;
        let mut input = &buffer[..len];
        if input.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while let Some(event) = session.receive(&mut input).map_err(io::Error::other)? {
            if matches!(event, ClientEvent::Started) {
                socket.write_all(&session.take_output())?;
                return Ok(socket);
            }
        }
    }
}

const STACK: usize = 128 << 10;
const PATIENCE: Duration = Duration::from_secs(20);
const REPORT: Duration = Duration::from_secs(1);
