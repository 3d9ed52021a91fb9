//! The headers that a decoder needs before the first frame, and which tags are such headers.

use super::{
    Tag, TagKind,
    enhanced::{self, ExHeader},
    tag::{FRAME_TYPE_COMMAND, SOUND_FORMAT_AAC, SOUND_FORMAT_EX_HEADER, is_avc_like},
};

/// What a header describes: a newer header replaces an older one only if it has the same slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HeaderSlot {
    kind: TagKind,
    class: Class,
    tracks: TrackIds,
}

/// What a header says about its tracks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// `onMetaData`.
    Metadata,
    /// A decoder configuration.
    Sequence,
    /// The same, as an MPEG-2 TS descriptor.
    Mpeg2TsSequence,
    /// Colour information of video, channel configuration of audio.
    Extra,
}

/// The tracks that a header is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TrackIds {
    /// The main track: the tag is no multitrack packet.
    Main,
    /// The ids of a multitrack packet, one bit each.
    Ids([u128; 2]),
}

impl HeaderSlot {
    /// The slot of a tag; `None` if the tag is no header. Commands, ends of sequences and headers
    /// without content are none.
    pub(super) fn of(tag: &Tag) -> Option<Self> {
        let (kind, body) = (tag.kind(), tag.body());
        let first = *body.first()?;
        let (class, tracks) = match kind {
            TagKind::Script => {
                // An AMF0 string: marker, length, bytes.
                body.starts_with(b"\x02\x00\x0aonMetaData").then_some(())?;
                (Class::Metadata, TrackIds::Main)
            }
            TagKind::Video if first & 0x80 != 0 => Self::of_extended(kind, body)?,
            TagKind::Audio if first >> 4 == SOUND_FORMAT_EX_HEADER => {
                Self::of_extended(kind, body)?
            }
            TagKind::Video | TagKind::Audio => {
                legacy_config(kind, body).filter(|config| !config.is_empty())?;
                (Class::Sequence, TrackIds::Main)
            }
        };
        Some(Self { kind, class, tracks })
    }

    fn of_extended(kind: TagKind, body: &[u8]) -> Option<(Class, TrackIds)> {
        let header = ExHeader::parse(kind, body)?;
        let is_command = kind == TagKind::Video && body[0] >> 4 & 0x7 == FRAME_TYPE_COMMAND;
        let class = match header.packet_type {
            enhanced::METADATA => Class::Extra,
            _ if is_command => return None,
            enhanced::SEQUENCE_START => Class::Sequence,
            enhanced::MPEG2TS_SEQUENCE_START if kind == TagKind::Video => Class::Mpeg2TsSequence,
            _ => return None,
        };
        let mut tracks = None;
        for track in header.tracks() {
            if track.body.is_empty() {
                return None;
            }
            match (track.id, tracks.get_or_insert([0; 2])) {
                (None, _) => return Some((class, TrackIds::Main)),
                (Some(id), ids) => ids[usize::from(id >> 7)] |= 1 << (id & 0x7f),
            }
        }
        Some((class, TrackIds::Ids(tracks?)))
    }

    pub(super) fn is_sequence(&self) -> bool {
        matches!(self.class, Class::Sequence | Class::Mpeg2TsSequence)
    }

    /// `true` unless the header comes in a multitrack packet.
    pub(super) fn is_main(&self) -> bool {
        self.tracks == TrackIds::Main
    }

    /// `true` if a header in this slot makes one in `other` obsolete.
    fn covers(&self, other: &Self) -> bool {
        let tracks = match (self.tracks, other.tracks) {
            (TrackIds::Main, TrackIds::Main) => true,
            (TrackIds::Ids(own), TrackIds::Ids(other)) => {
                own.iter().zip(other).all(|(own, other)| other & !own == 0)
            }
            _ => false,
        };
        tracks && (self.kind, self.class) == (other.kind, other.class)
    }

