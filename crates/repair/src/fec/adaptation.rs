//! `fec: auto`: selects the parity of each receiver and stream from edges' reports.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::{
    control::{Nonce, PathReport},
    fec::{
        Matrix, MatrixSelector,
        matrix_selector::{self, FRESH, Report},
    },
    rtp::Ssrc,
};

/// A receiver whose parity is adapted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ParityTarget {
    /// A listed address or multicast group, which receives every stream.
    Fixed(SocketAddr),
    /// An edge, at the addresses it proved.
    Edge(Nonce),
}

/// The parity that reports call for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Reports have ended; use the default.
    Unknown,
    /// Use this matrix; `None` is no parity.
    Use(Option<Matrix>),
}

/// Adapts the parity of all receivers and streams.
///
/// An entry exists for a receiver and stream while edges report on it: created by the first report
/// (of loss, or for a stream that has parity without reports), removed with [`Choice::Unknown`] when
/// the stream ends or its reports stop. Invariant: [`Self::decide`] returns a [`Change`] only if the
/// choice differs from the last one returned.
#[derive(Default)]
pub struct Adaptation {
    entries: HashMap<ParityTarget, HashMap<Ssrc, Entry>>,
    /// Matrices of streams without reports, for [`ParityTarget::Fixed`].
    without_reports: HashMap<Ssrc, Matrix>,
}

struct Entry {
    selector: MatrixSelector,
    /// Latency of each edge, and when it reported last.
    latencies: HashMap<u64, (Duration, Instant)>,
    /// The last choice returned by `decide`.
    announced: Option<Option<Matrix>>,
}

/// The edge that sends a report.
#[derive(Debug, Clone, Copy)]
pub struct Reporter {
    /// Unique identifier of the edge.
    pub edge: u64,
    /// The edge's latency: a packet that is later than this is useless.
    pub latency: Duration,
}

/// A change of the parity of one stream at one receiver.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// The receiver.
    pub target: ParityTarget,
    /// The stream.
    pub ssrc: Ssrc,
    /// The new parity.
    pub choice: Choice,
    /// The previous matrix, for logs.
    pub before: Option<Matrix>,
}

impl Adaptation {
    /// Handles an edge's report on a stream, for the parity of one receiver.
    pub fn handle_report(
        &mut self,
        now: Instant,
        target: ParityTarget,
        ssrc: Ssrc,
        reporter: Reporter,
        report: Report,
    ) {
        let without_reports = match target {
            ParityTarget::Fixed(_) => self.without_reports.get(&ssrc).copied(),
            ParityTarget::Edge(_) => None,
        };
        let streams = self.entries.entry(target).or_default();
        if without_reports.is_none() && report.loss <= 0.0 && !streams.contains_key(&ssrc) {
            // The receiver has no parity and needs none.
            if streams.is_empty() {
                self.entries.remove(&target);
            }
            return;
        }
        let entry = streams.entry(ssrc).or_insert_with(|| Entry {
            selector: MatrixSelector::new(matrix_selector::Settings {
                without_reports,
                ..Default::default()
            }),
            latencies: HashMap::new(),
            announced: None,
        });
        entry.selector.handle_report(now, reporter.edge, report);
        if entry.latencies.len() < matrix_selector::EDGE_LIMIT {
            let latency = reporter.latency.clamp(LATENCIES.0, LATENCIES.1);
            entry.latencies.insert(reporter.edge, (latency, now));
        }
    }

    /// Removes an edge that reported for `targets`.
    pub fn remove_edge(&mut self, edge: u64, targets: &HashSet<ParityTarget>) {
        for target in targets {
            for entry in self.entries.get_mut(target).into_iter().flat_map(HashMap::values_mut) {
                entry.selector.remove(edge);
                entry.latencies.remove(&edge);
            }
        }
    }

    /// Updates all choices and returns the changes; call about once per second. `rates` is the packets
    /// per second of each live stream, 0 if not known yet. Streams that ended or have no reports are
    /// removed.
    pub fn decide(&mut self, now: Instant, rates: &HashMap<Ssrc, f64>) -> Vec<Change> {
        let mut changes = Vec::new();
        self.entries.retain(|target, streams| {
            streams.retain(|ssrc, entry| {
                let rate = rates.get(ssrc).copied();
                let (choice, before) = entry.decide(now, rate);
                if let Some(choice) = choice {
                    changes.push(Change { target: *target, ssrc: *ssrc, choice, before });
                }
                choice != Some(Choice::Unknown)
            });
            !streams.is_empty()
        });
        changes
    }

