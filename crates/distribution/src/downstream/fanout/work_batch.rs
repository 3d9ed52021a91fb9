//! Tasks that a fan-out worker has taken from its queue and not sent yet.

use std::{
    collections::{VecDeque, vec_deque},
    time::{Duration, Instant},
};

use super::{
    job::{QueueCost, Task},
    queue::Queue,
};

/// Batch of tasks that a worker took from its queue at once, in order.
///
/// The worker sends it in steps and releases the cost of each, so that its queue has room again before
/// the whole batch is sent. A batch older than [`STALE`] is dropped: by then edges have requested the
/// packets by NACK or given them up, and sending them would delay newer ones.
#[derive(Default)]
pub(super) struct WorkBatch {
    tasks: VecDeque<Task>,
    /// When the tasks were taken from the queue.
    taken: Option<Instant>,
}

impl WorkBatch {
    /// Releases the cost of finished jobs and, if the batch is empty, takes all waiting tasks. Returns
    /// `false` once the queue is closed, and the current time.
    pub(super) fn refill(&mut self, queue: &Queue, done: &mut Vec<QueueCost>) -> (bool, Instant) {
        let refilled = self.tasks.is_empty();
        let open = queue.take(&mut self.tasks, done);
        let now = Instant::now();
        if refilled {
            self.taken = Some(now);
        }
        (open, now)
    }

    /// `true` if the batch is so old that its tasks are to be dropped.
    pub(super) fn is_stale(&self, now: Instant) -> bool {
        self.taken.is_some_and(|at| now.saturating_duration_since(at) >= STALE)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// `true` if a task is to be spread over time.
    pub(super) fn is_paced(&self) -> bool {
        self.tasks.iter().any(|task| matches!(task, Task::Send(job) if job.pace.is_some()))
    }

    /// The tasks of the next step: at least one, unless the batch is empty.
    pub(super) fn next_step(&self) -> vec_deque::Iter<'_, Task> {
        let mut bytes = 0_usize;
        let is_in_step = |task: &&Task| {
            let fits = bytes < STEP_BYTES;
            bytes = bytes.saturating_add(task.bytes_to_send());
            fits
        };
        self.tasks.range(..self.tasks.iter().take_while(is_in_step).count())
    }

    /// Removes the first `count` tasks.
    pub(super) fn drain(&mut self, count: usize) -> impl Iterator<Item = Task> {
        self.tasks.drain(..count.min(self.tasks.len()))
    }

    /// Removes all tasks.
    pub(super) fn drain_all(&mut self) -> impl Iterator<Item = Task> {
        self.tasks.drain(..)
    }
}

/// Age at which unsent tasks are dropped. They wait in the queue for at most the same time before, so
/// that no packet leaves more than one second late, twice the usual latency.
pub(super) const STALE: Duration = Duration::from_millis(500);
/// Bytes to send in one step, to all targets together: the size of a send buffer. Smaller steps would
/// mean more system calls with fewer messages each.
const STEP_BYTES: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::downstream::{
        fanout::{
            job::{Job, TargetShare},
            queue::Amount,
        },
        routes::Target,
    };
    use downpour_repair::rtp::Ssrc;

    fn queue() -> Queue {
        Queue::new(Amount { tasks: 1000, bytes: 64 << 20 })
    }

    fn push(queue: &Queue, len: usize, targets: u16) {
        let target = |n| Target::from(std::net::SocketAddr::from(([10, 0, 0, 1], n)));
        let share = TargetShare::of(&(0..targets).map(target).collect(), Ssrc(0), 0, 1).unwrap();
        let train = Bytes::from(vec![0; len]).into();
        assert!(queue.push(Task::Send(Job { flow: Ssrc(0), train, share, pace: None })));
    }

    #[test]
    fn each_step_releases_its_cost() {
        let (queue, mut batch, mut done) = (queue(), WorkBatch::default(), Vec::new());
        for (len, targets) in [(1 << 20, 3), (1 << 20, 1), (10, 1), (1 << 20, 1000), (10, 1)] {
            push(&queue, len, targets);
        }
        assert!(batch.refill(&queue, &mut done).0 && queue.held().tasks == 5);
        push(&queue, 10, 1);
        let mut steps = Vec::new();
        while !batch.is_empty() && steps.len() < 9 {
            let step = batch.next_step().len();
            steps.push(step);
            done.extend(batch.drain(step).map(|task| task.cost()));
            let before = queue.held().tasks;
            batch.refill(&queue, &mut done);
            assert_eq!(queue.held().tasks, before - step);
        }
        // The task that was pushed meanwhile is the last step.
        assert_eq!(steps, [2, 2, 1, 1]);
        assert_eq!(queue.held(), Amount::default());
        assert_eq!(batch.next_step().len(), 0);
    }

    #[test]
    fn a_batch_is_stale_after_the_limit_and_fresh_after_a_refill() {
        let (queue, mut batch, mut done) = (queue(), WorkBatch::default(), Vec::new());
        assert!(!batch.is_stale(Instant::now()));
        push(&queue, 10, 1);
        let (_, taken) = batch.refill(&queue, &mut done);
        assert!(!batch.is_stale(taken + STALE / 2) && batch.is_stale(taken + STALE));
        // A refill of a batch that is not empty does not reset its age.
        let (_, later) = batch.refill(&queue, &mut done);
        assert!(batch.is_stale(taken + STALE));
        done.extend(batch.drain_all().map(|task| task.cost()));
        push(&queue, 10, 1);
        let (_, taken) = batch.refill(&queue, &mut done);
        assert!(taken >= later && !batch.is_stale(taken));
    }
}
