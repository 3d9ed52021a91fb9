//! Publishes streams in real time and sends them as a cloud's fan-out does.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use downpour_distribution::downstream::outgoing::{OutgoingStream, OutgoingStreams};
use downpour_media::flv::{Headers, Tag, TagKind};
use downpour_repair::{
    history::History,
    rtp::{Burst, Packetizer, Ssrc},
};
use downpour_sys::udp::{self, MulticastOut, Port};
use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};
use rand::{Rng, SeedableRng, rngs::SmallRng};

/// Sends until it is stopped.
pub struct Source {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    loss: AtomicU8,
    /// A [`Target`].
    turn: AtomicU8,
    sent: [AtomicU64; 2],
}

/// The receiver whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    Edge = 0,
    Floor = 1,
}

impl Source {
    /// Publishes `count` streams at `origin`, and sends them to the edge or to the floor, whose
    /// addresses are `targets`. During the floor's turn, the publications at `origin` pause.
    pub fn start(
        count: u32,
        origin: &OutgoingStreams,
        targets: [SocketAddr; 2],
    ) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let mut sender = Sender::new(shared.clone(), targets)?;
        let tags = Tags::new()?;
        let mut start = Instant::now();
        let mut streams = Vec::new();
        let mut due = BinaryHeap::new();
        let mut phases = SmallRng::seed_from_u64(SEED);
        for number in 0..count {
            let history = History::new(5000, Duration::from_secs(10));
            let key = format!("live/{number}").parse().map_err(io::Error::other)?;
            let stream = Arc::new(OutgoingStream::new(key, Ssrc(number + 1), 0, history));
            stream.set_headers(tags.headers.clone());
            origin.insert(stream.clone());
            let packetizer = || Packetizer::new(Ssrc(number + 1), PAYLOAD);
            streams.push((stream, [packetizer(), packetizer()]));
            // The phases of the encoders differ.
            let phase = GOP.mul_f64(phases.random());
            due.push(Reverse((phase, number, Kind::Video, 0)));
            due.push(Reverse((phase, number, Kind::Audio, 0)));
        }
        let state = shared.clone();
        let thread = std::thread::Builder::new().name("source".into()).spawn(move || {
            while let Some(Reverse((at, number, kind, frame))) = due.pop() {
                if state.stop.load(Ordering::Relaxed) {
                    break;
                }
                let now = Instant::now();
                std::thread::sleep((start + at).saturating_duration_since(now));
                // After a stall of the machine, the schedule shifts instead of catching up.
                let late = now.saturating_duration_since(start + at);
                if late > STALL {
                    start += late;
                }
                let (stream, packetizers) = &mut streams[number as usize];
                let tag = tags.at(kind, frame);
                let turn = usize::from(state.turn.load(Ordering::Relaxed));
                let burst = packetizers[turn].packetize(&tag);
                if turn == Target::Edge as usize {
                    stream.push(Instant::now(), burst.clone(), tag.is_key_frame());
                }
                sender.send(&burst, turn)?;
                due.push(Reverse((at + kind.period(), number, kind, frame + 1)));
            }
            Ok(())
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Sets the loss for the next packets.
    pub fn set_loss(&self, percent: u8) {
        self.shared.loss.store(percent, Ordering::Relaxed);
    }

    /// Sends the next packets to `target`.
    pub fn set_turn(&self, target: Target) {
        self.shared.turn.store(target as u8, Ordering::Relaxed);
    }

    /// Number of datagrams sent to `target`.
    pub fn sent(&self, target: Target) -> u64 {
        self.shared.sent[target as usize].load(Ordering::Relaxed)
    }

    /// Stops sending.
    pub fn stop(&mut self) -> io::Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Err(io::Error::other("the source panicked")),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Video,
    Audio,
}

impl Kind {
    fn period(self) -> Duration {
        match self {
            Self::Video => FRAME,
            Self::Audio => AUDIO_FRAME,
        }
    }
}

/// One group of pictures, played in a loop.
struct Tags {
    headers: Headers,
    key: Tag,
    inter: Tag,
    audio: Tag,
}

impl Tags {
    fn new() -> io::Result<Self> {
        let tag = |kind, start: &[u8], length: usize| {
            let mut body = vec![0x5a; length];
            body[..start.len()].copy_from_slice(start);
            Tag::new(kind, 0, &body).map_err(io::Error::other)
        };
        Ok(Self {
            headers: [tag(TagKind::Video, &[0x17, 0], 60)?, tag(TagKind::Audio, &[0xaf, 0], 4)?]
                .into_iter()
                .collect(),
            key: tag(TagKind::Video, &[0x17, 1], KEY_BYTES)?,
            inter: tag(TagKind::Video, &[0x27, 1], INTER_BYTES)?,
            audio: tag(TagKind::Audio, &[0xaf, 1], AUDIO_BYTES)?,
        })
    }

    fn at(&self, kind: Kind, frame: u32) -> Tag {
        let tag = match kind {
            Kind::Video if frame.is_multiple_of(GOP_FRAMES) => &self.key,
            Kind::Video => &self.inter,
            Kind::Audio => &self.audio,
        };
        tag.with_timestamp((kind.period() * frame).as_millis() as u32)
    }
}

struct Sender {
    shared: Arc<Shared>,
    socket: UdpSocket,
    state: UdpSocketState,
    targets: [SocketAddr; 2],
    rng: SmallRng,
    kept: Vec<u8>,
}

impl Sender {
    fn new(shared: Arc<Shared>, targets: [SocketAddr; 2]) -> io::Result<Self> {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let socket = udp::sender(any, Port::Own, 4 << 20, MulticastOut::default())?;
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        socket.set_nonblocking(false)?;
        let rng = SmallRng::seed_from_u64(SEED);
        Ok(Self { shared, socket, state, targets, rng, kept: Vec::new() })
    }

    /// Sends a burst in one call, as the fan-out does. Lost packets are removed before segmentation,
    /// so the others stay adjacent, as they do when a network card coalesces them.
    fn send(&mut self, burst: &Burst, turn: usize) -> io::Result<()> {
        let loss = f64::from(self.shared.loss.load(Ordering::Relaxed)) / 100.0;
        self.kept.clear();
        let mut count = 0;
        for packet in burst.bytes().chunks(burst.stride()) {
            if loss == 0.0 || !self.rng.random_bool(loss) {
                self.kept.extend_from_slice(packet);
                count += 1;
            }
        }
        let max_segments = self.state.max_gso_segments().min(MAX_GSO_BYTES / burst.stride()).max(1);
        for message in self.kept.chunks(max_segments * burst.stride()) {
            let transmit = Transmit {
                destination: self.targets[turn],
                ecn: None,
                contents: message,
                segment_size: (message.len() > burst.stride()).then_some(burst.stride()),
                src_ip: None,
            };
            self.state.try_send(UdpSockRef::from(&self.socket), &transmit)?;
        }
        self.shared.sent[turn].fetch_add(count, Ordering::Relaxed);
        Ok(())
    }
}

/// Delays up to this are caught up: socket buffers are large enough.
const STALL: Duration = Duration::from_millis(30);
const PAYLOAD: usize = 1120;
const SEED: u64 = 1;
const MAX_GSO_BYTES: usize = 65_000;
/// 25 pictures per second, one in 50 a key frame of six times the others' size, and 128 kbit/s of AAC:
/// together 1 Mbit/s.
const GOP: Duration = Duration::from_secs(2);
const GOP_FRAMES: u32 = 50;
const FRAME: Duration = Duration::from_millis(40);
const INTER_BYTES: usize = 3964;
const KEY_BYTES: usize = 6 * INTER_BYTES;
/// 1024 samples at 44.1 kHz.
const AUDIO_FRAME: Duration = Duration::from_micros(23_220);
const AUDIO_BYTES: usize = 371;