    /// The order in which a decoder gets headers: metadata, main tracks, everything else.
    fn rank(&self) -> u8 {
        match (self.kind, self.class, self.tracks) {
            (TagKind::Script, ..) => 0,
            (TagKind::Video, Class::Sequence, TrackIds::Main) => 1,
            (TagKind::Audio, Class::Sequence, TrackIds::Main) => 2,
            _ => 3,
        }
    }
}

/// The decoder configuration in a tag without an extended header.
fn legacy_config(kind: TagKind, body: &[u8]) -> Option<&[u8]> {
    let first = *body.first()?;
    let (is_config, header_len) = match kind {
        // Frame type and codec, packet type, composition time.
        TagKind::Video => (is_avc_like(first) && first >> 4 != FRAME_TYPE_COMMAND, 5),
        TagKind::Audio => (first >> 4 == SOUND_FORMAT_AAC, 2),
        TagKind::Script => return None,
    };
    (is_config && body.get(1) == Some(&SEQUENCE_HEADER)).then(|| body.get(header_len..))?
}

/// `true` unless the header is visibly damaged.
fn is_sound(tag: &Tag, slot: &HeaderSlot) -> bool {
    if slot.class != Class::Sequence {
        return true;
    }
    let body = tag.body();
    match (slot.kind, legacy_config(slot.kind, body)) {
        (TagKind::Audio, Some(config)) => enhanced::is_sound_aac(config),
        (_, Some(config)) if body[0] & 0x0f == AVC => enhanced::is_sound_avc(config),
        (_, Some(config)) => enhanced::is_sound_hevc(config),
        (kind, None) => ExHeader::parse(kind, body)
            .is_some_and(|header| header.tracks().all(|track| track.is_sound_config())),
    }
}

/// The newest metadata and codec headers of a stream, one per track and purpose.
///
/// A damaged header does not replace a sound one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers {
    /// Sorted by [`HeaderSlot::rank`], then by age, the newest last.
    held: Vec<Held>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    slot: HeaderSlot,
    is_sound: bool,
    tag: Tag,
}

impl Headers {
    /// The most headers that are kept, in a stream of many tracks.
    pub const MAX: usize = 64;

    /// Takes a header. Returns `false` if nothing changes: the tag is known, damaged or no header.
    pub fn learn(&mut self, tag: &Tag) -> bool {
        let Some(slot) = HeaderSlot::of(tag) else { return false };
        // Many encoders repeat their headers in front of each key frame.
        let known = self.held.iter().find(|held| held.slot == slot);
        if known.is_some_and(|known| known.tag.body() == tag.body()) {
            return false;
        }
        let is_sound = is_sound(tag, &slot);
        if known.is_some_and(|known| known.is_sound && !is_sound) {
            return false;
        }
        self.held.retain(|held| !slot.covers(&held.slot) || held.is_sound && !is_sound);
        let index = self.held.partition_point(|held| held.slot.rank() <= slot.rank());
        // Copied: a header that lives long must not hold the buffer that it shares.
        self.held.insert(index, Held { slot, is_sound, tag: tag.detached() });
        if self.held.len() > Self::MAX {
            let main = self.held.partition_point(|held| held.slot.rank() < LAST_RANK);
            self.held.remove(main.min(Self::MAX - 1));
        }
        true
    }

    /// The headers in the order in which a decoder needs them.
    pub fn iter(&self) -> impl Iterator<Item = &Tag> {
        self.held.iter().map(|held| &held.tag)
    }

    /// `onMetaData`, without a leading `@setDataFrame`.
    pub fn metadata(&self) -> Option<&Tag> {
        self.iter().find(|tag| tag.kind() == TagKind::Script)
    }

    /// The video sequence header: that of the main track, if there is one.
    pub fn video(&self) -> Option<&Tag> {
        self.sequence(TagKind::Video)
    }

    /// The audio sequence header: that of the main track, if there is one.
    pub fn audio(&self) -> Option<&Tag> {
        self.sequence(TagKind::Audio)
    }