    /// Updates and returns the matrices of all live streams for receivers without reports. `rates` as
    /// in [`Self::decide`].
    pub fn decide_without_reports(&mut self, rates: &HashMap<Ssrc, f64>) -> &HashMap<Ssrc, Matrix> {
        self.without_reports.retain(|ssrc, _| rates.contains_key(ssrc));
        for (ssrc, rate) in rates.iter().filter(|(_, rate)| **rate > 0.0) {
            let current = self.without_reports.get(ssrc).copied();
            self.without_reports.insert(*ssrc, matrix_without_reports(*rate, current));
        }
        &self.without_reports
    }
}

impl Entry {
    /// Returns the new choice, or `None` if it is unchanged, and the previous matrix.
    fn decide(&mut self, now: Instant, rate: Option<f64>) -> (Option<Choice>, Option<Matrix>) {
        let before = self.announced.unwrap_or(self.selector.selected());
        self.latencies.retain(|_, (_, seen)| now.saturating_duration_since(*seen) <= FRESH);
        // Ignores the lowest few: one edge with a low latency must not take the others' parity away.
        let mut latencies: Vec<_> = self.latencies.values().map(|(latency, _)| *latency).collect();
        latencies.sort_unstable();
        let ignored = latencies.len().saturating_sub(1) / LOW_LATENCY_SHARE;
        let (Some(rate), Some(latency)) = (rate, latencies.get(ignored).copied()) else {
            return (Some(Choice::Unknown), before);
        };
        // The rate is unknown in a stream's first second.
        if rate > 0.0 {
            self.selector.set_delay_max((rate * latency.as_secs_f64()) as usize);
            self.selector.decide(now);
        }
        let selected = self.selector.selected();
        let choice = (self.announced != Some(selected)).then_some(Choice::Use(selected));
        self.announced = Some(selected);
        (choice, before)
    }
}

/// Returns the loss between two reports of an edge, before any repair, on the path with the least loss.
/// `None` if nothing was received or the counters restarted.
pub fn loss_between(before: &[PathReport], after: &[PathReport]) -> Option<Report> {
    let reports = before.iter().zip(after).filter_map(|(before, after)| {
        let received = after.received.checked_sub(before.received).filter(|count| *count > 0)?;
        // `lost` may decrease: a late packet is subtracted again.
        let lost = after.lost.saturating_sub(before.lost) as f64;
        let gaps = after.gaps.saturating_sub(before.gaps) as f64;
        let burst = (gaps > 0.0 && lost > 0.0).then(|| lost / gaps);
        Some(Report { loss: lost / (received as f64 + lost), burst })
    });
    reports.min_by(|a, b| a.loss.total_cmp(&b.loss))
}

/// Returns the strongest matrix whose delay is at most [`DELAY_WITHOUT_REPORTS`] at `rate` packets per
/// second. Keeps `current` while the rate varies by up to a quarter (hysteresis).
fn matrix_without_reports(rate: f64, current: Option<Matrix>) -> Matrix {
    let budget = rate * DELAY_WITHOUT_REPORTS.as_secs_f64();
    let within = |budget: f64| {
        let fitting = WITHOUT_REPORTS.into_iter().find(|matrix| matrix.delay() as f64 <= budget);
        fitting.unwrap_or(WITHOUT_REPORTS[WITHOUT_REPORTS.len() - 1])
    };
    match current {
        Some(current) if [within(budget * 0.8), within(budget * 1.25)].contains(&current) => {
            current
        }
        _ => within(budget),
    }
}

const fn matrix(columns: u8, rows: u8) -> Matrix {
    match Matrix::new(columns, rows) {
        Ok(matrix) => matrix,
        Err(_) => panic!("invalid matrix"),
    }
}

/// One in this many edges may have a lower latency than the parity meets.
const LOW_LATENCY_SHARE: usize = 20;
/// Strongest first, which is also slowest first.
const WITHOUT_REPORTS: [Matrix; 5] =
    [matrix(10, 10), matrix(10, 5), matrix(5, 5), matrix(10, 1), matrix(5, 1)];
