//! The table, in the terminal and in `docs/performance.md`.

use std::{collections::BTreeMap, fmt::Write, io, path::PathBuf};

use crate::common::{
    document,
    machine::{machine, root},
};

/// What one round came to.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    pub seconds: f64,
    /// Datagrams sent to each of the two.
    pub packets: u64,
    /// Seconds of processor time.
    pub edge_cpu: f64,
    pub floor_cpu: f64,
    /// Packets that the edge had sent again, and those that it never got.
    pub repaired: f64,
    pub lost: f64,
}

impl Round {
    pub fn line(&self) -> String {
        format!(
            "edge {:.1} %, floor {:.1} % of a core, {:.2} x; {} packets, {} repaired, {} lost",
            100.0 * self.edge(),
            100.0 * self.floor(),
            self.ratio(),
            self.packets,
            self.repaired,
            self.lost
        )
    }

    fn edge(&self) -> f64 {
        self.edge_cpu / self.seconds
    }

    fn floor(&self) -> f64 {
        self.floor_cpu / self.seconds
    }

    fn ratio(&self) -> f64 {
        self.edge_cpu / self.floor_cpu.max(0.01)
    }
}

/// All rounds by loss in per cent.
#[derive(Debug, Default)]
pub struct Rounds(BTreeMap<u8, Vec<Round>>);

impl Rounds {
    pub fn add(&mut self, loss: u8, round: Round) {
        self.0.entry(loss).or_default().push(round);
    }

    /// In Markdown.
    pub fn table(&self) -> String {
        let mut table = String::from(
            "| left out | packets/s | edge, % of a core | floor, % of a core | ratio: median | \
             least–most | repaired | lost for good |\n|---|---|---|---|---|---|---|---|\n",
        );
        for (loss, rounds) in &self.0 {
            let sum = |of: fn(&Round) -> f64| rounds.iter().map(of).sum::<f64>();
            let (least, ratio, most) = spread(rounds, Round::ratio);
            let _ = writeln!(
                table,
                "| {loss} % | {:.0} | {:.1} | {:.1} | {ratio:.2} | {least:.2}–{most:.2} | {} | {} |",
                sum(|round| round.packets as f64) / sum(|round| round.seconds),
                100.0 * spread(rounds, Round::edge).1,
                100.0 * spread(rounds, Round::floor).1,
                sum(|round| round.repaired),
                sum(|round| round.lost),
            );
        }
        table
    }
}

/// Puts the table into the document.
pub fn write(streams: u32, seconds: u64, count: u64, rounds: &Rounds) -> io::Result<PathBuf> {
    let path = root().join("docs/performance.md");
    let text = format!(
        "{streams} streams of 1 Mbit/s, {count} rounds of {seconds} s each, on {}.\n\n{}",
        machine(),
        rounds.table()
    );
    document::put(&path, "edge_receive", &text)?;
    Ok(path)
}

/// Least, median and most.
fn spread(rounds: &[Round], of: fn(&Round) -> f64) -> (f64, f64, f64) {
    let mut values: Vec<_> = rounds.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    (at(0), at(values.len() / 2), at(values.len().saturating_sub(1)))
}
