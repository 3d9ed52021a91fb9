//! Many publishers at the cloud, which packetizes each stream, keeps it in the history ring and sends
//! it to one address.
//!
//! The floor is the sum of nginx-rtmp, which only receives the same publishers, and a bare loop that
//! sends the same datagrams. They are measured in turns.

mod datagrams;
mod media;
mod publishers;

use std::{
    fs, io,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use self::media::Media;
use crate::{
    common::{
        plot::{Panel, Plot, Scale, Series},
        process::{Process, free_address, http_get, samples, wait_for},
    },
    table::{Comparison, Peer, Section, median, short},
};

pub fn run(quick: bool, program: &str) -> io::Result<Section> {
    check_nginx()?;
    let media = Media::new()?;
    let plan = if quick { &QUICK } else { &FULL };
    let mut rounds = Rounds::default();
    let mut growth = Vec::new();
    for number in 1..=plan.rounds {
        let round = Round::run(&media, PUBLISHERS, plan, program)?;
        eprintln!("[{number}/{}] {}", plan.rounds, round.line());
        rounds.add(&round);
        if number == plan.rounds && !plan.growth.is_empty() {
            growth.push((PUBLISHERS, round));
        }
    }
    for &count in plan.growth {
        let round = Round::run(&media, count, plan, program)?;
        eprintln!("[{count} publishers] {}", round.line());
        growth.push((count, round));
    }
    growth.sort_by_key(|(count, _)| *count);
    let mut section = Section::default();
    section.paragraph(&format!(
        "{PUBLISHERS} publishers of {:.0} kbit/s and {:.0} tags/s each, {:.0} datagrams/s in total; \
         {} rounds of {} s.",
        media.bit_rate() / 1000.0,
        media.tag_rate(),
        media.datagram_rate() * PUBLISHERS as f64,
        plan.rounds,
        plan.measure.as_secs()
    ));
    section.table(&rounds.comparisons());
    section.paragraph(&format!(
        "Per tag, the cloud takes {} µs and the floor {} µs. The {PUBLISHERS} publishers, which \
         connect all at once, were live after {} ms; at nginx after {} ms.",
        short(median(&rounds.ours) * 1e4 / (media.tag_rate() * PUBLISHERS as f64)),
        short(median(&rounds.floor()) * 1e4 / (media.tag_rate() * PUBLISHERS as f64)),
        rounds.ours_connected,
        rounds.nginx_connected,
    ));
    if !growth.is_empty() {
        section.plot("performance-ingest.svg", plot(&growth));
    }
    Ok(section)
}

pub fn child(role: &str, arguments: &[&str]) -> io::Result<()> {
    let bad = || io::Error::other(format!("{role} needs an address and a number"));
    let mut arguments = arguments.iter();
    let address = arguments.next().and_then(|text| text.parse().ok()).ok_or_else(bad)?;
    let mut number = || arguments.next().and_then(|text| text.parse().ok()).ok_or_else(bad);
    match role {
        "publishers" => publishers::run(address, number()?),
        "send" => datagrams::send(address, number()?),
        "receive" => datagrams::receive(address),
        _ => Err(io::Error::other(format!("unknown child process {role}"))),
    }
}

/// The number and length of the rounds.
struct Plan {
    rounds: usize,
    measure: Duration,
    /// Other numbers of publishers, for the plot.
    growth: &'static [usize],
}

/// The result of one round.
struct Round {
    nginx: Load,
    /// Processor time of the bare loop, in per cent of a core.
    send: f64,
    ours: Load,
    /// Bytes of media in the cloud's history rings.
    ring_bytes: f64,
}

struct Load {
    /// Processor time, in per cent of a core.
    cpu: f64,
    /// Bytes of resident memory.
    resident: f64,
    /// Milliseconds until all publishers were connected.
    connected: u64,
}

impl Round {
    fn run(media: &Media, count: usize, plan: &Plan, program: &str) -> io::Result<Self> {
        let nginx = retry(|| nginx(media, count, plan))?;
        let send = retry(|| send(media, count, plan))?;
        let (ours, ring_bytes) = retry(|| ours(media, count, plan, program))?;
        Ok(Self { nginx, send, ours, ring_bytes })
    }

    fn floor(&self) -> f64 {
        self.nginx.cpu + self.send
    }

    fn line(&self) -> String {
        format!(
            "nginx {} % + bare loop {} %, cloud {} %: {:.2}; {:.1} MB, nginx {:.1} MB, rings {:.1} MB",
            short(self.nginx.cpu),
            short(self.send),
            short(self.ours.cpu),
            self.ours.cpu / self.floor(),
            self.ours.resident / 1e6,
            self.nginx.resident / 1e6,
            self.ring_bytes / 1e6,
        )
    }
}

#[derive(Default)]
struct Rounds {
    nginx: Vec<f64>,
    send: Vec<f64>,
    ours: Vec<f64>,
    nginx_resident: Vec<f64>,
    ours_resident: Vec<f64>,
    ring: Vec<f64>,
    nginx_connected: u64,
    ours_connected: u64,
}

impl Rounds {
    fn add(&mut self, round: &Round) {
        self.nginx.push(round.nginx.cpu);
        self.send.push(round.send);
        self.ours.push(round.ours.cpu);
        self.nginx_resident.push(round.nginx.resident / 1e6);
        self.ours_resident.push(round.ours.resident / 1e6);
        self.ring.push(round.ring_bytes / 1e6);
        (self.nginx_connected, self.ours_connected) = (round.nginx.connected, round.ours.connected);
    }

    fn floor(&self) -> Vec<f64> {
        self.nginx.iter().zip(&self.send).map(|(nginx, send)| nginx + send).collect()
    }

    fn comparisons(&self) -> [Comparison; 2] {
        let cpu = Comparison {
            work: format!("receive {PUBLISHERS} publishers, send on to one address"),
            unit: "% of a core",
            floor: self.floor(),
            peers: vec![
                Peer { name: "nginx-rtmp, receives", values: self.nginx.clone() },
                Peer { name: "`sendto` loop", values: self.send.clone() },
            ],
            ours: self.ours.clone(),
            goal: Some(1.5),
        };
        // The goal is 200 MB in total, so the ratio depends on the size of the rings.
        let ring = median(&self.ring);
        let memory = Comparison {
            work: format!("resident memory with 3 s in the rings, at most {RESIDENT_MB} MB"),
            unit: "MB; the floor is the packets in the rings",
            floor: self.ring.clone(),
            peers: vec![
                Peer { name: "nginx-rtmp, receives", values: self.nginx_resident.clone() },
                Peer { name: "`sendto` loop", values: Vec::new() },
            ],
            ours: self.ours_resident.clone(),
            goal: Some((RESIDENT_MB / ring * 100.0).round() / 100.0),
        };
        [cpu, memory]
    }
}

/// Measures the cloud. Also returns the bytes in its history rings.
fn ours(media: &Media, count: usize, plan: &Plan, program: &str) -> io::Result<(Load, f64)> {
    let dir = scratch()?;
    let [rtmp, quic, api, target] = [(); 4].map(|()| free_address());
    let config = format!(
        "rtmp_addr: {rtmp}\nquic_addr: {quic}\napi_addr: {api}\nrtp_port: 0\n\
         client_addr_list: [\"{target}\"]\nrtp_cache_ms: 3000\nmax_streams: 10000\n"
    );
    fs::write(dir.path().join("cloud.yaml"), config)?;
    let mut sink =
        Process::start_child(dir.path(), "receive", "ingest-receive", &[&target.to_string()])?;
    let mut cloud =
        Process::start(dir.path(), "cloud", program, &["cloud", "--config", "cloud.yaml"])?;
    wait_for("the cloud answers", PATIENCE, || Ok(http_get(api, "/healthz").is_ok()))?;
    let publishers = Publishers::start(dir.path(), rtmp, count)?;
    std::thread::sleep(FILL);
    let snapshot = || -> io::Result<_> {
        let counted = CloudCounts::read(api)?;
        Ok((Instant::now(), counted, last_number(dir.path(), "receive")?))
    };
    let (began, before, arrived) = snapshot()?;
    let cpu = cloud.cpu_seconds();
    std::thread::sleep(plan.measure);
    let cpu = cloud.cpu_seconds() - cpu;
    let resident = cloud.resident_bytes() as f64;
    let (ended, after, arrived_at_end) = snapshot()?;
    cloud.check()?;
    sink.check()?;
    let connected = publishers.check()?;
    let seconds = ended.duration_since(began).as_secs_f64();
    let check = Check { seconds, count };
    check.near("tags at the cloud", after.tags - before.tags, media.tag_rate())?;
    let sent = after.datagrams - before.datagrams;
    check.near("datagrams from the cloud", sent, media.datagram_rate())?;
    check.near("datagrams at the sink", arrived_at_end - arrived, media.datagram_rate())?;
    if (before.ring_bytes / after.ring_bytes - 1.0).abs() > TOLERANCE {
        return Err(io::Error::other(format!(
            "the rings were not full: {:.0} bytes grew to {:.0}",
            before.ring_bytes, after.ring_bytes
        )));
    }
    if after.streams != count as f64 || after.skipped > 0.0 || after.errors > 0.0 {
        return Err(io::Error::other(format!("the cloud lost streams or packets: {after:?}")));
    }
    let cpu = cpu / plan.measure.as_secs_f64() * 100.0;
    Ok((Load { cpu, resident, connected }, after.ring_bytes))
}

/// Counters of the cloud.
#[derive(Debug, Default)]
struct CloudCounts {
    tags: f64,
    datagrams: f64,
    streams: f64,
    ring_bytes: f64,
    skipped: f64,
    errors: f64,
}

impl CloudCounts {
    fn read(api: SocketAddr) -> io::Result<Self> {
        let mut counts = Self::default();
        for (name, value) in samples(&http_get(api, "/metrics")?) {
            let family = name.split('{').next().unwrap_or(name);
            match family {
                "downpour_rtmp_tags_total" => counts.tags += value,
                "downpour_fanout_datagrams_total" => counts.datagrams += value,
                "downpour_streams" => counts.streams = value,
                "downpour_ring_bytes" => counts.ring_bytes += value,
                "downpour_fanout_skipped_packets_total" => counts.skipped += value,
                "downpour_fanout_errors_total" | "downpour_rtmp_protocol_errors_total" => {
                    counts.errors += value;
                }
                _ => {}
            }
        }
        Ok(counts)
    }
}

/// Measures nginx, which receives the same publishers.
fn nginx(media: &Media, count: usize, plan: &Plan) -> io::Result<Load> {
    let dir = scratch()?;
    let [rtmp, http] = [(); 2].map(|()| free_address());
    // A single process, which is killed together with the bench.
    let config = format!(
        "load_module {NGINX_MODULE};\ndaemon off;\nmaster_process off;\nworker_processes 1;\n\
         pid nginx.pid;\nerror_log error.log;\nevents {{ worker_connections 8192; }}\n\
         rtmp {{ server {{ listen {rtmp}; chunk_size 4096; application live {{ live on; }} }} }}\n\
         http {{ access_log off; server {{ listen {http}; location /stat {{ rtmp_stat all; }} }} }}\n"
    );
    fs::write(dir.path().join("nginx.conf"), config)?;
    let prefix = dir.path().to_string_lossy();
    let arguments = ["-p", &prefix, "-e", "error.log", "-c", "nginx.conf"];
    let mut nginx = Process::start(dir.path(), "nginx", NGINX, &arguments)?;
    wait_for("nginx answers", PATIENCE, || Ok(http_get(http, "/stat").is_ok()))?;
    let publishers = Publishers::start(dir.path(), rtmp, count)?;
    std::thread::sleep(SETTLE);
    let snapshot = || -> io::Result<_> {
        let text = http_get(http, "/stat")?;
        Ok((Instant::now(), bytes_in(&text), publishers_in(&text)))
    };
    let (began, before, publishing) = snapshot()?;
    let cpu = nginx.cpu_seconds();
    std::thread::sleep(plan.measure);
    let cpu = nginx.cpu_seconds() - cpu;
    let resident = nginx.resident_bytes() as f64;
    let (ended, after, publishing_at_end) = snapshot()?;
    nginx.check()?;
    let connected = publishers.check()?;
    if [publishing, publishing_at_end] != [count; 2] {
        return Err(io::Error::other(format!(
            "of {count} publishers, nginx has {publishing} at the start and {publishing_at_end} at \
             the end"
        )));
    }
    let check = Check { seconds: ended.duration_since(began).as_secs_f64(), count };
    // nginx counts bytes of chunks, a few per cent more.
    check.near("bytes at nginx", after - before, media.bit_rate() / 8.0 * 1.03)?;
    Ok(Load { cpu: cpu / plan.measure.as_secs_f64() * 100.0, resident, connected })
}

/// Total bytes received by nginx.
fn bytes_in(stat: &str) -> f64 {
    let number = stat.split_once("<bytes_in>").and_then(|(_, rest)| rest.split_once('<'));
    number.and_then(|(number, _)| number.parse().ok()).unwrap_or(f64::NAN)
}

/// Publishing connections at nginx. Only `<client>` elements count; streams have the mark, too.
fn publishers_in(stat: &str) -> usize {
    let clients = stat.split("<client>").skip(1).filter_map(|rest| rest.split("</client>").next());
    clients.filter(|client| client.contains("<publishing/>")).count()
}

/// Measures the bare loop.
fn send(media: &Media, count: usize, plan: &Plan) -> io::Result<f64> {
    let dir = scratch()?;
    let target = free_address();
    let mut sink =
        Process::start_child(dir.path(), "receive", "ingest-receive", &[&target.to_string()])?;
    let mut sender = Process::start_child(
        dir.path(),
        "send",
        "ingest-send",
        &[&target.to_string(), &count.to_string()],
    )?;
    // The streams start one after the other.
    std::thread::sleep(SETTLE.max(Duration::from_millis(2500)));
    let (began, before) = (Instant::now(), last_number(dir.path(), "receive")?);
    let cpu = sender.cpu_seconds();
    std::thread::sleep(plan.measure);
    let cpu = sender.cpu_seconds() - cpu;
    let after = last_number(dir.path(), "receive")?;
    sink.check()?;
    sender.check()?;
    let check = Check { seconds: began.elapsed().as_secs_f64(), count };
    check.near("datagrams of the bare loop", after - before, media.datagram_rate())?;
    Ok(cpu / plan.measure.as_secs_f64() * 100.0)
}

/// The process of the publishers.
struct Publishers {
    process: Process,
    dir: std::path::PathBuf,
}

impl Publishers {
    /// Starts the process and waits until all publishers are connected and send.
    fn start(dir: &Path, server: SocketAddr, count: usize) -> io::Result<Self> {
        let arguments = [server.to_string(), count.to_string()];
        let arguments = [arguments[0].as_str(), arguments[1].as_str()];
        let mut process = Process::start_child(dir, "publishers", "ingest-publishers", &arguments)?;
        wait_for("all publishers send", PATIENCE, || {
            process.check()?;
            // One line for the connection, then one per second.
            Ok(log(dir, "publishers")?.lines().count() > 3)
        })?;
        Ok(Self { process, dir: dir.into() })
    }

    /// Checks that the process runs. Returns the milliseconds until all were connected.
    fn check(mut self) -> io::Result<u64> {
        self.process.check()?;
        let text = log(&self.dir, "publishers")?;
        let millis = text
            .lines()
            .find_map(|line| line.strip_prefix("connected in ")?.strip_suffix(" ms")?.parse().ok());
        millis.ok_or_else(|| io::Error::other("the publishers did not connect"))
    }
}

/// Checks counters against the published media.
struct Check {
    seconds: f64,
    count: usize,
}

impl Check {
    /// # Errors
    /// If `value` differs from `rate` per second and stream by more than [`TOLERANCE`].
    fn near(&self, name: &str, value: f64, rate: f64) -> io::Result<()> {
        let expected = rate * self.count as f64 * self.seconds;
        match (value / expected - 1.0).abs() < TOLERANCE {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "{name}: {value:.0} instead of {expected:.0} in {:.2} s; the machine is too busy, or \
                 there is a fault",
                self.seconds
            ))),
        }
    }
}

