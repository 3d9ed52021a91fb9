//! Table of the streams that this node sends as RTP, with their histories. Repair, announcements and
//! the API read it.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use tokio::sync::broadcast;

pub use downpour_media::flv::Headers;

use downpour_media::{PublicationId, StreamKey, flv::Tag};
use downpour_repair::{
    history::History,
    rtp::{Burst, Seq, Ssrc},
};

/// All outgoing streams, by SSRC. Clones share the table.
///
/// A stream is **live** from [`OutgoingStreams::insert`] to [`OutgoingStreams::end`], then **ended**,
/// still available for repair, until [`OutgoingStreams::remove`]. Each of these steps but the last is
/// announced as an [`OutgoingEvent`].
#[derive(Clone)]
pub struct OutgoingStreams {
    streams: Arc<RwLock<HashMap<Ssrc, Arc<OutgoingStream>>>>,
    events: broadcast::Sender<OutgoingEvent>,
    /// `true` once the node shuts down.
    closing: Arc<AtomicBool>,
}

/// Event of an outgoing stream. A subscriber that lags must list [`OutgoingStreams::streams`] again.
#[derive(Clone)]
pub enum OutgoingEvent {
    /// A publication started. Its first packet has not been sent yet.
    Up(Arc<OutgoingStream>),
    /// The stream's codec headers or metadata changed.
    Update(Arc<OutgoingStream>),
    /// Script data in the stream, for edges that know the stream.
    Data(Arc<OutgoingStream>, Tag),
    /// The stream ended. Its packets stay available for repair for a short time.
    End(Arc<OutgoingStream>),
}

impl OutgoingStreams {
    /// An empty table.
    pub fn new() -> Self {
        let events = broadcast::channel(EVENT_CAPACITY).0;
        Self { streams: Arc::default(), events, closing: Arc::default() }
    }

    /// Adds a stream and announces it. Must precede the stream's first packet.
    pub fn insert(&self, stream: Arc<OutgoingStream>) {
        self.streams.write().insert(stream.ssrc, stream.clone());
        self.announce(OutgoingEvent::Up(stream));
    }

    /// Marks later ends of streams as those of the node. Edges are notified before the first one.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// `true` once [`OutgoingStreams::close`] was called.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Announces the end of a stream, which stays available for repair until [`OutgoingStreams::remove`].
    pub fn end(&self, stream: &Arc<OutgoingStream>) {
        stream.ended.store(true, Ordering::Release);
        self.announce(OutgoingEvent::End(stream.clone()));
    }

    /// Removes a stream and its history.
    pub fn remove(&self, ssrc: Ssrc) {
        self.streams.write().remove(&ssrc);
    }

    /// Announces that [`OutgoingStream::headers`] changed.
    pub fn updated(&self, stream: &Arc<OutgoingStream>) {
        self.announce(OutgoingEvent::Update(stream.clone()));
    }

    /// Passes script data of a stream to the edges. A subscriber that lags loses it.
    pub fn send_data(&self, stream: &Arc<OutgoingStream>, tag: Tag) {
        self.announce(OutgoingEvent::Data(stream.clone(), tag));
    }

    /// The live or ended stream with this SSRC.
    pub fn stream(&self, ssrc: Ssrc) -> Option<Arc<OutgoingStream>> {
        self.streams.read().get(&ssrc).cloned()
    }

    /// All live and ended streams.
    pub fn streams(&self) -> Vec<Arc<OutgoingStream>> {
        self.streams.read().values().cloned().collect()
    }

    /// Subscribes to the events that follow.
    pub fn subscribe(&self) -> broadcast::Receiver<OutgoingEvent> {
        self.events.subscribe()
    }

    fn announce(&self, event: OutgoingEvent) {
        // Fails only without subscribers.
        let _ = self.events.send(event);
    }
}

impl Default for OutgoingStreams {
    fn default() -> Self {
        Self::new()
    }
}

