//! Compares Downpour with SRT, RIST and bare UDP over the same emulated links. Run by
//! `scripts/bench-repair`; `docs/repair.md` has the method and the results.

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
    /// Runs only a few links of the grid, with 2 seeds.
    #[arg(long)]
    quick: bool,
    /// Seeds per cell [default: 5; 2 with --quick].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// Seconds of media that each run measures.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Concurrent runs [default: 6 per processor].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=256))]
    jobs: Option<u64>,
    /// Runs only cells whose "LINK, BUDGET x, SYSTEM" contains this text. If given several times,
    /// all texts must match.
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Directory of the report [default: docs for the whole grid, else target/repair_field].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Keeps the configurations and logs of each run in target/tmp/repair_field.
    #[arg(long)]
    keep: bool,
    /// Lists the runs and exits.
    #[arg(long)]
    list: bool,
    /// Passed by cargo bench.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// The directory of the report; `partial` is the default if only a part of the grid runs.
    fn report_dir(&self, partial: &Path) -> PathBuf {
        let whole = !self.quick && self.only.is_empty();
        self.out.clone().unwrap_or_else(|| match whole {
            true => Path::new(env!("CARGO_MANIFEST_DIR")).join("docs"),
            false => partial.into(),
        })
    }
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
        return Err(io::Error::other("--seconds must be 0.5 to 600"));
    }
    let profiles = grid::profiles();
    let seeds = options.seeds.unwrap_or(if options.quick { 2 } else { 5 });
    let jobs = plan(options, &profiles, seeds);
    if jobs.is_empty() {
        return Err(io::Error::other("no run matches; --list shows all runs"));
    }
    if options.list {
        jobs.iter().for_each(|job| println!("{}, seed {}", job.name(&profiles), job.seed));
        return Ok(());
    }
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let parallel = options.jobs.unwrap_or(6 * processors);
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("repair_field");
    let partial = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/repair_field");
    let out = options.report_dir(&partial);
    fs::create_dir_all(&scratch)?;
    fs::create_dir_all(&partial)?;
    fs::create_dir_all(&out)?;

    let began = Instant::now();
    let raw = partial.join("runs.jsonl");
    let schedule = Schedule {
        total: jobs.len(),
        queue: Mutex::new(jobs.into()),
        results: Mutex::new(Results { cells: Cells::default(), raw: fs::File::create(&raw)? }),
        began,
    };
    std::thread::scope(|scope| {
        for _ in 0..parallel {
            scope.spawn(|| {
                while let Some(job) = schedule.take() {
                    schedule.run(options, &profiles, &scratch, job);
                }
            });
        }
    });
    let Results { cells, .. } =
        schedule.results.into_inner().unwrap_or_else(PoisonError::into_inner);
    let circumstances = report::Circumstances {
        command: std::env::args().skip(1).filter(|arg| arg != "--bench").collect(),
        seeds,
        seconds: options.seconds,
        parallel,
        took: began.elapsed(),
    };
    let written = report::write(&out, &profiles, &cells, &circumstances)?;
    eprintln!(
        "{} runs in {} s; wrote {}",
        schedule.total,
        began.elapsed().as_secs(),
        raw.display()
    );
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

/// Lists the runs of the options. The systems of a cell are adjacent, so that other work on the
/// machine affects them alike.
fn plan(options: &Options, profiles: &[Profile], seeds: u64) -> Vec<Job> {
    let mut jobs = Vec::new();
    for (profile, link) in profiles.iter().enumerate() {
        for seed in 0..seeds {
            for budget in BUDGETS {
                for system in System::ALL {
                    let job = Job { profile, budget, system, seed, attempt: 1 };
                    let name = job.name(profiles);
                    // Without repair, the budget changes nothing.
                    let redundant = system == System::Udp && budget != BUDGETS[0];
                    let selected = options.only.iter().all(|text| name.contains(text.as_str()));
                    if !redundant && selected && (!options.quick || link.quick) {
                        jobs.push(job);
                    }
                }
            }
        }
    }
    jobs
}

/// The queue of runs and their results, shared by the threads.
struct Schedule {
    total: usize,
    queue: Mutex<VecDeque<Job>>,
    results: Mutex<Results>,
    began: Instant,
}

struct Results {
    cells: Cells,
    raw: fs::File,
}

impl Schedule {
    /// Takes the next run.
    fn take(&self) -> Option<Job> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    /// Runs `job`. Queues it again if it failed or the machine was too busy, up to [`ATTEMPTS`]
    /// times in all.
    fn run(&self, options: &Options, profiles: &[Profile], scratch: &Path, job: Job) {
        let outcome = tempfile::tempdir_in(scratch).and_then(|dir| {
            let outcome = run::run(&Setup {
                profile: &profiles[job.profile],
                budget: job.budget,
                system: job.system,
                // Each run uses two consecutive seeds, one per direction.
                seed: 1000 * (job.seed + 1),
                length: Duration::from_secs_f64(options.seconds),
                dir: dir.path(),
                clock: Instant::now(),
            });
            if outcome.is_err() || options.keep {
                eprintln!("  logs of {}: {}", job.name(profiles), dir.keep().display());
            }
            outcome
        });
        let retry = match &outcome {
            Ok(outcome) => !outcome.is_valid(),
            Err(_) => true,
        };
        if retry && job.attempt < ATTEMPTS {
            let name = job.name(profiles);
            match &outcome {
                Ok(outcome) => eprintln!(
                    "  retry of {name}: machine too busy (emulator {} us late, source {} us)",
                    outcome.emulator_late, outcome.source_late
                ),
                Err(error) => eprintln!("  retry of {name}: {error}"),
            }
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.push_back(Job { attempt: job.attempt + 1, ..job });
            return;
        }
        self.record(profiles, job, outcome);
    }

    /// Adds the outcome to the results and prints the progress.
    fn record(&self, profiles: &[Profile], job: Job, outcome: io::Result<Outcome>) {
        let name = job.name(profiles);
        let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match &outcome {
            Ok(outcome) => {
                let line = serde_json::json!({ "run": name, "seed": job.seed, "outcome": outcome });
                if let Err(error) = writeln!(results.raw, "{line}") {
                    eprintln!("  cannot write runs.jsonl: {error}");
                }
                report::progress(outcome)
            }
            Err(error) => format!("FAILED: {error}"),
        };
        results.cells.add((job.profile, job.budget, job.system), &name, job.seed, outcome);
        let done = results.cells.runs + results.cells.failures.len();
        let elapsed = self.began.elapsed().as_secs();
        let left = elapsed * (self.total - done.min(self.total)) as u64 / done.max(1) as u64;
        eprintln!(
            "[{done}/{}, {elapsed} s, {left} s left] {name}, seed {}: {line}",
            self.total, job.seed
        );
    }
}

/// Attempts per run.
const ATTEMPTS: u32 = 3;
