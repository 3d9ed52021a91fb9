//! The fan-out of packets to many edges, beside bare loops of system calls.

mod sinks;
mod stream;
pub mod threads;

use std::{
    cell::Cell,
    io,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use downpour_distribution::downstream::{
    fanout::{self, Fanout, FanoutMetrics, OnDatagrams},
    routes::{Routes, Target},
};
use downpour_repair::rtp::{Burst, Ssrc};
use prometheus::Registry;

use self::{sinks::Sinks, threads::Thread};
use crate::{
    bare::{self, Bare},
    common::{
        cpu,
        plot::{Panel, Plot, Scale, Series},
    },
    table::{Comparison, Peer, Section, median},
};

pub fn run(quick: bool) -> io::Result<Section> {
    let sinks = Sinks::new()?;
    let mut section = Section::default();
    section.paragraph(
        "The packets of one stream to the number of edges in the row, as the packetizer makes \
         them: 25 pictures per second, a key frame of six times the others' size every 2 s, 128 \
         kbit/s of audio. The cost is processor time per datagram, in user mode and in the \
         kernel. The floor is a loop of `sendmsg` with segmentation (GSO) of the same bursts, \
         with all addresses and headers prepared. The peers are a loop of one `sendto` per \
         packet, and of `sendmmsg` for as many packets as it accepts. Downpour is the fan-out, \
         queue and threads included, which gets a picture and its audio at a time. Key frames and \
         the other pictures are sent and measured separately, the same for all, and added up in the \
         proportion of a group of 50. All pause for 1 ms after each picture, as a server has to. \
         The sinks are sockets on loopback with full buffers, so that the kernel need not segment \
         the messages; each counts the messages that it drops, which must be at least 999 in 1000 of \
         those sent.",
    );
    let mut growth = Vec::new();
    let mut segmented = Vec::new();
    let mut unsegmented = Vec::new();
    for mbps in RATES {
        let pictures = stream::pictures(Ssrc(mbps), mbps);
        for edges in EDGES {
            let cell = Case { mbps, edges, pictures: &pictures, sinks: &sinks };
            let row = cell.compare(quick)?;
            eprintln!("{}: {:.2}", row.work, row.ratio());
            growth.push((mbps, edges, row.clone()));
            segmented.push(row);
            if edges == 1000 || (edges == 10 && !quick) {
                unsegmented.push(cell.compare_without_segmentation(quick)?);
            }
        }
    }
    section.table(&segmented);
    section.paragraph(
        "At 5 Mbit/s, the goal is a fifth of the time of `sendto`, which is the floor of this table.",
    );
    let five = growth.iter().filter(|(mbps, ..)| *mbps == 5);
    section.table(&five.map(|(_, _, row)| beside_sendto(row)).collect::<Vec<_>>());
    section.paragraph(
        "With segmentation disabled in the fan-out. The floor is `sendmmsg` of the same packets in \
         as many threads as the fan-out uses workers for that number of edges, each with its socket \
         and its part of the list; the peer uses one thread. Two threads need more processor time \
         per datagram than one, whatever they run, and half the wall time.",
    );
    section.table(&unsegmented);
    add_many_streams(&mut section, quick)?;
    section.plot("fanout-growth.svg", plot(&growth));
    Ok(section)
}

/// Measures many small streams and adds the result to the report.
fn add_many_streams(section: &mut Section, quick: bool) -> io::Result<()> {
    section.paragraph(
        "A thousand streams to one edge each: 68,000 packets per second of 100 to 1100 bytes, from \
         four threads, in real time. The floor sends each by `sendto`, in the same threads. \
         Downpour's time is that of queueing the packets and of the fan-out's threads. The delay is \
         from before the packet is queued or sent until a thread that waits for one of the streams \
         has read it.",
    );
    let streams = many_streams(quick)?;
    section.table(&[streams.row]);
    section.paragraph(&format!(
        "Delay of Downpour: {}; of the floor: {}. The fan-out made {:.2} calls per packet.",
        streams.ours, streams.floor, streams.calls,
    ));
    Ok(())
}

pub fn child(role: &str, _arguments: &[&str]) -> io::Result<()> {
    Err(io::Error::other(format!("unknown child process {role}")))
}

/// One stream to a number of edges.
struct Case<'a> {
    mbps: u32,
    edges: usize,
    /// Per picture, its burst and the bursts of the audio until the next one.
    pictures: &'a [Vec<Burst>],
    sinks: &'a Sinks,
}

