//! What Downpour costs, beside what the kernel could do and what others do, in one run:
//! `scripts/bench` runs it and `docs/performance.md` says how it measures and holds what came out.

mod bare;
#[path = "../common/mod.rs"]
mod common;
mod delay;
mod edge;
mod fanout;
mod ingest;
mod table;
mod viewers;

use std::{
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::{Parser, ValueEnum};
use common::{
    document,
    machine::{commit, machine, root},
};
use table::Section;

/// Measures what Downpour costs beside what the kernel could do and what others do.
///
/// Writes docs/performance.md, unless only a part is run.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Options {
    /// Only these parts; docs/performance.md is written only with --write then.
    part: Vec<Part>,
    /// Few rounds of few seconds, to see that it works; nothing is written.
    #[arg(long)]
    quick: bool,
    /// Writes the parts that are run into docs/performance.md.
    #[arg(long, conflicts_with = "quick")]
    write: bool,
    /// Measures this build of downpour, which must know the same settings, in place of the one that
    /// was built with the bench (not in fanout, which has the code inside); nothing is written.
    #[arg(long, value_name = "PATH", conflicts_with = "write")]
    program: Option<PathBuf>,
    /// A program that a part of the bench starts for itself, with its arguments.
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    child: Vec<OsString>,
    /// What cargo bench passes.
    #[arg(long, hide = true)]
    bench: bool,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// One packet to many edges.
    Fanout,
    /// Many publishers at the cloud.
    Ingest,
    /// Many viewers of one stream at an edge.
    Viewers,
    /// From the encoder's last byte to the viewer's.
    Delay,
    /// Many streams at an edge.
    Edge,
}

impl Part {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// `program` is the downpour that is measured.
    fn run(self, quick: bool, program: &str) -> io::Result<Section> {
        match self {
            Self::Fanout => fanout::run(quick),
            Self::Ingest => ingest::run(quick, program),
            Self::Viewers => viewers::run(quick, program),
            Self::Delay => delay::run(quick, program),
            Self::Edge => edge::run(quick, program),
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    let result = match options.child.split_first() {
        Some((name, arguments)) => child(name, arguments),
        None => bench(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Runs each part, those after one that failed too.
fn bench(options: &Options) -> io::Result<()> {
    // Thousands of connections, at both ends; children inherit it.
    let limit = downpour::node::limits::raise_descriptors(u64::MAX)?;
    let all = options.part.is_empty();
    let parts = if all { Part::value_variants() } else { &options.part };
    let write = options.write || (all && !options.quick && options.program.is_none());
    let program = program(options.program.as_deref())?;
    eprintln!("{}, at {}, {} file descriptors", machine(), commit(), limit.soft);
    let began = Instant::now();
    let mut failed = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let name = part.name();
        eprintln!("== {name} ({} of {})", number + 1, parts.len());
        let part_began = Instant::now();
        match part.run(options.quick, &program).and_then(|section| tell(&name, &section, write)) {
            Ok(()) => eprintln!("== {name} took {} s", part_began.elapsed().as_secs()),
            Err(error) => {
                eprintln!("== {name} failed after {} s: {error}", part_began.elapsed().as_secs());
                failed.push(name);
            }
        }
    }
    eprintln!("all took {} s", began.elapsed().as_secs());
    match failed.is_empty() {
        true => Ok(()),
        false => Err(io::Error::other(format!("failed: {}", failed.join(", ")))),
    }
}

/// What is measured, as a path that holds in every directory.
fn program(given: Option<&Path>) -> io::Result<String> {
    let path = given.unwrap_or(Path::new(PROGRAM));
    let absolute = path.canonicalize().map_err(|error| {
        io::Error::new(error.kind(), format!("--program {}: {error}", path.display()))
    })?;
    eprintln!("measured is {}", absolute.display());
    Ok(absolute.to_string_lossy().into_owned())
}

/// Prints what a part came to, and writes it into the document.
fn tell(name: &str, section: &Section, write: bool) -> io::Result<()> {
    let text = format!("On {}, at {}.\n\n{}", machine(), commit(), section.text());
    println!("\n{text}\n");
    if !write {
        return Ok(());
    }
    document::put(&root().join("docs/performance.md"), name, &text)?;
    for plot in section.plots() {
        let svg = common::plot::draw(&plot.plot);
        std::fs::write(root().join("docs").join(plot.file), svg)?;
    }
    Ok(())
}

/// Runs one of the programs that parts start: floors, sources, sinks. Processes of their own, so that
/// what they cost is theirs.
fn child(name: &OsString, arguments: &[OsString]) -> io::Result<()> {
    let arguments: Vec<&str> = arguments.iter().filter_map(|text| text.to_str()).collect();
    match name.to_str().and_then(|name| name.split_once('-')) {
        Some(("fanout", role)) => fanout::child(role, &arguments),
        Some(("ingest", role)) => ingest::child(role, &arguments),
        Some(("viewers", role)) => viewers::child(role, &arguments),
        Some(("delay", role)) => delay::child(role, &arguments),
        Some(("edge", role)) => edge::child(role, &arguments),
        _ => Err(io::Error::other(format!("there is no program {}", name.display()))),
    }
}

/// Built by cargo together with this bench.
const PROGRAM: &str = env!("CARGO_BIN_EXE_downpour");
