//! The edge's streams: from RTP packets and the cloud's word about them to tags in the hub.
//!
//! No socket and no clock: the ingress task feeds it and carries its requests away.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::{BuildHasher, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{
    livestat::LiveStream,
    parity::Parity,
    stats::{ReceiveMetrics, StreamStats},
};
use downpour_hub::{self, Hub, NextPush, Publisher};
use downpour_media::{
    StreamKey,
    flv::{Headers, Tag, TagKind},
};
use downpour_repair::{
    control::{StreamInfo, StreamReport},
    fec,
    message::{Heartbeat, Nack},
    receiver::{self, Event, Path, Receiver},
    rtp::{
        Depacketizer, Packet, Seq, Ssrc,
        depacketizer::Damage,
        flexfec::Repair,
        packet::{Header, PAYLOAD_TYPE},
    },
};
use downpour_sys::prefetch;

/// How streams are received.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Reordering and repair.
    pub receiver: receiver::Settings,
    /// A stream whose cloud tells no end is over when nothing has come for so long.
    pub silence: Duration,
    /// Streams at a time.
    pub max_streams: usize,
}

/// All streams that this edge receives.
pub struct Streams {
    settings: Settings,
    hub: Hub,
    metrics: ReceiveMetrics,
    streams: HashMap<Ssrc, StreamSlot, SsrcHash>,
    by_key: HashMap<StreamKey, Ssrc>,
    /// Packets of publications that nobody has named yet.
    unknown: HashMap<Ssrc, Unknown>,
    /// One came to them.
    saw_unknown_ssrc: bool,
    /// The path's round trip and how it varies, once it is known.
    round_trip: Option<(Duration, Duration)>,
    /// Publications that ended a moment ago: their stragglers are not the start of something.
    ended: VecDeque<(Instant, Ssrc)>,
    nacks: VecDeque<Nack>,
    /// Every stream once; those at the front are reported next.
    report_turns: VecDeque<Ssrc>,
    /// Called with each stream as it comes up: the recorder's way in.
    on_start: OnStart,
    refusal_logged: Option<Instant>,
    /// Whether the cloud tells which streams there are and when they end.
    told: bool,
    /// Whether parity has come of any stream.
    has_parity: bool,
    /// When each stream that waits for something is to be looked at: [`ReceivedStream::wake`].
    wakes: BTreeSet<(Instant, Ssrc)>,
}

type OnStart = Box<dyn Fn(&Arc<downpour_hub::Stream>) + Send>;

struct Unknown {
    since: Instant,
    packets: Vec<(Packet, Path)>,
}

/// A stream as it is found by its SSRC.
struct StreamSlot {
    stream: Box<ReceivedStream>,
    ahead: PrefetchHints,
}

/// What of memory a stream's next packet will need, so far as one can tell. It is beside the
/// stream's address, so that all of it can be fetched at once.
#[derive(Debug, Clone, Copy)]
struct PrefetchHints {
    push: NextPush,
    /// Address of the place that its payload will have.
    payload: usize,
    /// Address of what is written for each tag besides.
    count: usize,
}

/// What each packet needs is in front and together: few lines of the cache, which with hundreds of
/// streams are cold each time.
#[repr(C, align(64))]
struct ReceivedStream {
    publisher: Publisher,
    last_packet: Instant,
    /// The cloud said that the stream is over: the last number it sent, and how long to wait.
    ending: Option<(Option<Seq>, Instant)>,
    header_hunt: Option<Box<HeaderRecovery>>,
    /// Once parity has come.
    parity: Option<Box<Parity>>,
    depacketizer: Depacketizer,
    receiver: Receiver,
    ssrc: Ssrc,
    key: StreamKey,
    /// Its place in [`Streams::wakes`], if it has one.
    wake: Option<Instant>,
    /// A new connection to the cloud has not named it yet.
    unconfirmed_since: Option<Instant>,
    damage: Damage,
    damage_logged: Option<Instant>,
    counted: receiver::Stats,
    counted_parity: fec::decoder::Stats,
}

/// What a v0 cloud does not tell to one who joins late: the codec headers. They were the first
/// packets of the publication, so those are asked for, should they still be held. Media waits a
/// moment for the answer, because a header is of no use behind the frames that need it.
struct HeaderRecovery {
    depacketizer: Depacketizer,
    next: Seq,
    until: Instant,
    tries_left: u8,
    /// `None` once media does not wait any longer.
    waiting: Option<Vec<Tag>>,
    waiting_bytes: usize,
}

impl Streams {
    /// Receives nothing yet; tags will go to `hub`, and `on_start` hears of each stream that comes
    /// up.
    pub fn new(
        settings: Settings,
        hub: Hub,
        metrics: ReceiveMetrics,
        on_start: impl Fn(&Arc<downpour_hub::Stream>) + Send + 'static,
    ) -> Self {
        Self {
            settings,
            hub,
            metrics,
            streams: HashMap::default(),
            by_key: HashMap::new(),
            unknown: HashMap::new(),
            saw_unknown_ssrc: false,
            round_trip: None,
            ended: VecDeque::new(),
            nacks: VecDeque::new(),
            report_turns: VecDeque::new(),
            on_start: Box::new(on_start),
            refusal_logged: None,
            told: false,
            has_parity: false,
            wakes: BTreeSet::new(),
        }
    }

