//! Timestamps that stay continuous when the clocks of an encoder jump.

use std::time::Instant;

use crate::flv::{Tag, TagKind};

/// Repairs the timestamps of one publication: players stop at a jump, and show nothing while audio
/// and video are far apart.
///
/// Audio and video have a clock each. A clock **jumps** if it steps back by over a second, or ahead
/// by over 3 s more than has passed since its last tag. Its timestamps then continue where they were,
/// and the other clock follows with the same offset once it jumps, too. A clock that starts over 3 s
/// away from the other one starts at the other's newest time. Everything else stays as it is.
///
/// Headers and script data often come with timestamps of their own: they set no clock, and get the
/// time of the newest tag if theirs is far from it.
#[derive(Debug, Default)]
pub struct TimestampRepair {
    audio: Clock,
    video: Clock,
    jumps: u64,
}

/// The clock of one kind of media.
#[derive(Debug, Default, Clone, Copy)]
struct Clock {
    /// Added to the timestamps of the encoder.
    offset: u32,
    newest: Option<Newest>,
}

#[derive(Debug, Clone, Copy)]
struct Newest {
    /// The timestamp returned last.
    timestamp: u32,
    /// The step to it, in milliseconds.
    step: u32,
    arrived: Instant,
}

impl TimestampRepair {
    /// Returns the timestamp of a tag that arrived at `now`. Both are in milliseconds and wrap at
    /// 2³².
    pub fn repair(&mut self, now: Instant, tag: &Tag) -> u32 {
        let is_audio = tag.kind() == TagKind::Audio;
        let (own, other) = match is_audio {
            true => (self.audio, self.video),
            false => (self.video, self.audio),
        };
        let input = tag.timestamp();
        if tag.kind() == TagKind::Script || tag.is_header() || tag.is_config_packet() {
            return beside(own, other, input);
        }
        let by = |clock: Clock| input.wrapping_add(clock.offset);
        let (timestamp, step) = match (own.newest, other.newest) {
            (None, None) => (input, None),
            (None, Some(other_newest)) => match apart(by(other), other_newest.timestamp) {
                true => (other_newest.timestamp, None),
                false => (by(other), None),
            },
            (Some(newest), other_newest) => {
                let reaches_other = |timestamp: u32| {
                    other_newest.is_some_and(|other| !apart(timestamp, other.timestamp))
                };
                let candidates = [Some(by(own)), other_newest.map(|_| by(other))];
                let fits = |timestamp: &u32| newest.leads_to(now, *timestamp, reaches_other);
                match candidates.into_iter().flatten().find(fits) {
                    Some(timestamp) => (timestamp, timestamp.checked_sub(newest.timestamp)),
                    None => {
                        self.jumps += 1;
                        (newest.timestamp.wrapping_add(newest.step.max(1)), Some(newest.step))
                    }
                }
            }
        };
        let step = step.filter(|step| *step <= MAX_STEP_MS).unwrap_or(0);
        let newest = Some(Newest { timestamp, step, arrived: now });
        let clock = Clock { offset: timestamp.wrapping_sub(input), newest };
        match is_audio {
            true => self.audio = clock,
            false => self.video = clock,
        }
        timestamp
    }

    /// Number of jumps so far, those of both clocks.
    pub fn jumps(&self) -> u64 {
        self.jumps
    }
}

impl Newest {
    /// `true` if a tag at `timestamp` continues this one without a jump.
    fn leads_to(&self, now: Instant, timestamp: u32, reaches_other: impl Fn(u32) -> bool) -> bool {
        let step = i64::from(timestamp.wrapping_sub(self.timestamp) as i32);
        let passed = now.saturating_duration_since(self.arrived).as_millis() as i64;
        let ahead = passed.saturating_add(MAX_APART_MS);
        // Pictures may be minutes apart while the audio between them arrives at once.
        (-MAX_BACK_MS..=ahead).contains(&step) || step > 0 && reaches_other(timestamp)
    }
}

/// The time of a tag that belongs beside those of `own`, or else of `other`.
fn beside(own: Clock, other: Clock, input: u32) -> u32 {
    let clock = if own.newest.is_some() { own } else { other };
    let Some(newest) = clock.newest else { return input };
    let timestamp = input.wrapping_add(clock.offset);
    if apart(timestamp, newest.timestamp) { newest.timestamp } else { timestamp }
}

fn apart(a: u32, b: u32) -> bool {
    i64::from(a.wrapping_sub(b) as i32).abs() > MAX_APART_MS
}

