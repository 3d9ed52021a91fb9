//! The edge's streams: from RTP packets and the cloud's word about them to tags in the hub.
//!
//! No socket and no clock: the ingress task feeds it and carries its requests away.

mod header_recovery;
mod received_stream;
mod unnamed_packets;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    hash::{BuildHasher, Hasher},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;

use self::{
    received_stream::{HOT_BYTES, PrefetchHints, ReceivedStream},
    unnamed_packets::{UNKNOWN_KEPT, Unknown},
};
use super::{livestat::LiveStream, parity::Parity, stats::ReceiveMetrics};
use downpour_hub::{self, Hub};
use downpour_media::{StreamKey, flv::Headers};
use downpour_repair::{
    control::{StreamInfo, StreamReport},
    fec,
    message::{Heartbeat, Nack},
    receiver::{self, Path, Receiver},
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

/// A stream as it is found by its SSRC.
struct StreamSlot {
    stream: Box<ReceivedStream>,
    ahead: PrefetchHints,
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

/// Heartbeats whose streams are fetched at once.
const EXPECTED_BEATS: usize = 8;
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
/// Requests that may wait for the repair connection; each holds at most 512 numbers.
const MAX_NACKS: usize = 4096;
/// Longer than a straggler can be under way.
const ENDED_REMEMBERED: Duration = Duration::from_secs(30);
const MAX_ENDED: usize = 4096;
/// What is due before `now` and this is due now.
const TIMER_STEP: Duration = Duration::from_nanos(1);
const REFUSAL_LOG_EVERY: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
