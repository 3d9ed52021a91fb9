//! Recovery of codec headers from a publication's first packets.

use std::time::{Duration, Instant};

use super::received_stream::ReceivedStream;
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::{
    message::Nack,
    rtp::{Depacketizer, Packet, Seq},
};

/// What a v0 cloud does not tell to one who joins late: the codec headers. They were the first
/// packets of the publication, so those are asked for, should they still be held. Media waits a
/// moment for the answer, because a header is of no use behind the frames that need it.
pub(super) struct HeaderRecovery {
    pub(super) depacketizer: Depacketizer,
    pub(super) next: Seq,
    pub(super) until: Instant,
    pub(super) tries_left: u8,
    /// `None` once media does not wait any longer.
    pub(super) waiting: Option<Vec<Tag>>,
    pub(super) waiting_bytes: usize,
}

impl ReceivedStream {
    pub(super) fn begin_header_hunt(&mut self, now: Instant) -> Nack {
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

    pub(super) fn hunt_request(&self) -> Nack {
        let seqs = (0..HUNT_PACKETS).map(|i| Seq::FIRST.plus(i)).collect();
        let slack_ms = MEDIA_WAITS.as_millis() as u16;
        Nack { ssrc: self.ssrc, copies: 1, slack_ms, seqs }
    }

    /// Whether the packet is one of those that the hunt is for.
    pub(super) fn hunt_headers(&mut self, packet: &Packet) -> bool {
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

    /// The time for a try of the hunt is over: media goes on, and the next try begins if there is
    /// still no header.
    pub(super) fn hunt_on(&mut self, now: Instant) -> Option<Nack> {
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

    pub(super) fn end_wait(&mut self) {
        let waiting = self.header_hunt.as_mut().and_then(|hunt| hunt.waiting.take());
        for tag in waiting.unwrap_or_default() {
            self.publisher.push(tag);
        }
    }
}

pub(super) const MEDIA_WAITS: Duration = Duration::from_millis(700);
pub(super) const MAX_WAITING_BYTES: usize = 8 << 20;
/// The connection may still be being made, and for as long as the ring holds newer packets of the
/// same numbers the cloud answers with those.
pub(super) const HUNT_EVERY: Duration = Duration::from_secs(1);
pub(super) const HUNT_TRIES: u8 = 15;
/// The video and the audio header, one packet each, and room for one that is longer.
pub(super) const HUNT_PACKETS: usize = 4;
