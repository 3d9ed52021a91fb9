//! What waits for one worker of the fan-out.

use std::{
    mem,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::job::Task;

/// A bounded queue of one worker, which takes all that is there at once.
///
/// Whoever puts something in wakes the worker only if it is parked: not while it is sending, nor
/// while it naps and will look by itself.
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
    limits: Amount,
}

/// Tasks, and the bytes that they hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) tasks: usize,
    pub(super) bytes: usize,
}

impl Amount {
    pub(super) fn add(&mut self, task: &Task) {
        self.tasks += 1;
        self.bytes += task.bytes();
    }
}

#[derive(Default)]
struct State {
    waiting: Vec<Task>,
    /// What waits and what was taken but is not done.
    held: Amount,
    parked: bool,
    closed: bool,
}

impl Queue {
    pub(super) fn new(limits: Amount) -> Self {
        Self { state: Mutex::default(), wake: Condvar::new(), limits }
    }

    /// Puts a task in, unless too much is there.
    pub(super) fn push(&self, task: Task) -> bool {
        let mut state = self.lock();
        let mut held = state.held;
        held.add(&task);
        if held.tasks > self.limits.tasks || held.bytes > self.limits.bytes || state.closed {
            return false;
        }
        state.held = held;
        state.waiting.push(task);
        let parked = mem::take(&mut state.parked);
        drop(state);
        if parked {
            self.wake.notify_one();
        }
        true
    }

    /// Swaps all that waits for `empty`, and takes account of what is `done`. Says whether more can
    /// come.
    pub(super) fn take(&self, empty: &mut Vec<Task>, done: Amount) -> bool {
        let mut state = self.lock();
        state.held.tasks -= done.tasks.min(state.held.tasks);
        state.held.bytes -= done.bytes.min(state.held.bytes);
        mem::swap(&mut state.waiting, empty);
        !state.closed
    }

    /// Waits until something is there or nothing more can come, or until `deadline`.
    pub(super) fn park(&self, deadline: Option<Instant>) {
        let mut state = self.lock();
        while state.waiting.is_empty() && !state.closed {
            state.parked = true;
            state = match deadline.map(|at| at.saturating_duration_since(Instant::now())) {
                None => self.wake.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => break,
                Some(left) => {
                    let woken = self.wake.wait_timeout(state, left);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        state.parked = false;
    }

    /// Takes nothing more; what is there is still done.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread, time::Duration};

    use bytes::Bytes;

    use super::*;
    use crate::{
        fanout::{
            job::{Job, Share},
            routes::Target,
        },
        rtp::Ssrc,
    };

    fn task(len: usize) -> Task {
        let addr = ([127, 0, 0, 1], 9).into();
        let share = Share::of(&Arc::from([Target { addr }]), Ssrc(0), 0, 1);
        let train = Bytes::from(vec![0; len]).into();
        Task::Send(Job { lane: Ssrc(0), train, share: share.unwrap(), pace: None })
    }

    #[test]
    fn it_takes_no_more_than_its_bounds_until_what_it_gave_is_done() {
        let queue = Queue::new(Amount { tasks: 3, bytes: 100 });
        assert!(queue.push(task(60)) && !queue.push(task(41)) && queue.push(task(40)));
        let mut taken = Vec::new();
        assert!(queue.take(&mut taken, Amount::default()));
        assert_eq!(taken.iter().map(Task::bytes).collect::<Vec<_>>(), [60, 40]);
        assert!(!queue.push(task(1)), "what was taken counts");
        taken.clear();
        queue.take(&mut taken, Amount { tasks: 1, bytes: 60 });
        assert!(queue.push(task(1)) && queue.push(task(1)));
        assert!(!queue.push(task(1)), "three");
        queue.close();
        queue.take(&mut taken, Amount { tasks: 1, bytes: 40 });
        assert!(!queue.push(task(1)), "closed");
        assert!(!queue.take(&mut Vec::new(), Amount::default()));
    }

    #[test]
    fn who_parks_is_woken_and_who_is_late_finds_it_there() {
        let queue = Arc::new(Queue::new(Amount { tasks: 1000, bytes: 1000 }));
        let worker = thread::spawn({
            let queue = queue.clone();
            move || {
                let (mut seen, mut taken) = (0, Vec::new());
                while queue.take(&mut taken, Amount::default()) {
                    seen += taken.len();
                    taken.clear();
                    queue.park(None);
                }
                seen + taken.len()
            }
        });
        for _ in 0..500 {
            assert!(queue.push(task(1)));
            thread::yield_now();
        }
        queue.close();
        assert_eq!(worker.join().unwrap(), 500);
    }

    #[test]
    fn a_deadline_ends_the_wait() {
        let queue = Queue::new(Amount { tasks: 1, bytes: 1 });
        let deadline = Instant::now() + Duration::from_millis(5);
        queue.park(Some(deadline));
        assert!(Instant::now() >= deadline);
        queue.push(task(1));
        queue.park(None);
    }
}
