//! Selects the parity matrix of one stream from edges' loss reports: `fec: auto`.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::Matrix;

/// Constraints on the selection.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The most parity packets per media packet.
    pub overhead_max: f64,
    /// The most packets between a packet and its last parity ([`Matrix::delay`]): the latency budget
    /// times the stream's packets per second.
    pub delay_max: usize,
    /// The share of edges for which the parity must suffice, above 0 and up to 1. The others depend on
    /// repairs: one bad path must not determine the overhead of all.
    pub share: f64,
    /// The matrix used while no edge reports.
    pub without_reports: Option<Matrix>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            overhead_max: 0.5,
            delay_max: usize::MAX,
            share: 0.95,
            without_reports: Matrix::new(10, 10).ok(),
        }
    }
}

/// Loss on an edge's path before any repair, since its last report.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Lost packets divided by sent packets, 0..=1.
    pub loss: f64,
    /// Mean number of consecutive lost packets; `None` is treated as 4.
    pub burst: Option<f64>,
}

/// Selects the matrix of least overhead that leaves a loss below [`TARGET`] for most reporting edges.
///
/// States and transitions at each [`Self::decide`]:
///
/// - *without reports*: uses [`Settings::without_reports`].
/// - *raise*: when more overhead is needed, or the matrix became too slow, changes at once.
/// - *lower*: changes after less overhead would have sufficed, with a margin of half the loss, for
///   [`HOLD`] without interruption (hysteresis).
///
/// Invariant: two changes are at least [`PACE`] apart.
#[derive(Debug)]
pub struct MatrixSelector {
    settings: Settings,
    edges: HashMap<u64, Edge>,
    current: Option<Matrix>,
    changed_at: Option<Instant>,
    /// Since when less overhead would have sufficed.
    lower_since: Option<Instant>,
    /// Reports ignored because of [`EDGE_LIMIT`], or because they are not finite.
    ignored: u64,
}

/// Target share of packets lost after recovery: 0.1 %.
pub const TARGET: f64 = 0.001;
/// How long less overhead must have sufficed before it is selected.
pub const HOLD: Duration = Duration::from_secs(15);
/// Shortest interval between two changes.
pub const PACE: Duration = Duration::from_secs(3);
/// How long a report counts.
pub const FRESH: Duration = Duration::from_secs(10);
/// The most edges whose reports are held.
pub const EDGE_LIMIT: usize = 10_000;

impl MatrixSelector {
    /// Creates a selector that starts with [`Settings::without_reports`].
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            edges: HashMap::new(),
            current: settings.without_reports,
            changed_at: None,
            lower_since: None,
            ignored: 0,
        }
    }

    /// Handles a report of the edge with the identifier `edge`.
    pub fn handle_report(&mut self, now: Instant, edge: u64, report: Report) {
        let is_new = !self.edges.contains_key(&edge);
        let burst = report.burst.unwrap_or(BURSTS[1]);
        if is_new && self.edges.len() >= EDGE_LIMIT || !report.loss.is_finite() || burst.is_nan() {
            self.ignored += 1;
            return;
        }
        let (loss, burst) = (report.loss.clamp(0.0, 1.0), burst.max(1.0));
        let edge = self.edges.entry(edge).or_insert(Edge { loss, burst, seen: now });
        // EWMA of noisy one-second reports: fast attack (gain 1/2), slow decay (gain 0.15).
        edge.loss += (loss - edge.loss) * if loss > edge.loss { 0.5 } else { 0.15 };
        if loss > 0.0 {
            edge.burst += (burst.min(100.0) - edge.burst) * 0.3;
        }
        edge.seen = now;
    }

    /// Updates [`Settings::delay_max`] when the stream's rate changes.
    pub fn set_delay_max(&mut self, packets: usize) {
        self.settings.delay_max = packets;
    }

    /// Removes an edge.
    pub fn remove(&mut self, edge: u64) {
        self.edges.remove(&edge);
    }

    /// Updates the selection; call about once per second. Returns `true` if [`Self::selected`] changed.
    pub fn decide(&mut self, now: Instant) -> bool {
        self.edges.retain(|_, edge| now.saturating_duration_since(edge.seen) <= FRESH);
        let (needed, with_margin) = if self.edges.is_empty() {
            (self.settings.without_reports, self.settings.without_reports)
        } else {
            (self.matrix_for(1.0), self.matrix_for(MARGIN))
        };
        let may_change = self.changed_at.is_none_or(|at| now.saturating_duration_since(at) >= PACE);
        let current_overhead = overhead(self.current);
        let too_slow = self.current.is_some_and(|matrix| !self.is_in_time(matrix));
        let next = if overhead(needed) > current_overhead || too_slow && needed != self.current {
            self.lower_since = None;
            needed
        } else if overhead(with_margin) < current_overhead {
            let since = *self.lower_since.get_or_insert(now);
            if now.saturating_duration_since(since) < HOLD {
                return false;
            }
            with_margin
        } else {
            self.lower_since = None;
            return false;
        };
        if !may_change {
            return false;
        }
        (self.current, self.changed_at, self.lower_since) = (next, Some(now), None);
        true
    }

    /// Returns the selected matrix; `None` is no parity.
    pub fn selected(&self) -> Option<Matrix> {
        self.current
    }

    /// Returns the number of edges whose reports count.
    pub fn edges(&self) -> usize {
        self.edges.len()
    }

    /// Returns the number of ignored reports.
    pub fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Returns the least matrix that suffices for the configured share of edges if each edge's loss is
    /// `margin` times its current value.
    fn matrix_for(&self, margin: f64) -> Option<Matrix> {
        let mut needed: Vec<_> =
            self.edges.values().map(|edge| self.cheapest(edge.loss * margin, edge.burst)).collect();
        needed.sort_by(|a, b| overhead(*a).total_cmp(&overhead(*b)));
        let rank = (needed.len() as f64 * self.settings.share).ceil() as usize;
        needed.get(rank.clamp(1, needed.len().max(1)) - 1).copied().flatten()
    }

    /// `true` if the matrix meets the delay limit. The current one may exceed it by a quarter
    /// (hysteresis for a varying rate).
    fn is_in_time(&self, matrix: Matrix) -> bool {
        let limit = self.settings.delay_max;
        let slack = if self.current == Some(matrix) { limit / 4 } else { 0 };
        matrix.delay() <= limit.saturating_add(slack)
    }

    /// Returns the matrix of least overhead that suffices for a path, or the strongest one if none does.
    fn cheapest(&self, loss: f64, burst: f64) -> Option<Matrix> {
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
        let sufficient = allowed().find(|rung| rung.limits[class] >= loss);
        let strongest = || allowed().max_by(|a, b| a.limits[class].total_cmp(&b.limits[class]));
        sufficient.or_else(strongest).map(|rung| rung.matrix)
    }
}

