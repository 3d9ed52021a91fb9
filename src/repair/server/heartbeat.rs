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
    /// When all streams that go on were told of last.
    last_round: Option<Instant>,
}

impl Heartbeats {
    /// The heartbeats that are due, given the newest sequence number that has left of each live
    /// stream: an edge would ask for what has not.
    ///
    /// A stream that goes on is told of every 100 ms, together with all others: what follows within
    /// 50 ms shows a gap by itself, and a datagram to each edge for each frame costs more than the
    /// frame. One that pauses is told of after 50 ms, or after 10 ms if it had paused before this
    /// number too, as a stream of few frames does; the packets themselves come first. Then the same
    /// number again after 50, 100, 200 and 400 ms, and every second.
    pub(super) fn poll(
        &mut self,
        now: Instant,
        live: impl IntoIterator<Item = (Ssrc, Seq)>,
    ) -> Vec<Heartbeat> {
        self.polls += 1;
        let round = self.last_round.is_none_or(|at| now.saturating_duration_since(at) >= ROUND);
        if round {
            self.last_round = Some(now);
        }
        let (mut due, mut urgent) = (Vec::new(), Vec::new());
        let mut count = 0;
        for (ssrc, newest) in live {
            let beat = self.streams.entry(ssrc).or_insert_with(|| Beat::new(now, newest));
            count += usize::from(beat.polls != self.polls);
            beat.polls = self.polls;
            if beat.poll(now, newest, false) {
                urgent.push(Heartbeat { ssrc, last: newest });
            } else if round && beat.poll(now, newest, true) {
                due.push(Heartbeat { ssrc, last: newest });
            }
        }
        // Looking for those that ended takes as long as all the rest.
        if count < self.streams.len() {
            self.streams.retain(|_, beat| beat.polls == self.polls);
        }
        urgent.append(&mut due);
        urgent
    }
}

#[derive(Debug)]
struct Beat {
    newest: Seq,
    changed: Instant,
    /// What was told last, and when.
    told: Option<Seq>,
    told_at: Instant,
    /// How long it had been quiet before the newest number.
    pause: Duration,
    /// How often `told` was repeated since it was the newest.
    repeats: usize,
    /// At which poll the stream was there last.
    polls: u64,
}

impl Beat {
    fn new(now: Instant, newest: Seq) -> Self {
        Self { newest, changed: now, told: None, told_at: now, pause: PAUSE, repeats: 0, polls: 0 }
    }

    /// Whether it is to be told of now, `round` saying that all are that go on.
    fn poll(&mut self, now: Instant, newest: Seq, round: bool) -> bool {
        if newest != self.newest {
            self.pause = now.saturating_duration_since(self.changed);
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
            round || quiet >= if self.pause >= PAUSE { QUIET } else { PAUSE }
        };
        if due {
            self.repeats = if self.told == Some(self.newest) { self.repeats + 1 } else { 0 };
            self.told = Some(self.newest);
            self.told_at = now;
        }
        due
    }
}

const QUIET: Duration = Duration::from_millis(10);
/// Longer than from one frame to the next.
const PAUSE: Duration = Duration::from_millis(50);
/// Between heartbeats of streams that go on.
const ROUND: Duration = Duration::from_millis(100);
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
        let beats = run(3400, |at| if at <= 100 { 7 } else { 9 });
        let times: Vec<_> = beats.iter().filter(|(_, seq)| *seq == 9).map(|(at, _)| *at).collect();
        assert_eq!(times, [120, 160, 210, 310, 510, 1510, 2510]);
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
        let soon = |news: u64| beats.iter().any(|beat| (news..=news + 10).contains(&beat.0));
        assert!((1..10).all(|n| soon(n * 200)), "{beats:?}");
    }

    #[test]
    fn an_ended_stream_is_forgotten() {
        let (now, mut beats) = (Instant::now(), Heartbeats::default());
        beats.poll(now, [(SSRC, Seq(1)), (Ssrc(2), Seq(1))]);
        beats.poll(now, [(Ssrc(2), Seq(1))]);
        assert_eq!(beats.streams.len(), 1);
    }
}
