//! The report: tables in Markdown and plots.

use std::{
    collections::BTreeMap,
    fmt::Write,
    fs, io,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    common::{
        machine::{commit, machine},
        plot,
    },
    grid::{BUDGETS, OVERHEAD_OF_SRT, Profile, System},
    rist,
    run::Outcome,
    srt,
};

/// Index of the profile, budget in round trips, system.
pub type Place = (usize, u32, System);

/// All results.
#[derive(Debug, Default)]
pub struct Cells {
    cells: BTreeMap<Place, Cell>,
    pub runs: usize,
    /// Failed runs, with the reason.
    pub failures: Vec<String>,
}

impl Cells {
    pub fn add(&mut self, place: Place, name: &str, seed: u64, outcome: io::Result<Outcome>) {
        match outcome {
            Ok(outcome) => {
                self.runs += 1;
                self.cells.entry(place).or_default().add(outcome);
            }
            Err(error) => self.failures.push(format!("{name}, seed {seed}: {error}")),
        }
    }

    /// Bare UDP is measured at the first budget only: its result does not depend on the budget.
    fn at(&self, profile: usize, budget: u32, system: System) -> Option<&Cell> {
        let budget = if system == System::Udp { BUDGETS[0] } else { budget };
        self.cells.get(&(profile, budget, system))
    }
}

/// The circumstances of the measurement, printed in the report.
pub struct Circumstances {
    pub command: Vec<String>,
    pub seeds: u64,
    pub seconds: f64,
    pub parallel: u64,
    pub took: Duration,
}

/// Writes `repair.md` and its plots into `dir` and returns their paths. In an existing file, only
/// the part between the markers is replaced.
///
/// # Errors
/// If an existing file lacks the markers, or a file cannot be read or written.
pub fn write(
    dir: &Path,
    profiles: &[Profile],
    cells: &Cells,
    circumstances: &Circumstances,
) -> io::Result<Vec<PathBuf>> {
    let page = dir.join("repair.md");
    let text = match fs::read_to_string(&page) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => format!("{BEGIN}\n{END}\n"),
        Err(error) => return Err(error),
    };
    let split = text.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?)));
    let Some((head, (_, tail))) = split else {
        return Err(io::Error::other(format!("{}: {BEGIN} … {END} is missing", page.display())));
    };
    let mut body = introduction(circumstances);
    loss_table(&mut body, profiles, cells);
    delay_table(&mut body, profiles, cells);
    cost_table(&mut body, profiles, cells);
    shortfalls(&mut body, profiles, cells);
    failures(&mut body, cells);
    let mut written = Vec::new();
    for (name, svg) in [
        ("repair-loss.svg", plot::draw(&plot_of(profiles, cells, Quantity::Loss))),
        ("repair-delay.svg", plot::draw(&plot_of(profiles, cells, Quantity::Delay))),
    ] {
        fs::write(dir.join(name), svg)?;
        written.push(dir.join(name));
    }
    fs::write(&page, format!("{head}{BEGIN}\n\n{body}\n{END}{tail}"))?;
    written.push(page);
    Ok(written)
}

/// A run as one line.
pub fn progress(outcome: &Outcome) -> String {
    let cell = Cell::of(outcome.clone());
    format!(
        "lost {} % ({}/{}), longest gap {}, p50 {} p99 {} max {} ms, wire +{:.0} %, cpu {:.1} %, late {} us",
        percent(cell.loss()),
        outcome.lost,
        outcome.sent,
        outcome.longest_gap,
        millis(cell.delay(0.5)),
        millis(cell.delay(0.99)),
        millis(cell.delay(1.0)),
        cell.overhead(),
        cell.cpu_percent(),
        outcome.emulator_late.max(outcome.source_late),
    )
}

/// The sum of all seeds of one place.
#[derive(Debug, Default)]
struct Cell {
    runs: u32,
    /// Runs for which the machine was too busy.
    invalid: u32,
    sent: u64,
    lost: u64,
    longest_gap: u64,
    duplicates: u64,
    /// Sorted.
    delays: Vec<u32>,
    media_bytes: u64,
    wire_bytes: u64,
    cpu: f64,
    available: Vec<(f64, f64)>,
}

impl Cell {
    fn of(outcome: Outcome) -> Self {
        let mut cell = Self::default();
        cell.add(outcome);
        cell
    }

