//! The worker threads of the fan-out.

use std::{net::SocketAddr, sync::Arc, thread, time::Instant};

use super::{
    FanoutMetrics,
    job::{QueueCost, Task},
    metrics::SendErrorKind,
    pacer::{Due, Group, Pacer},
    pacing::Pacing,
    queue::Queue,
    sockets::{WorkerSocket, WorkerSockets},
};
use crate::downstream::fanout::{
    udp_sender::{Round, UdpSender},
    work_batch::WorkBatch,
};
use crate::downstream::routes::Target;
use downpour_sys::idle::{self, IdleStrategy, Next};

/// A worker: takes tasks from its queue and sends their packets to its share of the targets.
///
/// Each turn of [`Worker::run`] does one of these, depending on what is waiting:
///
/// | batch | pacer | turn |
/// |---|---|---|
/// | fresh tasks | none | send one step of the batch |
/// | stale tasks | none | skip the batch and count its packets |
/// | any | has packets that are due, or the batch has paced tasks | move the batch to the pacer, send what is due |
/// | empty | nothing due yet | nap or park until the next deadline or task |
/// | empty | empty, queue closed | end |
///
/// When it ends, for whatever reason, its queue is abandoned, so that nobody waits for its tasks.
pub(super) struct Worker {
    queue: Arc<Queue>,
    v4: UdpSender,
    /// `None` on a machine without IPv6.
    v6: Option<UdpSender>,
    /// `true` once the lack of IPv6 was logged.
    logged_no_v6: bool,
    pacer: Option<Pacer>,
    metrics: FanoutMetrics,
    due: Due,
}

impl Worker {
    pub(super) fn new(
        queue: Arc<Queue>,
        WorkerSockets { v4, v6 }: WorkerSockets,
        pacing: Pacing,
        metrics: &FanoutMetrics,
    ) -> Self {
        let sender = |WorkerSocket { socket, max_segments, is_exclusive, progress }| {
            UdpSender::new(socket, max_segments, is_exclusive, progress, metrics.clone())
        };
        Self {
            queue,
            v4: sender(v4),
            v6: v6.map(sender),
            logged_no_v6: false,
            pacer: pacing.factor().map(Pacer::new),
            metrics: metrics.clone(),
            due: Due::default(),
        }
    }

    /// Runs until the queue is closed and all of its tasks are done.
    pub(super) fn run(mut self) {
        idle::minimize_timer_slack();
        let _on_end = AbandonOnEnd(self.queue.clone());
        let (mut batch, mut done) = (WorkBatch::default(), Vec::new());
        let mut idle = IdleStrategy::default();
        loop {
            let (open, now) = batch.refill(&self.queue, &mut done);
            if !open && let Some(pacer) = &mut self.pacer {
                pacer.release_all(now);
            }
            let deadline = self.pacer.as_ref().and_then(Pacer::next_deadline);
            if batch.is_empty() && deadline.is_none_or(|at| at > now) {
                if !open {
                    return;
                }
                match idle.next(now, deadline) {
                    Next::Nap(time) => thread::sleep(time),
                    Next::Wait => self.queue.park(deadline),
                }
                continue;
            }
            idle.begin_round(now);
            // Nothing overtakes what the pacer holds of its flow.
            let paces = self.pacer.is_some() && (deadline.is_some() || batch.is_paced());
            match paces {
                true => self.pace(now, &mut batch, &mut done),
                false if batch.is_stale(now) => self.skip(&mut batch, &mut done),
                false => {
                    let step = batch.next_step();
                    let count = step.len();
                    self.send(step);
                    done.extend(batch.drain(count).map(|task| task.cost()));
                }
            }
            idle.end_round(Instant::now());
        }
    }

    /// Drops the rest of a batch and counts its packets.
    fn skip(&mut self, batch: &mut WorkBatch, done: &mut Vec<QueueCost>) {
        for task in batch.drain_all() {
            self.metrics.skipped.inc_by(task.packets_to_send());
            done.push(task.cost());
        }
    }

