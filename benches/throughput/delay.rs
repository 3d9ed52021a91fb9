//! From an encoder's last byte of a tag to the viewer's: through a real cloud and a real edge, and
//! through a relay that does nothing else.

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
    load::{Load, Look},
    publisher::{AUDIO_PER_FRAME, Plan},
    viewer::Seen,
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
        // The edge in the middle: half of the others are sent each packet before it.
        Case { name: "1000 edges, 1 stream", edges: 1000, streams: 1, frames: 25.0, sample: 1 },
        Case { name: "1 edge, 1000 streams", edges: 1, streams: 1000, frames: 12.0, sample: 20 },
    ];
    let mut section = Section::default();
    let mut rows = String::from(
        "| work | way | video tags | missing | p50 | p90 | p99 | p99.9 | max | audio p50 | p99 | goal: p50 | \
         p99 |\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut loads = String::new();
    let mut panels = Vec::new();
    let mut rounds = String::from(
        "| work, at half load | round | µs a `sendto` | floor: p50 | p99 | Downpour: p50 | p99 |\n\
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
    section.say(
        "Delays in milliseconds; the ratio is to the floor of the same run. Each line below the \
         table states how much of the machine other work took; it had the same right to the \
         processors. Half load is measured several times; the table has the round of the median \
         p50.",
    );
    section.say(&rows);
    section.say(&loads);
    section.say(
        "All rounds at half load, each with what a bare `sendto` of 372 bytes to one of the other edges' \
         addresses took before and after it (processor time): how fast the machine was then.",
    );
    section.say(&rounds);
    let ticks = SHARES.iter().map(|(name, _)| (*name).to_owned()).collect();
    let title = "Delay of video tags on loopback, in ms";
    section.plot(
        "throughput-delay.svg",
        Plot { title, ticks, scale: Scale::Log { least: 0.01, most: 100.0 }, panels },
    );
    Ok(section)
}

pub fn child(role: &str, arguments: &[&str]) -> io::Result<()> {
    let wrong = || io::Error::other(format!("delay-{role} was started wrongly: {arguments:?}"));
    match (role, arguments) {
        ("publisher", [way, to, run, plan @ ..]) => {
            let plan = Plan::parse(plan).ok_or_else(wrong)?;
            let to = to.parse().map_err(io::Error::other)?;
            publisher::run(Way::parse(way).ok_or_else(wrong)?, to, run, &plan)
        }
        ("viewer", [way, from, run, begin, streams @ ..]) => {
            let streams: Vec<_> = streams.iter().filter_map(|stream| stream.parse().ok()).collect();
            let from = from.parse().map_err(io::Error::other)?;
            let begin = begin.parse().map_err(io::Error::other)?;
            viewer::run(Way::parse(way).ok_or_else(wrong)?, from, run, begin, &streams)
        }
        ("floor", [publishers, viewers, edge, list]) => {
            let parse = |text: &str| text.parse().map_err(io::Error::other);
            floor::run(parse(publishers)?, parse(viewers)?, parse(edge)?, Path::new(list))
        }
        _ => Err(wrong()),
    }
}

/// Through what the tags go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Downpour,
    Floor,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Downpour => "Downpour",
            Self::Floor => "floor",
        }
    }

    fn parse(text: &str) -> Option<Self> {
        [Self::Downpour, Self::Floor].into_iter().find(|way| way.name() == text)
    }
}

struct Case {
    name: &'static str,
    edges: usize,
    streams: usize,
    /// Of each stream in a second, to begin with.
    frames: f64,
    /// Streams that are watched.
    sample: usize,
}

