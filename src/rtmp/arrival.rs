//! What an encoder sends, for one line in the log soon after it came.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use downpour_media::{
    StreamKey,
    amf0::{Decoder, Value},
    flv::{Tag, TagKind},
};

/// Codecs, size and rate of a new publication.
#[derive(Debug, Default)]
pub(super) struct Arrival {
    /// When the first audio or video arrived.
    since: Option<Instant>,
    bytes: u64,
    video: Option<String>,
    audio: Option<String>,
    metadata: Option<Tag>,
    /// `true` once the line is due.
    done: bool,
}

impl Arrival {
    /// Takes the next tag. Returns `true` once, when the line is due.
    pub(super) fn push(&mut self, now: Instant, tag: &Tag) -> bool {
        if self.done {
            return false;
        }
        match tag.kind() {
            TagKind::Script if tag.is_metadata() => self.metadata = Some(tag.clone()),
            TagKind::Script => {}
            TagKind::Video => self.video = self.video.take().or_else(|| video_codec(tag.body())),
            TagKind::Audio => self.audio = self.audio.take().or_else(|| audio_codec(tag.body())),
        }
        if tag.kind() == TagKind::Script {
            return false;
        }
        self.bytes += tag.body().len() as u64;
        let since = *self.since.get_or_insert(now);
        self.done = now.saturating_duration_since(since) >= MEASURED;
        self.done
    }

    /// Writes the line.
    pub(super) fn log(&self, now: Instant, peer: SocketAddr, stream: &StreamKey) {
        let metadata = self.metadata.as_ref().map(Metadata::of).unwrap_or_default();
        let seconds = self.since.map_or(0.0, |since| (now - since).as_secs_f64()).max(0.001);
        let kbits = (self.bytes as f64 * 8.0 / 1000.0 / seconds).round() as u64;
        tracing::info!(
            %stream,
            %peer,
            encoder = metadata.encoder,
            video = self.video,
            size = metadata.size,
            fps = metadata.fps,
            audio = self.audio,
            kbits_per_s = kbits,
            "RTMP publication runs"
        );
    }
}

/// What `onMetaData` says about the picture and the encoder.
#[derive(Debug, Default, PartialEq)]
struct Metadata {
    encoder: Option<String>,
    size: Option<String>,
    fps: Option<f64>,
}

impl Metadata {
    fn of(tag: &Tag) -> Self {
        let values = Decoder::new(tag.body()).filter_map(Result::ok);
        let Some(value) = values.into_iter().find(|value| value.properties().is_some()) else {
            return Self::default();
        };
        let number = |name| value.property(name).and_then(Value::as_number);
        let size = number("width").zip(number("height"));
        let encoder = value.property("encoder").and_then(Value::as_str);
        Self {
            encoder: encoder.map(|encoder| encoder.chars().take(SHOWN).collect()),
            size: size.map(|(width, height)| format!("{width}x{height}")),
            fps: number("framerate"),
        }
    }
}

/// Codec of a video tag (FLV specification, annex E.4.3.1; Enhanced RTMP, `videoFourCc`).
fn video_codec(body: &[u8]) -> Option<String> {
    let first = *body.first()?;
    if first & 0x80 != 0 {
        return four_cc(body.get(1..5)?);
    }
    Some(match first & 0x0f {
        2 => "h263".into(),
        4 => "vp6".into(),
        7 => "h264".into(),
        12 => "hevc".into(),
        number => format!("codec {number}"),
    })
}

/// Codec of an audio tag (FLV specification, annex E.4.2.1; Enhanced RTMP, `audioFourCc`).
fn audio_codec(body: &[u8]) -> Option<String> {
    Some(match body.first()? >> 4 {
        9 => return four_cc(body.get(1..5)?),
        2 | 14 => "mp3".into(),
        7 => "g711-a".into(),
        8 => "g711-mu".into(),
        10 => "aac".into(),
        11 => "speex".into(),
        number => format!("codec {number}"),
    })
}

/// `None` if it is not a word: tags of several tracks have other bytes there.
fn four_cc(bytes: &[u8]) -> Option<String> {
    let is_word = bytes.iter().all(u8::is_ascii_alphanumeric);
    is_word.then(|| String::from_utf8_lossy(bytes).to_ascii_lowercase())
}

/// Time over which the rate is measured.
const MEASURED: Duration = Duration::from_secs(3);
/// Characters of an encoder's name that are logged.
const SHOWN: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;

    fn tag(kind: TagKind, body: &[u8]) -> Tag {
        Tag::new(kind, 0, body).unwrap()
    }

    #[test]
    fn line_is_due_once_after_three_seconds_of_media() {
        let (mut arrival, start) = (Arrival::default(), Instant::now());
        assert!(!arrival.push(start, &tag(TagKind::Video, &[0x17, 0, 0, 0, 0])));
        assert!(!arrival.push(start + MEASURED / 2, &tag(TagKind::Audio, &[0xaf, 0, 0])));
        assert!(arrival.push(start + MEASURED, &tag(TagKind::Video, &[0x27, 1, 0, 0, 0])));
        assert!(!arrival.push(start + MEASURED * 2, &tag(TagKind::Video, &[0x27, 1, 0, 0, 0])));
        let codecs = (arrival.video.as_deref(), arrival.audio.as_deref());
        assert_eq!(codecs, (Some("h264"), Some("aac")));
        assert_eq!(arrival.bytes, 13);
    }

    #[test]
    fn codecs_of_enhanced_rtmp_are_their_four_characters() {
        assert_eq!(video_codec(b"\x90hvc1"), Some("hvc1".into()));
        assert_eq!(audio_codec(b"\x90Opus"), Some("opus".into()));
        assert_eq!(video_codec(b"\x96\x00\x01\x02\x03"), None);
        assert_eq!(video_codec(b""), None);
        assert_eq!(audio_codec(b"\x90"), None);
    }

    #[test]
    fn metadata_has_size_rate_and_encoder() {
        let mut body = BytesMut::new();
        Value::from("onMetaData").encode(&mut body).unwrap();
        let properties = Value::object([
            ("width", 1280.0.into()),
            ("height", 720.0.into()),
            ("framerate", 25.0.into()),
            ("encoder", "obs".into()),
        ]);
        properties.encode(&mut body).unwrap();
        let metadata = Metadata::of(&tag(TagKind::Script, &body));
        assert_eq!(metadata.size.as_deref(), Some("1280x720"));
        assert_eq!(metadata.fps, Some(25.0));
        assert_eq!(metadata.encoder.as_deref(), Some("obs"));
        assert_eq!(Metadata::of(&tag(TagKind::Script, &body[..20])), Metadata::default());
    }
}
