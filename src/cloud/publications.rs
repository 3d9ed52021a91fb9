//! The cloud's publications: from the encoder's tags to the hub, the history and the fan-out.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use prometheus::{IntCounter, Registry, register_int_counter_with_registry};
use tokio_util::sync::CancellationToken;

use downpour_distribution::downstream::parity::{
    ParityFlag, ParityMetrics, ParityOut, ParityWatch,
};
use downpour_distribution::downstream::{
    fanout::{Fanout, FrameInterval, Pace, Train},
    outgoing::{OutgoingStream, OutgoingStreams},
    routes::{Route, Snapshot, Target},
};
use downpour_hub::{
    self, Hub,
    admission::{Publication, PublishError, PublishHandler, PublishRequest},
};
use downpour_media::{
    StreamKey,
    flv::{Headers, Tag, TagKind},
};
use downpour_repair::{
    history::History,
    rtp::{Burst, Packetizer, Ssrc},
};

/// What bounds publications, from the config.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Packets that each stream's history holds.
    pub cache_packets: usize,
    /// How long it holds them, and how long an ended stream can be asked for packets.
    pub cache_age: Duration,
    /// Bytes of RTP payload in a packet.
    pub payload_max: usize,
    /// A publisher that has sent nothing for so long loses its key to one that comes.
    pub silence: Duration,
    /// Streams at a time.
    pub max_streams: usize,
}

/// What publications count.
#[derive(Debug, Clone)]
pub struct PublicationMetrics {
    retired_early: IntCounter,
    takeovers: IntCounter,
    parity: ParityMetrics,
}

impl PublicationMetrics {
    /// Makes the handles and registers them.
    ///
    /// # Errors
    /// If their names are taken.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let retired_early = register_int_counter_with_registry!(
            "downpour_ended_streams_dropped_total",
            "Ended streams whose packets were dropped early because all of them held too many",
            registry
        )?;
        let takeovers = register_int_counter_with_registry!(
            "downpour_publisher_takeovers_total",
            "Publishers that took a key over from a silent one",
            registry
        )?;
        Ok(Self { retired_early, takeovers, parity: ParityMetrics::register(registry)? })
    }
}

/// Admits publishers and carries what they send to all sinks. Cloning shares it.
#[derive(Clone)]
pub struct Publications {
    shared: Arc<Shared>,
}

struct Shared {
    settings: Settings,
    hub: Hub,
    origin: OutgoingStreams,
    /// `None` in debug mode: nothing is sent.
    fanout: Option<Fanout>,
    metrics: PublicationMetrics,
    live: Mutex<HashMap<StreamKey, Live>>,
    parity: Arc<ParityWatch>,
    retired: Mutex<VecDeque<(Instant, Arc<OutgoingStream>)>>,
    /// Called with each stream as it starts: the recorder's way in.
    on_start: OnStart,
}

type OnStart = Box<dyn Fn(&Arc<downpour_hub::Stream>) + Send + Sync>;

#[derive(Clone)]
struct Live {
    id: usize,
    kick: CancellationToken,
    /// Whether it has encoders of parity.
    has_parity: Arc<AtomicBool>,
    active: Arc<Mutex<Option<Active>>>,
}

