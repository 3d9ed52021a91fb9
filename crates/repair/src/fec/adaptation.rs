//! `fec: auto`: how much parity each receiver gets of each stream, from what edges report.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use crate::{
    control::{Nonce, PathReport},
    fec::{
        Adapt, Matrix,
        adapt::{self, FRESH, Report},
    },
    rtp::Ssrc,
};

/// Whose parity is set by reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Adapted {
    /// An address that gets every stream.
    Fixed(SocketAddr),
    /// An edge, at the addresses that it proved.
    Edge(Nonce),
}

/// What reports call for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// There are no reports any more.
    Unknown,
    /// This, or none.
    Use(Option<Matrix>),
}

/// One adaptation for each receiver and stream of which there are reports.
#[derive(Default)]
pub struct Adaptation {
    entries: HashMap<Adapted, HashMap<Ssrc, Entry>>,
    /// For streams of which nobody reports.
    blind: HashMap<Ssrc, Matrix>,
}

struct Entry {
    adapt: Adapt,
    /// How late a packet may come at each edge, and when it reported last.
    latencies: HashMap<u64, (Duration, Instant)>,
    /// What was last given out.
    given: Option<Option<Matrix>>,
}

/// Who reports.
#[derive(Debug, Clone, Copy)]
pub struct Reporter {
    /// A number of its own.
    pub edge: u64,
    /// How late a packet may come to be of use to it.
    pub latency: Duration,
}

/// One receiver's parity of one stream is another from now on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    pub adapted: Adapted,
    pub ssrc: Ssrc,
    pub choice: Choice,
    /// What it was; for logs.
    pub before: Option<Matrix>,
}

impl Adaptation {
    /// Takes what an edge saw of a stream's packets, for the parity of one receiver.
    pub fn handle_report(
        &mut self,
        now: Instant,
        adapted: Adapted,
        ssrc: Ssrc,
        reporter: Reporter,
        report: Report,
    ) {
        let blind = match adapted {
            Adapted::Fixed(_) => self.blind.get(&ssrc).copied(),
            Adapted::Edge(_) => None,
        };
        let streams = self.entries.entry(adapted).or_default();
        if blind.is_none() && report.loss <= 0.0 && !streams.contains_key(&ssrc) {
            // It has no parity and needs none.
            if streams.is_empty() {
                self.entries.remove(&adapted);
            }
            return;
        }
        let entry = streams.entry(ssrc).or_insert_with(|| Entry {
            adapt: Adapt::new(adapt::Settings { blind, ..Default::default() }),
            latencies: HashMap::new(),
            given: None,
        });
        entry.adapt.handle_report(now, reporter.edge, report);
        if entry.latencies.len() < adapt::EDGE_LIMIT {
            let latency = reporter.latency.clamp(LATENCIES.0, LATENCIES.1);
            entry.latencies.insert(reporter.edge, (latency, now));
        }
    }

    /// An edge is gone that reported for these.
    pub fn remove_edge(&mut self, edge: u64, adapted: &HashSet<Adapted>) {
        for adapted in adapted {
            for entry in self.entries.get_mut(adapted).into_iter().flat_map(HashMap::values_mut) {
                entry.adapt.remove(edge);
                entry.latencies.remove(&edge);
            }
        }
    }

    /// Decides anew, about once a second, given each live stream's packets a second. What is no
    /// stream any more, or reported by nobody, is forgotten.
    pub fn decide(&mut self, now: Instant, rates: &HashMap<Ssrc, f64>) -> Vec<Change> {
        let mut changes = Vec::new();
        self.entries.retain(|adapted, streams| {
            streams.retain(|ssrc, entry| {
                let rate = rates.get(ssrc).copied();
                let (choice, before) = entry.decide(now, rate);
                if let Some(choice) = choice {
                    changes.push(Change { adapted: *adapted, ssrc: *ssrc, choice, before });
                }
                choice != Some(Choice::Unknown)
            });
            !streams.is_empty()
        });
        changes
    }

