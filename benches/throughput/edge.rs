//! What it costs an edge to receive many streams, beside a floor that only reads the same datagrams,
//! with GRO, and counts. Nobody watches.
//!
//! The two take short turns. In the same second, whichever the source sends to first would pay
//! for waking an idle processor, and the other would not.

mod floor;
mod source;

use std::{
    io,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use downpour_distribution::downstream::outgoing::OutgoingStreams;
use tokio_util::sync::CancellationToken;

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
        return Err(io::Error::other("a measurement is missing"));
    };

    let mut section = Section::default();
    let row = |loss: u8, rounds: &[Round]| Comparison {
        work: format!("{STREAMS} streams of 1 Mbit/s, {loss} % left out"),
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
    section.say(&format!(
        "{:.0} packets a second; with {LOSS} % left out the edge had {:.1} % sent again. It lost none \
         for good.",
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
            title: "An edge that receives: processor time by number of streams of 1 Mbit/s",
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
        _ => Err(io::Error::other(format!("there is no program {role} {arguments:?}"))),
    }
}

/// What one round came to.
#[derive(Debug, Clone, Copy)]
struct Round {
    /// Datagrams sent to each of the two, a second.
    packets: f64,
    /// Processor time, in per cent of a core.
    edge: f64,
    floor: f64,
    /// Packets that the edge had sent again, as a share of those that it was sent.
    repaired: f64,
}

/// What all measurements share.
struct Bench<'a> {
    repair: Repair,
    /// The downpour that is measured.
    program: &'a str,
}

impl Bench<'_> {
    /// An edge and a floor that both get `streams` streams, of which each share of `losses`, in per
    /// cent, is left out in turn; the rounds of each.
    fn measure(
        &self,
        streams: u32,
        losses: &[u8],
        rounds: usize,
        turns: usize,
    ) -> io::Result<Vec<Vec<Round>>> {
        let origin = OutgoingStreams::new();
        let shutdown = CancellationToken::new();
        let _shutdown = shutdown.clone().drop_guard();
        let quic = self.repair.serve(&origin, shutdown)?;
        let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
        let [edge_rtp, floor_rtp, flv] = [(); 3].map(|()| free_address());
        let config = format!(
            "udp_addr: {edge_rtp}\nflv_addr: {flv}\ncloud_host: 127.0.0.1\nquic_addr: {quic}\n\
             insecure: true\nmax_streams: {streams}\ngop_cache_max_ms: {LOG_MS}\n"
        );
        std::fs::write(dir.path().join("node.yaml"), config)?;
        let mut edge =
            Process::start(dir.path(), "edge", self.program, &["edge", "--config", "node.yaml"])?;
        let mut floor =
            Process::start_child(dir.path(), "floor", "edge-floor", &[&floor_rtp.to_string()])?;
        wait_for("the edge answers", PATIENCE, || Ok(http_get(flv, "/healthz").is_ok()))?;

        let mut source = Source::start(streams, &origin, [edge_rtp, floor_rtp])?;
        wait_for("the edge has all streams", PATIENCE, || {
            edge.check()?;
            let metrics = http_get(flv, "/metrics")?;
            let streams_there = samples(&metrics)
                .filter(|(name, _)| name.starts_with("downpour_edge_stream_pending_packets"));
            Ok(streams_there.count() == streams as usize)
        })?;
        std::thread::sleep(WARM_UP);

        let mut results = vec![Vec::new(); losses.len()];
        for number in 0..rounds {
            for (&loss, results) in losses.iter().zip(&mut results) {
                source.set_loss(loss);
                std::thread::sleep(SETTLE);
                let (mut sent, mut cpu, mut lasted) = ([0; 2], [0.0; 2], [0.0; 2]);
                let repaired = Fates::read(flv)?.repaired;
                for _ in 0..turns {
                    for target in [Target::Floor, Target::Edge] {
                        source.set_turn(target);
                        std::thread::sleep(BETWEEN_TURNS);
                        edge.check()?;
                        floor.check()?;
                        let process = if target == Target::Edge { &edge } else { &floor };
                        let look = || (Instant::now(), source.sent(target), process.cpu_seconds());
                        let before = look();
                        std::thread::sleep(TURN);
                        let after = look();
                        let i = target as usize;
                        lasted[i] += after.0.duration_since(before.0).as_secs_f64();
                        sent[i] += after.1 - before.1;
                        cpu[i] += after.2 - before.2;
                    }
                }
                let repaired = Fates::read(flv)?.repaired - repaired;
                let per_second = |i: usize| sent[i] as f64 / lasted[i];
                let share = |target: Target| 100.0 * cpu[target as usize] / lasted[target as usize];
                let round = Round {
                    packets: per_second(Target::Edge as usize),
                    edge: share(Target::Edge),
                    floor: share(Target::Floor),
                    repaired: repaired / sent[Target::Edge as usize].max(1) as f64,
                };
                eprintln!(
                    "{streams} streams, {loss} % left out, round {}: edge {:.1} %, floor {:.1} %, \
                     {:.2} x",
                    number + 1,
                    round.edge,
                    round.floor,
                    round.edge / round.floor
                );
                results.push(round);
            }
        }
        source.stop()?;
        let sent = source.sent(Target::Floor);
        let floor_count = floor::ask_count(floor_rtp, &dir.path().join("floor.log"))?;
        // What it did not read did not cost it anything either.
        if (floor_count as f64) < MUST_READ * sent as f64 {
            return Err(io::Error::other(format!(
                "the floor read {floor_count} of {sent} datagrams: the machine is too busy"
            )));
        }
        if floor_count < sent {
            eprintln!("the floor read {floor_count} of {sent} datagrams: the machine is busy");
        }
        let sent = source.sent(Target::Edge);
        // It counts a few times a second.
        wait_for("the edge has counted all datagrams", PATIENCE, || {
            Ok(Fates::read(flv)?.received >= sent as f64)
        })?;
        let lost = Fates::read(flv)?.lost;
        if lost > 0.0 {
            return Err(io::Error::other(format!("the edge lost {lost} packets for good")));
        }
        Ok(results)
    }
}

