//! What is sent: one stream's pictures, or many streams' tags in real time.

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

/// Two seconds of a stream: of each picture its burst, and those of the audio until the next one.
pub fn pictures(ssrc: Ssrc, mbps: u32) -> Vec<Vec<Burst>> {
    let mut packetizer = Packetizer::new(ssrc, 1120);
    let small = mbps as usize * 1_000_000 / 8 * 2 / (GOP - 1 + KEY_FRAME);
    let mut audio = 0;
    let pictures = (0..GOP).map(|picture| {
        let at = picture as u32 * 40;
        let (first, len) = if picture == 0 { (0x17, small * KEY_FRAME) } else { (0x27, small) };
        let mut bursts = vec![burst(&mut packetizer, TagKind::Video, at, first, len)];
        // 1024 samples of 48 kHz.
        while audio < at + 40 {
            bursts.push(burst(&mut packetizer, TagKind::Audio, audio, 0xaf, 341));
            audio += 64 / 3;
        }
        bursts
    });
    pictures.collect()
}

/// Packets that [`pictures`] has in a second.
pub fn packets_a_second(mbps: u32) -> f64 {
    let pictures = pictures(Ssrc(1), mbps);
    pictures.iter().flatten().map(Burst::count).sum::<usize>() as f64 / 2.0
}

fn burst(packetizer: &mut Packetizer, kind: TagKind, at: u32, first: u8, len: usize) -> Burst {
    let mut body = vec![1; len.max(2)];
    body[0] = first;
    match Tag::new(kind, at, &body) {
        Ok(tag) => packetizer.packetize(&tag),
        Err(_) => unreachable!("no tag of the bench is over 16 MiB"),
    }
}

/// What a run in real time came to.
pub struct Run {
    pub packets: u64,
    pub seconds: f64,
    /// Seconds of processor time in `send`.
    pub cpu: f64,
}

/// Has each stream's tags sent when it is their time, from four threads.
pub fn in_real_time(
    times: &Times,
    targets: &[Arc<[Target]>],
    seconds: f64,
    send: impl Fn(Ssrc, &Burst, &Arc<[Target]>) -> io::Result<()> + Sync,
) -> io::Result<Run> {
    let mut packetizer = Packetizer::new(Ssrc(1), 1120);
    // Lengths from 100 to 1100 in no order.
    let bursts: Vec<_> = (0..CYCLE)
        .map(|n| burst(&mut packetizer, TagKind::Audio, 0, 0xaf, 89 + n * 379 % 1000))
        .collect();
    let ticks = (seconds / TICK.as_secs_f64()) as u64;
    let tags = ticks * TAGS_A_TICK as u64;
    let clock = cost_of_clock();
    let (send, bursts) = (&send, &bursts);
    let began = Instant::now() + Duration::from_millis(5);
    let costs: io::Result<Vec<f64>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn(move || -> io::Result<f64> {
                    let own = targets.len() / THREADS;
                    let first = own * thread;
                    let mut cost = 0.0;
                    let mut next = 0_u64;
                    let phase = TICK / THREADS as u32 * thread as u32;
                    for tick in 0..ticks {
                        let due = began + phase + TICK * tick as u32;
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        let before = cpu::of_this_thread();
                        for _ in 0..TAGS_A_TICK {
                            // 250 and 68 have no factor in common with the cycle that matters.
                            let stream = first + next as usize % own;
                            let at = (next as usize / own) % CYCLE;
                            if stream == 0 {
                                times.sent(at);
                            }
                            send(Ssrc(stream as u32 + 1), &bursts[at], &targets[stream])?;
                            next += 1;
                        }
                        cost += cpu::of_this_thread() - before - clock;
                    }
                    Ok(cost)
                })
            })
            .collect();
        threads.into_iter().map(join).collect()
    });
    let packets = tags * THREADS as u64;
    Ok(Run { packets, seconds: began.elapsed().as_secs_f64(), cpu: costs?.iter().sum() })
}

/// When one stream's packets were sent, and how long they took.
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

    fn came(&self, at: usize) {
        let sent = self.sent.get(at).map_or(0, |sent| sent.load(Ordering::Acquire));
        let delay = self.now().saturating_sub(sent) as f64 / 1e6;
        self.delays.lock().unwrap_or_else(PoisonError::into_inner).push(delay);
    }

    /// Half of them were no longer than the first, all but one in a hundred no longer than the
    /// second.
    pub fn text(&self) -> String {
        let mut delays = self.delays.lock().unwrap_or_else(PoisonError::into_inner).clone();
        delays.sort_by(f64::total_cmp);
        let late = delays.get(delays.len() * 99 / 100).copied().unwrap_or(f64::NAN);
        format!("p50 {:.3} ms, p99 {late:.3} ms of {}", median(&delays), delays.len())
    }
}

/// Reads what comes of one stream.
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
                    times[current.load(Ordering::Acquire)].came(at as usize);
                }
            }
        })?;
        Ok(Self { address, times, current, stop })
    }

    /// From now on, what comes is of this kind.
    pub fn turn_to(&self, kind: usize) -> &Times {
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

/// Seconds that two readings of the clock are apart when nothing is between them.
fn cost_of_clock() -> f64 {
    let pairs = (0..1000).map(|_| {
        let before = cpu::of_this_thread();
        cpu::of_this_thread() - before
    });
    median(&pairs.collect::<Vec<_>>())
}

const GOP: usize = 50;
/// Times the size of other pictures.
const KEY_FRAME: usize = 6;
const THREADS: usize = 4;
/// Four of 250 streams' 68 tags a second.
const TICK: Duration = Duration::from_nanos(235_294);
const TAGS_A_TICK: usize = 4;
const CYCLE: usize = 1009;
