//! Fan-out: sends bursts of RTP to many addresses, on dedicated threads.
//!
//! Each worker thread has a bounded queue and its own sockets. The targets of a burst are divided among
//! the workers. All sockets share one UDP port, because a NAT lets packets in only from the port that
//! the edge behind it has sent to.
//!
//! ```text
//! Fanout::send -> Queue (per worker) -> WorkBatch -> [Pacer] -> UdpSender -> kernel
//!  TargetShare     bounded by cost      stale work    optional   GSO, retries
//!                                       is dropped
//! ```
//!
//! Invariants: `send` never blocks; packets of one flow (a stream) reach each target in order; every
//! packet that is not sent is counted, once per target.

mod gso;
mod job;
mod metrics;
mod pacer;
mod pacing;
mod probe_listener;
mod queue;
mod sockets;
mod udp_sender;
mod work_batch;
mod worker;

pub use job::{Pace, Train};
pub use metrics::FanoutMetrics;
pub use pacing::{FrameInterval, PaceFactor, Pacing};
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

/// Settings of the fan-out.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Local UDP port of RTP, on all interfaces; 0 picks a free one.
    pub port: u16,
    /// Options for multicast destinations.
    pub multicast: MulticastOut,
    /// Kernel send buffer in bytes, shared by all workers; each worker gets at least 1 MiB.
    pub send_buffer: usize,
    /// Capacity in bytes of each worker's queue. One stream may use a quarter of it. Bursts that do not
    /// fit are dropped and counted; edges request them from the history.
    pub queue_bytes: usize,
    /// Number of worker threads; 0 means one per core, at most 32.
    pub workers: usize,
    /// `true` to let the kernel split long messages into datagrams (UDP GSO), where it can.
    pub segmentation: bool,
    /// How bursts are spread over time.
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

/// Handle of the worker threads. The threads end when the last clone is dropped.
#[derive(Clone)]
pub struct Fanout {
    shared: Arc<Shared>,
}

struct Shared {
    routes: Routes,
    queues: Vec<Arc<Queue>>,
    workers: Workers,
    pacing: Pacing,
    local_port: u16,
    /// Cancelled when the first worker ends, for whatever reason.
    failed: CancellationToken,
    metrics: FanoutMetrics,
}

impl Fanout {
    /// Binds the RTP port and starts the threads. `on_datagrams` receives the datagrams that arrive at
    /// that port.
    ///
    /// # Errors
    /// If the port is taken, a socket option is refused or a thread cannot be started.
    pub fn spawn(
        settings: &Settings,
        routes: Routes,
        on_datagrams: &OnDatagrams,
        metrics: FanoutMetrics,
    ) -> io::Result<Self> {
        let workers = match settings.workers {
            0 => {
                let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
                let count = cores.min(MAX_DEFAULT_WORKERS);
                Workers { count, first_choice: count.div_ceil(2) }
            }
            count => count.into(),
        };
        let ports = Ports::open(settings, workers.count)?;
        let limits = Amount { tasks: QUEUE_TASKS, bytes: settings.queue_bytes };
        // If anything below fails, dropping `shared` ends the threads that have started.
        let shared = Arc::new(Shared {
            routes,
            queues: (0..workers.count).map(|_| Arc::new(Queue::new(limits))).collect(),
            workers,
            pacing: settings.pacing,
            local_port: ports.number,
            failed: CancellationToken::new(),
            metrics,
        });
        for (number, (queue, sockets)) in shared.queues.iter().zip(ports.workers).enumerate() {
            let worker = Worker::new(queue.clone(), sockets, settings.pacing, &shared.metrics);
            let thread = thread::Builder::new().name(format!("fanout-{number}"));
            // A guard, so that a panic is noticed too.
            let on_end = shared.failed.clone().drop_guard();
            thread.spawn(move || {
                let _on_end = on_end;
                worker.run();
            })?;
        }
        for reader in ports.readers {
            let alive = Arc::downgrade(&shared);
            probe_listener::spawn(reader, on_datagrams, &shared.metrics, alive)?;
        }
        Ok(Self { shared })
    }