impl Case<'_> {
    /// Measures Downpour and all loops in turns.
    fn compare(&self, quick: bool) -> io::Result<Comparison> {
        let targets = self.sinks.addresses(self.edges);
        let ours = Ours::start(true)?;
        let mut bare = Bare::new(&targets)?;
        let mut row = Comparison {
            work: format!("{} Mbit/s to {} edges", self.mbps, self.edges),
            unit: "µs/datagram",
            peers: vec![
                Peer { name: "sendto", values: Vec::new() },
                Peer { name: "sendmmsg", values: Vec::new() },
            ],
            goal: Some(1.25),
            ..Comparison::default()
        };
        let targets: Arc<[Target]> =
            targets.iter().map(|addr| SocketAddr::from(*addr).into()).collect();
        let parts = self.parts(quick);
        let peers_too = |round| round > 0 && round <= if quick { 1 } else { 3 };
        // The first round fills caches and allocates buffers.
        for round in 0..=rounds(quick) {
            let floor = self.measure(&parts, true, |bursts| bare.segmented(bursts))?;
            let mine = self.measure(&parts, true, |bursts| ours.send(bursts, &targets))?;
            if round > 0 {
                row.floor.push(floor);
                row.ours.push(mine);
            }
            if peers_too(round) {
                let sendto = self.measure(&parts, false, |bursts| bare.one_by_one(bursts))?;
                row.peers[0].values.push(sendto);
                let sendmmsg = self.measure(&parts, false, |bursts| bare.many(bursts))?;
                row.peers[1].values.push(sendmmsg);
            }
        }
        ours.check()?;
        Ok(row)
    }

    /// Measures Downpour without segmentation and `sendmmsg` in turns.
    fn compare_without_segmentation(&self, quick: bool) -> io::Result<Comparison> {
        let targets = self.sinks.addresses(self.edges);
        let ours = Ours::start(false)?;
        let mut bare = Bare::new(&targets)?;
        let mut row = Comparison {
            work: format!("{} Mbit/s to {} edges, without GSO", self.mbps, self.edges),
            unit: "µs/datagram",
            peers: vec![Peer { name: "sendmmsg, one thread", values: Vec::new() }],
            goal: Some(1.15),
            ..Comparison::default()
        };
        // The workers that have something to send.
        let threads = ours.workers.len().min(targets.len().div_ceil(WORKERS_SHARE));
        let mut shares = targets
            .chunks(targets.len().div_ceil(threads))
            .map(Bare::new)
            .collect::<io::Result<Vec<_>>>()?;
        let targets: Arc<[Target]> =
            targets.iter().map(|addr| SocketAddr::from(*addr).into()).collect();
        let parts = self.parts(quick);
        for round in 0..=rounds(quick) {
            let one = self.measure(&parts, false, |bursts| bare.many(bursts))?;
            let floor =
                self.measure(&parts, false, |bursts| bare::many_in_threads(&mut shares, bursts))?;
            let mine = self.measure(&parts, false, |bursts| ours.send(bursts, &targets))?;
            if round > 0 {
                row.peers[0].values.push(one);
                row.floor.push(floor);
                row.ours.push(mine);
            }
        }
        ours.check()?;
        Ok(row)
    }

    /// The key frames and the other pictures of a round. They are measured separately, so that a
    /// round can be shorter than a group of pictures and still yield the cost of a group.
    fn parts(&self, quick: bool) -> [Part<'_>; 2] {
        let budget = if quick { 100_000 } else { 200_000 };
        let (key_frame, others) = self.pictures.split_at(1);
        [(key_frame, MAX_KEY_FRAMES), (others, MAX_OTHERS)].map(|(pictures, max)| {
            let packets = pictures.iter().flatten().map(Burst::count).sum::<usize>();
            let fit = budget * pictures.len() / (packets * self.edges);
            let sent = pictures.iter().map(Vec::as_slice).cycle().take(fit.clamp(1, max));
            Part { sent: sent.collect(), packets }
        })
    }

    /// Sends both parts. Returns the microseconds of processor time per datagram over a group of
    /// pictures.
    fn measure(
        &self,
        parts: &[Part<'_>],
        segmented: bool,
        mut send: impl FnMut(&[Burst]) -> io::Result<f64>,
    ) -> io::Result<f64> {
        let (mut all, mut packets) = (0.0, 0);
        for part in parts {
            all += self.measure_part(&part.sent, segmented, &mut send)? * part.packets as f64;
            packets += part.packets;
        }
        Ok(all / packets as f64)
    }

    /// Sends pictures with a pause after each. Returns the microseconds of processor time per
    /// datagram.
    ///
    /// # Errors
    /// If more than one in 1000 messages did not reach a sink.
    fn measure_part(
        &self,
        pictures: &[&[Burst]],
        segmented: bool,
        mut send: impl FnMut(&[Burst]) -> io::Result<f64>,
    ) -> io::Result<f64> {
        let before = self.sinks.dropped()?;
        let (mut seconds, mut datagrams, mut messages) = (0.0, 0, 0);
        for bursts in pictures {
            seconds += send(bursts)?;
            for burst in *bursts {
                datagrams += burst.count() * self.edges;
                let segments = if segmented { bare::max_segments(burst.stride()) } else { 1 };
                messages += burst.count().div_ceil(segments) * self.edges;
            }
            thread::sleep(PAUSE);
        }
        // On a busy machine, a kernel thread may deliver the last messages a moment later.
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut arrived = self.sinks.dropped()? - before;
        while arrived < messages as u64 && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
            arrived = self.sinks.dropped()? - before;
        }
        // If a processor's backlog is full, the kernel drops messages before they reach a sink.
        let enough = messages as u64 - messages as u64 / 1000;
        match (enough..=messages as u64).contains(&arrived) {
            true => Ok(seconds * 1e6 / datagrams as f64),
            false => Err(io::Error::other(format!("of {messages} messages, {arrived} arrived"))),
        }
    }
}

