//! One stream to many viewers of an edge, beside a loop that writes the same bytes once per frame.

mod floor;
mod media;
mod sink;
mod source;

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    common::{
        plot::{Panel, Plot, Scale, Series},
        process::{Process, free_address, http_get, samples, wait_for},
    },
    table::{Comparison, Section, median},
};
use media::{BYTES_PER_SECOND, FRAMES_PER_SECOND};
use sink::Sink;
use source::Source;

pub fn run(quick: bool, program: &str) -> io::Result<Section> {
    let plan = if quick { &QUICK } else { &FULL };
    let mut bench = Bench::start(plan, program)?;
    let mut measured = Measured::default();
    for round in 0..plan.rounds {
        bench.round(round, &mut measured)?;
    }
    Ok(report(plan, &measured))
}

pub fn child(role: &str, arguments: &[&str]) -> io::Result<()> {
    let address = arguments.first().and_then(|address| address.parse().ok());
    let address = address.ok_or_else(|| io::Error::other("give an address"))?;
    match role {
        "floor" => floor::run(address),
        "sink" => sink::run(address),
        _ => Err(io::Error::other(format!("there is no program {role}"))),
    }
}

struct Plan {
    rounds: usize,
    /// Length of a measurement: whole groups of pictures.
    seconds: u64,
    /// Numbers of viewers that are measured in every round and have goals.
    goals: &'static [usize],
    /// Further numbers of viewers in the first round, for the plot.
    growth: &'static [usize],
    /// With slow viewers: time before the measurement.
    slow_settle: Duration,
    /// With slow viewers: seconds of the measurement.
    slow: u64,
}

const QUICK: Plan = Plan {
    rounds: 1,
    seconds: 2,
    goals: &[1000],
    growth: &[],
    slow_settle: Duration::from_secs(1),
    slow: 3,
};
const FULL: Plan = Plan {
    rounds: 3,
    seconds: 2,
    goals: &[1000, 5000],
    growth: &[2000, 3000, 4000],
    slow_settle: Duration::from_secs(4),
    slow: 6,
};

struct Bench {
    plan: &'static Plan,
    plain: Server,
    merging: Server,
    floor: Server,
    sink: Sink,
    _sink: Process,
    _source: Source,
    _dir: tempfile::TempDir,
}

/// A server of the stream: an edge or the floor.
struct Server {
    name: &'static str,
    process: Process,
    address: SocketAddr,
    /// Bytes of memory before the first viewer; `None` for the floor.
    empty: Option<u64>,
}

/// Processor time in cores, by number of viewers.
#[derive(Default)]
struct Measured {
    plain: BTreeMap<usize, Vec<f64>>,
    merging: BTreeMap<usize, Vec<f64>>,
    floor: BTreeMap<usize, Vec<f64>>,
    slow: Vec<SlowViewers>,
    /// Bytes of memory per viewer, by number of viewers.
    memory: BTreeMap<usize, f64>,
}

