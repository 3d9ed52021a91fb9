//! How much parity the reports of edges call for: `fec: auto`.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::Matrix;

/// What an adaptation may choose from, and how quickly.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The most parity packets a media packet.
    pub overhead_max: f64,
    /// The most packets that may be sent between a packet and the last parity that may bring it
    /// back ([`Matrix::delay`]): the time there is, times the stream's packets a second.
    pub delay_max: usize,
    /// The share of edges for which there is enough parity, above 0 and up to 1. The others are
    /// left to ask for repairs: one bad path must not set what all pay for.
    pub share: f64,
    /// What is used while no edge reports: at first, and where there is no way back.
    pub blind: Option<Matrix>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            overhead_max: 0.5,
            delay_max: usize::MAX,
            share: 0.95,
            blind: Matrix::new(10, 10).ok(),
        }
    }
}

/// What an edge saw on its path, before any repair, since its last report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Lost packets by sent ones, 0..=1.
    pub loss: f64,
    /// Mean number of packets lost in a row, if known; unknown is taken for up to 4.
    pub burst: Option<f64>,
}

/// Chooses the least parity that leaves less than [`TARGET`] lost, for most edges that report.
///
/// More parity is chosen at the next decision, less when it would have been enough for half as much
/// loss again for [`HOLD`]; never two changes within [`PACE`].
#[derive(Debug)]
pub struct Adapt {
    settings: Settings,
    edges: HashMap<u64, Edge>,
    chosen: Option<Matrix>,
    changed: Option<Instant>,
    /// Since when less would have done.
    less_since: Option<Instant>,
    /// Reports left out because of [`EDGE_LIMIT`], or that are no numbers.
    ignored: u64,
}

/// The share of packets that may be lost for good: 0.1 %.
pub const TARGET: f64 = 0.001;
/// How long less parity must have been enough before it is chosen.
pub const HOLD: Duration = Duration::from_secs(15);
/// The least time between two changes.
pub const PACE: Duration = Duration::from_secs(3);
/// A report counts for so long.
pub const FRESH: Duration = Duration::from_secs(10);
/// Edges whose reports are held.
pub const EDGE_LIMIT: usize = 10_000;

