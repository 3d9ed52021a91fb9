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
    history::History,
    rtp::{Burst, Packetizer, Ssrc},
};
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
        let short_tags = register_int_counter_with_registry!(
            "downpour_short_tags_dropped_total",
            "Audio and video tags not sent as RTP because they are too short to hold media",
            registry
        )?;
        Ok(Self { retired_early, short_tags, parity: ParityMetrics::register(registry)? })
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
        Self {
            outgoing,
            packetizer: Packetizer::new(ssrc, payload_max),
            repeated_headers: RepeatedHeaders::default(),
            has_video: headers.video().is_some(),
            headers,
            route_out,
            parity_flag: ParityFlag::new(shared.parity.clone()),
            shared,
        }
    }

    fn push(&mut self, now: Instant, tag: &Tag) {
        if tag.kind() == TagKind::Script {
            // Script tags are not sent as RTP (wire v0). Edges get the metadata as a header; captions
            // and cue points reach only readers of this node.
            if tag.is_metadata() {
                self.learn(tag, None);
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
            self.learn(tag, Some(&burst));
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
    fn learn(&mut self, tag: &Tag, burst: Option<&Burst>) {
        if !self.headers.learn(tag) {
            return;
        }
        self.outgoing.set_headers(self.headers.clone());
        if let Some(burst) = burst {
            // Copied: a header that lives long must not hold the buffer that it shares.
            self.outgoing.keep_header(tag.detached(), burst.detached());
        }
        self.shared.outgoing.updated(&self.outgoing);
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
mod tests {
    use super::*;
    use crate::downstream::outgoing::OutgoingEvent;
    use downpour_hub::{Hub, LogLimits};
    use downpour_repair::rtp::Seq;

    fn sender() -> (StreamSender, Hub, OutgoingStreams) {
        let settings = SenderSettings {
            history_packets: 100,
            history_age: Duration::from_secs(10),
            payload_max: 1120,
            repeat_headers: true,
        };
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 10_000 });
        let outgoing = OutgoingStreams::new();
        let metrics = SenderMetrics::register(&Registry::new()).unwrap();
        let sender = StreamSender::new(settings, outgoing.clone(), None, metrics);
        hub.add_sink(Arc::new(sender.clone()));
        (sender, hub, outgoing)
    }

    fn frame(timestamp: u32, first: u8) -> Tag {
        Tag::new(TagKind::Video, timestamp, &[first, 1, 0, 0, 0, 9]).unwrap()
    }

    fn header() -> Tag {
        Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap()
    }

    fn script(body: &[u8]) -> Tag {
        Tag::new(TagKind::Script, 40, body).unwrap()
    }

    #[test]
    fn a_live_stream_is_listed_and_its_packets_can_be_requested() {
        let (sender, hub, outgoing) = sender();
        let mut events = outgoing.subscribe();
        let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
        publisher.push(script(b"\x02\x00\x0aonMetaData\x05"));
        publisher.push(header());
        publisher.push(frame(1000, 0x17));
        publisher.push(frame(1040, 0x27));
        let stream = outgoing.streams().pop().unwrap();
        assert_eq!(stream.id(), publisher.stream().id());
        assert_eq!(stream.start_unix_ms(), publisher.stream().start_unix_ms());
        assert_eq!(stream.newest_seq(), Some(Seq(65002)));
        assert_eq!(stream.gop_start(), Some(Seq(65001)));
        assert!(stream.packet(Seq(65000)).is_some());
        let headers = stream.headers();
        assert!(headers.metadata().is_some() && headers.video().is_some());
        assert!(headers.audio().is_none());
        assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Up(_))));
        assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Update(_))), "the metadata");
        assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Update(_))), "the video header");
        drop(publisher);
        assert!(matches!(events.try_recv(), Ok(OutgoingEvent::End(_))));
        assert!(stream.ended());
        sender.expire(Instant::now());
        assert!(stream.packet(Seq(65001)).is_some(), "its last packets can still be requested");
        sender.expire(Instant::now() + Duration::from_secs(11));
        assert!(outgoing.streams().is_empty());
    }

    #[test]
    fn streams_that_come_and_go_do_not_fill_the_memory() {
        let (sender, hub, outgoing) = sender();
        let mut body = vec![0; 8 << 20];
        body[..2].copy_from_slice(&[0x17, 1]);
        let tag = Tag::new(TagKind::Video, 0, &body).unwrap();
        for _ in 0..20 {
            hub.publish("live/a".parse().unwrap()).unwrap().push(tag.clone());
        }
        let held: usize = outgoing.streams().iter().map(|stream| stream.held().1).sum();
        assert!(held <= RETIRED_BYTES, "{held} bytes are held");
        assert!(sender.shared.metrics.retired_early.get() >= 12);
        assert_eq!(outgoing.streams().len(), sender.shared.retired.lock().len());
        assert!(sender.shared.live.lock().is_empty());
    }

    #[test]
    fn captions_do_not_replace_the_metadata() {
        let (_, hub, outgoing) = sender();
        let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
        publisher.push(script(b"\x02\x00\x0aonMetaData\x05"));
        publisher.push(frame(0, 0x17));
        publisher.push(script(b"\x02\x00\x0aonTextData\x05"));
        assert!(outgoing.streams()[0].headers().metadata().unwrap().is_metadata());
    }

    #[test]
    fn an_edge_that_joins_before_the_first_key_frame_starts_at_the_first_packet() {
        let (_, hub, outgoing) = sender();
        let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
        publisher.push(header());
        let stream = outgoing.streams().pop().unwrap();
        assert_eq!(stream.gop_start(), Some(Seq(65000)));
        assert_eq!(stream.newest_seq(), Some(Seq(65000)));
        for i in 0..200 {
            publisher.push(frame(i, if i == 0 { 0x17 } else { 0x27 }));
        }
        assert_eq!(stream.gop_start(), None, "the ring holds 100 packets");
        assert_eq!(stream.packet(Seq(65000)), None);
        assert!(stream.header_packet(Seq(65000)).is_some_and(|p| p.ends_with(header().unit())));
        assert_eq!(stream.header_packet(Seq(65001)), None);
    }

    #[test]
    fn headers_of_every_track_are_announced_and_kept_for_requests() {
        let (_, hub, outgoing) = sender();
        let mut publisher = hub.publish("live/a".parse().unwrap()).unwrap();
        let second = Tag::new(TagKind::Audio, 0, b"\x95\x00mp4a\x01\x12\x10").unwrap();
        let main = Tag::new(TagKind::Audio, 0, &[0xaf, 0, 0x12, 0x10]).unwrap();
        let changed = Tag::new(TagKind::Audio, 0, &[0xaf, 0, 0x13, 0x10]).unwrap();
        let empty = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0]).unwrap();
        for tag in [header(), main, second.clone(), empty, changed.clone()] {
            publisher.push(tag);
        }
        let stream = outgoing.streams().pop().unwrap();
        let headers: Vec<_> = stream.headers().iter().cloned().collect();
        assert_eq!(headers, [header(), changed, second]);
        let kept = |seq: u16| stream.header_packet(Seq(seq)).is_some();
        assert!(kept(65000) && kept(65002) && kept(65004));
        assert!(!kept(65001) && !kept(65003), "replaced, and no header");
    }
}
