//! The bounded task queue of one worker.

use std::{collections::VecDeque, mem, time::Instant};

use parking_lot::{Condvar, Mutex};

use super::job::{QueueCost, Task};

/// Bounded queue of one worker, from which the worker takes all waiting tasks at once.
///
/// A task counts against the bounds from [`Queue::push`] until the worker returns its cost to
/// [`Queue::take`]: waiting → taken → done.
///
/// A push wakes the worker only if it is parked, not while it sends or naps.
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
    limits: Amount,
}

/// A number of tasks and the bytes that they hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) tasks: usize,
    pub(super) bytes: usize,
}

impl Amount {
    fn with(self, cost: QueueCost) -> Self {
        Self { tasks: self.tasks + 1, bytes: self.bytes + cost.bytes }
    }

    fn without(self, cost: QueueCost) -> Self {
        let (tasks, bytes) = (self.tasks, self.bytes);
        Self { tasks: tasks.saturating_sub(1), bytes: bytes.saturating_sub(cost.bytes) }
    }

    fn fits(self, limits: Self) -> bool {
        self.tasks <= limits.tasks && self.bytes <= limits.bytes
    }
}

struct State {
    waiting: VecDeque<Task>,
    /// Tasks that wait or that the worker has taken and not finished.
    held: Amount,
    /// `held` per flow, indexed by a hash of the flow. Two flows rarely share an entry, which only
    /// makes them share a quota; a map would make each push slower.
    flows: Box<[Amount; FLOW_SLOTS]>,
    parked: bool,
    closed: bool,
}

impl State {
    fn flow(&mut self, cost: QueueCost) -> &mut Amount {
        &mut self.flows[(cost.flow.0.wrapping_mul(SPREAD) >> 16) as usize % FLOW_SLOTS]
    }
}

impl Queue {
    pub(super) fn new(limits: Amount) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            held: Amount::default(),
            flows: Box::new([Amount::default(); FLOW_SLOTS]),
            parked: false,
            closed: false,
        };
        Self { state: Mutex::new(state), wake: Condvar::new(), limits }
    }

    /// Adds a task. Returns `false` if the queue is closed, or if the task would exceed the limits or
    /// its flow's share of them: one encoder must not crowd out the others.
    pub(super) fn push(&self, task: Task) -> bool {
        let cost = task.cost();
        let mut state = self.state.lock();
        let (held, of_flow) = (state.held.with(cost), state.flow(cost).with(cost));
        let Amount { tasks, bytes } = self.limits;
        let share = Amount { tasks: tasks / FLOW_SHARE, bytes: bytes / FLOW_SHARE };
        // A flow may always have one task, however large.
        let has_share = of_flow.tasks == 1 || of_flow.fits(share);
        if !held.fits(self.limits) || !has_share || state.closed {
            return false;
        }
        state.held = held;
        *state.flow(cost) = of_flow;
        state.waiting.push_back(task);
        let parked = mem::take(&mut state.parked);
        drop(state);
        if parked {
            self.wake.notify_one();
        }
        true
    }

    /// Releases the cost of finished jobs, draining `done`, and moves all waiting tasks to `tasks` if
    /// that is empty. Returns `false` once the queue is closed.
    pub(super) fn take(&self, tasks: &mut VecDeque<Task>, done: &mut Vec<QueueCost>) -> bool {
        let mut state = self.state.lock();
        for cost in done.drain(..) {
            state.held = state.held.without(cost);
            let flow = state.flow(cost);
            *flow = flow.without(cost);
        }
        if tasks.is_empty() {
            mem::swap(&mut state.waiting, tasks);
        }
        !state.closed
    }

    /// Tasks that wait or that the worker has taken and not finished.
    pub(super) fn held(&self) -> Amount {
        self.state.lock().held
    }

    /// Blocks until a task waits, the queue is closed or `deadline` has passed.
    pub(super) fn park(&self, deadline: Option<Instant>) {
        let mut state = self.state.lock();
        while state.waiting.is_empty() && !state.closed {
            state.parked = true;
            match deadline {
                None => self.wake.wait(&mut state),
                Some(at) if at <= Instant::now() => break,
                Some(at) => {
                    self.wake.wait_until(&mut state, at);
                }
            }
        }
        state.parked = false;
    }

    /// Refuses further tasks. The worker still finishes the tasks that wait.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.wake.notify_one();
    }

    /// Refuses further tasks and drops the tasks that wait, because the worker has ended.
    pub(super) fn abandon(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.held = Amount::default();
        let waiting = mem::take(&mut state.waiting);
        drop(state);
        // Outside the lock: dropping a task runs the drop of `Pace::held`.
        drop(waiting);
    }
}