impl Bench {
    fn start(plan: &'static Plan, program: &str) -> io::Result<Self> {
        let dir = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
        let source = Source::new()?;
        let mut rtp = Vec::new();
        let mut edge = |name: &'static str, merge: u64| -> io::Result<Server> {
            let (udp, address) = (free_address(), free_address());
            rtp.push(udp);
            let config = format!(
                "udp_addr: {udp}\nflv_addr: {address}\ncloud_host: 127.0.0.1\nquic_addr: {}\n\
                 insecure: true\nlog_level: warn\n{}",
                source.quic,
                if merge > 0 { format!("merge_write_ms: {merge}\n") } else { String::new() },
            );
            std::fs::write(dir.path().join(format!("{name}.yaml")), config)?;
            let arguments = ["edge", "--config", &format!("{name}.yaml")];
            let process = Process::start(dir.path(), name, program, &arguments)?;
            Ok(Server { name, process, address, empty: Some(0) })
        };
        let (mut plain, mut merging) = (edge("edge", 0)?, edge("edge-merging", MERGE_MS)?);
        let child = |name, role: &str| -> io::Result<_> {
            let address = free_address();
            let process = Process::start_child(dir.path(), name, role, &[&address.to_string()])?;
            Ok((process, address))
        };
        let (process, address) = child("floor", "viewers-floor")?;
        let floor = Server { name: "floor", process, address, empty: None };
        let (sink_process, sink) = child("sink", "viewers-sink")?;
        for edge in [&mut plain, &mut merging] {
            wait_for("an edge responds", PATIENCE, || {
                Ok(http_get(edge.address, "/healthz").is_ok())
            })?;
        }
        source.publish(rtp)?;
        for edge in [&mut plain, &mut merging] {
            wait_for("an edge has the stream", PATIENCE, || {
                edge.process.check()?;
                Ok(http_get(edge.address, "/healthz")?.contains(r#""streams":1"#))
            })?;
        }
        let mut connected = None;
        wait_for("the viewers are ready", PATIENCE, || {
            connected = Sink::connect(sink).ok();
            Ok(connected.is_some())
        })?;
        let sink = connected.ok_or_else(|| io::Error::other("no viewers"))?;
        std::thread::sleep(WARM_UP);
        plain.empty = Some(plain.process.resident_bytes());
        let _sink = sink_process;
        Ok(Self { plan, plain, merging, floor, sink, _sink, _source: source, _dir: dir })
    }

    fn round(&mut self, round: usize, measured: &mut Measured) -> io::Result<()> {
        let plan = self.plan;
        let (sink, seconds) = (&mut self.sink, plan.seconds);
        let mut measure = |server: &mut Server, viewers| server.measure(sink, viewers, plan);
        let put = |to: &mut BTreeMap<usize, Vec<f64>>, viewers, share| {
            to.entry(viewers).or_default().push(share);
        };
        if round == 0 {
            let before = self.plain.process.cpu_seconds();
            std::thread::sleep(Duration::from_secs(seconds));
            let idle = (self.plain.process.cpu_seconds() - before) / seconds as f64;
            put(&mut measured.plain, 0, idle);
            put(&mut measured.floor, 0, 0.0);
            for &viewers in plan.growth {
                put(&mut measured.plain, viewers, measure(&mut self.plain, viewers)?.share);
                put(&mut measured.floor, viewers, measure(&mut self.floor, viewers)?.share);
            }
        }
        for &viewers in plan.goals {
            let plain = measure(&mut self.plain, viewers)?;
            put(&mut measured.plain, viewers, plain.share);
            put(&mut measured.floor, viewers, measure(&mut self.floor, viewers)?.share);
            put(&mut measured.merging, viewers, measure(&mut self.merging, viewers)?.share);
            if round == 0 {
                let grown = plain.resident.saturating_sub(self.plain.empty.unwrap_or(0));
                measured.memory.insert(viewers, grown as f64 / viewers as f64);
            }
        }
        if round < SLOW_ROUNDS {
            measured.slow.push(self.plain.measure_slow(&mut self.sink, plan)?);
        }
        Ok(())
    }
}

/// A measurement of one server with a number of viewers.
struct Measurement {
    /// Processor time in cores.
    share: f64,
    resident: u64,
    seconds: f64,
    /// Bytes that the edge wrote to viewers; 0 for the floor.
    sent: f64,
    /// Bytes received by stalled or slow viewers.
    slow_bytes: f64,
}

/// A measurement in which half of the viewers are stalled, then slow.
struct SlowViewers {
    /// Processor time in cores while they read nothing.
    stalled: f64,
    /// Processor time in cores while they read slowly.
    slow: f64,
    /// Share of the stream that they read.
    part: f64,
    /// Viewers that were behind at the end.
    behind: f64,
}

impl Server {
    /// Measures with `viewers` viewers that read everything.
    fn measure(&mut self, sink: &mut Sink, viewers: usize, plan: &Plan) -> io::Result<Measurement> {
        self.retry(sink, |server, sink| {
            server.connect(sink, viewers, 0, SETTLE)?;
            server.sample_load(sink, viewers, plan.seconds)
        })
    }

    /// Measures with [`HALF`] viewers that read everything and as many that read nothing, then slowly.
    fn measure_slow(&mut self, sink: &mut Sink, plan: &Plan) -> io::Result<SlowViewers> {
        self.retry(sink, |server, sink| {
            server.connect(sink, HALF, HALF, STALL)?;
            let stalled = server.sample_load(sink, HALF, plan.seconds)?;
            if stalled.sent > 1.05 * BYTES_PER_SECOND * stalled.seconds * HALF as f64 {
                return Err(invalid("stalled viewers still get bytes: the buffers are not full"));
            }
            sink.read_slowly(SLOW * BYTES_PER_SECOND)?;
            std::thread::sleep(plan.slow_settle);
            let slow = server.sample_load(sink, HALF, plan.slow)?;
            let part = slow.slow_bytes / slow.seconds / BYTES_PER_SECOND / HALF as f64;
            let behind = server.sample("downpour_http_viewers_behind")?;
            eprintln!("slow viewers read {:.0} % of the rate; {behind} were behind", part * 100.0);
            if (part / SLOW - 1.0).abs() > 0.1 {
                return Err(invalid(&format!("slow viewers read {part:.2} of the stream's rate")));
            }
            Ok(SlowViewers { stalled: stalled.share, slow: slow.share, part, behind })
        })
    }