    /// Says that these datagrams come next, each the first of some of one sender: all that they will
    /// need of memory is fetched at once.
    pub fn expect<'a>(&self, datagrams: impl Iterator<Item = &'a [u8]>) {
        for datagram in datagrams {
            let Some(ssrc) = datagram.get(8..).and_then(<[u8]>::first_chunk) else { continue };
            let ssrc = Ssrc(u32::from_be_bytes(*ssrc));
            if let Some(StreamSlot { stream, ahead }) = self.streams.get(&ssrc) {
                prefetch((&raw const **stream).addr(), HOT_BYTES);
                prefetch(ahead.count, size_of::<usize>());
                ahead.push.expect();
                // The longest last: a processor fetches only some lines at a time.
                prefetch(ahead.payload, datagram.len());
            }
        }
    }

    /// Takes one datagram of RTP as it came, by the path of this number.
    pub fn handle_live(&mut self, now: Instant, datagram: &[u8], path: u8) {
        if !self.handle_next(now, datagram, path) {
            self.handle_packet(now, Bytes::copy_from_slice(datagram), Path::Live(path));
        }
    }

    /// Takes a datagram of RTP if it is the next of a stream of which nothing is missing, which is
    /// what nearly all of them are: straight into its tag, without a place of its own in memory.
    fn handle_next(&mut self, now: Instant, datagram: &[u8], path: u8) -> bool {
        let Ok((header, payload)) = Header::parse(datagram) else { return false };
        let (Some(StreamSlot { stream, ahead }), Some(payload)) =
            (self.streams.get_mut(&header.ssrc), datagram.get(payload))
        else {
            return false;
        };
        let is_next = header.payload_type == PAYLOAD_TYPE
            && stream.ending.is_none()
            && stream.parity.is_none()
            && stream.receiver.handle_next(now, header.seq, path);
        if is_next {
            stream.last_packet = now;
            if let Some(tag) = stream.depacketizer.payload(&header, payload) {
                stream.push(now, tag);
            }
            stream.look_for_damage(now, &self.metrics);
            *ahead = stream.ahead();
        }
        is_next
    }

    /// Takes one datagram of RTP, or a packet that came as a repair.
    pub fn handle_packet(&mut self, now: Instant, datagram: Bytes, path: Path) {
        let whole = self.has_parity.then(|| datagram.clone());
        let packet = match Packet::parse(datagram) {
            Ok(packet) if packet.header.payload_type == PAYLOAD_TYPE => packet,
            _ => {
                self.metrics.malformed.inc();
                return;
            }
        };
        let ssrc = packet.header.ssrc;
        let Some(StreamSlot { stream, .. }) = self.streams.get_mut(&ssrc) else {
            self.hold_unknown(now, packet, path);
            return;
        };
        if matches!(path, Path::Live(_)) {
            stream.last_packet = now;
        } else if stream.hunt_headers(&packet) {
            // It is from the publication's beginning, and none of those that are missing now.
            return;
        }
        stream.receiver.handle_packet(now, packet, path);
        if let (Some(parity), Some(datagram)) = (&mut stream.parity, whole) {
            for packet in parity.handle_media(datagram) {
                stream.receiver.handle_packet(now, packet, Path::Parity);
            }
        }
        self.pump(now, ssrc);
    }

    /// Takes one datagram of parity.
    pub fn handle_parity(&mut self, now: Instant, datagram: Bytes) {
        let repair = match Repair::parse(datagram) {
            Ok(repair) => repair,
            Err(_) => {
                self.metrics.parity_malformed.inc();
                return;
            }
        };
        self.metrics.parity_received.inc();
        let ssrc = repair.media;
        let Some(StreamSlot { stream, .. }) = self.streams.get_mut(&ssrc) else {
            // Of a stream that is not wanted, or not named yet: it comes with the next block.
            self.metrics.parity_unknown.inc();
            return;
        };
        self.has_parity = true;
        let packets = stream.receiver.stats().delays.total();
        let parity = stream.parity.get_or_insert_with(|| Box::new(Parity::new(now, ssrc, packets)));
        for packet in parity.handle_parity(now, repair) {
            stream.receiver.handle_packet(now, packet, Path::Parity);
        }
        self.pump(now, ssrc);
    }

    /// The cloud told of a publication: its packets can be put into tags from now on.
    pub fn stream_up(&mut self, now: Instant, up: StreamInfo) {
        // Nothing sent yet: it begins at the beginning.
        let first = up.gop_start.or(up.newest.is_none().then_some(Seq::FIRST));
        self.start_stream(now, up, first);
    }

    /// The cloud's API named a publication that is under way, and told nothing else of it.
    pub fn stream_named(&mut self, now: Instant, stream: LiveStream) {
        let LiveStream { key, ssrc, start_unix_ms } = stream;
        let held = self.unknown.get(&ssrc).and_then(|unknown| unknown.packets.first());
        let first = held.map(|(packet, _)| packet.header.seq).filter(|seq| *seq == Seq::FIRST);
        let headers = Headers::default();
        let up = StreamInfo { key, ssrc, start_unix_ms, headers, gop_start: None, newest: None };
        self.start_stream(now, up, first);
    }

    /// `first` is where to begin, if that is known; else it is wherever one comes in.
    fn start_stream(&mut self, now: Instant, up: StreamInfo, first: Option<Seq>) {
        if let Some(stream) = self.streams.get_mut(&up.ssrc) {
            stream.unconfirmed_since = None;
            self.stream_update(up.ssrc, up.headers);
            return;
        }
        self.forget_ended(now);
        self.ended.retain(|(_, ssrc)| *ssrc != up.ssrc);
        if let Some(old) = self.by_key.get(&up.key).copied() {
            // The same name by another publication: the cloud or the encoder came back.
            self.end(now, old, "a newer publication has its name");
        }
        if self.streams.len() >= self.settings.max_streams {
            self.metrics.refused_streams.inc();
            let due = |at: Instant| now.saturating_duration_since(at) >= REFUSAL_LOG_EVERY;
            if self.refusal_logged.is_none_or(due) {
                self.refusal_logged = Some(now);
                let max_streams = self.settings.max_streams;
                tracing::warn!(stream = %up.key, max_streams, "too many streams to receive this one");
            }
            return;
        }
        let mut publisher = match self.hub.publish_at(up.key.clone(), up.start_unix_ms) {
            Ok(publisher) => publisher,
            Err(error) => {
                tracing::error!("cannot receive: {error}");
                return;
            }
        };
        let Headers { metadata, video, audio } = up.headers;
        let knows_headers = metadata.is_some() || video.is_some() || audio.is_some();
        publisher.set_headers(metadata, video, audio);
        let held = self.unknown.remove(&up.ssrc).map(|unknown| unknown.packets).unwrap_or_default();
        // A group of pictures that is longer than the window cannot be fetched whole.
        let window = self.settings.receiver.window;
        let fits = |first: &Seq| {
            let ahead = up.newest.map_or(0, |newest| newest.distance_from(*first));
            usize::try_from(ahead).is_ok_and(|ahead| ahead < window)
        };
        let first = first.filter(fits);
        let (mut receiver, depacketizer) = match first {
            Some(first) => {
                (Receiver::starting_at(self.settings.receiver, first), Depacketizer::new())
            }
            None => (Receiver::new(self.settings.receiver), Depacketizer::joining()),
        };
        if let Some((round_trip, variation)) = self.round_trip {
            receiver.set_round_trip(now, round_trip, variation);
        }
        (self.on_start)(publisher.stream());
        tracing::info!(stream = %up.key, ssrc = %up.ssrc, "stream up");
        let mut stream = Box::new(ReceivedStream {
            key: up.key.clone(),
            ssrc: up.ssrc,
            receiver,
            depacketizer,
            publisher,
            last_packet: now,
            wake: None,
            unconfirmed_since: None,
            ending: None,
            header_hunt: None,
            parity: None,
            damage: Damage::default(),
            damage_logged: None,
            counted: receiver::Stats::default(),
            counted_parity: fec::decoder::Stats::default(),
        });
        if first.is_none() && !knows_headers {
            self.nacks.push_back(stream.begin_header_hunt(now));
        }
        for (packet, path) in held {
            stream.receiver.handle_packet(now, packet, path);
        }
        if let (Some(_), Some(newest)) = (first, up.newest) {
            stream.receiver.handle_heartbeat(now, newest);
        }
        self.by_key.insert(up.key, up.ssrc);
        self.streams.insert(up.ssrc, StreamSlot { ahead: stream.ahead(), stream });
        self.report_turns.push_front(up.ssrc);
        self.pump(now, up.ssrc);
    }

    /// The cloud told new headers of a stream.
    pub fn stream_update(&mut self, ssrc: Ssrc, headers: Headers) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.publisher.set_headers(headers.metadata, headers.video, headers.audio);
        }
    }

    /// The cloud says that a stream is over; what is still missing of it is waited for.
    pub fn stream_end(&mut self, now: Instant, ssrc: Ssrc, last: Option<Seq>) {
        self.unknown.remove(&ssrc);
        let Some(StreamSlot { stream, .. }) = self.streams.get_mut(&ssrc) else {
            self.ended.push_back((now, ssrc));
            return;
        };
        if let Some(last) = last {
            stream.receiver.handle_heartbeat(now, last);
        }
        // Everything missing has a deadline by now; nothing can come after the last of them.
        let patience = self.settings.receiver.latency.max(self.settings.receiver.join_latency);
        stream.ending = Some((last, now + patience + receiver::GRACE));
        self.pump(now, ssrc);
    }

    /// Ends every stream that has been silent for `age` and is not among `listed`, which the cloud's
    /// API told just now.
    pub fn retain_streams(&mut self, now: Instant, listed: &[Ssrc], age: Duration) {
        let over = |s: &StreamSlot| {
            !listed.contains(&s.ssrc) && now.saturating_duration_since(s.last_packet) >= age
        };
        let over: Vec<_> = self.streams.values().filter(|s| over(s)).map(|s| s.ssrc).collect();
        for ssrc in over {
            self.end(now, ssrc, "the cloud lists it no more");
        }
    }

    /// The cloud no longer holds these packets.
    pub fn gone(&mut self, now: Instant, ssrc: Ssrc, seqs: &[Seq]) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.receiver.handle_gone(now, seqs.iter().copied());
            if stream.header_hunt.as_ref().is_some_and(|hunt| seqs.contains(&hunt.next)) {
                stream.end_wait();
            }
            self.pump(now, ssrc);
        }
    }

    /// The cloud says what it sent last of these streams.
    pub fn heartbeats(&mut self, now: Instant, beats: &[Heartbeat]) {
        for some in beats.chunks(EXPECTED_BEATS) {
            for stream in some.iter().filter_map(|beat| self.streams.get(&beat.ssrc)) {
                prefetch((&raw const *stream.stream).addr(), HOT_BYTES);
            }
            some.iter().for_each(|beat| self.heartbeat(now, beat.ssrc, beat.last));
        }
    }

    fn heartbeat(&mut self, now: Instant, ssrc: Ssrc, last: Seq) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.last_packet = now;
            if stream.receiver.handle_heartbeat(now, last) {
                self.pump(now, ssrc);
            }
        }
    }

    /// A connection over which the cloud tells of streams and their ends is up, or no longer.
    pub fn set_told(&mut self, now: Instant, told: bool) {
        self.told = told;
        for stream in self.streams.values_mut() {
            // Named anew in a moment if it is still there.
            stream.unconfirmed_since = told.then_some(now);
        }
    }

    /// Tells streams that come up from now on the path's round trip.
    pub fn expect_round_trip(&mut self, round_trip: Duration, variation: Duration) {
        self.round_trip = Some((round_trip, variation));
    }

    /// Tells the round trip to the cloud.
    pub fn set_round_trip(&mut self, now: Instant, round_trip: Duration, variation: Duration) {
        self.expect_round_trip(round_trip, variation);
        for stream in self.streams.values_mut() {
            stream.receiver.set_round_trip(now, round_trip, variation);
        }
    }

    /// Does what is due: requests, packets to give up, streams to end.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.poll_timeout().is_none_or(|at| at >= now + TIMER_STEP) {
            return;
        }
        // Each once: one that is due again at once has its turn at the next call.
        let mut due = self.wakes.split_off(&(now + TIMER_STEP, Ssrc(0)));
        std::mem::swap(&mut due, &mut self.wakes);
        for (_, ssrc) in due {
            if let Some(stream) = self.streams.get_mut(&ssrc) {
                stream.wake = None;
                stream.receiver.handle_timeout(now);
                self.pump(now, ssrc);
            }
        }
    }

    /// What has to be done now and then rather than at a moment: counts, silent streams, leftovers.
    /// Meant to be called a few times a second.
    pub fn tick(&mut self, now: Instant) {
        self.forget_ended(now);
        let silence = self.settings.silence;
        let over = |stream: &&StreamSlot| match (self.told, stream.unconfirmed_since) {
            (true, None) => false,
            (true, Some(since)) => now.saturating_duration_since(since) > CONFIRM_WITHIN,
            (false, _) => now.saturating_duration_since(stream.last_packet) > silence,
        };
        let over: Vec<_> = self.streams.values().filter(over).map(|s| s.ssrc).collect();
        for ssrc in over {
            match self.told {
                true => self.end(now, ssrc, "the cloud came back without it"),
                // It may go on: then it is a stream that nobody has named, and comes up again.
                false => self.remove(now, ssrc, "nothing comes, and the cloud is not heard of"),
            }
        }
        self.unknown.retain(|_, unknown| {
            let keep = now.saturating_duration_since(unknown.since) < UNKNOWN_KEPT;
            if !keep {
                self.metrics.unknown_dropped.inc_by(unknown.packets.len() as u64);
            }
            keep
        });
        for StreamSlot { stream, .. } in self.streams.values_mut() {
            stream.count(&self.metrics);
            if let Some(parity) = &mut stream.parity {
                let wait = parity.wait(now, stream.receiver.stats().delays.total());
                stream.receiver.set_parity_wait(wait);
            }
        }
        self.metrics.publish(self.streams.values().map(|stream| stream.stats()));
    }

    /// The next request to send to the cloud.
    pub fn poll_nack(&mut self) -> Option<Nack> {
        self.nacks.pop_front()
    }

    /// When to call [`Streams::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// Whether a stream has been silent for `age`, so that it may be over without our being told.
    pub fn any_silent(&self, now: Instant, age: Duration) -> bool {
        let silent = |s: &StreamSlot| now.saturating_duration_since(s.last_packet) >= age;
        self.streams.values().any(silent)
    }

    /// The publications of which packets have come for at least `age`, and no name.
    pub fn unnamed(&self, now: Instant, age: Duration) -> impl Iterator<Item = Ssrc> {
        self.unknown
            .iter()
            .filter(move |(_, unknown)| now.saturating_duration_since(unknown.since) >= age)
            .map(|(ssrc, _)| *ssrc)
    }

    /// Whether there is a publication without a name that there was not at the last call.
    pub fn saw_unknown_ssrc(&mut self) -> bool {
        std::mem::take(&mut self.saw_unknown_ssrc)
    }

    /// How streams fare, for the cloud: all of them, or the next `most` of them, in turn.
    pub fn reports(&mut self, most: usize) -> Vec<StreamReport> {
        let turns = self.report_turns.len().min(most);
        let reports = self.report_turns.iter().take(turns);
        let reports = reports
            .filter_map(|ssrc| self.streams.get(ssrc))
            .map(|stream| stream.report())
            .collect();
        self.report_turns.rotate_left(turns);
        reports
    }

    fn hold_unknown(&mut self, now: Instant, packet: Packet, path: Path) {
        let ssrc = packet.header.ssrc;
        let stale = path == Path::Repair || self.ended.iter().any(|(_, ended)| *ended == ssrc);
        let room = self.unknown.len() < MAX_UNKNOWN || self.unknown.contains_key(&ssrc);
        if stale || !room {
            self.metrics.unknown_dropped.inc();
            return;
        }
        let unknown = self.unknown.entry(ssrc).or_insert_with(|| {
            self.saw_unknown_ssrc = true;
            Unknown { since: now, packets: Vec::new() }
        });
        // The first ones are kept: they may hold the headers, and the later can be asked for.
        if unknown.packets.len() < MAX_UNKNOWN_PACKETS {
            unknown.packets.push((packet, path));
        } else {
            self.metrics.unknown_dropped.inc();
        }
    }

    /// Moves what a stream's receiver has ready to where it belongs.
    fn pump(&mut self, now: Instant, ssrc: Ssrc) {
        let Some(StreamSlot { stream, ahead }) = self.streams.get_mut(&ssrc) else { return };
        while let Some(request) = stream.receiver.poll_request(now) {
            let slack_ms = request.slack_ms(now);
            self.nacks.push_back(Nack {
                ssrc,
                copies: request.copies,
                slack_ms,
                seqs: request.seqs,
            });
            if self.nacks.len() > MAX_NACKS {
                self.nacks.pop_front();
                self.metrics.nacks_dropped.inc();
            }
        }
        stream.hand_on(now, &self.metrics);
        if stream.header_hunt.as_ref().is_some_and(|hunt| hunt.until <= now) {
            self.nacks.extend(stream.hunt_on(now));
        }
        let over = stream.ending.is_some_and(|(last, until)| {
            last.is_none_or(|last| stream.receiver.is_done_through(last)) || until <= now
        });
        if over {
            self.end(now, ssrc, "the cloud ended it");
            return;
        }
        let timeouts = [
            stream.receiver.poll_timeout(),
            stream.ending.map(|(_, until)| until),
            stream.header_hunt.as_ref().map(|hunt| hunt.until),
        ];
        let wake = timeouts.into_iter().flatten().min();
        if wake != stream.wake {
            if let Some(before) = std::mem::replace(&mut stream.wake, wake) {
                self.wakes.remove(&(before, ssrc));
            }
            self.wakes.extend(wake.map(|at| (at, ssrc)));
        }
        *ahead = stream.ahead();
    }

    /// Removes a stream that is surely over: what still comes of it are stragglers.
    fn end(&mut self, now: Instant, ssrc: Ssrc, why: &str) {
        self.ended.push_back((now, ssrc));
        self.remove(now, ssrc, why);
    }

    fn remove(&mut self, now: Instant, ssrc: Ssrc, why: &str) {
        let Some(mut stream) = self.streams.remove(&ssrc) else { return };
        // What waits behind a gap is of use all the same.
        stream.receiver.finish(now);
        stream.hand_on(now, &self.metrics);
        self.report_turns.retain(|turn| *turn != ssrc);
        if let Some(wake) = stream.wake {
            self.wakes.remove(&(wake, ssrc));
        }
        stream.count(&self.metrics);
        if self.by_key.get(&stream.key) == Some(&ssrc) {
            self.by_key.remove(&stream.key);
        }
        tracing::info!(stream = %stream.key, %ssrc, "stream ended: {why}");
    }

    fn forget_ended(&mut self, now: Instant) {
        let old = |ended: Instant| now.saturating_duration_since(ended) > ENDED_REMEMBERED;
        while self.ended.len() > MAX_ENDED || self.ended.front().is_some_and(|(at, _)| old(*at)) {
            self.ended.pop_front();
        }
    }
}

