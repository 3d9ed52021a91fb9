//! Measures Downpour's processor time, memory and delay beside floors (bare system calls) and other
//! servers, in one run. Run by `scripts/bench`; `docs/performance.md` has the method and the results.

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

/// Measures Downpour's processor time, memory and delay beside bare system calls and other servers.
///
/// Writes docs/performance.md if all parts run.
#[derive(Debug, Parser)]
#[command(name = "bench")]
struct Options {
    /// Runs only these parts. Without --write, docs/performance.md stays as it is.
    part: Vec<Part>,
    /// Runs few and short rounds, to check that the bench works; writes nothing.
    #[arg(long)]
    quick: bool,
    /// Writes the selected parts into docs/performance.md.
    #[arg(long, conflicts_with = "quick")]
    write: bool,
    /// Measures this build of downpour instead of the one built with the bench; writes nothing. It
    /// must accept the same settings. Does not apply to fanout, which links the code.
    #[arg(long, value_name = "PATH", conflicts_with = "write")]
    program: Option<PathBuf>,
    /// A child process of a part, with its arguments.
    #[arg(long, hide = true, num_args = 1.., allow_hyphen_values = true)]
    child: Vec<OsString>,
    /// Passed by cargo bench.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Sending packets to many edges.
    Fanout,
    /// Many publishers at the cloud.
    Ingest,
    /// Many viewers of one stream at an edge.
    Viewers,
    /// The delay from the encoder's last byte to the viewer's.
    Delay,
    /// Many streams received by an edge.
    Edge,
}

impl Part {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// Runs the part. `program` is the path of the measured downpour.
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

/// Runs the parts. If one fails, the others still run.
fn bench(options: &Options) -> io::Result<()> {
    // For both ends of thousands of connections. Child processes inherit the limit.
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
        match part.run(options.quick, &program).and_then(|section| publish(&name, &section, write))
        {
            Ok(()) => eprintln!("== {name} took {} s", part_began.elapsed().as_secs()),
            Err(error) => {
                eprintln!("== {name} failed after {} s: {error}", part_began.elapsed().as_secs());
                failed.push(name);
            }
        }
    }
    eprintln!("total: {} s", began.elapsed().as_secs());
    match failed.is_empty() {
        true => Ok(()),
        false => Err(io::Error::other(format!("failed: {}", failed.join(", ")))),
    }
}

/// Returns the absolute path of the measured program.
fn program(given: Option<&Path>) -> io::Result<String> {
    let path = given.unwrap_or(Path::new(PROGRAM));
    let absolute = path.canonicalize().map_err(|error| {
        io::Error::new(error.kind(), format!("--program {}: {error}", path.display()))
    })?;
    eprintln!("program: {}", absolute.display());
    Ok(absolute.to_string_lossy().into_owned())
}

/// Prints the results of a part. If `write` is set, also writes them and the plots into docs/.
fn publish(name: &str, section: &Section, write: bool) -> io::Result<()> {
    let text = format!("On {}, at {}.\n\n{}", machine(), commit(), section.text());
    println!("\n{text}\n");
    if !write {
        return Ok(());
    }
    document::replace_section(&root().join("docs/performance.md"), name, &text)?;
    for plot in section.plots() {
        let svg = common::plot::draw(&plot.plot);
        std::fs::write(root().join("docs").join(plot.file), svg)?;
    }
    Ok(())
}

/// Runs a child process of a part: a floor, a source or a sink. They are separate processes so that
/// their processor time is measured separately.
fn child(name: &OsString, arguments: &[OsString]) -> io::Result<()> {
    let arguments: Vec<&str> = arguments.iter().filter_map(|text| text.to_str()).collect();
    match name.to_str().and_then(|name| name.split_once('-')) {
        Some(("fanout", role)) => fanout::child(role, &arguments),
        Some(("ingest", role)) => ingest::child(role, &arguments),
        Some(("viewers", role)) => viewers::child(role, &arguments),
        Some(("delay", role)) => delay::child(role, &arguments),
        Some(("edge", role)) => edge::child(role, &arguments),
        _ => Err(io::Error::other(format!("unknown child process {}", name.display()))),
    }
}

/// Built by cargo together with this bench.
const PROGRAM: &str = env!("CARGO_BIN_EXE_downpour");
