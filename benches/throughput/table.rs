//! The results of a part: tables, plots and text in Markdown.

use std::fmt::Write;

use crate::common::plot::Plot;

/// The results of a part.
#[derive(Default)]
pub struct Section {
    text: String,
    plots: Vec<File>,
}

/// A plot and its file name in `docs/`.
pub struct File {
    pub file: &'static str,
    pub plot: Plot,
}

impl Section {
    /// Adds a paragraph.
    pub fn paragraph(&mut self, text: &str) {
        let _ = writeln!(self.text, "{}\n", text.trim_end());
    }

    /// Adds a table.
    pub fn table(&mut self, comparisons: &[Comparison]) {
        let peers: Vec<&str> = comparisons
            .first()
            .map(|row| row.peers.iter().map(|peer| peer.name).collect())
            .unwrap_or_default();
        let text = &mut self.text;
        let _ = write!(text, "| work | unit | floor |");
        peers.iter().for_each(|peer| _ = write!(text, " {peer} |"));
        let _ = writeln!(text, " Downpour | ratio to the floor: median | least–most | goal | |");
        let _ = writeln!(text, "|---|---|---|{}---|---|---|---|---|", "---|".repeat(peers.len()));
        for row in comparisons {
            let _ = writeln!(text, "{}", row.line());
        }
        text.push('\n');
    }

    /// Adds a plot and a reference to it.
    pub fn plot(&mut self, file: &'static str, plot: Plot) {
        self.plots.push(File { file, plot });
        let _ = writeln!(self.text, "![]({file})\n");
    }

    pub fn text(&self) -> &str {
        self.text.trim_end()
    }

    pub fn plots(&self) -> &[File] {
        &self.plots
    }
}

/// One row: Downpour and the floor, measured in turns in one run, with one value per round.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// Description of the workload.
    pub work: String,
    pub unit: &'static str,
    pub floor: Vec<f64>,
    pub peers: Vec<Peer>,
    pub ours: Vec<f64>,
    /// Maximum ratio of Downpour to the floor; `None` means no goal.
    pub goal: Option<f64>,
}

/// Another program's values for the same workload.
#[derive(Debug, Clone)]
pub struct Peer {
    pub name: &'static str,
    pub values: Vec<f64>,
}

impl Comparison {
    /// Ratio of Downpour to the floor per round, sorted.
    pub fn ratios(&self) -> Vec<f64> {
        let mut ratios: Vec<_> =
            self.ours.iter().zip(&self.floor).map(|(ours, floor)| ours / floor).collect();
        ratios.sort_by(f64::total_cmp);
        ratios
    }

    /// The median of [`Comparison::ratios`].
    pub fn ratio(&self) -> f64 {
        median(&self.ratios())
    }

    fn line(&self) -> String {
        let ratios = self.ratios();
        let (least, most) = (ratios.first(), ratios.last());
        let [least, most] = [least, most].map(|ratio| ratio.copied().unwrap_or(f64::NAN));
        let mut line =
            format!("| {} | {} | {} |", self.work, self.unit, short(median(&self.floor)));
        for peer in &self.peers {
            let _ = write!(line, " {} |", short(median(&peer.values)));
        }
        let ratio = self.ratio();
        let (goal, met) = match self.goal {
            Some(goal) if ratio <= goal => (format!("≤ {goal}"), "met"),
            Some(goal) => (format!("≤ {goal}"), "**missed**"),
            None => ("–".into(), ""),
        };
        let ours = short(median(&self.ours));
        let _ = write!(line, " {ours} | {ratio:.2} | {least:.2}–{most:.2} | {goal} | {met} |");
        line
    }
}

/// Returns the median; NaN if `values` is empty.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Formats `value` with three significant digits.
pub fn short(value: f64) -> String {
    if value.is_nan() {
        return "–".into();
    }
    let digits = (2 - value.abs().max(0.001).log10().floor() as i32).clamp(0, 4);
    format!("{value:.*}", digits as usize)
}