/// Pictures of one size.
struct Part<'a> {
    sent: Vec<&'a [Burst]>,
    /// Packets of these pictures in a group of pictures.
    packets: usize,
}

/// A row with `sendto` as the floor, over the rounds that measured it.
fn beside_sendto(row: &Comparison) -> Comparison {
    let floor = row.peers[0].values.clone();
    Comparison {
        work: format!("{}, beside sendto", row.work),
        unit: row.unit,
        ours: row.ours.iter().copied().take(floor.len()).collect(),
        floor,
        peers: Vec::new(),
        goal: Some(0.2),
    }
}

/// A running fan-out.
struct Ours {
    fanout: Fanout,
    metrics: FanoutMetrics,
    workers: Vec<Thread>,
    /// Processor time of the workers at the end of the last measurement.
    counted: Cell<f64>,
}

impl Ours {
    fn start(segmentation: bool) -> io::Result<Self> {
        let settings = fanout::Settings { port: 0, segmentation, ..fanout::Settings::default() };
        let registry = Registry::new();
        let metrics = FanoutMetrics::register(&registry).map_err(io::Error::other)?;
        let routes = Routes::new(&registry).map_err(io::Error::other)?;
        let ignore: OnDatagrams = Arc::new(|_, _| Vec::new());
        // The threads of a previous fan-out end asynchronously, and /proc may omit threads while
        // others end.
        let wait_for = |count| -> io::Result<Vec<Thread>> {
            let deadline = Instant::now() + Duration::from_secs(5);
            loop {
                let workers = threads::named("fanout-")?;
                if workers.len() == count {
                    return Ok(workers);
                }
                if Instant::now() > deadline {
                    return Err(io::Error::other("timed out: the fan-out's threads start and end"));
                }
                thread::yield_now();
            }
        };
        wait_for(0)?;
        let fanout = Fanout::spawn(&settings, routes, &ignore, metrics.clone())?;
        // Threads set their names when they start to run.
        let workers = wait_for(fanout.workers())?;
        Ok(Self { fanout, metrics, workers, counted: Cell::new(f64::NAN) })
    }

    /// Queues the bursts and waits until they are sent. Returns the seconds of processor time of this
    /// thread for queueing and of the workers for sending.
    fn send(&self, bursts: &[Burst], targets: &Arc<[Target]>) -> io::Result<f64> {
        if self.counted.get().is_nan() {
            self.counted.set(self.worker_seconds());
        }
        let mut queued = 0.0;
        let mut until = self.metrics.datagrams();
        for (index, burst) in bursts.iter().enumerate() {
            let began = cpu::of_this_thread();
            self.fanout.send(Ssrc(1), burst, targets, None);
            queued += cpu::of_this_thread() - began;
            let datagrams = burst.count() * targets.len();
            until += datagrams as u64;
            // The fan-out drops bursts that would wait half a second, so they are queued later.
            if datagrams >= LONG_BURST || index + 1 == bursts.len() {
                self.wait_until_sent(until)?;
            }
        }
        // The rest of the workers' time counts in the next measurement.
        let now = self.worker_seconds();
        Ok(queued + now - self.counted.replace(now))
    }

    fn wait_until_sent(&self, datagrams: u64) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.metrics.datagrams() < datagrams {
            self.check()?;
            if Instant::now() > deadline {
                return Err(io::Error::other("timed out: the fan-out sends all that is queued"));
            }
            thread::sleep(Duration::from_micros(20));
        }
        Ok(())
    }

    fn worker_seconds(&self) -> f64 {
        self.workers.iter().map(Thread::seconds).sum()
    }

    fn check(&self) -> io::Result<()> {
        match self.metrics.skipped() {
            0 => Ok(()),
            skipped => Err(io::Error::other(format!("the fan-out skipped {skipped} packets"))),
        }
    }
}

/// The result of many small streams.
struct ManyStreams {
    row: Comparison,
    ours: String,
    floor: String,
    calls: f64,
}