    fn sequence(&self, kind: TagKind) -> Option<&Tag> {
        let of_kind = |held: &&Held| held.slot.kind == kind && held.slot.is_sequence();
        self.held.iter().find(of_kind).map(|held| &held.tag)
    }

    /// The headers that are neither metadata nor the main tracks' sequence headers.
    pub fn further(&self) -> impl Iterator<Item = &Tag> {
        self.held.iter().filter(|held| held.slot.rank() == LAST_RANK).map(|held| &held.tag)
    }

    /// The header that `tag` would replace.
    pub fn like(&self, tag: &Tag) -> Option<&Tag> {
        let slot = HeaderSlot::of(tag)?;
        self.held.iter().find(|held| held.slot == slot).map(|held| &held.tag)
    }

    /// `true` if there are none.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The same headers with another timestamp, in milliseconds.
    pub fn at(&self, timestamp: u32) -> Self {
        let timed = |held: &Held| Held { tag: held.tag.with_timestamp(timestamp), ..held.clone() };
        Self { held: self.held.iter().map(timed).collect() }
    }
}

/// Takes the tags that are headers, in order.
impl FromIterator<Tag> for Headers {
    fn from_iter<I: IntoIterator<Item = Tag>>(tags: I) -> Self {
        let mut headers = Self::default();
        tags.into_iter().for_each(|tag| {
            headers.learn(&tag);
        });
        headers
    }
}

/// [`HeaderSlot::rank`] of all but the metadata and the main tracks.
const LAST_RANK: u8 = 3;
/// `AVCPacketType` and `AACPacketType` of a decoder configuration.
const SEQUENCE_HEADER: u8 = 0;
const AVC: u8 = 7;

#[cfg(test)]
mod tests {
    use super::*;

    const AVC_CONFIG: &[u8] =
        &[1, 0x64, 0, 0x1f, 0xff, 0xe1, 0, 4, 0x67, 0x64, 0, 0x1f, 1, 0, 2, 0x68, 0xee];
    const AAC_CONFIG: &[u8] = &[0x12, 0x10];

    fn video(start: &[u8], config: &[u8]) -> Tag {
        Tag::new(TagKind::Video, 0, &[start, config].concat()).unwrap()
    }

    fn audio(start: &[u8], config: &[u8]) -> Tag {
        Tag::new(TagKind::Audio, 0, &[start, config].concat()).unwrap()
    }

    fn avc() -> Tag {
        video(&[0x17, 0, 0, 0, 0], AVC_CONFIG)
    }

    fn aac() -> Tag {
        audio(&[0xaf, 0], AAC_CONFIG)
    }

    fn main_headers() -> Headers {
        [avc(), aac()].into_iter().collect()
    }

    #[test]
    fn tags_that_are_no_sound_header_replace_none() {
        let longer = [AVC_CONFIG, &[0]].concat();
        for tag in [
            // Empty and cut.
            video(&[0x17, 0, 0, 0, 0], &[]),
            video(&[0x17, 0], &[]),
            audio(&[0xaf, 0], &[]),
            video(&[0x90], b"avc1"),
            audio(&[0x95, 0x00], b"mp4a\x01"),
            video(&[0x17, 0, 0, 0, 0], &AVC_CONFIG[..9]),
            video(&[0x17, 0, 0, 0, 0], &[0; 40]),
            audio(&[0xaf, 0], &[0x12]),
            audio(&[0x90], b"mp4a\x12"),
            video(&[0x90], b"hvc1\x01"),
            // Commands.
            video(&[0x57, 0], &[]),
            video(&[0x57, 0, 0, 0, 0], &longer),
            video(&[0xd0], &[b"avc1", &longer[..]].concat()),
            // Ends, media, another codec's frame.
            video(&[0x17, 2, 0, 0, 0], &longer),
            video(&[0x17, 1, 0, 0, 0], &longer),
            audio(&[0xaf, 1], AAC_CONFIG),
            audio(&[0x2f, 0], AAC_CONFIG),
            video(&[0x12, 0], AVC_CONFIG),
        ] {
            let mut headers = main_headers();
            assert!(!headers.learn(&tag), "{:x?}", tag.body());
            assert_eq!(headers, main_headers());
        }
        // Without a sound one, a damaged one may still help.
        let mut headers = Headers::default();
        let damaged = video(&[0x17, 0, 0, 0, 0], &[1, 0x64]);
        assert!(headers.learn(&damaged) && headers.learn(&avc()));
        assert_eq!(headers.video(), Some(&avc()));
    }

