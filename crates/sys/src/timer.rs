//! What wakes the thread that does what is due.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::io::{Interest, unix::AsyncFd};

/// When what is due next is due: a timerfd(2).
///
/// It stays set while other things wake who waits for it, and other threads set it meanwhile, with
/// one call. tokio's own timers can be set only where they are waited for, and a timeout of
/// epoll_wait(2) would be set and taken back each time, which is 5 µs each way where a hypervisor
/// keeps the timer.
#[derive(Debug)]
pub struct Timer {
    timer: Arc<OwnedFd>,
    /// When it goes off next, which may be earlier than needed.
    set: Option<Instant>,
}

/// A task's ear for a [`Timer`].
#[derive(Debug)]
pub struct TimerWaiter(AsyncFd<Arc<OwnedFd>>);

impl Timer {
    /// Not set.
    ///
    /// # Errors
    /// If the system has no more descriptors to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self { timer: Arc::new(timerfd()?), set: None })
    }

    /// Sees to it that it goes off at `until`, or before.
    ///
    /// # Errors
    /// As timerfd_settime(2).
    pub fn set(&mut self, until: Instant) -> io::Result<()> {
        if self.set.is_none_or(|set| set > until) {
            set_timer(&self.timer, until.saturating_duration_since(Instant::now()))?;
            self.set = Some(until);
        }
        Ok(())
    }

    /// It has gone off, and is to be set anew.
    pub fn went_off(&mut self) {
        self.set = None;
    }
}

impl TimerWaiter {
    /// Hears `clock`, in the runtime in which it is called.
    ///
    /// # Errors
    /// If the system cannot watch another descriptor.
    pub fn new(clock: &Timer) -> io::Result<Self> {
        let (timer, readable) = (clock.timer.clone(), Interest::READABLE);
        // SAFETY: it is one descriptor, which stays open for as long as it is held here.
        let watched = unsafe { AsyncFd::register_with_interest(timer, readable) };
        Ok(Self(watched?))
    }

    /// Ready if the clock has gone off since it was ready last. Otherwise it wakes `cx` when it does.
    ///
    /// # Errors
    /// If the runtime is being shut down.
    pub fn poll(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut went_off = Poll::Pending;
        // To be set anew makes it unreadable, so that what it counts need not be read. Only what is
        // not ready keeps the waker.
        while let Poll::Ready(readable) = self.0.poll_read_ready(cx) {
            readable?.clear_ready();
            went_off = Poll::Ready(Ok(()));
        }
        went_off
    }
}

fn timerfd() -> io::Result<OwnedFd> {
    // SAFETY: it takes no pointers.
    let fd = unsafe {
        libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC | libc::TFD_NONBLOCK)
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_timer(timer: &OwnedFd, after: Duration) -> io::Result<()> {
    // Zero would stop it.
    let after = after.max(Duration::from_nanos(1));
    let never = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let after = libc::timespec {
        tv_sec: libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: after.subsec_nanos().into(),
    };
    let once = libc::itimerspec { it_interval: never, it_value: after };
    // SAFETY: the new setting outlives the call, and the old one is not asked for.
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

    async fn goes_off(alarm: &TimerWaiter) {
        poll_fn(|cx| alarm.poll(cx)).await.unwrap();
    }

    #[tokio::test]
    async fn it_goes_off_no_sooner_than_asked() {
        let mut clock = Timer::new().unwrap();
        let alarm = TimerWaiter::new(&clock).unwrap();
        let began = Instant::now();
        // A later time leaves it set to the earlier one, which is then for nothing; an earlier one
        // sets it anew; one that has passed makes it go off at once.
        for (until, wakes_at) in [(ms(30), ms(30)), (ms(50), ms(50)), (ms(40), ms(50))] {
            clock.set(began + until).unwrap();
            clock.set(began + LONG).unwrap();
            goes_off(&alarm).await;
            assert!(began.elapsed() >= wakes_at, "{:?}", began.elapsed());
            clock.went_off();
        }
    }

    #[tokio::test]
    async fn another_thread_sets_it_while_it_is_waited_for() {
        let mut clock = Timer::new().unwrap();
        let alarm = TimerWaiter::new(&clock).unwrap();
        let now = Instant::now();
        clock.set(now + LONG).unwrap();
        let setting = thread::spawn(move || {
            // Whether it is waited for already or not.
            clock.set(now + ms(5)).unwrap();
            clock
        });
        goes_off(&alarm).await;
        assert!((ms(5)..LONG / 2).contains(&now.elapsed()));
        let mut clock = setting.join().unwrap();
        clock.went_off();
        // It does not tell twice, and wakes who asked last.
        let woken = Arc::new(Flag::default());
        let waker = Waker::from(woken.clone());
        let mut cx = Context::from_waker(&waker);
        assert!(alarm.poll(&mut cx).is_pending());
        clock.set(now).unwrap();
        while !woken.0.load(std::sync::atomic::Ordering::SeqCst) {
            assert!(now.elapsed() < LONG, "it does not wake");
            tokio::task::yield_now().await;
        }
        assert!(alarm.poll(&mut cx).is_ready());
        assert!(alarm.poll(&mut cx).is_pending());
    }

    #[derive(Default)]
    struct Flag(std::sync::atomic::AtomicBool);

    impl Wake for Flag {
        fn wake(self: Arc<Self>) {
            self.0.store(true, std::sync::atomic::Ordering::SeqCst);
        }
    }
}
