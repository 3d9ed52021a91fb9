//! The tap that sends one stream to the edges: packetizer, history, fan-out and parity.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use downpour_hub::{Sink, Stream, Tap};
use downpour_media::flv::{Headers, Tag, TagKind};
use downpour_repair::{
    bucket::TokenBucket,
    control::{MAX_DATA_LEN, MAX_HEADER_LEN},
    history::History,
    rtp::{Burst, Packetizer, Ssrc},
};
use downpour_sys::LogLimit;
use parking_lot::Mutex;
use prometheus::{IntCounter, Registry, register_int_counter_with_registry};

mod repeated_headers;

use self::repeated_headers::RepeatedHeaders;
use super::{
    fanout::{Fanout, FrameInterval, Pace, Train},
    outgoing::{OutgoingStream, OutgoingStreams},
    parity::{ParityFlag, ParityMetrics, ParityOut, ParityWatch},
    routes::{Route, Snapshot, Target},
};

/// The sink that sends every stream of the hub to the edges. Clones share it.
#[derive(Clone)]
pub struct StreamSender {
    shared: Arc<Shared>,
}

struct Shared {
    settings: SenderSettings,
    outgoing: OutgoingStreams,
    /// `None` in debug mode: nothing is sent.
    fanout: Option<Fanout>,
    metrics: SenderMetrics,
    parity: Arc<ParityWatch>,
    /// Live streams, for the parity of those that pause.
    live: Mutex<HashMap<Ssrc, LiveTap>>,
    /// Ended streams, whose packets edges may still request.
    retired: Mutex<VecDeque<(Instant, Arc<OutgoingStream>)>>,
}

struct LiveTap {
    /// `true` while it has parity encoders.
    has_parity: Arc<AtomicBool>,
    tap: Weak<Mutex<TapState>>,
}

/// Limits of each stream that is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SenderSettings {
    /// Packets that each stream's history holds at most.
    pub history_packets: usize,
    /// How long it holds them, and how long an ended stream is kept for repair requests.
    pub history_age: Duration,
    /// Bytes of RTP payload per packet at most.
    pub payload_max: usize,
    /// Whether codec headers are sent again before key frames, while there are addresses that get every
    /// stream.
    pub repeat_headers: bool,
}

/// Counters of a [`StreamSender`].
#[derive(Debug, Clone)]
pub struct SenderMetrics {
    retired_early: IntCounter,
    data_dropped: IntCounter,
    headers_left_out: IntCounter,
    short_tags: IntCounter,
    parity: ParityMetrics,
}

impl SenderMetrics {
    /// Creates the counters and registers them.
    ///
    /// # Errors
    /// If their names are taken.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let retired_early = register_int_counter_with_registry!(
            "downpour_ended_streams_dropped_total",
            "Ended streams whose packets were dropped early because all of them held too many",
            registry
        )?;
        let data_dropped = register_int_counter_with_registry!(
            "downpour_script_tags_dropped_total",
            "Script tags (cue points, captions) not sent to edges: too long, or too many per second",
            registry
        )?;
        let headers_left_out = register_int_counter_with_registry!(
            "downpour_long_headers_total",
            "Metadata and codec headers not sent to edges because they are too long",
            registry
        )?;
        let short_tags = register_int_counter_with_registry!(
            "downpour_short_tags_dropped_total",
            "Audio and video tags not sent as RTP because they are too short to hold media",
            registry
        )?;
        let parity = ParityMetrics::register(registry)?;
        Ok(Self { retired_early, data_dropped, headers_left_out, short_tags, parity })
    }
}

