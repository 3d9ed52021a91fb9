//! The delay of a tag from the encoder's write to the viewer's read of its last byte: through a real
//! cloud and a real edge, and through a minimal relay.

mod clock;
mod floor;
mod load;
mod publisher;
mod stamp;
mod viewer;

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::Path,
    time::Duration,
};

use downpour_sys::udp;
use quinn_udp::{UdpSockRef, UdpSocketState};

use self::{
    clock::{now, sleep_until},
    load::{CpuSnapshot, Load},
    publisher::{AUDIO_PER_FRAME, Plan},
    viewer::Received,
};
use crate::{
    common::{
        cpu,
        plot::{Panel, Plot, Scale, Series},
        process::{Process, free_address, http_get, samples, wait_for},
    },
    table::Section,
};

/// Measures both cases, each at a usual rate and at half load.
pub fn run(quick: bool, program: &str) -> io::Result<Section> {
    let cases = [
        // The real edge is in the middle of the list.
        Case { name: "1000 edges, 1 stream", edges: 1000, streams: 1, frames: 25.0, sample: 1 },
        Case { name: "1 edge, 1000 streams", edges: 1, streams: 1000, frames: 12.0, sample: 20 },
    ];
    let mut section = Section::default();
    let mut rows = String::from(
        "| work | system | video tags | missing | p50 | p90 | p99 | p99.9 | max | audio p50 | p99 | goal: p50 | \
         p99 |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut loads = String::new();
    let mut panels = Vec::new();
    let mut rounds = String::from(
        "| work, at half load | round | µs per `sendto` | floor: p50 | p99 | Downpour: p50 | p99 |\n\
         |---|---|---|---|---|---|---|\n",
    );
    for case in &cases {
        let (usual, mut halves) = case.run(quick, program)?;
        for (number, round) in halves.iter().enumerate() {
            rounds += &round.line(case, number + 1);
        }
        halves.sort_by(|a, b| at(&a.ours.video, 0.5).total_cmp(&at(&b.ours.video, 0.5)));
        let middle = halves.swap_remove(halves.len() / 2);
        for outcome in [usual, middle] {
            rows += &outcome.rows(case);
            loads += &outcome.load(case);
            panels.push(outcome.panel(case));
        }
    }
    section.paragraph(
        "Delays in milliseconds; the ratio is to the floor of the same run. Each line below the \
         table states how much of the machine other work took, at the same priority. Half load is \
         measured several times; the table has the round of the median p50.",
    );
    section.paragraph(&rows);
    section.paragraph(&loads);
    section.paragraph(
        "All rounds at half load. The speed of the machine at the time is shown by the processor \
         time of a bare `sendto` of 372 bytes to another edge's address, measured before and after \
         each round.",
    );
    section.paragraph(&rounds);
    let ticks = SHARES.iter().map(|(name, _)| (*name).to_owned()).collect();
    let title = "Delay of video tags on loopback, in ms";
    section.plot(
        "throughput-delay.svg",
        Plot { title, ticks, scale: Scale::Log { least: 0.01, most: 100.0 }, panels },
    );
    Ok(section)
}

pub fn child(role: &str, arguments: &[&str]) -> io::Result<()> {
    let wrong = || io::Error::other(format!("wrong arguments for delay-{role}: {arguments:?}"));
    match (role, arguments) {
        ("publisher", [system, to, run, plan @ ..]) => {
            let plan = Plan::parse(plan).ok_or_else(wrong)?;
            let to = to.parse().map_err(io::Error::other)?;
            publisher::run(System::parse(system).ok_or_else(wrong)?, to, run, &plan)
        }
        ("viewer", [system, from, run, begin, streams @ ..]) => {
            let streams: Vec<_> = streams.iter().filter_map(|stream| stream.parse().ok()).collect();
            let from = from.parse().map_err(io::Error::other)?;
            let begin = begin.parse().map_err(io::Error::other)?;
            viewer::run(System::parse(system).ok_or_else(wrong)?, from, run, begin, &streams)
        }
        ("floor", [publishers, viewers, edge, list]) => {
            let parse = |text: &str| text.parse().map_err(io::Error::other);
            floor::run(parse(publishers)?, parse(viewers)?, parse(edge)?, Path::new(list))
        }
        _ => Err(wrong()),
    }
}

/// The system under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum System {
    Downpour,
    Floor,
}

