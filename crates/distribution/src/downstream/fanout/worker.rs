//! The threads that send.

use std::{net::SocketAddr, sync::Arc, thread, time::Instant};

use super::{
    FanoutMetrics,
    job::{QueueCost, Task},
    metrics::Refusal,
    pacer::{Due, Group, Pacer, Pacing},
    queue::Queue,
    sockets::{SendSocket, Sockets},
};
use crate::downstream::fanout::{
    udp_sender::{Round, UdpSender},
    work_batch::WorkBatch,
};
use downpour_sys::idle::{self, IdleStrategy, Next};

/// One thread of the fan-out.
pub(super) struct Worker {
    queue: Arc<Queue>,
    v4: UdpSender,
    /// `None` on a machine without IPv6.
    v6: Option<UdpSender>,
    /// Whether it was told that there is none and somebody needs it.
    told_of_v6: bool,
    pacer: Option<Pacer>,
    metrics: FanoutMetrics,
    due: Due,
}

impl Worker {
    pub(super) fn new(
        queue: Arc<Queue>,
        Sockets { v4, v6 }: Sockets,
        pacing: Pacing,
        metrics: &FanoutMetrics,
    ) -> Self {
        let outlet = |SendSocket { socket, segments, is_own, progress }| {
            UdpSender::new(socket, segments, is_own, progress, metrics.clone())
        };
        Self {
            queue,
            v4: outlet(v4),
            v6: v6.map(outlet),
            told_of_v6: false,
            pacer: match pacing {
                Pacing::Off => None,
                Pacing::Factor(factor) => Some(Pacer::new(factor)),
            },
            metrics: metrics.clone(),
            due: Due::default(),
        }
    }

    /// Sends what comes through the queue until that is closed and empty.
    pub(super) fn run(mut self) {
        idle::sleep_exactly();
        let _end = AbandonOnEnd(self.queue.clone());
        let (mut backlog, mut done) = (WorkBatch::default(), Vec::new());
        let mut rest = IdleStrategy::default();
        loop {
            let (open, now) = backlog.refill(&self.queue, &mut done);
            if !open && let Some(pacer) = &mut self.pacer {
                pacer.hurry_all(now);
            }
            let deadline = self.pacer.as_ref().and_then(Pacer::next_deadline);
            if backlog.is_empty() && deadline.is_none_or(|at| at > now) {
                if !open {
                    return;
                }
                match rest.next(now, deadline) {
                    Next::Nap(time) => thread::sleep(time),
                    Next::Wait => self.queue.park(deadline),
                }
                continue;
            }
            rest.begin_round(now);
            match self.pacer.is_some() {
                true => self.pace(now, &mut backlog, &mut done),
                false if backlog.is_stale(now) => self.skip(&mut backlog, &mut done),
                false => {
                    let step = backlog.next_step();
                    let count = step.len();
                    self.send(step);
                    done.extend(backlog.drain(count).map(|task| task.weight()));
                }
            }
            rest.end_round(Instant::now());
        }
    }

    /// Gives up what is left of a backlog.
    fn skip(&mut self, backlog: &mut WorkBatch, done: &mut Vec<QueueCost>) {
        for task in backlog.drain_all() {
            self.metrics.skipped.inc_by(task.packets_to_send());
            done.push(task.weight());
        }
    }

    fn send<'a>(&mut self, tasks: impl Iterator<Item = &'a Task>) {
        let Self { v4, v6, told_of_v6, metrics, .. } = self;
        let mut out = Out::new(v4, v6, told_of_v6, metrics);
        for task in tasks {
            #[cfg(test)]
            assert!(!matches!(task, Task::Panic), "as asked");
            if let Task::Send(job) = task {
                let (bytes, stride) = (job.train.bytes(), job.train.stride());
                // Chunk by chunk, and piece by piece within: a piece stays in the cache while it
                // goes to a chunk's targets, and no target waits for all of another's.
                for chunk in job.share.chunks() {
                    for piece in bytes.chunks(out.piece(stride)) {
                        chunk.iter().for_each(|target| out.send(target.addr, piece, stride));
                    }
                }
            }
        }
        out.flush();
    }

    /// Gives the pacer what came, and sends what it says is due, or as much of that as it says at a
    /// time.
    fn pace(&mut self, now: Instant, backlog: &mut WorkBatch, done: &mut Vec<QueueCost>) {
        let Some(pacer) = &mut self.pacer else { return };
        for task in backlog.drain_all() {
            let weight = task.weight();
            match task {
                Task::Send(job) => pacer.push(now, job),
                Task::Finish(lane) => {
                    pacer.hurry(now, lane);
                    done.push(weight);
                }
                #[cfg(test)]
                Task::Panic => panic!("as asked"),
            }
        }
        pacer.poll(now, &mut self.due);
        let Self { v4, v6, told_of_v6, metrics, .. } = self;
        let mut out = Out::new(v4, v6, told_of_v6, metrics);
        for Group { to, bytes, stride } in &self.due.groups {
            out.send(*to, bytes, *stride);
        }
        out.flush();
        self.due.groups.clear();
        metrics.skipped.inc_by(std::mem::take(&mut self.due.skipped));
        done.extend(self.due.over.drain(..).map(|job| job.weight()));
    }
}

/// A worker that has come to its end, if only by a bug, leaves nothing that waits for it.
struct AbandonOnEnd(Arc<Queue>);

impl Drop for AbandonOnEnd {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// The way out of one round.
struct Out<'o, 'a> {
    v4: Round<'o, 'a>,
    v6: Option<Round<'o, 'a>>,
    told_of_v6: &'o mut bool,
    metrics: &'o FanoutMetrics,
}

impl<'o, 'a> Out<'o, 'a> {
    fn new(
        v4: &'o mut UdpSender,
        v6: &'o mut Option<UdpSender>,
        told_of_v6: &'o mut bool,
        metrics: &'o FanoutMetrics,
    ) -> Self {
        Self { v4: v4.round(), v6: v6.as_mut().map(UdpSender::round), told_of_v6, metrics }
    }

    /// The longer one: where packets are not cut, a round sends each for itself, however many there
    /// are.
    fn piece(&self, stride: usize) -> usize {
        let v4 = self.v4.piece(stride);
        self.v6.as_ref().map_or(v4, |v6| v6.piece(stride).max(v4))
    }

    fn send(&mut self, to: SocketAddr, piece: &'a [u8], stride: usize) {
        match (to, &mut self.v6) {
            (SocketAddr::V4(_), _) => self.v4.send(to, piece, stride),
            (SocketAddr::V6(_), Some(v6)) => v6.send(to, piece, stride),
            (SocketAddr::V6(_), None) => {
                let packets = piece.len().div_ceil(stride.max(1));
                self.metrics.errors(Refusal::Unreachable).inc_by(packets as u64);
                if !std::mem::replace(self.told_of_v6, true) {
                    tracing::warn!(target = %to, "RTP cannot be sent there: no IPv6 here");
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
