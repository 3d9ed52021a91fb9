//! Downpour beside SRT, RIST and bare UDP over the same emulated links; `scripts/bench-repair` runs
//! it and `docs/repair.md` says how it measures and holds what came out.

#[path = "../common/mod.rs"]
mod common;
mod downpour;
mod grid;
mod media;
mod report;
mod rist;
mod run;
mod srt;
mod wire;

use std::{
    collections::VecDeque,
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use clap::Parser;
use grid::{BUDGETS, Profile, System};
use report::Cells;
use run::{Outcome, Setup};

/// Runs Downpour, SRT, RIST and bare UDP over the same emulated links and compares them.
#[derive(Debug, Parser)]
#[command(name = "bench-repair")]
struct Options {
    /// A few links of the grid only, with 2 seeds.
    #[arg(long)]
    quick: bool,
    /// Seeds for each cell [default: 5, with --quick 2].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// Seconds of media measured in each run.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Runs at the same time [default: 6 for each processor].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=256))]
    jobs: Option<u64>,
    /// Only runs whose "LINK, BUDGET x, SYSTEM" holds this text; may be given several times, and
    /// then all must be held.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Where the report goes [default: docs for the whole grid, target/repair_field for less].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keeps each run's configurations and logs, in target/tmp/repair_field.
    #[arg(long)]
    keep: bool,
    /// Lists the runs and ends.
    #[arg(long)]
    list: bool,
    /// What cargo bench passes.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let options = Options::parse();
    match bench(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-repair: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(options: &Options) -> io::Result<()> {
    if !(0.5..=600.0).contains(&options.seconds) {
        return Err(io::Error::other("--seconds takes 0.5 to 600"));
    }
    let profiles = grid::profiles();
    let seeds = options.seeds.unwrap_or(if options.quick { 2 } else { 5 });
    let jobs = plan(options, &profiles, seeds);
    if jobs.is_empty() {
        return Err(io::Error::other("no run matches; --list shows them all"));
    }
    if options.list {
        jobs.iter().for_each(|job| println!("{}, seed {}", job.name(&profiles), job.seed));
        return Ok(());
    }
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let parallel = options.jobs.unwrap_or(6 * processors);
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("repair_field");
    let whole = !options.quick && options.only.is_empty();
    let partial = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/repair_field");
    let out = options.out.clone().unwrap_or_else(|| match whole {
        true => Path::new(env!("CARGO_MANIFEST_DIR")).join("docs"),
        false => partial.clone(),
    });
    fs::create_dir_all(&scratch)?;
    fs::create_dir_all(&partial)?;
    fs::create_dir_all(&out)?;

    let began = Instant::now();
    let raw = partial.join("runs.jsonl");
    let board = Board {
        total: jobs.len(),
        queue: Mutex::new(jobs.into()),
        state: Mutex::new(BoardState { cells: Cells::default(), raw: fs::File::create(&raw)? }),
        began,
    };
    std::thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                while let Some(job) = board.take() {
                    board.run(options, &profiles, &scratch, job);
                }
            });
        }
    });
    let BoardState { cells, .. } = board.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    let circumstances = report::Circumstances {
        command: std::env::args().skip(1).filter(|arg| arg != "--bench").collect(),
        seeds,
        seconds: options.seconds,
        parallel,
        took: began.elapsed(),
    };
    let written = report::write(&out, &profiles, &cells, &circumstances)?;
    eprintln!("{} in {} s; wrote {}", board.total, began.elapsed().as_secs(), raw.display());
    written.iter().for_each(|path| eprintln!("wrote {}", path.display()));
    match cells.failures.len() {
        0 => Ok(()),
        count => Err(io::Error::other(format!("{count} runs failed, see above"))),
    }
}

/// One run of the grid.
#[derive(Debug, Clone, Copy)]
struct Job {
    profile: usize,
    budget: u32,
    system: System,
    seed: u64,
    attempt: u32,
}

impl Job {
    fn name(&self, profiles: &[Profile]) -> String {
        let link = &profiles[self.profile].name;
        format!("{link}, {} x, {}", self.budget, self.system.name())
    }
}

/// Systems side by side, so that what else the machine does meets them alike.
fn plan(options: &Options, profiles: &[Profile], seeds: u64) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (profile, link) in profiles.iter().enumerate() {
        for seed in 0..seeds {
            for budget in BUDGETS {
                for system in System::ALL {
                    let job = Job { profile, budget, system, seed, attempt: 1 };
                    let name = job.name(profiles);
                    // A budget changes nothing where nothing is repaired.
                    let idle = system == System::Udp && budget != BUDGETS[0];
                    let wanted = options.only.iter().all(|text| name.contains(text.as_str()));
                    if !idle && wanted && (!options.quick || link.quick) {
                        jobs.push(job);
                    }
                }
            }
        }
    }
    jobs
}

/// What is to do and what came of it.
struct Board {
    total: usize,
    queue: Mutex<VecDeque<Job>>,
    state: Mutex<BoardState>,
    began: Instant,
}

struct BoardState {
    cells: Cells,
    raw: fs::File,
}

impl Board {
    fn take(&self) -> Option<Job> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn run(&self, options: &Options, profiles: &[Profile], scratch: &Path, job: Job) {
        let outcome = tempfile::tempdir_in(scratch).and_then(|dir| {
            let outcome = run::run(&Setup {
                profile: &profiles[job.profile],
                budget: job.budget,
                system: job.system,
                // Seeds far apart, for each link takes two.
                seed: 1000 * (job.seed + 1),
                length: Duration::from_secs_f64(options.seconds),
                dir: dir.path(),
                clock: Instant::now(),
            });
            if outcome.is_err() || options.keep {
                eprintln!("  logs of the next are in {}", dir.keep().display());
            }
            outcome
        });
        let again = match &outcome {
            Ok(outcome) => !outcome.is_sound(),
            Err(_) => true,
        };
        if again && job.attempt < ATTEMPTS {
            let name = job.name(profiles);
            match &outcome {
                Ok(outcome) => eprintln!(
                    "  again, the machine was late ({} us, source {} us): {name}",
                    outcome.emulator_late, outcome.source_late
                ),
                Err(error) => eprintln!("  again, {error}: {name}"),
            }
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.push_back(Job { attempt: job.attempt + 1, ..job });
            return;
        }
        self.note(profiles, job, outcome);
    }

    fn note(&self, profiles: &[Profile], job: Job, outcome: io::Result<Outcome>) {
        let name = job.name(profiles);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match &outcome {
            Ok(outcome) => {
                let line = serde_json::json!({ "run": name, "seed": job.seed, "outcome": outcome });
                if let Err(error) = writeln!(state.raw, "{line}") {
                    eprintln!("  cannot write runs.jsonl: {error}");
                }
                report::progress(outcome)
            }
            Err(error) => format!("FAILED: {error}"),
        };
        state.cells.add((job.profile, job.budget, job.system), &name, job.seed, outcome);
        let done = state.cells.runs + state.cells.failures.len();
        let elapsed = self.began.elapsed().as_secs();
        let left = elapsed * (self.total - done.min(self.total)) as u64 / done.max(1) as u64;
        eprintln!(
            "[{done}/{}, {elapsed} s, {left} s left] {name}, seed {}: {line}",
            self.total, job.seed
        );
    }
}

/// How often a run is tried that failed, or for which the machine was too busy.
const ATTEMPTS: u32 = 3;