impl Adapt {
    /// Begins with [`Settings::blind`].
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            edges: HashMap::new(),
            chosen: settings.blind,
            changed: None,
            less_since: None,
            ignored: 0,
        }
    }

    /// Takes a report of the edge that the caller calls `edge`.
    pub fn handle_report(&mut self, now: Instant, edge: u64, report: Report) {
        let is_new = !self.edges.contains_key(&edge);
        let burst = report.burst.unwrap_or(BURSTS[1]);
        if is_new && self.edges.len() >= EDGE_LIMIT || !report.loss.is_finite() || burst.is_nan() {
            self.ignored += 1;
            return;
        }
        let (loss, burst) = (report.loss.clamp(0.0, 1.0), burst.max(1.0));
        let edge = self.edges.entry(edge).or_insert(Edge { loss, burst, seen: now });
        // Reports of a second are noisy: quick to believe in loss, slow to believe it is over.
        edge.loss += (loss - edge.loss) * if loss > edge.loss { 0.5 } else { 0.15 };
        if loss > 0.0 {
            edge.burst += (burst.min(100.0) - edge.burst) * 0.3;
        }
        edge.seen = now;
    }

    /// Sets [`Settings::delay_max`] anew, as the stream's rate changes.
    pub fn set_delay_max(&mut self, packets: usize) {
        self.settings.delay_max = packets;
    }

    /// Forgets an edge.
    pub fn remove(&mut self, edge: u64) {
        self.edges.remove(&edge);
    }

    /// Decides anew, about once a second; true if [`Self::chosen`] is another now.
    pub fn decide(&mut self, now: Instant) -> bool {
        self.edges.retain(|_, edge| now.saturating_duration_since(edge.seen) <= FRESH);
        let (enough, roomy) = if self.edges.is_empty() {
            (self.settings.blind, self.settings.blind)
        } else {
            (self.needed(1.0), self.needed(MARGIN))
        };
        let paced = self.changed.is_none_or(|at| now.saturating_duration_since(at) >= PACE);
        let current = overhead(self.chosen);
        let too_slow = self.chosen.is_some_and(|matrix| !self.is_in_time(matrix));
        let next = if overhead(enough) > current || too_slow && enough != self.chosen {
            self.less_since = None;
            enough
        } else if overhead(roomy) < current {
            let since = *self.less_since.get_or_insert(now);
            if now.saturating_duration_since(since) < HOLD {
                return false;
            }
            roomy
        } else {
            self.less_since = None;
            return false;
        };
        if !paced {
            return false;
        }
        (self.chosen, self.changed, self.less_since) = (next, Some(now), None);
        true
    }

    /// What to use; none is no parity.
    pub fn chosen(&self) -> Option<Matrix> {
        self.chosen
    }

    /// Edges whose reports count.
    pub fn edges(&self) -> usize {
        self.edges.len()
    }

    /// Reports that were left out.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// The least that is enough for the share of edges, were each one's loss `margin` times what
    /// it is.
    fn needed(&self, margin: f64) -> Option<Matrix> {
        let mut needed: Vec<_> =
            self.edges.values().map(|edge| self.least(edge.loss * margin, edge.burst)).collect();
        needed.sort_by(|a, b| overhead(*a).total_cmp(&overhead(*b)));
        let rank = (needed.len() as f64 * self.settings.share).ceil() as usize;
        needed.get(rank.clamp(1, needed.len().max(1)) - 1).copied().flatten()
    }

    /// What is chosen may take a little longer: a rate that wavers about a limit changes nothing.
    fn is_in_time(&self, matrix: Matrix) -> bool {
        let limit = self.settings.delay_max;
        let slack = if self.chosen == Some(matrix) { limit / 4 } else { 0 };
        matrix.delay() <= limit.saturating_add(slack)
    }

    /// The least parity for a path, or the most useful where none is enough.
    fn least(&self, loss: f64, burst: f64) -> Option<Matrix> {
        if loss <= TARGET {
            return None;
        }
        let class = BURSTS.iter().position(|&longest| burst <= longest).unwrap_or(BURSTS.len() - 1);
        let allowed = || {
            LADDER.iter().filter(|rung| {
                rung.matrix.overhead() <= self.settings.overhead_max + 1e-9
                    && self.is_in_time(rung.matrix)
            })
        };
        let enough = allowed().find(|rung| rung.limits[class] >= loss);
        let best = || allowed().max_by(|a, b| a.limits[class].total_cmp(&b.limits[class]));
        enough.or_else(best).map(|rung| rung.matrix)
    }
}

#[derive(Debug)]
struct Edge {
    loss: f64,
    burst: f64,
    seen: Instant,
}

/// A choice, and up to which loss it leaves less than [`TARGET`].
#[derive(Debug)]
struct Rung {
    matrix: Matrix,
    /// For each of [`BURSTS`].
    limits: [f64; BURSTS.len()],
}

fn overhead(matrix: Option<Matrix>) -> f64 {
    matrix.map_or(0.0, Matrix::overhead)
}

const fn rung(columns: u8, rows: u8, limits: [f64; BURSTS.len()]) -> Rung {
    match Matrix::new(columns, rows) {
        Ok(matrix) => Rung { matrix, limits },
        Err(_) => panic!("checked when it is compiled"),
    }
}

/// Mean lengths of bursts (Gilbert's model) up to which each of a rung's limits holds. Below the
/// first, losses are as good as independent; longer bursts than the last are treated as it.
const BURSTS: [f64; 3] = [1.2, 4.0, 8.0];