    fn add(&mut self, outcome: Outcome) {
        self.runs += 1;
        self.invalid += u32::from(!outcome.is_valid());
        self.sent += outcome.sent;
        self.lost += outcome.lost;
        self.longest_gap = self.longest_gap.max(outcome.longest_gap);
        self.duplicates += outcome.duplicates;
        self.delays.extend(outcome.delays);
        self.delays.sort_unstable();
        self.media_bytes += outcome.media_bytes;
        self.wire_bytes += outcome.wire_bytes;
        self.cpu += outcome.cpu.iter().sum::<f64>();
        for (bound, count) in outcome.available {
            match self.available.iter_mut().find(|(known, _)| *known == bound) {
                Some((_, sum)) => *sum += count,
                None => self.available.push((bound, count)),
            }
        }
    }

    /// Per cent of the packets that were never delivered.
    fn loss(&self) -> f64 {
        100.0 * self.lost as f64 / self.sent.max(1) as f64
    }

    /// Quantile of the delay of delivered packets, in milliseconds.
    fn delay(&self, quantile: f64) -> f64 {
        let last = self.delays.len().saturating_sub(1);
        let index = (self.delays.len() as f64 * quantile) as usize;
        self.delays.get(index.min(last)).map_or(0.0, |micros| f64::from(*micros) / 1000.0)
    }

    /// The upper bound in milliseconds of a quantile of the time until packets were available.
    fn available(&self, quantile: f64) -> Option<f64> {
        let total = self.available.iter().map(|(_, count)| *count).fold(0.0, f64::max);
        let enough = |(_, count): &&(f64, f64)| *count >= quantile * total;
        (total > 0.0).then(|| self.available.iter().find(enough).map(|(bound, _)| *bound))?
    }

    /// Bytes beyond the media, in per cent of the media.
    fn overhead(&self) -> f64 {
        100.0 * (self.wire_bytes as f64 / self.media_bytes.max(1) as f64 - 1.0)
    }

    fn cpu_percent(&self) -> f64 {
        100.0 * self.cpu / f64::from(self.runs.max(1))
    }
}

fn introduction(circumstances: &Circumstances) -> String {
    let Circumstances { command, seeds, seconds, parallel, took } = circumstances;
    let mut text = String::new();
    let _ = writeln!(
        text,
        "Measured on {} by `scripts/bench-repair{}` in {} min: {seeds} seeds per cell, {seconds} s \
         per run, {parallel} concurrent runs. Downpour {} at commit {}, SRT {}, RIST {}; {}.\n",
        output("date", &["-u", "+%F"]).unwrap_or_else(|| "an unknown day".into()),
        command.iter().map(|arg| format!(" {arg}")).collect::<String>(),
        took.as_secs().div_ceil(60),
        env!("CARGO_PKG_VERSION"),
        commit(),
        output(srt::PROGRAM, &["-version"])
            .and_then(|text| version_after(&text, "version"))
            .unwrap_or_else(|| "of unknown version".into()),
        output(rist::SENDER, &["-h"])
            .and_then(|text| version_after(&text, "version"))
            .unwrap_or_else(|| "of unknown version".into()),
        machine(),
    );
    let _ = writeln!(
        text,
        "Four values are at budgets of 2 / 3 / 4 / 6 round trips; “–” means not measured. †: \
         Downpour is not better than both; ‡: it misses its target; *: the machine was too busy \
         for a reliable value.\n\n\
         ![Residual loss](repair-loss.svg)\n\n![Delay](repair-delay.svg)\n"
    );
    text
}

fn loss_table(text: &mut String, profiles: &[Profile], cells: &Cells) {
    text.push_str(
        "### Loss after repair, per cent\n\n\
         | link | bare UDP | SRT | RIST | Downpour | target |\n|---|---|---|---|---|---|\n",
    );
    for (index, profile) in measured(profiles, cells) {
        let of = |system| four(|_, budget| cells.at(index, budget, system).map(loss_cell));
        let ours = four(|place, budget| {
            let cell = cells.at(index, budget, System::Downpour)?;
            let mut shown = loss_cell(cell);
            if does_not_lead_in_loss(cells, index, budget) {
                shown.push('†');
            }
            if profile.targets.loss.is_some_and(|targets| cell.loss() > targets[place]) {
                shown.push('‡');
            }
            Some(shown)
        });
        let udp = cells.at(index, BUDGETS[0], System::Udp);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {ours} | {} |",
            profile.name,
            udp.map_or("–".into(), loss_cell),
            of(System::Srt),
            of(System::Rist),
            profile.targets.loss.map_or(String::new(), |targets| {
                four(|place, _| Some(percent(targets[place])))
            }),
        );
    }
    text.push('\n');
}

