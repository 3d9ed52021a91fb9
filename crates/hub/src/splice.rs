//! Continuous timestamps where another clock takes a stream over: an encoder that came back.

use downpour_media::flv::{Tag, TagKind};

/// Shifts the timestamps of the source that has the stream now, so that they follow those before.
#[derive(Debug, Default)]
pub(crate) struct Splice {
    /// The newest timestamp of media, as readers got it; `None` before the first.
    newest: Option<u32>,
    /// Added to each timestamp.
    offset: u32,
    /// `true` until the first frame after [`Splice::begin`], which determines the offset.
    is_pending: bool,
}

impl Splice {
    /// The next tags come from another source.
    pub(crate) fn begin(&mut self) {
        self.is_pending = self.newest.is_some();
        self.offset = 0;
    }

    /// Returns the tag on the stream's timeline.
    ///
    /// The first frame of a new source follows the newest one after [`STEP_MS`], however long the
    /// pause was: players have stood still meanwhile, and a hole in the timeline stops many of them.
    pub(crate) fn apply(&mut self, tag: Tag) -> Tag {
        if self.is_pending
            && let Some(newest) = self.newest
        {
            let at = newest.wrapping_add(STEP_MS);
            if tag.kind() == TagKind::Script || tag.is_header() {
                return tag.with_timestamp(at);
            }
            self.offset = at.wrapping_sub(tag.timestamp());
            self.is_pending = false;
        }
        let tag = match self.offset {
            0 => tag,
            offset => tag.with_timestamp(tag.timestamp().wrapping_add(offset)),
        };
        if tag.kind() != TagKind::Script {
            self.note(tag.timestamp());
        }
        tag
    }

    fn note(&mut self, timestamp: u32) {
        let step = self.newest.map_or(0, |newest| timestamp.wrapping_sub(newest) as i32);
        // A small step back is interleaving of audio and video.
        if self.newest.is_none() || !(-MAX_INTERLEAVE_MS..=0).contains(&step) {
            self.newest = Some(timestamp);
        }
    }
}

/// From the newest timestamp to the first frame of a new source, in milliseconds: one frame.
const STEP_MS: u32 = 40;
const MAX_INTERLEAVE_MS: i32 = 5_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn tag(kind: TagKind, timestamp: u32, body: &[u8]) -> Tag {
        Tag::new(kind, timestamp, body).unwrap()
    }

    #[test]
    fn a_second_clock_continues_the_first_without_a_hole() {
        let mut splice = Splice::default();
        let mut times = |source: &[(u32, &[u8])]| -> Vec<u32> {
            let frame = |(at, body): &(u32, &[u8])| {
                splice.apply(tag(TagKind::Video, *at, body)).timestamp()
            };
            let times = source.iter().map(frame).collect();
            splice.begin();
            times
        };
        let (header, frame): (&[u8], &[u8]) = (&[0x17, 0, 0, 0, 0, 1], &[0x27, 1]);
        assert_eq!(times(&[(1000, header), (1000, frame), (1040, frame)]), [1000, 1000, 1040]);
        // From 0 again, with a header that has another time than the frames.
        assert_eq!(times(&[(0, header), (500, frame), (490, frame)]), [1080, 1080, 1070]);
        // Far ahead, and across the wrap.
        assert_eq!(times(&[(u32::MAX - 9, frame), (30, frame)]), [1120, 1160]);
        // A source that sent headers only does not move the timeline.
        assert_eq!(times(&[(7, header)]), [1200]);
        assert_eq!(times(&[(7, frame)]), [1200]);
    }
}
