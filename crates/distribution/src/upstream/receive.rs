//! The receiving threads of an edge.
//!
//! | thread | waits for | does |
//! |---|---|---|
//! | `rtp-receiver-N`, one per socket | recvmmsg(2) | passes each batch to [`Upstream`] |
//! | `rtp-control` | timer, repair connection, look-ups | timeouts and events; runs the repair client's tasks |
//!
//! A receiver thread blocks in the system call that reads, so a packet reaches the hub with no
//! runtime and no poll call in between. The control thread has its own single-threaded runtime, so
//! that repair is not delayed by viewers, and answers need no hand-over between threads. All
//! threads share one [`Upstream`] behind a mutex that is nearly always free.
//!
//! # Deadlines on a starved machine
//!
//! A thread that is not scheduled for a second leaves packets in its socket for longer than their
//! deadlines. They are not lost: deadlines count only up to the time at which every receiver thread has
//! seen its socket empty, and the control thread has handled everything that its runtime reported. A
//! receiver thread looks at least every [`IDLE_CHECK`].
//!
//! Shutdown: the control thread ends first and shuts the sockets down, which wakes the receiver
//! threads. The last thread to end drops the [`Upstream`], which ends the streams. A panic on any
//! thread ends all of them.

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

use super::dispatch::Upstream;
use downpour_sys::{
    recvmmsg::RecvBatch,
    timer::{Timer, TimerWaiter},
    udp::shutdown_receive,
};

impl Upstream {
    /// Receives on its own threads until `shutdown`, or until the future is dropped; then all
    /// streams end.
    ///
    /// # Panics
    /// If one of the threads panics.
    pub async fn run(self, shutdown: CancellationToken) {
        let stop = shutdown.child_token();
        let _stop_when_dropped = stop.clone().drop_guard();
        // Nothing is sent: the channel closes when the last thread ends.
        let (running, mut ended) = mpsc::channel::<()>(1);
        let threads = match start(self, &stop, &running) {
            Ok(threads) => threads,
            Err(error) => {
                tracing::error!(%error, "RTP receiver cannot start");
                return;
            }
        };
        drop(running);
        ended.recv().await;
        for thread in threads {
            if let Err(panic) = thread.join() {
                panic::resume_unwind(panic);
            }
        }
    }
}

/// Body of a thread.
type ThreadBody = Box<dyn FnOnce(Arc<Shared>, &CancellationToken) + Send>;

