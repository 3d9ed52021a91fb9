//! The `downpour` binary: see `downpour --help`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use downpour::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("downpour: {failure}");
            failure.exit_code()
        }
    }
}