impl Case {
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
        let mut site = Site::start(dir, self, program)?;
        let mut runs = 1..;
        let mut both = |frames: f64, seconds: f64, load: &'static str| -> io::Result<Outcome> {
            let mut measure = |site: &mut Site<'_>, way: Way| {
                let run = runs.next().unwrap_or(0);
                let measured = site.measure(self, way, frames, seconds, run)?;
                let [p50, p99] = [0.5, 0.99].map(|share| millis(&measured.video, share));
                eprintln!(
                    "   {}, {load}, {}: p50 {p50:.3} ms, p99 {p99:.3} ms; {}",
                    self.name,
                    way.name(),
                    measured.load.line()
                );
                io::Result::Ok(measured)
            };
            let before = site.sendto_micros()?;
            let ours = measure(&mut site, Way::Downpour)?;
            let sendto = (before + site.sendto_micros()?) / 2.0;
            let floor = measure(&mut site, Way::Floor)?;
            Ok(Outcome { frames, rate: load, sendto, ours, floor })
        };
        let usual = both(self.frames, if quick { 1.5 } else { 4.0 }, "a usual rate")?;
        // The load grows with the frames; what it is without any is small.
        let frames = (self.frames * HALF / usual.ours.load.highest()).clamp(1.0, MOST_FRAMES);
        let (rounds, seconds) = if quick { (1, 2.0) } else { (ROUNDS, 6.0) };
        let mut halves = Vec::new();
        for _ in 0..rounds {
            halves.push(both(frames, seconds, "half load")?);
        }
        Ok((usual, halves))
    }

    fn bodies(&self) -> (usize, usize) {
        match self.streams {
            1 => (4_500, 25_000),
            _ => (700, 5_000),
        }
    }
}

/// Everything that the tags go through, both ways.
struct Site<'a> {
    dir: &'a Path,
    cloud: Process,
    edge: Process,
    floor: Process,
    rtmp: SocketAddr,
    flv: SocketAddr,
    floor_in: SocketAddr,
    floor_out: SocketAddr,
    /// The other edges: takes what comes and gives it to nobody.
    others: UdpSocket,
}