fn plot(growth: &[(usize, Round)]) -> Plot {
    let series = |system, colour, dashed, value: fn(&Round) -> f64| Series {
        system,
        colour,
        dashed,
        points: growth.iter().map(|(_, round)| Some(value(round))).collect(),
    };
    let cpu = vec![
        series("Downpour", "#0a6", false, |round| round.ours.cpu),
        series("floor", "#888", true, Round::floor),
        series("nginx-rtmp", "#c60", false, |round| round.nginx.cpu),
    ];
    let memory = vec![
        series("Downpour", "#0a6", false, |round| round.ours.resident / 1e6),
        series("rings", "#888", true, |round| round.ring_bytes / 1e6),
        series("nginx-rtmp", "#c60", false, |round| round.nginx.resident / 1e6),
    ];
    Plot {
        title: "Ingest: publishers of 212 kbit/s",
        ticks: growth.iter().map(|(count, _)| count.to_string()).collect(),
        scale: Scale::Linear,
        panels: vec![
            Panel { title: "% of a core".into(), series: cpu },
            Panel { title: "resident, MB".into(), series: memory },
        ],
    }
}

fn check_nginx() -> io::Result<()> {
    match [NGINX, NGINX_MODULE].iter().find(|path| !Path::new(path).exists()) {
        None => Ok(()),
        Some(path) => Err(io::Error::other(format!(
            "{path} is missing; run: apt-get install nginx-light libnginx-mod-rtmp"
        ))),
    }
}