/// By overhead. The limits are by simulation with the real encoder and decoder, and a test holds
/// them to it. What is left, in 10⁻³, of independent loss (%), and of 1 and 2 % in bursts:
///
/// | L×D | overhead | 1 % | 2 % | 5 % | 10 % | of 4: 1 % | 2 % | of 8: 1 % | 2 % |
/// |---|---|---|---|---|---|---|---|---|---|
/// | 20×10 | 15 % | .01 | .01 | 1.9 | 36 | .80 | 2.9 | 2.1 | 5.0 |
/// | 10×10 | 20 % | .00 | .05 | .85 | 17 | 1.4 | 3.8 | 4.5 | 9.4 |
/// | 20×5 | 25 % | .00 | .01 | .81 | 14 | .43 | 1.3 | 1.4 | 3.2 |
/// | 20×3 | 38 % | .00 | .04 | .70 | 8.4 | .28 | .74 | .76 | 2.0 |
/// | 4×4 | 50 % | .00 | .00 | .24 | 2.7 | 2.9 | 5.4 | 6.6 | 13 |
/// | 32×2 | 53 % | .02 | .04 | .60 | 7.3 | .22 | .65 | .15 | .80 |
const LADDER: [Rung; 9] = [
    rung(10, 1, [0.0025, 0.0005, 0.0005]),
    rung(20, 10, [0.03, 0.006, 0.004]),
    rung(6, 1, [0.0028, 0.0006, 0.0005]),
    rung(10, 10, [0.035, 0.003, 0.0015]),
    rung(20, 5, [0.04, 0.011, 0.005]),
    rung(3, 1, [0.0028, 0.0008, 0.0006]),
    rung(20, 3, [0.05, 0.018, 0.009]),
    rung(4, 4, [0.055, 0.002, 0.0008]),
    rung(32, 2, [0.052, 0.02, 0.013]),
];
/// How much more loss there may be than now where less parity is to be enough.
const MARGIN: f64 = 1.5;

#[cfg(test)]
mod tests {
    use super::{super::tests::residual, *};

    #[test]
    fn each_rung_keeps_the_target_up_to_its_limits() {
        assert!(LADDER.is_sorted_by(|a, b| a.matrix.overhead() < b.matrix.overhead()));
        let mut over = Vec::new();
        for rung in &LADDER {
            for (burst, limit) in BURSTS.into_iter().zip(rung.limits) {
                let seeds = 1..=3;
                let left: f64 = seeds.map(|seed| residual(rung.matrix, limit, burst, seed)).sum();
                let left = left / 3.0;
                if left > TARGET {
                    over.push((rung.matrix, limit, burst, left));
                }
            }
        }
        assert_eq!(over, []);
    }

    fn matrix(columns: u8, rows: u8) -> Option<Matrix> {
        Some(Matrix::new(columns, rows).unwrap())
    }

    /// Each edge reports every second for so many; the changes, with their seconds.
    fn run(
        adapt: &mut Adapt,
        start: Instant,
        seconds: std::ops::Range<u64>,
        reports: &[Report],
    ) -> Vec<(u64, Option<Matrix>)> {
        let mut changes = Vec::new();
        for second in seconds {
            let now = start + Duration::from_secs(second);
            for (edge, report) in reports.iter().enumerate() {
                adapt.handle_report(now, edge as u64, *report);
            }
            if adapt.decide(now) {
                changes.push((second, adapt.chosen()));
            }
        }
        changes
    }

    fn singles(loss: f64) -> Report {
        Report { loss, burst: Some(1.0) }
    }

    #[test]
    fn without_reports_it_stays_blind_and_with_clean_ones_it_ends() {
        let start = Instant::now();
        let mut adapt = Adapt::new(Settings::default());
        assert_eq!(run(&mut adapt, start, 0..30, &[]), []);
        assert_eq!(adapt.chosen(), matrix(10, 10));
        assert_eq!(run(&mut adapt, start, 30..60, &[singles(0.0)]), [(45, None)]);
        // It went away: blind again, at once.
        assert_eq!(run(&mut adapt, start, 60..90, &[]), [(70, matrix(10, 10))]);
    }

    #[test]
    fn more_comes_soon_and_less_late() {
        let start = Instant::now();
        let mut adapt = Adapt::new(Settings { blind: None, ..Settings::default() });
        let up = run(&mut adapt, start, 0..20, &[singles(0.002)]);
        assert_eq!(up, [(0, matrix(10, 1))]);
        let up = run(&mut adapt, start, 20..40, &[singles(0.045)]);
        assert_eq!(up, [(20, matrix(20, 10)), (23, matrix(20, 3))]);
        let down = run(&mut adapt, start, 40..200, &[singles(0.0)]);
        assert!(down.len() <= 4 && down[0].0 >= 40 + HOLD.as_secs(), "{down:?}");
        assert!(down.windows(2).all(|two| two[1].0 - two[0].0 >= PACE.as_secs()), "{down:?}");
        assert_eq!(adapt.chosen(), None);
    }

