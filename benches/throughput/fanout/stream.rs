//! The traffic: one stream's pictures, or many streams' tags in real time.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use downpour_distribution::downstream::routes::Target;
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::rtp::{Burst, Packetizer, Ssrc};

use super::threads::join;
use crate::{common::cpu, table::median};

/// Two seconds of a stream: per picture, its burst and the bursts of the audio until the next one.
pub fn pictures(ssrc: Ssrc, mbps: u32) -> Vec<Vec<Burst>> {
    let mut packetizer = Packetizer::new(ssrc, 1120);
    let small = mbps as usize * 1_000_000 / 8 * 2 / (GOP - 1 + KEY_FRAME);
    let mut audio = 0;
    let pictures = (0..GOP).map(|picture| {
        let at = picture as u32 * 40;
        let (first, len) = if picture == 0 { (0x17, small * KEY_FRAME) } else { (0x27, small) };
        let mut bursts = vec![burst(&mut packetizer, TagKind::Video, at, first, len)];
        // 1024 samples at 48 kHz.
        while audio < at + 40 {
            bursts.push(burst(&mut packetizer, TagKind::Audio, audio, 0xaf, 341));
            audio += 64 / 3;
        }
        bursts
    });
    pictures.collect()
}

/// Packets per second of [`pictures`].
pub fn packets_per_second(mbps: u32) -> f64 {
    let pictures = pictures(Ssrc(1), mbps);
    pictures.iter().flatten().map(Burst::count).sum::<usize>() as f64 / 2.0
}

fn burst(packetizer: &mut Packetizer, kind: TagKind, at: u32, first: u8, len: usize) -> Burst {
    let mut body = vec![1; len.max(2)];
    body[0] = first;
    match Tag::new(kind, at, &body) {
        Ok(tag) => packetizer.packetize(&tag),
        Err(_) => unreachable!("a tag of the bench is shorter than 16 MiB"),
    }
}

/// The result of [`in_real_time`].
pub struct Run {
    pub packets: u64,
    pub seconds: f64,
    /// Seconds of processor time spent in `send`.
    pub cpu: f64,
}

/// Calls `send` for each tag of each stream in real time, from four threads.
pub fn in_real_time(
    times: &Times,
    targets: &[Arc<[Target]>],
    seconds: f64,
    send: impl Fn(Ssrc, &Burst, &Arc<[Target]>) -> io::Result<()> + Sync,
) -> io::Result<Run> {
    let mut packetizer = Packetizer::new(Ssrc(1), 1120);
    // Lengths from 100 to 1100, shuffled.
    let bursts: Vec<_> = (0..CYCLE)
        .map(|n| burst(&mut packetizer, TagKind::Audio, 0, 0xaf, 89 + n * 379 % 1000))
        .collect();
    let ticks = (seconds / TICK.as_secs_f64()) as u64;
    let clock_cost = cost_of_clock();
    let (send, bursts) = (&send, &bursts);
    let began = Instant::now() + Duration::from_millis(5);
    // One thread sends the tags of its part of the streams, and returns its processor time.
    let sender = |thread: usize| -> io::Result<f64> {
        let streams = targets.len() / THREADS;
        let first = streams * thread;
        let mut cost = 0.0;
        let mut next = 0;
        let phase = TICK / THREADS as u32 * thread as u32;
        for tick in 0..ticks {
            let due = began + phase + TICK * tick as u32;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let before = cpu::of_this_thread();
            for _ in 0..TAGS_PER_TICK {
                let stream = first + next % streams;
                let at = (next / streams) % CYCLE;
                if stream == 0 {
                    times.sent(at);
                }
                send(Ssrc(stream as u32 + 1), &bursts[at], &targets[stream])?;
                next += 1;
            }
            cost += cpu::of_this_thread() - before - clock_cost;
        }
        Ok(cost)
    };
    let sender = &sender;
    let costs: io::Result<Vec<f64>> = thread::scope(|scope| {
        let threads: Vec<_> =
            (0..THREADS).map(|thread| scope.spawn(move || sender(thread))).collect();
        threads.into_iter().map(join).collect()
    });
    let packets = ticks * (TAGS_PER_TICK * THREADS) as u64;
    Ok(Run { packets, seconds: began.elapsed().as_secs_f64(), cpu: costs?.iter().sum() })
}