impl System {
    fn name(self) -> &'static str {
        match self {
            Self::Downpour => "Downpour",
            Self::Floor => "floor",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Downpour, Self::Floor].into_iter().find(|system| system.name() == text)
    }
}

struct Case {
    name: &'static str,
    edges: usize,
    streams: usize,
    /// Video frames per second and stream at the usual rate.
    frames: f64,
    /// Number of streams with a viewer.
    sample: usize,
}

impl Case {
    /// Measures at the usual rate, and several rounds at half load.
    fn run(&self, quick: bool, program: &str) -> io::Result<(Outcome, Vec<Outcome>)> {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
        self.run_in(dir.path(), quick, program).map_err(|error| {
            let logs = dir.keep();
            io::Error::other(format!("{error}; the logs are in {}", logs.display()))
        })
    }

    fn run_in(
        &self,
        dir: &Path,
        quick: bool,
        program: &str,
    ) -> io::Result<(Outcome, Vec<Outcome>)> {
        let mut setup = Setup::start(dir, self, program)?;
        let mut runs = 1..;
        let mut both = |frames: f64, seconds: f64, load: &'static str| -> io::Result<Outcome> {
            let mut measure = |setup: &mut Setup<'_>, system: System| {
                let run =
                    Run { case: self, system, frames, seconds, number: runs.next().unwrap_or(0) };
                let measured = setup.measure(&run)?;
                let [p50, p99] = [0.5, 0.99].map(|share| millis(&measured.video, share));
                eprintln!(
                    "   {}, {load}, {}: p50 {p50:.3} ms, p99 {p99:.3} ms; {}",
                    self.name,
                    system.name(),
                    measured.load.line()
                );
                io::Result::Ok(measured)
            };
            let before = setup.sendto_micros()?;
            let ours = measure(&mut setup, System::Downpour)?;
            let sendto = (before + setup.sendto_micros()?) / 2.0;
            let floor = measure(&mut setup, System::Floor)?;
            Ok(Outcome { frames, rate: load, sendto, ours, floor })
        };
        let usual = both(self.frames, if quick { 1.5 } else { 4.0 }, "a usual rate")?;
        // The load is nearly proportional to the frame rate.
        let frames = (self.frames * HALF / usual.ours.load.highest()).clamp(1.0, MAX_FRAMES);
        let (rounds, seconds) = if quick { (1, 2.0) } else { (ROUNDS, 6.0) };
        let mut halves = Vec::new();
        for _ in 0..rounds {
            halves.push(both(frames, seconds, "half load")?);
        }
        Ok((usual, halves))
    }

    /// The addresses of the edges, with `edge` in the middle. The others are loopback addresses with
    /// the port of a sink.
    fn edge_list(&self, edge: SocketAddr, sink_port: u16) -> Vec<String> {
        let others = (1..self.edges)
            .map(|n| SocketAddr::from(([127, 1, (n >> 8) as u8, (n & 0xff) as u8], sink_port)));
        let mut list: Vec<_> = others.collect();
        list.insert(list.len() / 2, edge);
        list.iter().map(ToString::to_string).collect()
    }

    /// Bytes of a frame and of a key frame.
    fn bodies(&self) -> (usize, usize) {
        match self.streams {
            1 => (4_500, 25_000),
            _ => (700, 5_000),
        }
    }
}

/// The processes of both systems.
struct Setup<'a> {
    dir: &'a Path,
    cloud: Process,
    edge: Process,
    floor: Process,
    rtmp: SocketAddr,
    flv: SocketAddr,
    floor_in: SocketAddr,
    floor_out: SocketAddr,
    /// The socket of the other edges. Nothing reads it.
    others: UdpSocket,
}

/// One measurement.
struct Run<'a> {
    case: &'a Case,
    system: System,
    /// Video frames per second and stream.
    frames: f64,
    seconds: f64,
    /// Part of the stream names, so that they are new.
    number: u32,
}