/// Measures streams to one edge each, in real time.
fn many_streams(quick: bool) -> io::Result<ManyStreams> {
    let sinks = Sinks::new()?;
    let ours = Ours::start(true)?;
    let listener = stream::Listener::start()?;
    let mut targets: Vec<Arc<[Target]>> = sinks
        .addresses(STREAMS)
        .into_iter()
        .map(|addr| Arc::from([SocketAddr::from(addr).into()]))
        .collect();
    // The first stream is received, to measure its delay.
    targets[0] = Arc::from([SocketAddr::from(listener.address).into()]);
    let (rounds, seconds) = if quick { (1, 1.0) } else { (5, 1.5) };
    let mut row = Comparison {
        work: format!("{STREAMS} streams of {TAGS} tags/s to one edge each"),
        unit: "% of a core",
        goal: None,
        ..Comparison::default()
    };
    let bare = std::net::UdpSocket::bind("0.0.0.0:0")?;
    let (mut sent, mut calls) = (0, 0);
    for _ in 0..rounds {
        let floor =
            stream::in_real_time(listener.set_kind(BARE), &targets, seconds, |_, burst, to| {
                bare.send_to(burst.bytes(), to[0].addr).map(drop)
            })?;
        row.floor.push(floor.cpu / floor.seconds * 100.0);
        let times = listener.set_kind(OURS);
        let (workers_before, calls_before) = (ours.worker_seconds(), ours.metrics.calls());
        let until = ours.metrics.datagrams();
        let queued = stream::in_real_time(times, &targets, seconds, |ssrc, burst, to| {
            ours.fanout.send(ssrc, burst, to, None);
            Ok(())
        })?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while ours.metrics.datagrams() < until + queued.packets && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let cpu = queued.cpu + ours.worker_seconds() - workers_before;
        row.ours.push(cpu / queued.seconds * 100.0);
        sent += ours.metrics.datagrams() - until;
        calls += ours.metrics.calls() - calls_before;
        if sent == 0 || ours.metrics.datagrams() - until != queued.packets {
            return Err(io::Error::other("the fan-out did not send all that was queued"));
        }
    }
    ours.check()?;
    Ok(ManyStreams {
        row,
        floor: listener.times(BARE).text(),
        ours: listener.times(OURS).text(),
        calls: calls as f64 / sent as f64,
    })
}

/// The processor time of a stream in real time, by the number of edges.
fn plot(growth: &[(u32, usize, Comparison)]) -> Plot {
    let panel = |mbps: u32| {
        let rows: Vec<_> = growth.iter().filter(|(of, ..)| *of == mbps).collect();
        let packets_per_second = stream::packets_per_second(mbps);
        let series = |system, colour, dashed, values: &dyn Fn(&Comparison) -> f64| Series {
            system,
            colour,
            dashed,
            points: rows
                .iter()
                .map(|(_, edges, row)| {
                    // Microseconds per second, in per cent of a core.
                    Some(values(row) * packets_per_second * *edges as f64 / 1e4)
                        .filter(|share| *share <= 100.0)
                })
                .collect(),
        };
        Panel {
            title: format!("{mbps} Mbit/s, % of a core"),
            series: vec![
                series("sendto", "#c33", true, &|row| median(&row.peers[0].values)),
                series("bare GSO", "#888", true, &|row| median(&row.floor)),
                series("Downpour", "#06c", false, &|row| median(&row.ours)),
            ],
        }
    };
    Plot {
        title: "Fan-out of one stream by the number of edges, up to a full core",
        ticks: EDGES.iter().map(ToString::to_string).collect(),
        scale: Scale::Log { least: 0.01, most: 100.0 },
        panels: RATES.map(panel).into(),
    }
}

/// Number of rounds after the warm-up round.
fn rounds(quick: bool) -> usize {
    if quick { 1 } else { 7 }
}

/// Maximum number of pictures per round.
const MAX_KEY_FRAMES: usize = 20;
const MAX_OTHERS: usize = 100;
/// The fan-out uses one worker per this number of edges.
const WORKERS_SHARE: usize = 64;
/// After a burst of this many datagrams, the bench waits before it queues the next one.
const LONG_BURST: usize = 100_000;
/// Pause after each picture. As in a server, threads are asleep and caches cold for the next one.
const PAUSE: Duration = Duration::from_millis(1);
/// Kinds of packets that the listener receives.
const BARE: usize = 0;
const OURS: usize = 1;
/// Mbit/s of video.
const RATES: [u32; 3] = [1, 5, 20];
const EDGES: [usize; 4] = [10, 100, 1000, 5000];
/// Number of small streams.
const STREAMS: usize = 1000;
/// Tags per second and stream: 25 pictures and 43 audio frames.
const TAGS: u32 = 68;
