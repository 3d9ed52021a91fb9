//! A token bucket.

use std::time::{Duration, Instant};

/// Tokens that come at a steady rate and are kept up to a burst.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Tokens a second; 0 for no limit.
    rate: u64,
    burst: f64,
    tokens: f64,
    filled: Instant,
}

impl TokenBucket {
    /// A full bucket. `rate` 0 is no limit; `burst` is at least 1.
    pub fn new(now: Instant, rate: u64, burst: u64) -> Self {
        let burst = burst.max(1) as f64;
        Self { rate, burst, tokens: burst, filled: now }
    }

    /// Changes what flows in and what fits. The bucket stays as full as it was, in proportion, so
    /// that no way of changing it back and forth makes tokens.
    pub fn set(&mut self, now: Instant, rate: u64, burst: u64) {
        self.fill(now);
        let burst = burst.max(1) as f64;
        self.tokens *= burst / self.burst;
        self.rate = rate;
        self.burst = burst;
    }

    /// Takes `count` tokens if there are as many.
    pub fn take(&mut self, now: Instant, count: u64) -> bool {
        if self.rate == 0 {
            return true;
        }
        self.fill(now);
        // What is over the whole burst would never be let through.
        let count = (count as f64).min(self.burst);
        let enough = self.tokens >= count;
        if enough {
            self.tokens -= count;
        }
        enough
    }

    /// Takes `count` tokens, on credit if need be, and tells how long to wait for them.
    pub fn charge(&mut self, now: Instant, count: u64) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        self.fill(now);
        self.tokens -= count as f64;
        Duration::from_secs_f64((-self.tokens).max(0.0) / self.rate as f64)
    }

    /// When [`TokenBucket::take`] will find `count` tokens, if nobody takes any before.
    pub fn ready_at(&mut self, now: Instant, count: u64) -> Instant {
        if self.rate == 0 {
            return now;
        }
        self.fill(now);
        let lacking = ((count as f64).min(self.burst) - self.tokens).max(0.0);
        now + Duration::from_secs_f64((lacking / self.rate as f64).min(LONGEST_WAIT))
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * self.rate as f64).min(self.burst);
        self.filled = now;
    }
}

/// Seconds: a bound on the sum, not on the wait, since who waits looks again.
const LONGEST_WAIT: f64 = 3600.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_beyond_the_burst() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start, 1000, 100);
        let taken =
            (0..10_000).filter(|i| bucket.take(start + Duration::from_micros(i * 100), 1)).count();
        assert!((1090..=1101).contains(&taken), "{taken}");
    }

    #[test]
    fn credit_is_waited_for() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start, 1000, 100);
        assert_eq!(bucket.charge(start, 100), Duration::ZERO);
        assert_eq!(bucket.charge(start, 500), Duration::from_millis(500));
        assert!(!bucket.take(start + Duration::from_millis(500), 1));
        assert!(bucket.take(start + Duration::from_millis(502), 1));
    }

    #[test]
    fn a_change_keeps_the_level_in_proportion() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(now, 1000, 100);
        assert!(bucket.take(now, 50));
        bucket.set(now, 10, 1000);
        assert!(bucket.take(now, 500) && !bucket.take(now, 1));
        assert_eq!(bucket.ready_at(now, 1), now + Duration::from_millis(100));
        bucket.set(now, 10, 100);
        bucket.set(now, 10, 1_000_000);
        assert!(!bucket.take(now, 1), "nothing was made of nothing");
        assert_eq!(bucket.ready_at(now, u64::MAX), now + Duration::from_secs(3600));
    }

    #[test]
    fn no_rate_is_no_limit() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(now, 0, 0);
        assert!((0..1000).all(|_| bucket.take(now, u64::MAX)));
        assert_eq!(bucket.charge(now, u64::MAX), Duration::ZERO);
    }
}
