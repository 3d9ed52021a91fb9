//! The system calls behind [`super`]: getrlimit(2), setrlimit(2), sysconf(3).

use std::io;

/// How many file descriptors a process may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptors {
    /// Now.
    pub soft: u64,
    /// The most that it can raise `soft` to.
    pub hard: u64,
}

impl Descriptors {
    /// The limits of this process.
    ///
    /// # Errors
    /// Those of getrlimit(2).
    pub fn of_this_process() -> io::Result<Self> {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: it writes to the limit that it is given, which lives.
        match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
            0 => Ok(Self { soft: limit.rlim_cur, hard: limit.rlim_max }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Raises this process's soft limit of file descriptors to `wanted`, or to its hard limit if that is
/// lower; never lowers it. Gives the limits as they are then.
///
/// # Errors
/// Those of getrlimit(2) and setrlimit(2).
pub fn raise_descriptors(wanted: u64) -> io::Result<Descriptors> {
    let now = Descriptors::of_this_process()?;
    let soft = wanted.min(now.hard);
    if soft <= now.soft {
        return Ok(now);
    }
    let limit = libc::rlimit { rlim_cur: soft, rlim_max: now.hard };
    // SAFETY: it reads the limit that it is given, which lives.
    match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } {
        0 => Ok(Descriptors { soft, ..now }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes of a page of memory.
pub fn page_size() -> u64 {
    // SAFETY: it takes a name and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).unwrap_or(4096)
}