    /// Queues a burst or its parity for `targets`. Never blocks: if the queue of a worker is full, that
    /// worker's packets are dropped and counted.
    ///
    /// Packets of one `flow` (the stream's SSRC) reach each target in order, as long as the target
    /// keeps its index in `targets`. `pace` is ignored unless the fan-out paces ([`Fanout::paces`]).
    pub fn send(
        &self,
        flow: Ssrc,
        train: impl Into<Train>,
        targets: &Arc<[Target]>,
        pace: Option<&Pace>,
    ) {
        let (train, workers) = (train.into(), self.shared.workers);
        for (number, queue) in self.shared.queues.iter().enumerate() {
            if let Some(share) = TargetShare::of(targets, flow, number, workers) {
                let pace = pace.filter(|_| self.paces()).cloned();
                let packets = train.packets() * share.len();
                let job = Job { flow, train: train.clone(), share, pace };
                if !queue.push(Task::Send(job)) {
                    self.shared.metrics.skipped.inc_by(packets as u64);
                }
            }
        }
    }

    /// Ends a flow: its paced packets leave at once.
    pub fn finish(&self, flow: Ssrc) {
        if self.paces() {
            for queue in &self.shared.queues {
                // If the queue is full, the pacer's frame interval ends the wait soon enough.
                queue.push(Task::Finish(flow));
            }
        }
    }

    /// Waits until all queued packets have been sent, for at most `timeout`. Returns `false` if some
    /// are left.
    pub async fn drain(&self, timeout: Duration) -> bool {
        let mut checks = tokio::time::interval(DRAIN_CHECK);
        let drained = async {
            while self.shared.queues.iter().any(|queue| queue.held().tasks > 0) {
                checks.tick().await;
            }
        };
        tokio::time::timeout(timeout, drained).await.is_ok()
    }

    /// Waits until a worker ends. While a handle exists, that is a bug: the worker's targets receive
    /// nothing from then on.
    pub async fn failed(&self) {
        self.shared.failed.cancelled().await;
    }

    /// Queues a packet for all members of a multicast group. Returns `false`, and sends nothing, if
    /// `group` is not a multicast address that gets every stream: an edge must not direct packets to
    /// arbitrary addresses.
    pub fn send_to(&self, group: SocketAddr, packet: Bytes) -> bool {
        let known = group.ip().is_multicast() && self.shared.routes.is_fixed(group);
        if known {
            self.send(NO_FLOW, packet, &Arc::from([group.into()]), None);
        }
        known
    }

    /// Queues one datagram for every address that gets every stream.
    pub fn send_to_fixed(&self, datagram: Bytes) {
        self.send(NO_FLOW, datagram, &self.shared.routes.fixed(), None);
    }

    /// The table of targets per stream.
    pub fn routes(&self) -> &Routes {
        &self.shared.routes
    }

    /// The source port of RTP.
    pub fn local_port(&self) -> u16 {
        self.shared.local_port
    }

    /// The number of worker threads.
    pub fn workers(&self) -> usize {
        self.shared.queues.len()
    }

    /// `true` if bursts are spread over time, at least to the addresses that get every stream.
    pub fn paces(&self) -> bool {
        self.shared.pacing != Pacing::Off
    }

    /// `true` if bursts are spread over time only to the addresses that get every stream.
    pub fn paces_fixed_only(&self) -> bool {
        self.shared.pacing == Pacing::Targets
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

/// Flow of packets that belong to no stream: no publication has SSRC 0.
const NO_FLOW: Ssrc = Ssrc(0);
/// Most worker threads that are started when the setting is 0.
const MAX_DEFAULT_WORKERS: usize = 32;
/// Capacity of a worker's queue in tasks, whatever their size.
const QUEUE_TASKS: usize = 16 << 10;
/// Interval at which [`Fanout::drain`] checks the queues.
const DRAIN_CHECK: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests;
