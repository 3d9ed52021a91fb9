//! The grid: links, budgets for repair, and Downpour's targets on them.

use std::time::Duration;

use downpour_netem::{Bursts, LinkSettings};

use crate::media::Cadence;

/// Budgets for repair, in round trips.
pub const BUDGETS: [u32; 4] = [2, 3, 4, 6];

/// The system under test.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum System {
    /// Bare UDP without repair. It shows the link's own loss and checks the emulator.
    Udp,
    Srt,
    Rist,
    Downpour,
}

impl System {
    pub const ALL: [Self; 4] = [Self::Udp, Self::Srt, Self::Rist, Self::Downpour];

    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "UDP",
            Self::Srt => "SRT",
            Self::Rist => "RIST",
            Self::Downpour => "Downpour",
        }
    }
}

/// One link under one kind of stress.
#[derive(Debug, Clone)]
pub struct Profile {
    pub name: String,
    pub round_trip: Duration,
    /// Link settings over time, in order.
    pub phases: Vec<Phase>,
    pub cadence: Cadence,
    /// Factor for the length of the measurement.
    pub stretch: f64,
    /// `true` if the profile is part of `--quick`.
    pub quick: bool,
    pub targets: Targets,
}

impl Profile {
    /// The same link without loss, jitter or limits.
    pub fn clean(&self) -> LinkSettings {
        clean(self.round_trip)
    }

    pub fn budget(&self, round_trips: u32) -> Duration {
        self.round_trip * round_trips
    }
}

/// Settings of both directions from a point in time.
#[derive(Debug, Clone)]
pub struct Phase {
    /// Counted from the start of the measurement.
    pub at: Duration,
    pub forward: LinkSettings,
    pub back: LinkSettings,
}

/// Downpour's targets for one link; `None` means no target.
#[derive(Debug, Clone, Copy, Default)]
pub struct Targets {
    /// Loss after repair in per cent, per entry of [`BUDGETS`].
    pub loss: Option<[f64; 4]>,
    /// Median delay until a packet is available, in milliseconds.
    pub median_ms: Option<f64>,
    /// 99th percentile of the same delay, in round trips.
    pub p99_round_trips: Option<f64>,
}

/// Target for Downpour's bytes beyond the media, as a multiple of SRT's, per entry of [`BUDGETS`].
pub const OVERHEAD_OF_SRT: [f64; 4] = [1.5, 1.5, 1.0, 1.0];

/// Returns all profiles in the order of the report.
pub fn profiles() -> Vec<Profile> {
    let mut profiles = Vec::new();
    for round_trip in [20, 100, 200].map(Duration::from_millis) {
        for percent in [1, 5, 10, 20, 30] {
            profiles.push(random_loss(round_trip, percent));
        }
    }
    let rtt = Duration::from_millis(100);
    let with = |loss: f64| LinkSettings { loss, ..clean(rtt) };
    let symmetric = |name: &str, path: LinkSettings| profile(name, rtt, path.clone(), path);
    profiles.push(Profile {
        targets: Targets { loss: Some([0.4, 0.05, 0.005, 0.0]), ..Targets::default() },
        quick: true,
        ..symmetric(
            "5 % in bursts of 8",
            LinkSettings {
                bursts: Some(Bursts::covering(0.05, Duration::from_millis(8))),
                ..clean(rtt)
            },
        )
    });
    profiles.push(symmetric(
        "5 % reordered by 10 ms, 1 % loss",
        LinkSettings { reorder: 0.05, reorder_delay: Duration::from_millis(10), ..with(0.01) },
    ));
    profiles.push(symmetric(
        "jitter of 25 ms, 5 % loss",
        LinkSettings { jitter: rtt / 4, ..with(0.05) },
    ));
    profiles.push(cut("cut of 300 ms, 1 % loss", rtt, Duration::from_millis(300)));
    profiles
        .push(Profile { stretch: 1.5, ..cut("cut of 2 s, 1 % loss", rtt, Duration::from_secs(2)) });
    profiles.push(symmetric(
        "8.8 Mbit/s, queue of 20 ms, 5 % loss",
        LinkSettings { rate_bps: Some(8_800_000), queue_bytes: 22_000, ..with(0.05) },
    ));
    profiles.push(profile("10 % loss forward only", rtt, with(0.1), with(0.0)));
    profiles.push(profile("1 % loss forward, 20 % back", rtt, with(0.01), with(0.2)));
    profiles.push(Profile {
        cadence: Cadence::Bursts,
        stretch: 2.5,
        quick: true,
        ..symmetric("200 ms of media, 300 ms of silence, 10 % loss", with(0.1))
    });
    profiles
}

fn random_loss(round_trip: Duration, percent: u32) -> Profile {
    let path = LinkSettings { loss: f64::from(percent) / 100.0, ..clean(round_trip) };
    let loss = match (round_trip.as_millis(), percent) {
        (20, 5) => Some([0.1, 0.005, 0.0, 0.0]),
        (20, 20) => Some([1.0, 0.1, 0.01, 0.0]),
        (100, 5) => Some([0.1, 0.002, 0.0, 0.0]),
        (100, 10) => Some([0.3, 0.01, 0.0001, 0.0]),
        (100, 20) => Some([1.0, 0.1, 0.01, 0.0]),
        _ => None,
    };
    let median_ms = match percent {
        0..=5 => Some(2.0),
        6..=20 => Some(5.0),
        _ => None,
    };
    let p99_round_trips = (percent <= 5).then_some(1.3);
    Profile {
        quick: matches!((round_trip.as_millis(), percent), (20, 5) | (100, 5 | 20)),
        targets: Targets { loss, median_ms, p99_round_trips },
        ..profile(&format!("{percent} % loss"), round_trip, path.clone(), path)
    }
}

/// A link that drops everything for `length`, from 1 s on.
fn cut(name: &str, round_trip: Duration, length: Duration) -> Profile {
    let start = Duration::from_secs(1);
    let path = LinkSettings { loss: 0.01, ..clean(round_trip) };
    let phase = |at, path: LinkSettings| Phase { at, forward: path.clone(), back: path };
    Profile {
        phases: vec![
            phase(Duration::ZERO, path.clone()),
            phase(start, LinkSettings { loss: 1.0, ..clean(round_trip) }),
            phase(start + length, path.clone()),
        ],
        ..profile(name, round_trip, path.clone(), path)
    }
}

fn profile(name: &str, round_trip: Duration, forward: LinkSettings, back: LinkSettings) -> Profile {
    Profile {
        name: format!("{} ms, {name}", round_trip.as_millis()),
        round_trip,
        phases: vec![Phase { at: Duration::ZERO, forward, back }],
        cadence: Cadence::Steady,
        stretch: 1.0,
        quick: false,
        targets: Targets::default(),
    }
}

fn clean(round_trip: Duration) -> LinkSettings {
    LinkSettings { delay: round_trip / 2, ..LinkSettings::default() }
}