/// Audio and video that are further apart, in milliseconds, are on different clocks: sources
/// interleave them within a second or so.
const MAX_APART_MS: i64 = 3_000;
/// The largest step back, in milliseconds, that is jitter and not a jump.
const MAX_BACK_MS: i64 = 1_000;
/// A longer step, in milliseconds, says nothing about the next one.
const MAX_STEP_MS: u32 = 1_000;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// A source of 25 frames per second with a tag of audio behind each.
    struct Source {
        repair: TimestampRepair,
        now: Instant,
        /// The newest timestamps that came out.
        video: Vec<u32>,
        audio: Vec<u32>,
    }

    impl Source {
        fn new() -> Self {
            let now = Instant::now();
            Self { repair: TimestampRepair::default(), now, video: Vec::new(), audio: Vec::new() }
        }

        /// Sends `frames` frames from these times on.
        fn send(&mut self, frames: u32, video: u32, audio: u32) {
            for i in 0..frames {
                self.now += Duration::from_millis(40);
                for (kind, start) in [(TagKind::Video, video), (TagKind::Audio, audio)] {
                    let timestamp = self.push(kind, start.wrapping_add(i * 40));
                    match kind {
                        TagKind::Video => self.video.push(timestamp),
                        _ => self.audio.push(timestamp),
                    }
                }
            }
        }

        fn push(&mut self, kind: TagKind, timestamp: u32) -> u32 {
            self.push_body(kind, timestamp, &[0x27, 1])
        }

        fn push_body(&mut self, kind: TagKind, timestamp: u32, body: &[u8]) -> u32 {
            self.repair.repair(self.now, &Tag::new(kind, timestamp, body).unwrap())
        }

        fn assert_continuous(&self, video: u32, audio: u32) {
            for (times, start) in [(&self.video, video), (&self.audio, audio)] {
                let expected = (0..times.len()).map(|i| start.wrapping_add(i as u32 * 40));
                assert!(times.iter().copied().eq(expected), "{times:?}");
            }
        }
    }

    #[test]
    fn jumps_of_both_clocks_are_closed_and_keep_audio_and_video_together() {
        for jump in [3_600_000, 8_000, 0_u32.wrapping_sub(6_000), 0_u32.wrapping_sub(1 << 24)] {
            let mut source = Source::new();
            source.send(200, 20_000, 20_010);
            let next = 28_000_u32.wrapping_add(jump);
            source.send(200, next, next.wrapping_add(10));
            source.assert_continuous(20_000, 20_010);
            assert_eq!(source.repair.jumps(), 1, "{jump}");
        }
    }

    #[test]
    fn clocks_that_start_far_apart_are_put_together() {
        for (video, audio) in [(3_600_000, 0), (0, 3_600_000), (5_000, 0), (u32::MAX, 1 << 31)] {
            let mut source = Source::new();
            source.send(100, video, audio);
            source.assert_continuous(video, video);
            assert_eq!(source.repair.jumps(), 0);
        }
    }

    #[test]
    fn sound_timestamps_stay_as_they_are() {
        // Across the wrap, with audio ahead, and with a late start of the audio.
        let mut source = Source::new();
        source.send(100, u32::MAX - 2_000, u32::MAX - 200);
        source.assert_continuous(u32::MAX - 2_000, u32::MAX - 200);
        // A pause of the source, a late frame, small steps back.
        source.now += Duration::from_secs(60);
        for (timestamp, kind) in
            [(62_000, TagKind::Video), (61_900, TagKind::Audio), (61_950, TagKind::Video)]
        {
            assert_eq!(source.push(kind, timestamp), timestamp);
        }
        // A burst of audio with a picture every minute.
        let mut source = Source::new();
        for timestamp in (0..300_000).step_by(100) {
            assert_eq!(source.push(TagKind::Audio, timestamp), timestamp);
            if timestamp % 60_000 == 0 {
                assert_eq!(source.push(TagKind::Video, timestamp), timestamp);
            }
        }
    }

    #[test]
    fn headers_and_script_data_set_no_clock() {
        let header = [0x17, 0, 0, 0, 0, 1];
        let mut source = Source::new();
        assert_eq!(source.push_body(TagKind::Video, 0, &header), 0);
        assert_eq!(source.push_body(TagKind::Video, 0, &header[..5]), 0, "an empty one");
        assert_eq!(source.push(TagKind::Video, 900_000), 900_000);
        assert_eq!(source.push_body(TagKind::Video, 0, &header), 900_000);
        assert_eq!(source.push_body(TagKind::Script, 900_020, b"\x02"), 900_020);
        assert_eq!(source.push_body(TagKind::Script, 7, b"\x02"), 900_000);
        assert_eq!(source.push_body(TagKind::Audio, 0, &[0xaf, 0, 0x12, 0x10]), 900_000);
        assert_eq!(source.push(TagKind::Video, 900_040), 900_040);
    }
}