impl<'a> Setup<'a> {
    fn start(dir: &'a Path, case: &Case, program: &str) -> io::Result<Self> {
        let [rtmp, quic, api, rtp, edge_rtp, flv] = [(); 6].map(|()| free_address());
        let [floor_in, floor_out, floor_rtp, sink] = [(); 4].map(|()| free_address());
        let others = udp::receiver((Ipv4Addr::UNSPECIFIED, sink.port()).into(), None, 1)?;
        // Enables UDP_GRO, so that on loopback the sender does not pay for segmentation.
        UdpSocketState::new(UdpSockRef::from(&others))?;
        let cloud = format!(
            "rtmp_addr: {rtmp}\nquic_addr: {quic}\napi_addr: {api}\nrtp_port: {}\n\
             max_streams: 10000\nrtp_cache_ms: 3000\nclient_addr_list: [{}]\n",
            rtp.port(),
            case.edge_list(edge_rtp, sink.port()).join(", ")
        );
        let edge = format!(
            "udp_addr: {edge_rtp}\nflv_addr: {flv}\ncloud_host: 127.0.0.1\nquic_addr: {quic}\n\
             insecure: true\nrtp_subscribe: false\nmax_streams: 10000\ngop_cache_max_ms: 5000\n"
        );
        fs::write(dir.join("cloud.yaml"), cloud)?;
        fs::write(dir.join("edge.yaml"), edge)?;
        fs::write(dir.join("floor.list"), case.edge_list(floor_rtp, sink.port()).join("\n"))?;
        let node =
            |role| Process::start(dir, role, program, &[role, "--config", &format!("{role}.yaml")]);
        let cloud = node("cloud")?;
        wait_for("the cloud answers", PATIENCE, || Ok(http_get(api, "/healthz").is_ok()))?;
        let edge = node("edge")?;
        let mut floor = start_role(
            dir,
            "delay-floor",
            &[&floor_in.to_string(), &floor_out.to_string(), &floor_rtp.to_string(), "floor.list"],
        )?;
        wait_for("the edge is connected", PATIENCE, || {
            let Ok(metrics) = http_get(flv, "/metrics") else { return Ok(false) };
            Ok(samples(&metrics).any(|(name, value)| {
                name.starts_with("downpour_repair_client_connected") && value == 1.0
            }))
        })?;
        let log = dir.join("delay-floor.log");
        wait_for("the floor listens", PATIENCE, || {
            floor.check()?;
            Ok(fs::read_to_string(&log)?.contains("listening"))
        })?;
        Ok(Self { dir, cloud, edge, floor, rtmp, flv, floor_in, floor_out, others })
    }