impl StreamSender {
    /// Lists streams in `outgoing` and sends their packets with `fanout`, if there is one.
    pub fn new(
        settings: SenderSettings,
        outgoing: OutgoingStreams,
        fanout: Option<Fanout>,
        metrics: SenderMetrics,
    ) -> Self {
        let shared = Shared {
            settings,
            outgoing,
            fanout,
            metrics,
            parity: Arc::default(),
            live: Mutex::default(),
            retired: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Sends the parity of streams that pause. Never returns; sleeps while no stream has parity.
    pub async fn drive_parity(&self) {
        loop {
            self.shared.parity.until_any().await;
            tokio::time::sleep(PARITY_TICK).await;
            self.handle_timeout(Instant::now());
        }
    }

    fn handle_timeout(&self, now: Instant) {
        let live = self.shared.live.lock();
        let with_parity = live.values().filter(|tap| tap.has_parity.load(Ordering::Acquire));
        let taps: Vec<_> = with_parity.filter_map(|tap| tap.tap.upgrade()).collect();
        drop(live);
        taps.iter().for_each(|tap| tap.lock().handle_timeout(now));
    }

    /// Drops packets that are too old, and streams that ended [`SenderSettings::history_age`] ago. Call
    /// it once per second.
    pub fn expire(&self, now: Instant) {
        let Shared { settings, outgoing, retired, .. } = &*self.shared;
        let mut retired = retired.lock();
        while let Some((ended, stream)) = retired.front()
            && now.saturating_duration_since(*ended) >= settings.history_age.min(RETIRED_FOR)
        {
            outgoing.remove(stream.ssrc());
            retired.pop_front();
        }
        drop(retired);
        outgoing.streams().iter().for_each(|stream| stream.expire(now));
    }
}

impl Sink for StreamSender {
    fn stream_up(&self, stream: &Arc<Stream>) -> Option<Box<dyn Tap>> {
        let state = TapState::new(self.shared.clone(), stream);
        let ssrc = state.outgoing.ssrc();
        let has_parity = state.parity_flag.reader();
        let state = Arc::new(Mutex::new(state));
        let live = LiveTap { has_parity, tap: Arc::downgrade(&state) };
        self.shared.live.lock().insert(ssrc, live);
        Some(Box::new(DownstreamTap { state: Some(state), ssrc, shared: self.shared.clone() }))
    }
}

impl Shared {
    /// Keeps the packets of an ended stream for edges that still miss some. Bounded, since an encoder
    /// that reconnects quickly must not fill the memory.
    fn retire(&self, stream: Arc<OutgoingStream>) {
        let mut retired = self.retired.lock();
        retired.push_back((Instant::now(), stream));
        let mut bytes: usize = retired.iter().map(|(_, stream)| stream.held().1).sum();
        while (bytes > RETIRED_BYTES || retired.len() > RETIRED_STREAMS)
            && let Some((_, oldest)) = retired.pop_front()
        {
            bytes -= oldest.held().1;
            self.outgoing.remove(oldest.ssrc());
            self.metrics.retired_early.inc();
        }
    }

    /// A random SSRC, so that a restarted node is not mistaken for the one before (RFC 3550 §8.1).
    /// Never 0, which the Go edge reads as "no stream".
    fn free_ssrc(&self) -> Ssrc {
        loop {
            let ssrc = Ssrc(rand::random());
            if ssrc.0 != 0 && self.outgoing.stream(ssrc).is_none() {
                return ssrc;
            }
        }
    }
}

/// The tap of one stream. Dropping it ends the stream for the edges.
struct DownstreamTap {
    /// `None` only during the drop.
    state: Option<Arc<Mutex<TapState>>>,
    ssrc: Ssrc,
    shared: Arc<Shared>,
}

impl Tap for DownstreamTap {
    fn push(&mut self, now: Instant, tag: &Tag) {
        if let Some(state) = &self.state {
            state.lock().push(now, tag);
        }
    }
}

impl Drop for DownstreamTap {
    fn drop(&mut self) {
        self.shared.live.lock().remove(&self.ssrc);
        // The parity timer may hold the state for a moment. The end is announced before this returns.
        if let Some(state) = self.state.take() {
            state.lock().finish(Instant::now());
        }
    }
}

struct TapState {
    shared: Arc<Shared>,
    outgoing: Arc<OutgoingStream>,
    packetizer: Packetizer,
    headers: Headers,
    repeated_headers: RepeatedHeaders,
    has_video: bool,
    /// Bounds the script data of one encoder on the control streams of all edges.
    data_bucket: TokenBucket,
    data_log: LogLimit,
    header_log: LogLimit,
    /// `None` in debug mode: nothing is sent.
    route_out: Option<RouteOut>,
    parity_flag: ParityFlag,
}

impl TapState {
    fn new(shared: Arc<Shared>, stream: &Stream) -> Self {
        let SenderSettings { history_packets, history_age, payload_max, .. } = shared.settings;
        let ssrc = shared.free_ssrc();
        let history = History::new(history_packets, history_age);
        let key = stream.key().clone();
        let outgoing = OutgoingStream::new(key, ssrc, stream.start_unix_ms(), history);
        let outgoing = Arc::new(outgoing.with_id(stream.id()));
        let headers = stream.headers();
        outgoing.set_headers(headers.clone());
        shared.outgoing.insert(outgoing.clone());
        tracing::info!(stream = %stream.key(), %ssrc, "stream up");
        let route_out = shared
            .fanout
            .clone()
            .map(|fanout| RouteOut::new(fanout, outgoing.clone(), shared.metrics.parity.clone()));
        let mut state = Self {
            outgoing,
            packetizer: Packetizer::new(ssrc, payload_max),
            repeated_headers: RepeatedHeaders::default(),
            has_video: headers.video().is_some(),
            data_bucket: TokenBucket::new(Instant::now(), DATA_RATE, DATA_BURST),
            data_log: LogLimit::new(),
            header_log: LogLimit::new(),
            headers,
            route_out,
            parity_flag: ParityFlag::new(shared.parity.clone()),
            shared,
        };
        // Encoders send the metadata before the stream starts.
        let known = state.headers.clone();
        known.iter().for_each(|tag| state.note_if_long(Instant::now(), tag));
        state
    }

    fn push(&mut self, now: Instant, tag: &Tag) {
        if tag.kind() == TagKind::Script {
            // Script tags are not sent as RTP (wire v0). Edges on downpour/1 get the metadata as a
            // header, and captions and cue points as messages.
            match tag.is_metadata() {
                true => self.learn(now, tag, None),
                false => self.send_data(now, tag),
            }
            return;
        }
        if is_too_short(tag) {
            self.shared.metrics.short_tags.inc();
            return;
        }
        self.has_video |= tag.kind() == TagKind::Video;
        if self.repeats_headers() {
            for header in self.repeated_headers.due(now, tag, self.has_video) {
                let burst = self.packetizer.packetize_again(&header);
                self.send(now, &header, &burst, false);
            }
        }
        self.repeated_headers.sent(now, tag);
        let burst = self.packetizer.packetize(tag);
        if tag.is_header() {
            self.learn(now, tag, Some(&burst));
        }
        let starts_gop = tag.is_key_frame() || !self.has_video;
        self.send(now, tag, &burst, starts_gop);
    }

    /// `true` while there are addresses whose edges have no other way to learn the headers.
    fn repeats_headers(&self) -> bool {
        self.shared.settings.repeat_headers
            && self.route_out.as_ref().is_some_and(|out| !out.route.snapshot().fixed.is_empty())
    }

    fn send(&mut self, now: Instant, tag: &Tag, burst: &Burst, starts_gop: bool) {
        // Into the history first: an edge may request a packet before the burst is sent.
        self.outgoing.push(now, burst.clone(), starts_gop);
        if let Some(route_out) = &mut self.route_out {
            route_out.send(now, tag, burst);
            self.outgoing.set_parity_overhead(route_out.parity.overhead());
            self.parity_flag.set(route_out.parity.is_active());
        }
    }

    /// Stores a header, whose packets are `burst`, and announces it if it changed: encoders repeat
    /// headers.
    fn learn(&mut self, now: Instant, tag: &Tag, burst: Option<&Burst>) {
        if !self.headers.learn(tag) {
            return;
        }
        self.outgoing.set_headers(self.headers.clone());
        if let Some(burst) = burst {
            // Copied: a header that lives long must not hold the buffer that it shares.
            self.outgoing.keep_header(tag.detached(), burst.detached());
        }
        self.note_if_long(now, tag);
        self.shared.outgoing.updated(&self.outgoing);
    }

    /// Counts and logs a header if no announcement can carry it.
    fn note_if_long(&mut self, now: Instant, tag: &Tag) {
        if tag.unit().len() <= MAX_HEADER_LEN {
            return;
        }
        self.shared.metrics.headers_left_out.inc();
        if let Some(missed) = self.header_log.due(now) {
            tracing::warn!(
                stream = %self.outgoing.key(),
                kind = ?tag.kind(),
                bytes = tag.unit().len(),
                max_bytes = MAX_HEADER_LEN,
                missed,
                "metadata or codec header not sent to edges: too long"
            );
        }
    }

    /// Passes a cue point, caption or text to the edges.
    fn send_data(&mut self, now: Instant, tag: &Tag) {
        let bytes = tag.unit().len();
        if bytes <= MAX_DATA_LEN && self.data_bucket.take(now, bytes as u64 + DATA_OVERHEAD) {
            // Copied: it waits for slow edges, and must not hold the buffer that it shares.
            self.shared.outgoing.send_data(&self.outgoing, tag.detached());
            return;
        }
        self.shared.metrics.data_dropped.inc();
        if let Some(missed) = self.data_log.due(now) {
            tracing::warn!(
                stream = %self.outgoing.key(),
                bytes,
                max_bytes = MAX_DATA_LEN,
                max_bytes_per_s = DATA_RATE,
                missed,
                "script data not sent to edges: too long, or too much"
            );
        }
    }

    fn handle_timeout(&mut self, now: Instant) {
        if let Some(route_out) = &mut self.route_out {
            route_out.handle_timeout(now);
            self.parity_flag.set(route_out.parity.is_active());
        }
    }

    fn finish(&mut self, now: Instant) {
        if let Some(mut route_out) = self.route_out.take() {
            route_out.finish(now);
        }
        self.parity_flag.set(false);
        self.shared.outgoing.end(&self.outgoing);
        self.shared.retire(self.outgoing.clone());
        tracing::info!(stream = %self.outgoing.key(), ssrc = %self.outgoing.ssrc(), "stream ended");
    }
}

/// The route of a stream's packets: targets, parity and pacing.
struct RouteOut {
    fanout: Fanout,
    route: Route,
    parity: ParityOut,
    outgoing: Arc<OutgoingStream>,
    frame_interval: FrameInterval,
}

impl RouteOut {
    fn new(fanout: Fanout, outgoing: Arc<OutgoingStream>, metrics: ParityMetrics) -> Self {
        if fanout.paces() {
            outgoing.track_sent();
        }
        Self {
            route: fanout.routes().route(outgoing.key().clone(), outgoing.ssrc()),
            parity: ParityOut::new(Instant::now(), outgoing.ssrc(), metrics),
            frame_interval: FrameInterval::default(),
            fanout,
            outgoing,
        }
    }

    fn send(&mut self, now: Instant, tag: &Tag, burst: &Burst) {
        if tag.kind() == TagKind::Video {
            self.frame_interval.add(tag.timestamp());
        }
        let pace = self.pace().map(|pace| Pace {
            held: Some(Arc::new(OutgoingStream::sent_guard(&self.outgoing, burst.last_seq()))),
            ..pace
        });
        let snapshot = self.route.targets(now);
        let flow = self.outgoing.ssrc();
        match self.fanout.paces_fixed_only() {
            true => {
                self.fanout.send(flow, burst, &snapshot.dynamic, None);
                self.fanout.send(fixed_flow(flow), burst, &snapshot.fixed, pace.as_ref());
            }
            false => self.fanout.send(flow, burst, &snapshot.media, pace.as_ref()),
        }
        // The fan-out holds a clone.
        drop(pace);
        self.with_parity(|parity, snapshot, send| parity.push(now, burst, snapshot, send), now);
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.with_parity(|parity, snapshot, send| parity.handle_timeout(now, snapshot, send), now);
    }

    fn finish(&mut self, now: Instant) {
        self.with_parity(|parity, _, send| parity.finish(now, send), now);
        self.fanout.finish(self.outgoing.ssrc());
        if self.fanout.paces_fixed_only() {
            self.fanout.finish(fixed_flow(self.outgoing.ssrc()));
        }
    }

    /// Sends parity in the stream's flow, after the packets that it protects.
    fn with_parity(
        &mut self,
        make: impl FnOnce(&mut ParityOut, &Arc<Snapshot>, &mut dyn FnMut(Train, Arc<[Target]>)),
        now: Instant,
    ) {
        let pace = self.pace().filter(|_| !self.fanout.paces_fixed_only());
        let Self { fanout, route, parity, outgoing, .. } = self;
        let mut send = |train: Train, targets: Arc<[Target]>| {
            fanout.send(outgoing.ssrc(), train, &targets, pace.as_ref());
        };
        make(parity, route.targets(now), &mut send);
    }

    fn pace(&self) -> Option<Pace> {
        self.fanout.paces().then(|| Pace {
            rate: self.outgoing.byte_rate(),
            interval: self.frame_interval.get(),
            held: None,
        })
    }
}

/// Bytes of script data per second and stream: 64 captions of 1 KiB.
const DATA_RATE: u64 = 64 << 10;
const DATA_BURST: u64 = 256 << 10;
/// Bytes charged per script tag beside its own: the work of a message to each edge.
const DATA_OVERHEAD: u64 = 256;
/// The flow of a stream's packets to the addresses that get every stream, where only these are paced:
/// other packets of the stream must not wait for them.
fn fixed_flow(ssrc: Ssrc) -> Ssrc {
    Ssrc(ssrc.0 ^ 1 << 31)
}

/// `true` for a tag that holds no media: an empty body, a video info frame, an AAC body without data. A
/// Go edge ends when it gets one before it has both codec headers (wire v0).
fn is_too_short(tag: &Tag) -> bool {
    let body = tag.body();
    match tag.kind() {
        TagKind::Video => body.len() < VIDEO_LEAST,
        TagKind::Audio => match body.first() {
            Some(first) => first >> 4 == SOUND_FORMAT_AAC && body.len() < AAC_LEAST,
            None => true,
        },
        TagKind::Script => false,
    }
}

/// Bytes of a video body before its data: frame type and codec, packet type, composition time; or a
/// FourCC in their place.
const VIDEO_LEAST: usize = 5;
/// Bytes of an AAC body before its data: format and packet type.
const AAC_LEAST: usize = 2;
/// FLV 10.1 §E.4.2.1, `SoundFormat`.
const SOUND_FORMAT_AAC: u8 = 10;
/// How long an ended stream is kept for repair at most: far longer than any packet is useful.
const RETIRED_FOR: Duration = Duration::from_secs(60);
/// Bytes of packets that all ended streams may hold.
const RETIRED_BYTES: usize = 64 << 20;
const RETIRED_STREAMS: usize = 1024;
/// The most by which the parity of a stream that pauses is late.
const PARITY_TICK: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests;
