//! One stream to many viewers of an edge, beside a loop that writes the same bytes once a frame.

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
use media::{BYTES_A_SECOND, FRAMES_A_SECOND};
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
    /// Measured each time: whole groups of pictures.
    seconds: u64,
    /// Numbers of viewers in every round, with their goals.
    goals: &'static [usize],
    /// And in the first one, for the plot.
    growth: &'static [usize],
    /// Until those who read nothing have their buffers full.
    stall: Duration,
}

const QUICK: Plan =
    Plan { rounds: 1, seconds: 2, goals: &[1000], growth: &[], stall: Duration::from_secs(10) };
const FULL: Plan = Plan {
    rounds: 3,
    seconds: 2,
    goals: &[1000, 5000],
    growth: &[2000, 3000, 4000],
    stall: Duration::from_secs(10),
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

/// Something that viewers can come to.
struct Server {
    name: &'static str,
    process: Process,
    address: SocketAddr,
    /// Bytes of memory before there ever was a viewer.
    empty: u64,
}

/// Processor time as a share of a core, by number of viewers.
#[derive(Default)]
struct Measured {
    plain: BTreeMap<usize, Vec<f64>>,
    merging: BTreeMap<usize, Vec<f64>>,
    floor: BTreeMap<usize, Vec<f64>>,
    stalled: Vec<f64>,
    /// Bytes a viewer, by number of viewers.
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
            Ok(Server { name, process, address, empty: 0 })
        };
        let (mut plain, mut merging) = (edge("edge", 0)?, edge("edge-merging", MERGE_MS)?);
        let child = |name, role: &str| -> io::Result<_> {
            let address = free_address();
            let process = Process::start_child(dir.path(), name, role, &[&address.to_string()])?;
            Ok((process, address))
        };
        let (process, address) = child("floor", "viewers-floor")?;
        let floor = Server { name: "floor", process, address, empty: 0 };
        let (sink_process, sink) = child("sink", "viewers-sink")?;
        for edge in [&mut plain, &mut merging] {
            wait_for("an edge answers", PATIENCE, || {
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
        plain.empty = plain.process.resident_bytes();
        let _sink = sink_process;
        Ok(Self { plan, plain, merging, floor, sink, _sink, _source: source, _dir: dir })
    }

    fn round(&mut self, round: usize, measured: &mut Measured) -> io::Result<()> {
        let plan = self.plan;
        let (sink, seconds) = (&mut self.sink, plan.seconds);
        let mut measure =
            |server: &mut Server, viewers, stalled| server.measure(sink, viewers, stalled, plan);
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
                put(&mut measured.plain, viewers, measure(&mut self.plain, viewers, 0)?.share);
                put(&mut measured.floor, viewers, measure(&mut self.floor, viewers, 0)?.share);
            }
        }
        for &viewers in plan.goals {
            let plain = measure(&mut self.plain, viewers, 0)?;
            put(&mut measured.plain, viewers, plain.share);
            put(&mut measured.floor, viewers, measure(&mut self.floor, viewers, 0)?.share);
            put(&mut measured.merging, viewers, measure(&mut self.merging, viewers, 0)?.share);
            if round == 0 {
                let grown = plain.resident.saturating_sub(self.plain.empty);
                measured.memory.insert(viewers, grown as f64 / viewers as f64);
            }
        }
        if round < STALLED_ROUNDS {
            measured.stalled.push(measure(&mut self.plain, HALF * 2, HALF)?.share);
        }
        Ok(())
    }
}

/// What came out for one server and number of viewers.
struct Taken {
    /// Of one core.
    share: f64,
    resident: u64,
}