impl Publications {
    /// Carries to `hub`, `origin` and, unless it is `None`, `fanout`; `on_start` hears of each
    /// stream as its first tag comes.
    pub fn new(
        settings: Settings,
        hub: Hub,
        origin: OutgoingStreams,
        fanout: Option<Fanout>,
        metrics: PublicationMetrics,
        on_start: impl Fn(&Arc<downpour_hub::Stream>) + Send + Sync + 'static,
    ) -> Self {
        let shared = Shared {
            settings,
            hub,
            origin,
            fanout,
            metrics,
            live: Mutex::default(),
            parity: Arc::default(),
            retired: Mutex::default(),
            on_start: Box::new(on_start),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Ends every publication and closes its connection; says how many there were.
    pub fn end_all(&self) -> usize {
        let live: Vec<_> = lock(&self.shared.live).drain().map(|(_, live)| live).collect();
        live.iter().for_each(Live::end);
        live.len()
    }

    /// Sends the parity of streams that pause. Never ends; does nothing while there is none to send.
    pub async fn drive_parity(&self) {
        loop {
            self.shared.parity.until_any().await;
            tokio::time::sleep(PARITY_TICK).await;
            self.handle_timeout(Instant::now());
        }
    }

    fn handle_timeout(&self, now: Instant) {
        let live = lock(&self.shared.live);
        let active: Vec<_> = live
            .values()
            .filter(|live| live.has_parity.load(Ordering::Acquire))
            .map(|live| live.active.clone())
            .collect();
        drop(live);
        for active in active {
            if let Some(active) = &mut *lock(&active) {
                active.handle_timeout(now);
            }
        }
    }

    /// Forgets packets that have grown too old, and streams that ended long enough ago. Meant to be
    /// called once a second.
    pub fn expire(&self, now: Instant) {
        let Shared { settings, origin, retired, .. } = &*self.shared;
        let mut retired = lock(retired);
        while let Some((ended, stream)) = retired.front()
            && now.saturating_duration_since(*ended) >= settings.cache_age
        {
            origin.remove(stream.ssrc());
            retired.pop_front();
        }
        drop(retired);
        for stream in origin.streams() {
            stream.expire(now);
        }
    }
}

impl Shared {
    /// Keeps an ended stream's packets for those who still miss some, as long as they are not too
    /// many: an encoder that comes and goes quickly must not fill the memory.
    fn retire(&self, stream: Arc<OutgoingStream>) {
        let mut retired = lock(&self.retired);
        retired.push_back((Instant::now(), stream));
        let mut bytes: usize = retired.iter().map(|(_, stream)| stream.held().1).sum();
        while (bytes > RETIRED_BYTES || retired.len() > RETIRED_STREAMS)
            && let Some((_, oldest)) = retired.pop_front()
        {
            bytes -= oldest.held().1;
            self.origin.remove(oldest.ssrc());
            self.metrics.retired_early.inc();
        }
    }
}

impl PublishHandler for Publications {
    fn publish(&self, request: PublishRequest) -> Result<Box<dyn Publication>, PublishError> {
        let Shared { settings, live, .. } = &*self.shared;
        let mut live = lock(live);
        if let Some(first) = live.get(&request.key) {
            let silent = match &*lock(&first.active) {
                Some(active) => active.last_tag.elapsed(),
                None => Duration::MAX,
            };
            if silent < settings.silence {
                return Err(PublishError::AlreadyLive(request.key));
            }
            tracing::warn!(
                stream = %request.key,
                peer = %request.peer,
                "takes over from a publisher that has been silent for {} s",
                silent.as_secs()
            );
            self.shared.metrics.takeovers.inc();
            first.end();
            live.remove(&request.key);
        }
        if live.len() >= settings.max_streams {
            return Err(PublishError::Full(format!("max_streams is {}", settings.max_streams)));
        }
        let parity_flag = ParityFlag::new(self.shared.parity.clone());
        let has_parity = parity_flag.reader();
        let active = Active {
            shared: self.shared.clone(),
            parity_flag,
            key: request.key.clone(),
            metadata: None,
            started: None,
            last_tag: Instant::now(),
        };
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let active = Arc::new(Mutex::new(Some(active)));
        let entry = Live { id, kick: request.kick, has_parity, active };
        live.insert(request.key.clone(), entry.clone());
        Ok(Box::new(Handle { publications: self.clone(), key: request.key, live: entry }))
    }
}

impl Live {
    fn end(&self) {
        self.kick.cancel();
        // Dropping it ends the stream here and now, not when its connection's task gets to run.
        drop(lock(&self.active).take());
    }
}

/// What the encoder's connection holds. It goes dead when another publisher takes the key over.
struct Handle {
    publications: Publications,
    key: StreamKey,
    live: Live,
}

impl Publication for Handle {
    fn tag(&mut self, tag: Tag) {
        if let Some(active) = &mut *lock(&self.live.active) {
            active.tag(tag);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut live = lock(&self.publications.shared.live);
        if live.get(&self.key).is_some_and(|live| live.id == self.live.id) {
            live.remove(&self.key);
        }
        drop(lock(&self.live.active).take());
    }
}

struct Active {
    shared: Arc<Shared>,
    parity_flag: ParityFlag,
    key: StreamKey,
    /// Came before the first media.
    metadata: Option<Tag>,
    started: Option<Started>,
    last_tag: Instant,
}

/// A publication from its first audio or video tag on.
struct Started {
    hub: downpour_hub::Publisher,
    origin: Arc<OutgoingStream>,
    packetizer: Packetizer,
    headers: Headers,
    has_video: bool,
    /// `None` where nothing is sent.
    way_out: Option<WayOut>,
}

/// How a publication's packets leave.
struct WayOut {
    fanout: Fanout,
    route: Route,
    parity: ParityOut,
    origin: Arc<OutgoingStream>,
    frame_interval: FrameInterval,
}

impl WayOut {
    fn new(
        fanout: Fanout,
        key: StreamKey,
        origin: Arc<OutgoingStream>,
        metrics: ParityMetrics,
    ) -> Self {
        if fanout.paces() {
            origin.leaves_later();
        }
        Self {
            route: fanout.routes().route(key, origin.ssrc()),
            parity: ParityOut::new(Instant::now(), origin.ssrc(), metrics),
            frame_interval: FrameInterval::default(),
            fanout,
            origin,
        }
    }

    fn send(&mut self, now: Instant, tag: &Tag, burst: &Burst) {
        if tag.kind() == TagKind::Video {
            self.frame_interval.add(tag.timestamp());
        }
        let pace = self.pace();
        let pace = pace.map(|pace| Pace {
            held: Some(Arc::new(OutgoingStream::departure(&self.origin, burst.last_seq()))),
            ..pace
        });
        let snapshot = self.route.targets(now);
        self.fanout.send(self.origin.ssrc(), burst, &snapshot.media, pace.as_ref());
        // The fan-out has what it needs of it.
        drop(pace);
        self.with_parity(|parity, snapshot, send| parity.push(now, burst, snapshot, send), now);
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.with_parity(|parity, snapshot, send| parity.handle_timeout(now, snapshot, send), now);
    }

    fn finish(&mut self, now: Instant) {
        self.with_parity(|parity, _, send| parity.finish(now, send), now);
        self.fanout.finish(self.origin.ssrc());
    }

    /// Parity goes in the stream's lane, behind what it protects.
    fn with_parity(
        &mut self,
        make: impl FnOnce(&mut ParityOut, &Arc<Snapshot>, &mut dyn FnMut(Train, Arc<[Target]>)),
        now: Instant,
    ) {
        let pace = self.pace();
        let Self { fanout, route, parity, origin, .. } = self;
        let mut send = |train: Train, targets: Arc<[Target]>| {
            fanout.send(origin.ssrc(), train, &targets, pace.as_ref());
        };
        make(parity, route.targets(now), &mut send);
    }

    fn pace(&self) -> Option<Pace> {
        self.fanout.paces().then(|| Pace {
            rate: self.origin.byte_rate(),
            interval: self.frame_interval.get(),
            held: None,
        })
    }
}

impl Active {
    fn tag(&mut self, tag: Tag) {
        let now = Instant::now();
        self.last_tag = now;
        if tag.kind() == TagKind::Script {
            self.script(tag);
            return;
        }
        if self.started.is_none() {
            self.started = self.start(&tag);
        }
        let Some(started) = &mut self.started else { return };
        started.has_video |= tag.kind() == TagKind::Video;
        let burst = started.packetizer.packetize(&tag);
        if tag.is_sequence_header() {
            started.note_header(&tag, &burst, &self.shared.origin);
        }
        let starts_gop = tag.is_key_frame() || !started.has_video;
        // Into the history first: an edge may ask for a packet before the last one is sent.
        started.origin.push(now, burst.clone(), starts_gop);
        if let Some(way_out) = &mut started.way_out {
            way_out.send(now, &tag, &burst);
            started.origin.set_parity_overhead(way_out.parity.overhead());
            self.parity_flag.set(way_out.parity.is_active());
        }
        started.hub.push_at(now, tag);
    }

    fn handle_timeout(&mut self, now: Instant) {
        if let Some(way_out) = self.started.as_mut().and_then(|started| started.way_out.as_mut()) {
            way_out.handle_timeout(now);
            self.parity_flag.set(way_out.parity.is_active());
        }
    }

    /// Script data does not travel as RTP (wire v0). Metadata is told to edges as a header; captions,
    /// cue points and the like stay with the cloud's own readers.
    fn script(&mut self, tag: Tag) {
        let Some(started) = &mut self.started else {
            if tag.is_metadata() {
                self.metadata = Some(tag);
            }
            return;
        };
        if tag.is_metadata() {
            started.headers.metadata = Some(tag.clone());
            started.origin.set_headers(started.headers.clone());
            self.shared.origin.updated(&started.origin);
        }
        started.hub.push(tag);
    }

    fn start(&mut self, first: &Tag) -> Option<Started> {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let start_unix_ms = (unix.as_millis() as u64).saturating_sub(u64::from(first.timestamp()));
        let mut hub = match self.shared.hub.publish_at(self.key.clone(), start_unix_ms) {
            Ok(hub) => hub,
            Err(error) => {
                // Keys are claimed in `live` before; the hub would only refuse one of another kind
                // of source.
                tracing::error!(stream = %self.key, "cannot start: {error}");
                return None;
            }
        };
        let Settings { cache_packets, cache_age, payload_max, .. } = self.shared.settings;
        let ssrc = self.free_ssrc();
        let headers = Headers { metadata: self.metadata.take(), ..Headers::default() };
        let history = History::new(cache_packets, cache_age);
        let origin = Arc::new(OutgoingStream::new(self.key.clone(), ssrc, start_unix_ms, history));
        origin.set_headers(headers.clone());
        if let Some(metadata) = &headers.metadata {
            hub.push(metadata.clone());
        }
        self.shared.origin.insert(origin.clone());
        (self.shared.on_start)(hub.stream());
        tracing::info!(stream = %self.key, %ssrc, "stream up");
        let packetizer = Packetizer::new(ssrc, payload_max);
        let way_out = self.shared.fanout.clone().map(|fanout| {
            let metrics = self.shared.metrics.parity.clone();
            WayOut::new(fanout, self.key.clone(), origin.clone(), metrics)
        });
        Some(Started { hub, origin, packetizer, headers, has_video: false, way_out })
    }

    /// Random, so that a restarted cloud or a second one is never mistaken for the first
    /// (RFC 3550 §8.1); not zero, which the Go edge takes for none.
    fn free_ssrc(&self) -> Ssrc {
        loop {
            let ssrc = Ssrc(rand::random());
            if ssrc.0 != 0 && self.shared.origin.stream(ssrc).is_none() {
                return ssrc;
            }
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        if let Some(mut started) = self.started.take() {
            if let Some(way_out) = &mut started.way_out {
                way_out.finish(Instant::now());
            }
            self.shared.origin.end(&started.origin);
            self.shared.retire(started.origin.clone());
            tracing::info!(stream = %self.key, ssrc = %started.origin.ssrc(), "stream ended");
        }
    }
}

impl Started {
    fn note_header(&mut self, tag: &Tag, burst: &Burst, origin: &OutgoingStreams) {
        let held = match tag.kind() {
            TagKind::Video => &mut self.headers.video,
            _ => &mut self.headers.audio,
        };
        // Encoders repeat theirs; only a change is news.
        if held.as_ref().is_some_and(|held| held.body() == tag.body()) {
            return;
        }
        *held = Some(tag.clone());
        self.origin.keep_header(tag.kind(), burst.detached());
        self.origin.set_headers(self.headers.clone());
        origin.updated(&self.origin);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Bytes of packets that ended streams may hold, all together.
const RETIRED_BYTES: usize = 64 << 20;
const RETIRED_STREAMS: usize = 1024;
/// How much later than due the parity of a stream that pauses may be sent.
const PARITY_TICK: Duration = Duration::from_millis(20);

static NEXT_ID: AtomicUsize = AtomicUsize::new(0);

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_distribution::downstream::outgoing::OutgoingEvent;
    use downpour_hub::LogLimits;
    use downpour_repair::rtp::Seq;

    fn publications(silence: Duration, max_streams: usize) -> (Publications, Hub, OutgoingStreams) {
        let settings = Settings {
            cache_packets: 100,
            cache_age: Duration::from_secs(10),
            payload_max: 1120,
            silence,
            max_streams,
        };
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 10_000 });
        let origin = OutgoingStreams::new();
        let metrics = PublicationMetrics::register(&Registry::new()).unwrap();
        let publications =
            Publications::new(settings, hub.clone(), origin.clone(), None, metrics, |_| ());
        (publications, hub, origin)
    }

    fn request(key: &str) -> PublishRequest {
        PublishRequest {
            key: key.parse().unwrap(),
            query: String::new(),
            peer: "127.0.0.1:1".parse().unwrap(),
            kick: CancellationToken::new(),
        }
    }

    fn frame(timestamp: u32, first: u8) -> Tag {
        Tag::new(TagKind::Video, timestamp, &[first, 1, 0, 0, 0, 9]).unwrap()
    }

    #[test]
    fn a_stream_is_listed_from_its_first_media_on_and_can_be_asked_for() {
        let (publications, hub, origin) = publications(Duration::from_secs(5), 10);
        let mut events = origin.subscribe();
        let mut publication = publications.publish(request("live/a")).unwrap();
        publication.tag(Tag::new(TagKind::Script, 0, b"\x02\x00\x0aonMetaData").unwrap());
        assert!(origin.streams().is_empty());
        publication.tag(Tag::new(TagKind::Video, 1000, &[0x17, 0, 0, 0, 0, 1]).unwrap());
        publication.tag(frame(1000, 0x17));
        publication.tag(frame(1040, 0x27));
        let stream = origin.streams().pop().unwrap();
        assert_eq!(stream.newest_seq(), Some(Seq(65002)));
        assert_eq!(stream.gop_start(), Some(Seq(65001)));
        assert!(stream.packet(Seq(65000)).is_some());
        let headers = stream.headers();
        assert!(headers.metadata.is_some() && headers.video.is_some() && headers.audio.is_none());
        let age = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
            - stream.start_unix_ms();
        assert!((1000..10_000).contains(&age), "media time 0 was a second before: {age}");
        assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Up(_))));
        assert!(matches!(events.try_recv(), Ok(OutgoingEvent::Update(_))));
        drop(publication);
        assert!(matches!(events.try_recv(), Ok(OutgoingEvent::End(_))));
        assert!(hub.is_empty() && stream.ended());
        publications.expire(Instant::now());
        assert!(stream.packet(Seq(65001)).is_some(), "its tail can still be asked for");
        publications.expire(Instant::now() + Duration::from_secs(11));
        assert!(origin.streams().is_empty());
    }