    fn send<'a>(&mut self, tasks: impl Iterator<Item = &'a Task>) {
        let Self { v4, v6, logged_no_v6, metrics, .. } = self;
        let mut round = DualRound::new(v4, v6, logged_no_v6, metrics);
        for task in tasks {
            #[cfg(test)]
            assert!(!matches!(task, Task::Panic), "panic requested by a test");
            if let Task::Send(job) = task {
                let (bytes, stride) = (job.train.bytes(), job.train.stride());
                // Piece by piece to one chunk of targets after the other: the piece stays in the
                // cache, and no target waits until another has the whole train.
                for chunk in job.share.chunks() {
                    for piece in bytes.chunks(round.max_piece_len(stride)) {
                        chunk.iter().for_each(|target| round.send(*target, piece, stride));
                    }
                }
            }
        }
        round.flush();
    }

    /// Moves the batch to the pacer, then sends what is due.
    fn pace(&mut self, now: Instant, batch: &mut WorkBatch, done: &mut Vec<QueueCost>) {
        let Some(pacer) = &mut self.pacer else { return };
        for task in batch.drain_all() {
            let cost = task.cost();
            match task {
                Task::Send(job) => pacer.push(now, job),
                Task::Finish(flow) => {
                    pacer.release(now, flow);
                    done.push(cost);
                }
                #[cfg(test)]
                Task::Panic => panic!("panic requested by a test"),
            }
        }
        pacer.poll(now, &mut self.due);
        let Self { v4, v6, logged_no_v6, metrics, .. } = self;
        let mut round = DualRound::new(v4, v6, logged_no_v6, metrics);
        for Group { to, bytes, stride } in &self.due.groups {
            round.send(*to, bytes, *stride);
        }
        round.flush();
        self.due.groups.clear();
        metrics.skipped.inc_by(std::mem::take(&mut self.due.skipped));
        done.extend(self.due.finished.drain(..).map(|job| job.cost()));
    }
}

/// Abandons the queue when the worker ends, also by a panic.
struct AbandonOnEnd(Arc<Queue>);

impl Drop for AbandonOnEnd {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// One round of sends over the sockets of both address families.
struct DualRound<'o, 'a> {
    v4: Round<'o, 'a>,
    v6: Option<Round<'o, 'a>>,
    logged_no_v6: &'o mut bool,
    metrics: &'o FanoutMetrics,
}

impl<'o, 'a> DualRound<'o, 'a> {
    fn new(
        v4: &'o mut UdpSender,
        v6: &'o mut Option<UdpSender>,
        logged_no_v6: &'o mut bool,
        metrics: &'o FanoutMetrics,
    ) -> Self {
        Self { v4: v4.round(), v6: v6.as_mut().map(UdpSender::round), logged_no_v6, metrics }
    }

    /// The longest piece of a train, in bytes, that either family sends as one message. A family
    /// without GSO accepts a piece of any length: it sends the packets one by one.
    fn max_piece_len(&self, stride: usize) -> usize {
        let v4 = self.v4.max_piece_len(stride);
        self.v6.as_ref().map_or(v4, |v6| v6.max_piece_len(stride).max(v4))
    }

    fn send(&mut self, to: Target, piece: &'a [u8], stride: usize) {
        match (to.addr, &mut self.v6) {
            (SocketAddr::V4(_), _) => self.v4.send(to, piece, stride),
            (SocketAddr::V6(_), Some(v6)) => v6.send(to, piece, stride),
            (SocketAddr::V6(_), None) => {
                let packets = piece.len().div_ceil(stride.max(1));
                self.metrics.errors(SendErrorKind::Unreachable).inc_by(packets as u64);
                if !std::mem::replace(self.logged_no_v6, true) {
                    tracing::warn!(target = %to.addr, "RTP target unreachable: this machine has no IPv6");
                }
            }
        }
    }

    fn flush(&mut self) {
        self.v4.flush();
        if let Some(v6) = &mut self.v6 {
            v6.flush();
        }
    }
}