fn start(
    mut upstream: Upstream,
    stop: &CancellationToken,
    running: &mpsc::Sender<()>,
) -> io::Result<Vec<thread::JoinHandle<()>>> {
    let runtime = ControlRuntime::new()?;
    let parks = runtime.parks.clone();
    {
        let _inside = runtime.handle.enter();
        upstream.start();
    }
    let timer = Timer::new()?;
    let sockets: Vec<_> = upstream.sockets().cloned().collect();
    for socket in &sockets {
        socket.set_read_timeout(Some(IDLE_CHECK))?;
    }
    let end_receivers = EndReceivers { ended: Arc::default(), sockets: sockets.clone() };
    let ended = end_receivers.ended.clone();
    let shared =
        Arc::new(Shared { work: Mutex::new(Work { upstream, timer, control: None }), parks });
    let handle = runtime.handle.clone();
    let spawn = |name, body: ThreadBody| {
        let (handle, running) = (handle.clone(), running.clone());
        let (stop, shared) = (stop.clone(), shared.clone());
        thread::Builder::new().name(name).spawn(move || {
            // Dropped after everything else.
            let _running = running;
            let stop = StopOnPanic(stop);
            // These threads spawn look-ups and repair clients.
            let _inside = handle.enter();
            body(shared, &stop.0);
        })
    };
    // The control thread first: if a receiver thread cannot be started, it ends the others.
    let control = spawn(
        "rtp-control".into(),
        Box::new(move |shared, stop| runtime.run(control(shared, stop, end_receivers))),
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

/// Handles timeouts and events until `stop`. Then ends the receiver threads and closes the repair
/// connection.
async fn control(shared: Arc<Shared>, stop: &CancellationToken, end_receivers: EndReceivers) {
    let failed = async {
        let waiter = TimerWaiter::new(&shared.work.lock().timer)?;
        poll_fn(|cx| shared.poll_control(cx, &waiter)).await
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
        tracing::error!(%error, "RTP receiver timer failed; reception stopped");
        stop.cancel();
    }
    drop(end_receivers);
    let connection = shared.work.lock().upstream.take_connection();
    // The last thread ends the streams; it does not wait for the connection to close.
    drop(shared);
    if let Some(connection) = connection {
        connection.close().await;
    }
}

/// State shared by the threads.
struct Shared {
    /// parking_lot's mutex is eventually fair: a socket that always has packets does not starve the
    /// other threads.
    work: Mutex<Work>,
    parks: Arc<Parks>,
}

struct Work {
    upstream: Upstream,
    /// Expires at the earliest timeout.
    timer: Timer,
    /// Wakes the control task.
    control: Option<Waker>,
}

impl Shared {
    /// Handles events and timeouts. Ready only with an error of the timer.
    fn poll_control(&self, cx: &mut Context<'_>, waiter: &TimerWaiter) -> Poll<io::Result<()>> {
        let expired = match waiter.poll(cx) {
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
            expired => expired.is_ready(),
        };
        let mut work = self.work.lock();
        let Work { upstream, timer, control } = &mut *work;
        if expired {
            timer.mark_expired();
        }
        if control.as_ref().is_none_or(|control| !control.will_wake(cx.waker())) {
            *control = Some(cx.waker().clone());
        }
        upstream.poll_inputs(cx);
        upstream.set_control_until(self.parks.handled_until());
        upstream.handle_timeout(Instant::now());
        if upstream.needs_poll() {
            // Wake at once, but let the runtime's other tasks run before.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        match timer.set(upstream.poll_timeout()) {
            Ok(()) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// Receives from socket `i` until `ended` is set or the socket is broken. Returns `false` if it
    /// was the last RTP socket.
    fn receive_until(&self, ended: &AtomicBool, i: usize, socket: &UdpSocket) -> bool {
        let mut batch = RecvBatch::new();
        let mut failures = None;
        loop {
            let began = Instant::now();
            let received = batch.receive(socket);
            if ended.load(Ordering::SeqCst) {
                return true;
            }
            match received {
                Ok(()) => failures = None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    failures = None;
                    self.handle_idle(i, began);
                    continue;
                }
                // A single failure is normal, e.g. an ICMP error for an earlier send.
                Err(error) => {
                    tracing::debug!(socket = i, %error, "RTP receive failed");
                    thread::sleep(FAILURE_PAUSE);
                    if FailureRun::is_too_long(&mut failures, Instant::now()) {
                        tracing::error!(socket = i, %error, "RTP socket broken; reading stopped");
                        return self.work.lock().upstream.give_up(i);
                    }
                    continue;
                }
            }
            let mut work = self.work.lock();
            let Work { upstream, timer, control } = &mut *work;
            upstream.prefetch(&batch);
            // The clock is read while the prefetches complete.
            let now = Instant::now();
            if !batch.is_full() {
                upstream.set_read_until(i, began);
            }
            upstream.handle_batch(now, i, &batch);
            let set = upstream.poll_stream_timeout().map(|due| timer.set(due));
            // If the timer cannot be set, the control task tries again and reports the error.
            let wakes = upstream.needs_poll() || matches!(set, Some(Err(_)));
            let control = control.as_ref().filter(|_| wakes).cloned();
            drop(work);
            if let Some(control) = control {
                control.wake();
            }
        }
    }

    /// Handles the deadlines up to `until`, at which socket `i` was empty.
    fn handle_idle(&self, i: usize, until: Instant) {
        let mut work = self.work.lock();
        let Work { upstream, timer, .. } = &mut *work;
        upstream.handle_idle(Instant::now(), i, until);
        let due = upstream.poll_stream_timeout();
        // If the timer cannot be set, the control task tries again and reports the error.
        let failed = due.is_some_and(|due| timer.set(due).is_err());
        let wakes = upstream.needs_poll() || failed;
        let control = work.control.as_ref().filter(|_| wakes).cloned();
        drop(work);
        if let Some(control) = control {
            control.wake();
        }
    }
}

/// When the control thread's runtime last had nothing left to do, twice.
struct Parks(Mutex<[Instant; 2]>);

impl Parks {
    fn new() -> Self {
        Self(Mutex::new([Instant::now(); 2]))
    }

    /// Records that no task of the runtime is ready.
    fn park(&self) {
        let [_, last] = *self.0.lock();
        *self.0.lock() = [last, Instant::now()];
    }

    /// The time up to which everything that arrived has been handled: what had arrived when the runtime
    /// parked was reported to its tasks then, and they had nothing left to do at the next park.
    fn handled_until(&self) -> Instant {
        self.0.lock()[0]
    }
}

/// Single-threaded runtime of the control thread. Dropping it does not wait for blocking tasks.
struct ControlRuntime {
    handle: Handle,
    parks: Arc<Parks>,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
}

impl ControlRuntime {
    fn new() -> io::Result<Self> {
        let parks = Arc::new(Parks::new());
        let parked = parks.clone();
        let mut builder = Builder::new_current_thread();
        let runtime = builder.enable_all().on_thread_park(move || parked.park()).build()?;
        Ok(Self { handle: runtime.handle().clone(), parks, runtime: Some(runtime) })
    }

    /// Runs the runtime on this thread until `task` ends.
    fn run(self, task: impl Future<Output = ()>) {
        if let Some(runtime) = &self.runtime {
            runtime.block_on(task);
        }
    }
}

impl Drop for ControlRuntime {
    fn drop(&mut self) {
        // Name resolution may block for seconds: do not wait for it.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Ends the receiver threads when dropped, also by a panic of the control thread.
struct EndReceivers {
    ended: Arc<AtomicBool>,
    sockets: Vec<Arc<UdpSocket>>,
}

impl Drop for EndReceivers {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
        self.sockets.iter().for_each(|socket| shutdown_receive(socket));
    }
}

/// Stops all threads if one panics.
struct StopOnPanic(CancellationToken);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.cancel();
        }
    }
}

/// A run of consecutive receive failures on one socket.
#[derive(Debug, Clone, Copy)]
struct FailureRun {
    since: Instant,
    last: Instant,
}

impl FailureRun {
    /// Records a failure at `now`. Returns `true` if the run has lasted for [`BROKEN_AFTER`].
    fn is_too_long(run: &mut Option<Self>, now: Instant) -> bool {
        let new = Self { since: now, last: now };
        let run = run.get_or_insert(new);
        if now.saturating_duration_since(run.last) > FAILURE_PAUSE * 100 {
            *run = new;
        }
        run.last = now;
        now.saturating_duration_since(run.since) >= BROKEN_AFTER
    }
}

/// How often a receiver thread without packets looks for deadlines.
const IDLE_CHECK: Duration = Duration::from_millis(50);
/// A socket is broken if every receive has failed for this long.
const BROKEN_AFTER: Duration = Duration::from_secs(1);
/// Pause after a failure, so that a persistent error is no busy loop.
const FAILURE_PAUSE: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests;
