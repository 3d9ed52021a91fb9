//! The streams that this node sends out as RTP: what repair, announcements and the API look up.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::broadcast;

pub use downpour_media::flv::Headers;

use downpour_media::{StreamKey, flv::TagKind};
use downpour_repair::{
    history::History,
    rtp::{Burst, Seq, Ssrc},
};

/// All streams that are being sent, by SSRC. Cloning shares them.
#[derive(Clone)]
pub struct OutgoingStreams {
    streams: Arc<RwLock<HashMap<Ssrc, Arc<OutgoingStream>>>>,
    events: broadcast::Sender<OutgoingEvent>,
}

/// What happened to a stream. A receiver that lags lists [`OutgoingStreams::streams`] afresh.
#[derive(Clone)]
pub enum OutgoingEvent {
    /// A publication began; its first packet has not been sent yet.
    Up(Arc<OutgoingStream>),
    /// Its codec headers or metadata changed.
    Update(Arc<OutgoingStream>),
    /// It ended; its packets can be asked for a little longer.
    End(Arc<OutgoingStream>),
}

impl OutgoingStreams {
    /// A node that sends nothing yet.
    pub fn new() -> Self {
        Self { streams: Arc::default(), events: broadcast::channel(EVENT_BACKLOG).0 }
    }

    /// Lists a stream and announces it. It must be listed before its first packet is sent.
    pub fn insert(&self, stream: Arc<OutgoingStream>) {
        let mut streams = self.streams.write().unwrap_or_else(PoisonError::into_inner);
        streams.insert(stream.ssrc, stream.clone());
        drop(streams);
        self.announce(OutgoingEvent::Up(stream));
    }

    /// Announces the end of a stream, which stays available for repair until [`OutgoingStreams::remove`].
    pub fn end(&self, stream: &Arc<OutgoingStream>) {
        stream.ended.store(true, Ordering::Release);
        self.announce(OutgoingEvent::End(stream.clone()));
    }

    /// Forgets a stream and its packets.
    pub fn remove(&self, ssrc: Ssrc) {
        self.streams.write().unwrap_or_else(PoisonError::into_inner).remove(&ssrc);
    }

    /// Announces that [`OutgoingStream::headers`] changed.
    pub fn updated(&self, stream: &Arc<OutgoingStream>) {
        self.announce(OutgoingEvent::Update(stream.clone()));
    }

    /// The stream with this SSRC, live or ended a moment ago.
    pub fn stream(&self, ssrc: Ssrc) -> Option<Arc<OutgoingStream>> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).get(&ssrc).cloned()
    }

    /// All streams, those that ended a moment ago included.
    pub fn streams(&self) -> Vec<Arc<OutgoingStream>> {
        self.streams.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Follows the streams' comings and goings from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<OutgoingEvent> {
        self.events.subscribe()
    }

    fn announce(&self, event: OutgoingEvent) {
        // An error only says that nobody listens.
        let _ = self.events.send(event);
    }
}

impl Default for OutgoingStreams {
    fn default() -> Self {
        Self::new()
    }
}

/// One publication on its way out.
pub struct OutgoingStream {
    key: StreamKey,
    ssrc: Ssrc,
    start_unix_ms: u64,
    state: Mutex<State>,
    ended: AtomicBool,
    /// Bytes of packets a second, as [`RateMeter`] has it.
    byte_rate: AtomicU64,
    /// Parity packets a thousand media packets.
    parity_overhead: AtomicU64,
    left: SentUpTo,
    /// Repairs asked for, served, and refused as no longer held.
    pub repairs: RepairCounts,
}

/// What edges asked of one stream, in packets.
#[derive(Debug, Default)]
pub struct RepairCounts {
    /// Sequence numbers asked for.
    pub asked: AtomicU64,
    /// Packets sent again, each copy counted.
    pub served: AtomicU64,
    /// Sequence numbers that were no longer held, or never sent.
    pub gone: AtomicU64,
}

impl RepairCounts {
    /// Adds to each count.
    pub fn add(&self, asked: u64, served: u64, gone: u64) {
        self.asked.fetch_add(asked, Ordering::Relaxed);
        self.served.fetch_add(served, Ordering::Relaxed);
        self.gone.fetch_add(gone, Ordering::Relaxed);
    }
}

struct State {
    history: History,
    rate: RateMeter,
    /// Its first number, and how many packets were pushed before it.
    gop_start: Option<(Seq, u64)>,
    headers: Headers,
    /// Those of the video and the audio header.
    header_bursts: [Option<Burst>; 2],
}