impl std::ops::Deref for StreamSlot {
    type Target = ReceivedStream;

    fn deref(&self) -> &ReceivedStream {
        &self.stream
    }
}

impl std::ops::DerefMut for StreamSlot {
    fn deref_mut(&mut self) -> &mut ReceivedStream {
        &mut self.stream
    }
}

impl ReceivedStream {
    fn ahead(&self) -> PrefetchHints {
        PrefetchHints {
            push: self.publisher.next_push(),
            payload: self.depacketizer.next_place(),
            count: self.depacketizer.count(),
        }
    }

    fn begin_header_hunt(&mut self, now: Instant) -> Nack {
        self.header_hunt = Some(Box::new(HeaderRecovery {
            depacketizer: Depacketizer::new(),
            next: Seq::FIRST,
            until: now + MEDIA_WAITS,
            tries_left: HUNT_TRIES,
            waiting: Some(Vec::new()),
            waiting_bytes: 0,
        }));
        self.hunt_request()
    }

    fn hunt_request(&self) -> Nack {
        let seqs = (0..HUNT_PACKETS).map(|i| Seq::FIRST.plus(i)).collect();
        let slack_ms = MEDIA_WAITS.as_millis() as u16;
        Nack { ssrc: self.ssrc, copies: 1, slack_ms, seqs }
    }