    #[test]
    fn other_tracks_and_purposes_stand_beside_the_main_track() {
        let many = |first: u8, second: u8| {
            let of_track = |id: u8| [&[id, 0, 0, 2][..], AAC_CONFIG].concat();
            audio(&[0x95, 0x10], &[b"mp4a", &of_track(first)[..], &of_track(second)].concat())
        };
        let one = |id: u8| audio(&[0x95, 0x00], &[b"mp4a", &[id][..], AAC_CONFIG].concat());
        let codecs = audio(&[0x95, 0x20], b"mp4a\x04\0\0\x02\x12\x10Opus\x05\0\0\x01\x01");
        let color = video(&[0x94], b"avc1\x02\0\x09colorInfo");
        let channels = audio(&[0x94], b"mp4a\x01\x06");
        let second_video = video(&[0x96, 0x00], &[b"avc1\x01", AVC_CONFIG].concat());
        let modified = video(&[0x97, 2, 0, 0, 0x10, 0x00], &[b"hvc1", &[1; 30][..]].concat());
        let mut headers = main_headers();
        for tag in [&one(1), &many(2, 3), &codecs, &color, &channels, &second_video] {
            assert!(tag.is_header() && headers.learn(tag) && !headers.learn(tag));
        }
        let expected =
            [avc(), aac(), one(1), many(2, 3), codecs.clone(), color, channels, second_video];
        assert_eq!(headers.iter().cloned().collect::<Vec<_>>(), expected);
        assert_eq!(headers.like(&many(2, 3).with_timestamp(9)), Some(&many(2, 3)));
        // A packet for these tracks takes the place of what it covers, and of nothing else.
        assert!(headers.learn(&many(1, 2)));
        let audio: Vec<_> = headers.iter().filter(|tag| tag.kind() == TagKind::Audio).collect();
        assert_eq!(audio[1], &many(2, 3));
        assert!(audio.contains(&&many(1, 2)) && !audio.contains(&&one(1)));
        // A timestamp offset in front changes nothing. The main track may change its codec.
        assert!(modified.is_sequence_header() && !modified.is_key_frame());
        let mut hevc = main_headers();
        hevc.held[0].is_sound = false;
        assert!(hevc.learn(&modified));
        assert_eq!((hevc.video(), hevc.held.len()), (Some(&modified), 2));
    }

    #[test]
    fn headers_are_bounded_and_the_main_ones_stay() {
        let mut headers = main_headers();
        for id in 0..=255 {
            headers.learn(&audio(&[0x95, 0x00], &[b"mp4a", &[id][..], AAC_CONFIG].concat()));
        }
        assert_eq!(headers.held.len(), Headers::MAX);
        assert_eq!(headers.iter().next(), Some(&avc()));
        assert_eq!(headers.audio(), Some(&aac()));
        assert!(headers.iter().last().unwrap().body().contains(&255));
    }

    #[test]
    fn headers_come_in_the_order_of_decoding_at_one_time() {
        let metadata = Tag::new(TagKind::Script, 7, b"\x02\x00\x0aonMetaData\x05").unwrap();
        let headers: Headers = [aac(), avc(), metadata.clone()].into_iter().collect();
        assert_eq!(headers.metadata(), Some(&metadata));
        let at = |tag: Tag| tag.with_timestamp(80);
        let expected = [at(metadata), at(avc()), at(aac())];
        assert_eq!(headers.at(80).iter().cloned().collect::<Vec<_>>(), expected);
    }
}
