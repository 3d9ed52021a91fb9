//! Numbered, time-stamped media: a paced source, and a sink that records the arrivals.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use downpour::{
    http::client::{FlvClient, FlvUrl},
    rtmp::client::Publisher,
};
use downpour_media::flv::{Tag, TagKind};
use downpour_rtmp::url::RtmpUrl;

/// Bytes of media per packet.
pub const PACKET_LEN: usize = 1000;

/// The schedule of the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cadence {
    /// One packet per millisecond: 8 Mbit/s.
    Steady,
    /// The same for 200 ms, then silence for 300 ms. No packet follows the last ones of a burst to
    /// show that they are missing.
    Bursts,
}

impl Cadence {
    fn due(self, number: u64) -> Duration {
        Duration::from_millis(match self {
            Self::Steady => number,
            Self::Bursts => number / 200 * 500 + number % 200,
        })
    }
}

/// Sends packets 0, 1, 2, … until it is dropped.
#[derive(Debug)]
pub struct Source {
    shared: Arc<SourceState>,
    thread: Option<JoinHandle<()>>,
}

impl Source {
    /// Sends each packet as a datagram.
    pub fn udp(clock: Instant, cadence: Cadence, to: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(to)?;
        Self::start(clock, cadence, move |mut pacer| {
            while let Some(number) = pacer.next() {
                // The receiver may not listen yet. The measurement starts once it does.
                let _ = socket.send(&encode(number, clock.elapsed()));
            }
            Ok(())
        })
    }