    /// Whether the packet is one of those that the hunt is for.
    fn hunt_headers(&mut self, packet: &Packet) -> bool {
        let Some(hunt) = &mut self.header_hunt else { return false };
        let place = packet.header.seq.distance_from(Seq::FIRST);
        if !(0..HUNT_PACKETS as i32).contains(&place) {
            return false;
        }
        if packet.header.seq != hunt.next {
            return true;
        }
        hunt.next = hunt.next.plus(1);
        let tag = hunt.depacketizer.packet(packet);
        let done = hunt.next == Seq::FIRST.plus(HUNT_PACKETS);
        if let Some(tag) = tag.filter(Tag::is_sequence_header) {
            let of_kind = |kind| (tag.kind() == kind).then(|| tag.clone());
            let (video, audio) = (of_kind(TagKind::Video), of_kind(TagKind::Audio));
            self.publisher.set_headers(None, video, audio);
        }
        if done {
            self.end_wait();
        }
        true
    }

    /// Puts what the receiver gives into tags, and those into the hub.
    fn hand_on(&mut self, now: Instant, metrics: &ReceiveMetrics) {
        while let Some(event) = self.receiver.poll_event() {
            match event {
                Event::Packet(packet) => {
                    if let Some(tag) = self.depacketizer.packet(&packet) {
                        self.push(now, tag);
                    }
                }
                Event::Lost(packets) => {
                    if let Some(last) = self.depacketizer.lost(packets) {
                        self.receiver.abandon_through(now, last);
                    }
                }
                Event::Restart(_) => {
                    self.parity = None;
                    tracing::warn!(stream = %self.key, ssrc = %self.ssrc, "the sender began anew");
                    self.depacketizer.lost(0);
                }
            }
        }
        self.look_for_damage(now, metrics);
    }