/// An outgoing stream: one publication, its history and its counters.
pub struct OutgoingStream {
    key: StreamKey,
    id: PublicationId,
    ssrc: Ssrc,
    start_unix_ms: u64,
    state: Mutex<State>,
    ended: AtomicBool,
    /// Bytes per second, from [`RateMeter`].
    byte_rate: AtomicU64,
    /// Parity packets per thousand media packets.
    parity_overhead: AtomicU64,
    sent: SentUpTo,
    /// Counts of repairs: requested, served, and refused because the packet was gone.
    pub repairs: RepairCounts,
}

/// Repair counts of one stream, in packets.
#[derive(Debug, Default)]
pub struct RepairCounts {
    /// Requested sequence numbers.
    pub asked: AtomicU64,
    /// Retransmitted packets, each copy counted.
    pub served: AtomicU64,
    /// Requested sequence numbers that were no longer in the history, or never sent.
    pub gone: AtomicU64,
}

impl RepairCounts {
    /// Adds to the counts.
    pub fn add(&self, asked: u64, served: u64, gone: u64) {
        self.asked.fetch_add(asked, Ordering::Relaxed);
        self.served.fetch_add(served, Ordering::Relaxed);
        self.gone.fetch_add(gone, Ordering::Relaxed);
    }
}

struct State {
    history: History,
    rate: RateMeter,
    /// First sequence number of the newest GOP, and the number of packets pushed before it.
    gop_start: Option<(Seq, u64)>,
    headers: Headers,
    /// The current codec headers and their bursts.
    header_bursts: Vec<(Tag, Burst)>,
}

impl OutgoingStream {
    /// A publication that starts now. `start_unix_ms` is the Unix time of media time 0, in
    /// milliseconds.
    pub fn new(key: StreamKey, ssrc: Ssrc, start_unix_ms: u64, history: History) -> Self {
        Self {
            key,
            id: PublicationId(rand::random()),
            ssrc,
            start_unix_ms,
            state: Mutex::new(State {
                history,
                rate: RateMeter::default(),
                gop_start: None,
                headers: Headers::default(),
                header_bursts: Vec::new(),
            }),
            ended: AtomicBool::new(false),
            byte_rate: AtomicU64::new(0),
            parity_overhead: AtomicU64::new(0),
            sent: SentUpTo::default(),
            repairs: RepairCounts::default(),
        }
    }

    /// The same, with the identity that the publication has elsewhere instead of a random one.
    pub fn with_id(self, id: PublicationId) -> Self {
        Self { id, ..self }
    }

    /// Adds a burst to the history. `starts_gop` is `true` for a key frame, and for any tag of a stream
    /// without video.
    pub fn push(&self, now: Instant, burst: Burst, starts_gop: bool) {
        let mut state = self.state.lock();
        if starts_gop {
            state.gop_start = Some((burst.first_seq(), state.history.pushed().0));
        }
        let rate = state.rate.add(now, burst.bytes().len());
        self.byte_rate.store(rate, Ordering::Relaxed);
        if !self.sent.with_guards.load(Ordering::Relaxed) {
            self.sent.advance(burst.last_seq());
        }
        state.history.push(now, burst);
    }

    /// From now on, a burst counts as sent when its [`SentGuard`] is dropped, rather than when it is
    /// pushed. For paced streams.
    pub fn track_sent(&self) {
        self.sent.with_guards.store(true, Ordering::Relaxed);
    }

    /// Guard of the burst that ends with `last`, to be dropped once the burst is sent.
    pub fn sent_guard(this: &Arc<Self>, last: Seq) -> SentGuard {
        SentGuard { stream: this.clone(), last }
    }

    /// Replaces [`OutgoingStream::headers`]. The caller announces it with [`OutgoingStreams::updated`].
    pub fn set_headers(&self, headers: Headers) {
        let mut state = self.state.lock();
        state.header_bursts.retain(|(tag, _)| {
            headers.like(tag).is_some_and(|current| current.body() == tag.body())
        });
        state.headers = headers;
    }

    /// Keeps the burst of a header among [`OutgoingStream::headers`] for
    /// [`OutgoingStream::header_packet`].
    pub fn keep_header(&self, tag: Tag, burst: Burst) {
        self.state.lock().header_bursts.push((tag, burst));
    }

    /// The stream's name.
    pub fn key(&self) -> &StreamKey {
        &self.key
    }

