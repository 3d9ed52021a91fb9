//! Schedule of heartbeats: the newest sequence number of each stream, sent to edges.
//!
//! A receiver detects a lost packet when a later one arrives. Losses at the end of a burst show only by
//! a heartbeat.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use downpour_repair::{
    message::Heartbeat,
    rtp::{Seq, Ssrc},
};

/// Interval at which [`Heartbeats::poll`] is to be called.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// Heartbeat schedule of all live streams.
///
/// States of a stream, and when its heartbeats are sent:
///
/// | state | entered when | heartbeats |
/// |---|---|---|
/// | active | its newest packet is new | one per 100 ms round, to the edges chosen by [`DueHeartbeats::to`] |
/// | paused | no new packet for 50 ms; 10 ms if it paused before the newest packet too | at once, then 50, 100, 200 and 400 ms after the newest packet, to all edges |
/// | idle | those are sent | one per second, to all edges |
/// | gone | not among the live streams of a poll | none |
///
/// While a stream is active, the next packet shows a gap within 50 ms, and one datagram per frame and
/// edge would cost more than the frame.
#[derive(Debug, Default)]
pub(super) struct Heartbeats {
    streams: HashMap<Ssrc, StreamState>,
    polls: u64,
    /// Start of the latest round for active streams.
    last_round: Option<Instant>,
    rounds: u64,
}

/// Heartbeats that are due at one poll.
#[derive(Debug)]
pub(super) struct DueHeartbeats {
    /// Heartbeats of paused and idle streams.
    paused: Vec<Heartbeat>,
    /// Heartbeats of active streams.
    active: Vec<Heartbeat>,
    /// The number of the latest round for active streams.
    round: u64,
}

/// Receiver of heartbeats: what decides which rounds one edge gets.
#[derive(Debug)]
pub(super) struct HeartbeatReceiver {
    /// The number of the edge.
    number: u64,
    latency: Duration,
    /// When it requested a packet last.
    requested: Option<Instant>,
}

impl DueHeartbeats {
    pub(super) fn is_empty(&self) -> bool {
        self.paused.is_empty() && self.active.is_empty()
    }

    /// The heartbeats for one edge.
    pub(super) fn to(
        &self,
        edge: &HeartbeatReceiver,
        now: Instant,
    ) -> impl Iterator<Item = Heartbeat> {
        let active: &[_] = if edge.gets_round(now, self.round) { &self.active } else { &[] };
        self.paused.iter().chain(active).copied()
    }
}

impl HeartbeatReceiver {
    /// Edge number `number`, with its playout latency.
    pub(super) fn new(number: u64, latency: Duration) -> Self {
        Self { number, latency, requested: None }
    }

    /// The edge has requested a packet.
    pub(super) fn requested(&mut self, now: Instant) {
        self.requested = Some(now);
    }

    /// `true` if the edge gets a round for active streams: each round if it loses packets or has a
    /// short latency, otherwise every other round.
    ///
    /// The next packet of an active stream shows a gap anyway. The rounds are for edges whose RTP path
    /// has failed, so that only their connection works. Each costs one datagram and its
    /// acknowledgement per edge.
    fn gets_round(&self, now: Instant, round: u64) -> bool {
        let since = |at: Instant| now.saturating_duration_since(at);
        let loses = self.requested.is_some_and(|at| since(at) < LOSS_MEMORY);
        loses || self.latency < 4 * ROUND || (round ^ self.number) & 1 == 0
    }
}