fn delay_table(text: &mut String, profiles: &[Profile], cells: &Cells) {
    text.push_str(
        "### Delay beyond one way, ms\n\nOf packets delivered in order to the application. A packet \
         is “available” when Downpour's edge has received or repaired it, even if it still waits \
         behind a gap: upper bounds of the edge's histogram.\n\n\
         | link | SRT p50 | SRT p99 | RIST p50 | RIST p99 | Downpour p50 | p99 | longest | \
         available p50 | available p99 |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (index, profile) in measured(profiles, cells) {
        let of = |system, quantile| {
            four(|_, budget| Some(millis(cells.at(index, budget, system)?.delay(quantile))))
        };
        let ours = |quantile| {
            four(|_, budget| {
                let cell = cells.at(index, budget, System::Downpour)?;
                let mut shown = millis(cell.delay(quantile));
                if does_not_lead_in_delay(cells, index, budget, quantile) {
                    shown.push('†');
                }
                Some(shown)
            })
        };
        let round_trip = profile.round_trip.as_secs_f64() * 1000.0;
        let available = |quantile, target: Option<f64>| {
            four(|_, budget| {
                let available = cells.at(index, budget, System::Downpour)?.available(quantile)?;
                let over = target.is_some_and(|target| available > target);
                Some(format!("≤ {}{}", millis(available), if over { "‡" } else { "" }))
            })
        };
        let p99_target = profile.targets.p99_round_trips.map(|trips| trips * round_trip);
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            profile.name,
            of(System::Srt, 0.5),
            of(System::Srt, 0.99),
            of(System::Rist, 0.5),
            of(System::Rist, 0.99),
            ours(0.5),
            ours(0.99),
            of(System::Downpour, 1.0),
            available(0.5, profile.targets.median_ms),
            available(0.99, p99_target),
        );
    }
    text.push('\n');
}

fn cost_table(text: &mut String, profiles: &[Profile], cells: &Cells) {
    text.push_str(
        "### Bytes beyond the media, longest gap, processor\n\nBytes in both directions with IP and \
         UDP headers, in per cent of the media. The gap is the longest run of lost packets over all \
         seeds. Processor time is of sender and receiver together, in per cent of a core, at 4 \
         round trips.\n\n\
         | link | SRT bytes | RIST bytes | Downpour bytes | UDP gap | SRT gap | RIST gap | \
         Downpour gap | SRT cpu | RIST cpu | Downpour cpu |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for (index, profile) in measured(profiles, cells) {
        let bytes = |system| {
            four(|_, budget| Some(format!("{:.0}", cells.at(index, budget, system)?.overhead())))
        };
        let our_bytes = four(|place, budget| {
            let cell = cells.at(index, budget, System::Downpour)?;
            let over = costs_too_much(cells, index, place);
            Some(format!("{:.0}{}", cell.overhead(), if over { "‡" } else { "" }))
        });
        let gap = |system| {
            four(|_, budget| Some(cells.at(index, budget, system)?.longest_gap.to_string()))
        };
        let udp_gap = cells.at(index, BUDGETS[0], System::Udp).map(|cell| cell.longest_gap);
        let our_gap = four(|_, budget| {
            let gap = cells.at(index, budget, System::Downpour)?.longest_gap;
            let over = udp_gap.is_some_and(|own| gap > own);
            Some(format!("{gap}{}", if over { "‡" } else { "" }))
        });
        let cpu = |system| match cells.at(index, 4, system) {
            Some(cell) => format!("{:.1}", cell.cpu_percent()),
            None => "–".into(),
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {our_bytes} | {} | {} | {} | {our_gap} | {} | {} | {} |",
            profile.name,
            bytes(System::Srt),
            bytes(System::Rist),
            udp_gap.map_or("–".into(), |gap| gap.to_string()),
            gap(System::Srt),
            gap(System::Rist),
            cpu(System::Srt),
            cpu(System::Rist),
            cpu(System::Downpour),
        );
    }
    text.push('\n');
}

