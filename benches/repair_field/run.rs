//! One run: one system over one link with one seed.
//!
//! All systems get the same treatment. A run starts over the clean link, waits until packets flow
//! steadily, and makes the link bad. The packets sent in the time of the measurement are counted. The
//! link stays bad until the budget of the last one is over, and is clean again while the last packets
//! arrive.

use std::{
    io,
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use crate::{
    common::process::{Process, free_address},
    downpour::{self, EdgeCounts},
    grid::{Profile, System},
    media::{Arrival, PACKET_LEN, Sink, Source},
    rist, srt,
    wire::{Count, Direction, Route, Traffic, Wire},
};

/// The parameters of a run.
pub struct Setup<'a> {
    pub profile: &'a Profile,
    /// In round trips.
    pub budget: u32,
    pub system: System,
    pub seed: u64,
    /// Length of the measurement, before the profile's stretch.
    pub length: Duration,
    /// Directory for the files of the processes.
    pub dir: &'a Path,
    /// Origin of all times.
    pub clock: Instant,
}

impl Setup<'_> {
    pub fn budget(&self) -> Duration {
        self.profile.budget(self.budget)
    }
}

/// A running system.
pub struct Rig {
    // Fields are dropped in this order: the source stops before its receivers.
    pub source: Source,
    pub sink: Sink,
    pub processes: Vec<Process>,
    pub wire: Wire,
    /// HTTP address of Downpour's edge.
    pub edge: Option<SocketAddr>,
}

/// The result of a run.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Outcome {
    /// Packets sent during the measurement.
    pub sent: u64,
    /// Packets of these that were never delivered.
    pub lost: u64,
    /// Longest run of lost packets.
    pub longest_gap: u64,
    /// Repeated deliveries.
    pub duplicates: u64,
    /// Delay of each delivered packet beyond one way, in microseconds, sorted.
    #[serde(skip)]
    pub delays: Vec<u32>,
    /// Bytes of media sent while the link was bad, and all bytes in both directions with IP and UDP
    /// headers.
    pub media_bytes: u64,
    pub wire_bytes: u64,
    /// Datagrams and payload bytes per direction while the link was bad.
    pub forward: Count,
    pub back: Count,
    /// Processor time of each process, in cores.
    pub cpu: Vec<f64>,
    /// See [`EdgeCounts::fates`].
    pub fates: Vec<(String, f64)>,
    /// See [`EdgeCounts::available`].
    pub available: Vec<(f64, f64)>,
    /// 99th percentiles of the lateness of the emulator and the source, in microseconds.
    pub emulator_late: u32,
    pub source_late: u32,
    /// The first lost packets, counted from the first packet of the measurement.
    pub lost_numbers: Vec<u64>,
}

impl Outcome {
    /// `true` if the machine kept up, so that the run measures the system and not the machine.
    pub fn is_valid(&self) -> bool {
        self.emulator_late.max(self.source_late) <= LATE_MAX_US
    }
}

/// Runs one system over one link.
///
/// # Errors
/// If a process does not start or exits, packets do not flow over the clean link, or the emulator
/// fails to send.
pub fn run(setup: &Setup) -> io::Result<Outcome> {
    let mut rig = match setup.system {
        System::Udp => udp(setup),
        System::Srt => srt::start(setup),
        System::Rist => rist::start(setup),
        System::Downpour => downpour::start(setup),
    }?;
    wait_for("steady flow over the clean link", STEADY_WITHIN, || {
        rig.check()?;
        Ok(rig.sink.is_steady(STEADY_PACKETS).then_some(()))
    })?;
    std::thread::sleep(SETTLE);
    rig.check()?;
    let measured = measure(setup, &mut rig)?;
    evaluate(setup, &rig, measured)
}

/// Values read during a measurement.
struct Measured {
    /// Number of the first packet.
    first: u64,
    /// Number after the last packet that counts.
    end: u64,
    /// Packets sent while the link was bad.
    sent_while_bad: u64,
    traffic: Traffic,
    source_late: Vec<u32>,
    cpu: Vec<f64>,
    edge: EdgeCounts,
}

/// Runs the phases of the profile, then waits over the clean link for the last packets.
fn measure(setup: &Setup, rig: &mut Rig) -> io::Result<Measured> {
    let cpu = rig.cpu_seconds();
    let edge = rig.edge.map(EdgeCounts::read).transpose()?.unwrap_or_default();
    let length = setup.length.mul_f64(setup.profile.stretch);
    rig.source.take_lateness();
    rig.wire.take_traffic();
    let start = Instant::now();
    let first = rig.source.next();
    for phase in &setup.profile.phases {
        sleep_until(start + phase.at);
        rig.wire.set(&phase.forward, &phase.back);
    }
    sleep_until(start + length);
    let end = rig.source.next();
    sleep_until(start + length + setup.budget() + setup.profile.round_trip);
    let traffic = rig.wire.take_traffic();
    let sent_while_bad = rig.source.next() - first;
    let source_late = rig.source.take_lateness();
    let wall = start.elapsed().as_secs_f64();
    let cpu = rig.cpu_seconds().iter().zip(cpu).map(|(now, then)| (now - then) / wall).collect();
    let clean = setup.profile.clean();
    rig.wire.set(&clean, &clean);
    std::thread::sleep(setup.profile.round_trip + MARGIN);
    rig.check()?;
    let edge = rig.edge.map(EdgeCounts::read).transpose()?.unwrap_or_default().since(&edge);
    Ok(Measured { first, end, sent_while_bad, traffic, source_late, cpu, edge })
}