    /// Processor time of one `sendto` to another edge, as a measure of the machine's current speed.
    fn sendto_micros(&self) -> io::Result<f64> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let to = SocketAddr::from(([127, 1, 0, 1], self.others.local_addr()?.port()));
        let began = cpu::of_this_thread();
        for _ in 0..SENDTO_CALLS {
            socket.send_to(&[0; 372], to)?;
        }
        Ok((cpu::of_this_thread() - began) / f64::from(SENDTO_CALLS) * 1e6)
    }

    /// Publishes and plays the streams of one run, and evaluates the delays.
    fn measure(&mut self, run: &Run<'_>) -> io::Result<Measured> {
        let nanos = |seconds: f64| (seconds * 1e9) as u64;
        let begin = now() + nanos(0.5 + run.case.streams as f64 / 400.0);
        let from = begin + nanos(WARM_UP);
        let end = from + nanos(run.seconds);
        let publisher = self.start_publisher(run, begin, end)?;
        let viewers = self.start_viewers(run, from)?;

        sleep_until(from);
        let mut processes = match run.system {
            System::Downpour => vec![("cloud", self.cloud.id()), ("edge", self.edge.id())],
            System::Floor => vec![("floor", self.floor.id())],
        };
        let children = [("publisher", publisher.id()), ("viewers", viewers.id())];
        processes.extend(children);
        let before = CpuSnapshot::take(&processes)?;
        sleep_until(end);
        let load = CpuSnapshot::take(&processes)?.since(&before, children.len());
        self.wait_for_end()?;

        let received = viewer::parse(&self.log(VIEWER)?)
            .ok_or_else(|| io::Error::other("invalid output of the viewers"))?;
        let missing = missing(run, &self.log(PUBLISHER)?, &received)?;
        let sorted = |delays: fn(&Received) -> &Vec<f64>| {
            let mut all: Vec<f64> = received.iter().flat_map(|one| delays(one).clone()).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let (video, audio) = (sorted(|one| &one.video_delays), sorted(|one| &one.audio_delays));
        Ok(Measured { video, audio, missing, load })
    }

    fn start_publisher(&self, run: &Run<'_>, begin: u64, end: u64) -> io::Result<Process> {
        let (frame, key_frame) = run.case.bodies();
        let (streams, frames) = (run.case.streams, run.frames);
        let plan = Plan { streams, frames, frame, key_frame, begin, end };
        let to = match run.system {
            System::Downpour => self.rtmp,
            System::Floor => self.floor_in,
        };
        let mut arguments =
            vec![run.system.name().to_owned(), to.to_string(), run.number.to_string()];
        arguments.extend(plan.arguments());
        start_role(self.dir, PUBLISHER, &borrowed(&arguments))
    }

    /// Starts the viewers of the sampled streams. They record the delays of tags sent after `from`.
    fn start_viewers(&self, run: &Run<'_>, from: u64) -> io::Result<Process> {
        let at = match run.system {
            System::Downpour => self.flv,
            System::Floor => self.floor_out,
        };
        let mut arguments = vec![
            run.system.name().to_owned(),
            at.to_string(),
            run.number.to_string(),
            from.to_string(),
        ];
        let sampled = (0..run.case.sample).map(|n| n * run.case.streams / run.case.sample);
        arguments.extend(sampled.map(|stream| stream.to_string()));
        start_role(self.dir, VIEWER, &borrowed(&arguments))
    }

    /// Waits until the publisher and the viewers have printed their results.
    fn wait_for_end(&mut self) -> io::Result<()> {
        let done = |role: &str| self.log(role).is_ok_and(|text| text.ends_with("done\n"));
        let result =
            wait_for(
                "the last tags have arrived",
                PATIENCE,
                || Ok(done(PUBLISHER) && done(VIEWER)),
            );
        result.map_err(|error| {
            let [publisher, viewer] = [PUBLISHER, VIEWER].map(|role| {
                let log = self.log(role).unwrap_or_default();
                log.lines().last().unwrap_or_default().to_owned()
            });
            io::Error::other(format!("{error}: publisher: {publisher}; viewer: {viewer}"))
        })?;
        self.cloud.check()?;
        self.edge.check()?;
        self.floor.check()
    }

    fn log(&self, role: &str) -> io::Result<String> {
        fs::read_to_string(self.dir.join(format!("{role}.log")))
    }
}

/// Returns the number of tags that viewers missed, from the first that each one received to the last
/// that was sent. The floor repairs nothing and may miss 2 %; Downpour may miss none.
///
/// # Errors
/// If more tags are missing, or a viewer joined too late.
fn missing(run: &Run<'_>, publisher: &str, received: &[Received]) -> io::Result<u64> {
    let case = run.case;
    let mut missing = 0;
    let sent: Vec<(u64, u64)> = publisher
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(video, audio)| Some((video.parse().ok()?, audio.parse().ok()?)))
        .collect();
    if sent.len() != case.streams || received.len() != case.sample {
        return Err(io::Error::other(format!(
            "{} of {} streams were sent, and {} of {} received",
            sent.len(),
            case.streams,
            received.len(),
            case.sample
        )));
    }
    for viewer in received {
        let (video, audio) = sent[viewer.stream];
        for (kind, numbers, sent, measured) in [
            ("video", viewer.video, video, viewer.video_delays.len() as u64),
            ("audio", viewer.audio, audio, viewer.audio_delays.len() as u64),
        ] {
            let gaps = (numbers.last + 1 - numbers.first).saturating_sub(numbers.count);
            let tail = sent.saturating_sub(numbers.last + 1);
            missing += gaps + tail;
            let allowed = if run.system == System::Floor { sent / 50 } else { 0 };
            if gaps + tail > allowed || numbers.count == 0 {
                return Err(io::Error::other(format!(
                    "{}, stream {}: of {sent} {kind} tags, {gaps} are missing in gaps and {tail} at \
                     the end",
                    run.system.name(),
                    viewer.stream
                )));
            }
            if measured >= numbers.count {
                return Err(io::Error::other(format!(
                    "stream {}: the viewer joined after the start of the measurement",
                    viewer.stream
                )));
            }
        }
    }
    Ok(missing)
}

/// The results of a case at one rate.
struct Outcome {
    frames: f64,
    /// Name of the rate.
    rate: &'static str,
    /// Microseconds per bare `sendto`, before and after Downpour's measurement.
    sendto: f64,
    ours: Measured,
    floor: Measured,
}

