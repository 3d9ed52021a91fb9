//! Processes: tests that need a separate one, child processes, signals and memory.

use std::{
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::Duration,
};

/// Runs the calling test in a separate process. Returns `true` in that process, where the test
/// continues, and `false` in the original one, where it is done.
///
/// `cargo nextest` runs each test in its own process anyway; plain `cargo test` runs all tests of a
/// binary in one. `descriptors` also sets the limit of open files there (`RLIMIT_NOFILE`, soft and
/// hard), which takes a new process with either runner.
///
/// `module` is `module_path!()`, `test` the name of the calling function. Panics if the test fails
/// there, or if no test has that name.
#[track_caller]
pub fn alone(module: &str, test: &str, descriptors: Option<u32>) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let is_alone = std::env::var("NEXTEST_EXECUTION_MODE").is_ok_and(|m| m == "process-per-test");
    if is_alone && descriptors.is_none() {
        return true;
    }
    let module = module.split_once("::").map_or("", |(_, module)| module);
    let name = format!("{module}::{test}");
    let limit = descriptors.map_or(String::new(), |limit| format!("ulimit -n {limit}; "));
    let output = Command::new("sh")
        .args(["-c", &format!("{limit}exec \"$@\""), "sh"])
        .arg(std::env::current_exe().expect("no path of this program"))
        .args(["--exact", &name, "--nocapture"])
        .env(INSIDE, "1")
        .stdin(Stdio::null())
        .output()
        .expect("cannot start a process for the test");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    // With a wrong name no test runs, which cargo reports as a success.
    let passed = output.status.success() && out.contains("test result: ok. 1 passed");
    assert!(passed, "{name} failed in its own process: {}\n{out}\n{errors}", output.status);
    print!("{out}");
    eprint!("{errors}");
    false
}

/// A process that is killed when its test fails.
pub struct Guard(Option<Child>);

impl Guard {
    pub fn new(child: Child) -> Self {
        Self(Some(child))
    }

    /// Sends SIGINT, as Ctrl-C does, and waits for the end.
    #[track_caller]
    pub fn interrupt(mut self) -> Output {
        let child = self.0.take().expect("only this method takes it");
        signal(child.id(), "INT");
        child.wait_with_output().expect("cannot wait for a process")
    }

    /// The same, with a deadline and without the output.
    #[track_caller]
    pub fn interrupt_within(mut self, deadline: Duration) -> ExitStatus {
        let child = self.0.as_mut().expect("only these methods take it");
        signal(child.id(), "INT");
        super::wait_for("a process ends after SIGINT", deadline, || {
            child.try_wait().expect("cannot wait for a process")
        })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // Both fail if the process has ended, which is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal, by its name in kill(1), to a process that has not been waited for.
#[track_caller]
pub fn signal(pid: u32, name: &str) {
    let command = format!("kill -s {name} {pid}");
    let status = Command::new("sh").args(["-c", &command]).status().expect("cannot run sh");
    assert!(status.success(), "{command}: {status}");
}

/// Resident memory of this process in bytes (proc(5), `statm`).
pub fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("no statm");
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<usize>().ok());
    pages.expect("no count of pages") * 4096
}

/// Environment variable that is set in processes of [`alone`].
const INSIDE: &str = "DOWNPOUR_TEST_ALONE";
