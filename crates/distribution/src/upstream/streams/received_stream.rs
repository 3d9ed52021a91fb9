//! One stream that is received: packets to tags.

use std::time::{Duration, Instant};

use super::{
    super::{
        parity::Parity,
        stats::{ReceiveMetrics, StreamStats},
    },
    header_recovery::{HeaderRecovery, MAX_WAITING_BYTES},
};
use downpour_hub::{NextPush, Publisher};
use downpour_media::{StreamKey, flv::Tag};
use downpour_repair::{
    control::StreamReport,
    fec,
    receiver::{self, Event, Receiver},
    rtp::{Depacketizer, Seq, Ssrc, depacketizer::Damage},
};

/// What of memory a stream's next packet will need, so far as one can tell. It is beside the
/// stream's address, so that all of it can be fetched at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct PrefetchHints {
    pub(super) push: NextPush,
    /// Address of the place that its payload will have.
    pub(super) payload: usize,
    /// Address of what is written for each tag besides.
    pub(super) count: usize,
}

/// What each packet needs is in front and together: few lines of the cache, which with hundreds of
/// streams are cold each time.
#[repr(C, align(64))]
pub(super) struct ReceivedStream {
    pub(super) publisher: Publisher,
    pub(super) last_packet: Instant,
    /// The cloud said that the stream is over: the last number it sent, and how long to wait.
    pub(super) ending: Option<(Option<Seq>, Instant)>,
    pub(super) header_hunt: Option<Box<HeaderRecovery>>,
    /// Once parity has come.
    pub(super) parity: Option<Box<Parity>>,
    pub(super) depacketizer: Depacketizer,
    pub(super) receiver: Receiver,
    pub(super) ssrc: Ssrc,
    pub(super) key: StreamKey,
    /// Its place in [`Streams::wakes`], if it has one.
    pub(super) wake: Option<Instant>,
    /// A new connection to the cloud has not named it yet.
    pub(super) unconfirmed_since: Option<Instant>,
    pub(super) damage: Damage,
    pub(super) damage_logged: Option<Instant>,
    pub(super) counted: receiver::Stats,
    pub(super) counted_parity: fec::decoder::Stats,
}

impl ReceivedStream {
    pub(super) fn ahead(&self) -> PrefetchHints {
        PrefetchHints {
            push: self.publisher.next_push(),
            payload: self.depacketizer.next_place(),
            count: self.depacketizer.count(),
        }
    }

    /// Puts what the receiver gives into tags, and those into the hub.
    pub(super) fn hand_on(&mut self, now: Instant, metrics: &ReceiveMetrics) {
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

    pub(super) fn look_for_damage(&mut self, now: Instant, metrics: &ReceiveMetrics) {
        if let Some(damage) = self.depacketizer.take_damage() {
            self.note_damage(now, damage, metrics);
        }
    }

    pub(super) fn push(&mut self, now: Instant, tag: Tag) {
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

    pub(super) fn note_damage(&mut self, now: Instant, damage: Damage, metrics: &ReceiveMetrics) {
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
    pub(super) fn count(&mut self, metrics: &ReceiveMetrics) {
        let stats = self.receiver.stats();
        metrics.add(&self.counted, &stats);
        self.counted = stats;
        if let Some(parity) = &self.parity {
            let stats = parity.stats();
            metrics.add_parity(&self.counted_parity, &stats);
            self.counted_parity = stats;
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
}

/// Of a stream, what a packet needs: the front, with that of the receiver.
pub(super) const HOT_BYTES: usize = std::mem::offset_of!(ReceivedStream, receiver) + 64;
const DAMAGE_LOG_EVERY: Duration = Duration::from_secs(1);