impl Server {
    /// Again if it was disturbed: other work on the machine can keep anyone from its time.
    fn measure(
        &mut self,
        sink: &mut Sink,
        viewers: usize,
        stalled: usize,
        plan: &Plan,
    ) -> io::Result<Taken> {
        for _ in 1..TRIES {
            match self.try_measure(sink, viewers, stalled, plan) {
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    eprintln!("again, for {error}");
                }
                result => return result,
            }
        }
        self.try_measure(sink, viewers, stalled, plan)
    }

    /// An error of invalid data is one of what was measured.
    fn try_measure(
        &mut self,
        sink: &mut Sink,
        viewers: usize,
        stalled: usize,
        plan: &Plan,
    ) -> io::Result<Taken> {
        self.process.check()?;
        sink.join(self.address, viewers, stalled)?;
        std::thread::sleep(if stalled > 0 { plan.stall } else { SETTLE });
        // Those who came first have much to read when the last one has come.
        wait_for("the viewers have caught up", PATIENCE, || {
            sink.begin()?;
            std::thread::sleep(SETTLE);
            let speed =
                sink.count()?.all as f64 / (viewers - stalled) as f64 / SETTLE.as_secs_f64();
            Ok((speed / BYTES_A_SECOND - 1.0).abs() < 0.4)
        })?;
        let before = if stalled > 0 { self.sent()? } else { 0.0 };
        sink.begin()?;
        let (began, cpu) = (Instant::now(), self.process.cpu_seconds());
        std::thread::sleep(Duration::from_secs(plan.seconds));
        let (seconds, cpu) = (began.elapsed().as_secs_f64(), self.process.cpu_seconds() - cpu);
        let count = sink.count()?;
        let sent = if stalled > 0 { self.sent()? - before } else { 0.0 };
        let resident = self.process.resident_bytes();
        sink.leave()?;
        let reading = (viewers - stalled) as f64;
        let speed = count.all as f64 / reading / seconds;
        // By the media that came, lest one that is held up seem cheap.
        let share = cpu / seconds * BYTES_A_SECOND / speed;
        eprintln!(
            "{}: {viewers} viewers, {stalled} of which read nothing: {:.1} % of a core, {:.2} µs a \
             viewer and frame, {:.0} kbit/s each ({} to {} bytes)",
            self.name,
            share * 100.0,
            share * 1e6 / viewers as f64 / FRAMES_A_SECOND,
            speed * 8.0 / 1000.0,
            count.least,
            count.most,
        );
        let fail = |what: String| {
            let what = format!("{}: {what}", self.name);
            Err(io::Error::new(io::ErrorKind::InvalidData, what))
        };
        if (speed / BYTES_A_SECOND - 1.0).abs() > 0.15 {
            return fail(format!("{speed:.0} bytes/s a viewer instead of {BYTES_A_SECOND:.0}"));
        }
        if count.most - count.least > SPREAD {
            return fail(format!("viewers got {} to {} bytes", count.least, count.most));
        }
        if stalled > 0 && sent > 1.05 * BYTES_A_SECOND * seconds * reading {
            return fail("who reads nothing still gets bytes: the buffers are not full".into());
        }
        // The next one finds the server without viewers.
        std::thread::sleep(SETTLE);
        Ok(Taken { share, resident })
    }

    /// Bytes that an edge has written to viewers.
    fn sent(&self) -> io::Result<f64> {
        let text = http_get(self.address, "/metrics")?;
        let sent = samples(&text).find(|(name, _)| *name == "downpour_http_viewer_bytes_total");
        sent.map(|(_, sent)| sent).ok_or_else(|| io::Error::other("an edge counts no bytes"))
    }
}

fn report(plan: &Plan, measured: &Measured) -> Section {
    let mut section = Section::default();
    let each = |shares: &[f64], viewers: usize| -> Vec<f64> {
        shares.iter().map(|share| share * 1e6 / viewers as f64 / FRAMES_A_SECOND).collect()
    };
    let mut rows = Vec::new();
    for (of, what, goal) in [
        (&measured.plain, String::new(), 1.4),
        (&measured.merging, format!(", merge_write_ms: {MERGE_MS}"), 0.5),
    ] {
        for viewers in plan.goals {
            rows.push(Comparison {
                work: format!("one stream to {viewers} viewers{what}"),
                unit: "µs a viewer and frame",
                floor: each(&measured.floor[viewers], *viewers),
                ours: each(&of[viewers], *viewers),
                goal: Some(goal),
                ..Comparison::default()
            });
        }
    }
    let per_cent = |shares: &[f64]| shares.iter().map(|share| share * 100.0).collect::<Vec<_>>();
    rows.push(Comparison {
        work: format!(
            "{} viewers of which {HALF} have stopped reading; in place of the floor, Downpour where \
             all read",
            HALF * 2
        ),
        unit: "% of a core",
        floor: per_cent(&measured.plain[&(HALF * 2)]),
        ours: per_cent(&measured.stalled),
        goal: Some(1.0),
        ..Comparison::default()
    });
    section.table(&rows);
    let memory: Vec<_> = measured
        .memory
        .iter()
        .map(|(viewers, bytes)| format!("{:.1} KB with {viewers}", bytes / 1000.0))
        .collect();
    section.say(&format!(
        "Memory of the edge's process for each viewer, its growth from no viewer by their number: {} \
         (goal: at most 60 KB). The edge without viewers, which receives the stream: {:.1} % of a \
         core, which is in its figures.",
        memory.join(", "),
        median(&measured.plain[&0]) * 100.0,
    ));
    if !plan.growth.is_empty() {
        section.plot("throughput-viewers.svg", growth(measured));
    }
    section
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
/// Viewers of whom the other half stop reading.
const HALF: usize = 500;
/// Rounds in which they do, for it takes long.
const STALLED_ROUNDS: usize = 2;
/// Bytes that one viewer may be ahead of another when they are counted: what is written within 350 ms
/// and a key frame.
const SPREAD: u64 = 20_000;
const WARM_UP: Duration = Duration::from_secs(4);
const SETTLE: Duration = Duration::from_millis(500);
const TRIES: usize = 4;
const PATIENCE: Duration = Duration::from_secs(20);