fn evaluate(setup: &Setup, rig: &Rig, measured: Measured) -> io::Result<Outcome> {
    let Measured { first, end, sent_while_bad, traffic, source_late, cpu, edge } = measured;
    if traffic.errors > 0 {
        let errors = traffic.errors;
        return Err(io::Error::other(format!("the emulator failed to send {errors} datagrams")));
    }
    let arrivals = rig.sink.arrivals(first, end);
    let one_way = setup.profile.round_trip / 2;
    let mut delays: Vec<u32> = arrivals
        .iter()
        .flatten()
        .map(|arrival| arrival.took.saturating_sub(one_way).as_micros() as u32)
        .collect();
    delays.sort_unstable();
    let lost_count = (arrivals.len() - delays.len()) as u64;
    if setup.system == System::Udp && lost_count > traffic.dropped_forward {
        return Err(io::Error::other(format!(
            "{lost_count} packets are missing, but the emulator dropped only {}",
            traffic.dropped_forward
        )));
    }
    let lost = arrivals.iter().zip(0..).filter(|(arrival, _)| arrival.is_none());
    Ok(Outcome {
        sent: end - first,
        lost: lost_count,
        longest_gap: longest_gap(&arrivals),
        duplicates: arrivals.iter().flatten().map(|arrival| u64::from(arrival.duplicates)).sum(),
        delays,
        media_bytes: sent_while_bad * PACKET_LEN as u64,
        wire_bytes: traffic.forward.with_headers() + traffic.back.with_headers(),
        forward: traffic.forward,
        back: traffic.back,
        cpu,
        fates: edge.fates,
        available: edge.available,
        emulator_late: p99(traffic.lateness),
        source_late: p99(source_late),
        lost_numbers: lost.map(|(_, number)| number).take(LOST_NUMBERS).collect(),
    })
}

/// Length of the longest run of lost packets.
fn longest_gap(arrivals: &[Option<Arrival>]) -> u64 {
    arrivals
        .chunk_by(|a, b| a.is_none() && b.is_none())
        .filter(|run| run[0].is_none())
        .map(|run| run.len() as u64)
        .max()
        .unwrap_or(0)
}

/// Polls `attempt` every 20 ms until it returns a value.
///
/// # Errors
/// If `attempt` fails, or returns no value `within` the time.
pub fn wait_for<T>(
    description: &str,
    within: Duration,
    mut attempt: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("timed out: {description}"),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Rig {
    fn check(&mut self) -> io::Result<()> {
        if let Some(failure) = self.source.failure() {
            return Err(io::Error::other(format!("the source failed: {failure}")));
        }
        self.processes.iter_mut().try_for_each(Process::check)
    }

    fn cpu_seconds(&self) -> Vec<f64> {
        self.processes.iter().map(Process::cpu_seconds).collect()
    }
}

/// Bare UDP without repair.
fn udp(setup: &Setup) -> io::Result<Rig> {
    let output = free_address();
    let sink = Sink::udp(setup.clock, output)?;
    let wire = forward_wire(setup, output)?;
    let source = Source::udp(setup.clock, setup.profile.cadence, wire.address(0))?;
    Ok(Rig { wire, source, sink, processes: Vec::new(), edge: None })
}

/// Addresses of a sender and a receiver process.
pub struct Ends {
    /// The sender reads datagrams of the source here.
    pub input: SocketAddr,
    /// The sender sends to this end of the wire.
    pub wire: SocketAddr,
    /// The receiver listens here, at the other end of the wire.
    pub listener: SocketAddr,
    /// The receiver writes datagrams to this address.
    pub output: SocketAddr,
}

/// A rig of a receiver and a sender process, both with datagrams at the ends. `start` starts them in
/// this order.
pub fn start_pair(
    setup: &Setup,
    start: impl FnOnce(&Ends) -> io::Result<[Process; 2]>,
) -> io::Result<Rig> {
    let [input, listener, output] = [(); 3].map(|()| free_address());
    let wire = forward_wire(setup, listener)?;
    let sink = Sink::udp(setup.clock, output)?;
    let processes = start(&Ends { input, wire: wire.address(0), listener, output })?.into();
    let source = Source::udp(setup.clock, setup.profile.cadence, input)?;
    Ok(Rig { wire, source, sink, processes, edge: None })
}

/// A clean wire with one route, to `upstream`.
fn forward_wire(setup: &Setup, upstream: SocketAddr) -> io::Result<Wire> {
    let route = Route { upstream, direction: Direction::Forward };
    Wire::start(&[route], &setup.profile.clean(), setup.seed)
}

fn sleep_until(when: Instant) {
    std::thread::sleep(when.saturating_duration_since(Instant::now()));
}

fn p99(mut values: Vec<u32>) -> u32 {
    values.sort_unstable();
    values.get((values.len() * 99 / 100).min(values.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// Packets without a gap over the clean link that count as steady.
const STEADY_PACKETS: usize = 600;
const STEADY_WITHIN: Duration = Duration::from_secs(20);
/// Time for the systems to estimate clocks and round trips.
const SETTLE: Duration = Duration::from_millis(1000);
/// Time for the processes to deliver the last packets, beyond the budget.
const MARGIN: Duration = Duration::from_millis(300);
/// With more lateness than this, the machine is too busy.
const LATE_MAX_US: u32 = 3000;
const LOST_NUMBERS: usize = 64;
