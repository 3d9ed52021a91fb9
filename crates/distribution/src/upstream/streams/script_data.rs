//! Script data of one stream that waits for its place among the media.
//!
//! It arrives on the control stream, which is ordered and reliable; the media beside it may still be
//! under repair. So a tag waits until media of its time is published, for [`MAX_WAIT`] at most.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use downpour_media::flv::Tag;
use downpour_repair::rtp::Ssrc;

use super::Streams;

impl Streams {
    /// Publishes script data of a stream once the media before it is published.
    pub fn stream_data(&mut self, now: Instant, ssrc: Ssrc, tag: Tag) {
        match self.streams.get_mut(&ssrc) {
            Some(stream) => {
                stream.handle_data(now, tag);
                self.drive(now, ssrc);
            }
            None => self.metrics.unknown_dropped.inc(),
        }
    }
}

/// Script tags in the order of arrival, which is that of the encoder.
#[derive(Default)]
pub(super) struct ScriptData {
    /// With the time at which each is published in any case.
    waiting: VecDeque<(Instant, Tag)>,
    bytes: usize,
}

impl ScriptData {
    pub(super) fn push(&mut self, now: Instant, tag: Tag) {
        self.bytes += tag.framed().len();
        self.waiting.push_back((now + MAX_WAIT, tag));
    }

    /// Takes the next tag if media with `timestamp` (milliseconds, wrapping) is about to be published
    /// and the tag is not later than that, if its wait is over at `now`, or if too much waits.
    pub(super) fn pop(&mut self, now: Instant, timestamp: Option<u32>) -> Option<Tag> {
        let (until, tag) = self.waiting.front()?;
        let is_reached =
            timestamp.is_some_and(|media| tag.timestamp().wrapping_sub(media) as i32 <= 0);
        if !is_reached && *until > now && self.bytes <= MAX_BYTES {
            return None;
        }
        let (_, tag) = self.waiting.pop_front()?;
        self.bytes -= tag.framed().len();
        Some(tag)
    }

    /// Takes the next tag at the end of the stream.
    pub(super) fn pop_last(&mut self) -> Option<Tag> {
        self.waiting.pop_front().map(|(_, tag)| tag)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.waiting.front().map(|(until, _)| *until)
    }
}

/// Longer than repair takes with the usual settings. Encoders may also send data ahead of its time.
const MAX_WAIT: Duration = Duration::from_millis(1500);
/// Bytes that wait at most: what a cloud sends in two seconds.
const MAX_BYTES: usize = 128 << 10;

#[cfg(test)]
mod tests {
    use downpour_media::flv::TagKind;

    use super::*;

    fn cue(timestamp: u32, len: usize) -> Tag {
        Tag::new(TagKind::Script, timestamp, &vec![2; len]).unwrap()
    }

    #[test]
    fn a_tag_waits_for_media_of_its_time_but_not_for_ever() {
        let (mut data, now) = (ScriptData::default(), Instant::now());
        data.push(now, cue(u32::MAX - 9, 20));
        data.push(now, cue(40, 20));
        assert_eq!(data.pop(now, None), None);
        assert_eq!(data.pop(now, Some(u32::MAX - 49)), None);
        // Timestamps wrap.
        assert_eq!(data.pop(now, Some(0)), Some(cue(u32::MAX - 9, 20)));
        assert_eq!(data.pop(now, Some(0)), None);
        assert_eq!(data.poll_timeout(), Some(now + MAX_WAIT));
        assert_eq!(data.pop(now + MAX_WAIT, None), Some(cue(40, 20)));
        assert_eq!(data.poll_timeout(), None);
    }

    #[test]
    fn too_much_data_does_not_wait() {
        let (mut data, now) = (ScriptData::default(), Instant::now());
        for _ in 0..5 {
            data.push(now, cue(40, 60_000));
        }
        let released = std::iter::from_fn(|| data.pop(now, None)).count();
        assert_eq!(released, 3);
    }
}
