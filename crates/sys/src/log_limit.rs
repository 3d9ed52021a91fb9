//! Limits how often a log line repeats, so that a flood of events does not flood the log.
//!
//! [`LogLimit`] is for one line, [`KeyedLogLimit`] for one line per key (an address, a stream). Both
//! count the lines that were left out, which the next line reports as `missed`. They read no clock
//! and need no runtime: the caller passes the time.

use std::{
    collections::HashMap,
    hash::Hash,
    time::{Duration, Instant},
};

/// Limit of one repeated log line.
///
/// ```
/// use std::time::Instant;
/// use downpour_sys::LogLimit;
///
/// let (mut limit, now) = (LogLimit::new(), Instant::now());
/// assert_eq!(limit.due(now), Some(0));
/// assert_eq!(limit.due(now), None);
/// assert_eq!(limit.due(now + LogLimit::INTERVAL), Some(1));
/// ```
#[derive(Debug, Clone)]
pub struct LogLimit {
    interval: Duration,
    /// Lines per interval.
    burst: u32,
    /// When the current interval began.
    last: Option<Instant>,
    /// Lines of the current interval.
    used: u32,
    missed: u64,
}

impl LogLimit {
    /// The usual time between two lines.
    pub const INTERVAL: Duration = Duration::from_secs(10);

    /// A limit of one line per [`LogLimit::INTERVAL`].
    pub const fn new() -> Self {
        Self::every(Self::INTERVAL)
    }

    /// A limit of one line per `interval`.
    pub const fn every(interval: Duration) -> Self {
        Self { interval, burst: 1, last: None, used: 0, missed: 0 }
    }

    /// The same with `burst` lines per interval.
    #[must_use]
    pub const fn with_burst(self, burst: u32) -> Self {
        Self { burst, ..self }
    }

    /// Returns how many lines were left out since the last one if a line is due at `now`, and
    /// `None` if this line is to be left out too.
    pub fn due(&mut self, now: Instant) -> Option<u64> {
        if !self.is_active(now) {
            self.last = Some(now);
            self.used = 0;
        }
        if self.used >= self.burst {
            self.missed += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.missed))
    }

    /// `true` until the interval of the last line is over.
    fn is_active(&self, now: Instant) -> bool {
        self.last.is_some_and(|last| now.saturating_duration_since(last) < self.interval)
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

/// Limits of a log line that repeats for many keys: one line per key and interval.
///
/// Memory is bounded. Once `max_keys` keys were logged within an interval, all further keys share
/// one limit, so that peers that make up keys cannot flood the log either.
#[derive(Debug, Clone)]
pub struct KeyedLogLimit<K> {
    /// The limit of a new key.
    new: LogLimit,
    max_keys: usize,
    limits: HashMap<K, LogLimit>,
    overflow: LogLimit,
    /// Once per interval, so that a flood of new keys does not search all keys each time.
    purge: LogLimit,
}

impl<K: Hash + Eq> KeyedLogLimit<K> {
    /// A limit of one line per key and [`LogLimit::INTERVAL`].
    pub fn new(max_keys: usize) -> Self {
        Self::every(LogLimit::INTERVAL, max_keys)
    }

    /// A limit of one line per key and `interval`.
    pub fn every(interval: Duration, max_keys: usize) -> Self {
        let new = LogLimit::every(interval);
        let (overflow, purge) = (new.clone(), new.clone());
        Self { new, max_keys, limits: HashMap::new(), overflow, purge }
    }

    /// The same with `burst` lines per key and interval.
    #[must_use]
    pub fn with_burst(mut self, burst: u32) -> Self {
        self.new = self.new.with_burst(burst);
        self.overflow = self.overflow.with_burst(burst);
        self
    }

    /// As [`LogLimit::due`], for `key`.
    pub fn due(&mut self, now: Instant, key: K) -> Option<u64> {
        if let Some(limit) = self.limits.get_mut(&key) {
            return limit.due(now);
        }
        if self.limits.len() >= self.max_keys && self.purge.due(now).is_some() {
            // The counts of keys that have fallen silent are lost with them.
            self.limits.retain(|_, limit| limit.is_active(now));
        }
        if self.limits.len() >= self.max_keys {
            return self.overflow.due(now);
        }
        self.limits.entry(key).or_insert_with(|| self.new.clone()).due(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_per_interval_reports_the_lines_left_out() {
        let (mut limit, start) = (LogLimit::new(), Instant::now());
        let lines: Vec<_> =
            (0..300u32).filter_map(|i| limit.due(start + LogLimit::INTERVAL * i / 100)).collect();
        assert_eq!(lines, [0, 99, 99]);
    }

    #[test]
    fn a_line_is_due_again_exactly_one_interval_later() {
        let (mut limit, start) = (LogLimit::every(Duration::from_secs(1)), Instant::now());
        assert_eq!(limit.due(start), Some(0));
        assert_eq!(limit.due(start + Duration::from_millis(999)), None);
        assert_eq!(limit.due(start + Duration::from_secs(1)), Some(1));
    }

    #[test]
    fn a_burst_of_lines_is_due_per_interval() {
        let (mut limit, start) = (LogLimit::new().with_burst(3), Instant::now());
        let lines: Vec<_> = (0..10).map(|_| limit.due(start)).collect();
        assert_eq!(lines[..4], [Some(0), Some(0), Some(0), None]);
        assert_eq!(limit.due(start + LogLimit::INTERVAL), Some(7));
        assert_eq!(limit.due(start + LogLimit::INTERVAL), Some(0));
        let (mut limits, now) = (KeyedLogLimit::new(8).with_burst(2), Instant::now());
        let lines = (0..30).filter(|i| limits.due(now, i % 3).is_some()).count();
        assert_eq!(lines, 6);
    }

    #[test]
    fn a_clock_that_steps_back_leaves_lines_out() {
        let (mut limit, start) = (LogLimit::new(), Instant::now() + LogLimit::INTERVAL);
        assert_eq!(limit.due(start), Some(0));
        assert_eq!(limit.due(start - Duration::from_secs(5)), None);
    }

    #[test]
    fn keys_have_separate_limits() {
        let (mut limits, now) = (KeyedLogLimit::new(8), Instant::now());
        assert_eq!(limits.due(now, "a"), Some(0));
        assert_eq!(limits.due(now, "a"), None);
        assert_eq!(limits.due(now, "b"), Some(0));
        assert_eq!(limits.due(now + LogLimit::INTERVAL, "a"), Some(1));
        assert_eq!(limits.due(now + LogLimit::INTERVAL, "b"), Some(0));
    }

    #[test]
    fn many_keys_share_one_limit_and_bounded_memory() {
        let (mut limits, now) = (KeyedLogLimit::new(8), Instant::now());
        let lines = (0..10_000).filter(|key| limits.due(now, *key).is_some()).count();
        assert_eq!(lines, 8 + 1);
        assert_eq!(limits.limits.len(), 8);
        // A new key finds room once the others have fallen silent.
        assert_eq!(limits.due(now + LogLimit::INTERVAL, -1), Some(0));
        assert_eq!(limits.limits.len(), 1);
    }
}
