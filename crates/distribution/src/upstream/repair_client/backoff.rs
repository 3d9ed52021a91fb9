//! Pauses between connection attempts.

use std::time::Duration;

/// Exponential backoff with jitter, from [`FIRST`] to [`LONGEST`].
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Returns the pause after a connection that lasted `lasted`. `jitter`, a random number,
    /// shortens it by up to half, so that a thousand edges do not reconnect at the same instant.
    pub(super) fn next(&mut self, lasted: Duration, jitter: u16) -> Duration {
        if lasted >= GOOD {
            self.failures = 0;
        }
        let pause = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        pause - pause / 2 * u32::from(jitter) / u32::from(u16::MAX)
    }
}

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);
/// A connection that lasted this long resets the pause.
const GOOD: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_reset_after_a_good_connection() {
        let mut backoff = Backoff::default();
        let short = Duration::from_millis(1);
        let pauses: Vec<_> = (0..8).map(|_| backoff.next(short, 0).as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.next(short, u16::MAX), Duration::from_millis(2500));
        assert_eq!(backoff.next(GOOD, 0), Duration::from_millis(100));
        for _ in 0..100 {
            backoff.next(short, 7);
        }
    }
}
