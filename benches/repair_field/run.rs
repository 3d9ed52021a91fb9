//! One run: one system over one link with one seed.
//!
//! Every system is treated alike. It runs over the clean link until its flow is steady and a while
//! longer, then over the bad one. Counted is what is sent in the measurement's time; the link stays
//! bad until all of that has had its budget, and is good again while the last of it comes in.

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
    media::{PACKET_LEN, Sink, Source},
    rist, srt,
    wire::{Count, Door, Way, Wire},
};

/// What to run.
pub struct Setup<'a> {
    pub profile: &'a Profile,
    /// In round trips.
    pub budget: u32,
    pub system: System,
    pub seed: u64,
    /// How long to measure, before the profile's stretch.
    pub length: Duration,
    /// Where processes keep their files.
    pub dir: &'a Path,
    /// What all times are counted from.
    pub clock: Instant,
}

impl Setup<'_> {
    pub fn budget(&self) -> Duration {
        self.profile.budget(self.budget)
    }
}

/// A system at work.
pub struct Rig {
    // Dropped from the top down: the source ends before those who take from it.
    pub source: Source,
    pub sink: Sink,
    pub processes: Vec<Process>,
    pub wire: Wire,
    /// Where Downpour's edge answers HTTP.
    pub edge: Option<SocketAddr>,
}

/// What a run showed.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Outcome {
    /// Packets sent while it was measured.
    pub sent: u64,
    /// Of those, never delivered.
    pub lost: u64,
    /// The most in a row that were not.
    pub longest_hole: u64,
    /// Deliveries of one that had been delivered.
    pub duplicates: u64,
    /// Each delivered packet's delay beyond one way, in microseconds, sorted.
    #[serde(skip)]
    pub delays: Vec<u32>,
    /// Bytes of media, and of everything both ways with IP and UDP headers, while the link was bad.
    pub media_bytes: u64,
    pub wire_bytes: u64,
    /// The datagrams and payload bytes of each direction in that.
    pub forward: Count,
    pub back: Count,
    /// Processor time of each process over wall time: 1 is a core.
    pub cpu: Vec<f64>,
    /// What Downpour's edge counted by fate.
    pub fates: Vec<(String, f64)>,
    /// See [`EdgeCounts::there`].
    pub there: Vec<(f64, f64)>,
    /// 99th percentiles of how late the emulator and the source were, in microseconds.
    pub emulator_late: u32,
    pub source_late: u32,
    /// Numbers of the first lost packets, counted from the first that was measured.
    pub lost_numbers: Vec<u64>,
}

impl Outcome {
    /// Whether the machine kept up, so that the run tells of the system and not of the machine.
    pub fn is_sound(&self) -> bool {
        self.emulator_late.max(self.source_late) <= LATE_MAX_US
    }
}

/// Runs it.
///
/// # Errors
/// If a process does not start or ends, or no steady flow comes about over the clean link.
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

    let cpu = rig.cpu_seconds();
    let counts = rig.edge.map(EdgeCounts::read).transpose()?.unwrap_or_default();
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
    let wall = start.elapsed();
    let cpu = rig
        .cpu_seconds()
        .iter()
        .zip(cpu)
        .map(|(now, then)| (now - then) / wall.as_secs_f64())
        .collect();
    let clean = setup.profile.clean();
    rig.wire.set(&clean, &clean);
    std::thread::sleep(setup.profile.round_trip + MARGIN);
    rig.check()?;
    if traffic.errors > 0 {
        return Err(io::Error::other(format!("the emulator could not send {}", traffic.errors)));
    }
    let counts = rig.edge.map(EdgeCounts::read).transpose()?.unwrap_or_default().since(&counts);

    let arrivals = rig.sink.arrivals(first, end);
    let one_way = setup.profile.round_trip / 2;
    let mut delays: Vec<u32> = arrivals
        .iter()
        .flatten()
        .map(|arrival| arrival.took.saturating_sub(one_way).as_micros() as u32)
        .collect();
    delays.sort_unstable();
    let (mut hole, mut longest_hole) = (0, 0);
    for arrival in &arrivals {
        hole = if arrival.is_some() { 0 } else { hole + 1 };
        longest_hole = longest_hole.max(hole);
    }
    let lost_count = (arrivals.len() - delays.len()) as u64;
    if setup.system == System::Udp && lost_count > traffic.dropped_forward {
        return Err(io::Error::other(format!(
            "{lost_count} packets are missing, but the emulator dropped {} only",
            traffic.dropped_forward
        )));
    }
    let lost = arrivals.iter().zip(0..).filter(|(arrival, _)| arrival.is_none());
    Ok(Outcome {
        sent: end - first,
        lost: lost_count,
        longest_hole,
        duplicates: arrivals.iter().flatten().map(|arrival| u64::from(arrival.duplicates)).sum(),
        delays,
        media_bytes: sent_while_bad * PACKET_LEN as u64,
        wire_bytes: traffic.forward.on_the_wire() + traffic.back.on_the_wire(),
        forward: traffic.forward,
        back: traffic.back,
        cpu,
        fates: counts.fates,
        there: counts.there,
        emulator_late: p99(traffic.lateness),
        source_late: p99(source_late),
        lost_numbers: lost.map(|(_, number)| number).take(LOST_NUMBERS).collect(),
    })
}

/// Tries until there is something, and every few milliseconds.
///
/// # Errors
/// What `attempt` fails with, or that nothing came of it in time.
pub fn wait_for<T>(
    what: &str,
    within: Duration,
    mut attempt: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("never: {what}")));
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

/// Datagrams with nobody to repair them.
fn udp(setup: &Setup) -> io::Result<Rig> {
    let output = free_address();
    let sink = Sink::udp(setup.clock, output)?;
    let door = Door { upstream: output, way: Way::Forward };
    let wire = Wire::start(&[door], &setup.profile.clean(), setup.seed)?;
    let source = Source::udp(setup.clock, setup.profile.cadence, wire.door(0))?;
    Ok(Rig { wire, source, sink, processes: Vec::new(), edge: None })
}

fn sleep_until(when: Instant) {
    std::thread::sleep(when.saturating_duration_since(Instant::now()));
}

fn p99(mut values: Vec<u32>) -> u32 {
    values.sort_unstable();
    values.get((values.len() * 99 / 100).min(values.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// Packets without a gap over the clean link that make a flow steady.
const STEADY_PACKETS: usize = 600;
const STEADY_WITHIN: Duration = Duration::from_secs(20);
/// For clocks and round trips to be learned.
const SETTLE: Duration = Duration::from_millis(1000);
/// What processes may need beyond the budget.
const MARGIN: Duration = Duration::from_millis(300);
/// A machine that is later than this is too busy to measure on.
const LATE_MAX_US: u32 = 3000;
const LOST_NUMBERS: usize = 64;