/// What the edge counted.
struct Fates {
    received: f64,
    repaired: f64,
    lost: f64,
}

impl Fates {
    fn read(edge: SocketAddr) -> io::Result<Self> {
        let text = http_get(edge, "/metrics")?;
        let fates = |start: &str| -> f64 {
            let wanted = format!("downpour_edge_packets_total{{fate=\"{start}");
            samples(&text).filter(|(name, _)| name.starts_with(&wanted)).map(|(_, n)| n).sum()
        };
        Ok(Self {
            received: fates("received\""),
            repaired: fates("repaired_"),
            lost: fates("lost\""),
        })
    }
}

const STREAMS: u32 = 200;
const GROWTH: [u32; 5] = [25, 50, 100, STREAMS, 400];
const LOSS: u8 = 5;
/// Floors: what issue 4 allows.
const GOAL: f64 = 1.5;
const PATIENCE: Duration = Duration::from_secs(20);
/// How far back the streams' logs reach: two groups of pictures.
const LOG_MS: u64 = 4000;
/// Until the logs are full: memory that is new costs page faults.
const WARM_UP: Duration = Duration::from_millis(LOG_MS + 1000);
/// Share of what it was sent: the kernel drops the rest where the floor does not get its turn.
const MUST_READ: f64 = 0.95;
/// Short, so that what else the machine does is the same in the turns of both.
const TURN: Duration = Duration::from_millis(300);
/// For what is still under way, and what is still missing.
const BETWEEN_TURNS: Duration = Duration::from_millis(100);
/// For what was lost before the loss changed.
const SETTLE: Duration = Duration::from_secs(1);
