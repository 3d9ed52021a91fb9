//! The table of received streams: RTP packets, parity and the cloud's announcements in, tags into
//! the hub and NACKs out.
//!
//! Sans-IO: [`dispatch`](super::dispatch) passes in datagrams and the time, and sends the NACKs.
//!
//! # States of an SSRC
//!
//! | state | event | next state |
//! |---|---|---|
//! | unknown | first packet | unnamed: its first packets are held |
//! | unknown, unnamed | announced by the cloud, or named by its API | live: held packets are received |
//! | unnamed | no name within 10 s | unknown |
//! | live | the cloud announces the end | ending: waits for missing packets until a deadline |
//! | live | no packets, and no connection that announces ends | unknown: it may start again |
//! | live | not announced after a reconnect, replaced under its key, or not listed by the API | ended |
//! | ending | the last packet has arrived, or the deadline has passed | ended |
//! | ended, but not by an announcement of the cloud, or by one while it shuts down | | the stream is held: its viewers stay |
//! | ended | 30 s have passed | unknown; until then late packets are dropped |
//!
//! # Invariants
//! - An SSRC is never live and unnamed at the same time.
//! - `by_key` has exactly the live streams, and so has `report_turns`.
//! - `wakes` has one entry for each stream whose `wake` is set, and no others.

mod header_recovery;
mod held;
mod received_stream;
mod script_data;
mod unnamed_packets;

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    mem,
    ops::{Deref, DerefMut},
    time::{Duration, Instant},
};

use bytes::Bytes;

use self::{
    held::HeldStreams,
    received_stream::{HOT_BYTES, PrefetchHints, ReceivedStream},
    unnamed_packets::UnnamedPackets,
};
use super::{livestat::LiveStream, parity::Parity, stats::ReceiveMetrics};
use downpour_hub::{Hub, Publisher};
use downpour_media::{StreamKey, flv::Headers};
use downpour_repair::{
    control::{StreamInfo, StreamReport},
    message::{Heartbeat, Nack},
    receiver::{self, Path, Receiver},
    rtp::{
        Depacketizer, Packet, Seq, Ssrc,
        flexfec::Repair,
        packet::{Header, PAYLOAD_TYPE},
    },
};
use downpour_sys::LogLimit;
use downpour_sys::prefetch;

/// How streams are received.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Reordering and repair.
    pub receiver: receiver::Settings,
    /// Without a connection that announces ends, a stream ends after this long without a packet.
    pub silence: Duration,
    /// How long a stream waits for the cloud to come back; zero ends it at once.
    pub hold: Duration,
    /// Highest number of live streams; others are refused.
    pub max_streams: usize,
}

/// All streams that this edge receives.
pub struct Streams {
    settings: Settings,
    hub: Hub,
    metrics: ReceiveMetrics,
    streams: HashMap<Ssrc, StreamSlot, foldhash::fast::RandomState>,
    by_key: HashMap<StreamKey, Ssrc>,
    unnamed: UnnamedPackets,
    /// Streams whose reception ended but not, as far as is known, their publication.
    held: HeldStreams,
    /// `true` from when the cloud says that it shuts down until another connection.
    cloud_closes: bool,
    /// Round trip to the cloud and its variation, once measured.
    round_trip: Option<(Duration, Duration)>,
    /// Publications that ended recently, oldest first. Their late packets start nothing.
    ended: VecDeque<(Instant, Ssrc)>,
    nacks: VecDeque<Nack>,
    /// Each live stream once; the front is reported next.
    report_turns: VecDeque<Ssrc>,
    refusal_log: LogLimit,
    /// Whether the current connection announces streams and their ends (`downpour/1`).
    announced: bool,
    /// Whether parity has arrived for any stream.
    has_parity: bool,
    /// When each stream with a timer is due: [`ReceivedStream::wake`].
    wakes: BTreeSet<(Instant, Ssrc)>,
}