    /// Retries if other work on the machine disturbed the measurement, which is reported as an error
    /// of kind `InvalidData`.
    fn retry<T>(
        &mut self,
        sink: &mut Sink,
        mut measure: impl FnMut(&mut Self, &mut Sink) -> io::Result<T>,
    ) -> io::Result<T> {
        for left in (0..ATTEMPTS).rev() {
            self.process.check()?;
            let result = measure(self, sink);
            sink.leave()?;
            // The next measurement starts after the server has closed all viewers.
            std::thread::sleep(SETTLE);
            match result {
                Err(error) if error.kind() == io::ErrorKind::InvalidData && left > 0 => {
                    eprintln!("retry of {}: {error}", self.name);
                }
                result => return result,
            }
        }
        Err(io::Error::other("no attempts"))
    }

    /// Connects viewers, and waits for `settle` and until the reading ones have caught up.
    fn connect(
        &self,
        sink: &mut Sink,
        reading: usize,
        stalled: usize,
        settle: Duration,
    ) -> io::Result<()> {
        sink.join(self.address, reading + stalled, stalled)?;
        std::thread::sleep(settle);
        // The first viewers have a backlog after the last one has connected.
        wait_for("the viewers have caught up", PATIENCE, || {
            sink.begin()?;
            std::thread::sleep(SETTLE);
            let speed = sink.count()?.all as f64 / reading as f64 / SETTLE.as_secs_f64();
            Ok((speed / BYTES_PER_SECOND - 1.0).abs() < 0.4)
        })
    }

    /// Measures for `seconds`, in which `reading` viewers must receive the whole stream.
    fn sample_load(
        &self,
        sink: &mut Sink,
        reading: usize,
        seconds: u64,
    ) -> io::Result<Measurement> {
        let is_edge = self.empty.is_some();
        let sent = || if is_edge { self.sample(SENT) } else { Ok(0.0) };
        let before = sent()?;
        sink.begin()?;
        let (began, cpu) = (Instant::now(), self.process.cpu_seconds());
        std::thread::sleep(Duration::from_secs(seconds));
        let (seconds, cpu) = (began.elapsed().as_secs_f64(), self.process.cpu_seconds() - cpu);
        let count = sink.count()?;
        let sent = sent()? - before;
        let speed = count.all as f64 / reading as f64 / seconds;
        // Relative to the received media, so that a server that falls behind does not seem cheap.
        let share = cpu / seconds * BYTES_PER_SECOND / speed;
        eprintln!(
            "{}: {reading} reading viewers: {:.1} % of a core, {:.2} µs per viewer and frame, \
             {:.0} kbit/s each ({} to {} bytes)",
            self.name,
            share * 100.0,
            share * 1e6 / reading as f64 / FRAMES_PER_SECOND,
            speed * 8.0 / 1000.0,
            count.least,
            count.most,
        );
        if (speed / BYTES_PER_SECOND - 1.0).abs() > 0.15 {
            let what = format!("{speed:.0} bytes/s per viewer instead of {BYTES_PER_SECOND:.0}");
            return Err(invalid(&what));
        }
        if count.most - count.least > SPREAD {
            return Err(invalid(&format!("viewers got {} to {} bytes", count.least, count.most)));
        }
        let resident = self.process.resident_bytes();
        Ok(Measurement { share, resident, seconds, sent, slow_bytes: count.slow as f64 })
    }