impl OutgoingStream {
    /// A publication that begins now. `start_unix_ms` is the wall clock at media time 0.
    pub fn new(key: StreamKey, ssrc: Ssrc, start_unix_ms: u64, history: History) -> Self {
        Self {
            key,
            ssrc,
            start_unix_ms,
            state: Mutex::new(State {
                history,
                rate: RateMeter::default(),
                gop_start: None,
                headers: Headers::default(),
                header_bursts: [None, None],
            }),
            ended: AtomicBool::new(false),
            byte_rate: AtomicU64::new(0),
            parity_overhead: AtomicU64::new(0),
            left: SentUpTo::default(),
            repairs: RepairCounts::default(),
        }
    }

    /// Puts a burst into the history. `starts_gop` says that its tag is a key frame, or of a
    /// stream without video.
    pub fn push(&self, now: Instant, burst: Burst, starts_gop: bool) {
        let mut state = self.lock();
        if starts_gop {
            state.gop_start = Some((burst.first_seq(), state.history.pushed().0));
        }
        let rate = state.rate.add(now, burst.bytes().len());
        self.byte_rate.store(rate, Ordering::Relaxed);
        if !self.left.later.load(Ordering::Relaxed) {
            self.left.note(burst.last_seq());
        }
        state.history.push(now, burst);
    }

    /// From now on a burst has left when its [`SentGuard`] is dropped, not when it is pushed.
    pub fn leaves_later(&self) {
        self.left.later.store(true, Ordering::Relaxed);
    }

    /// What is dropped when the burst that ends with `last` has left. Bursts leave in their order.
    pub fn departure(this: &Arc<Self>, last: Seq) -> SentGuard {
        SentGuard { stream: this.clone(), last }
    }

    /// Keeps the burst of a codec header for [`OutgoingStream::header_packet`], in place of the one
    /// before.
    pub fn keep_header(&self, kind: TagKind, burst: Burst) {
        let slot = usize::from(kind == TagKind::Audio);
        self.lock().header_bursts[slot] = Some(burst);
    }

    /// Replaces the headers that [`OutgoingStream::headers`] tells; the caller announces it.
    pub fn set_headers(&self, headers: Headers) {
        self.lock().headers = headers;
    }

    /// The stream's name.
    pub fn key(&self) -> &StreamKey {
        &self.key
    }

    /// The publication's SSRC.
    pub fn ssrc(&self) -> Ssrc {
        self.ssrc
    }

    /// Unix time of media time 0, in milliseconds.
    pub fn start_unix_ms(&self) -> u64 {
        self.start_unix_ms
    }

    /// Whether the publication is over.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// A packet that is still held.
    pub fn packet(&self, seq: Seq) -> Option<Bytes> {
        self.lock().history.packet(seq)
    }

    /// The newest sequence number of which edges may be told while the stream goes on: they would
    /// ask for what has not left yet.
    pub fn left_seq(&self) -> Option<Seq> {
        self.left.get()
    }

    /// The newest sequence number.
    pub fn newest_seq(&self) -> Option<Seq> {
        self.lock().history.newest_seq()
    }

    /// The sequence number at which the newest group of pictures begins, while it is still held;
    /// before the first group, that at which the publication begins.
    pub fn gop_start(&self) -> Option<Seq> {
        let state = self.lock();
        match state.gop_start {
            // By count, since a number is used again after 65,536 packets.
            Some((seq, before)) => {
                (state.history.pushed().0 - before <= state.history.len() as u64).then_some(seq)
            }
            None => state.history.is_complete().then_some(Seq::FIRST),
        }
    }

    /// A packet of the codec headers that are in effect, however long ago it was sent. For v0 edges
    /// that join late and have no other way to learn them.
    pub fn header_packet(&self, seq: Seq) -> Option<Bytes> {
        let state = self.lock();
        state.header_bursts.iter().flatten().find_map(|burst| {
            let index = usize::try_from(seq.distance_from(burst.first_seq())).ok()?;
            burst.packet(index)
        })
    }

    /// Codec headers and metadata, newest each.
    pub fn headers(&self) -> Headers {
        self.lock().headers.clone()
    }

    /// Packets and bytes in the history ring.
    pub fn held(&self) -> (usize, usize) {
        let state = self.lock();
        (state.history.len(), state.history.bytes())
    }

    /// Packets and bytes that this publication came to so far.
    pub fn pushed(&self) -> (u64, u64) {
        self.lock().history.pushed()
    }

    /// Bytes of packets a second, smoothed over some seconds; after the end, what it was before.
    pub fn byte_rate(&self) -> u64 {
        self.byte_rate.load(Ordering::Relaxed)
    }

    /// Packets a second, as [`OutgoingStream::byte_rate`] has it; 0 during the first second.
    pub fn packet_rate(&self) -> f64 {
        let (packets, bytes) = self.pushed();
        match self.lock().rate.smoothed {
            Some(rate) => rate * packets as f64 / bytes.max(1) as f64,
            None => 0.0,
        }
    }

