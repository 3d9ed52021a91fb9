//! What waits for one worker of the fan-out.

use std::{
    collections::VecDeque,
    mem,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use super::job::{QueueCost, Task};

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
    fn with(self, weight: QueueCost) -> Self {
        Self { tasks: self.tasks + 1, bytes: self.bytes + weight.bytes }
    }

    fn without(self, weight: QueueCost) -> Self {
        let (tasks, bytes) = (self.tasks, self.bytes);
        Self { tasks: tasks.saturating_sub(1), bytes: bytes.saturating_sub(weight.bytes) }
    }

    fn fits(self, limits: Self) -> bool {
        self.tasks <= limits.tasks && self.bytes <= limits.bytes
    }
}

struct State {
    waiting: VecDeque<Task>,
    /// What waits and what was taken but is not done.
    held: Amount,
    /// Of that, what is of each lane. Lanes are random numbers, and share an entry now and then:
    /// that costs next to nothing, and a map would cost each push.
    lanes: Box<[Amount; LANES]>,
    parked: bool,
    closed: bool,
}

impl State {
    fn lane(&mut self, weight: QueueCost) -> &mut Amount {
        &mut self.lanes[(weight.lane.0.wrapping_mul(SPREAD) >> 16) as usize % LANES]
    }
}

impl Queue {
    pub(super) fn new(limits: Amount) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            held: Amount::default(),
            lanes: Box::new([Amount::default(); LANES]),
            parked: false,
            closed: false,
        };
        Self { state: Mutex::new(state), wake: Condvar::new(), limits }
    }

    /// Puts a task in, unless too much is there, in all or of its lane: one encoder must not take
    /// the room of all others.
    pub(super) fn push(&self, task: Task) -> bool {
        let weight = task.weight();
        let mut state = self.lock();
        let (held, of_lane) = (state.held.with(weight), state.lane(weight).with(weight));
        let Amount { tasks, bytes } = self.limits;
        let share = Amount { tasks: tasks / LANE_SHARE, bytes: bytes / LANE_SHARE };
        // One task, however large, may wait in any lane.
        let has_share = of_lane.tasks == 1 || of_lane.fits(share);
        if !held.fits(self.limits) || !has_share || state.closed {
            return false;
        }
        state.held = held;
        *state.lane(weight) = of_lane;
        state.waiting.push_back(task);
        let parked = mem::take(&mut state.parked);
        drop(state);
        if parked {
            self.wake.notify_one();
        }
        true
    }

    /// Takes account of what is `done`, which is empty then, and swaps all that waits for `tasks`
    /// if those are none. Says whether more can come.
    pub(super) fn take(&self, tasks: &mut VecDeque<Task>, done: &mut Vec<QueueCost>) -> bool {
        let mut state = self.lock();
        for weight in done.drain(..) {
            state.held = state.held.without(weight);
            let lane = state.lane(weight);
            *lane = lane.without(weight);
        }
        if tasks.is_empty() {
            mem::swap(&mut state.waiting, tasks);
        }
        !state.closed
    }

    /// What waits and what was taken but is not done.
    pub(super) fn held(&self) -> Amount {
        self.lock().held
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

    /// Takes nothing more, and forgets what is there: nobody will do it.
    pub(super) fn abandon(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.held = Amount::default();
        let waiting = mem::take(&mut state.waiting);
        drop(state);
        // Tasks tell others that they are over.
        drop(waiting);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The most of a queue that one lane may have: one part in so many.
const LANE_SHARE: usize = 4;
const LANES: usize = 256;
/// The low bits of a lane are those that its worker was chosen by; this brings the others there.
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

    fn task(lane: u32, len: usize) -> Task {
        let addr = ([127, 0, 0, 1], 9).into();
        let share = TargetShare::of(&Arc::from([Target { addr }]), Ssrc(lane), 0, 1);
        let train = Bytes::from(vec![0; len]).into();
        Task::Send(Job { lane: Ssrc(lane), train, share: share.unwrap(), pace: None })
    }

    #[test]
    fn it_takes_no_more_than_its_bounds_until_what_it_gave_is_done() {
        let queue = Queue::new(Amount { tasks: 3, bytes: 100 });
        assert!(queue.push(task(1, 60)) && !queue.push(task(2, 41)) && queue.push(task(3, 40)));
        let mut taken = VecDeque::new();
        assert!(queue.take(&mut taken, &mut Vec::new()));
        assert_eq!(taken.iter().map(|task| task.weight().bytes).collect::<Vec<_>>(), [60, 40]);
        assert!(!queue.push(task(4, 1)), "what was taken counts");
        let first = taken[0].weight();
        queue.take(&mut taken, &mut vec![first]);
        assert!(queue.push(task(4, 1)) && queue.push(task(5, 1)));
        assert!(!queue.push(task(6, 1)), "three");
        assert_eq!(taken.len(), 2, "it was not empty");
        queue.close();
        let mut done = taken.drain(..).skip(1).map(|task| task.weight()).collect();
        assert!(!queue.take(&mut taken, &mut done));
        assert_eq!((taken.len(), queue.held()), (2, Amount { tasks: 2, bytes: 2 }));
        assert!(!queue.push(task(7, 1)), "closed");
    }

    #[test]
    fn one_lane_takes_no_more_than_a_quarter() {
        let queue = Queue::new(Amount { tasks: 100, bytes: 1000 });
        let pushed = |lane, len, times| (0..times).filter(|_| queue.push(task(lane, len))).count();
        assert_eq!(pushed(1, 1, 100), 25);
        assert_eq!(pushed(2, 100, 100), 2);
        assert_eq!((pushed(3, 700, 1), pushed(3, 1, 1)), (1, 0), "one may be longer");
        assert_eq!(pushed(4, 1, 10), 10);
        // It has its part again when what it had is done.
        let (mut taken, mut done) = (VecDeque::new(), Vec::new());
        queue.take(&mut taken, &mut done);
        assert_eq!(pushed(1, 1, 10), 0);
        done.extend(taken.drain(..).map(|task| task.weight()));
        queue.take(&mut taken, &mut done);
        assert!(done.is_empty() && queue.held() == Amount::default());
        assert_eq!((pushed(1, 1, 100), pushed(2, 100, 100)), (25, 2));
    }

    #[test]
    fn what_is_abandoned_is_dropped() {
        let queue = Queue::new(Amount { tasks: 9, bytes: 9 });
        let held: Arc<dyn std::any::Any + Send + Sync> = Arc::new(());
        let Task::Send(mut job) = task(1, 1) else { unreachable!() };
        let pace = Pace { rate: 1, interval: Duration::ZERO, held: Some(held.clone()) };
        job.pace = Some(pace);
        assert!(queue.push(Task::Send(job)));
        queue.abandon();
        assert_eq!((Arc::strong_count(&held), queue.held()), (1, Amount::default()));
        assert!(!queue.push(task(1, 1)));
    }

    #[test]
    fn who_parks_is_woken_and_who_is_late_finds_it_there() {
        let queue = Arc::new(Queue::new(Amount { tasks: 1000, bytes: 1000 }));
        let worker = thread::spawn({
            let queue = queue.clone();
            move || {
                let (mut seen, mut taken, mut done) = (0, VecDeque::new(), Vec::new());
                while queue.take(&mut taken, &mut done) {
                    seen += taken.len();
                    done.extend(taken.drain(..).map(|task| task.weight()));
                    queue.park(None);
                }
                seen + taken.len()
            }
        });
        for lane in 0..500 {
            assert!(queue.push(task(lane, 1)));
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
        queue.push(task(1, 1));
        queue.park(None);
    }
}