#[derive(Debug)]
struct Edge {
    loss: f64,
    burst: f64,
    seen: Instant,
}

/// A matrix, and the loss up to which it meets [`TARGET`].
#[derive(Debug)]
struct Rung {
    matrix: Matrix,
    /// Loss limit for each of [`BURSTS`].
    limits: [f64; BURSTS.len()],
}

fn overhead(matrix: Option<Matrix>) -> f64 {
    matrix.map_or(0.0, Matrix::overhead)
}

const fn rung(columns: u8, rows: u8, limits: [f64; BURSTS.len()]) -> Rung {
    match Matrix::new(columns, rows) {
        Ok(matrix) => Rung { matrix, limits },
        Err(_) => panic!("invalid matrix in the ladder"),
    }
}

/// Mean burst lengths (Gilbert model) up to which each limit of a rung holds. Up to the first, losses
/// count as independent; bursts longer than the last use its limit.
const BURSTS: [f64; 3] = [1.2, 4.0, 8.0];

/// The matrices by overhead. A test checks the limits by simulation with the real encoder and decoder.
/// Residual loss in units of 10⁻³, for independent loss and for bursts of mean length 4 and 8:
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
/// Factor on the current loss that less overhead must still cover.
const MARGIN: f64 = 1.5;

#[cfg(test)]
mod tests {
    use super::{super::tests::residual, *};

    #[test]
    fn each_rung_meets_the_target_up_to_its_limits() {
        assert!(LADDER.is_sorted_by(|a, b| a.matrix.overhead() < b.matrix.overhead()));
        let mut over = Vec::new();
        for rung in &LADDER {
            for (burst, limit) in BURSTS.into_iter().zip(rung.limits) {
                let seeds = 1..=3;
                let remaining: f64 =
                    seeds.map(|seed| residual(rung.matrix, limit, burst, seed)).sum();
                let remaining = remaining / 3.0;
                if remaining > TARGET {
                    over.push((rung.matrix, limit, burst, remaining));
                }
            }
        }
        assert_eq!(over, []);
    }

    fn matrix(columns: u8, rows: u8) -> Option<Matrix> {
        Some(Matrix::new(columns, rows).unwrap())
    }

    /// Every edge reports once per second. Returns the changes with their second.
    fn run(
        selector: &mut MatrixSelector,
        start: Instant,
        seconds: std::ops::Range<u64>,
        reports: &[Report],
    ) -> Vec<(u64, Option<Matrix>)> {
        let mut changes = Vec::new();
        for second in seconds {
            let now = start + Duration::from_secs(second);
            for (edge, report) in reports.iter().enumerate() {
                selector.handle_report(now, edge as u64, *report);
            }
            if selector.decide(now) {
                changes.push((second, selector.selected()));
            }
        }
        changes
    }

    fn independent(loss: f64) -> Report {
        Report { loss, burst: Some(1.0) }
    }

    #[test]
    fn parity_without_reports_ends_after_clean_reports() {
        let start = Instant::now();
        let mut selector = MatrixSelector::new(Settings::default());
        assert_eq!(run(&mut selector, start, 0..30, &[]), []);
        assert_eq!(selector.selected(), matrix(10, 10));
        assert_eq!(run(&mut selector, start, 30..60, &[independent(0.0)]), [(45, None)]);
        // The edge disappeared: back to the matrix without reports at once.
        assert_eq!(run(&mut selector, start, 60..90, &[]), [(70, matrix(10, 10))]);
    }