/// Lists the cells where Downpour is not better than both, or misses a target.
fn shortfalls(text: &mut String, profiles: &[Profile], cells: &Cells) {
    text.push_str("### Where Downpour is not better than both, or misses a target\n\n");
    let mut any = false;
    for (index, profile) in measured(profiles, cells) {
        for (place, budget) in BUDGETS.into_iter().enumerate() {
            let faults = cell_shortfalls(profile, cells, index, place);
            if !faults.is_empty() {
                any = true;
                let _ = writeln!(text, "- {}, {budget} ×: {}", profile.name, faults.join("; "));
            }
        }
    }
    if !any {
        text.push_str("None.\n");
    }
}

fn failures(text: &mut String, cells: &Cells) {
    if !cells.failures.is_empty() {
        text.push_str("\n### Failed runs\n\n");
        for failure in &cells.failures {
            let _ = writeln!(text, "- {failure}");
        }
    }
}

/// The shortfalls of Downpour in the cell of the profile `index` and the budget at `place`.
fn cell_shortfalls(profile: &Profile, cells: &Cells, index: usize, place: usize) -> Vec<String> {
    let budget = BUDGETS[place];
    let mut faults = Vec::new();
    let Some(ours) = cells.at(index, budget, System::Downpour) else { return faults };
    let peers = |value: &dyn Fn(&Cell) -> String| peer_values(cells, index, budget, value);
    if does_not_lead_in_loss(cells, index, budget) {
        let loss = |cell: &Cell| format!("{} %", percent(cell.loss()));
        faults.push(format!("loses {} ({})", loss(ours), peers(&loss)));
    }
    if let Some(targets) = profile.targets.loss
        && ours.loss() > targets[place]
    {
        let (loss, target) = (percent(ours.loss()), percent(targets[place]));
        faults.push(format!("loses {loss} % (target {target} %; {} lost)", ours.lost));
    }
    for (name, quantile) in [("median", 0.5), ("p99", 0.99)] {
        if does_not_lead_in_delay(cells, index, budget, quantile) {
            let delay = |cell: &Cell| format!("{} ms", millis(cell.delay(quantile)));
            faults.push(format!("{name} {} ({})", delay(ours), peers(&delay)));
        }
    }
    if costs_too_much(cells, index, place) {
        let bytes = |cell: &Cell| format!("+{:.0} %", cell.overhead());
        let (sent, factor) = (bytes(ours), OVERHEAD_OF_SRT[place]);
        faults.push(format!("sends {sent} (at most {factor} × SRT's; {})", peers(&bytes)));
    }
    if let Some(udp) = cells.at(index, budget, System::Udp)
        && ours.longest_gap > udp.longest_gap
    {
        let (gap, link) = (ours.longest_gap, udp.longest_gap);
        faults.push(format!("a gap of {gap} packets (the link's own: {link})"));
    }
    if ours.duplicates > 0 {
        faults.push(format!("{} packets delivered twice", ours.duplicates));
    }
    faults
}

/// The values of SRT and RIST in a cell, as "SRT 1 %, RIST 2 %".
fn peer_values(
    cells: &Cells,
    profile: usize,
    budget: u32,
    value: &dyn Fn(&Cell) -> String,
) -> String {
    let peers = [System::Srt, System::Rist].into_iter().filter_map(|peer| {
        let cell = cells.at(profile, budget, peer)?;
        Some(format!("{} {}", peer.name(), value(cell)))
    });
    peers.collect::<Vec<_>>().join(", ")
}

/// `true` if SRT or RIST loses at most as much as Downpour, unless Downpour loses nothing.
fn does_not_lead_in_loss(cells: &Cells, profile: usize, budget: u32) -> bool {
    let Some(ours) = cells.at(profile, budget, System::Downpour) else { return false };
    ours.lost > 0
        && [System::Srt, System::Rist]
            .into_iter()
            .filter_map(|peer| cells.at(profile, budget, peer))
            .any(|peer| peer.loss() <= ours.loss())
}

fn does_not_lead_in_delay(cells: &Cells, profile: usize, budget: u32, quantile: f64) -> bool {
    let Some(ours) = cells.at(profile, budget, System::Downpour) else { return false };
    [System::Srt, System::Rist]
        .into_iter()
        .filter_map(|peer| cells.at(profile, budget, peer))
        .any(|peer| peer.delay(quantile) <= ours.delay(quantile))
}

