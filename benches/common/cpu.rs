//! Processor time.

use std::{io, mem::MaybeUninit};

/// Seconds of processor time that the calling thread has used, in user mode and in the kernel.
pub fn of_this_thread() -> f64 {
    seconds(libc::CLOCK_THREAD_CPUTIME_ID).unwrap_or(f64::NAN)
}

/// Seconds of processor time that a process has used, including its ended threads.
///
/// # Errors
/// If the process does not exist.
pub fn of_process(id: u32) -> io::Result<f64> {
    let mut clock = 0;
    // SAFETY: the pointer is valid for one clock id.
    let error = unsafe { libc::clock_getcpuclockid(id as libc::pid_t, &raw mut clock) };
    match error {
        0 => seconds(clock),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

fn seconds(clock: libc::clockid_t) -> io::Result<f64> {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: the pointer is valid for one timespec, which is initialised if the call succeeds.
    let time = unsafe {
        if libc::clock_gettime(clock, time.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        time.assume_init()
    };
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}