    #[test]
    fn overhead_rises_at_once_and_falls_late() {
        let start = Instant::now();
        let mut selector =
            MatrixSelector::new(Settings { without_reports: None, ..Settings::default() });
        let raised = run(&mut selector, start, 0..20, &[independent(0.002)]);
        assert_eq!(raised, [(0, matrix(10, 1))]);
        let raised = run(&mut selector, start, 20..40, &[independent(0.045)]);
        assert_eq!(raised, [(20, matrix(20, 10)), (23, matrix(20, 3))]);
        let lowered = run(&mut selector, start, 40..200, &[independent(0.0)]);
        assert!(lowered.len() <= 4 && lowered[0].0 >= 40 + HOLD.as_secs(), "{lowered:?}");
        assert!(lowered.windows(2).all(|two| two[1].0 - two[0].0 >= PACE.as_secs()), "{lowered:?}");
        assert_eq!(selector.selected(), None);
    }

    #[test]
    fn fluctuating_loss_changes_the_matrix_at_most_twice() {
        let start = Instant::now();
        let mut selector =
            MatrixSelector::new(Settings { without_reports: None, ..Settings::default() });
        let mut changes = 0;
        for second in 0..300 {
            let loss = if second % 2 == 0 { 0.0 } else { 0.02 };
            changes += run(&mut selector, start, second..second + 1, &[independent(loss)]).len();
        }
        assert!((1..=2).contains(&changes), "{changes}");
        assert_eq!(selector.selected(), matrix(20, 10));
    }

    #[test]
    fn one_bad_edge_of_many_does_not_determine_the_matrix() {
        let start = Instant::now();
        let mut selector =
            MatrixSelector::new(Settings { without_reports: None, ..Settings::default() });
        let mut edges = vec![independent(0.002); 40];
        edges[7] = independent(0.3);
        run(&mut selector, start, 0..20, &edges);
        assert_eq!((selector.selected(), selector.edges()), (matrix(10, 1), 40));
        edges[8..12].fill(independent(0.3));
        run(&mut selector, start, 20..40, &edges);
        assert_eq!(selector.selected(), matrix(4, 4), "the strongest matrix");
    }

    #[test]
    fn bursts_delay_and_overhead_limit_the_choice() {
        let select = |settings, report| {
            let mut selector = MatrixSelector::new(Settings { without_reports: None, ..settings });
            run(&mut selector, Instant::now(), 0..20, &[report]);
            selector.selected()
        };
        let settings = Settings::default();
        let bursts = |loss, burst| Report { loss, burst };
        assert_eq!(select(settings, bursts(0.01, Some(1.0))), matrix(20, 10));
        assert_eq!(select(settings, bursts(0.01, Some(4.0))), matrix(20, 5));
        assert_eq!(select(settings, bursts(0.01, None)), matrix(20, 5));
        assert_eq!(select(settings, bursts(0.008, Some(20.0))), matrix(20, 3));
        let low_delay = Settings { delay_max: 40, ..settings };
        assert_eq!(select(low_delay, bursts(0.03, Some(1.0))), matrix(4, 4));
        let low_overhead = Settings { overhead_max: 0.15, ..settings };
        assert_eq!(select(low_overhead, bursts(0.2, Some(1.0))), matrix(20, 10));
        let none = Settings { overhead_max: 0.0, ..settings };
        assert_eq!(select(none, bursts(0.2, Some(1.0))), None);
        assert_eq!(select(settings, bursts(f64::NAN, None)), None);
    }

    #[test]
    fn a_matrix_that_becomes_too_slow_is_replaced() {
        let start = Instant::now();
        let settings = Settings { without_reports: None, delay_max: 400, ..Settings::default() };
        let mut selector = MatrixSelector::new(settings);
        let reports = [independent(0.02)];
        assert_eq!(run(&mut selector, start, 0..20, &reports), [(0, matrix(20, 10))]);
        selector.set_delay_max(390);
        assert_eq!(run(&mut selector, start, 20..30, &reports), [], "within the hysteresis");
        selector.set_delay_max(200);
        assert_eq!(run(&mut selector, start, 30..40, &reports), [(30, matrix(10, 10))]);
        selector.set_delay_max(10);
        assert_eq!(run(&mut selector, start, 40..50, &reports), [(40, matrix(3, 1))]);
        selector.set_delay_max(2);
        assert_eq!(run(&mut selector, start, 50..60, &reports), [(50, None)]);
    }

    #[test]
    fn the_number_of_edges_is_bounded() {
        let (now, mut selector) = (Instant::now(), MatrixSelector::new(Settings::default()));
        for edge in 0..EDGE_LIMIT as u64 + 5 {
            selector.handle_report(now, edge, independent(0.5));
        }
        assert_eq!((selector.edges(), selector.ignored()), (EDGE_LIMIT, 5));
        selector.remove(0);
        selector.decide(now + FRESH + Duration::from_secs(1));
        assert_eq!(selector.edges(), 0);
    }
}
