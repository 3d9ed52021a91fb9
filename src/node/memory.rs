//! Gives the memory of ended streams and viewers back to the system.

use std::{sync::atomic::Ordering, thread, time::Duration};

use tokio_util::sync::CancellationToken;

use downpour_hub::Admission;
use downpour_sys::heap::give_back_free_memory;

/// Gives free memory back after streams have ended, or many viewers have left. Runs until `shutdown`.
pub(super) async fn give_back(admission: Admission, shutdown: CancellationToken) {
    let mut due = Due::default();
    loop {
        tokio::select! {
            () = tokio::time::sleep(INTERVAL) => {}
            () = shutdown.cancelled() => return,
        }
        let streams = admission.hub().streams_ended();
        let viewers = admission.counters().playbacks_ended.load(Ordering::Relaxed);
        if due.is_due(streams, viewers) {
            // Not on a worker, since it takes milliseconds, and on a thread that ends at once.
            let thread = thread::Builder::new().name("free-memory".into());
            if let Err(error) = thread.spawn(give_back_free_memory) {
                tracing::warn!(%error, "free memory not given back: no thread");
            }
        }
    }
}

/// When memory is given back.
#[derive(Default)]
struct Due {
    streams: u64,
    viewers: u64,
    rounds_left: u32,
}

impl Due {
    /// Takes the numbers of streams and viewers that have ended since the start.
    fn is_due(&mut self, streams: u64, viewers: u64) -> bool {
        if streams > self.streams || viewers >= self.viewers + MANY_VIEWERS {
            (self.streams, self.viewers, self.rounds_left) = (streams, viewers, ROUNDS);
        }
        let is_due = self.rounds_left > 0;
        self.rounds_left = self.rounds_left.saturating_sub(1);
        is_due
    }
}

const INTERVAL: Duration = Duration::from_secs(10);
/// Rounds after an end: packets of an ended stream are kept for repair, and viewers read its rest.
const ROUNDS: u32 = 4;
const MANY_VIEWERS: u64 = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_given_back_for_a_while_after_an_end() {
        let mut due = Due::default();
        let mut rounds =
            |streams, viewers| (0..10).filter(|_| due.is_due(streams, viewers)).count();
        assert_eq!(rounds(0, 0), 0);
        assert_eq!(rounds(1, 0), 4);
        assert_eq!(rounds(1, 99), 0);
        assert_eq!(rounds(1, 100), 4);
    }
}
