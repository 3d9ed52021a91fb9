//! Codec headers that are sent again before key frames, for Go edges that join late.

use std::time::{Duration, Instant};

use downpour_media::flv::{Tag, TagKind};

/// The headers of one stream, and which of them are due.
#[derive(Default)]
pub(super) struct RepeatedHeaders {
    /// Video and audio.
    headers: [Option<Header>; 2],
    /// When headers were due last, in a stream without video.
    last: Option<Instant>,
}

struct Header {
    tag: Tag,
    /// `true` once a key frame followed it.
    is_behind: bool,
}

impl RepeatedHeaders {
    /// Returns the headers to send before `tag`, with its timestamp: those that have not been sent since
    /// the last key frame. A stream without video has them every [`INTERVAL`].
    pub(super) fn due(&mut self, now: Instant, tag: &Tag, has_video: bool) -> Vec<Tag> {
        if !self.is_start(now, tag, has_video) {
            return Vec::new();
        }
        let headers = self.headers.iter().flatten().filter(|header| header.is_behind);
        headers.map(|header| header.tag.with_timestamp(tag.timestamp())).collect()
    }

    /// Records a tag that is sent.
    pub(super) fn sent(&mut self, now: Instant, tag: &Tag) {
        if tag.is_sequence_header() {
            // A Go edge plays no other track of Enhanced RTMP.
            if tag.is_main_sequence_header() {
                let slot = &mut self.headers[usize::from(tag.kind() == TagKind::Audio)];
                *slot = Some(Header { tag: tag.detached(), is_behind: false });
            }
        } else if tag.is_key_frame() || self.headers[0].is_none() {
            self.headers.iter_mut().flatten().for_each(|header| header.is_behind = true);
            self.last.get_or_insert(now);
        }
    }

    fn is_start(&mut self, now: Instant, tag: &Tag, has_video: bool) -> bool {
        if has_video || tag.is_sequence_header() {
            return tag.is_key_frame();
        }
        let is_over = |at: Instant| now.saturating_duration_since(at) >= INTERVAL;
        let starts = self.last.is_some_and(is_over);
        if starts {
            self.last = Some(now);
        }
        starts
    }
}

/// The usual time between two key frames.
const INTERVAL: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(kind: TagKind, timestamp: u32, body: &[u8]) -> Tag {
        Tag::new(kind, timestamp, body).unwrap()
    }

    #[test]
    fn headers_precede_every_key_frame_that_does_not_follow_them_already() {
        let now = Instant::now();
        let mut repeated = RepeatedHeaders::default();
        let video = tag(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]);
        let audio = tag(TagKind::Audio, 0, &[0xaf, 0, 0x12, 0x10]);
        let key = |ms| tag(TagKind::Video, ms, &[0x17, 1, 0, 0, 0, 9]);
        let frame = |ms| tag(TagKind::Video, ms, &[0x27, 1, 0, 0, 0, 9]);
        let mut push = |tag: &Tag| {
            let due = repeated.due(now, tag, true);
            repeated.sent(now, tag);
            due
        };
        for tag in [&video, &audio, &key(0), &frame(40), &audio.with_timestamp(50)] {
            assert_eq!(push(tag), [], "{tag:?}");
        }
        // The encoder has sent the audio header itself.
        assert_eq!(push(&key(80)), [video.with_timestamp(80)]);
        assert_eq!(push(&frame(120)), []);
        assert_eq!(push(&key(160)), [video.with_timestamp(160), audio.with_timestamp(160)]);
        // Another track's header does not take the place of the main one.
        let track = tag(TagKind::Video, 170, &[0x96, 0, b'a', b'v', b'c', b'1', 1, 7]);
        push(&track);
        assert_eq!(push(&key(200))[0], video.with_timestamp(200));
    }

    #[test]
    fn stream_without_video_has_its_header_every_two_seconds() {
        let start = Instant::now();
        let mut repeated = RepeatedHeaders::default();
        let header = tag(TagKind::Audio, 0, &[0xaf, 0, 0x12, 0x10]);
        repeated.sent(start, &header);
        let mut due = Vec::new();
        for ms in (0..7000).step_by(20) {
            let (now, frame) =
                (start + Duration::from_millis(ms), tag(TagKind::Audio, ms as u32, &[0xaf, 1, 9]));
            due.extend(repeated.due(now, &frame, false));
            repeated.sent(now, &frame);
        }
        let times: Vec<_> = due.iter().map(Tag::timestamp).collect();
        assert_eq!(times, [2000, 4000, 6000]);
    }
}
