//! Who gets a processor first.

/// Sets the nice value of the calling thread, which the processes that it starts inherit, and that
/// of the session's group (sched(7), autogroup), without which the former counts only within it.
/// False if that was refused: only root may go ahead.
pub fn set(nice: i32) -> bool {
    // SAFETY: it takes numbers and touches no memory of ours; on Linux, 0 is the calling thread.
    let thread = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) == 0 };
    let group = match std::fs::write("/proc/self/autogroup", format!("{nice}\n")) {
        Ok(()) => true,
        // A kernel without groups.
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    };
    thread && group
}
