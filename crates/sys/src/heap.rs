//! The heap of the process.

/// Returns freed memory to the system. The allocator keeps what was freed, in pieces between memory in
/// use, and after a burst of streams or viewers that may be most of the process's memory.
///
/// Takes milliseconds per 100 MB, during which other threads may wait for the allocator. Does nothing
/// with another C library than glibc.
pub fn give_back_free_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim has no requirements, and may be called from any thread (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}
