//! How the receiving thread sleeps until there is something to do.

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

/// One thread's sleep, with sockets, a bell and an alarm clock.
///
/// All are in one epoll(7) for good: ppoll(2) would look each of them up anew, each time, which costs
/// a third of what it takes to be woken and to read. The clock is a timerfd(2) that stays set while
/// other things end the sleep. A timeout would be set and taken back each time, and that costs more
/// than the packet does which ends the sleep: where a hypervisor keeps the timer, 5 µs each way.
#[derive(Debug)]
pub struct Sleeper {
    bell: Arc<Bell>,
    epoll: OwnedFd,
    clock: OwnedFd,
    /// When it goes off next, which may be earlier than needed.
    set: Option<Instant>,
}

/// Sockets that a [`Sleeper`] takes at most.
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

impl Sleeper {
    /// For the one thread that `bell` is to wake, as the first [`MAX_SOCKETS`] of `sockets` do. They
    /// must live as long as this.
    ///
    /// # Errors
    /// If the system has no more descriptors to give.
    pub fn new(bell: Arc<Bell>, sockets: &[BorrowedFd<'_>]) -> io::Result<Self> {
        let (epoll, clock) = (epoll()?, timerfd()?);
        let own = [(bell.file.as_fd(), BELL), (clock.as_fd(), CLOCK)];
        let sockets = sockets.iter().take(MAX_SOCKETS).copied().zip(0..);
        for (fd, token) in own.into_iter().chain(sockets) {
            watch(&epoll, fd, token)?;
        }
        Ok(Self { bell, epoll, clock, set: None })
    }

    /// Waits no more for what comes to a socket.
    pub fn forget(&self, socket: BorrowedFd<'_>) {
        let (epoll, fd) = (self.epoll.as_raw_fd(), socket.as_raw_fd());
        // SAFETY: both are open; for this operation there need be no event.
        // A refusal says that it is not waited for.
        unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_DEL, fd, ptr::null_mut()) };
    }

    /// Sleeps until a socket can be read or has failed, the bell rings, or it is `until`, `now` being
    /// the time: at once if the bell rang since [`Bell::take`]. May wake up for nothing. Tells which
    /// sockets are ready.
    ///
    /// # Errors
    /// As epoll_wait(2) and timerfd_settime(2).
    pub fn sleep(&mut self, now: Instant, until: Instant) -> io::Result<[bool; MAX_SOCKETS]> {
        if self.set.is_none_or(|set| set > until) {
            set_timer(&self.clock, until.saturating_duration_since(now))?;
            self.set = Some(until);
        }
        // Either this thread sees now that it rang, or who rings sees that this thread sleeps.
        self.bell.asleep.store(true, Ordering::SeqCst);
        let only_look = self.bell.rung.load(Ordering::SeqCst);
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 2 + MAX_SOCKETS];
        let result = epoll_wait(&self.epoll, &mut events, only_look);
        self.bell.asleep.store(false, Ordering::SeqCst);
        let mut ready = [false; MAX_SOCKETS];
        for event in events.iter().take(result?) {
            match event.u64 {
                // What it counts is of no interest, only that it counts anew.
                BELL => drop((&self.bell.file).read(&mut [0; 8])),
                // To be set anew, which makes it unreadable too.
                CLOCK => self.set = None,
                socket => ready.iter_mut().skip(socket as usize).take(1).for_each(|r| *r = true),
            }
        }
        Ok(ready)
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

/// What epoll tells of a socket is its number.
const BELL: u64 = u64::MAX;
const CLOCK: u64 = u64::MAX - 1;

#[cfg(test)]
mod tests {
    use std::{net::UdpSocket, task::Waker, thread};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn sleeper(sockets: &[UdpSocket]) -> (Arc<Bell>, Sleeper) {
        let bell = Bell::new().unwrap();
        assert!(bell.take() && !bell.take());
        let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        (bell.clone(), Sleeper::new(bell, &sockets).unwrap())
    }

    /// Sleeps for at most a minute; how long it was.
    fn sleep(sleeper: &mut Sleeper) -> ([bool; MAX_SOCKETS], Duration) {
        let began = Instant::now();
        let ready = sleeper.sleep(began, began + LONG).unwrap();
        (ready, began.elapsed())
    }

    #[test]
    fn the_bell_ends_a_sleep_and_is_heard_by_who_was_awake() {
        let (bell, mut sleeper) = sleeper(&[]);
        Waker::from(bell.clone()).wake();
        assert!(sleep(&mut sleeper).1 < LONG / 2, "rung before");
        assert!(bell.take() && !bell.take());
        let sleeping = thread::spawn(move || sleep(&mut sleeper).1);
        while !bell.asleep.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        Waker::from(bell.clone()).wake();
        assert!(sleeping.join().unwrap() < LONG / 2, "rung while it slept");
        assert!(bell.take());
    }

    #[test]
    fn a_bell_that_was_heard_does_not_end_the_next_sleep() {
        let (bell, mut sleeper) = sleeper(&[]);
        let waker = Waker::from(bell.clone());
        for _ in 0..3 {
            bell.asleep.store(true, Ordering::SeqCst);
            waker.wake_by_ref();
            sleep(&mut sleeper);
            assert!(bell.take());
        }
        let (now, little) = (Instant::now(), Duration::from_millis(20));
        sleeper.sleep(now, now + little).unwrap();
        assert!(now.elapsed() >= little);
    }

    #[test]
    fn a_datagram_ends_a_sleep_until_it_is_read() {
        let sockets = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let (_bell, mut sleeper) = sleeper(&sockets);
        let to = sockets[1].local_addr().unwrap();
        sockets[0].send_to(b"one", to).unwrap();
        for _ in 0..2 {
            let (ready, _) = sleep(&mut sleeper);
            assert_eq!(ready, [false, true, false, false]);
        }
        sockets[1].recv(&mut [0; 9]).unwrap();
        let (now, little) = (Instant::now(), Duration::from_millis(20));
        let ready = sleeper.sleep(now, now + little).unwrap();
        assert_eq!(ready, [false; MAX_SOCKETS]);
        sockets[0].send_to(b"two", to).unwrap();
        sleeper.forget(sockets[1].as_fd());
        let now = Instant::now();
        assert_eq!(sleeper.sleep(now, now + little).unwrap(), [false; MAX_SOCKETS], "forgotten");
    }

    #[test]
    fn the_clock_goes_off_no_sooner_than_asked_and_ends_the_sleep() {
        let (_bell, mut sleeper) = sleeper(&[]);
        let ms = Duration::from_millis;
        let began = Instant::now();
        // A later time leaves it set to the earlier one, which is then for nothing; an earlier one
        // sets it anew; one that has passed ends the sleep at once.
        for (until, wakes_at) in [(ms(30), ms(30)), (ms(50), ms(50)), (ms(40), ms(50))] {
            sleeper.sleep(Instant::now(), began + until).unwrap();
            assert!(began.elapsed() >= wakes_at, "{:?}", began.elapsed());
        }
        let now = Instant::now();
        sleeper.set = Some(now + LONG);
        sleeper.sleep(now, now + ms(5)).unwrap();
        assert!((ms(5)..LONG / 2).contains(&now.elapsed()));
        let now = Instant::now();
        set_timer(&sleeper.clock, ms(5)).unwrap();
        sleeper.set = Some(now + ms(5));
        sleeper.sleep(now, now + LONG).unwrap();
        assert_eq!(sleeper.set, None, "woken for nothing");
        assert!(now.elapsed() < LONG / 2);
    }
}