    fn look_for_damage(&mut self, now: Instant, metrics: &ReceiveMetrics) {
        if let Some(damage) = self.depacketizer.take_damage() {
            self.note_damage(now, damage, metrics);
        }
    }

    /// The time for a try of the hunt is over: media goes on, and the next try begins if there is
    /// still no header.
    fn hunt_on(&mut self, now: Instant) -> Option<Nack> {
        self.end_wait();
        let headers = self.publisher.stream().headers();
        let hunt = self.header_hunt.as_mut()?;
        if headers.video.is_some() || headers.audio.is_some() {
            self.header_hunt = None;
            return None;
        }
        if hunt.tries_left == 0 {
            tracing::warn!(stream = %self.key, "no codec headers: the cloud holds them no more");
            self.header_hunt = None;
            return None;
        }
        hunt.tries_left -= 1;
        hunt.until = now + HUNT_EVERY;
        hunt.next = Seq::FIRST;
        hunt.depacketizer = Depacketizer::new();
        Some(self.hunt_request())
    }

    fn end_wait(&mut self) {
        let waiting = self.header_hunt.as_mut().and_then(|hunt| hunt.waiting.take());
        for tag in waiting.unwrap_or_default() {
            self.publisher.push(tag);
        }
    }

    fn push(&mut self, now: Instant, tag: Tag) {
        let Some(hunt @ HeaderRecovery { waiting: Some(_), .. }) = self.header_hunt.as_deref_mut()
        else {
            self.publisher.push_at(now, tag);
            return;
        };
        hunt.waiting_bytes += tag.framed().len();
        if let Some(waiting) = &mut hunt.waiting {
            waiting.push(tag);
        }
        if hunt.waiting_bytes > MAX_WAITING_BYTES {
            self.end_wait();
        }
    }

    fn note_damage(&mut self, now: Instant, damage: Damage, metrics: &ReceiveMetrics) {
        metrics.discarded.inc_by(damage.discarded);
        metrics.malformed.inc_by(damage.malformed);
        self.damage.packets += damage.packets;
        self.damage.discarded += damage.discarded;
        self.damage.malformed += damage.malformed;
        if self.damage.packets + self.damage.malformed == 0 {
            // Joined in the middle of a tag, whose rest is of no use.
            return;
        }
        let due = |at: Instant| now.saturating_duration_since(at) >= DAMAGE_LOG_EVERY;
        if self.damage_logged.is_none_or(due) {
            self.damage_logged = Some(now);
            tracing::warn!(
                stream = %self.key,
                ssrc = %self.ssrc,
                "media is missing: {} packets lost, {} discarded with them, {} malformed so far",
                self.damage.packets,
                self.damage.discarded,
                self.damage.malformed
            );
        }
    }

    /// Adds what happened since the last time to the node's counters.
    fn count(&mut self, metrics: &ReceiveMetrics) {
        let stats = self.receiver.stats();
        metrics.add(&self.counted, &stats);
        self.counted = stats;
        if let Some(parity) = &self.parity {
            let stats = parity.stats();
            metrics.add_parity(&self.counted_parity, &stats);
            self.counted_parity = stats;
        }
    }

    fn stats(&self) -> StreamStats {
        StreamStats {
            key: self.key.clone(),
            report: self.report(),
            pending: self.receiver.pending(),
            missing: self.receiver.missing(),
        }
    }

    fn report(&self) -> StreamReport {
        self.receiver.stats().report(self.ssrc)
    }
}

/// Heartbeats whose streams are fetched at once.
const EXPECTED_BEATS: usize = 8;
/// Of a stream, what a packet needs: the front, with that of the receiver.
const HOT_BYTES: usize = std::mem::offset_of!(ReceivedStream, receiver) + 64;

/// Hashes SSRCs, one look-up a packet, in two multiplications. Senders choose SSRCs; they do not know
/// the factors, and so not which ones collide.
#[derive(Debug, Clone)]
struct SsrcHash {
    factors: [u64; 2],
}

impl Default for SsrcHash {
    fn default() -> Self {
        Self { factors: rand::random() }
    }
}

impl BuildHasher for SsrcHash {
    type Hasher = SsrcHasher;

    fn build_hasher(&self) -> SsrcHasher {
        SsrcHasher { factors: self.factors, hash: 0 }
    }
}

struct SsrcHasher {
    factors: [u64; 2],
    hash: u64,
}

impl Hasher for SsrcHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn write_u32(&mut self, value: u32) {
        let [first, second] = self.factors;
        let product = u128::from(first ^ self.hash) * u128::from(second ^ u64::from(value));
        let folded = (product >> 64) as u64 ^ product as u64;
        self.hash = folded.wrapping_mul(first | 1);
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

/// How soon after a reconnect the cloud has named every stream that is still there.
const CONFIRM_WITHIN: Duration = Duration::from_secs(3);
/// How long packets of a publication that nobody names are kept.
const UNKNOWN_KEPT: Duration = Duration::from_secs(10);
/// Bounds what strangers can make the edge hold: 16,384 packets.
const MAX_UNKNOWN: usize = 64;
const MAX_UNKNOWN_PACKETS: usize = 256;
/// Requests that may wait for the repair connection; each holds at most 512 numbers.
const MAX_NACKS: usize = 4096;
/// Longer than a straggler can be under way.
const ENDED_REMEMBERED: Duration = Duration::from_secs(30);
const MAX_ENDED: usize = 4096;
const MEDIA_WAITS: Duration = Duration::from_millis(700);
const MAX_WAITING_BYTES: usize = 8 << 20;
/// The connection may still be being made, and for as long as the ring holds newer packets of the
/// same numbers the cloud answers with those.
const HUNT_EVERY: Duration = Duration::from_secs(1);
const HUNT_TRIES: u8 = 15;
/// The video and the audio header, one packet each, and room for one that is longer.
const HUNT_PACKETS: usize = 4;
/// What is due before `now` and this is due now.
const TIMER_STEP: Duration = Duration::from_nanos(1);
const REFUSAL_LOG_EVERY: Duration = Duration::from_secs(60);
const DAMAGE_LOG_EVERY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_hub::{LogLimits, ReadOutcome};
    use downpour_repair::{
        receiver::Settings as ReceiverSettings,
        rtp::{Burst, Packetizer},
    };

