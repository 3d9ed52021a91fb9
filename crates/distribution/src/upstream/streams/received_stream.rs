//! One received stream: from a publication's packets to its tags in the hub.

use std::{
    mem,
    time::{Duration, Instant},
};

use super::{
    super::{
        parity::Parity,
        stats::{ReceiveMetrics, StreamStats},
    },
    header_recovery::HeaderRecovery,
    script_data::ScriptData,
};
use downpour_hub::{NextPush, Publisher};
use downpour_media::{StreamKey, flv::Tag};
use downpour_repair::{
    control::StreamReport,
    fec,
    message::Nack,
    receiver::{self, Event, Numbering, Receiver},
    rtp::{
        Depacketizer, Packet, Seq, Ssrc,
        depacketizer::{self, Damage},
    },
};
use downpour_sys::LogLimit;

/// One received stream: reordering and repair, reassembly of tags, publication in the hub.
///
/// The fields that each packet touches come first: [`HOT_BYTES`] of them are prefetched.
/// The alignment saves the edge 4 % (`scripts/bench edge`).
#[repr(C, align(64))]
pub(super) struct ReceivedStream {
    pub(super) publisher: Publisher,
    pub(super) last_packet: Instant,
    /// Set once the cloud announced the end: the last number it sent, and how long to wait for it.
    pub(super) ending: Option<(Option<Seq>, Instant)>,
    header_recovery: Option<Box<HeaderRecovery>>,
    /// Set while script data waits for its place among the media.
    script_data: Option<Box<ScriptData>>,
    /// Timestamp of the last tag in milliseconds, once there was one.
    last_timestamp: Option<u32>,
    /// Set once parity has arrived.
    pub(super) parity: Option<Box<Parity>>,
    pub(super) depacketizer: Depacketizer,
    pub(super) receiver: Receiver,
    pub(super) ssrc: Ssrc,
    pub(super) key: StreamKey,
    /// Its entry in [`Streams::wakes`](super::Streams), if it has one.
    pub(super) wake: Option<Instant>,
    /// Since when the current connection has not announced it, if it has not yet.
    pub(super) unconfirmed_since: Option<Instant>,
    numbering: Numbering,
    /// `true` once the receiver found that the sender restarted.
    restarted: bool,
    /// Total since the stream started.
    damage: Damage,
    damage_log: LogLimit,
    /// The part of the receiver's and the decoder's statistics that [`ReceiveMetrics`] has.
    counted: receiver::Stats,
    counted_parity: fec::decoder::Stats,
}

/// Addresses that the stream's next packet will probably touch, for prefetching.
#[derive(Debug, Clone, Copy)]
pub(super) struct PrefetchHints {
    pub(super) push: NextPush,
    /// Destination of the payload.
    pub(super) payload: usize,
    /// Counter of the buffer pool, written once per tag.
    pub(super) count: usize,
}

impl ReceivedStream {
    pub(super) fn new(
        now: Instant,
        key: StreamKey,
        ssrc: Ssrc,
        publisher: Publisher,
        receiver: Receiver,
        depacketizer: Depacketizer,
    ) -> Self {
        Self {
            publisher,
            last_packet: now,
            ending: None,
            header_recovery: None,
            script_data: None,
            last_timestamp: None,
            parity: None,
            depacketizer,
            receiver,
            ssrc,
            key,
            wake: None,
            unconfirmed_since: None,
            numbering: Numbering::default(),
            restarted: false,
            damage: Damage::default(),
            damage_log: LogLimit::every(DAMAGE_LOG_INTERVAL),
            counted: receiver::Stats::default(),
            counted_parity: fec::decoder::Stats::default(),
        }
    }

    pub(super) fn prefetch_hints(&self) -> PrefetchHints {
        PrefetchHints {
            push: self.publisher.next_push(),
            payload: self.depacketizer.next_address(),
            count: self.depacketizer.refcount_address(),
        }
    }

    /// How a restart of the sender's numbers is known.
    pub(super) fn numbering(&self) -> Numbering {
        self.numbering
    }

    pub(super) fn set_numbering(&mut self, numbering: Numbering) {
        self.numbering = numbering;
        self.receiver.set_numbering(numbering);
    }

    /// `true` once the sender restarted: later packets belong to another publication.
    pub(super) fn has_restarted(&self) -> bool {
        self.restarted
    }