impl Heartbeats {
    /// Returns the heartbeats that are due. `live` has the newest sequence number of each live stream
    /// that was sent: with a newer one, edges would request packets that the pacer still holds.
    pub(super) fn poll(
        &mut self,
        now: Instant,
        live: impl IntoIterator<Item = (Ssrc, Seq)>,
    ) -> DueHeartbeats {
        self.polls += 1;
        let round = self.last_round.is_none_or(|at| now.saturating_duration_since(at) >= ROUND);
        if round {
            self.last_round = Some(now);
            self.rounds += 1;
        }
        let (mut active, mut paused) = (Vec::new(), Vec::new());
        let mut count = 0;
        for (ssrc, newest) in live {
            let state = self.streams.entry(ssrc).or_insert_with(|| StreamState::new(now, newest));
            count += usize::from(state.polls != self.polls);
            state.polls = self.polls;
            if state.poll(now, newest, false) {
                paused.push(Heartbeat { ssrc, last: newest });
            } else if round && state.poll(now, newest, true) {
                // A stream of few frames goes to all edges: one that is left out would have to wait
                // for the repeat.
                let list = if state.pause >= PAUSE { &mut paused } else { &mut active };
                list.push(Heartbeat { ssrc, last: newest });
            }
        }
        // Only if there are ended streams: the scan takes as long as the rest of the poll.
        if count < self.streams.len() {
            self.streams.retain(|_, state| state.polls == self.polls);
        }
        DueHeartbeats { paused, active, round: self.rounds }
    }
}

/// Heartbeat state of one stream.
#[derive(Debug)]
struct StreamState {
    newest: Seq,
    /// When `newest` changed.
    changed: Instant,
    /// The sequence number of the latest heartbeat.
    sent: Option<Seq>,
    sent_at: Instant,
    /// Time without packets before `newest`.
    pause: Duration,
    /// How many times the heartbeat of `newest` was repeated.
    repeats: usize,
    /// The latest poll in which the stream was live.
    polls: u64,
}

impl StreamState {
    fn new(now: Instant, newest: Seq) -> Self {
        Self { newest, changed: now, sent: None, sent_at: now, pause: PAUSE, repeats: 0, polls: 0 }
    }

    /// Returns `true` if a heartbeat is due. `round` is `true` in a round for active streams.
    fn poll(&mut self, now: Instant, newest: Seq, round: bool) -> bool {
        if newest != self.newest {
            self.pause = now.saturating_duration_since(self.changed);
            self.newest = newest;
            self.changed = now;
        }
        let quiet = now.saturating_duration_since(self.changed);
        let since_sent = now.saturating_duration_since(self.sent_at);
        let due = if self.sent == Some(self.newest) {
            match REPEATS.get(self.repeats) {
                Some(after) => quiet >= *after,
                None => since_sent >= IDLE_INTERVAL,
            }
        } else {
            round || quiet >= if self.pause >= PAUSE { SHORT_PAUSE } else { PAUSE }
        };
        if due {
            self.repeats = if self.sent == Some(self.newest) { self.repeats + 1 } else { 0 };
            self.sent = Some(self.newest);
            self.sent_at = now;
        }
        due
    }
}