    fn intake() -> (Streams, Hub) {
        let hub = Hub::new(LogLimits { max_bytes: 1 << 22, max_age: 60_000 });
        let metrics = ReceiveMetrics::register(&prometheus::Registry::new()).unwrap();
        let settings = Settings {
            receiver: ReceiverSettings::default(),
            silence: Duration::from_secs(10),
            max_streams: 3,
        };
        (Streams::new(settings, hub.clone(), metrics, |_| ()), hub)
    }

    fn up(key: &str, ssrc: u32, gop_start: Option<Seq>, newest: Option<Seq>) -> StreamInfo {
        StreamInfo {
            key: key.parse().unwrap(),
            ssrc: Ssrc(ssrc),
            start_unix_ms: 0,
            headers: Headers::default(),
            gop_start,
            newest,
        }
    }

    fn named(key: &str, ssrc: u32) -> LiveStream {
        LiveStream { key: key.parse().unwrap(), ssrc: Ssrc(ssrc), start_unix_ms: 0 }
    }

    /// A header, then groups of a key frame and four others.
    fn bursts(ssrc: u32, frames: usize) -> (Vec<Tag>, Vec<Burst>) {
        let mut packetizer = Packetizer::new(Ssrc(ssrc), 1120);
        let header = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap();
        let frame = |i: usize| {
            let mut body = vec![i as u8; 3000];
            body[0] = if i.is_multiple_of(5) { 0x17 } else { 0x27 };
            body[1] = 1;
            Tag::new(TagKind::Video, i as u32 * 40, &body).unwrap()
        };
        let tags: Vec<_> = std::iter::once(header).chain((0..frames).map(frame)).collect();
        let bursts = tags.iter().map(|tag| packetizer.packetize(tag)).collect();
        (tags, bursts)
    }

    fn feed(intake: &mut Streams, now: Instant, burst: &Burst, path: Path) {
        for i in 0..burst.count() {
            intake.handle_packet(now, burst.packet(i).unwrap(), path);
        }
    }

    fn read(hub: &Hub, key: &str) -> Vec<Tag> {
        let mut out = Vec::new();
        let mut reader = hub.subscribe(key).unwrap();
        while let ReadOutcome::Read(_) = reader.try_read(&mut out, usize::MAX) {}
        out
    }

