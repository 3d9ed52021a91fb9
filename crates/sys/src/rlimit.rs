//! Process limits: getrlimit(2), setrlimit(2), sysconf(3).

use std::io;

/// The limits on open file descriptors (`RLIMIT_NOFILE`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// The limit in force.
    pub soft: u64,
    /// The highest value that the process may set `soft` to.
    pub hard: u64,
}

impl Descriptors {
    /// Returns the limits of this process.
    ///
    /// # Errors
    /// Those of getrlimit(2).
    pub fn of_this_process() -> io::Result<Self> {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: the call writes to `limit`, which outlives it.
        match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
            0 => Ok(Self { soft: limit.rlim_cur, hard: limit.rlim_max }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Raises this process's soft limit on file descriptors to `wanted`, or to the hard limit if that
/// is lower. Never lowers it. Returns the resulting limits.
///
/// # Errors
/// Those of getrlimit(2) and setrlimit(2).
pub fn raise_descriptors(wanted: u64) -> io::Result<Descriptors> {
    let current = Descriptors::of_this_process()?;
    let soft = wanted.min(current.hard);
    if soft <= current.soft {
        return Ok(current);
    }
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: current.hard };
    // SAFETY: the call reads `limit`, which outlives it.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
        0 => Ok(Descriptors { soft, ..current }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes per memory page.
pub fn page_size() -> u64 {
    // SAFETY: the call takes an integer and touches no memory of the caller.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}
