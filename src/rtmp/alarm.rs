//! Futures that a busy task seldom needs to look at.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
};

/// Tells whether one of the futures that are polled with [`LazyPoll::waker`] has woken the task.
///
/// A connection is woken for each message, and a kick or a timeout comes once in its life: as it is,
/// their futures stay unpolled, and their memory untouched, until they have something to say. All of
/// it must be polled by one and the same task.
pub struct LazyPoll {
    shared: Arc<Shared>,
    waker: Waker,
}

struct Shared {
    rung: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl LazyPoll {
    /// One that has been rung: futures are polled once to begin with.
    pub fn new() -> Self {
        let shared = Arc::new(Shared { rung: AtomicBool::new(true), task: Mutex::default() });
        Self { waker: shared.clone().into(), shared }
    }

    /// Has the futures polled the next time.
    pub fn ring(&self) {
        self.shared.rung.store(true, Ordering::Release);
    }

    /// Whether it was rung since the last call; `cx` is what a ring wakes from now on.
    pub fn take(&self, cx: &Context<'_>) -> bool {
        if !self.shared.rung.load(Ordering::Acquire) {
            return false;
        }
        // Before the flag goes down: who rings then finds the task to wake.
        *self.shared.task() = Some(cx.waker().clone());
        self.shared.rung.swap(false, Ordering::AcqRel)
    }

    /// What the futures are to be polled with.
    pub fn waker(&self) -> &Waker {
        &self.waker
    }
}

impl Shared {
    fn task(&self) -> std::sync::MutexGuard<'_, Option<Waker>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        let task = self.task().clone();
        if let Some(task) = task {
            task.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, task::Poll, time::Duration};

    use tokio_util::sync::CancellationToken;

    use super::*;

    #[tokio::test]
    async fn what_has_nothing_to_say_is_polled_once() {
        let token = CancellationToken::new();
        let (alarm, mut polls) = (LazyPoll::new(), 0);
        let mut cancelled = pin!(token.cancelled());
        let mut look = async |wakes: u32| {
            let mut left = wakes;
            poll_fn(|cx| {
                if alarm.take(cx) {
                    polls += 1;
                    let mut quiet = Context::from_waker(alarm.waker());
                    if cancelled.as_mut().poll(&mut quiet).is_ready() {
                        return Poll::Ready(true);
                    }
                }
                if wakes > 0 && left == 0 {
                    return Poll::Ready(false);
                }
                if left > 0 {
                    left -= 1;
                    cx.waker().wake_by_ref();
                }
                Poll::Pending
            })
            .await
        };
        assert!(!look(100).await);
        let cancel = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            token.cancel();
        };
        let (cancelled, ()) = tokio::join!(look(0), cancel);
        assert!(cancelled);
        assert_eq!(polls, 2);
    }
}
