//! When to tell edges how far a stream has come.
//!
//! A gap shows when the next packet arrives. What was lost at the end of a burst shows only when
//! something says that there was more.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::{
    repair::message::Heartbeat,
    rtp::{Seq, Ssrc},
};

/// How often [`Heartbeats::poll`] wants to be called.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// What was told of each live stream, and when.
#[derive(Debug, Default)]
pub(super) struct Heartbeats {
    streams: HashMap<Ssrc, Beat>,
    polls: u64,
}

impl Heartbeats {
    /// The heartbeats that are due, given the newest sequence number that has left of each live
    /// stream: an edge would ask for what has not.
    ///
    /// A new number is told once the stream has been quiet for 10 ms, so that the packets
    /// themselves come first. A stream that pauses after each frame, as most do, is told of every
    /// 100 ms: what follows within 50 ms shows a gap by itself, and a heartbeat to each edge costs more
    /// than the frame. Then the same number again after 50, 100, 200 and 400 ms, and every second.
    pub(super) fn poll(
        &mut self,
        now: Instant,
        live: impl IntoIterator<Item = (Ssrc, Seq)>,
    ) -> Vec<Heartbeat> {
        self.polls += 1;
        let mut due = Vec::new();
        let mut count = 0;
        for (ssrc, newest) in live {
            let beat = self.streams.entry(ssrc).or_insert_with(|| Beat::new(now, newest));
            count += usize::from(beat.polls != self.polls);
            beat.polls = self.polls;
            if beat.poll(now, newest) {
                due.push(Heartbeat { ssrc, last: newest });
            }
        }
        // Looking for those that ended takes as long as all the rest.
        if count < self.streams.len() {
            self.streams.retain(|_, beat| beat.polls == self.polls);
        }
        due
    }
}

#[derive(Debug)]
struct Beat {
    newest: Seq,
    changed: Instant,
    /// When the oldest news that was not told came.
    untold: Instant,
    /// What was told last, and when.
    told: Option<Seq>,
    told_at: Instant,
    /// When a new number was told last.
    news_at: Option<Instant>,
    /// How often `told` was repeated since it was the newest.
    repeats: usize,
    /// At which poll the stream was there last.
    polls: u64,
}

impl Beat {
    fn new(now: Instant, newest: Seq) -> Self {
        Self {
            newest,
            changed: now,
            untold: now,
            told: None,
            told_at: now,
            news_at: None,
            repeats: 0,
            polls: 0,
        }
    }

    fn poll(&mut self, now: Instant, newest: Seq) -> bool {
        if newest != self.newest {
            if self.told == Some(self.newest) {
                self.untold = now;
            }
            self.newest = newest;
            self.changed = now;
        }
        let quiet = now.saturating_duration_since(self.changed);
        let since_told = now.saturating_duration_since(self.told_at);
        let due = if self.told == Some(self.newest) {
            match REPEATS.get(self.repeats) {
                Some(after) => quiet >= *after,
                None => since_told >= IDLE_INTERVAL,
            }
        } else {
            let spaced = |at| now.saturating_duration_since(at) >= SPACING;
            let enough = if self.news_at.is_none_or(spaced) { QUIET } else { PAUSE };
            quiet >= enough || now.saturating_duration_since(self.untold) >= LONGEST_UNTOLD
        };
        if due {
            self.repeats += 1;
            if self.told != Some(self.newest) {
                (self.repeats, self.news_at) = (0, Some(now));
            }
            self.told = Some(self.newest);
            self.told_at = now;
        }
        due
    }
}

const QUIET: Duration = Duration::from_millis(10);
/// Longer than from one frame to the next.
const PAUSE: Duration = Duration::from_millis(50);
/// Between heartbeats of a stream that goes on.
const SPACING: Duration = Duration::from_millis(100);
const LONGEST_UNTOLD: Duration = Duration::from_millis(90);
const REPEATS: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
];
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    const SSRC: Ssrc = Ssrc(1);

    /// Polls each tick for `ms`, with the newest number at each time; the times of heartbeats.
    fn run(ms: u64, newest: impl Fn(u64) -> u16) -> Vec<(u64, u16)> {
        let (start, mut beats) = (Instant::now(), Heartbeats::default());
        (0..ms)
            .step_by(TICK.as_millis() as usize)
            .flat_map(|at| {
                let now = start + Duration::from_millis(at);
                let due = beats.poll(now, [(SSRC, Seq(newest(at)))]);
                due.into_iter().map(move |beat| (at, beat.last.0)).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn a_tail_is_told_soon_and_then_ever_less_often() {
        let beats = run(3400, |at| if at < 100 { 7 } else { 9 });
        let times: Vec<_> = beats.iter().filter(|(_, seq)| *seq == 9).map(|(at, _)| *at).collect();
        assert_eq!(times, [110, 150, 200, 300, 500, 1500, 2500]);
    }

    #[test]
    fn a_stream_that_never_pauses_is_told_each_100_ms() {
        let beats = run(1000, |at| (at / 10) as u16);
        assert!((9..=10).contains(&beats.len()), "{beats:?}");
        assert!(beats.windows(2).all(|pair| pair[1].0 - pair[0].0 == 100), "{beats:?}");
    }

    #[test]
    fn frames_with_pauses_between_are_told_of_ten_times_a_second() {
        let beats = run(2000, |at| (at / 40) as u16);
        assert!((16..=21).contains(&beats.len()), "{beats:?}");
        // Slower than that, each pause is one in which something may be missing for long.
        let beats = run(2000, |at| (at / 200) as u16);
        let news: Vec<_> = (1..10).map(|n| n * 200 + 10).collect();
        assert!(news.iter().all(|at| beats.iter().any(|beat| beat.0 == *at)), "{beats:?}");
    }

    #[test]
    fn an_ended_stream_is_forgotten() {
        let (now, mut beats) = (Instant::now(), Heartbeats::default());
        beats.poll(now, [(SSRC, Seq(1)), (Ssrc(2), Seq(1))]);
        beats.poll(now, [(Ssrc(2), Seq(1))]);
        assert_eq!(beats.streams.len(), 1);
    }
}
