//! The life of a received stream: its start, its restart and its end.

use std::time::{Duration, Instant};

use super::{
    CONFIRM_WITHIN, ENDED_REMEMBERED, MAX_ENDED, StreamSlot, Streams,
    received_stream::ReceivedStream,
};
use crate::upstream::livestat::LiveStream;
use downpour_hub::Publisher;
use downpour_media::{StreamKey, flv::Headers};
use downpour_repair::{
    control::StreamInfo,
    receiver::{self, Numbering, Receiver},
    rtp::{Depacketizer, Seq, Ssrc},
};

impl Streams {
    /// Starts a publication that the cloud announced, or updates its headers if it is live.
    pub fn stream_up(&mut self, now: Instant, up: StreamInfo) {
        // Nothing sent yet: the first packet will be the publication's first.
        let first = up.gop_start.or(up.newest.is_none().then_some(Seq::FIRST));
        self.start_stream(now, up, first, Numbering::Announced);
    }

    /// Starts a publication whose name the cloud's API gave. Its headers and position are unknown.
    pub fn stream_named(&mut self, now: Instant, stream: LiveStream) {
        let LiveStream { key, ssrc, start_unix_ms, .. } = stream;
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
        self.start_stream(now, up, first, Numbering::Guessed);
    }

    /// Starts to receive at `first`, or at the first packet that arrives if `None`.
    fn start_stream(
        &mut self,
        now: Instant,
        up: StreamInfo,
        first: Option<Seq>,
        numbering: Numbering,
    ) {
        if let Some(stream) = self.streams.get_mut(&up.ssrc) {
            stream.unconfirmed_since = None;
            stream.set_numbering(numbering);
            if let Some(newest) = up.newest {
                self.handle_heartbeat(now, up.ssrc, newest);
            }
            self.stream_update(up.ssrc, up.headers);
            return;
        }
        self.forget_ended(now);
        self.ended.retain(|(_, ssrc)| *ssrc != up.ssrc);
        if let Some(old) = self.by_key.get(&up.key).copied() {
            // The cloud or the encoder restarted. A v0 cloud may use the number for another stream.
            match numbering {
                Numbering::Announced => self.end(now, old, "replaced by a newer publication", true),
                Numbering::Guessed => {
                    self.remove(now, old, "replaced by a newer publication", true);
                }
            }
        }
        if self.streams.len() >= self.settings.max_streams {
            self.refuse(now, &up);
            return;
        }
        let has_headers = !up.headers.is_empty();
        let Some(publisher) = self.publisher_for(&up) else { return };
        tracing::info!(stream = %up.key, ssrc = %up.ssrc, "stream up");

        // A GOP longer than the window cannot be fetched whole.
        let first = first.filter(|first| {
            let packets = up.newest.map_or(0, |newest| newest.distance_from(*first));
            usize::try_from(packets).is_ok_and(|packets| packets < self.settings.receiver.window)
        });
        let mut stream = self.open(now, up.key.clone(), up.ssrc, publisher, first);
        stream.set_numbering(numbering);
        if first.is_none() && !has_headers {
            let may_fetch = self.settings.fetches_headers && numbering == Numbering::Guessed;
            self.nacks.push_back(stream.begin_header_recovery(now, may_fetch));
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
            // After this silence no late packet is on its way; and a v0 cloud that restarts uses
            // its numbers again.
            self.remove(now, ssrc, "no longer listed by the cloud's API", true);
        }
    }

    /// Does the periodic work: ends silent streams, drops old unnamed packets, updates counters and
    /// the wait for parity. Call it a few times per second.
    pub fn tick(&mut self, now: Instant) {
        self.forget_ended(now);
        self.held.expire(now);
        let silence = self.settings.silence;
        // A packet that has arrived and was not read yet is no silence.
        let heard_until = self.settled.map_or(now, |settled| settled.min(now));
        let over = |stream: &&StreamSlot| match (self.announced, stream.unconfirmed_since) {
            (true, None) => false,
            (true, Some(since)) => now.saturating_duration_since(since) > CONFIRM_WITHIN,
            (false, _) => heard_until.saturating_duration_since(stream.last_packet) > silence,
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

    /// Removes a stream that is surely over, so that its late packets are dropped.
    pub(super) fn end(&mut self, now: Instant, ssrc: Ssrc, reason: &str, may_return: bool) {
        self.ended.push_back((now, ssrc));
        self.remove(now, ssrc, reason, may_return);
    }

    /// Stops to receive a stream. Its publication is held if it `may_return` under another SSRC.
    pub(super) fn remove(&mut self, now: Instant, ssrc: Ssrc, reason: &str, may_return: bool) {
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

    /// Ends a stream whose sender restarted under its SSRC. Later packets belong to another
    /// publication, whose name the cloud's API has.
    pub(super) fn restart(&mut self, now: Instant, ssrc: Ssrc) {
        self.remove(now, ssrc, "the cloud restarted; it uses the SSRC again", true);
    }

    fn forget_ended(&mut self, now: Instant) {
        let is_old = |at: Instant| now.saturating_duration_since(at) > ENDED_REMEMBERED;
        while self.ended.len() > MAX_ENDED || self.ended.front().is_some_and(|(at, _)| is_old(*at))
        {
            self.ended.pop_front();
        }
    }
}
