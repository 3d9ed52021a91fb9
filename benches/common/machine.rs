//! The machine and the commit that a bench measures.

use std::{fs, path::Path, process::Command};

/// Number and model of the processors, and the kernel version.
pub fn machine() -> String {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let model = cpuinfo
        .lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split_once(':'))
        .map_or("unknown processor", |(_, model)| model.trim())
        .to_owned();
    let count = std::thread::available_parallelism().map_or(1, |count| count.get());
    format!("{count} × {model}, Linux {}", read("/proc/sys/kernel/osrelease").trim())
}

/// Short id of the commit that is checked out, with a note if the code differs from it.
pub fn commit() -> String {
    let git = |args: &[&str]| {
        let output = Command::new("git").args(args).current_dir(root()).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short", "HEAD"]).unwrap_or("unknown".into());
    // docs/ is left out: benches write to it.
    let changed = git(&["status", "--porcelain", "src", "benches", "Cargo.toml"]);
    let changed = changed.is_some_and(|files| !files.is_empty());
    if changed { format!("{commit} with changes") } else { commit }
}

/// The project's directory.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
