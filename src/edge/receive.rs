//! The edge's receiving threads.
//!
//! They are threads and no tasks: between a packet and the hub there is no runtime that would have to
//! be woken first. Each socket has one, which waits in the call that reads, so that nothing has to be
//! asked first whether there is something. One more does what is due at some time, and takes what
//! tokio's threads have: they ring a [`Bell`] for it. All work on one [`Ingress`] behind a lock, which
//! is nearly always free.

use std::{
    io,
    net::UdpSocket,
    panic,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::mpsc};
use tokio_util::sync::CancellationToken;

use super::{
    ingress::Ingress,
    reads::Reads,
    socket::end_waits,
    wait::{Bell, Clock, Sleeper},
};

impl Ingress {
    /// Receives on threads of its own until `shutdown`; then every stream ends. So it does when this
    /// is dropped.
    ///
    /// # Panics
    /// If one of the threads does.
    pub async fn run(self, shutdown: CancellationToken) {
        let stop = shutdown.child_token();
        let _stop_when_dropped = stop.clone().drop_guard();
        // Nothing is ever sent: it ends when all threads have.
        let (running, mut ended) = mpsc::channel::<()>(1);
        let threads = match start(self, &stop, &running) {
            Ok(threads) => threads,
            Err(error) => {
                tracing::error!("cannot receive: {error}");
                return;
            }
        };
        drop(running);
        ended.recv().await;
        for thread in threads {
            if let Err(reason) = thread.join() {
                panic::resume_unwind(reason);
            }
        }
    }
}

/// What one of the threads does.
type Run = Box<dyn FnOnce(&Shared, &CancellationToken) + Send>;

fn start(
    ingress: Ingress,
    stop: &CancellationToken,
    running: &mpsc::Sender<()>,
) -> io::Result<Vec<thread::JoinHandle<()>>> {
    let (bell, clock) = (Bell::new()?, Clock::new()?);
    let sleeper = Sleeper::new(bell.clone(), &clock)?;
    let sockets: Vec<_> = ingress.sockets().cloned().collect();
    let over = Over { is_it: Arc::default(), sockets: sockets.clone() };
    let ended = over.is_it.clone();
    let shared = Arc::new(Shared { work: Mutex::new(Work { ingress, clock }), bell });
    let spawn = |name, run: Run| {
        let (runtime, running) = (Handle::current(), running.clone());
        let (stop, shared) = (stop.clone(), shared.clone());
        thread::Builder::new().name(name).spawn(move || {
            // Dropped last of all.
            let _running = running;
            let shared = shared;
            let stop = StopOnPanic(stop);
            // Look-ups and repair connections are begun on these threads.
            let _inside = runtime.enter();
            run(&shared, &stop.0);
        })
    };
    // First: if one of the others cannot be started, it ends those that could.
    let control = spawn(
        "rtp-control".into(),
        Box::new(move |shared, stop| {
            let _over = over;
            shared.control_until(stop, &sleeper);
        }),
    )?;
    let receivers = sockets.into_iter().enumerate().map(|(i, socket)| {
        let ended = ended.clone();
        spawn(
            format!("rtp-receiver-{i}"),
            Box::new(move |shared, stop| {
                if !shared.receive_until(&ended, i, &socket) {
                    stop.cancel();
                }
            }),
        )
    });
    [Ok(control)].into_iter().chain(receivers).collect()
}

/// What the threads share.
struct Shared {
    /// Fair now and then, which the standard library's is not: a socket that never runs dry must not
    /// keep the others' threads waiting.
    work: Mutex<Work>,
    bell: Arc<Bell>,
}

struct Work {
    ingress: Ingress,
    /// Goes off when something is due.
    clock: Clock,
}

