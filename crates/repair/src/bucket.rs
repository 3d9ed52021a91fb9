//! Token bucket.

use std::time::{Duration, Instant};

/// Token bucket: refills at a steady rate up to a burst.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// Tokens per second; 0 for no limit.
    rate: u64,
    burst: f64,
    tokens: f64,
    filled_at: Instant,
}

impl TokenBucket {
    /// Creates a full bucket of `rate` tokens per second (0 for no limit) and `burst` tokens, at
    /// least 1.
    pub fn new(now: Instant, rate: u64, burst: u64) -> Self {
        let burst = burst.max(1) as f64;
        Self { rate, burst, tokens: burst, filled_at: now }
    }

    /// Changes rate and burst. The fill level stays the same in proportion to the burst, so that
    /// repeated changes create no tokens.
    pub fn set(&mut self, now: Instant, rate: u64, burst: u64) {
        self.fill(now);
        let burst = burst.max(1) as f64;
        self.tokens *= burst / self.burst;
        self.rate = rate;
        self.burst = burst;
    }

    /// Takes `count` tokens. Returns `false` and takes none if there are fewer.
    pub fn take(&mut self, now: Instant, count: u64) -> bool {
        if self.rate == 0 {
            return true;
        }
        self.fill(now);
        // A count above the burst would never pass.
        let count = (count as f64).min(self.burst);
        let enough = self.tokens >= count;
        if enough {
            self.tokens -= count;
        }
        enough
    }

    /// Takes `count` tokens, on credit if necessary. Returns the time until the credit is refilled.
    pub fn charge(&mut self, now: Instant, count: u64) -> Duration {
        if self.rate == 0 {
            return Duration::ZERO;
        }
        self.fill(now);
        self.tokens -= count as f64;
        Duration::from_secs_f64((-self.tokens).max(0.0) / self.rate as f64)
    }

    /// Returns when [`TokenBucket::take`] will succeed for `count` tokens, if none are taken before.
    pub fn ready_at(&mut self, now: Instant, count: u64) -> Instant {
        if self.rate == 0 {
            return now;
        }
        self.fill(now);
        let missing = ((count as f64).min(self.burst) - self.tokens).max(0.0);
        now + Duration::from_secs_f64((missing / self.rate as f64).min(LONGEST_WAIT))
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled_at).as_secs_f64();
        self.tokens = (self.tokens + elapsed * self.rate as f64).min(self.burst);
        self.filled_at = now;
    }
}

/// Longest wait returned, in seconds; avoids overflow at tiny rates.
const LONGEST_WAIT: f64 = 3600.0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throughput_is_burst_plus_rate() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start, 1000, 100);
        let taken =
            (0..10_000).filter(|i| bucket.take(start + Duration::from_micros(i * 100), 1)).count();
        assert!((1090..=1101).contains(&taken), "{taken}");
    }

    #[test]
    fn charge_returns_the_wait_for_its_credit() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start, 1000, 100);
        assert_eq!(bucket.charge(start, 100), Duration::ZERO);
        assert_eq!(bucket.charge(start, 500), Duration::from_millis(500));
        assert!(!bucket.take(start + Duration::from_millis(500), 1));
        assert!(bucket.take(start + Duration::from_millis(502), 1));
    }

    #[test]
    fn a_change_keeps_the_fill_level_in_proportion() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(now, 1000, 100);
        assert!(bucket.take(now, 50));
        bucket.set(now, 10, 1000);
        assert!(bucket.take(now, 500) && !bucket.take(now, 1));
        assert_eq!(bucket.ready_at(now, 1), now + Duration::from_millis(100));
        bucket.set(now, 10, 100);
        bucket.set(now, 10, 1_000_000);
        assert!(!bucket.take(now, 1), "changes create no tokens");
        assert_eq!(bucket.ready_at(now, u64::MAX), now + Duration::from_secs(3600));
    }

    #[test]
    fn rate_zero_is_no_limit() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(now, 0, 0);
        assert!((0..1000).all(|_| bucket.take(now, u64::MAX)));
        assert_eq!(bucket.charge(now, u64::MAX), Duration::ZERO);
    }
}
