//! How the receiving thread sleeps until there is something to do.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Wake,
    time::Duration,
};

/// Wakes a thread that sleeps in [`Bell::sleep`]; as a waker, whenever a future can go on.
///
/// It costs who rings a system call only if the thread sleeps.
#[derive(Debug)]
pub struct Bell {
    rung: AtomicBool,
    asleep: AtomicBool,
    /// An eventfd(2), not blocking.
    file: File,
}

/// Sockets that [`Bell::sleep`] takes at most.
pub const MAX_SOCKETS: usize = 4;

impl Bell {
    /// Has rung already, so that who waits for it has a look first.
    ///
    /// # Errors
    /// If the system has no more descriptors to give.
    pub fn new() -> io::Result<Arc<Self>> {
        let file = File::from(eventfd()?);
        Ok(Arc::new(Self { rung: AtomicBool::new(true), asleep: AtomicBool::new(false), file }))
    }

    /// Whether it rang since the last call.
    pub fn take(&self) -> bool {
        self.rung.load(Ordering::Relaxed) && self.rung.swap(false, Ordering::SeqCst)
    }

    /// Sleeps until one of the first [`MAX_SOCKETS`] `sockets` can be read or has failed, the bell
    /// rings, or `timeout` has passed; at once if it rang since [`Bell::take`]. Tells which sockets
    /// are ready. One thread at a time.
    ///
    /// # Errors
    /// As ppoll(2). A signal only ends the sleep.
    pub fn sleep(
        &self,
        sockets: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> io::Result<[bool; MAX_SOCKETS]> {
        let mut polled =
            [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; 1 + MAX_SOCKETS];
        let fds = std::iter::once(self.file.as_raw_fd());
        let fds = fds.chain(sockets.iter().map(AsRawFd::as_raw_fd));
        polled.iter_mut().zip(fds).for_each(|(polled, fd)| polled.fd = fd);
        // Either this thread sees now that it rang, or who rings sees that this thread sleeps.
        self.asleep.store(true, Ordering::SeqCst);
        let timeout = if self.rung.load(Ordering::SeqCst) { Duration::ZERO } else { timeout };
        let count = (1 + sockets.len()).min(polled.len());
        let result = ppoll(&mut polled[..count], timeout);
        self.asleep.store(false, Ordering::SeqCst);
        let [bell, sockets @ ..] = polled.map(|polled| polled.revents != 0);
        if bell {
            // What it counts is of no interest, only that it counts anew.
            let _ = (&self.file).read(&mut [0; 8]);
        }
        result.map(|()| sockets)
    }
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::SeqCst);
        if self.asleep.swap(false, Ordering::SeqCst) {
            // Fails only if it was rung so often that the count is full: it is readable then.
            let _ = (&self.file).write(&1u64.to_ne_bytes());
        }
    }
}

fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: it takes no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn ppoll(polled: &mut [libc::pollfd], timeout: Duration) -> io::Result<()> {
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let count = polled.len() as libc::nfds_t;
    // SAFETY: the slice has `count` entries, and like the timeout it outlives the call.
    let ready = unsafe { libc::ppoll(polled.as_mut_ptr(), count, &raw const timeout, ptr::null()) };
    if ready >= 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
        error => Err(error),
    }
}