/// One flow may use at most one part in `FLOW_SHARE` of a queue.
const FLOW_SHARE: usize = 4;
const FLOW_SLOTS: usize = 256;
/// All flows of a worker have the same low bits, which chose the worker; multiplying by 2³² divided by
/// the golden ratio spreads the other bits (Fibonacci hashing).
const SPREAD: u32 = 0x9e37_79b9;

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread, time::Duration};

    use bytes::Bytes;

    use super::*;
    use crate::downstream::{
        fanout::job::{Job, Pace, TargetShare},
        routes::Target,
    };
    use downpour_repair::rtp::Ssrc;

    fn task(flow: u32, len: usize) -> Task {
        let addr: std::net::SocketAddr = ([127, 0, 0, 1], 9).into();
        let share = TargetShare::of(&Arc::from([Target::from(addr)]), Ssrc(flow), 0, 1);
        let train = Bytes::from(vec![0; len]).into();
        Task::Send(Job { flow: Ssrc(flow), train, share: share.unwrap(), pace: None })
    }

    #[test]
    fn tasks_count_against_the_limits_until_they_are_done() {
        let queue = Queue::new(Amount { tasks: 3, bytes: 100 });
        assert!(queue.push(task(1, 60)) && !queue.push(task(2, 41)) && queue.push(task(3, 40)));
        let mut taken = VecDeque::new();
        assert!(queue.take(&mut taken, &mut Vec::new()));
        assert_eq!(taken.iter().map(|task| task.cost().bytes).collect::<Vec<_>>(), [60, 40]);
        assert!(!queue.push(task(4, 1)), "taken tasks count too");
        let first = taken[0].cost();
        queue.take(&mut taken, &mut vec![first]);
        assert!(queue.push(task(4, 1)) && queue.push(task(5, 1)));
        assert!(!queue.push(task(6, 1)), "three tasks are the limit");
        assert_eq!(taken.len(), 2, "nothing was taken, because `taken` was not empty");
        queue.close();
        let mut done = taken.drain(..).skip(1).map(|task| task.cost()).collect();
        assert!(!queue.take(&mut taken, &mut done));
        assert_eq!(taken.len(), 2);
        assert_eq!(queue.held(), Amount { tasks: 2, bytes: 2 });
        assert!(!queue.push(task(7, 1)), "closed");
    }

    #[test]
    fn one_flow_uses_at_most_a_quarter_of_the_queue() {
        let queue = Queue::new(Amount { tasks: 100, bytes: 1000 });
        let pushed = |flow, len, times| (0..times).filter(|_| queue.push(task(flow, len))).count();
        assert_eq!(pushed(1, 1, 100), 25);
        assert_eq!(pushed(2, 100, 100), 2);
        assert_eq!((pushed(3, 700, 1), pushed(3, 1, 1)), (1, 0), "one task may exceed the share");
        assert_eq!(pushed(4, 1, 10), 10);
        // The share is free again when the flow's tasks are done.
        let (mut taken, mut done) = (VecDeque::new(), Vec::new());
        queue.take(&mut taken, &mut done);
        assert_eq!(pushed(1, 1, 10), 0);
        done.extend(taken.drain(..).map(|task| task.cost()));
        queue.take(&mut taken, &mut done);
        assert!(done.is_empty() && queue.held() == Amount::default());
        assert_eq!((pushed(1, 1, 100), pushed(2, 100, 100)), (25, 2));
    }

    #[test]
    fn abandoned_tasks_are_dropped() {
        let queue = Queue::new(Amount { tasks: 9, bytes: 9 });
        let held: Arc<dyn std::any::Any + Send + Sync> = Arc::new(());
        let Task::Send(mut job) = task(1, 1) else { unreachable!() };
        let pace = Pace { rate: 1, interval: Duration::ZERO, held: Some(held.clone()) };
        job.pace = Some(pace);
        assert!(queue.push(Task::Send(job)));
        queue.abandon();
        assert_eq!(Arc::strong_count(&held), 1);
        assert_eq!(queue.held(), Amount::default());
        assert!(!queue.push(task(1, 1)));
    }

    #[test]
    fn no_wake_is_lost_between_take_and_park() {
        let queue = Arc::new(Queue::new(Amount { tasks: 1000, bytes: 1000 }));
        let worker = thread::spawn({
            let queue = queue.clone();
            move || {
                let (mut seen, mut taken, mut done) = (0, VecDeque::new(), Vec::new());
                while queue.take(&mut taken, &mut done) {
                    seen += taken.len();
                    done.extend(taken.drain(..).map(|task| task.cost()));
                    queue.park(None);
                }
                seen + taken.len()
            }
        });
        for flow in 0..500 {
            assert!(queue.push(task(flow, 1)));
            thread::yield_now();
        }
        queue.close();
        assert_eq!(worker.join().unwrap(), 500);
    }

    #[test]
    fn park_ends_at_the_deadline() {
        let queue = Queue::new(Amount { tasks: 1, bytes: 1 });
        let deadline = Instant::now() + Duration::from_millis(5);
        queue.park(Some(deadline));
        assert!(Instant::now() >= deadline);
        queue.push(task(1, 1));
        queue.park(None);
    }
}