/// Entry of the stream table. The hints are beside the pointer to the stream, so that the stream
/// and the addresses in the hints can be prefetched together.
struct StreamSlot {
    stream: Box<ReceivedStream>,
    hints: PrefetchHints,
}

impl Streams {
    /// Creates an empty table. Tags go to `hub`.
    pub fn new(settings: Settings, hub: Hub, metrics: ReceiveMetrics) -> Self {
        Self {
            settings,
            hub,
            metrics,
            streams: HashMap::default(),
            by_key: HashMap::new(),
            unnamed: UnnamedPackets::default(),
            held: HeldStreams::default(),
            cloud_closes: false,
            round_trip: None,
            ended: VecDeque::new(),
            nacks: VecDeque::new(),
            report_turns: VecDeque::new(),
            refusal_log: LogLimit::default(),
            announced: false,
            has_parity: false,
            wakes: BTreeSet::new(),
        }
    }

    /// Prefetches the memory that receiving these datagrams will touch. Pass the first datagram of
    /// each GRO batch. With hundreds of streams, none is in the cache when its packet arrives: without
    /// this, an edge takes a tenth more processor time (`scripts/bench edge`).
    pub fn prefetch<'a>(&self, datagrams: impl Iterator<Item = &'a [u8]>) {
        for datagram in datagrams {
            let Some(ssrc) = datagram.get(8..).and_then(<[u8]>::first_chunk) else { continue };
            let ssrc = Ssrc(u32::from_be_bytes(*ssrc));
            if let Some(StreamSlot { stream, hints }) = self.streams.get(&ssrc) {
                prefetch((&raw const **stream).addr(), HOT_BYTES);
                prefetch(hints.count, size_of::<usize>());
                hints.push.expect();
                // The payload last: it is the longest, and a processor limits prefetches in flight.
                prefetch(hints.payload, datagram.len());
            }
        }
    }

    /// Receives one RTP datagram of path `path`.
    pub fn handle_live(&mut self, now: Instant, datagram: &[u8], path: u8) {
        if !self.handle_in_order(now, datagram, path) {
            self.handle_packet(now, Bytes::copy_from_slice(datagram), Path::Live(path));
        }
    }

    /// Fast path: copies the payload straight into its tag, with no buffer in between. Returns
    /// `false`, with nothing changed, unless the packet is the next of a stream without gaps, which
    /// nearly all packets are. Without it, an edge takes 15 % more (`scripts/bench edge`).
    fn handle_in_order(&mut self, now: Instant, datagram: &[u8], path: u8) -> bool {
        let Ok((header, payload)) = Header::parse(datagram) else { return false };
        let (Some(StreamSlot { stream, hints }), Some(payload)) =
            (self.streams.get_mut(&header.ssrc), datagram.get(payload))
        else {
            return false;
        };
        let in_order = header.payload_type == PAYLOAD_TYPE
            && stream.ending.is_none()
            && stream.parity.is_none()
            && stream.receiver.handle_next(now, header.seq, path);
        if in_order {
            stream.last_packet = now;
            if let Some(tag) = stream.depacketizer.payload(&header, payload) {
                stream.push(now, tag);
            }
            stream.take_damage(now, &self.metrics);
            *hints = stream.prefetch_hints();
        }
        in_order
    }

    /// Receives one RTP packet, live or repaired.
    pub fn handle_packet(&mut self, now: Instant, datagram: Bytes, path: Path) {
        let for_parity = self.has_parity.then(|| datagram.clone());
        let packet = match Packet::parse(datagram) {
            Ok(packet) if packet.header.payload_type == PAYLOAD_TYPE => packet,
            _ => {
                self.metrics.malformed.inc();
                return;
            }
        };
        let ssrc = packet.header.ssrc;
        let Some(StreamSlot { stream, .. }) = self.streams.get_mut(&ssrc) else {
            self.hold_unnamed(now, packet, path);
            return;
        };
        if matches!(path, Path::Live(_)) {
            stream.last_packet = now;
        } else if stream.recover_headers(&packet) {
            // It is from the start of the publication; the receiver did not ask for it.
            return;
        }
        stream.receiver.handle_packet(now, packet, path);
        if let (Some(parity), Some(datagram)) = (&mut stream.parity, for_parity) {
            for packet in parity.handle_media(datagram) {
                stream.receiver.handle_packet(now, packet, Path::Parity);
            }
        }
        self.drive(now, ssrc);
    }

    /// Receives one parity datagram.
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
            // Not live, or not yet: the next FEC block brings more parity.
            self.metrics.parity_unknown.inc();
            return;
        };
        self.has_parity = true;
        let packets = stream.receiver.stats().delays.total();
        let parity = stream.parity.get_or_insert_with(|| Box::new(Parity::new(now, ssrc, packets)));
        for packet in parity.handle_parity(now, repair) {
            stream.receiver.handle_packet(now, packet, Path::Parity);
        }
        self.drive(now, ssrc);
    }

    fn hold_unnamed(&mut self, now: Instant, packet: Packet, path: Path) {
        let ssrc = packet.header.ssrc;
        let is_late = path == Path::Repair || self.ended.iter().any(|(_, ended)| *ended == ssrc);
        if is_late || !self.unnamed.hold(now, packet, path) {
            self.metrics.unknown_dropped.inc();
        }
    }

    /// Starts a publication that the cloud announced, or updates its headers if it is live.
    pub fn stream_up(&mut self, now: Instant, up: StreamInfo) {
        // Nothing sent yet: the first packet will be the publication's first.
        let first = up.gop_start.or(up.newest.is_none().then_some(Seq::FIRST));
        self.start_stream(now, up, first);
    }

    /// Starts a publication whose name the cloud's API gave. Its headers and position are unknown.
    pub fn stream_named(&mut self, now: Instant, stream: LiveStream) {
        let LiveStream { key, ssrc, start_unix_ms } = stream;
        let first = self.unnamed.first_seq(ssrc).filter(|seq| *seq == Seq::FIRST);
        let headers = Headers::default();
        let up = StreamInfo {
            key,
            ssrc,
            publication: None,
            start_unix_ms,
            headers,
            gop_start: None,
            newest: None,
        };
        self.start_stream(now, up, first);
    }

    /// Starts to receive at `first`, or at the first packet that arrives if `None`.
    fn start_stream(&mut self, now: Instant, up: StreamInfo, first: Option<Seq>) {
        if let Some(stream) = self.streams.get_mut(&up.ssrc) {
            stream.unconfirmed_since = None;
            self.stream_update(up.ssrc, up.headers);
            return;
        }
        self.forget_ended(now);
        self.ended.retain(|(_, ssrc)| *ssrc != up.ssrc);
        if let Some(old) = self.by_key.get(&up.key).copied() {
            // The cloud or the encoder restarted.
            self.end(now, old, "replaced by a newer publication", true);
        }
        if self.streams.len() >= self.settings.max_streams {
            self.refuse(now, &up);
            return;
        }
        let has_headers = up.headers != Headers::default();
        let Some(publisher) = self.publisher_for(&up) else { return };
        tracing::info!(stream = %up.key, ssrc = %up.ssrc, "stream up");

        // A GOP longer than the window cannot be fetched whole.
        let first = first.filter(|first| {
            let packets = up.newest.map_or(0, |newest| newest.distance_from(*first));
            usize::try_from(packets).is_ok_and(|packets| packets < self.settings.receiver.window)
        });
        let mut stream = self.open(now, up.key.clone(), up.ssrc, publisher, first);
        if first.is_none() && !has_headers {
            self.nacks.push_back(stream.begin_header_recovery(now));
        }
        for (packet, path) in self.unnamed.take(up.ssrc) {
            stream.receiver.handle_packet(now, packet, path);
        }
        if let (Some(_), Some(newest)) = (first, up.newest) {
            stream.receiver.handle_heartbeat(now, newest);
        }
        self.by_key.insert(up.key, up.ssrc);
        self.streams.insert(up.ssrc, StreamSlot { hints: stream.prefetch_hints(), stream });
        self.report_turns.push_front(up.ssrc);
        self.drive(now, up.ssrc);
    }

    /// Creates the receiving side of a stream.
    fn open(
        &self,
        now: Instant,
        key: StreamKey,
        ssrc: Ssrc,
        publisher: Publisher,
        first: Option<Seq>,
    ) -> Box<ReceivedStream> {
        let settings = self.settings.receiver;
        let (mut receiver, depacketizer) = match first {
            Some(first) => (Receiver::starting_at(settings, first), Depacketizer::new()),
            None => (Receiver::new(settings), Depacketizer::joining()),
        };
        if let Some((round_trip, variation)) = self.round_trip {
            receiver.set_round_trip(now, round_trip, variation);
        }
        Box::new(ReceivedStream::new(now, key, ssrc, publisher, receiver, depacketizer))
    }

    fn refuse(&mut self, now: Instant, up: &StreamInfo) {
        self.metrics.refused_streams.inc();
        if let Some(missed) = self.refusal_log.due(now) {
            let max_streams = self.settings.max_streams;
            tracing::warn!(stream = %up.key, max_streams, missed, "stream refused: too many");
        }
    }

    /// Sets the headers that the cloud announced for a stream.
    pub fn stream_update(&mut self, ssrc: Ssrc, headers: Headers) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.publisher.set_headers(headers);
        }
    }

    /// Ends a publication whose end the cloud announced, once its packets up to `last` have arrived
    /// or can no longer arrive.
    pub fn stream_end(&mut self, now: Instant, ssrc: Ssrc, last: Option<Seq>) {
        self.unnamed.take(ssrc);
        let Some(StreamSlot { stream, .. }) = self.streams.get_mut(&ssrc) else {
            self.ended.push_back((now, ssrc));
            return;
        };
        if let Some(last) = last {
            stream.receiver.handle_heartbeat(now, last);
        }
        // Every missing packet has a deadline by now, and none is later than this.
        let latency = self.settings.receiver.latency.max(self.settings.receiver.join_latency);
        stream.ending = Some((last, now + latency + receiver::GRACE));
        self.drive(now, ssrc);
    }

    /// Ends each stream that has been silent for `age` and is not in `listed`, the API's current
    /// list.
    pub fn retain_streams(&mut self, now: Instant, listed: &[Ssrc], age: Duration) {
        let over = |s: &StreamSlot| {
            !listed.contains(&s.ssrc) && now.saturating_duration_since(s.last_packet) >= age
        };
        let over: Vec<_> = self.streams.values().filter(|s| over(s)).map(|s| s.ssrc).collect();
        for ssrc in over {
            self.end(now, ssrc, "no longer listed by the cloud's API", true);
        }
    }

    /// Stops waiting for packets that the cloud no longer holds.
    pub fn handle_gone(&mut self, now: Instant, ssrc: Ssrc, seqs: &[Seq]) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.receiver.handle_gone(now, seqs.iter().copied());
            stream.headers_gone(seqs);
            self.drive(now, ssrc);
        }
    }

    /// Finds missing packets by the highest sequence numbers that the cloud has sent.
    pub fn handle_heartbeats(&mut self, now: Instant, beats: &[Heartbeat]) {
        for beat in beats {
            self.handle_heartbeat(now, beat.ssrc, beat.last);
        }
    }

    fn handle_heartbeat(&mut self, now: Instant, ssrc: Ssrc, last: Seq) {
        let Some(stream) = self.streams.get_mut(&ssrc) else { return };
        stream.last_packet = now;
        if stream.receiver.handle_heartbeat(now, last) {
            self.drive(now, ssrc);
        }
    }

    /// Sets the round trip to the cloud for streams that start from now on.
    pub fn set_initial_round_trip(&mut self, round_trip: Duration, variation: Duration) {
        self.round_trip = Some((round_trip, variation));
    }

    /// Sets the round trip to the cloud for all streams.
    pub fn set_round_trip(&mut self, now: Instant, round_trip: Duration, variation: Duration) {
        self.set_initial_round_trip(round_trip, variation);
        for stream in self.streams.values_mut() {
            stream.receiver.set_round_trip(now, round_trip, variation);
        }
    }

    /// Makes requests that are due, gives up packets and ends streams whose deadline has passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.poll_timeout().is_none_or(|at| at > now) {
            return;
        }
        // Once per stream: one that is due again immediately waits for the next call.
        let later = self.wakes.split_off(&(now + TIMER_STEP, Ssrc(0)));
        for (_, ssrc) in mem::replace(&mut self.wakes, later) {
            if let Some(stream) = self.streams.get_mut(&ssrc) {
                stream.wake = None;
                stream.receiver.handle_timeout(now);
                self.drive(now, ssrc);
            }
        }
    }

    /// Does the periodic work: ends silent streams, drops old unnamed packets, updates counters and
    /// the wait for parity. Call it a few times per second.
    pub fn tick(&mut self, now: Instant) {
        self.forget_ended(now);
        self.held.expire(now);
        let silence = self.settings.silence;
        let over = |stream: &&StreamSlot| match (self.announced, stream.unconfirmed_since) {
            (true, None) => false,
            (true, Some(since)) => now.saturating_duration_since(since) > CONFIRM_WITHIN,
            (false, _) => now.saturating_duration_since(stream.last_packet) > silence,
        };
        let over: Vec<_> = self.streams.values().filter(over).map(|s| s.ssrc).collect();
        for ssrc in over {
            match self.announced {
                true => self.end(now, ssrc, "not announced after the reconnect", true),
                // The publication may continue: its next packet makes it unnamed, so that it
                // starts again.
                false => self.remove(now, ssrc, "silent, with no connection to the cloud", true),
            }
        }
        self.metrics.unknown_dropped.inc_by(self.unnamed.expire(now));
        for StreamSlot { stream, .. } in self.streams.values_mut() {
            stream.count(&self.metrics);
            if let Some(parity) = &mut stream.parity {
                let wait = parity.wait(now, stream.receiver.stats().delays.total());
                stream.receiver.set_parity_wait(wait);
            }
        }
        self.metrics.publish(self.streams.values().map(|stream| stream.stats()));
    }

    /// Takes the next request for the cloud.
    pub fn poll_nack(&mut self) -> Option<Nack> {
        self.nacks.pop_front()
    }

    /// Returns when to call [`Streams::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.wakes.first().map(|(at, _)| *at)
    }

    /// `true` if a stream has been silent for `age`, so that it may have ended unannounced.
    pub fn any_silent(&self, now: Instant, age: Duration) -> bool {
        let silent = |s: &StreamSlot| now.saturating_duration_since(s.last_packet) >= age;
        self.streams.values().any(silent)
    }

    /// Returns the unnamed publications whose first packet arrived at least `age` ago.
    pub fn unnamed(&self, now: Instant, age: Duration) -> impl Iterator<Item = Ssrc> {
        self.unnamed.older_than(now, age)
    }

    /// `true` if a packet of a new unnamed publication has arrived since the last call.
    pub fn saw_unknown_ssrc(&mut self) -> bool {
        self.unnamed.take_new()
    }

    /// Reports loss and repair of at most `max` streams; repeated calls report all of them in turn.
    pub fn reports(&mut self, max: usize) -> Vec<StreamReport> {
        let turns = self.report_turns.len().min(max);
        let reports = self.report_turns.iter().take(turns);
        let reports = reports
            .filter_map(|ssrc| self.streams.get(ssrc))
            .map(|stream| stream.report())
            .collect();
        self.report_turns.rotate_left(turns);
        reports
    }

    /// Polls a stream's receiver: requests become NACKs, packets become tags. Then ends the stream
    /// if it is over, or sets its timer.
    fn drive(&mut self, now: Instant, ssrc: Ssrc) {
        let Some(StreamSlot { stream, hints }) = self.streams.get_mut(&ssrc) else { return };
        while let Some(request) = stream.receiver.poll_request(now) {
            let slack_ms = request.slack_ms(now);
            let nack = Nack { ssrc, copies: request.copies, slack_ms, seqs: request.seqs };
            self.nacks.push_back(nack);
            if self.nacks.len() > MAX_NACKS {
                self.nacks.pop_front();
                self.metrics.nacks_dropped.inc();
            }
        }
        stream.deliver(now, &self.metrics);
        stream.publish_data(now);
        self.nacks.extend(stream.poll_header_recovery(now));
        let over = stream.ending.is_some_and(|(last, until)| {
            last.is_none_or(|last| stream.receiver.is_done_through(last)) || until <= now
        });
        if over {
            self.end(now, ssrc, "ended by the cloud", self.cloud_closes);
            return;
        }
        let wake = stream.poll_timeout();
        if wake != stream.wake {
            if let Some(before) = mem::replace(&mut stream.wake, wake) {
                self.wakes.remove(&(before, ssrc));
            }
            self.wakes.extend(wake.map(|at| (at, ssrc)));
        }
        *hints = stream.prefetch_hints();
    }

    /// Removes a stream that is surely over, so that its late packets are dropped.
    fn end(&mut self, now: Instant, ssrc: Ssrc, reason: &str, may_return: bool) {
        self.ended.push_back((now, ssrc));
        self.remove(now, ssrc, reason, may_return);
    }

    /// Stops to receive a stream. Its publication is held if it `may_return` under another SSRC.
    fn remove(&mut self, now: Instant, ssrc: Ssrc, reason: &str, may_return: bool) {
        let Some(mut stream) = self.streams.remove(&ssrc) else { return };
        // Packets behind a gap are still useful.
        stream.receiver.finish(now);
        stream.deliver(now, &self.metrics);
        stream.publish_all_data(now);
        self.report_turns.retain(|turn| *turn != ssrc);
        if let Some(wake) = stream.wake {
            self.wakes.remove(&(wake, ssrc));
        }
        stream.count(&self.metrics);
        if self.by_key.get(&stream.key) == Some(&ssrc) {
            self.by_key.remove(&stream.key);
        }
        tracing::info!(stream = %stream.key, %ssrc, reason, "stream ended");
        if may_return {
            self.hold(now, *stream.stream);
        }
    }

    fn forget_ended(&mut self, now: Instant) {
        let is_old = |at: Instant| now.saturating_duration_since(at) > ENDED_REMEMBERED;
        while self.ended.len() > MAX_ENDED || self.ended.front().is_some_and(|(at, _)| is_old(*at))
        {
            self.ended.pop_front();
        }
    }
}

impl Deref for StreamSlot {
    type Target = ReceivedStream;

    fn deref(&self) -> &ReceivedStream {
        &self.stream
    }
}

impl DerefMut for StreamSlot {
    fn deref_mut(&mut self) -> &mut ReceivedStream {
        &mut self.stream
    }
}

/// After a reconnect, the cloud announces every live stream within this time.
const CONFIRM_WITHIN: Duration = Duration::from_secs(3);
/// NACKs that may wait for the repair connection; each has at most 512 sequence numbers.
const MAX_NACKS: usize = 4096;
/// Longer than a packet can be late.
const ENDED_REMEMBERED: Duration = Duration::from_secs(30);
const MAX_ENDED: usize = 4096;
/// The step between two times of [`Streams::wakes`].
const TIMER_STEP: Duration = Duration::from_nanos(1);

#[cfg(test)]
mod tests;