    /// `true` if a live packet is one of the first of another publication under the same SSRC: a Go
    /// cloud that restarts counts its SSRCs and its packets from the same numbers. The numbers alone
    /// also pass there once in 65,536 packets.
    pub(super) fn is_restart(&self, now: Instant, packet: &Packet) -> bool {
        let from_first = packet.header.seq.distance_from(Seq::FIRST);
        let Some(distance) = self.receiver.distance_to_newest(packet.header.seq) else {
            return false;
        };
        if !(0..RESTART_PACKETS).contains(&from_first) || distance == 1 {
            return false;
        }
        let timestamp = depacketizer::tag_timestamp(&packet.payload, packet.header.marker);
        let time_runs_back = match (timestamp, self.last_timestamp) {
            (Some(first), Some(last)) => last.wrapping_sub(first) as i32 >= RESTART_STEP_MS,
            _ => false,
        };
        let was_silent = now.saturating_duration_since(self.last_packet) >= RESTART_SILENCE;
        time_runs_back || was_silent && distance <= 0
    }

    /// Starts to recover the codec headers; returns the first request. If the cloud does not hold them
    /// and `may_fetch`, they are to be fetched.
    pub(super) fn begin_header_recovery(&mut self, now: Instant, may_fetch: bool) -> Nack {
        self.header_recovery = Some(Box::new(HeaderRecovery::new(now, may_fetch)));
        HeaderRecovery::request(self.ssrc)
    }

    /// `true`, once, if the headers are to be fetched.
    pub(super) fn take_header_fetch(&mut self) -> bool {
        self.header_recovery.as_mut().is_some_and(|recovery| recovery.take_fetch())
    }

    /// Takes fetched headers, unless some have arrived by now. Media is held no longer.
    pub(super) fn headers_fetched(&mut self, headers: Result<Vec<Tag>, String>) {
        if self.header_recovery.is_none() {
            return;
        }
        match headers {
            Ok(headers) => {
                tracing::info!(stream = %self.key, "codec headers fetched by RTMP");
                let known = self.publisher.stream().headers();
                let is_new = |tag: &&Tag| known.like(tag).is_none();
                headers.iter().filter(is_new).for_each(|tag| self.set_header(tag.clone()));
            }
            Err(error) => tracing::warn!(
                stream = %self.key,
                error,
                "codec headers cannot be fetched by RTMP; the stream plays once the encoder sends \
                 them again"
            ),
        }
        self.release_held_media();
    }

    fn set_header(&mut self, tag: Tag) {
        self.publisher.set_headers(std::iter::once(tag).collect());
    }

    /// Returns `true` if the packet is one that header recovery asked for; the packet is used up
    /// then.
    pub(super) fn recover_headers(&mut self, packet: &Packet) -> bool {
        let Some(recovery) = &mut self.header_recovery else { return false };
        if !HeaderRecovery::is_requested(packet.header.seq) {
            return false;
        }
        let header = recovery.handle_packet(packet);
        let is_complete = recovery.is_complete();
        if let Some(header) = header {
            self.set_header(header);
        }
        if is_complete {
            self.release_held_media();
        }
        true
    }

    /// Stops holding media back if the cloud no longer has the packet that header recovery needs, and
    /// the headers cannot be fetched either.
    pub(super) fn headers_gone(&mut self, now: Instant, seqs: &[Seq]) {
        if let Some(recovery) = &mut self.header_recovery
            && recovery.needs_one_of(seqs)
            && !recovery.begin_fetch(now)
        {
            self.release_held_media();
        }
    }

    /// When a try of header recovery has timed out, releases the media and returns the next
    /// request. Ends the recovery if there are headers by now, or no tries left.
    pub(super) fn poll_header_recovery(&mut self, now: Instant) -> Option<Nack> {
        let recovery = self.header_recovery.as_mut().filter(|r| r.poll_timeout() <= now)?;
        let headers = self.publisher.stream().headers();
        let recovered = headers.video().is_some() || headers.audio().is_some();
        if !recovered && recovery.begin_fetch(now) {
            return None;
        }
        self.release_held_media();
        let retries = self.header_recovery.as_mut()?.retry(now);
        if !recovered && retries {
            return Some(HeaderRecovery::request(self.ssrc));
        }
        if !recovered {
            tracing::warn!(stream = %self.key, ssrc = %self.ssrc, "codec headers not recovered");
        }
        self.header_recovery = None;
        None
    }

