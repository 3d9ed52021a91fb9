//! A one-shot timer that any thread can set while a tokio task waits for it.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::io::{Interest, unix::AsyncFd};

/// The setting half of a timerfd(2).
///
/// Any thread can set it with one system call, and it stays set while the waiting task wakes for
/// other reasons. tokio's timers can be set only by the task that waits. An epoll_wait(2) timeout
/// would be armed and disarmed on each wait, at 5 µs each where a hypervisor emulates the timer.
#[derive(Debug)]
pub struct Timer {
    timer: Arc<OwnedFd>,
    /// The next expiry, which may be earlier than needed.
    expires: Option<Instant>,
}

/// The waiting half of a [`Timer`].
#[derive(Debug)]
pub struct TimerWaiter(AsyncFd<Arc<OwnedFd>>);

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// If no file descriptor is available.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: Arc::new(timerfd()?), expires: None })
    }

    /// Makes the timer expire at `deadline` or earlier. A later deadline than the one set has no
    /// effect.
    ///
    /// # Errors
    /// Those of timerfd_settime(2).
    pub fn set(&mut self, deadline: Instant) -> io::Result<()> {
        if self.expires.is_none_or(|expires| expires > deadline) {
            set_timer(&self.timer, deadline.saturating_duration_since(Instant::now()))?;
            self.expires = Some(deadline);
        }
        Ok(())
    }

    /// Records that the timer has expired, so that the next [`Timer::set`] takes effect.
    pub fn mark_expired(&mut self) {
        self.expires = None;
    }
}

impl TimerWaiter {
    /// Registers `timer` with the current tokio runtime.
    ///
    /// # Errors
    /// If the runtime cannot watch another descriptor.
    pub fn new(timer: &Timer) -> io::Result<Self> {
        // SAFETY: the `Arc` keeps the descriptor open while it is registered.
        let registered =
            unsafe { AsyncFd::register_with_interest(timer.timer.clone(), Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Ready if the timer has expired since the last `Ready`. Otherwise wakes `cx` when it expires.
    ///
    /// # Errors
    /// If the runtime is shutting down.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut expired = Poll::Pending;
        // The expiry count need not be read: setting the timer again makes it unreadable. The loop
        // ends in a pending poll, which registers the waker.
        while let Poll::Ready(readable) = self.0.poll_read_ready(cx) {
            readable?.clear_ready();
            expired = Poll::Ready(Ok(()));
        }
        expired
    }
}

fn timerfd() -> io::Result<OwnedFd> {
    // SAFETY: the call takes no pointers.
    let fd = unsafe {
        libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_timer(timer: &OwnedFd, after: Duration) -> io::Result<()> {
    // Zero would disarm the timer.
    let after = after.max(Duration::from_nanos(1));
    let never = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let after = libc::timespec {
        tv_sec: libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: after.subsec_nanos().into(),
    };
    let once = libc::itimerspec { it_interval: never, it_value: after };
    // SAFETY: the new setting outlives the call, and a null pointer discards the old one.
    match unsafe { libc::timerfd_settime(timer.as_raw_fd(), 0, &raw const once, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::poll_fn,
        task::{Wake, Waker},
        thread,
    };

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    async fn expiry(waiter: &TimerWaiter) {
        poll_fn(|cx| waiter.poll(cx)).await.unwrap();
    }

    #[tokio::test]
    async fn timer_expires_no_sooner_than_set() {
        let mut timer = Timer::new().unwrap();
        let waiter = TimerWaiter::new(&timer).unwrap();
        let start = Instant::now();
        // The third deadline has passed when it is set, so the timer expires at once.
        for (deadline, wakes_at) in [(ms(30), ms(30)), (ms(50), ms(50)), (ms(40), ms(50))] {
            timer.set(start + deadline).unwrap();
            timer.set(start + LONG).unwrap();
            expiry(&waiter).await;
            assert!(start.elapsed() >= wakes_at, "{:?}", start.elapsed());
            timer.mark_expired();
        }
    }

    #[tokio::test]
    async fn another_thread_sets_the_timer_while_a_task_waits() {
        let mut timer = Timer::new().unwrap();
        let waiter = TimerWaiter::new(&timer).unwrap();
        let now = Instant::now();
        timer.set(now + LONG).unwrap();
        let setter = thread::spawn(move || timer.set(now + ms(5)).unwrap());
        expiry(&waiter).await;
        assert!((ms(5)..LONG / 2).contains(&now.elapsed()));
        setter.join().unwrap();
    }

    #[tokio::test]
    async fn each_expiry_is_reported_once_and_wakes_the_last_waker() {
        let mut timer = Timer::new().unwrap();
        let waiter = TimerWaiter::new(&timer).unwrap();
        let woken = Arc::new(Flag::default());
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        assert!(waiter.poll(&mut cx).is_pending());
        let now = Instant::now();
        timer.set(now).unwrap();
        while !woken.0.load(std::sync::atomic::Ordering::SeqCst) {
            assert!(now.elapsed() < LONG, "the waker is not called");
            tokio::task::yield_now().await;
        }
        assert!(waiter.poll(&mut cx).is_ready());
        assert!(waiter.poll(&mut cx).is_pending());
    }

    #[derive(Default)]
    struct Flag(std::sync::atomic::AtomicBool);

    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }
}