    #[test]
    fn packets_that_come_before_their_name_are_not_lost() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 4);
        assert!(!intake.saw_unknown_ssrc());
        feed(&mut intake, now, &bursts[0], Path::Live(0));
        assert!(intake.saw_unknown_ssrc() && !intake.saw_unknown_ssrc());
        bursts[1..3].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
        assert!(hub.is_empty() && !intake.saw_unknown_ssrc(), "once for each");
        assert_eq!(intake.unnamed(now, Duration::ZERO).collect::<Vec<_>>(), [Ssrc(7)]);
        intake.stream_named(now, named("live/a", 7));
        bursts[3..].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
        assert_eq!(read(&hub, "live/a"), tags);
        assert_eq!(intake.poll_nack(), None);
    }

    #[test]
    fn who_joins_late_asks_for_the_group_from_its_start() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 9);
        let mut info = up("live/a", 7, Some(bursts[6].first_seq()), Some(bursts[8].last_seq()));
        info.headers.video = Some(tags[0].clone());
        intake.stream_up(now, info);
        let nack = intake.poll_nack().unwrap();
        assert_eq!(nack.seqs.first(), Some(&bursts[6].first_seq()));
        assert_eq!(nack.seqs.last(), Some(&bursts[8].last_seq()));
        bursts[6..9].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Repair));
        feed(&mut intake, now, &bursts[9], Path::Live(0));
        let read = read(&hub, "live/a");
        assert_eq!(read[0].body(), tags[0].body());
        assert_eq!(read[1..], tags[6..]);
    }

    #[test]
    fn under_v0_who_joins_late_finds_the_headers_at_the_publications_start() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 9);
        feed(&mut intake, now, &bursts[6], Path::Live(0));
        intake.stream_named(now, named("live/a", 7));
        let nack = intake.poll_nack().unwrap();
        assert_eq!((nack.ssrc, nack.seqs[0]), (Ssrc(7), Seq::FIRST));
        feed(&mut intake, now, &bursts[0], Path::Repair);
        feed(&mut intake, now, &bursts[7], Path::Live(0));
        intake.gone(now, Ssrc(7), &[Seq::FIRST.plus(1)]);
        let read = read(&hub, "live/a");
        assert_eq!(read[0].body(), tags[0].body());
        assert_eq!(read[1..], tags[6..8]);
    }

    #[test]
    fn headers_from_the_publications_start_do_not_move_the_stream_ahead() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 9);
        // Late in the sequence: 65000 would be 5000 packets ahead.
        let live = |i: usize, n: u16| {
            let mut bytes = bursts[i].packet(usize::from(n)).unwrap().to_vec();
            let seq = 60_000 + (i as u16 - 6) * 3 + n;
            bytes[2..4].copy_from_slice(&seq.to_be_bytes());
            Bytes::from(bytes)
        };
        (0..3).for_each(|n| intake.handle_packet(now, live(6, n), Path::Live(0)));
        intake.stream_named(now, named("live/a", 7));
        intake.poll_nack().unwrap();
        feed(&mut intake, now, &bursts[0], Path::Repair);
        intake.gone(now, Ssrc(7), &[Seq::FIRST.plus(1)]);
        (0..3).for_each(|n| intake.handle_packet(now, live(7, n), Path::Live(0)));
        assert_eq!(intake.poll_nack(), None);
        assert_eq!(read(&hub, "live/a")[1..], tags[6..8]);
        // One that comes when the hunt is long over changes nothing either.
        intake.streams.get_mut(&Ssrc(7)).unwrap().header_hunt = None;
        feed(&mut intake, now, &bursts[0], Path::Repair);
        (0..3).for_each(|n| intake.handle_packet(now, live(8, n), Path::Live(0)));
        assert_eq!(intake.poll_nack(), None);
        assert_eq!(read(&hub, "live/a")[1..], tags[6..9]);
    }

    #[test]
    fn the_hunt_for_headers_goes_on_until_there_are_some() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 9);
        feed(&mut intake, now, &bursts[6], Path::Live(0));
        intake.stream_named(now, named("live/a", 7));
        assert_eq!(intake.poll_nack().unwrap().seqs[0], Seq::FIRST);
        // No answer: media does not wait for ever, and it is asked again.
        intake.handle_timeout(now + MEDIA_WAITS);
        assert_eq!(intake.poll_nack().unwrap().seqs[0], Seq::FIRST);
        feed(&mut intake, now + MEDIA_WAITS, &bursts[0], Path::Repair);
        intake.handle_timeout(now + MEDIA_WAITS + HUNT_EVERY);
        assert_eq!(intake.poll_nack(), None);
        let headers = hub.streams()[0].headers();
        assert_eq!(headers.video.unwrap().body(), tags[0].body());
    }

    #[test]
    fn a_stream_that_was_silent_for_long_comes_up_again() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (_, bursts) = bursts(7, 9);
        feed(&mut intake, now, &bursts[0], Path::Live(0));
        intake.stream_named(now, named("live/a", 7));
        let later = now + Duration::from_secs(11);
        intake.tick(later);
        assert!(hub.is_empty());
        feed(&mut intake, later, &bursts[1], Path::Live(0));
        assert_eq!(intake.unnamed(later, Duration::ZERO).collect::<Vec<_>>(), [Ssrc(7)]);
        intake.stream_named(later, named("live/a", 7));
        assert_eq!(hub.len(), 1);
    }

    #[test]
    fn who_joins_over_a_long_path_waits_for_the_answers() {
        // Numbers that are asked for within 300 ms, where the path is said to take so long.
        let asked = |round_trip: Option<u64>| {
            let (mut intake, _) = intake();
            let now = Instant::now();
            if let Some(ms) = round_trip {
                let round_trip = Duration::from_millis(ms);
                intake.expect_round_trip(round_trip, round_trip / 8);
            }
            intake.stream_up(now, up("live/a", 7, Some(Seq::FIRST), Some(Seq::FIRST.plus(9))));
            let mut seqs = Vec::new();
            for ms in 0..300 {
                intake.handle_timeout(now + Duration::from_millis(ms));
                seqs.extend(std::iter::from_fn(|| intake.poll_nack()).flat_map(|nack| nack.seqs));
            }
            seqs.len()
        };
        // Each request is made twice, shortly after one another.
        assert!(asked(None) > asked(Some(400)), "{} {}", asked(None), asked(Some(400)));
        assert!((10..=20).contains(&asked(Some(400))), "{}", asked(Some(400)));
    }

    #[test]
    fn parity_brings_back_what_was_lost_without_asking() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 9);
        let settings = fec::encoder::Settings::new(fec::Matrix::new(5, 1).unwrap());
        let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
        intake.stream_up(now, up("live/a", 7, None, None));
        intake.set_round_trip(now, Duration::from_millis(100), Duration::from_millis(1));
        let (mut number, mut lost) = (0, 0);
        for (i, burst) in bursts.iter().enumerate() {
            let at = now + Duration::from_millis(20 * i as u64);
            for packet in (0..burst.count()).filter_map(|n| burst.packet(n)) {
                let mut parity = Vec::new();
                encoder.push(at, &packet, &mut parity);
                number += 1;
                // The fourth of each row; the decoder begins with the first parity.
                match number > 5 && number % 5 == 4 {
                    true => lost += 1,
                    false => intake.handle_packet(at, packet, Path::Live(0)),
                }
                parity.into_iter().for_each(|datagram| intake.handle_parity(at, datagram));
            }
        }
        assert_eq!(read(&hub, "live/a")[1..], tags[6..]);
        let report = &intake.reports(1)[0];
        assert_eq!((lost, report.parity, report.received), (4, 4, number));
    }

    /// Nothing behind it has come that would show the loss.
    #[test]
    fn parity_brings_back_the_last_packet_of_a_row() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 9);
        let settings = fec::encoder::Settings::new(fec::Matrix::new(2, 1).unwrap());
        let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
        intake.stream_up(now, up("live/a", 7, None, None));
        let packets: Vec<_> =
            bursts.iter().flat_map(|b| (0..b.count()).filter_map(|n| b.packet(n))).collect();
        let last = packets.len() / 2 * 2 - 1;
        for (i, packet) in packets[..=last].iter().enumerate() {
            let mut parity = Vec::new();
            encoder.push(now, packet, &mut parity);
            if i != last {
                intake.handle_packet(now, packet.clone(), Path::Live(0));
            }
            parity.into_iter().for_each(|datagram| intake.handle_parity(now, datagram));
        }
        let before = read(&hub, "live/a").len();
        assert_eq!(intake.reports(10)[0].parity, 1);
        // It was late, not lost.
        intake.handle_packet(now, packets[last].clone(), Path::Live(0));
        assert_eq!(intake.reports(10)[0].duplicate, 1);
        assert_eq!(read(&hub, "live/a").len(), before);
        packets[last + 1..].iter().for_each(|packet| {
            intake.handle_packet(now, packet.clone(), Path::Live(0));
        });
        assert!(read(&hub, "live/a").ends_with(&tags[6..]));
    }

    #[test]
    fn only_streams_that_wait_for_something_have_a_timer() {
        let (mut intake, _) = intake();
        let now = Instant::now();
        for ssrc in [7, 8] {
            intake.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
            let (_, bursts) = bursts(ssrc, 4);
            feed(&mut intake, now, &bursts[0], Path::Live(0));
            assert_eq!(intake.poll_timeout(), None);
            if ssrc == 8 {
                feed(&mut intake, now, &bursts[2], Path::Live(0));
            }
        }
        assert_eq!(intake.wakes.len(), 1);
        intake.handle_timeout(intake.poll_timeout().unwrap());
        let nacks: Vec<_> = std::iter::from_fn(|| intake.poll_nack()).collect();
        assert!(!nacks.is_empty() && nacks.iter().all(|nack| nack.ssrc == Ssrc(8)));
        assert_eq!(intake.wakes.len(), 1);
        feed(&mut intake, now, &bursts(8, 4).1[1], Path::Repair);
        // What was to be asked again is found to have come.
        intake.handle_timeout(intake.poll_timeout().unwrap());
        assert_eq!(intake.poll_timeout(), None);
        feed(&mut intake, now, &bursts(7, 4).1[3], Path::Live(0));
        intake.end(now, Ssrc(7), "test");
        assert!(intake.wakes.is_empty());
    }

    #[test]
    fn streams_are_reported_in_turn() {
        let (mut intake, _) = intake();
        let now = Instant::now();
        for ssrc in 7..10 {
            intake.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
        }
        let told = |intake: &mut Streams| {
            let mut told: Vec<_> = intake.reports(2).iter().map(|report| report.ssrc).collect();
            told.extend(intake.reports(1).iter().map(|report| report.ssrc));
            told.sort_unstable();
            told
        };
        assert_eq!(told(&mut intake), [7, 8, 9]);
        assert_eq!(told(&mut intake), [7, 8, 9]);
        intake.end(now, Ssrc(8), "test");
        assert_eq!(intake.reports(9).len(), 2);
        assert_eq!(intake.report_turns.len(), 2);
    }

    #[test]
    fn parity_that_is_none_or_nobodys_is_counted() {
        let (mut intake, _) = intake();
        let now = Instant::now();
        intake.handle_parity(now, Bytes::from_static(b"\x80\x6d nothing"));
        assert_eq!(intake.metrics.parity_malformed.get(), 1);
        let settings = fec::encoder::Settings::new(fec::Matrix::new(1, 1).unwrap());
        let mut encoder = fec::Encoder::new(settings, now, Ssrc(7), Ssrc(8), Seq(3));
        let mut parity = Vec::new();
        encoder.push_burst(now, &bursts(7, 1).1[0], &mut parity);
        parity.into_iter().for_each(|datagram| intake.handle_parity(now, datagram));
        assert_eq!(intake.metrics.parity_unknown.get(), 1);
        assert!(intake.unknown.is_empty());
    }

    #[test]
    fn what_was_lost_before_the_cloud_told_of_the_stream_is_asked_for() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (tags, bursts) = bursts(7, 4);
        // The header was lost on its way.
        feed(&mut intake, now, &bursts[1], Path::Live(0));
        intake.stream_up(now, up("live/a", 7, None, None));
        assert_eq!(intake.poll_nack().unwrap().seqs, [Seq::FIRST]);
        feed(&mut intake, now, &bursts[0], Path::Repair);
        assert_eq!(read(&hub, "live/a"), tags[..2]);
    }

    #[test]
    fn a_stream_that_ends_waits_for_its_tail_and_then_leaves_nothing_behind() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (_, bursts) = bursts(7, 4);
        intake.stream_up(now, up("live/a", 7, None, None));
        bursts[..4].iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
        intake.stream_end(now, Ssrc(7), Some(bursts[4].last_seq()));
        assert_eq!(hub.len(), 1, "its last tag is still missing");
        let wake = intake.poll_timeout().unwrap();
        intake.handle_timeout(wake);
        assert_eq!(intake.poll_nack().unwrap().seqs.len(), bursts[4].count());
        feed(&mut intake, now, &bursts[4], Path::Repair);
        assert!(hub.is_empty() && intake.streams.is_empty() && intake.by_key.is_empty());
        // A straggler does not bring it back.
        feed(&mut intake, now, &bursts[4], Path::Live(0));
        assert!(intake.unknown.is_empty());
    }

    #[test]
    fn a_tail_that_never_comes_ends_the_stream_all_the_same() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        let (_, bursts) = bursts(7, 4);
        intake.stream_up(now, up("live/a", 7, None, None));
        feed(&mut intake, now, &bursts[0], Path::Live(0));
        intake.stream_end(now, Ssrc(7), Some(bursts[4].last_seq()));
        for _ in 0..1000 {
            let Some(wake) = intake.poll_timeout() else { break };
            intake.handle_timeout(wake);
        }
        assert!(hub.is_empty());
    }

    #[test]
    fn a_newer_publication_takes_the_name_over() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        intake.stream_up(now, up("live/a", 7, None, None));
        intake.stream_up(now, up("live/a", 8, None, None));
        assert_eq!((hub.len(), intake.streams.len(), intake.by_key.len()), (1, 1, 1));
        let (tags, bursts) = bursts(8, 2);
        bursts.iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
        assert_eq!(read(&hub, "live/a"), tags);
        // The old one's end changes nothing.
        intake.stream_end(now, Ssrc(7), None);
        assert_eq!(hub.len(), 1);
    }

    #[test]
    fn after_a_reconnect_a_stream_that_is_not_named_again_ends() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        intake.set_told(now, true);
        intake.stream_up(now, up("live/a", 7, None, None));
        intake.stream_up(now, up("live/b", 8, None, None));
        intake.set_told(now, false);
        let later = now + Duration::from_secs(2);
        intake.set_told(later, true);
        intake.stream_up(later, up("live/b", 8, None, None));
        intake.tick(later);
        assert_eq!(hub.len(), 2);
        intake.tick(later + Duration::from_secs(4));
        assert!(hub.stream("live/a").is_none() && hub.stream("live/b").is_some());
    }

    #[test]
    fn without_word_from_the_cloud_silence_ends_a_stream() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        intake.stream_up(now, up("live/a", 7, None, None));
        intake.tick(now + Duration::from_secs(9));
        assert_eq!(hub.len(), 1);
        assert!(intake.any_silent(now + Duration::from_secs(9), Duration::from_secs(3)));
        intake.tick(now + Duration::from_secs(11));
        assert!(hub.is_empty());
    }

    #[test]
    fn strangers_cannot_make_the_edge_hold_much() {
        let (mut intake, hub) = intake();
        let now = Instant::now();
        for ssrc in 0..1000 {
            let (_, bursts) = bursts(ssrc, 1);
            for _ in 0..10 {
                bursts.iter().for_each(|burst| feed(&mut intake, now, burst, Path::Live(0)));
            }
        }
        assert_eq!(intake.unknown.len(), MAX_UNKNOWN);
        assert!(intake.metrics.unknown_dropped.get() > 0);
        intake.tick(now + UNKNOWN_KEPT);
        assert!(intake.unknown.is_empty());
        for ssrc in 0..10 {
            intake.stream_up(now, up(&format!("live/{ssrc}"), ssrc, None, None));
        }
        assert_eq!(hub.len(), 3, "max_streams");
        for garbage in [&b""[..], b"0001", &[0x80; 11], &[0x80, 100, 1]] {
            intake.handle_packet(now, Bytes::copy_from_slice(garbage), Path::Live(0));
        }
        assert_eq!(intake.metrics.malformed.get(), 4);
    }
}
