//! How the thread sleeps that does what is due.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    ptr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Wake,
    time::{Duration, Instant},
};

/// Wakes the thread that sleeps in [`Sleeper::sleep`]; as a waker, whenever a future can go on.
///
/// It costs who rings a system call only if the thread sleeps.
#[derive(Debug)]
pub struct Bell {
    rung: AtomicBool,
    asleep: AtomicBool,
    /// An eventfd(2), not blocking.
    file: File,
}

/// When what is due next is due: a timerfd(2).
///
/// It stays set while other things end the sleep, and other threads set it while one sleeps, with one
/// call. A sleep's own timeout would be set and taken back each time, and where a hypervisor keeps
/// the timer, that is 5 µs each way.
#[derive(Debug)]
pub struct Clock {
    file: Arc<OwnedFd>,
    /// When it goes off next, which may be earlier than needed.
    set: Option<Instant>,
}

/// One thread's sleep, with a bell and a clock. Both are in one epoll(7) for good.
#[derive(Debug)]
pub struct Sleeper {
    bell: Arc<Bell>,
    epoll: OwnedFd,
    _clock: Arc<OwnedFd>,
}

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

impl Clock {
    /// Not set.
    ///
    /// # Errors
    /// If the system has no more descriptors to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self { file: Arc::new(timerfd()?), set: None })
    }

    /// Sees to it that it goes off at `until`, or before.
    ///
    /// # Errors
    /// As timerfd_settime(2).
    pub fn set(&mut self, until: Instant) -> io::Result<()> {
        if self.set.is_none_or(|set| set > until) {
            set_timer(&self.file, until.saturating_duration_since(Instant::now()))?;
            self.set = Some(until);
        }
        Ok(())
    }

    /// It has gone off, and is to be set anew, which makes it unreadable too.
    pub fn went_off(&mut self) {
        self.set = None;
    }
}

impl Sleeper {
    /// For the one thread that `bell` and `clock` are to wake.
    ///
    /// # Errors
    /// If the system has no more descriptors to give.
    pub fn new(bell: Arc<Bell>, clock: &Clock) -> io::Result<Self> {
        let epoll = epoll()?;
        watch(&epoll, bell.file.as_fd(), BELL)?;
        watch(&epoll, clock.file.as_fd(), CLOCK)?;
        Ok(Self { bell, epoll, _clock: clock.file.clone() })
    }

    /// Sleeps until the bell rings or the clock goes off: not at all if the bell rang since
    /// [`Bell::take`]. May wake up for nothing. Tells whether the clock went off, which goes on until
    /// it is set anew.
    ///
    /// # Errors
    /// As epoll_wait(2).
    pub fn sleep(&self) -> io::Result<bool> {
        // Either this thread sees now that it rang, or who rings sees that this thread sleeps.
        self.bell.asleep.store(true, Ordering::SeqCst);
        let only_look = self.bell.rung.load(Ordering::SeqCst);
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 2];
        let result = epoll_wait(&self.epoll, &mut events, only_look);
        self.bell.asleep.store(false, Ordering::SeqCst);
        let mut went_off = false;
        for event in events.iter().take(result?) {
            match event.u64 {
                // What it counts is of no interest, only that it counts anew.
                BELL => drop((&self.bell.file).read(&mut [0; 8])),
                _ => went_off = true,
            }
        }
        Ok(went_off)
    }
}

fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: it takes no pointers.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is new, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn watch(epoll: &OwnedFd, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: token };
    let (epoll, fd) = (epoll.as_raw_fd(), fd.as_raw_fd());
    // SAFETY: both are open, and the event outlives the call.
    match unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
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

fn set_timer(clock: &OwnedFd, after: Duration) -> io::Result<()> {
    // Zero would stop it.
    let after = after.max(Duration::from_nanos(1));
    let never = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let after = libc::timespec {
        tv_sec: libc::time_t::try_from(after.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: after.subsec_nanos().into(),
    };
    let once = libc::itimerspec { it_interval: never, it_value: after };
    // SAFETY: the new setting outlives the call, and the old one is not asked for.
    match unsafe { libc::timerfd_settime(clock.as_raw_fd(), 0, &raw const once, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits for one of them, or only looks; how many events there are.
fn epoll_wait(
    epoll: &OwnedFd,
    events: &mut [libc::epoll_event],
    only_look: bool,
) -> io::Result<usize> {
    let (count, timeout) = (events.len() as i32, if only_look { 0 } else { -1 });
    // SAFETY: the slice has room for `count` events and outlives the call.
    let ready = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), count, timeout) };
    usize::try_from(ready).or_else(|_| match io::Error::last_os_error() {
        error if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        error => Err(error),
    })
}

/// What epoll tells of each.
const BELL: u64 = 0;
const CLOCK: u64 = 1;

#[cfg(test)]
mod tests {
    use std::{task::Waker, thread};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn sleeper() -> (Arc<Bell>, Clock, Sleeper) {
        let (bell, clock) = (Bell::new().unwrap(), Clock::new().unwrap());
        assert!(bell.take() && !bell.take());
        let sleeper = Sleeper::new(bell.clone(), &clock).unwrap();
        (bell, clock, sleeper)
    }

    #[test]
    fn the_bell_ends_a_sleep_and_is_heard_by_who_was_awake() {
        let (bell, mut clock, sleeper) = sleeper();
        let now = Instant::now();
        clock.set(now + LONG).unwrap();
        Waker::from(bell.clone()).wake();
        assert!(!sleeper.sleep().unwrap(), "rung before");
        assert!(bell.take() && !bell.take());
        let sleeping = thread::spawn(move || sleeper.sleep().unwrap());
        while !bell.asleep.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        Waker::from(bell.clone()).wake();
        assert!(!sleeping.join().unwrap(), "rung while it slept");
        assert!(bell.take());
    }

    #[test]
    fn a_bell_that_was_heard_does_not_end_the_next_sleep() {
        let (bell, mut clock, sleeper) = sleeper();
        let waker = Waker::from(bell.clone());
        for _ in 0..3 {
            bell.asleep.store(true, Ordering::SeqCst);
            waker.wake_by_ref();
            sleeper.sleep().unwrap();
            assert!(bell.take());
        }
        let (now, little) = (Instant::now(), Duration::from_millis(20));
        clock.set(now + little).unwrap();
        assert!(sleeper.sleep().unwrap());
        assert!(now.elapsed() >= little);
    }

    #[test]
    fn the_clock_goes_off_no_sooner_than_asked_and_whoever_sets_it() {
        let (_bell, mut clock, sleeper) = sleeper();
        let ms = Duration::from_millis;
        let began = Instant::now();
        // A later time leaves it set to the earlier one, which is then for nothing; an earlier one
        // sets it anew; one that has passed ends the sleep at once.
        for (until, wakes_at) in [(ms(30), ms(30)), (ms(50), ms(50)), (ms(40), ms(50))] {
            clock.set(began + until).unwrap();
            clock.set(began + LONG).unwrap();
            assert!(sleeper.sleep().unwrap());
            assert!(began.elapsed() >= wakes_at, "{:?}", began.elapsed());
            clock.went_off();
        }
        let now = Instant::now();
        clock.set(now + LONG).unwrap();
        let sleeping = thread::spawn(move || sleeper.sleep().unwrap());
        // Whether it sleeps already or not.
        clock.set(now + ms(5)).unwrap();
        assert!(sleeping.join().unwrap());
        assert!((ms(5)..LONG / 2).contains(&now.elapsed()));
    }
}