    /// The identity of the publication, the same at each node that it passes.
    pub fn id(&self) -> PublicationId {
        self.id
    }

    /// The publication's SSRC.
    pub fn ssrc(&self) -> Ssrc {
        self.ssrc
    }

    /// Unix time of media time 0, in milliseconds.
    pub fn start_unix_ms(&self) -> u64 {
        self.start_unix_ms
    }

    /// `true` once the publication has ended.
    pub fn ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The packet with this sequence number, if it is still in the history.
    pub fn packet(&self, seq: Seq) -> Option<Bytes> {
        self.state.lock().history.packet(seq)
    }

    /// The newest sequence number that was sent. While the stream is live, edges must not learn of a
    /// newer one: they would request packets that the pacer still holds.
    pub fn sent_seq(&self) -> Option<Seq> {
        self.sent.get()
    }

    /// The newest sequence number in the history, sent or not.
    pub fn newest_seq(&self) -> Option<Seq> {
        self.state.lock().history.newest_seq()
    }

    /// The first sequence number of the newest GOP, or of the publication if there was no GOP yet.
    /// `None` once that packet is no longer in the history.
    pub fn gop_start(&self) -> Option<Seq> {
        let state = self.state.lock();
        match state.gop_start {
            // Compare packet counts: sequence numbers repeat after 65,536 packets.
            Some((seq, before)) => {
                (state.history.pushed().0 - before <= state.history.len() as u64).then_some(seq)
            }
            None => state.history.is_complete().then_some(Seq::FIRST),
        }
    }

    /// The packet with this sequence number, if it is one of the current codec headers, no matter how
    /// old. v0 edges that join late have no other way to get the headers.
    pub fn header_packet(&self, seq: Seq) -> Option<Bytes> {
        let state = self.state.lock();
        state.header_bursts.iter().find_map(|(_, burst)| {
            let index = usize::try_from(seq.distance_from(burst.first_seq())).ok()?;
            burst.packet(index)
        })
    }

    /// The newest codec headers and metadata.
    pub fn headers(&self) -> Headers {
        self.state.lock().headers.clone()
    }

    /// Packets and bytes in the history.
    pub fn held(&self) -> (usize, usize) {
        let state = self.state.lock();
        (state.history.len(), state.history.bytes())
    }

    /// Packets and bytes pushed since the start of the publication.
    pub fn pushed(&self) -> (u64, u64) {
        self.state.lock().history.pushed()
    }

    /// Bytes per second, smoothed over a few seconds. Keeps its last value once the stream has ended.
    pub fn byte_rate(&self) -> u64 {
        self.byte_rate.load(Ordering::Relaxed)
    }

    /// Packets per second, smoothed like [`OutgoingStream::byte_rate`]; 0 during the first second.
    pub fn packet_rate(&self) -> f64 {
        let state = self.state.lock();
        let (packets, bytes) = state.history.pushed();
        match state.rate.smoothed {
            Some(rate) => rate * packets as f64 / bytes.max(1) as f64,
            None => 0.0,
        }
    }

    /// Sets [`OutgoingStream::parity_overhead`].
    pub fn set_parity_overhead(&self, overhead: f64) {
        self.parity_overhead.store((overhead * 1000.0).round() as u64, Ordering::Relaxed);
    }

    /// Parity packets per media packet, for the receivers with the most parity; 0 without parity.
    pub fn parity_overhead(&self) -> f64 {
        self.parity_overhead.load(Ordering::Relaxed) as f64 / 1000.0
    }

    /// Removes packets that are too old from the history. Each push does so too.
    pub fn expire(&self, now: Instant) {
        self.state.lock().history.expire(now);
    }
}

/// Guard of a burst that is being sent. Dropping it marks the burst as sent.
pub struct SentGuard {
    stream: Arc<OutgoingStream>,
    last: Seq,
}

impl Drop for SentGuard {
    fn drop(&mut self) {
        self.stream.sent.advance(self.last);
    }
}

/// The newest sequence number of a stream that was sent.
#[derive(Debug, Default)]
struct SentUpTo {
    /// `true` if [`SentGuard`]s advance it rather than pushes.
    with_guards: AtomicBool,
    /// The sequence number, and [`KNOWN`] if there is one.
    newest: AtomicU32,
}

