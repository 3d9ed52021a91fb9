//! Recovery of codec headers from the first packets of a publication.
//!
//! A v0 cloud announces no codec headers to an edge that joins late. The headers are the first
//! packets of the publication, so the edge requests these, in case the cloud still holds them.
//!
//! # States
//!
//! | state | event | next state |
//! |---|---|---|
//! | holding: media waits, because headers are useless behind the frames that need them | all requested packets arrived, or [`MAX_HELD_BYTES`] are held | flowing |
//! | holding | a requested packet is gone, or [`HOLD_TIME`] passed | holding, while the headers are fetched for [`FETCH_TIME`]; flowing where they cannot be |
//! | holding | the headers were fetched, or could not be | flowing |
//! | flowing: media is published | timeout, no headers, tries left | flowing, with a new request |
//! | flowing | timeout, and headers are known or no tries left | done: the owner drops it |
//!
//! Requested packets are taken in order; the first one that is missing stops a try. Once media
//! flows, it is never held again.

use std::{
    mem,
    time::{Duration, Instant},
};

use downpour_media::flv::Tag;
use downpour_repair::{
    message::Nack,
    rtp::{Depacketizer, Packet, Seq, Ssrc},
};

/// Recovery of one stream's codec headers.
pub(super) struct HeaderRecovery {
    depacketizer: Depacketizer,
    /// The requested packet that this try needs next.
    next: Seq,
    /// When this try times out.
    until: Instant,
    tries_left: u8,
    media: Media,
    fetch: Fetch,
}

/// Fetching the headers in another way than from the publication's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fetch {
    /// Not possible, or done.
    Never,
    Possible,
    /// To be started by the owner.
    Wanted,
}

enum Media {
    Holding { tags: Vec<Tag>, bytes: usize },
    Flowing,
}

impl HeaderRecovery {
    /// Starts to hold media. Send [`HeaderRecovery::request`] now.
    pub(super) fn new(now: Instant, may_fetch: bool) -> Self {
        Self {
            depacketizer: Depacketizer::new(),
            next: Seq::FIRST,
            until: now + HOLD_TIME,
            tries_left: RETRIES,
            media: Media::Holding { tags: Vec::new(), bytes: 0 },
            fetch: if may_fetch { Fetch::Possible } else { Fetch::Never },
        }
    }

    /// Holds media until the headers are fetched. Returns `false` if they cannot be, or were.
    pub(super) fn begin_fetch(&mut self, now: Instant) -> bool {
        let begins = self.fetch == Fetch::Possible && self.is_holding();
        if begins {
            self.fetch = Fetch::Wanted;
            self.until = now + FETCH_TIME;
        }
        begins
    }

    /// `true`, once, if the headers are to be fetched.
    pub(super) fn take_fetch(&mut self) -> bool {
        let wanted = self.fetch == Fetch::Wanted;
        if wanted {
            self.fetch = Fetch::Never;
        }
        wanted
    }

    /// Returns the request for the first packets of a publication.
    pub(super) fn request(ssrc: Ssrc) -> Nack {
        let seqs = (0..REQUESTED_PACKETS).map(|i| Seq::FIRST.plus(i)).collect();
        Nack { ssrc, copies: 1, slack_ms: HOLD_TIME.as_millis() as u16, seqs }
    }

    /// `true` if `seq` is one of the requested packets.
    pub(super) fn is_requested(seq: Seq) -> bool {
        (0..REQUESTED_PACKETS as i32).contains(&seq.distance_from(Seq::FIRST))
    }

    /// Takes a requested packet. Returns the sequence header that it completes, if any.
    pub(super) fn handle_packet(&mut self, packet: &Packet) -> Option<Tag> {
        if packet.header.seq != self.next {
            return None;
        }
        self.next = self.next.plus(1);
        self.depacketizer.packet(packet).filter(Tag::is_sequence_header)
    }

    /// `true` once every requested packet has arrived.
    pub(super) fn is_complete(&self) -> bool {
        self.next == Seq::FIRST.plus(REQUESTED_PACKETS)
    }

    /// `true` if this try cannot continue without one of `seqs`.
    pub(super) fn needs_one_of(&self, seqs: &[Seq]) -> bool {
        seqs.contains(&self.next)
    }

    /// `true` while media is to be held.
    pub(super) fn is_holding(&self) -> bool {
        matches!(self.media, Media::Holding { .. })
    }

    /// Holds a tag. Returns `true` once too much is held: [`HeaderRecovery::release`] it then.
    pub(super) fn hold(&mut self, tag: Tag) -> bool {
        let Media::Holding { tags, bytes } = &mut self.media else { return true };
        *bytes += tag.framed().len();
        tags.push(tag);
        *bytes > MAX_HELD_BYTES
    }

    /// Stops holding media; returns the held tags.
    pub(super) fn release(&mut self) -> Vec<Tag> {
        match mem::replace(&mut self.media, Media::Flowing) {
            Media::Holding { tags, .. } => tags,
            Media::Flowing => Vec::new(),
        }
    }

    /// Starts the next try. Returns `false` if there is none left.
    pub(super) fn retry(&mut self, now: Instant) -> bool {
        if self.tries_left == 0 {
            return false;
        }
        self.tries_left -= 1;
        self.until = now + RETRY_INTERVAL;
        self.next = Seq::FIRST;
        self.depacketizer = Depacketizer::new();
        true
    }

    /// Returns when this try times out.
    pub(super) fn poll_timeout(&self) -> Instant {
        self.until
    }
}

/// How long media is held for the headers.
pub(super) const HOLD_TIME: Duration = Duration::from_millis(700);
/// How long media is held while the headers are fetched.
pub(super) const FETCH_TIME: Duration = Duration::from_secs(3);
const MAX_HELD_BYTES: usize = 8 << 20;
/// Retries, because the connection may not exist yet, and because the cloud answers with newer
/// packets of the same sequence numbers for as long as its history holds them.
const RETRIES: u8 = 15;
pub(super) const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// One packet for each of the video and the audio header, and two more for a long header.
const REQUESTED_PACKETS: usize = 4;
