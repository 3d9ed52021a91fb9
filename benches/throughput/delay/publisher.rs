//! The encoders: they publish tags stamped with the time of the write.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fmt::Write as _,
    io::{self, Read, Write as _},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use downpour_media::flv::{Tag, TagKind};
use downpour_rtmp::session::{ClientEvent, ClientSession, Purpose};

use super::{
    System,
    clock::{now, sleep_until},
    stamp::{self, Stamp},
};

/// The streams to publish.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    pub streams: usize,
    /// Video frames per second and stream.
    pub frames: f64,
    /// Bytes of a frame's body.
    pub frame: usize,
    /// Bytes of a key frame's body. One frame in [`GOP`] is a key frame.
    pub key_frame: usize,
    /// Times of the first frame and of the end, in nanoseconds of the monotonic clock.
    pub begin: u64,
    pub end: u64,
}

impl Plan {
    pub fn arguments(&self) -> [String; 6] {
        [
            self.streams.to_string(),
            self.frames.to_string(),
            self.frame.to_string(),
            self.key_frame.to_string(),
            self.begin.to_string(),
            self.end.to_string(),
        ]
    }

    pub fn parse(arguments: &[&str]) -> Option<Self> {
        let &[streams, frames, frame, key_frame, begin, end] = arguments else { return None };
        Some(Self {
            streams: streams.parse().ok()?,
            frames: frames.parse().ok()?,
            frame: frame.parse().ok()?,
            key_frame: key_frame.parse().ok()?,
            begin: begin.parse().ok()?,
            end: end.parse().ok()?,
        })
    }
}

/// Publishes the streams of `plan`, and prints the numbers of video and audio tags per stream.
pub fn run(system: System, to: SocketAddr, run: &str, plan: &Plan) -> io::Result<()> {
    let mut encoders = (0..plan.streams)
        .map(|n| Encoder::connect(system, to, run, n))
        .collect::<io::Result<Vec<_>>>()?;
    let frame_time = 1e9 / plan.frames;
    let mut due = BinaryHeap::new();
    for stream in 0..plan.streams {
        // The phases of the encoders differ.
        let phase = plan.begin + (frame_time * stream as f64 / plan.streams as f64) as u64;
        due.push(Reverse((phase, stream, TagKind::Video as u8)));
        due.push(Reverse((phase + frame_time as u64 / 3, stream, TagKind::Audio as u8)));
    }
    while let Some(Reverse((at, stream, kind))) = due.pop() {
        if at >= plan.end {
            continue;
        }
        sleep_until(at);
        let encoder = &mut encoders[stream];
        let timestamp = ((at - plan.begin) / 1_000_000) as u32;
        let next = if kind == TagKind::Video as u8 {
            let key = encoder.video % GOP == 0;
            let len = if key { plan.key_frame } else { plan.frame };
            encoder.send(TagKind::Video, key, len, timestamp)?;
            at + frame_time as u64
        } else {
            encoder.send(TagKind::Audio, false, AUDIO_LEN, timestamp)?;
            at + (frame_time / AUDIO_PER_FRAME) as u64
        };
        due.push(Reverse((next, stream, kind)));
    }
    let mut counts = String::new();
    for encoder in &mut encoders {
        encoder.finish()?;
        let _ = writeln!(counts, "{} {}", encoder.video, encoder.audio);
    }
    // The last tags are delivered before the connections close.
    std::thread::sleep(Duration::from_millis(500));
    println!("{counts}done");
    io::stdout().flush()
}

/// The connection of one stream.
struct Encoder {
    socket: TcpStream,
    /// `None` without RTMP.
    session: Option<ClientSession>,
    video: u64,
    audio: u64,
}

impl Encoder {
    fn connect(system: System, to: SocketAddr, run: &str, number: usize) -> io::Result<Self> {
        let mut socket = TcpStream::connect(to)?;
        socket.set_nodelay(true)?;
        let session = match system {
            System::Floor => {
                socket.write_all(&(number as u32).to_be_bytes())?;
                None
            }
            System::Downpour => Some(publish(&mut socket, to, run, number)?),
        };
        let mut encoder = Self { socket, session, video: 0, audio: 0 };
        if let Some(session) = &mut encoder.session {
            for (kind, body) in [(TagKind::Video, VIDEO_HEADER), (TagKind::Audio, AUDIO_HEADER)] {
                let tag = Tag::new(kind, 0, body).map_err(io::Error::other)?;
                session.send(&tag).map_err(io::Error::other)?;
            }
            encoder.socket.write_all(&session.take_output())?;
        }
        Ok(encoder)
    }

    fn send(&mut self, kind: TagKind, key: bool, len: usize, timestamp: u32) -> io::Result<()> {
        let count = if kind == TagKind::Video { &mut self.video } else { &mut self.audio };
        let stamp = Stamp { number: *count, sent: now() };
        *count += 1;
        let body = stamp::body(kind, key, len, stamp);
        // The stamp is from before the write, so the delay includes the copy into the kernel.
        match &mut self.session {
            None => {
                let mut bytes = ((body.len() as u32).to_be_bytes()).to_vec();
                bytes.extend_from_slice(&body);
                self.socket.write_all(&bytes)
            }
            Some(session) => {
                let tag = Tag::new(kind, timestamp, &body).map_err(io::Error::other)?;
                session.send(&tag).map_err(io::Error::other)?;
                self.socket.write_all(&session.take_output())
            }
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        let Some(session) = &mut self.session else {
            return self.socket.shutdown(std::net::Shutdown::Write);
        };
        session.finish().map_err(io::Error::other)?;
        self.socket.write_all(&session.take_output())
    }
}

/// Performs the RTMP handshake and starts to publish.
fn publish(
    socket: &mut TcpStream,
    to: SocketAddr,
    run: &str,
    number: usize,
) -> io::Result<ClientSession> {
    let url = format!("rtmp://{to}/run{run}/s{number}").parse().map_err(io::Error::other)?;
    let mut session = ClientSession::new(url, Purpose::Publish, number as u64);
    let mut buffer = [0; 4096];
    loop {
        socket.write_all(&session.take_output())?;
        let count = socket.read(&mut buffer)?;
        if count == 0 {
            return Err(io::Error::other("the cloud closed a publisher's connection"));
        }
        let mut input = &buffer[..count];
        while let Some(event) = session.receive(&mut input).map_err(io::Error::other)? {
            if matches!(event, ClientEvent::Started) {
                socket.write_all(&session.take_output())?;
                return Ok(session);
            }
        }
    }
}

/// Frames per key frame.
pub const GOP: u64 = 50;
/// 43 AAC frames per 25 video frames.
pub const AUDIO_PER_FRAME: f64 = 43.0 / 25.0;
/// An AAC frame of 64 kbit/s.
const AUDIO_LEN: usize = 186;
const VIDEO_HEADER: &[u8] = &[0x17, 0, 0, 0, 0, 1, 0x64, 0, 0x1f, 0xff];
const AUDIO_HEADER: &[u8] = &[0xaf, 0, 0x12, 0x10];