const DELAY_WITHOUT_REPORTS: Duration = Duration::from_millis(500);
/// Range to which an edge's latency is clamped.
const LATENCIES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(30));

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::{control::Nonce, fec::matrix_selector::HOLD};

    const SSRC: Ssrc = Ssrc(7);
    const OWN: ParityTarget = ParityTarget::Edge(Nonce([1; 16]));

    struct Simulation {
        adaptation: Adaptation,
        now: Instant,
        rates: HashMap<Ssrc, f64>,
    }

    impl Simulation {
        fn new(rate: f64) -> Self {
            let rates = HashMap::from([(SSRC, rate)]);
            Self { adaptation: Adaptation::default(), now: Instant::now(), rates }
        }

        /// Reports once per second. Returns the changes.
        fn run(&mut self, seconds: u64, target: ParityTarget, loss: f64) -> Vec<Choice> {
            let report = Report { loss, burst: Some(1.0) };
            let reporter = Reporter { edge: 1, latency: Duration::from_millis(500) };
            let mut changes = Vec::new();
            for _ in 0..seconds {
                self.now += Duration::from_secs(1);
                self.adaptation.handle_report(self.now, target, SSRC, reporter, report);
                changes.extend(self.decide());
            }
            changes
        }

        fn decide(&mut self) -> Vec<Choice> {
            self.adaptation.decide_without_reports(&self.rates);
            let changes = self.adaptation.decide(self.now, &self.rates);
            changes.iter().map(|change| change.choice).collect()
        }
    }

    fn group() -> ParityTarget {
        ParityTarget::Fixed(SocketAddr::from(([239, 0, 0, 1], 5222)))
    }

    #[test]
    fn an_edge_has_parity_only_while_it_has_loss() {
        let mut simulation = Simulation::new(1000.0);
        assert_eq!(simulation.run(30, OWN, 0.0), []);
        assert!(simulation.adaptation.entries.is_empty());
        let on = simulation.run(20, OWN, 0.03);
        let [Choice::Use(Some(first)), ..] = on[..] else { panic!("{on:?}") };
        assert!(first.overhead() <= 0.2, "{first}");
        let off = simulation.run(120, OWN, 0.0);
        assert_eq!(off.last(), Some(&Choice::Use(None)), "{off:?}");
        // Its reports stop.
        simulation.now += FRESH + Duration::from_secs(1);
        assert_eq!(simulation.decide(), [Choice::Unknown]);
        assert!(simulation.adaptation.entries.is_empty());
    }

    #[test]
    fn a_group_has_default_parity_until_reports_arrive() {
        let mut simulation = Simulation::new(1000.0);
        assert_eq!(simulation.decide(), []);
        assert_eq!(simulation.adaptation.without_reports[&SSRC], matrix(10, 10));
        let reported = simulation.run(HOLD.as_secs() + 5, group(), 0.0);
        assert_eq!(reported, [Choice::Use(Some(matrix(10, 10))), Choice::Use(None)]);
        simulation.adaptation.remove_edge(1, &HashSet::from([group()]));
        assert_eq!(simulation.decide(), [Choice::Unknown]);
    }

    #[test]
    fn parity_of_a_slow_stream_meets_the_latency() {
        // 50 packets per half second.
        let mut simulation = Simulation::new(100.0);
        let on = simulation.run(30, OWN, 0.05);
        assert!(!on.is_empty());
        for choice in on {
            let Choice::Use(Some(matrix)) = choice else { panic!("{choice:?}") };
            assert!(matrix.delay() <= 50, "{matrix}");
        }
        simulation.rates.insert(SSRC, 0.0);
        assert_eq!(simulation.run(5, OWN, 0.05), [], "the rate is unknown");
        simulation.rates.clear();
        assert_eq!(simulation.decide(), [Choice::Unknown], "the stream ended");
    }

    #[test]
    fn default_parity_fits_half_a_second_with_hysteresis() {
        for (rate, expected) in [
            (1000.0, matrix(10, 10)),
            (399.0, matrix(10, 5)),
            (120.0, matrix(5, 5)),
            (43.0, matrix(10, 1)),
            (12.0, matrix(5, 1)),
            (1.0, matrix(5, 1)),
        ] {
            assert_eq!(matrix_without_reports(rate, None), expected, "{rate}");
        }
        let mut current = matrix_without_reports(410.0, None);
        for rate in [390.0, 405.0, 380.0, 420.0] {
            current = matrix_without_reports(rate, Some(current));
            assert_eq!(current, matrix(10, 10), "{rate}");
        }
        current = matrix_without_reports(300.0, Some(current));
        assert_eq!(current, matrix(10, 5));
        current = matrix_without_reports(420.0, Some(current));
        assert_eq!(current, matrix(10, 5));
        assert_eq!(matrix_without_reports(600.0, Some(current)), matrix(10, 10));
    }

    #[test]
    fn loss_is_that_of_the_better_path_since_the_last_report() {
        let path = |received, lost, gaps| PathReport { received, lost, gaps };
        let zero = PathReport::default();
        let between = |before: [PathReport; 2], after: [PathReport; 2]| {
            loss_between(&before, &after).map(|report| (report.loss, report.burst))
        };
        assert_eq!(between([zero; 2], [path(96, 4, 2), zero]), Some((0.04, Some(2.0))));
        let before = [path(100, 10, 5), path(50, 1, 1)];
        let after = [path(180, 30, 15), path(149, 2, 2)];
        assert_eq!(between(before, after), Some((0.01, Some(1.0))));
        assert_eq!(between(before, [path(190, 9, 5), path(50, 1, 1)]), Some((0.0, None)));
        assert_eq!(between(before, before), None);
        assert_eq!(between(before, [path(5, 0, 0), zero]), None);
        let huge = [path(u64::MAX, u64::MAX, u64::MAX); 2];
        assert_eq!(between([zero; 2], huge), Some((0.5, Some(1.0))));
    }
}
