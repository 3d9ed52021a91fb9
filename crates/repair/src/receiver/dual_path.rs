//! Reception over two paths, each of which carries the whole publication.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use super::stats::PathStats;

/// Paths per publication.
pub const MAX_PATHS: usize = 2;

/// Reception state of each path, and the skew between them.
///
/// A path is unknown until its first packet, then known until [`Self::reset`]. Invariant: `first_seen`
/// is empty until two paths are known.
#[derive(Debug, Default)]
pub(super) struct DualPath {
    paths: [Option<PathState>; MAX_PATHS],
    /// Number and time of first arrivals, indexed by the number modulo the length.
    first_seen: Vec<Option<(u64, Instant)>>,
}

#[derive(Debug)]
struct PathState {
    /// First number received on the path; earlier ones do not count as lost.
    first: u64,
    newest: u64,
    /// Bit i: `newest - i` was received.
    received: u128,
    last_at: Instant,
    /// Delay after the other path's copy of the same packet: peak hold with slow decay (1/32).
    skew: Option<Duration>,
}

impl DualPath {
    /// Records a live packet; `was_asked` if it had been requested. Returns the numbers that the path
    /// skipped before it.
    pub(super) fn record(
        &mut self,
        now: Instant,
        path: usize,
        number: u64,
        was_asked: bool,
        stats: &mut PathStats,
    ) -> Range<u64> {
        stats.received += 1;
        self.record_skew(now, path, number);
        let Some(state) = &mut self.paths[path] else {
            let skew = None;
            let state =
                PathState { first: number, newest: number, received: 1, last_at: now, skew };
            self.paths[path] = Some(state);
            return number..number;
        };
        state.last_at = now;
        if number > state.newest {
            let skipped = state.newest + 1..number;
            let ahead = number - state.newest;
            stats.lost += ahead - 1;
            stats.gaps += u64::from(ahead > 1);
            state.received = if ahead < 128 { state.received << ahead | 1 } else { 1 };
            state.newest = number;
            return skipped;
        }
        let behind = state.newest - number;
        if number >= state.first && behind < 128 && state.received & (1 << behind) == 0 {
            state.received |= 1 << behind;
            // If it was requested, it may be a repair sent to a multicast group: the path did lose it.
            stats.lost = stats.lost.saturating_sub(u64::from(!was_asked));
        }
        number..number
    }

    /// `true` if nothing has arrived over any other path.
    pub(super) fn is_only(&self, path: usize) -> bool {
        self.paths.iter().enumerate().all(|(i, state)| i == path || state.is_none())
    }

    /// Records `count` consecutive packets of the only path, the last received at `now`. Equivalent to
    /// [`Self::record`] for each, except for the statistics.
    pub(super) fn record_run(&mut self, now: Instant, path: usize, count: u64) {
        if let Some(state) = &mut self.paths[path] {
            state.last_at = now;
            state.newest += count;
            state.received = match count {
                0..128 => state.received << count | ((1 << count) - 1),
                _ => u128::MAX,
            };
        }
    }

    /// Returns how long to wait for the other path to deliver `number`, which `path` has just skipped:
    /// at most `cap`, and zero if the other path has skipped it too or is silent.
    pub(super) fn wait_for_other(
        &self,
        now: Instant,
        path: usize,
        number: u64,
        cap: Duration,
    ) -> Duration {
        let other = self.paths.iter().enumerate().filter(|(i, _)| *i != path);
        let lagging = other.filter_map(|(_, state)| state.as_ref()).find(|state| {
            state.newest < number && now.saturating_duration_since(state.last_at) < SILENT_AFTER
        });
        match lagging {
            Some(state) => state.skew.map_or(cap, |skew| (skew * 5 / 4 + SKEW_MARGIN).min(cap)),
            None => Duration::ZERO,
        }
    }

    /// Forgets everything, because the sender restarted.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn record_skew(&mut self, now: Instant, path: usize, number: u64) {
        let has_other =
            self.paths.iter().enumerate().any(|(i, state)| i != path && state.is_some());
        if !has_other {
            return;
        }
        if self.first_seen.is_empty() {
            self.first_seen = vec![None; FIRST_SEEN];
        }
        let slot = &mut self.first_seen[number as usize % FIRST_SEEN];
        match (*slot, &mut self.paths[path]) {
            (Some((seen, at)), Some(state)) if seen == number => {
                let behind = now.saturating_duration_since(at);
                state.skew = Some(match state.skew {
                    Some(skew) if skew > behind => skew - (skew - behind) / 32,
                    _ => behind,
                });
            }
            (Some((seen, _)), _) if seen >= number => {}
            _ => {
                *slot = Some((number, now));
                if let Some(state) = &mut self.paths[path] {
                    state.skew = state.skew.map(|skew| skew - skew / 32);
                }
            }
        }
    }
}

/// A path without a packet for this time is not waited for.
const SILENT_AFTER: Duration = Duration::from_millis(300);
const SKEW_MARGIN: Duration = Duration::from_millis(2);
/// Packets by which two paths may be apart for the skew to be measured.
const FIRST_SEEN: usize = 1024;
