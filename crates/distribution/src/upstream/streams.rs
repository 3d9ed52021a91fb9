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
//! | live | no packets, and no connection that announces ends; not listed by the API | unknown: it may start again |
//! | live | the numbers begin again, and no connection announces streams | unnamed: another publication |
//! | live | not announced after a reconnect, replaced under its key | ended |
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
mod lifecycle;
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
use super::{parity::Parity, stats::ReceiveMetrics};
use downpour_hub::Hub;
use downpour_media::{
    StreamKey,
    flv::{Headers, Tag},
};
use downpour_repair::{
    control::StreamReport,
    message::{Heartbeat, Nack},
    receiver::{self, Numbering, Path},
    rtp::{
        Packet, Seq, Ssrc,
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
    /// Whether the codec headers of a stream that is joined late can be fetched from the cloud in
    /// another way: [`Streams::poll_header_fetch`].
    pub fetches_headers: bool,
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
    /// Requests that are no longer needed.
    withdrawn: VecDeque<(Ssrc, Seq)>,
    /// Streams whose headers are to be fetched.
    header_fetches: VecDeque<(Ssrc, StreamKey)>,
    /// The time up to which everything that arrived has been passed in, once known.
    settled: Option<Instant>,
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
            withdrawn: VecDeque::new(),
            header_fetches: VecDeque::new(),
            settled: None,
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
        let may_restart = stream.numbering() == Numbering::Guessed;
        if matches!(path, Path::Live(_)) {
            if may_restart && stream.is_restart(now, &packet) {
                self.metrics.restarts.inc();
                self.restart(now, ssrc);
                self.hold_unnamed(now, packet, path);
                return;
            }
            stream.last_packet = now;
        } else if stream.recover_headers(&packet) {
            // It is from the start of the publication; the receiver did not ask for it.
            return;
        }
        let again = may_restart.then(|| packet.clone());
        stream.receiver.handle_packet(now, packet, path);
        if let (Some(parity), Some(datagram)) = (&mut stream.parity, for_parity) {
            for packet in parity.handle_media(datagram) {
                stream.receiver.handle_packet(now, packet, Path::Parity);
            }
        }
        self.drive(now, ssrc);
        if let Some(packet) = again
            && !self.streams.contains_key(&ssrc)
        {
            // The sender restarted: the packet belongs to the next publication.
            self.hold_unnamed(now, packet, path);
        }
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

    /// Sets the headers that the cloud announced for a stream.
    pub fn stream_update(&mut self, ssrc: Ssrc, headers: Headers) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.publisher.set_headers(headers);
        }
    }

    /// Stops waiting for packets that the cloud no longer holds.
    pub fn handle_gone(&mut self, now: Instant, ssrc: Ssrc, seqs: &[Seq]) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.receiver.handle_gone(now, seqs.iter().copied());
            stream.headers_gone(now, seqs);
            self.drive(now, ssrc);
        }
    }

    /// Requests packets again that a v0 cloud does not hold, or not yet.
    pub fn handle_not_held(&mut self, now: Instant, ssrc: Ssrc, seqs: &[Seq]) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.receiver.handle_not_held(now, seqs.iter().copied());
            stream.headers_gone(now, seqs);
            self.drive(now, ssrc);
        }
    }

    /// Takes the headers of a stream that were fetched, or the reason why there are none.
    pub fn headers_fetched(&mut self, now: Instant, ssrc: Ssrc, headers: Result<Vec<Tag>, String>) {
        if let Some(stream) = self.streams.get_mut(&ssrc) {
            stream.headers_fetched(headers);
            self.drive(now, ssrc);
        }
    }

    /// Takes the next stream whose headers are to be fetched.
    pub fn poll_header_fetch(&mut self) -> Option<(Ssrc, StreamKey)> {
        self.header_fetches.pop_front()
    }

    /// Takes the next request that is no longer needed.
    pub fn poll_withdrawn(&mut self) -> Option<(Ssrc, Seq)> {
        self.withdrawn.pop_front()
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
        self.handle_timeout_until(now, now);
    }

    /// The same where not everything that arrived may have been passed in yet, but all until
    /// `settled`: only deadlines up to that time count.
    pub fn handle_timeout_until(&mut self, now: Instant, settled: Instant) {
        let settled = settled.min(now);
        self.settled = Some(self.settled.map_or(settled, |before| before.max(settled)));
        if self.poll_timeout().is_none_or(|at| at > now) {
            return;
        }
        // Once per stream: one that is due again immediately waits for the next call.
        let later = self.wakes.split_off(&(now + TIMER_STEP, Ssrc(0)));
        for (_, ssrc) in mem::replace(&mut self.wakes, later) {
            if let Some(stream) = self.streams.get_mut(&ssrc) {
                stream.wake = None;
                stream.receiver.handle_timeout(settled);
                self.drive(now, ssrc);
            }
        }
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
        let now = self.settled.map_or(now, |settled| settled.min(now));
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
        while let Some(seq) = stream.receiver.poll_withdrawn() {
            self.withdrawn.push_back((ssrc, seq));
        }
        while self.withdrawn.len() > MAX_NACKS {
            self.withdrawn.pop_front();
        }
        stream.deliver(now, &self.metrics);
        stream.publish_data(now);
        if stream.has_restarted() {
            self.restart(now, ssrc);
            return;
        }
        self.nacks.extend(stream.poll_header_recovery(now));
        if stream.take_header_fetch() {
            self.header_fetches.push_back((ssrc, stream.key.clone()));
        }
        let settled = self.settled.map_or(now, |settled| settled.min(now));
        let over = stream.ending.is_some_and(|(last, until)| {
            last.is_none_or(|last| stream.receiver.is_done_through(last)) || until <= settled
        });
        if over {
            self.end(now, ssrc, "ended by the cloud", self.cloud_closes);
            return;
        }
        // What is overdue waits until everything that arrived by then is known.
        let wake = stream.poll_timeout().map(|at| if at > now { at } else { now + SETTLE_PAUSE });
        if wake != stream.wake {
            if let Some(before) = mem::replace(&mut stream.wake, wake) {
                self.wakes.remove(&(before, ssrc));
            }
            self.wakes.extend(wake.map(|at| (at, ssrc)));
        }
        *hints = stream.prefetch_hints();
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
/// Pause before an overdue deadline is looked at again.
const SETTLE_PAUSE: Duration = Duration::from_millis(2);
/// The step between two times of [`Streams::wakes`].
const TIMER_STEP: Duration = Duration::from_nanos(1);

#[cfg(test)]
mod tests;
