//! The processor time of an edge that receives many streams, without viewers. The floor only reads
//! the same datagrams, with GRO, and counts them.
//!
//! The two take short turns. If the source sent to both at once, only the first would pay for waking
//! an idle processor.

mod floor;
mod source;

use std::{
    io,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use downpour_distribution::downstream::outgoing::OutgoingStreams;
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    common::{
        plot::{Panel, Plot, Scale, Series},
        process::{Process, free_address, http_get, samples, wait_for},
        repair::Repair,
    },
    table::{Comparison, Section, median},
};
use source::{Source, Target};

pub fn run(quick: bool, program: &str) -> io::Result<Section> {
    let bench = Bench { repair: Repair::new()?, program };
    let (rounds, turns) = if quick { (1, 8) } else { (3, 12) };
    let mut results = bench.measure(STREAMS, &[0, LOSS], rounds, turns)?.into_iter();
    let (Some(whole), Some(lossy)) = (results.next(), results.next()) else {
        return Err(io::Error::other("missing results"));
    };

    let mut section = Section::default();
    let row = |loss: u8, rounds: &[Round]| Comparison {
        work: format!("{STREAMS} streams of 1 Mbit/s, {loss} % lost"),
        unit: "% of a core",
        floor: rounds.iter().map(|round| round.floor).collect(),
        ours: rounds.iter().map(|round| round.edge).collect(),
        goal: (loss == 0).then_some(GOAL),
        ..Comparison::default()
    };
    section.table(&[row(0, &whole), row(LOSS, &lossy)]);
    let middle = |of: fn(&Round) -> f64, rounds: &[Round]| {
        median(&rounds.iter().map(of).collect::<Vec<_>>())
    };
    section.paragraph(&format!(
        "{:.0} packets per second; with {LOSS} % lost, the edge requested and received {:.1} % again. \
         After repair it lost none.",
        middle(|round| round.packets, &whole),
        100.0 * middle(|round| round.repaired, &lossy),
    ));
    if quick {
        return Ok(section);
    }

    let mut points = Vec::new();
    for streams in GROWTH {
        let rounds = match streams {
            STREAMS => whole.clone(),
            _ => bench.measure(streams, &[0], 1, 8)?.into_iter().next().unwrap_or_default(),
        };
        let of = |of: fn(&Round) -> f64| Some(middle(of, &rounds)).filter(|v| v.is_finite());
        points.push((of(|round| round.floor), of(|round| round.edge)));
    }
    let line = |system, colour, dashed, points| Series { system, colour, dashed, points };
    let (floors, edges) = points.into_iter().unzip();
    section.plot(
        "throughput-edge.svg",
        Plot {
            title: "Receiving edge: processor time by number of streams of 1 Mbit/s",
            ticks: GROWTH.map(|streams| streams.to_string()).into(),
            scale: Scale::Linear,
            panels: vec![Panel {
                title: "% of a core".into(),
                series: vec![
                    line("floor", "#888", true, floors),
                    line("Downpour", "#0a58ca", false, edges),
                ],
            }],
        },
    );
    Ok(section)
}

pub fn child(role: &str, arguments: &[&str]) -> io::Result<()> {
    match (role, arguments) {
        ("floor", [address]) => floor::run(address.parse().map_err(io::Error::other)?),
        _ => Err(io::Error::other(format!("unknown child process {role} {arguments:?}"))),
    }
}

/// The result of one round.
#[derive(Debug, Clone, Copy)]
struct Round {
    /// Datagrams per second sent to the edge during its turns.
    packets: f64,
    /// Processor time, in per cent of a core.
    edge: f64,
    floor: f64,
    /// Repaired packets, as a share of the packets sent to the edge.
    repaired: f64,
}

/// Shared by all measurements.
struct Bench<'a> {
    repair: Repair,
    /// Path of the measured downpour.
    program: &'a str,
}

impl Bench<'_> {
    /// Sends `streams` streams to an edge and to a floor in turns. Measures `rounds` rounds per entry
    /// of `losses`, which are in per cent, and returns them per entry.
    fn measure(
        &self,
        streams: u32,
        losses: &[u8],
        rounds: usize,
        turns: usize,
    ) -> io::Result<Vec<Vec<Round>>> {
        let mut setup = Setup::start(self, streams)?;
        let mut results = vec![Vec::new(); losses.len()];
        for number in 1..=rounds {
            for (&loss, results) in losses.iter().zip(&mut results) {
                let round = setup.round(loss, turns)?;
                eprintln!(
                    "{streams} streams, {loss} % lost, round {number}: edge {:.1} %, floor {:.1} %, \
                     {:.2} x",
                    round.edge,
                    round.floor,
                    round.edge / round.floor
                );
                results.push(round);
            }
        }
        setup.check_counts()?;
        Ok(results)
    }
}

/// An edge and a floor that receive the same streams.
struct Setup {
    source: Source,
    edge: Process,
    floor: Process,
    /// HTTP address of the edge.
    http: SocketAddr,
    floor_rtp: SocketAddr,
    dir: TempDir,
    _shutdown: DropGuard,
}

