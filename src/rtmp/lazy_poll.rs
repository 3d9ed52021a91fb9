//! Polls rarely ready futures only when they have woken the task.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
};

use parking_lot::Mutex;

/// Knows whether a future that was polled with [`LazyPoll::waker`] has woken the task.
///
/// A connection is woken per message, but kicked or timed out at most once. With this, the futures of
/// kick and timeout are not polled per message, and their memory stays out of the cache. All futures
/// must be polled by the same task.
pub(super) struct LazyPoll {
    shared: Arc<Shared>,
    waker: Waker,
}

struct Shared {
    woken: AtomicBool,
    task: Mutex<Option<Waker>>,
}

impl LazyPoll {
    /// Starts out woken, so that each future is polled once.
    pub(super) fn new() -> Self {
        let shared = Arc::new(Shared { woken: AtomicBool::new(true), task: Mutex::default() });
        Self { waker: shared.clone().into(), shared }
    }

    /// Makes the next [`LazyPoll::take`] return `true`. Does not wake the task.
    pub(super) fn wake(&self) {
        self.shared.woken.store(true, Ordering::Release);
    }

    /// Returns `true` if it was woken since the last call: poll the futures then, with
    /// [`LazyPoll::waker`]. From then on they wake the task of `cx`.
    pub(super) fn take(&self, cx: &Context<'_>) -> bool {
        if !self.shared.woken.load(Ordering::Acquire) {
            return false;
        }
        // Before the flag is cleared: a future that wakes after that finds the task.
        *self.shared.task.lock() = Some(cx.waker().clone());
        self.shared.woken.swap(false, Ordering::AcqRel)
    }

    /// The waker to poll the futures with.
    pub(super) fn waker(&self) -> &Waker {
        &self.waker
    }
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        let task = self.task.lock().clone();
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
    async fn future_is_polled_once_until_it_wakes_the_task() {
        let token = CancellationToken::new();
        let (lazy, mut polls) = (LazyPoll::new(), 0);
        let mut cancelled = pin!(token.cancelled());
        let mut look = async |wakes: u32| {
            let mut left = wakes;
            poll_fn(|cx| {
                if lazy.take(cx) {
                    polls += 1;
                    let mut quiet = Context::from_waker(lazy.waker());
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