    /// Sends each packet as a tag whose header and body are [`PACKET_LEN`] bytes. The codec is MP3,
    /// which needs no sequence header, so any tag may be the first.
    pub fn rtmp(clock: Instant, cadence: Cadence, url: RtmpUrl) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Self::start(clock, cadence, move |mut pacer| {
            runtime.block_on(async {
                let mut publisher =
                    Publisher::connect(&url, PATIENCE).await.map_err(io::Error::other)?;
                while let Some(number) = pacer.next() {
                    let timestamp = cadence.due(number).as_millis() as u32;
                    let body = encode(number, clock.elapsed());
                    let tag = Tag::new(TagKind::Audio, timestamp, &body[Tag::HEADER_LEN..])
                        .map_err(io::Error::other)?;
                    publisher.send(&tag).await.map_err(io::Error::other)?;
                    // The pacer blocks the thread, so the runtime gets no other turn.
                    tokio::task::yield_now().await;
                }
                Ok(())
            })
        })
    }

    fn start(
        clock: Instant,
        cadence: Cadence,
        send: impl FnOnce(Pacer) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::<SourceState>::default();
        let pacer =
            Pacer { shared: shared.clone(), cadence, start: Instant::now(), next: 0, clock };
        let state = shared.clone();
        let thread = std::thread::Builder::new().name("source".into()).spawn(move || {
            if let Err(error) = send(pacer) {
                *state.failure.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(error.to_string());
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The number of the next packet.
    pub fn next(&self) -> u64 {
        self.shared.next.load(Ordering::Acquire)
    }

    /// Returns how late each packet since the last call was sent, in microseconds.
    pub fn take_lateness(&self) -> Vec<u32> {
        std::mem::take(&mut *self.shared.lateness.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The error that stopped the source.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Records which packets arrive, and when, until it is dropped.
#[derive(Debug)]
pub struct Sink {
    shared: Arc<SinkState>,
    thread: Option<JoinHandle<()>>,
}

impl Sink {
    /// Receives datagrams at `address`.
    pub fn udp(clock: Instant, address: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(address)?;
        // Packets dropped by a full socket buffer would count as the system's loss.
        socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
        socket.set_read_timeout(Some(STOP_CHECK))?;
        Self::start(move |state| {
            let mut buffer = [0; 2048];
            while !state.stop.load(Ordering::Relaxed) {
                if let Ok(len) = socket.recv(&mut buffer) {
                    state.record(clock.elapsed(), &buffer[..len]);
                }
            }
        })
    }

    /// Plays `url` as soon as the stream is live.
    pub fn flv(clock: Instant, url: FlvUrl) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Self::start(move |state| {
            runtime.block_on(async {
                while !state.stop.load(Ordering::Relaxed) {
                    // The stream is not live at the start and at the end.
                    let Ok(mut client) = FlvClient::connect(&url, PATIENCE).await else {
                        tokio::time::sleep(STOP_CHECK).await;
                        continue;
                    };
                    while !state.stop.load(Ordering::Relaxed) {
                        match tokio::time::timeout(STOP_CHECK, client.next()).await {
                            Ok(Ok(Some(tag))) => state.record(clock.elapsed(), tag.body()),
                            Ok(_) => break,
                            Err(_) => {}
                        }
                    }
                }
            });
        })
    }

    fn start(receive: impl FnOnce(&SinkState) + Send + 'static) -> io::Result<Self> {
        let shared = Arc::<SinkState>::default();
        let state = shared.clone();
        let thread =
            std::thread::Builder::new().name("sink".into()).spawn(move || receive(&state))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// `true` if the last `count` packets up to the highest number have all arrived.
    pub fn is_steady(&self, count: usize) -> bool {
        let arrivals = self.shared.arrivals();
        arrivals.len() >= count && arrivals[arrivals.len() - count..].iter().all(Option::is_some)
    }

    /// The arrivals of the packets `first..end`; `None` for a lost packet.
    pub fn arrivals(&self, first: u64, end: u64) -> Vec<Option<Arrival>> {
        let arrivals = self.shared.arrivals();
        (first..end).map(|number| arrivals.get(number as usize).copied().flatten()).collect()
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A packet that arrived.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// From its sending to its first arrival.
    pub took: Duration,
    /// Further arrivals.
    pub duplicates: u32,
}

/// Waits for each packet's time.
struct Pacer {
    shared: Arc<SourceState>,
    cadence: Cadence,
    start: Instant,
    next: u64,
    clock: Instant,
}

impl Pacer {
    /// Waits until the next packet is due and returns its number; `None` to stop.
    fn next(&mut self) -> Option<u64> {
        let number = self.next;
        let due = self.start + self.cadence.due(number);
        loop {
            if self.shared.stop.load(Ordering::Relaxed) {
                return None;
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            std::thread::sleep(left.min(STOP_CHECK));
        }
        let late = due.elapsed().as_micros().min(u32::MAX.into()) as u32;
        debug_assert!(due >= self.clock);
        self.shared.lateness.lock().unwrap_or_else(PoisonError::into_inner).push(late);
        self.next += 1;
        self.shared.next.store(self.next, Ordering::Release);
        Some(number)
    }
}

#[derive(Debug, Default)]
struct SourceState {
    stop: AtomicBool,
    next: AtomicU64,
    lateness: Mutex<Vec<u32>>,
    failure: Mutex<Option<String>>,
}

#[derive(Debug, Default)]
struct SinkState {
    stop: AtomicBool,
    arrivals: Mutex<Vec<Option<Arrival>>>,
}

impl SinkState {
    fn record(&self, now: Duration, body: &[u8]) {
        let Some((number, sent)) = decode(body) else { return };
        let mut arrivals = self.arrivals();
        let index = number as usize;
        if arrivals.len() <= index {
            arrivals.resize(index + 1, None);
        }
        match &mut arrivals[index] {
            Some(arrival) => arrival.duplicates += 1,
            none => *none = Some(Arrival { took: now.saturating_sub(sent), duplicates: 0 }),
        }
    }

    fn arrivals(&self) -> MutexGuard<'_, Vec<Option<Arrival>>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Encodes a datagram. Without its first [`Tag::HEADER_LEN`] bytes it is the body of a tag.
fn encode(number: u64, sent: Duration) -> [u8; PACKET_LEN] {
    let mut packet = [FILLER; PACKET_LEN];
    let body = &mut packet[Tag::HEADER_LEN..];
    body[0] = MP3_44_KHZ_STEREO;
    body[1..9].copy_from_slice(&number.to_be_bytes());
    body[9..17].copy_from_slice(&(sent.as_nanos() as u64).to_be_bytes());
    packet
}

/// Returns the number and the time of sending; `None` if this is neither a whole packet of the
/// source nor the body of a tag.
fn decode(packet: &[u8]) -> Option<(u64, Duration)> {
    let body = match packet.len() {
        PACKET_LEN => &packet[Tag::HEADER_LEN..],
        _ => packet,
    };
    if body.len() != BODY_LEN || body[0] != MP3_44_KHZ_STEREO || body[17..] != FILLING {
        return None;
    }
    let number = u64::from_be_bytes(*body[1..].first_chunk()?);
    let sent = u64::from_be_bytes(*body[9..].first_chunk()?);
    (number < NUMBER_MAX).then(|| (number, Duration::from_nanos(sent)))
}

/// The first byte of an FLV audio tag's body (FLV 10.1 §E.4.2.1).
const MP3_44_KHZ_STEREO: u8 = 0x2f;
const FILLER: u8 = 0xa5;
const BODY_LEN: usize = PACKET_LEN - Tag::HEADER_LEN;
const FILLING: [u8; BODY_LEN - 17] = [FILLER; BODY_LEN - 17];
/// More than any run sends. It bounds memory if a stray datagram arrives.
const NUMBER_MAX: u64 = 10_000_000;
/// How often threads check whether to stop.
const STOP_CHECK: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(10);
