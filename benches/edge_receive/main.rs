//! What it costs an edge to receive many streams, beside a floor that only reads the same datagrams;
//! `scripts/bench-edge` runs it and `docs/performance.md` says how it measures and holds what came
//! out.

#[path = "../common/mod.rs"]
mod common;
mod floor;
mod report;
mod source;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use common::process::{Process, free_address, http_get, samples};
use downpour::{
    origin::Origin,
    repair::server::{RepairServer, RepairServerMetrics, RepairServerSettings},
    tls::Identity,
};
use report::{Round, Rounds};
use source::Source;
use tokio_util::sync::CancellationToken;

/// Measures the processor time of an edge that receives many streams, and of a floor.
#[derive(Debug, Parser)]
#[command(name = "bench-edge")]
struct Options {
    /// Streams of 1 Mbit/s.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=2000))]
    streams: u32,
    /// Seconds measured in each round, at each loss.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Rounds, each of which has every loss.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// Packets left out, in per cent; may be given several times [default: 0 and 5].
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=50))]
    loss: Vec<u8>,
    /// Another build of downpour to measure; nothing is written then.
    #[arg(long, value_name = "PROGRAM")]
    edge: Option<PathBuf>,
    /// Is the floor: reads at this address and counts.
    #[arg(long, hide = true)]
    floor: Option<SocketAddr>,
    /// What cargo bench passes.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match options.floor {
        Some(address) => floor::run(address),
        None => bench(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-edge: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> io::Result<()> {
    let losses = if options.loss.is_empty() { vec![0, 5] } else { options.loss.clone() };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let identity = Identity::generate().map_err(io::Error::other)?;
    let origin = Origin::new();
    let metrics =
        RepairServerMetrics::register(&prometheus::Registry::new()).map_err(io::Error::other)?;
    let shutdown = CancellationToken::new();
    let quic = {
        let _inside = runtime.enter();
        let settings = RepairServerSettings::default();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = RepairServer::bind(any, &identity, origin.clone(), settings, metrics)
            .map_err(io::Error::other)?;
        let address = server.local_addr()?;
        runtime.spawn(server.run(shutdown.clone()));
        address
    };

    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let dir = tempfile::tempdir_in(scratch)?;
    let [edge_rtp, floor_rtp, flv] = [(); 3].map(|()| free_address());
    let config = format!(
        "udp_addr: {edge_rtp}\nflv_addr: {flv}\ncloud_host: 127.0.0.1\nquic_addr: {quic}\n\
         insecure: true\nmax_streams: {}\n",
        options.streams
    );
    std::fs::write(dir.path().join("node.yaml"), config)?;
    let program = options.edge.clone().unwrap_or_else(|| PROGRAM.into());
    let program = program.to_string_lossy();
    let mut edge =
        Process::start(dir.path(), "edge", &program, &["edge", "--config", "node.yaml"])?;
    let own = std::env::current_exe()?;
    let mut floor = Process::start(
        dir.path(),
        "floor",
        &own.to_string_lossy(),
        &["--floor", &floor_rtp.to_string()],
    )?;
    wait_for("the edge answers", || Ok(http_get(flv, "/healthz").is_ok()))?;

    let source = Source::start(options.streams, &origin, [edge_rtp, floor_rtp])?;
    wait_for("the edge has all streams", || {
        edge.check()?;
        let metrics = http_get(flv, "/metrics")?;
        let streams = samples(&metrics)
            .filter(|(name, _)| name.starts_with("downpour_edge_stream_pending_packets"));
        Ok(streams.count() == options.streams as usize)
    })?;
    std::thread::sleep(WARM_UP);

    let mut rounds = Rounds::default();
    let count = options.rounds * losses.len() as u64;
    for number in 0..count {
        let loss = losses[(number % losses.len() as u64) as usize];
        source.set_loss(loss);
        std::thread::sleep(SETTLE);
        edge.check()?;
        floor.check()?;
        let look = || -> io::Result<_> {
            let sent = source.sent();
            let edge = (edge.cpu_seconds(), Fates::read(flv)?);
            Ok((Instant::now(), sent, edge, floor.cpu_seconds()))
        };
        let (began, sent, (edge_cpu, fates), floor_cpu) = look()?;
        std::thread::sleep(Duration::from_secs(options.seconds));
        let (ended, sent_then, (edge_cpu_then, fates_then), floor_cpu_then) = look()?;
        let round = Round {
            seconds: ended.duration_since(began).as_secs_f64(),
            packets: sent_then - sent,
            edge_cpu: edge_cpu_then - edge_cpu,
            floor_cpu: floor_cpu_then - floor_cpu,
            repaired: fates_then.repaired - fates.repaired,
            lost: fates_then.lost - fates.lost,
        };
        eprintln!("[{}/{count}] {loss} % left out: {}", number + 1, round.line());
        rounds.add(loss, round);
    }

    let sent = source.stop()?;
    let floor_count = floor::ask_count(floor_rtp, &dir.path().join("floor.log"))?;
    if floor_count != sent {
        return Err(io::Error::other(format!(
            "the floor read {floor_count} of {sent} datagrams: the machine is too busy"
        )));
    }
    shutdown.cancel();
    print!("{}", rounds.table());
    if options.edge.is_none() && losses == [0, 5] {
        let path = report::write(options.streams, options.seconds, options.rounds, &rounds)?;
        eprintln!("wrote {}", path.display());
    }
    Ok(())
}

/// What the edge counted.
struct Fates {
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
        Ok(Self { repaired: fates("repaired_"), lost: fates("lost\"") })
    }
}

fn wait_for(what: &str, mut so: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if so()? {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(io::Error::other(format!("waited too long until {what}")))
}

/// Built by cargo together with this bench.
const PROGRAM: &str = env!("CARGO_BIN_EXE_downpour");
const PATIENCE: Duration = Duration::from_secs(20);
/// Until the streams' logs are full, which reach back 20 s: memory that is new costs page faults.
const WARM_UP: Duration = Duration::from_secs(22);
/// For what was lost before the loss changed.
const SETTLE: Duration = Duration::from_secs(1);
