//! Sends bursts of RTP to many addresses, on threads of its own.
//!
//! A burst is work for one or more workers, each with a bounded queue and a socket; all send from the
//! same UDP port, because that is where edges behind a NAT let packets in.

mod job;
mod metrics;
mod pacer;
mod probe_listener;
mod queue;
mod sockets;
mod udp_sender;
mod work_batch;
mod worker;

pub use job::{Pace, Train};
pub use metrics::FanoutMetrics;
pub use pacer::{FrameInterval, PaceFactor, Pacing};
pub use probe_listener::OnDatagrams;

use std::{io, net::SocketAddr, sync::Arc, thread, time::Duration};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use self::{
    job::{Job, TargetShare, Task, Workers},
    queue::{Amount, Queue},
    sockets::Ports,
    worker::Worker,
};
use crate::downstream::repair_server::GroupSender;
use crate::downstream::routes::{Routes, Target};
use downpour_repair::rtp::Ssrc;
use downpour_sys::udp::MulticastOut;

/// Where and how to send.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The local port of RTP, on all interfaces; 0 picks a free one.
    pub port: u16,
    /// Options for multicast destinations.
    pub multicast: MulticastOut,
    /// Bytes to ask of the kernel for the workers' send buffers together; each has 1 MiB at least.
    pub send_buffer: usize,
    /// Bytes of bursts that may wait for each worker, of one stream a quarter of that; more are not
    /// sent but counted, and edges find them in the history.
    pub queue_bytes: usize,
    /// Threads that send; 0 is one for each core, at most 32.
    pub workers: usize,
    /// Whether the kernel may cut datagrams out of longer messages (UDP GSO), if it can.
    pub segmentation: bool,
    /// Whether bursts are spread over time.
    pub pacing: Pacing,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            port: 5220,
            multicast: MulticastOut::default(),
            send_buffer: 4 << 20,
            queue_bytes: 64 << 20,
            workers: 0,
            segmentation: true,
            pacing: Pacing::Off,
        }
    }
}

/// Handle of the sending threads, which end with the last handle. Cloning shares it.
#[derive(Clone)]
pub struct Fanout {
    shared: Arc<Shared>,
}

struct Shared {
    routes: Routes,
    queues: Vec<Arc<Queue>>,
    workers: Workers,
    paces: bool,
    local_port: u16,
    /// Cancelled when the first worker ends.
    ending: CancellationToken,
    metrics: FanoutMetrics,
}

impl Fanout {
    /// Binds the RTP port and starts its threads, which end with the last handle.
    ///
    /// # Errors
    /// If the port is taken, an option is refused or no thread can be started.
    pub fn spawn(
        settings: &Settings,
        routes: Routes,
        on_datagrams: &OnDatagrams,
        metrics: FanoutMetrics,
    ) -> io::Result<Self> {
        let workers = match settings.workers {
            0 => {
                let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
                let count = cores.min(MAX_AUTOMATIC);
                Workers { count, begin: count.div_ceil(2) }
            }
            count => count.into(),
        };
        let ports = Ports::open(settings, workers.count)?;
        let limits = Amount { tasks: QUEUE_TASKS, bytes: settings.queue_bytes };
        // From here on, a failure drops it, which ends the threads that were started.
        let shared = Arc::new(Shared {
            routes,
            queues: (0..workers.count).map(|_| Arc::new(Queue::new(limits))).collect(),
            workers,
            paces: settings.pacing != Pacing::Off,
            local_port: ports.number,
            ending: CancellationToken::new(),
            metrics,
        });
        for (number, (queue, sockets)) in shared.queues.iter().zip(ports.workers).enumerate() {
            let worker = Worker::new(queue.clone(), sockets, settings.pacing, &shared.metrics);
            let thread = thread::Builder::new().name(format!("fanout-{number}"));
            // However the thread ends.
            let sign = shared.ending.clone().drop_guard();
            thread.spawn(move || {
                let _sign = sign;
                worker.run();
            })?;
        }
        for reader in ports.readers {
            let alive = Arc::downgrade(&shared);
            probe_listener::spawn(reader, on_datagrams, &shared.metrics, alive)?;
        }
        Ok(Self { shared })
    }

