//! One stream of 212 kbit/s: 25 frames per second and AAC, 68 tags per second, framing included.

use std::time::Duration;

use downpour_media::flv::{Tag, TagKind};

/// A tag and its time from the start of the stream.
pub struct Due {
    pub at: Duration,
    pub tag: Tag,
}

/// The endless sequence of the stream's tags in order of time.
pub struct Media {
    frame: u32,
    sound: u32,
}

impl Media {
    pub fn new() -> Self {
        Self { frame: 0, sound: 0 }
    }

    pub fn video_header() -> Tag {
        tag(TagKind::Video, 0, [0x17, 0], 50)
    }

    pub fn audio_header() -> Tag {
        tag(TagKind::Audio, 0, [0xaf, 0], 4)
    }
}

impl Iterator for Media {
    type Item = Due;

    fn next(&mut self) -> Option<Due> {
        let (frame, sound) = (FRAME * self.frame, SOUND * self.sound);
        Some(if sound < frame {
            self.sound += 1;
            let tag = tag(TagKind::Audio, sound.as_millis() as u32, [0xaf, 1], SOUND_BYTES);
            Due { at: sound, tag }
        } else {
            let (start, length) = match self.frame % GOP {
                0 => ([0x17, 1], 6 * INTER_BYTES),
                _ => ([0x27, 1], INTER_BYTES),
            };
            self.frame += 1;
            Due { at: frame, tag: tag(TagKind::Video, frame.as_millis() as u32, start, length) }
        })
    }
}

fn tag(kind: TagKind, at: u32, start: [u8; 2], length: usize) -> Tag {
    let mut body = vec![0x5a; length];
    body[..2].copy_from_slice(&start);
    Tag::new(kind, at, &body).expect("a short body")
}

pub const FRAME: Duration = Duration::from_millis(40);
pub const FRAMES_PER_SECOND: f64 = 25.0;
/// Every 2 s a key frame of six times the others' size; 15 bytes of framing per tag.
pub const BYTES_PER_SECOND: f64 = FRAMES_PER_SECOND
    * (INTER_BYTES as f64 * (GOP as f64 + 5.0) / GOP as f64 + 15.0)
    + (SOUND_BYTES as f64 + 15.0) / 0.023_22;
const GOP: u32 = 50;
const INTER_BYTES: usize = 708;
/// 1024 samples at 44.1 kHz.
const SOUND: Duration = Duration::from_micros(23_220);
const SOUND_BYTES: usize = 139;