fn log(dir: &Path, role: &str) -> io::Result<String> {
    fs::read_to_string(dir.join(format!("{role}.log")))
}

/// The last line of a child process's output, as a number.
fn last_number(dir: &Path, role: &str) -> io::Result<f64> {
    let text = log(dir, role)?;
    let number = text.lines().last().and_then(|line| line.parse().ok());
    number.ok_or_else(|| io::Error::other(format!("no number in the output of {role}: {text}")))
}

/// Retries a failed measurement: on a busy machine, publishers may fall behind for a while. A fault of
/// the program fails every attempt.
fn retry<T>(mut measure: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..ATTEMPTS {
        match measure() {
            Ok(measured) => return Ok(measured),
            Err(error) => eprintln!("retry: {error}"),
        }
    }
    measure()
}

fn scratch() -> io::Result<tempfile::TempDir> {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))
}

const PUBLISHERS: usize = 1000;
const RESIDENT_MB: f64 = 200.0;
const QUICK: Plan = Plan { rounds: 1, measure: Duration::from_secs(2), growth: &[] };
const FULL: Plan = Plan { rounds: 3, measure: Duration::from_secs(5), growth: &[100, 500, 2000] };
/// Time until the cloud's rings of 3 s are full, after all publishers have sent for about 2 s.
const FILL: Duration = Duration::from_millis(1500);
/// Time after the start that is not measured.
const SETTLE: Duration = Duration::from_millis(500);
/// The children print counters only every 100 ms.
const TOLERANCE: f64 = 0.08;
const ATTEMPTS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(30);
const NGINX: &str = "/usr/sbin/nginx";
const NGINX_MODULE: &str = "/usr/lib/nginx/modules/ngx_rtmp_module.so";