    /// Tells how many parity packets there are a media packet.
    pub fn set_parity_overhead(&self, overhead: f64) {
        self.parity_overhead.store((overhead * 1000.0).round() as u64, Ordering::Relaxed);
    }

    /// Parity packets a media packet, of those receivers that get most; 0 without.
    pub fn parity_overhead(&self) -> f64 {
        self.parity_overhead.load(Ordering::Relaxed) as f64 / 1000.0
    }

    /// Drops packets that have grown too old; pushes do so too, while there are any.
    pub fn expire(&self, now: Instant) {
        self.lock().history.expire(now);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A burst on its way out.
pub struct SentGuard {
    stream: Arc<OutgoingStream>,
    last: Seq,
}

impl Drop for SentGuard {
    fn drop(&mut self) {
        self.stream.left.note(self.last);
    }
}

/// How far a stream's packets have left.
#[derive(Debug, Default)]
struct SentUpTo {
    later: AtomicBool,
    /// The newest sequence number, and whether there is one.
    newest: AtomicU32,
}

impl SentUpTo {
    fn note(&self, seq: Seq) {
        // Two senders may be done in either order.
        let newer = |held: u32| {
            let older = held & KNOWN == 0 || seq.distance_from(Seq(held as u16)) > 0;
            older.then_some(u32::from(seq.0) | KNOWN)
        };
        // An error is that there is nothing to change.
        let _ = self.newest.fetch_update(Ordering::AcqRel, Ordering::Acquire, newer);
    }

    fn get(&self) -> Option<Seq> {
        let newest = self.newest.load(Ordering::Acquire);
        (newest & KNOWN != 0).then_some(Seq(newest as u16))
    }
}

const KNOWN: u32 = 1 << 16;

/// Bytes a second: the mean of the first second, then smoothed from second to second.
#[derive(Debug, Default)]
struct RateMeter {
    second: Option<(Instant, u64)>,
    smoothed: Option<f64>,
}

impl RateMeter {
    /// Counts `bytes` that went out at `now`; the rate.
    fn add(&mut self, now: Instant, bytes: usize) -> u64 {
        let (since, sum) = self.second.get_or_insert((now, 0));
        let elapsed = now.saturating_duration_since(*since);
        if elapsed >= METER_PERIOD {
            let rate = *sum as f64 / elapsed.as_secs_f64();
            self.smoothed =
                Some(self.smoothed.map_or(rate, |old| old + (rate - old) * METER_WEIGHT));
            (*since, *sum) = (now, 0);
        }
        *sum += bytes as u64;
        // Before the first second is over, no more than what has been seen is known.
        self.smoothed.map_or(*sum, |rate| rate as u64)
    }
}

const METER_PERIOD: Duration = Duration::from_secs(1);
const METER_WEIGHT: f64 = 0.25;
/// Events kept for a slow listener before it has to list the streams afresh.
const EVENT_BACKLOG: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_media::flv::Tag;
    use downpour_repair::rtp::Packetizer;

    #[test]
    fn what_waits_to_leave_is_not_told() {
        let history = History::new(100, Duration::from_secs(1));
        let stream = OutgoingStream::new("live/a".parse().unwrap(), Ssrc(1), 0, history);
        let stream = Arc::new(stream);
        let mut packetizer = Packetizer::new(Ssrc(1), 1120);
        let mut push = || {
            let burst = packetizer.packetize(&Tag::new(TagKind::Audio, 0, &[0xaf, 1]).unwrap());
            stream.push(Instant::now(), burst.clone(), false);
            OutgoingStream::departure(&stream, burst.last_seq())
        };
        assert_eq!(stream.left_seq(), None);
        drop(push());
        assert_eq!(stream.left_seq(), Some(Seq::FIRST));
        stream.leaves_later();
        let [second, third] = [push(), push()];
        let told = (stream.left_seq(), stream.newest_seq());
        assert_eq!(told, (Some(Seq::FIRST), Some(Seq::FIRST.plus(2))));
        drop(third);
        drop(second);
        assert_eq!(stream.left_seq(), stream.newest_seq());
        for _ in 0..600 {
            drop(push());
        }
        assert_eq!(stream.left_seq(), Some(Seq::FIRST.plus(602)), "it wraps");
    }

    #[test]
    fn the_rate_is_known_after_a_second_and_follows() {
        let (start, mut meter) = (Instant::now(), RateMeter::default());
        let mut at = 0;
        let mut run = |seconds: u64, bytes: usize| {
            let mut rate = 0;
            for _ in 0..seconds * 50 {
                rate = meter.add(start + Duration::from_millis(at), bytes);
                at += 20;
            }
            rate
        };
        assert_eq!(run(1, 100), 5000, "what has been seen");
        let rate = run(3, 100);
        assert!((4900..=5100).contains(&rate), "{rate}");
        let rate = run(20, 1000);
        assert!((49_000..=51_000).contains(&rate), "{rate}");
    }
}