fn costs_too_much(cells: &Cells, profile: usize, place: usize) -> bool {
    let budget = BUDGETS[place];
    let ours = cells.at(profile, budget, System::Downpour);
    let srt = cells.at(profile, budget, System::Srt);
    ours.zip(srt).is_some_and(|(ours, srt)| {
        // The tolerance of half a per cent: only whole datagrams are counted.
        ours.overhead() > srt.overhead() * OVERHEAD_OF_SRT[place] + 0.5
    })
}

enum Quantity {
    Loss,
    Delay,
}

fn plot_of(profiles: &[Profile], cells: &Cells, quantity: Quantity) -> plot::Plot {
    let series = |index: usize, system: System, quantile: f64| {
        let points = BUDGETS.map(|budget| {
            let cell = cells.at(index, budget, system)?;
            Some(match quantity {
                Quantity::Loss => cell.loss(),
                Quantity::Delay => cell.delay(quantile),
            })
        });
        plot::Series {
            system: system.name(),
            colour: match system {
                System::Udp => "#999999",
                System::Srt => "#d1495b",
                System::Rist => "#2f6db5",
                System::Downpour => "#1b7f4d",
            },
            dashed: quantile > 0.5,
            points: points.to_vec(),
        }
    };
    let panels = measured(profiles, cells).map(|(index, profile)| plot::Panel {
        title: profile.name.clone(),
        series: match quantity {
            Quantity::Loss => System::ALL.map(|system| series(index, system, 0.5)).to_vec(),
            Quantity::Delay => [System::Srt, System::Rist, System::Downpour]
                .into_iter()
                .flat_map(|system| [0.5, 0.99].map(|quantile| series(index, system, quantile)))
                .collect(),
        },
    });
    plot::Plot {
        title: match quantity {
            Quantity::Loss => "Loss after repair, per cent, by budget in round trips",
            Quantity::Delay => {
                "Delay beyond one way, ms, by budget in round trips: median, and p99 dashed"
            }
        },
        ticks: BUDGETS.map(|budget| budget.to_string()).to_vec(),
        scale: match quantity {
            Quantity::Loss => plot::Scale::Log { least: 0.001, most: 100.0 },
            Quantity::Delay => plot::Scale::Linear,
        },
        panels: panels.collect(),
    }
}

/// The profiles that have results, with their index.
fn measured<'a>(
    profiles: &'a [Profile],
    cells: &'a Cells,
) -> impl Iterator<Item = (usize, &'a Profile)> {
    let has_any = |index: usize| cells.cells.keys().any(|(profile, ..)| *profile == index);
    profiles.iter().enumerate().filter(move |(index, _)| has_any(*index))
}

/// Formats one value per budget; a single dash if none was measured.
fn four(value: impl Fn(usize, u32) -> Option<String>) -> String {
    let values = BUDGETS.into_iter().enumerate().map(|(place, budget)| value(place, budget));
    let values: Vec<_> = values.collect();
    match values.iter().all(Option::is_none) {
        true => "–".into(),
        false => {
            values.into_iter().map(|v| v.unwrap_or("–".into())).collect::<Vec<_>>().join(" / ")
        }
    }
}

fn loss_cell(cell: &Cell) -> String {
    format!("{}{}", percent(cell.loss()), if cell.invalid > 0 { "*" } else { "" })
}

/// Formats `value` with two significant digits.
fn percent(value: f64) -> String {
    let decimals = match value {
        0.0 => return "0".into(),
        _ if value >= 10.0 => 0,
        _ => (1 - value.log10().floor() as i32).clamp(0, 6),
    };
    format!("{value:.0$}", decimals as usize)
}

fn millis(value: f64) -> String {
    if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// Returns the standard output and error of a program; `None` if the program is missing.
fn output(program: &str, args: &[&str]) -> Option<String> {
    let directory = env!("CARGO_MANIFEST_DIR");
    let output = Command::new(program).args(args).current_dir(directory).output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    Some(String::from_utf8_lossy(&text).trim().to_owned())
}

fn version_after(text: &str, word: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("{word}:"))?;
    let version = rest.split_whitespace().next()?;
    Some(version.trim_end_matches(',').to_owned())
}

const BEGIN: &str = "<!-- bench-repair: from here -->";
const END: &str = "<!-- bench-repair: to here -->";