/// Send times and delays of one stream's packets.
#[derive(Default)]
pub struct Times {
    began: Option<Instant>,
    sent: Vec<AtomicU64>,
    delays: Mutex<Vec<f64>>,
}

impl Times {
    fn new() -> Self {
        let sent = (0..CYCLE).map(|_| AtomicU64::new(0)).collect();
        Self { began: Some(Instant::now()), sent, delays: Mutex::default() }
    }

    fn now(&self) -> u64 {
        self.began.map_or(0, |began| began.elapsed().as_nanos() as u64)
    }

    fn sent(&self, at: usize) {
        self.sent[at].store(self.now(), Ordering::Release);
    }

    fn received(&self, at: usize) {
        let sent = self.sent.get(at).map_or(0, |sent| sent.load(Ordering::Acquire));
        let delay = self.now().saturating_sub(sent) as f64 / 1e6;
        self.delays.lock().unwrap_or_else(PoisonError::into_inner).push(delay);
    }

    /// Formats the median and the 99th percentile.
    pub fn text(&self) -> String {
        let mut delays = self.delays.lock().unwrap_or_else(PoisonError::into_inner).clone();
        delays.sort_by(f64::total_cmp);
        let late = delays.get(delays.len() * 99 / 100).copied().unwrap_or(f64::NAN);
        format!("p50 {:.3} ms, p99 {late:.3} ms of {}", median(&delays), delays.len())
    }
}

/// A thread that receives the packets of one stream and records their delays.
pub struct Listener {
    pub address: SocketAddrV4,
    times: Arc<[Times; 2]>,
    current: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
}

impl Listener {
    pub fn start() -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, socket.local_addr()?.port());
        let times: Arc<[Times; 2]> = Arc::new([Times::new(), Times::new()]);
        let (current, stop) = (Arc::<AtomicUsize>::default(), Arc::<AtomicBool>::default());
        let reader = (times.clone(), current.clone(), stop.clone());
        thread::Builder::new().name("listener".into()).spawn(move || {
            let (times, current, stop) = reader;
            let mut packet = [0; 2000];
            while !stop.load(Ordering::Acquire) {
                if let Ok(12..) = socket.recv(&mut packet) {
                    let seq = u16::from_be_bytes([packet[2], packet[3]]);
                    let at = downpour_repair::rtp::Seq(seq)
                        .distance_from(downpour_repair::rtp::Seq::FIRST);
                    times[current.load(Ordering::Acquire)].received(at as usize);
                }
            }
        })?;
        Ok(Self { address, times, current, stop })
    }

    /// Records the next packets as this kind.
    pub fn set_kind(&self, kind: usize) -> &Times {
        self.current.store(kind, Ordering::Release);
        &self.times[kind]
    }

    pub fn times(&self, kind: usize) -> &Times {
        &self.times[kind]
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
    }
}

/// Seconds between two consecutive readings of the thread's clock.
fn cost_of_clock() -> f64 {
    let pairs = (0..1000).map(|_| {
        let before = cpu::of_this_thread();
        cpu::of_this_thread() - before
    });
    median(&pairs.collect::<Vec<_>>())
}

const GOP: usize = 50;
/// Size of a key frame, in other pictures.
const KEY_FRAME: usize = 6;
const THREADS: usize = 4;
/// Period of [`TAGS_PER_TICK`] tags of the 250 streams of a thread, at 68 tags per second each.
const TICK: Duration = Duration::from_nanos(235_294);
const TAGS_PER_TICK: usize = 4;
/// Number of different bursts.
const CYCLE: usize = 1009;