/// The result of one run.
struct Measured {
    /// Sorted delays in microseconds.
    video: Vec<f64>,
    audio: Vec<f64>,
    /// Number of lost tags.
    missing: u64,
    load: Load,
}

impl Outcome {
    fn rows(&self, case: &Case) -> String {
        let ms = |delays: &[f64], share| format!("{:.3}", millis(delays, share));
        let mut rows = String::new();
        for (system, measured) in [(System::Floor, &self.floor), (System::Downpour, &self.ours)] {
            let mut cells = vec![
                format!("{}, {}", case.name, self.rate),
                system.name().into(),
                measured.video.len().to_string(),
                measured.missing.to_string(),
            ];
            cells.extend(SHARES.iter().map(|(_, share)| ms(&measured.video, *share)));
            cells.extend([0.5, 0.99].map(|share| ms(&measured.audio, share)));
            cells.extend(GOALS.map(|(share, goal)| match system {
                System::Floor => String::new(),
                System::Downpour => {
                    let meets = |measured: &Measured| millis(&measured.video, share) <= goal;
                    let verdict = match (meets(measured), meets(&self.floor)) {
                        (true, _) => "met",
                        (false, true) => "**missed**",
                        (false, false) => "**missed**, also by the floor",
                    };
                    format!("≤ {goal}: {verdict}")
                }
            }));
            rows += &format!("| {} |\n", cells.join(" | "));
        }
        let ratio = |share| at(&self.ours.video, share) / at(&self.floor.video, share);
        let ratios: Vec<_> =
            SHARES.iter().map(|(_, share)| format!("{:.2}", ratio(*share))).collect();
        rows += &format!("| | ratio | | | {} | | | | |\n", ratios.join(" | "));
        rows
    }

    fn line(&self, case: &Case, round: usize) -> String {
        let ms = |measured: &Measured| {
            [0.5, 0.99].map(|share| format!("{:.3}", millis(&measured.video, share))).join(" | ")
        };
        let (floor, ours) = (ms(&self.floor), ms(&self.ours));
        format!("| {} | {round} | {:.2} | {floor} | {ours} |\n", case.name, self.sendto)
    }

    fn load(&self, case: &Case) -> String {
        let (frame, key_frame) = case.bodies();
        format!(
            "- {}, {}: {:.0} video tags/s of {frame} bytes (key frames {key_frame}) and {:.0} audio \
             tags/s in total. Downpour: {}. Floor: {}.\n",
            case.name,
            self.rate,
            self.frames * case.streams as f64,
            self.frames * case.streams as f64 * AUDIO_PER_FRAME,
            self.ours.load.line(),
            self.floor.load.line()
        )
    }

    fn panel(&self, case: &Case) -> Panel {
        let series = |system, colour, measured: &Measured| Series {
            system,
            colour,
            dashed: false,
            points: SHARES.iter().map(|(_, share)| Some(millis(&measured.video, *share))).collect(),
        };
        Panel {
            title: format!("{}, {}", case.name, self.rate),
            series: vec![
                series("floor", "#999", &self.floor),
                series("Downpour", "#0a6", &self.ours),
            ],
        }
    }
}

/// Starts this program in another role.
fn start_role(dir: &Path, role: &str, arguments: &[&str]) -> io::Result<Process> {
    Process::start_child(dir, role, role, arguments)
}

fn borrowed(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// The quantile `share` of sorted values.
fn at(sorted: &[f64], share: f64) -> f64 {
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// The quantile of delays in microseconds, in milliseconds.
fn millis(sorted: &[f64], share: f64) -> f64 {
    at(sorted, share) / 1000.0
}

const SHARES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
/// Goals for Downpour: quantile, and milliseconds.
const GOALS: [(f64, f64); 2] = [(0.5, 0.5), (0.99, 3.0)];
const HALF: f64 = 0.5;
/// Rounds at half load.
const ROUNDS: usize = 3;
const SENDTO_CALLS: u32 = 50_000;
const MAX_FRAMES: f64 = 500.0;
/// Seconds before the first measured tag: viewers join and the nodes' memory gets warm.
const WARM_UP: f64 = 2.5;
const PATIENCE: Duration = Duration::from_secs(40);
/// Roles of child processes, and the names of their logs.
const PUBLISHER: &str = "delay-publisher";
const VIEWER: &str = "delay-viewer";