/// Time without packets after which a stream that paused before is paused again.
const SHORT_PAUSE: Duration = Duration::from_millis(10);
/// Time without packets after which a stream is paused: longer than a usual frame interval.
const PAUSE: Duration = Duration::from_millis(50);
/// Interval of the heartbeats of active streams.
const ROUND: Duration = Duration::from_millis(100);
/// How long an edge counts as one that loses packets after a request.
const LOSS_MEMORY: Duration = Duration::from_secs(2);
/// Times after the newest packet at which its heartbeat is repeated.
const REPEATS: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(200),
    Duration::from_millis(400),
];
/// Interval of the heartbeats of idle streams.
const IDLE_INTERVAL: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    const SSRC: Ssrc = Ssrc(1);

    /// Polls each tick for `ms` milliseconds; `newest` is the newest number at each time. Returns the
    /// times and numbers of the heartbeats to an edge that requests packets at the times `requests`.
    fn run_requesting(ms: u64, requests: &[u64], newest: impl Fn(u64) -> u16) -> Vec<(u64, u16)> {
        let (start, mut heartbeats) = (Instant::now(), Heartbeats::default());
        let mut edge = HeartbeatReceiver::new(7, Duration::from_millis(500));
        (0..ms)
            .step_by(TICK.as_millis() as usize)
            .flat_map(|at| {
                let now = start + Duration::from_millis(at);
                if requests.contains(&at) {
                    edge.requested(now);
                }
                let due = heartbeats.poll(now, [(SSRC, Seq(newest(at)))]);
                due.to(&edge, now).map(|beat| (at, beat.last.0)).collect::<Vec<_>>()
            })
            .collect()
    }

    /// As [`run_requesting`], for an edge that keeps losing packets.
    fn run(ms: u64, newest: impl Fn(u64) -> u16) -> Vec<(u64, u16)> {
        let requests: Vec<_> = (0..ms).step_by(1000).collect();
        run_requesting(ms, &requests, newest)
    }

    #[test]
    fn the_heartbeat_of_a_paused_stream_is_sent_soon_and_repeated_ever_less_often() {
        let beats = run(3400, |at| if at <= 100 { 7 } else { 9 });
        let times: Vec<_> = beats.iter().filter(|(_, seq)| *seq == 9).map(|(at, _)| *at).collect();
        assert_eq!(times, [120, 160, 210, 310, 510, 1510, 2510]);
    }

    #[test]
    fn an_active_stream_has_one_heartbeat_per_100_ms() {
        let beats = run(1000, |at| (at / 10) as u16);
        assert!((9..=10).contains(&beats.len()), "{beats:?}");
        assert!(beats.windows(2).all(|pair| pair[1].0 - pair[0].0 == 100), "{beats:?}");
    }

    #[test]
    fn a_stream_of_25_frames_per_second_has_ten_heartbeats_per_second() {
        let beats = run(2000, |at| (at / 40) as u16);
        assert!((16..=21).contains(&beats.len()), "{beats:?}");
        // At 5 frames per second, each frame is followed by a heartbeat.
        let beats = run(2000, |at| (at / 200) as u16);
        let soon = |news: u64| beats.iter().any(|beat| (news..=news + 10).contains(&beat.0));
        assert!((1..10).all(|n| soon(n * 200)), "{beats:?}");
    }

    #[test]
    fn an_edge_without_loss_gets_every_other_round_and_all_heartbeats_of_paused_streams() {
        let beats = run_requesting(4000, &[1050], |at| (at / 10) as u16);
        let steps = |range: std::ops::Range<u64>| {
            let times: Vec<_> =
                beats.iter().map(|beat| beat.0).filter(|at| range.contains(at)).collect();
            times.windows(2).map(|pair| pair[1] - pair[0]).collect::<Vec<_>>()
        };
        assert!(steps(0..1000).iter().all(|step| *step == 200), "{beats:?}");
        assert!(steps(1100..3000).iter().all(|step| *step == 100), "{beats:?}");
        assert!(steps(3100..4000).iter().all(|step| *step == 200), "{beats:?}");
        // Whether or not the edge got the round before the last packet.
        for stops_at in (400..800).step_by(10) {
            let beats = run_requesting(2000, &[], |at| (at.min(stops_at) / 10) as u16);
            let soon = beats.iter().find(|(_, seq)| u64::from(*seq) == stops_at / 10);
            assert!(soon.is_some_and(|(at, _)| at - stops_at <= 50), "{stops_at}: {beats:?}");
        }
        // Frames with long pauses: each one soon, whether or not it falls on a round.
        let beats = run_requesting(4000, &[], |at| (at / 190) as u16);
        let soon = |n: u64| beats.iter().any(|beat| (n * 190..=n * 190 + 20).contains(&beat.0));
        assert!((1..20).all(soon), "{beats:?}");
        // Odd and even edges get different rounds; an edge with a short latency gets all.
        let (now, long) = (Instant::now(), Duration::from_secs(1));
        let rounds = |edge: HeartbeatReceiver| [1, 2, 3, 4].map(|r| edge.gets_round(now, r));
        assert_eq!(rounds(HeartbeatReceiver::new(2, long)), [false, true, false, true]);
        assert_eq!(rounds(HeartbeatReceiver::new(3, long)), [true, false, true, false]);
        assert_eq!(rounds(HeartbeatReceiver::new(3, 3 * ROUND)), [true; 4]);
    }

    #[test]
    fn an_ended_stream_is_removed() {
        let (now, mut beats) = (Instant::now(), Heartbeats::default());
        beats.poll(now, [(SSRC, Seq(1)), (Ssrc(2), Seq(1))]);
        beats.poll(now, [(Ssrc(2), Seq(1))]);
        assert_eq!(beats.streams.len(), 1);
    }
}