    /// What each stream's parity is where nobody reports; as [`Self::decide`] otherwise.
    pub fn decide_blind(&mut self, rates: &HashMap<Ssrc, f64>) -> &HashMap<Ssrc, Matrix> {
        self.blind.retain(|ssrc, _| rates.contains_key(ssrc));
        for (ssrc, rate) in rates.iter().filter(|(_, rate)| **rate > 0.0) {
            let held = self.blind.get(ssrc).copied();
            self.blind.insert(*ssrc, blind(*rate, held));
        }
        &self.blind
    }
}

impl Entry {
    /// What is to be given out, if it is another; and what was before.
    fn decide(&mut self, now: Instant, rate: Option<f64>) -> (Option<Choice>, Option<Matrix>) {
        let before = self.given.unwrap_or(self.adapt.chosen());
        self.latencies.retain(|_, (_, seen)| now.saturating_duration_since(*seen) <= FRESH);
        // Of all but a few: one impatient edge must not take the others' parity away.
        let mut latencies: Vec<_> = self.latencies.values().map(|(latency, _)| *latency).collect();
        latencies.sort_unstable();
        let left_out = latencies.len().saturating_sub(1) / IMPATIENT;
        let (Some(rate), Some(latency)) = (rate, latencies.get(left_out).copied()) else {
            return (Some(Choice::Unknown), before);
        };
        // A stream's first second.
        if rate > 0.0 {
            self.adapt.set_delay_max((rate * latency.as_secs_f64()) as usize);
            self.adapt.decide(now);
        }
        let chosen = self.adapt.chosen();
        let choice = (self.given != Some(chosen)).then_some(Choice::Use(chosen));
        self.given = Some(chosen);
        (choice, before)
    }
}

/// What one of an edge's paths lost between two reports, before any repair: the best path's loss.
/// `None` if nothing came, or the counts begin anew.
pub fn loss_between(before: &[PathReport], after: &[PathReport]) -> Option<Report> {
    let reports = before.iter().zip(after).filter_map(|(before, after)| {
        let received = after.received.checked_sub(before.received).filter(|count| *count > 0)?;
        // Packets that come late are taken off the lost ones again.
        let lost = after.lost.saturating_sub(before.lost) as f64;
        let gaps = after.gaps.saturating_sub(before.gaps) as f64;
        let burst = (gaps > 0.0 && lost > 0.0).then(|| lost / gaps);
        Some(Report { loss: lost / (received as f64 + lost), burst })
    });
    reports.min_by(|a, b| a.loss.total_cmp(&b.loss))
}

/// The most useful parity that comes within [`BLIND_WITHIN`], for a path that tells nothing. One
/// that is held is kept while the rate wavers.
fn blind(rate: f64, held: Option<Matrix>) -> Matrix {
    let budget = rate * BLIND_WITHIN.as_secs_f64();
    let within = |budget: f64| {
        let fitting = BLIND.into_iter().find(|matrix| matrix.delay() as f64 <= budget);
        fitting.unwrap_or(BLIND[BLIND.len() - 1])
    };
    match held {
        Some(held) if [within(budget * 0.8), within(budget * 1.25)].contains(&held) => held,
        _ => within(budget),
    }
}

const fn matrix(columns: u8, rows: u8) -> Matrix {
    match Matrix::new(columns, rows) {
        Ok(matrix) => matrix,
        Err(_) => panic!("checked when it is compiled"),
    }
}

/// One in so many edges may want a packet sooner than parity is made for.
const IMPATIENT: usize = 20;
/// By how much of a burst they repair, which is by how long they take.
const BLIND: [Matrix; 5] =
    [matrix(10, 10), matrix(10, 5), matrix(5, 5), matrix(10, 1), matrix(5, 1)];
