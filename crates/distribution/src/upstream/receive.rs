//! The edge's receiving threads.
//!
//! Between a packet and the hub there is no runtime that would have to be woken first. Each socket has
//! a thread, which waits in the call that reads, so that nothing has to be asked first whether there
//! is something. One more thread has a runtime of its own, in which are the repair connection and what
//! is due at some time: to hand each answer from thread to thread would cost more than to take it, and
//! viewers do not hold it up. All work on one [`Upstream`] behind a lock, which is nearly always free.

use std::{
    future::poll_fn,
    io,
    net::UdpSocket,
    panic,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;

use super::ingress::Upstream;
use downpour_sys::{
    recvmmsg::RecvBatch,
    timer::{Timer, TimerWaiter},
    udp::end_waits,
};

impl Upstream {
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
type InOrderRun = Box<dyn FnOnce(Arc<Shared>, &CancellationToken) + Send>;

fn start(
    mut ingress: Upstream,
    stop: &CancellationToken,
    running: &mpsc::Sender<()>,
) -> io::Result<Vec<thread::JoinHandle<()>>> {
    let runtime = OwnRuntime::new()?;
    {
        let _inside = runtime.handle.enter();
        ingress.begin();
    }
    let clock = Timer::new()?;
    let sockets: Vec<_> = ingress.sockets().cloned().collect();
    let over = Over { is_it: Arc::default(), sockets: sockets.clone() };
    let ended = over.is_it.clone();
    let shared = Arc::new(Shared { work: Mutex::new(Work { ingress, clock, control: None }) });
    let handle = runtime.handle.clone();
    let spawn = |name, run: InOrderRun| {
        let (handle, running) = (handle.clone(), running.clone());
        let (stop, shared) = (stop.clone(), shared.clone());
        thread::Builder::new().name(name).spawn(move || {
            // Dropped last of all.
            let _running = running;
            let stop = StopOnPanic(stop);
            // Look-ups and repair connections are begun on these threads.
            let _inside = handle.enter();
            run(shared, &stop.0);
        })
    };
    // First: if one of the others cannot be started, it ends those that could.
    let control = spawn(
        "rtp-control".into(),
        Box::new(move |shared, stop| runtime.run(control(shared, stop, over))),
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

/// Does what is due and takes what comes but RTP, until `stop`; then ends the other threads, and the
/// streams, and closes the repair connection.
async fn control(shared: Arc<Shared>, stop: &CancellationToken, over: Over) {
    let failed = async {
        let alarm = TimerWaiter::new(&shared.work.lock().clock)?;
        poll_fn(|cx| shared.poll_control(cx, &alarm)).await
    };
    let failed = {
        let (mut failed, mut stopped) = (pin!(failed), pin!(stop.cancelled()));
        poll_fn(|cx| match stopped.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => failed.as_mut().poll(cx),
        })
        .await
    };
    if let Err(error) = failed {
        tracing::error!("cannot wait for what is due: {error}");
        stop.cancel();
    }
    drop(over);
    let repair = shared.work.lock().ingress.take_repair();
    // The last of the threads ends the streams, before the cloud has acknowledged anything.
    drop(shared);
    if let Some(repair) = repair {
        repair.close().await;
    }
}

/// What the threads share.
struct Shared {
    /// Fair now and then, which the standard library's is not: a socket that never runs dry must not
    /// keep the others' threads waiting.
    work: Mutex<Work>,
}

struct Work {
    ingress: Upstream,
    /// Goes off when something is due.
    clock: Timer,
    /// Wakes who does what is due.
    control: Option<Waker>,
}

impl Shared {
    /// Does what is due and takes what has come; ready only if that cannot go on.
    fn poll_control(&self, cx: &mut Context<'_>, alarm: &TimerWaiter) -> Poll<io::Result<()>> {
        let went_off = match alarm.poll(cx) {
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            went_off => went_off.is_ready(),
        };
        let mut work = self.work.lock();
        let Work { ingress, clock, control } = &mut *work;
        if went_off {
            clock.went_off();
        }
        if control.as_ref().is_none_or(|control| !control.will_wake(cx.waker())) {
            *control = Some(cx.waker().clone());
        }
        ingress.handle_inputs(cx);
        ingress.handle_timeout(Instant::now());
        if ingress.has_begun() {
            // It would not wake by itself. The others have their turn before.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match clock.set(ingress.poll_timeout()) {
            Ok(()) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// Reads socket `i` until all is `over`, or it is broken; `false` if it was the last of RTP.
    fn receive_until(&self, over: &AtomicBool, i: usize, socket: &UdpSocket) -> bool {
        let mut reads = RecvBatch::new();
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
            let Work { ingress, clock, control } = &mut *work;
            ingress.expect(&reads);
            // Memory comes meanwhile.
            let now = Instant::now();
            ingress.handle_reads(now, i, &reads);
            let is_set = ingress.poll_intake_timeout().map(|due| clock.set(due));
            // If it cannot be set, who would have been woken sets it, and says why it cannot.
            let wakes = ingress.has_begun() || matches!(is_set, Some(Err(_)));
            let control = control.as_ref().filter(|_| wakes).cloned();
            drop(work);
            if let Some(control) = control {
                control.wake();
            }
        }
    }
}

/// A runtime of one thread.
struct OwnRuntime {
    handle: Handle,
    /// Until it is dropped.
    runtime: Option<Runtime>,
}

impl OwnRuntime {
    fn new() -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        Ok(Self { handle: runtime.handle().clone(), runtime: Some(runtime) })
    }

    /// Runs all of its tasks on this thread until `task` has ended.
    fn run(self, task: impl Future<Output = ()>) {
        if let Some(runtime) = &self.runtime {
            runtime.block_on(task);
        }
    }
}

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        // A look-up that waits for its answer holds nobody up.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
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
