//! The viewers: they record when they have read the last byte of each tag.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use downpour_media::flv::{FlvReader, TagKind};

use super::{System, clock::now, stamp};

/// The tags that one viewer received.
#[derive(Debug, Default)]
pub struct Received {
    pub stream: usize,
    pub video: Numbers,
    pub audio: Numbers,
    /// Delays in microseconds of the tags sent from `begin` on.
    pub video_delays: Vec<f64>,
    pub audio_delays: Vec<f64>,
}

/// The first and the last tag number, and the number of tags.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    pub first: u64,
    pub last: u64,
    pub count: u64,
}

impl Numbers {
    fn add(&mut self, number: u64) {
        if self.count == 0 {
            self.first = number;
        }
        self.last = number;
        self.count += 1;
    }
}

/// Plays the streams to their end. Prints three lines per stream: the numbers, the delays of video
/// and the delays of audio.
pub fn run(
    system: System,
    from: SocketAddr,
    run: &str,
    begin: u64,
    streams: &[usize],
) -> io::Result<()> {
    let viewers: Vec<_> = streams
        .iter()
        .map(|stream| {
            let (stream, run) = (*stream, run.to_owned());
            thread::spawn(move || watch(system, from, &run, begin, stream))
        })
        .collect();
    let mut out = io::BufWriter::new(io::stdout().lock());
    for viewer in viewers {
        let received = viewer.join().map_err(|_| io::Error::other("a viewer panicked"))??;
        let Numbers { first, last, count } = received.video;
        let audio = received.audio;
        writeln!(
            out,
            "{} {first} {last} {count} {} {} {}",
            received.stream, audio.first, audio.last, audio.count
        )?;
        for delays in [&received.video_delays, &received.audio_delays] {
            let delays: Vec<_> = delays.iter().map(|delay| format!("{delay:.1}")).collect();
            writeln!(out, "{}", delays.join(" "))?;
        }
    }
    writeln!(out, "done")?;
    out.flush()
}

/// Parses the output of [`run`]; `None` until it is complete.
pub fn parse(text: &str) -> Option<Vec<Received>> {
    let mut lines = text.strip_suffix("done\n")?.lines();
    let mut all = Vec::new();
    while let Some(line) = lines.next() {
        let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().ok()).collect::<Option<_>>()?;
        let &[stream, first, last, count, audio_first, audio_last, audio_count] = &numbers[..]
        else {
            return None;
        };
        let mut delays = || {
            let words = lines.next()?.split_whitespace();
            words.map(|word| word.parse().ok()).collect::<Option<Vec<f64>>>()
        };
        all.push(Received {
            stream: stream as usize,
            video: Numbers { first, last, count },
            audio: Numbers { first: audio_first, last: audio_last, count: audio_count },
            video_delays: delays()?,
            audio_delays: delays()?,
        });
    }
    Some(all)
}

fn watch(
    system: System,
    from: SocketAddr,
    run: &str,
    begin: u64,
    stream: usize,
) -> io::Result<Received> {
    let mut socket = join(system, from, run, stream)?;
    let mut received = Received { stream, ..Received::default() };
    let mut record = |body: &[u8], at: u64| {
        let Some((kind, stamp)) = stamp::read(body) else { return };
        let (numbers, delays) = match kind {
            TagKind::Video => (&mut received.video, &mut received.video_delays),
            _ => (&mut received.audio, &mut received.audio_delays),
        };
        numbers.add(stamp.number);
        if stamp.sent >= begin {
            delays.push(at.saturating_sub(stamp.sent) as f64 / 1000.0);
        }
    };
    let mut buffer = vec![0; 256 << 10];
    match system {
        System::Downpour => {
            let mut reader = FlvReader::new();
            loop {
                let count = socket.read(&mut buffer)?;
                let at = now();
                if count == 0 {
                    break;
                }
                reader.push(&buffer[..count]);
                while let Some(tag) = reader.next_tag().map_err(io::Error::other)? {
                    record(tag.body(), at);
                }
            }
        }
        System::Floor => {
            let mut held = Vec::new();
            loop {
                let count = socket.read(&mut buffer)?;
                let at = now();
                if count == 0 {
                    break;
                }
                held.extend_from_slice(&buffer[..count]);
                let used = read_frames(&held, |body| record(body, at));
                held.drain(..used);
            }
        }
    }
    Ok(received)
}

/// Calls `record` with the body of each whole frame, which follows its length in four bytes. Returns the
/// number of bytes read.
fn read_frames(bytes: &[u8], mut record: impl FnMut(&[u8])) -> usize {
    let mut rest = bytes;
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = u32::from_be_bytes(*length) as usize;
        let Some((body, tail)) = tail.split_at_checked(length) else { break };
        record(body);
        rest = tail;
    }
    bytes.len() - rest.len()
}

/// Requests the stream until it is live.
fn join(system: System, from: SocketAddr, run: &str, stream: usize) -> io::Result<TcpStream> {
    let until = Instant::now() + JOIN;
    loop {
        let attempt = || -> io::Result<TcpStream> {
            let mut socket = TcpStream::connect(from)?;
            if system == System::Floor {
                socket.write_all(&(stream as u32).to_be_bytes())?;
                return Ok(socket);
            }
            write!(socket, "GET /run{run}/s{stream}.flv HTTP/1.1\r\nHost: {from}\r\n\r\n")?;
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") {
                if socket.read(&mut byte)? == 0 || head.len() > 4096 {
                    return Err(io::Error::other("no response"));
                }
                head.push(byte[0]);
            }
            match head.starts_with(b"HTTP/1.1 200") {
                true => Ok(socket),
                false => Err(io::Error::other(String::from_utf8_lossy(&head).into_owned())),
            }
        };
        match attempt() {
            Ok(socket) => return Ok(socket),
            Err(error) if Instant::now() > until => {
                return Err(io::Error::other(format!("stream {stream}: {error}")));
            }
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}

const JOIN: Duration = Duration::from_secs(30);
