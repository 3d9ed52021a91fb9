//! When to tell edges how far a stream has come.
//!
//! A gap shows when the next packet arrives. What was lost at the end of a burst shows only when
//! something says that there was more.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use downpour_repair::{
    message::Heartbeat,
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
    rounds: u64,
}

/// Heartbeats that are due together.
#[derive(Debug)]
pub(super) struct Beats {
    /// Of streams that pause.
    paused: Vec<Heartbeat>,
    /// Of streams that go on.
    going_on: Vec<Heartbeat>,
    /// Counts those in which some go on.
    round: u64,
}

/// What one edge is told of.
#[derive(Debug)]
pub(super) struct Listener {
    /// Which of the edges it is.
    number: u64,
    latency: Duration,
    asked: Option<Instant>,
}

impl Beats {
    pub(super) fn is_empty(&self) -> bool {
        self.paused.is_empty() && self.going_on.is_empty()
    }

    /// Those that are for `edge`.
    pub(super) fn to(&self, edge: &Listener, now: Instant) -> impl Iterator<Item = Heartbeat> {
        let going_on: &[_] = if edge.hears(now, self.round) { &self.going_on } else { &[] };
        self.paused.iter().chain(going_on).copied()
    }
}

impl Listener {
    /// An edge for which packets are of use for so long.
    pub(super) fn new(number: u64, latency: Duration) -> Self {
        Self { number, latency, asked: None }
    }

    /// It asked for something.
    pub(super) fn ask(&mut self, now: Instant) {
        self.asked = Some(now);
    }

    /// Whether it is told in a round of which streams go on: in each if it loses something or has
    /// little time, and otherwise in every second.
    ///
    /// Streams that go on show their gaps by themselves; the rounds are for an edge that nothing
    /// reaches any more but what comes over its connection. A thousand edges cost a datagram and its
    /// acknowledgement each.
    fn hears(&self, now: Instant, round: u64) -> bool {
        let loses = self.asked.is_some_and(|at| now.saturating_duration_since(at) < ASKED_LATELY);
        loses || self.latency < 4 * ROUND || (round ^ self.number) & 1 == 0
    }
}

impl Heartbeats {
    /// The heartbeats that are due, given the newest sequence number that has left of each live
    /// stream: an edge would ask for what has not.
    ///
    /// A stream that goes on is told of every 100 ms, together with all others, if not to every edge
    /// ([`Beats::to`]): what follows within 50 ms shows a gap by itself, and a datagram to each edge
    /// for each frame costs more than the frame. One that pauses is told of after 50 ms, or after
    /// 10 ms if it had paused before this number too, as a stream of few frames does; the packets
    /// themselves come first. Then the same number again after 50, 100, 200 and 400 ms, and every
    /// second.
    pub(super) fn poll(
        &mut self,
        now: Instant,
        live: impl IntoIterator<Item = (Ssrc, Seq)>,
    ) -> Beats {
        self.polls += 1;
        let round = self.last_round.is_none_or(|at| now.saturating_duration_since(at) >= ROUND);
        if round {
            self.last_round = Some(now);
            self.rounds += 1;
        }
        let (mut going_on, mut paused) = (Vec::new(), Vec::new());
        let mut count = 0;
        for (ssrc, newest) in live {
            let beat = self.streams.entry(ssrc).or_insert_with(|| Beat::new(now, newest));
            count += usize::from(beat.polls != self.polls);
            beat.polls = self.polls;
            if beat.poll(now, newest, false) {
                paused.push(Heartbeat { ssrc, last: newest });
            } else if round && beat.poll(now, newest, true) {
                // Who is not told of one that pauses now would be told when it is repeated.
                let list = if beat.pause >= PAUSE { &mut paused } else { &mut going_on };
                list.push(Heartbeat { ssrc, last: newest });
            }
        }
        // Looking for those that ended takes as long as all the rest.
        if count < self.streams.len() {
            self.streams.retain(|_, beat| beat.polls == self.polls);
        }
        Beats { paused, going_on, round: self.rounds }
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
/// For so long an edge counts as one that loses packets.
const ASKED_LATELY: Duration = Duration::from_secs(2);
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

    /// Polls each tick for `ms`, with the newest number at each time; the times of heartbeats to an
    /// edge that asked for something at these times.
    fn run_asking(ms: u64, asks: &[u64], newest: impl Fn(u64) -> u16) -> Vec<(u64, u16)> {
        let (start, mut beats) = (Instant::now(), Heartbeats::default());
        let mut edge = Listener::new(7, Duration::from_millis(500));
        (0..ms)
            .step_by(TICK.as_millis() as usize)
            .flat_map(|at| {
                let now = start + Duration::from_millis(at);
                if asks.contains(&at) {
                    edge.ask(now);
                }
                let due = beats.poll(now, [(SSRC, Seq(newest(at)))]);
                due.to(&edge, now).map(|beat| (at, beat.last.0)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// Polls each tick for `ms`, with the newest number at each time; the times of heartbeats to an
    /// edge that loses something.
    fn run(ms: u64, newest: impl Fn(u64) -> u16) -> Vec<(u64, u16)> {
        let asks: Vec<_> = (0..ms).step_by(1000).collect();
        run_asking(ms, &asks, newest)
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
    fn who_loses_nothing_is_told_half_as_often_and_of_tails_as_soon() {
        let beats = run_asking(4000, &[1050], |at| (at / 10) as u16);
        let steps = |range: std::ops::Range<u64>| {
            let times: Vec<_> =
                beats.iter().map(|beat| beat.0).filter(|at| range.contains(at)).collect();
            times.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>()
        };
        assert!(steps(0..1000).iter().all(|step| *step == 200), "{beats:?}");
        assert!(steps(1100..3000).iter().all(|step| *step == 100), "{beats:?}");
        assert!(steps(3100..4000).iter().all(|step| *step == 200), "{beats:?}");
        // Whether the round before the last number was one of its own or not.
        for stops_at in (400..800).step_by(10) {
            let beats = run_asking(2000, &[], |at| (at.min(stops_at) / 10) as u16);
            let soon = beats.iter().find(|(_, seq)| u64::from(*seq) == stops_at / 10);
            assert!(soon.is_some_and(|(at, _)| at - stops_at <= 50), "{stops_at}: {beats:?}");
        }
        // Of frames with long pauses between, all and at once, whether they fall on a round or not.
        let beats = run_asking(4000, &[], |at| (at / 190) as u16);
        let soon = |n: u64| beats.iter().any(|beat| (n * 190..=n * 190 + 20).contains(&beat.0));
        assert!((1..20).all(soon), "{beats:?}");
        // Edges do not all have the same rounds, and one that has little time has all.
        let (now, long) = (Instant::now(), Duration::from_secs(1));
        let rounds = |edge: Listener| [1, 2, 3, 4].map(|round| edge.hears(now, round));
        assert_eq!(rounds(Listener::new(2, long)), [false, true, false, true]);
        assert_eq!(rounds(Listener::new(3, long)), [true, false, true, false]);
        assert_eq!(rounds(Listener::new(3, 3 * ROUND)), [true; 4]);
    }

    #[test]
    fn an_ended_stream_is_forgotten() {
        let (now, mut beats) = (Instant::now(), Heartbeats::default());
        beats.poll(now, [(SSRC, Seq(1)), (Ssrc(2), Seq(1))]);
        beats.poll(now, [(Ssrc(2), Seq(1))]);
        assert_eq!(beats.streams.len(), 1);
    }
}