    /// Reassembles the packets that the receiver has ready, and publishes the tags.
    pub(super) fn deliver(&mut self, now: Instant, metrics: &ReceiveMetrics) {
        while !self.restarted
            && let Some(event) = self.receiver.poll_event()
        {
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
                Event::Restart(_) if self.numbering == Numbering::Guessed => self.restarted = true,
                Event::Restart(_) => {
                    self.parity = None;
                    let (stream, ssrc) = (&self.key, self.ssrc);
                    tracing::warn!(%stream, %ssrc, "stream continues after a long interruption");
                    self.depacketizer.lost(0);
                }
            }
        }
        self.take_damage(now, metrics);
    }

    /// Publishes a tag, or holds it while header recovery waits for the headers.
    pub(super) fn push(&mut self, now: Instant, tag: Tag) {
        if self.depacketizer.is_repeated(&tag) && self.has_header(&tag) {
            return;
        }
        self.last_timestamp = Some(tag.timestamp());
        match &mut self.header_recovery {
            Some(recovery) if recovery.is_holding() => {
                if recovery.hold(tag) {
                    self.release_held_media();
                }
            }
            _ => {
                if self.script_data.is_some() {
                    self.publish_data(now);
                }
                self.publisher.push_at(now, tag);
            }
        }
    }

    /// Takes script data that the cloud sent beside the media.
    pub(super) fn handle_data(&mut self, now: Instant, tag: Tag) {
        self.script_data.get_or_insert_default().push(now, tag);
    }

    /// Publishes script data whose time has come.
    pub(super) fn publish_data(&mut self, now: Instant) {
        let Some(data) = &mut self.script_data else { return };
        while let Some(tag) = data.pop(now, self.last_timestamp) {
            self.publisher.push_at(now, tag);
        }
        if data.poll_timeout().is_none() {
            self.script_data = None;
        }
    }

    /// Publishes the script data that is left at the end of the stream.
    pub(super) fn publish_all_data(&mut self, now: Instant) {
        let data = self.script_data.take();
        for tag in data.into_iter().flat_map(|mut data| std::iter::from_fn(move || data.pop_last()))
        {
            self.publisher.push_at(now, tag);
        }
    }

    /// `true` if `tag` is the codec header that the publication has already.
    fn has_header(&self, tag: &Tag) -> bool {
        let headers = self.publisher.stream().headers();
        headers.like(tag).is_some_and(|held| held.body() == tag.body())
    }

    fn release_held_media(&mut self) {
        if let Some(recovery) = &mut self.header_recovery {
            for tag in recovery.release() {
                self.publisher.push(tag);
            }
        }
    }

    /// Counts and logs the media that was lost since the last call.
    #[inline]
    pub(super) fn take_damage(&mut self, now: Instant, metrics: &ReceiveMetrics) {
        if let Some(damage) = self.depacketizer.take_damage() {
            self.record_damage(now, damage, metrics);
        }
    }

    fn record_damage(&mut self, now: Instant, damage: Damage, metrics: &ReceiveMetrics) {
        metrics.discarded.inc_by(damage.discarded);
        metrics.malformed.inc_by(damage.malformed);
        let total = &mut self.damage;
        total.packets += damage.packets;
        total.discarded += damage.discarded;
        total.malformed += damage.malformed;
        if total.packets + total.malformed == 0 {
            // The stream was joined in mid-tag, and the rest of that tag is discarded.
            return;
        }
        if let Some(missed) = self.damage_log.due(now) {
            tracing::warn!(
                stream = %self.key,
                ssrc = %self.ssrc,
                lost = total.packets,
                discarded = total.discarded,
                malformed = total.malformed,
                missed,
                "media lost; packets in total",
            );
        }
    }

    /// Returns when the stream is to be driven next.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let timeouts = [
            self.receiver.poll_timeout(),
            self.ending.map(|(_, until)| until),
            self.header_recovery.as_ref().map(|recovery| recovery.poll_timeout()),
            self.script_data.as_ref().and_then(|data| data.poll_timeout()),
        ];
        timeouts.into_iter().flatten().min()
    }

    /// Adds the difference since the last call to the node's counters.
    pub(super) fn count(&mut self, metrics: &ReceiveMetrics) {
        let stats = self.receiver.stats();
        metrics.add(&mem::replace(&mut self.counted, stats), &stats);
        if let Some(parity) = &self.parity {
            let stats = parity.stats();
            metrics.add_parity(&mem::replace(&mut self.counted_parity, stats), &stats);
        }
    }

    pub(super) fn stats(&self) -> StreamStats {
        StreamStats {
            key: self.key.clone(),
            report: self.report(),
            pending: self.receiver.pending(),
            missing: self.receiver.missing(),
        }
    }

    pub(super) fn report(&self) -> StreamReport {
        self.receiver.stats().report(self.ssrc)
    }

    #[cfg(test)]
    pub(super) fn stop_header_recovery(&mut self) {
        self.header_recovery = None;
    }
}

/// Bytes of [`ReceivedStream`] that each packet touches: up to the receiver's first cache line.
pub(super) const HOT_BYTES: usize = mem::offset_of!(ReceivedStream, receiver) + 64;
/// The first packets of a publication by which its start is recognised, some of which may be lost.
const RESTART_PACKETS: i32 = 32;
/// A step of media time back by which a restart is recognised: far more than frames are reordered.
const RESTART_STEP_MS: i32 = 1000;
/// Silence before the first packet of a restarted cloud, at least: its encoder has to reconnect.
const RESTART_SILENCE: Duration = Duration::from_millis(300);
const DAMAGE_LOG_INTERVAL: Duration = Duration::from_secs(1);