impl Shared {
    /// Does what is due and takes what comes from tokio's threads.
    fn control_until(&self, stop: &CancellationToken, sleeper: &Sleeper) {
        let waker = Waker::from(self.bell.clone());
        let mut cx = Context::from_waker(&waker);
        let mut stopped = pin!(stop.cancelled());
        let mut went_off = false;
        loop {
            {
                let mut work = self.work.lock();
                let Work { ingress, clock } = &mut *work;
                if went_off {
                    clock.went_off();
                }
                if self.bell.take() || ingress.has_begun() {
                    if stopped.as_mut().poll(&mut cx).is_ready() {
                        return;
                    }
                    ingress.handle_inputs(&mut cx);
                }
                let now = Instant::now();
                ingress.handle_timeout(now);
                // What has just begun would not ring.
                if ingress.has_begun() {
                    continue;
                }
                if let Err(error) = clock.set(ingress.poll_timeout()) {
                    tracing::error!("cannot wait for what is due: {error}");
                    stop.cancel();
                }
            }
            went_off = match sleeper.sleep() {
                Ok(went_off) => went_off,
                Err(error) => {
                    tracing::error!("cannot wait for what is due: {error}");
                    stop.cancel();
                    return;
                }
            };
        }
    }

    /// Reads socket `i` until all is `over`, or it is broken; `false` if it was the last of RTP.
    fn receive_until(&self, over: &AtomicBool, i: usize, socket: &UdpSocket) -> bool {
        let mut reads = Reads::new();
        let mut failing = None;
        loop {
            let read = reads.wait(socket);
            if over.load(Ordering::SeqCst) {
                return true;
            }
            match read {
                Ok(()) => failing = None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A failure now and then says little: an earlier send's ICMP answer is one.
                Err(error) => {
                    tracing::debug!(socket = i, "reading RTP: {error}");
                    thread::sleep(FAILURE_PAUSE);
                    if Failing::goes_on(&mut failing, Instant::now()) {
                        tracing::error!(
                            socket = i,
                            "an RTP socket is broken, and not read any more: {error}"
                        );
                        return self.work.lock().ingress.give_up(i);
                    }
                    continue;
                }
            }
            let mut work = self.work.lock();
            let Work { ingress, clock } = &mut *work;
            ingress.expect(&reads);
            // Memory comes meanwhile.
            let now = Instant::now();
            ingress.handle_reads(now, i, &reads);
            let is_set = ingress.poll_intake_timeout().map(|due| clock.set(due));
            // If it cannot be set, who would have been woken sets it, and says why it cannot.
            let ring = ingress.has_begun() || matches!(is_set, Some(Err(_)));
            drop(work);
            if ring {
                self.bell.wake_by_ref();
            }
        }
    }
}

/// Ends the threads that read when it goes, however the one that has it ends.
struct Over {
    is_it: Arc<AtomicBool>,
    sockets: Vec<Arc<UdpSocket>>,
}

impl Drop for Over {
    fn drop(&mut self) {
        self.is_it.store(true, Ordering::SeqCst);
        self.sockets.iter().for_each(|socket| end_waits(socket));
    }
}

/// A panic on one thread ends them all.
struct StopOnPanic(CancellationToken);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.cancel();
        }
    }
}

/// A socket's failures, each soon after the one before.
#[derive(Debug, Clone, Copy)]
struct Failing {
    since: Instant,
    last: Instant,
}

impl Failing {
    /// There was one more at `now`; whether that has gone on for too long.
    fn goes_on(failing: &mut Option<Self>, now: Instant) -> bool {
        let fresh = Self { since: now, last: now };
        let failing = failing.get_or_insert(fresh);
        if now.saturating_duration_since(failing.last) > FAILURE_PAUSE * 100 {
            *failing = fresh;
        }
        failing.last = now;
        now.saturating_duration_since(failing.since) >= FAILS_FOR
    }
}

/// A socket that can only be failed to read for so long is broken.
const FAILS_FOR: Duration = Duration::from_secs(1);
/// An error that stays must not turn into a busy loop.
const FAILURE_PAUSE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_broken_that_does_nothing_but_fail() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut failing = None;
        // Once in a while.
        assert!((0..20).all(|n| !Failing::goes_on(&mut failing, at(n * 500))));
        let broken = (0..2000).find(|ms| Failing::goes_on(&mut failing, at(20_000 + ms)));
        assert_eq!(broken, Some(1000));
    }
}