impl SentUpTo {
    fn advance(&self, seq: Seq) {
        // Workers may finish out of order.
        let newer = |held: u32| {
            let older = held & KNOWN == 0 || seq.distance_from(Seq(held as u16)) > 0;
            older.then_some(u32::from(seq.0) | KNOWN)
        };
        // Fails only if `seq` is not newer.
        let _ = self.newest.fetch_update(Ordering::AcqRel, Ordering::Acquire, newer);
    }

    fn get(&self) -> Option<Seq> {
        let newest = self.newest.load(Ordering::Acquire);
        (newest & KNOWN != 0).then_some(Seq(newest as u16))
    }
}

/// Flag beside the 16 bits of the sequence number.
const KNOWN: u32 = 1 << 16;

/// Byte rate in bytes per second: the mean of the first second, then an EWMA over seconds, gain 1/4.
///
/// It differs from the rates of the hub's streams on purpose. Those report the last second to the API
/// without a lock and fall to 0 in a stall; this one is smoothed for pacing and repair budgets.
#[derive(Debug, Default)]
struct RateMeter {
    /// Start of the current second, and the bytes in it.
    second: Option<(Instant, u64)>,
    smoothed: Option<f64>,
}

impl RateMeter {
    /// Adds `bytes` sent at `now`. Returns the rate in bytes per second.
    fn add(&mut self, now: Instant, bytes: usize) -> u64 {
        let (since, sum) = self.second.get_or_insert((now, 0));
        let elapsed = now.saturating_duration_since(*since);
        if elapsed >= METER_PERIOD {
            let rate = *sum as f64 / elapsed.as_secs_f64();
            self.smoothed = Some(self.smoothed.map_or(rate, |old| old + (rate - old) * METER_GAIN));
            (*since, *sum) = (now, 0);
        }
        *sum += bytes as u64;
        // During the first second, the best estimate is the sum so far.
        self.smoothed.map_or(*sum, |rate| rate as u64)
    }
}

const METER_PERIOD: Duration = Duration::from_secs(1);
const METER_GAIN: f64 = 0.25;
/// Events kept for a slow subscriber. Beyond that it lags, and has to list the streams again.
const EVENT_CAPACITY: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_media::flv::TagKind;
    use downpour_repair::rtp::Packetizer;

    #[test]
    fn a_burst_counts_as_sent_when_its_guard_is_dropped() {
        let history = History::new(100, Duration::from_secs(1));
        let stream = OutgoingStream::new("live/a".parse().unwrap(), Ssrc(1), 0, history);
        let stream = Arc::new(stream);
        let mut packetizer = Packetizer::new(Ssrc(1), 1120);
        let mut push = || {
            let burst = packetizer.packetize(&Tag::new(TagKind::Audio, 0, &[0xaf, 1]).unwrap());
            stream.push(Instant::now(), burst.clone(), false);
            OutgoingStream::sent_guard(&stream, burst.last_seq())
        };
        assert_eq!(stream.sent_seq(), None);
        drop(push());
        assert_eq!(stream.sent_seq(), Some(Seq::FIRST));
        stream.track_sent();
        let [second, third] = [push(), push()];
        assert_eq!(stream.sent_seq(), Some(Seq::FIRST));
        assert_eq!(stream.newest_seq(), Some(Seq::FIRST.plus(2)));
        drop(third);
        drop(second);
        assert_eq!(stream.sent_seq(), stream.newest_seq());
        for _ in 0..600 {
            drop(push());
        }
        assert_eq!(stream.sent_seq(), Some(Seq::FIRST.plus(602)), "sequence numbers wrap");
    }

    #[test]
    fn the_rate_is_known_after_a_second_and_follows_changes() {
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
        assert_eq!(run(1, 100), 5000, "the sum so far");
        let rate = run(3, 100);
        assert!((4900..=5100).contains(&rate), "{rate}");
        let rate = run(20, 1000);
        assert!((49_000..=51_000).contains(&rate), "{rate}");
    }
}