    #[test]
    fn a_loss_that_wavers_changes_little() {
        let start = Instant::now();
        let mut adapt = Adapt::new(Settings { blind: None, ..Settings::default() });
        let mut changes = 0;
        for second in 0..300 {
            let loss = if second % 2 == 0 { 0.0 } else { 0.02 };
            changes += run(&mut adapt, start, second..second + 1, &[singles(loss)]).len();
        }
        assert!((1..=2).contains(&changes), "{changes}");
        assert_eq!(adapt.chosen(), matrix(20, 10));
    }

    #[test]
    fn one_bad_edge_of_many_does_not_set_it() {
        let start = Instant::now();
        let mut adapt = Adapt::new(Settings { blind: None, ..Settings::default() });
        let mut edges = vec![singles(0.002); 40];
        edges[7] = singles(0.3);
        run(&mut adapt, start, 0..20, &edges);
        assert_eq!((adapt.chosen(), adapt.edges()), (matrix(10, 1), 40));
        edges[8..12].fill(singles(0.3));
        run(&mut adapt, start, 20..40, &edges);
        assert_eq!(adapt.chosen(), matrix(4, 4), "the best there is");
    }

    #[test]
    fn bursts_delay_and_overhead_are_heeded() {
        let choose = |settings, report| {
            let mut adapt = Adapt::new(Settings { blind: None, ..settings });
            run(&mut adapt, Instant::now(), 0..20, &[report]);
            adapt.chosen()
        };
        let settings = Settings::default();
        let bursts = |loss, burst| Report { loss, burst };
        assert_eq!(choose(settings, bursts(0.01, Some(1.0))), matrix(20, 10));
        assert_eq!(choose(settings, bursts(0.01, Some(4.0))), matrix(20, 5));
        assert_eq!(choose(settings, bursts(0.01, None)), matrix(20, 5));
        assert_eq!(choose(settings, bursts(0.008, Some(20.0))), matrix(20, 3));
        let quick = Settings { delay_max: 40, ..settings };
        assert_eq!(choose(quick, bursts(0.03, Some(1.0))), matrix(4, 4));
        let lean = Settings { overhead_max: 0.15, ..settings };
        assert_eq!(choose(lean, bursts(0.2, Some(1.0))), matrix(20, 10));
        let none = Settings { overhead_max: 0.0, ..settings };
        assert_eq!(choose(none, bursts(0.2, Some(1.0))), None);
        assert_eq!(choose(settings, bursts(f64::NAN, None)), None);
    }

    #[test]
    fn parity_that_has_come_to_take_too_long_is_given_up() {
        let start = Instant::now();
        let settings = Settings { blind: None, delay_max: 400, ..Settings::default() };
        let mut adapt = Adapt::new(settings);
        let reports = [singles(0.02)];
        assert_eq!(run(&mut adapt, start, 0..20, &reports), [(0, matrix(20, 10))]);
        adapt.set_delay_max(390);
        assert_eq!(run(&mut adapt, start, 20..30, &reports), [], "a little");
        adapt.set_delay_max(200);
        assert_eq!(run(&mut adapt, start, 30..40, &reports), [(30, matrix(10, 10))]);
        adapt.set_delay_max(10);
        assert_eq!(run(&mut adapt, start, 40..50, &reports), [(40, matrix(3, 1))]);
        adapt.set_delay_max(2);
        assert_eq!(run(&mut adapt, start, 50..60, &reports), [(50, None)]);
    }

    #[test]
    fn edges_are_bounded() {
        let (now, mut adapt) = (Instant::now(), Adapt::new(Settings::default()));
        for edge in 0..EDGE_LIMIT as u64 + 5 {
            adapt.handle_report(now, edge, singles(0.5));
        }
        assert_eq!((adapt.edges(), adapt.ignored()), (EDGE_LIMIT, 5));
        adapt.remove(0);
        adapt.decide(now + FRESH + Duration::from_secs(1));
        assert_eq!(adapt.edges(), 0);
    }
}
