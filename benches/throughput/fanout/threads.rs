//! Processor time and results of single threads.

use std::{fs, io, thread::ScopedJoinHandle};

/// A thread of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread(libc::pid_t);

impl Thread {
    /// Seconds of processor time so far.
    pub fn seconds(&self) -> f64 {
        // The clock id of a thread: CPUCLOCK_PERTHREAD and CPUCLOCK_SCHED, encoded like the clock
        // ids of clock_getcpuclockid(3).
        let clock = (!self.0 << 3) | 6;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the pointer is valid for one timespec.
        match unsafe { libc::clock_gettime(clock, &raw mut time) } {
            0 => time.tv_sec as f64 + time.tv_nsec as f64 / 1e9,
            _ => f64::NAN,
        }
    }
}

/// Waits for the result of a thread.
pub fn join<T>(thread: ScopedJoinHandle<'_, io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

/// The threads of this process whose names begin with `prefix`.
pub fn named(prefix: &str) -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir("/proc/self/task")? {
        let path = entry?.path();
        // A thread that has ended meanwhile has no name.
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let id = path.file_name().and_then(|id| id.to_str()?.parse().ok());
        threads.extend(id.map(Thread).filter(|_| name.starts_with(prefix)));
    }
    threads.sort_by_key(|thread| thread.0);
    Ok(threads)
}