impl<'a> Site<'a> {
    fn start(dir: &'a Path, case: &Case, program: &str) -> io::Result<Self> {
        let [rtmp, quic, api, rtp, edge_rtp, flv] = [(); 6].map(|()| free_address());
        let [floor_in, floor_out, floor_rtp, sink] = [(); 4].map(|()| free_address());
        let others = udp::receiver((Ipv4Addr::UNSPECIFIED, sink.port()).into(), None, 1)?;
        // It takes bursts whole, as a network does: taking them apart would be on the sender's
        // account, on loopback.
        UdpSocketState::new(UdpSockRef::from(&others))?;
        let list = |own: SocketAddr| {
            let others = (1..case.edges).map(|n| {
                SocketAddr::from(([127, 1, (n >> 8) as u8, (n & 0xff) as u8], sink.port()))
            });
            let mut list: Vec<_> = others.collect();
            list.insert(list.len() / 2, own);
            list.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let cloud = format!(
            "rtmp_addr: {rtmp}\nquic_addr: {quic}\napi_addr: {api}\nrtp_port: {}\n\
             max_streams: 10000\nrtp_cache_ms: 3000\nclient_addr_list: [{}]\n",
            rtp.port(),
            list(edge_rtp).join(", ")
        );
        let edge = format!(
            "udp_addr: {edge_rtp}\nflv_addr: {flv}\ncloud_host: 127.0.0.1\nquic_addr: {quic}\n\
             insecure: true\nrtp_subscribe: false\nmax_streams: 10000\ngop_cache_max_ms: 5000\n"
        );
        fs::write(dir.join("cloud.yaml"), cloud)?;
        fs::write(dir.join("edge.yaml"), edge)?;
        fs::write(dir.join("floor.list"), list(floor_rtp).join("\n"))?;
        let node =
            |role| Process::start(dir, role, program, &[role, "--config", &format!("{role}.yaml")]);
        let cloud = node("cloud")?;
        wait_for("the cloud answers", PATIENCE, || Ok(http_get(api, "/healthz").is_ok()))?;
        let edge = node("edge")?;
        let mut floor = own(
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

    /// Processor time of one `sendto` to another edge: how fast the machine is now.
    fn sendto_micros(&self) -> io::Result<f64> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let to = SocketAddr::from(([127, 1, 0, 1], self.others.local_addr()?.port()));
        let began = cpu::of_this_thread();
        for _ in 0..SENDTOS {
            socket.send_to(&[0; 372], to)?;
        }
        Ok((cpu::of_this_thread() - began) / f64::from(SENDTOS) * 1e6)
    }

    /// Publishes, watches, and reads what came of it.
    fn measure(
        &mut self,
        case: &Case,
        way: Way,
        frames: f64,
        seconds: f64,
        run: u32,
    ) -> io::Result<Measured> {
        let (frame, key_frame) = case.bodies();
        let nanos = |seconds: f64| (seconds * 1e9) as u64;
        let begin = now() + nanos(0.5 + case.streams as f64 / 400.0);
        // Viewers have joined and the nodes' memory is warm.
        let from = begin + nanos(WARM_UP);
        let end = from + nanos(seconds);
        let plan = Plan { streams: case.streams, frames, frame, key_frame, begin, end };
        let (to, at) = match way {
            Way::Downpour => (self.rtmp, self.flv),
            Way::Floor => (self.floor_in, self.floor_out),
        };
        let mut arguments = vec![way.name().to_owned(), to.to_string(), run.to_string()];
        arguments.extend(plan.arguments());
        let publisher = own(self.dir, "delay-publisher", &borrowed(&arguments))?;
        let mut arguments =
            vec![way.name().to_owned(), at.to_string(), run.to_string(), from.to_string()];
        let sampled = (0..case.sample).map(|n| n * case.streams / case.sample);
        arguments.extend(sampled.map(|stream| stream.to_string()));
        let viewer = own(self.dir, "delay-viewer", &borrowed(&arguments))?;

        sleep_until(from);
        let nodes = match way {
            Way::Downpour => vec![("cloud", self.cloud.id()), ("edge", self.edge.id())],
            Way::Floor => vec![("floor", self.floor.id())],
        };
        let mut looked = nodes.clone();
        looked.extend([("publisher", publisher.id()), ("viewers", viewer.id())]);
        let before = Look::take(&looked)?;
        sleep_until(end);
        let load = Look::take(&looked)?.since(&before, looked.len() - nodes.len());

        let read = |name: &str| fs::read_to_string(self.dir.join(format!("{name}.log")));
        let done = |name: &str| read(name).is_ok_and(|text| text.ends_with("done\n"));
        wait_for("the last tags are there", PATIENCE, || {
            Ok(done("delay-publisher") && done("delay-viewer"))
        })
        .map_err(|error| {
            let [publisher, viewer] = ["delay-publisher", "delay-viewer"].map(|name| {
                read(name).unwrap_or_default().lines().last().unwrap_or_default().to_owned()
            });
            io::Error::other(format!("{error}: publisher: {publisher}; viewer: {viewer}"))
        })?;
        self.cloud.check()?;
        self.edge.check()?;
        self.floor.check()?;
        let seen = viewer::parse(&read("delay-viewer")?)
            .ok_or_else(|| io::Error::other("the viewers wrote something else"))?;
        let missing = missing(way, &read("delay-publisher")?, &seen, case)?;
        let sorted = |delays: fn(&Seen) -> &Vec<f64>| {
            let mut all: Vec<f64> = seen.iter().flat_map(|seen| delays(seen).clone()).collect();
            all.sort_by(f64::total_cmp);
            all
        };
        let (video, audio) = (sorted(|s| &s.video_delays), sorted(|s| &s.audio_delays));
        Ok(Measured { video, audio, missing, load })
    }
}

/// Tags between the first that a viewer saw, before the measurement, and the last that was sent, that
/// did not come. The floor repairs nothing, so that a few may be missing; of Downpour's, none.
fn missing(way: Way, publisher: &str, seen: &[Seen], case: &Case) -> io::Result<u64> {
    let mut missing = 0;
    let sent: Vec<(u64, u64)> = publisher
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(video, audio)| Some((video.parse().ok()?, audio.parse().ok()?)))
        .collect();
    if sent.len() != case.streams || seen.len() != case.sample {
        return Err(io::Error::other(format!(
            "{} of {} streams were sent and {} of {} seen",
            sent.len(),
            case.streams,
            seen.len(),
            case.sample
        )));
    }
    for one in seen {
        let (video, audio) = sent[one.stream];
        for (kind, numbers, sent, measured) in [
            ("video", one.video, video, one.video_delays.len() as u64),
            ("audio", one.audio, audio, one.audio_delays.len() as u64),
        ] {
            let inside = (numbers.last + 1 - numbers.first).saturating_sub(numbers.count);
            let behind = sent.saturating_sub(numbers.last + 1);
            missing += inside + behind;
            let most = if way == Way::Floor { sent / 50 } else { 0 };
            if inside + behind > most || numbers.count == 0 {
                return Err(io::Error::other(format!(
                    "{}, stream {}: of {sent} {kind} tags {inside} are missing inside and {behind} \
                     at the end",
                    way.name(),
                    one.stream
                )));
            }
            if measured >= numbers.count {
                return Err(io::Error::other(format!(
                    "stream {}: the viewer joined after the measurement began",
                    one.stream
                )));
            }
        }
    }
    Ok(missing)
}

/// What came of a case at one rate.
struct Outcome {
    frames: f64,
    /// What that rate is.
    rate: &'static str,
    /// Microseconds of a bare one, around the measurement of ours.
    sendto: f64,
    ours: Measured,
    floor: Measured,
}

/// Delays in microseconds, in order of size, and what it cost.
struct Measured {
    video: Vec<f64>,
    audio: Vec<f64>,
    /// Tags that did not come.
    missing: u64,
    load: Load,
}

impl Outcome {
    fn rows(&self, case: &Case) -> String {
        let ms = |delays: &[f64], share| format!("{:.3}", millis(delays, share));
        let mut rows = String::new();
        for (way, measured) in [(Way::Floor, &self.floor), (Way::Downpour, &self.ours)] {
            let mut cells = vec![
                format!("{}, {}", case.name, self.rate),
                way.name().into(),
                measured.video.len().to_string(),
                measured.missing.to_string(),
            ];
            cells.extend(SHARES.iter().map(|(_, share)| ms(&measured.video, *share)));
            cells.extend([0.5, 0.99].map(|share| ms(&measured.audio, share)));
            cells.extend(GOALS.map(|(share, goal)| match way {
                Way::Floor => String::new(),
                Way::Downpour => {
                    let meets = |measured: &Measured| millis(&measured.video, share) <= goal;
                    let told = match (meets(measured), meets(&self.floor)) {
                        (true, _) => "met",
                        (false, true) => "**missed**",
                        (false, false) => "**missed**, by the floor too",
                    };
                    format!("≤ {goal}: {told}")
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
            "- {}, {}: {:.0} video tags/s of {frame} bytes (key frames {key_frame}) and {:.0} audio tags/s \
             in all. Downpour: {}. Floor: {}.\n",
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

/// This program in another role.
fn own(dir: &Path, role: &str, arguments: &[&str]) -> io::Result<Process> {
    Process::start_child(dir, role, role, arguments)
}

fn borrowed(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// The value that this share of all does not exceed.
fn at(sorted: &[f64], share: f64) -> f64 {
    let index = ((sorted.len() as f64 * share).ceil() as usize).clamp(1, sorted.len().max(1)) - 1;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// The same of delays in microseconds, in milliseconds.
fn millis(sorted: &[f64], share: f64) -> f64 {
    at(sorted, share) / 1000.0
}

const SHARES: [(&str, f64); 5] =
    [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0)];
/// Milliseconds at a share.
const GOALS: [(f64, f64); 2] = [(0.5, 0.5), (0.99, 3.0)];
const HALF: f64 = 0.5;
/// At half load.
const ROUNDS: usize = 3;
const SENDTOS: u32 = 50_000;
const MOST_FRAMES: f64 = 500.0;
/// Seconds between the first tag and the first that counts.
const WARM_UP: f64 = 2.5;
const PATIENCE: Duration = Duration::from_secs(40);