    #[test]
    fn a_second_publisher_is_refused_until_the_first_has_gone_silent() {
        let (publications, hub, origin) = publications(Duration::from_secs(5), 10);
        let first = request("live/a");
        let mut publication = publications.publish(first.clone()).unwrap();
        publication.tag(frame(0, 0x17));
        let refused = publications.publish(request("live/a")).err();
        assert_eq!(refused, Some(PublishError::AlreadyLive("live/a".parse().unwrap())));
        assert!(!first.kick.is_cancelled());
        let ssrc = origin.streams()[0].ssrc();

        let live = lock(&publications.shared.live).values().next().unwrap().clone();
        lock(&live.active).as_mut().unwrap().last_tag -= Duration::from_secs(6);
        let mut second = publications.publish(request("live/a")).unwrap();
        assert!(first.kick.is_cancelled());
        second.tag(frame(0, 0x17));
        // The first one's connection has not noticed yet; what it does changes nothing.
        publication.tag(frame(40, 0x27));
        drop(publication);
        assert_eq!(hub.len(), 1);
        let live: Vec<_> = origin.streams().into_iter().filter(|s| !s.ended()).collect();
        assert_eq!(live.len(), 1);
        assert_ne!(live[0].ssrc(), ssrc);
    }

    #[test]
    fn publications_that_come_and_go_do_not_fill_the_memory() {
        let (publications, _, origin) = publications(Duration::from_secs(5), 10);
        let mut body = vec![0; 8 << 20];
        body[..2].copy_from_slice(&[0x17, 1]);
        let tag = Tag::new(TagKind::Video, 0, &body).unwrap();
        for _ in 0..20 {
            publications.publish(request("live/a")).unwrap().tag(tag.clone());
        }
        let held: usize = origin.streams().iter().map(|stream| stream.held().1).sum();
        assert!(held <= RETIRED_BYTES, "{held} bytes are held");
        assert!(publications.shared.metrics.retired_early.get() >= 12);
        assert_eq!(origin.streams().len(), lock(&publications.shared.retired).len());
    }

