//! The paths that one publication's packets come over: one, or two of which each brings all.

use std::{
    ops::Range,
    time::{Duration, Instant},
};

use super::stats::PathStats;

/// Paths that a publication can come over.
pub const MAX_PATHS: usize = 2;

/// What each path has brought, and how far one is behind the other.
#[derive(Debug, Default)]
pub(super) struct Paths {
    paths: [Option<PathState>; MAX_PATHS],
    /// Where and when numbers were first seen, by their low bits. Kept only while there are two
    /// paths.
    first_seen: Vec<Option<(u64, Instant)>>,
}

#[derive(Debug)]
struct PathState {
    /// The numbers that it could have brought begin here.
    first: u64,
    newest: u64,
    /// Bit i: `newest - i` came.
    seen: u128,
    last_at: Instant,
    /// How long after the other path it brings the same packet: follows the longest, slowly
    /// forgets it.
    skew: Option<Duration>,
}

impl Paths {
    /// A packet came, which may have been asked for; gives the numbers that the path passed over to
    /// it.
    pub(super) fn arrived(
        &mut self,
        now: Instant,
        path: usize,
        number: u64,
        was_asked: bool,
        stats: &mut PathStats,
    ) -> Range<u64> {
        stats.received += 1;
        self.note_skew(now, path, number);
        let Some(state) = &mut self.paths[path] else {
            let skew = None;
            let state = PathState { first: number, newest: number, seen: 1, last_at: now, skew };
            self.paths[path] = Some(state);
            return number..number;
        };
        state.last_at = now;
        if number > state.newest {
            let passed = state.newest + 1..number;
            let ahead = number - state.newest;
            stats.lost += ahead - 1;
            stats.gaps += u64::from(ahead > 1);
            state.seen = if ahead < 128 { state.seen << ahead | 1 } else { 1 };
            state.newest = number;
            return passed;
        }
        let behind = state.newest - number;
        if number >= state.first && behind < 128 && state.seen & (1 << behind) == 0 {
            state.seen |= 1 << behind;
            // What was asked for may be its repair, sent to all of a group: the path did lose it.
            stats.lost = stats.lost.saturating_sub(u64::from(!was_asked));
        }
        number..number
    }

    /// Whether nothing has come over any other path.
    pub(super) fn is_alone(&self, path: usize) -> bool {
        self.paths.iter().enumerate().all(|(i, state)| i == path || state.is_none())
    }

    /// So many more packets came, each behind the one before, the last of them at `now`, while the
    /// path was alone. As [`Paths::arrived`] for each, which passed over nothing.
    pub(super) fn came_in_a_row(&mut self, now: Instant, path: usize, count: u64) {
        if let Some(state) = &mut self.paths[path] {
            state.last_at = now;
            state.newest += count;
            state.seen = match count {
                0..128 => state.seen << count | ((1 << count) - 1),
                _ => u128::MAX,
            };
        }
    }

    /// How long to wait for the other path to bring what `path` has just passed over, at most
    /// `cap`; none if it has passed it too, or brings nothing.
    pub(super) fn wait_for_other(
        &self,
        now: Instant,
        path: usize,
        number: u64,
        cap: Duration,
    ) -> Duration {
        let other = self.paths.iter().enumerate().filter(|(i, _)| *i != path);
        let behind = other.filter_map(|(_, state)| state.as_ref()).find(|state| {
            state.newest < number && now.saturating_duration_since(state.last_at) < ALIVE
        });
        match behind {
            Some(state) => state.skew.map_or(cap, |skew| (skew * 5 / 4 + SKEW_MARGIN).min(cap)),
            None => Duration::ZERO,
        }
    }

    /// The sender began anew: numbers mean other packets now.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    fn note_skew(&mut self, now: Instant, path: usize, number: u64) {
        let two = self.paths.iter().enumerate().any(|(i, state)| i != path && state.is_some());
        if !two {
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

/// A path that has brought nothing for so long is not waited for.
const ALIVE: Duration = Duration::from_millis(300);
const SKEW_MARGIN: Duration = Duration::from_millis(2);
/// More than two paths are ever apart, in packets, at rates where asking early is dear.
const FIRST_SEEN: usize = 1024;
