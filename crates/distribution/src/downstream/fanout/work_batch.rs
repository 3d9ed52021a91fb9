//! What a worker of the fan-out has taken from its queue and not sent yet.

use std::{
    collections::{VecDeque, vec_deque},
    time::{Duration, Instant},
};

use super::{
    job::{QueueCost, Task},
    queue::Queue,
};

/// All that waited when the worker looked last, in its order.
///
/// It is sent in steps, so that a worker that is behind gives back room in its queue as it goes.
/// What cannot be sent for long is not sent at all: edges have asked for it by then, or no longer
/// wait, and it would only hold up what they do wait for.
#[derive(Default)]
pub(super) struct WorkBatch {
    tasks: VecDeque<Task>,
    /// When it was taken; each task was queued before.
    taken: Option<Instant>,
}

impl WorkBatch {
    /// Takes what waits, once all from before is over, and tells the queue what is `done`. Says
    /// whether more can come, and what time it is.
    pub(super) fn refill(&mut self, queue: &Queue, done: &mut Vec<QueueCost>) -> (bool, Instant) {
        let refilled = self.tasks.is_empty();
        let open = queue.take(&mut self.tasks, done);
        let now = Instant::now();
        if refilled {
            self.taken = Some(now);
        }
        (open, now)
    }

    /// Whether it was taken so long ago that what is left is not to be sent any more.
    pub(super) fn is_stale(&self, now: Instant) -> bool {
        self.taken.is_some_and(|at| now.saturating_duration_since(at) >= STALE)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    /// The tasks of the next step, one at least if there is one.
    pub(super) fn next_step(&self) -> vec_deque::Iter<'_, Task> {
        let mut bytes = 0_usize;
        let is_in_it = |task: &&Task| {
            let fits = bytes < STEP_BYTES;
            bytes = bytes.saturating_add(task.bytes_to_send());
            fits
        };
        self.tasks.range(..self.tasks.iter().take_while(is_in_it).count())
    }

    /// Takes out the first `count` tasks.
    pub(super) fn drain(&mut self, count: usize) -> impl Iterator<Item = Task> {
        self.tasks.drain(..count.min(self.tasks.len()))
    }

    /// Takes out all.
    pub(super) fn drain_all(&mut self) -> impl Iterator<Item = Task> {
        self.tasks.drain(..)
    }
}

/// What waits for so long, without a worker getting round to it, is dropped. Bursts wait as long
/// again in the queue at most, so that none leaves later than a second, twice the usual latency.
pub(super) const STALE: Duration = Duration::from_millis(500);
/// Bytes, times targets, of a step: what a send buffer holds. Less would be many calls with few
/// messages.
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
        let target = |n| Target { addr: ([10, 0, 0, 1], n).into() };
        let share = TargetShare::of(&(0..targets).map(target).collect(), Ssrc(0), 0, 1).unwrap();
        let train = Bytes::from(vec![0; len]).into();
        assert!(queue.push(Task::Send(Job { lane: Ssrc(0), train, share, pace: None })));
    }

    #[test]
    fn room_in_the_queue_is_given_back_step_by_step() {
        let (queue, mut backlog, mut done) = (queue(), WorkBatch::default(), Vec::new());
        for (len, targets) in [(1 << 20, 3), (1 << 20, 1), (10, 1), (1 << 20, 1000), (10, 1)] {
            push(&queue, len, targets);
        }
        assert!(backlog.refill(&queue, &mut done).0 && queue.held().tasks == 5);
        push(&queue, 10, 1);
        let mut steps = Vec::new();
        while !backlog.is_empty() && steps.len() < 9 {
            let step = backlog.next_step().len();
            steps.push(step);
            done.extend(backlog.drain(step).map(|task| task.weight()));
            let before = queue.held().tasks;
            backlog.refill(&queue, &mut done);
            assert_eq!(queue.held().tasks, before - step);
        }
        // What came meanwhile was taken when all else had been sent.
        assert_eq!(steps, [2, 2, 1, 1]);
        assert_eq!(queue.held(), Amount::default());
        assert_eq!(backlog.next_step().len(), 0);
    }

    #[test]
    fn what_cannot_be_sent_for_long_is_stale_and_what_has_just_been_taken_is_not() {
        let (queue, mut backlog, mut done) = (queue(), WorkBatch::default(), Vec::new());
        assert!(!backlog.is_stale(Instant::now()));
        push(&queue, 10, 1);
        let (_, taken) = backlog.refill(&queue, &mut done);
        assert!(!backlog.is_stale(taken + STALE / 2) && backlog.is_stale(taken + STALE));
        // To look again changes nothing as long as there is something.
        let (_, later) = backlog.refill(&queue, &mut done);
        assert!(backlog.is_stale(taken + STALE));
        done.extend(backlog.drain_all().map(|task| task.weight()));
        push(&queue, 10, 1);
        let (_, taken) = backlog.refill(&queue, &mut done);
        assert!(taken >= later && !backlog.is_stale(taken));
    }
}