    #[test]
    fn captions_do_not_replace_the_metadata() {
        let (publications, hub, origin) = publications(Duration::from_secs(5), 10);
        let mut publication = publications.publish(request("live/a")).unwrap();
        let script = |body: &[u8]| Tag::new(TagKind::Script, 40, body).unwrap();
        publication.tag(script(b"\x02\x00\x0aonMetaData\x05"));
        publication.tag(frame(0, 0x17));
        publication.tag(script(b"\x02\x00\x0aonTextData\x05"));
        let told = origin.streams()[0].headers().metadata.unwrap();
        assert!(told.is_metadata());
        let stream = hub.streams().pop().unwrap();
        assert_eq!(stream.headers().metadata.unwrap().body(), told.body());
        assert_eq!(stream.counters().script_tags.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn who_joins_before_the_first_key_frame_is_told_to_begin_at_the_beginning() {
        let (publications, _, origin) = publications(Duration::from_secs(5), 10);
        let mut publication = publications.publish(request("live/a")).unwrap();
        let header = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap();
        publication.tag(header.clone());
        let stream = origin.streams().pop().unwrap();
        assert_eq!((stream.gop_start(), stream.newest_seq()), (Some(Seq(65000)), Some(Seq(65000))));
        for i in 0..200 {
            publication.tag(frame(i, if i == 0 { 0x17 } else { 0x27 }));
        }
        assert_eq!(stream.gop_start(), None, "the ring holds 100 packets");
        assert_eq!(stream.packet(Seq(65000)), None);
        assert!(stream.header_packet(Seq(65000)).is_some_and(|p| p.ends_with(header.unit())));
        assert_eq!(stream.header_packet(Seq(65001)), None);
    }

    #[test]
    fn the_node_can_be_full() {
        let (publications, ..) = publications(Duration::from_secs(5), 1);
        let _first = publications.publish(request("live/a")).unwrap();
        let refused = publications.publish(request("live/b")).err();
        assert!(matches!(refused, Some(PublishError::Full(_))), "{refused:?}");
    }
}
