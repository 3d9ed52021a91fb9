//! The media of the publishers and its timing.

use std::{io, time::Duration};

use bytes::BytesMut;
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::rtp::{Packetizer, Ssrc};
use downpour_rtmp::chunk::{AUDIO, ChunkWriter, MessageHead, VIDEO};

/// One group of pictures, played in a loop: 25 pictures and 43 AAC frames per second, 212 kbit/s of
/// tag bodies.
pub struct Media {
    pub tags: Vec<TimedTag>,
    headers: Vec<Tag>,
}

/// A tag and its time from the start of the group.
pub struct TimedTag {
    pub at: Duration,
    tag: Tag,
}

impl Media {
    pub fn new() -> io::Result<Self> {
        let tag = |kind, at: Duration, start: &[u8], length: usize| {
            let mut body = vec![0x5a; length];
            body[..start.len()].copy_from_slice(start);
            Tag::new(kind, at.as_millis() as u32, &body).map_err(io::Error::other)
        };
        let mut tags = Vec::new();
        for frame in 0..PICTURES {
            let at = GROUP * frame / PICTURES;
            // Adjacent pictures differ in length.
            let (first, length) = match frame {
                0 => (0x17, KEY_BYTES),
                frame => (0x27, INTER_BYTES - 300 + (frame as usize * 37 % 49) * 600 / 48),
            };
            tags.push(TimedTag { at, tag: tag(TagKind::Video, at, &[first, 1, 0, 0, 0], length)? });
        }
        for frame in 0..AUDIO_FRAMES {
            let at = GROUP * frame / AUDIO_FRAMES;
            tags.push(TimedTag { at, tag: tag(TagKind::Audio, at, &[0xaf, 1], AUDIO_BYTES)? });
        }
        tags.sort_by_key(|tag| tag.at);
        let start = Duration::ZERO;
        let headers = vec![
            tag(TagKind::Video, start, &[0x17, 0, 0, 0, 0, 1], 60)?,
            tag(TagKind::Audio, start, &[0xaf, 0, 0x12, 0x10], 4)?,
        ];
        Ok(Self { tags, headers })
    }

    /// The tags as RTMP chunks: the headers, the first group, and all later groups. Later groups have
    /// equal chunks, because their timestamps are differences.
    pub fn chunks(&self) -> io::Result<Chunks> {
        let mut writer = ChunkWriter::new();
        writer.set_chunk_size(CHUNK_SIZE, &mut BytesMut::new()).map_err(io::Error::other)?;
        let mut chunks = |tag: &Tag, offset: Duration| {
            let mut out = BytesMut::new();
            let (csid, kind) = match tag.kind() {
                TagKind::Audio => (4, AUDIO),
                _ => (6, VIDEO),
            };
            let timestamp = tag.timestamp() + offset.as_millis() as u32;
            let head = MessageHead { kind, stream_id: 1, timestamp };
            writer.write(csid, head, tag.body(), &mut out).map_err(io::Error::other)?;
            Ok::<_, io::Error>(out.to_vec())
        };
        let headers: io::Result<Vec<_>> =
            self.headers.iter().map(|tag| chunks(tag, Duration::ZERO)).collect();
        let mut group = |number: u32| -> io::Result<Vec<_>> {
            self.tags.iter().map(|tag| chunks(&tag.tag, GROUP * number)).collect()
        };
        Ok(Chunks { headers: headers?.concat(), first: group(0)?, later: group(1)? })
    }

    /// The RTP packets of each tag.
    pub fn packets(&self) -> Vec<Vec<Vec<u8>>> {
        let mut packetizer = Packetizer::new(Ssrc(1), PAYLOAD);
        let packets = |tag: &TimedTag| {
            let burst = packetizer.packetize(&tag.tag);
            (0..burst.count()).filter_map(|i| burst.packet(i)).map(|p| p.to_vec()).collect()
        };
        self.tags.iter().map(packets).collect()
    }

    /// Tags per second.
    pub fn tag_rate(&self) -> f64 {
        self.tags.len() as f64 / GROUP.as_secs_f64()
    }

    /// Bits of tag bodies per second.
    pub fn bit_rate(&self) -> f64 {
        let bytes: usize = self.tags.iter().map(|tag| tag.tag.body().len()).sum();
        bytes as f64 * 8.0 / GROUP.as_secs_f64()
    }

    /// Datagrams per second.
    pub fn datagram_rate(&self) -> f64 {
        self.packets().iter().map(Vec::len).sum::<usize>() as f64 / GROUP.as_secs_f64()
    }
}

/// See [`Media::chunks`].
pub struct Chunks {
    pub headers: Vec<u8>,
    pub first: Vec<Vec<u8>>,
    pub later: Vec<Vec<u8>>,
}

/// The endless schedule of the tags of many streams with different phases.
pub struct Timeline {
    events: Vec<Event>,
    next: usize,
    cycle: u32,
}

/// A tag of a stream in the schedule.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// Time within the cycle.
    at: Duration,
    pub stream: usize,
    pub tag: usize,
    /// `true` if the tag belongs to a group that started in the previous cycle.
    late: bool,
}

/// The tag that [`Timeline::next`] returns.
pub struct Due {
    /// Time from the start.
    pub at: Duration,
    pub stream: usize,
    pub tag: usize,
    /// Number of earlier groups of the stream.
    pub group: u32,
}

impl Timeline {
    pub fn new(media: &Media, streams: usize) -> Self {
        let mut events = Vec::with_capacity(media.tags.len() * streams);
        for stream in 0..streams {
            // Multiples of the golden ratio spread any number of streams evenly.
            let phase = GROUP.mul_f64((stream as f64 * 0.618_033_988_749_895).fract());
            for (tag, timed) in media.tags.iter().enumerate() {
                let at = phase + timed.at;
                let late = at >= GROUP;
                events.push(Event { at: if late { at - GROUP } else { at }, stream, tag, late });
            }
        }
        events.sort_by_key(|event| event.at);
        Self { events, next: 0, cycle: 0 }
    }

    /// Returns the next tag.
    pub fn next(&mut self) -> Due {
        loop {
            let Some(event) = self.events.get(self.next) else {
                (self.next, self.cycle) = (0, self.cycle + 1);
                continue;
            };
            self.next += 1;
            let Some(group) = self.cycle.checked_sub(u32::from(event.late)) else { continue };
            let at = GROUP * self.cycle + event.at;
            return Due { at, stream: event.stream, tag: event.tag, group };
        }
    }
}

/// One group of pictures.
const GROUP: Duration = Duration::from_secs(2);
const PICTURES: u32 = 50;
const AUDIO_FRAMES: u32 = 86;
const KEY_BYTES: usize = 7_000;
/// Average.
const INTER_BYTES: usize = 623;
const AUDIO_BYTES: usize = 180;
/// The chunk size of [`downpour_rtmp::session::ClientSession`].
const CHUNK_SIZE: u32 = 4096;
/// Default of `rtp_payload_max`.
const PAYLOAD: usize = 1120;