    /// Reads a sample of the edge's metrics.
    fn sample(&self, name: &str) -> io::Result<f64> {
        let text = http_get(self.address, "/metrics")?;
        let value = samples(&text).find(|(other, _)| *other == name).map(|(_, value)| value);
        value.ok_or_else(|| io::Error::other(format!("the edge has no metric {name}")))
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn report(plan: &Plan, measured: &Measured) -> Section {
    let mut section = Section::default();
    let mut rows = goal_rows(plan, measured);
    rows.extend(slow_rows(measured));
    section.table(&rows);
    let memory: Vec<_> = measured
        .memory
        .iter()
        .map(|(viewers, bytes)| format!("{:.1} KB with {viewers}", bytes / 1000.0))
        .collect();
    section.paragraph(&format!(
        "Memory of the edge's process per viewer, compared with no viewers: {} (goal: at most 60 KB). \
         The edge without viewers, which receives the stream, uses {:.1} % of a core; its figures \
         include that.",
        memory.join(", "),
        median(&measured.plain[&0]) * 100.0,
    ));
    let slow: Vec<_> = measured
        .slow
        .iter()
        .map(|one| {
            format!("{:.0} % of the stream, and {} were behind", one.part * 100.0, one.behind)
        })
        .collect();
    section.paragraph(&format!(
        "Slow viewers got {} at the end; the others got all of it. Slow viewers request segments of \
         536 bytes: with those of loopback, 64 KB, the kernel would buffer megabytes for each, which \
         take long to fill.",
        slow.join("; ")
    ));
    if !plan.growth.is_empty() {
        section.plot("throughput-viewers.svg", growth(measured));
    }
    section
}

/// Viewers that read everything, per number of viewers with a goal.
fn goal_rows(plan: &Plan, measured: &Measured) -> Vec<Comparison> {
    let per_frame = |shares: &[f64], viewers: usize| -> Vec<f64> {
        shares.iter().map(|share| share * 1e6 / viewers as f64 / FRAMES_PER_SECOND).collect()
    };
    let mut rows = Vec::new();
    for (of, settings, goal) in [
        (&measured.plain, String::new(), 1.4),
        (&measured.merging, format!(", merge_write_ms: {MERGE_MS}"), 0.5),
    ] {
        for viewers in plan.goals {
            rows.push(Comparison {
                work: format!("one stream to {viewers} viewers{settings}"),
                unit: "µs per viewer and frame",
                floor: per_frame(&measured.floor[viewers], *viewers),
                ours: per_frame(&of[viewers], *viewers),
                goal: Some(goal),
                ..Comparison::default()
            });
        }
    }
    rows
}

/// Stalled and slow viewers, compared with an edge whose viewers all read.
fn slow_rows(measured: &Measured) -> [Comparison; 2] {
    let per_cent = |shares: &[f64]| shares.iter().map(|share| share * 100.0).collect::<Vec<_>>();
    let row = |what: &str, of: fn(&SlowViewers) -> f64| Comparison {
        work: format!(
            "{} viewers of which {HALF} {what}; in place of the floor, Downpour where all read",
            HALF * 2
        ),
        unit: "% of a core",
        floor: per_cent(&measured.plain[&(HALF * 2)]),
        ours: per_cent(&measured.slow.iter().map(of).collect::<Vec<_>>()),
        goal: Some(1.0),
        ..Comparison::default()
    };
    let slow = format!("read {} % of the rate, after a stall", SLOW * 100.0);
    [row("have stopped reading", |one| one.stalled), row(&slow, |one| one.slow)]
}

fn growth(measured: &Measured) -> Plot {
    let numbers: Vec<usize> = measured.plain.keys().copied().collect();
    let series = |system, colour, of: &BTreeMap<usize, Vec<f64>>| Series {
        system,
        colour,
        dashed: false,
        points: numbers
            .iter()
            .map(|viewers| of.get(viewers).map(|shares| median(shares) * 100.0))
            .collect(),
    };
    Plot {
        title: "One stream of 212 kbit/s to many viewers",
        ticks: numbers.iter().map(|viewers| format!("{viewers}")).collect(),
        scale: Scale::Linear,
        panels: vec![Panel {
            title: "% of a core by viewers".into(),
            series: vec![
                series("Downpour", "#1f77b4", &measured.plain),
                series("floor", "#888888", &measured.floor),
                series("merging", "#2ca02c", &measured.merging),
            ],
        }],
    }
}

/// Milliseconds.
const MERGE_MS: u64 = 350;
/// Number of reading viewers, and of stalled or slow ones.
const HALF: usize = 500;
/// Rounds with slow viewers, which take long.
const SLOW_ROUNDS: usize = 1;
/// Read speed of slow viewers, as a share of the stream's rate.
const SLOW: f64 = 0.8;
/// Time until the buffers of stalled viewers are full.
const STALL: Duration = Duration::from_secs(8);
const SENT: &str = "downpour_http_viewer_bytes_total";
/// Maximum difference in bytes between two viewers: the media of 350 ms and a key frame.
const SPREAD: u64 = 20_000;
const WARM_UP: Duration = Duration::from_secs(2);
const SETTLE: Duration = Duration::from_millis(500);
const ATTEMPTS: usize = 4;
const PATIENCE: Duration = Duration::from_secs(20);