    /// Queues a burst or its parity for `targets`. Never waits: a worker that is too far behind does
    /// not send it, which is counted.
    ///
    /// What is of one `lane`, a stream, keeps its order at each target as long as that keeps its
    /// place in the list. `pace` counts only where the fan-out paces; see [`Fanout::paces`].
    pub fn send(
        &self,
        lane: Ssrc,
        train: impl Into<Train>,
        targets: &Arc<[Target]>,
        pace: Option<&Pace>,
    ) {
        let (train, workers) = (train.into(), self.shared.workers);
        for (number, queue) in self.shared.queues.iter().enumerate() {
            if let Some(share) = TargetShare::of(targets, lane, number, workers) {
                let pace = pace.filter(|_| self.shared.paces).cloned();
                let packets = train.packets() * share.len();
                let job = Job { lane, train: train.clone(), share, pace };
                if !queue.push(Task::Send(job)) {
                    self.shared.metrics.skipped.inc_by(packets as u64);
                }
            }
        }
    }

    /// Nothing more comes of a stream: what waits for its turn leaves at once.
    pub fn finish(&self, lane: Ssrc) {
        if self.shared.paces {
            for queue in &self.shared.queues {
                // A queue that is full has what it was for behind it soon.
                queue.push(Task::Finish(lane));
            }
        }
    }

    /// Waits until all that was queued has left, for `timeout` at most; says whether it has.
    pub async fn drain(&self, timeout: Duration) -> bool {
        let mut looks = tokio::time::interval(DRAIN_LOOK);
        let drained = async {
            while self.shared.queues.iter().any(|queue| queue.held().tasks > 0) {
                looks.tick().await;
            }
        };
        tokio::time::timeout(timeout, drained).await.is_ok()
    }

    /// Waits for a worker to end, which only a bug can cause while there is a handle: its targets
    /// get nothing any more.
    pub async fn failed(&self) {
        self.shared.ending.cancelled().await;
    }

    /// Queues one packet for one multicast group, so that all of its members get it again. Says
    /// whether `group` is an address that gets every stream: nothing is sent to any other, so that
    /// no edge can have packets sent where it likes.
    pub fn send_to(&self, group: SocketAddr, packet: Bytes) -> bool {
        let known = group.ip().is_multicast() && self.shared.routes.is_fixed(group);
        if known {
            self.send(NO_STREAM, packet, &Arc::from([group.into()]), None);
        }
        known
    }

    /// Queues one datagram for every address that gets every stream.
    pub fn send_to_fixed(&self, datagram: Bytes) {
        self.send(NO_STREAM, datagram, &self.shared.routes.fixed(), None);
    }

    /// Who gets what.
    pub fn routes(&self) -> &Routes {
        &self.shared.routes
    }

    /// The UDP port that RTP comes from.
    pub fn local_port(&self) -> u16 {
        self.shared.local_port
    }

    /// Threads that send.
    pub fn workers(&self) -> usize {
        self.shared.queues.len()
    }

    /// Whether packets leave later than they are queued.
    pub fn paces(&self) -> bool {
        self.shared.paces
    }
}

impl GroupSender for Fanout {
    fn send(&self, group: SocketAddr, packet: Bytes) -> bool {
        self.send_to(group, packet)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queues.iter().for_each(|queue| queue.close());
    }
}

/// The lane of what belongs to no stream: 0 is never a publication's.
const NO_STREAM: Ssrc = Ssrc(0);
/// Threads that are had without being asked for.
const MAX_AUTOMATIC: usize = 32;
/// Tasks that may wait for a worker, whatever their size.
const QUEUE_TASKS: usize = 16 << 10;
/// Between two looks whether all has left.
const DRAIN_LOOK: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests;