impl Setup {
    fn start(bench: &Bench<'_>, streams: u32) -> io::Result<Self> {
        let origin = OutgoingStreams::new();
        let shutdown = CancellationToken::new();
        let quic = bench.repair.serve(&origin, shutdown.clone())?;
        let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
        let [edge_rtp, floor_rtp, http] = [(); 3].map(|()| free_address());
        let config = format!(
            "udp_addr: {edge_rtp}\nflv_addr: {http}\ncloud_host: 127.0.0.1\nquic_addr: {quic}\n\
             insecure: true\nmax_streams: {streams}\ngop_cache_max_ms: {LOG_MS}\n"
        );
        std::fs::write(dir.path().join("node.yaml"), config)?;
        let mut edge =
            Process::start(dir.path(), "edge", bench.program, &["edge", "--config", "node.yaml"])?;
        let floor =
            Process::start_child(dir.path(), "floor", "edge-floor", &[&floor_rtp.to_string()])?;
        wait_for("the edge responds", PATIENCE, || Ok(http_get(http, "/healthz").is_ok()))?;

        let source = Source::start(streams, &origin, [edge_rtp, floor_rtp])?;
        wait_for("the edge has all streams", PATIENCE, || {
            edge.check()?;
            let metrics = http_get(http, "/metrics")?;
            let received = samples(&metrics)
                .filter(|(name, _)| name.starts_with("downpour_edge_stream_pending_packets"));
            Ok(received.count() == streams as usize)
        })?;
        std::thread::sleep(WARM_UP);
        let _shutdown = shutdown.drop_guard();
        Ok(Self { source, edge, floor, http, floor_rtp, dir, _shutdown })
    }

    /// Measures the floor and the edge in `turns` turns each, with a loss in per cent.
    fn round(&mut self, loss: u8, turns: usize) -> io::Result<Round> {
        self.source.set_loss(loss);
        std::thread::sleep(SETTLE);
        let (mut sent, mut cpu, mut lasted) = ([0; 2], [0.0; 2], [0.0; 2]);
        let repaired = PacketCounts::read(self.http)?.repaired;
        for _ in 0..turns {
            for target in [Target::Floor, Target::Edge] {
                self.source.set_turn(target);
                std::thread::sleep(BETWEEN_TURNS);
                self.edge.check()?;
                self.floor.check()?;
                let process = if target == Target::Edge { &self.edge } else { &self.floor };
                let snapshot = || (Instant::now(), self.source.sent(target), process.cpu_seconds());
                let before = snapshot();
                std::thread::sleep(TURN);
                let after = snapshot();
                let i = target as usize;
                lasted[i] += after.0.duration_since(before.0).as_secs_f64();
                sent[i] += after.1 - before.1;
                cpu[i] += after.2 - before.2;
            }
        }
        let repaired = PacketCounts::read(self.http)?.repaired - repaired;
        let share = |target: Target| 100.0 * cpu[target as usize] / lasted[target as usize];
        let edge = Target::Edge as usize;
        Ok(Round {
            packets: sent[edge] as f64 / lasted[edge],
            edge: share(Target::Edge),
            floor: share(Target::Floor),
            repaired: repaired / sent[edge].max(1) as f64,
        })
    }

    /// Stops the source, and checks that both received the packets.
    ///
    /// # Errors
    /// If the floor read too few, or the edge lost one.
    fn check_counts(&mut self) -> io::Result<()> {
        self.source.stop()?;
        let sent = self.source.sent(Target::Floor);
        let read = floor::ask_count(self.floor_rtp, &self.dir.path().join("floor.log"))?;
        // Datagrams that the floor did not read did not cost it processor time.
        if (read as f64) < MIN_READ * sent as f64 {
            return Err(io::Error::other(format!(
                "the floor read {read} of {sent} datagrams: the machine is too busy"
            )));
        }
        if read < sent {
            eprintln!("the floor read {read} of {sent} datagrams: the machine is busy");
        }
        let sent = self.source.sent(Target::Edge);
        // The edge updates its counters a few times per second.
        wait_for("the edge has counted all datagrams", PATIENCE, || {
            Ok(PacketCounts::read(self.http)?.received >= sent as f64)
        })?;
        let lost = PacketCounts::read(self.http)?.lost;
        if lost > 0.0 {
            return Err(io::Error::other(format!("the edge lost {lost} packets after repair")));
        }
        Ok(())
    }
}

/// Packet counters of the edge.
struct PacketCounts {
    received: f64,
    repaired: f64,
    lost: f64,
}

impl PacketCounts {
    fn read(edge: SocketAddr) -> io::Result<Self> {
        let text = http_get(edge, "/metrics")?;
        let sum = |fate: &str| -> f64 {
            let prefix = format!("downpour_edge_packets_total{{fate=\"{fate}");
            samples(&text).filter(|(name, _)| name.starts_with(&prefix)).map(|(_, n)| n).sum()
        };
        Ok(Self { received: sum("received\""), repaired: sum("repaired_"), lost: sum("lost\"") })
    }
}

/// Streams of the measurement with a goal.
const STREAMS: u32 = 200;
/// Numbers of streams in the plot.
const GROWTH: [u32; 5] = [25, 50, 100, STREAMS, 400];
/// Per cent.
const LOSS: u8 = 5;
/// Maximum ratio to the floor.
const GOAL: f64 = 1.5;
const PATIENCE: Duration = Duration::from_secs(20);
/// Length of the streams' logs: two groups of pictures.
const LOG_MS: u64 = 4000;
/// Time until the logs are full: new memory costs page faults.
const WARM_UP: Duration = Duration::from_millis(LOG_MS + 1000);
/// Minimum share of the datagrams that the floor must read. On a busy machine, the kernel drops some.
const MIN_READ: f64 = 0.95;
/// Short, so that other work on the machine affects both alike.
const TURN: Duration = Duration::from_millis(300);
/// Time for the last datagrams and repairs of a turn.
const BETWEEN_TURNS: Duration = Duration::from_millis(100);
/// Time for repairs from before a change of the loss.
const SETTLE: Duration = Duration::from_secs(1);