const BLIND_WITHIN: Duration = Duration::from_millis(500);
/// What an edge may be set to.
const LATENCIES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(30));

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::{control::Nonce, fec::adapt::HOLD};

    const SSRC: Ssrc = Ssrc(7);
    const OWN: Adapted = Adapted::Edge(Nonce([1; 16]));

    struct World {
        adaptation: Adaptation,
        now: Instant,
        rates: HashMap<Ssrc, f64>,
    }

    impl World {
        fn new(rate: f64) -> Self {
            let rates = HashMap::from([(SSRC, rate)]);
            Self { adaptation: Adaptation::default(), now: Instant::now(), rates }
        }

        /// Seconds with one report each; the changes.
        fn run(&mut self, seconds: u64, adapted: Adapted, loss: f64) -> Vec<Choice> {
            let report = Report { loss, burst: Some(1.0) };
            let reporter = Reporter { edge: 1, latency: Duration::from_millis(500) };
            let mut changes = Vec::new();
            for _ in 0..seconds {
                self.now += Duration::from_secs(1);
                self.adaptation.handle_report(self.now, adapted, SSRC, reporter, report);
                changes.extend(self.decide());
            }
            changes
        }

        fn decide(&mut self) -> Vec<Choice> {
            self.adaptation.decide_blind(&self.rates);
            let changes = self.adaptation.decide(self.now, &self.rates);
            changes.iter().map(|change| change.choice).collect()
        }
    }

    fn group() -> Adapted {
        Adapted::Fixed(SocketAddr::from(([239, 0, 0, 1], 5222)))
    }

    #[test]
    fn an_edge_has_parity_while_it_loses_and_not_before_or_after() {
        let mut world = World::new(1000.0);
        assert_eq!(world.run(30, OWN, 0.0), []);
        assert!(world.adaptation.entries.is_empty());
        let on = world.run(20, OWN, 0.03);
        let [Choice::Use(Some(first)), ..] = on[..] else { panic!("{on:?}") };
        assert!(first.overhead() <= 0.2, "{first}");
        let off = world.run(120, OWN, 0.0);
        assert_eq!(off.last(), Some(&Choice::Use(None)), "{off:?}");
        // It says nothing any more.
        world.now += FRESH + Duration::from_secs(1);
        assert_eq!(world.decide(), [Choice::Unknown]);
        assert!(world.adaptation.entries.is_empty());
    }

    #[test]
    fn a_group_is_blind_until_it_is_heard_of() {
        let mut world = World::new(1000.0);
        assert_eq!(world.decide(), []);
        assert_eq!(world.adaptation.blind[&SSRC], matrix(10, 10));
        let heard = world.run(HOLD.as_secs() + 5, group(), 0.0);
        assert_eq!(heard, [Choice::Use(Some(matrix(10, 10))), Choice::Use(None)]);
        world.adaptation.remove_edge(1, &HashSet::from([group()]));
        assert_eq!(world.decide(), [Choice::Unknown]);
    }

    #[test]
    fn a_slow_stream_has_parity_that_comes_in_time() {
        // 50 packets within half a second.
        let mut world = World::new(100.0);
        let on = world.run(30, OWN, 0.05);
        assert!(!on.is_empty());
        for choice in on {
            let Choice::Use(Some(matrix)) = choice else { panic!("{choice:?}") };
            assert!(matrix.delay() <= 50, "{matrix}");
        }
        world.rates.insert(SSRC, 0.0);
        assert_eq!(world.run(5, OWN, 0.05), [], "not known yet, or again");
        world.rates.clear();
        assert_eq!(world.decide(), [Choice::Unknown], "it is over");
    }

    #[test]
    fn blind_parity_fits_half_a_second_and_does_not_waver() {
        for (rate, expected) in [
            (1000.0, matrix(10, 10)),
            (399.0, matrix(10, 5)),
            (120.0, matrix(5, 5)),
            (43.0, matrix(10, 1)),
            (12.0, matrix(5, 1)),
            (1.0, matrix(5, 1)),
        ] {
            assert_eq!(blind(rate, None), expected, "{rate}");
        }
        let mut held = blind(410.0, None);
        for rate in [390.0, 405.0, 380.0, 420.0] {
            held = blind(rate, Some(held));
            assert_eq!(held, matrix(10, 10), "{rate}");
        }
        held = blind(300.0, Some(held));
        assert_eq!(held, matrix(10, 5));
        held = blind(420.0, Some(held));
        assert_eq!(held, matrix(10, 5));
        assert_eq!(blind(600.0, Some(held)), matrix(10, 10));
    }

    #[test]
    fn loss_is_the_better_paths_and_counts_that_begin_anew_tell_nothing() {
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
