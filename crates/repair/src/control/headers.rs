//! Stream headers as hexadecimal FLV tags without `PreviousTagSize`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use downpour_media::flv::{Headers, Tag, TagKind};
use downpour_sys::buffer::BufferMut;

/// `more` has the headers of further tracks and purposes. Nodes that do not know it ignore it.
#[derive(Serialize, Deserialize)]
struct HexHeaders {
    #[serde(default)]
    video: Option<String>,
    #[serde(default)]
    audio: Option<String>,
    #[serde(default)]
    metadata: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    more: Vec<String>,
}

pub(super) fn serialize<S: Serializer>(
    headers: &Headers,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut left = MAX_HEADERS_LEN;
    let mut to_hex = |tag: &Tag| {
        let unit = tag.unit();
        let fits = unit.len() <= MAX_HEADER_LEN.min(left);
        left -= if fits { unit.len() } else { 0 };
        fits.then(|| hex::encode(unit))
    };
    let (video, audio, metadata) = (headers.video(), headers.audio(), headers.metadata());
    let main = [video, audio, metadata];
    let [hex_video, hex_audio, hex_metadata] = main.map(|tag| tag.and_then(&mut to_hex));
    let more = headers.further().filter_map(to_hex).collect();
    HexHeaders { video: hex_video, audio: hex_audio, metadata: hex_metadata, more }
        .serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Headers, D::Error> {
    let HexHeaders { video, audio, metadata, more } = HexHeaders::deserialize(deserializer)?;
    let tag = |text: String, kind: Option<TagKind>| {
        hex::decode(text)
            .ok()
            .and_then(|unit| Tag::from_unit(BufferMut::from(&unit[..])).ok())
            .filter(|tag| kind.is_none_or(|kind| tag.kind() == kind))
            .ok_or_else(|| serde::de::Error::custom("not an FLV tag of the right type in hex"))
    };
    let main = [(metadata, TagKind::Script), (video, TagKind::Video), (audio, TagKind::Audio)];
    let main = main.into_iter().filter_map(|(text, kind)| Some(tag(text?, Some(kind))));
    // First the further ones, in order: without a main track, one of them is in its place, too.
    more.into_iter().take(Headers::MAX).map(|text| tag(text, None)).chain(main).collect()
}

/// The longest header tag that is sent, in bytes; a longer one is left out. No real decoder
/// configuration is longer, and three of them in hexadecimal fit in a message.
pub const MAX_HEADER_LEN: usize = 128 * 1024;
/// The most bytes of all headers, so that they fit in a message in hexadecimal.
const MAX_HEADERS_LEN: usize = 480 * 1024;
