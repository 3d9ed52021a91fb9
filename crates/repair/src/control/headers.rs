//! Stream headers as hexadecimal FLV tags without `PreviousTagSize`.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use downpour_media::flv::{Headers, Tag, TagKind};
use downpour_sys::buffer::BufferMut;

#[derive(Serialize, Deserialize)]
struct HexHeaders {
    #[serde(default)]
    video: Option<String>,
    #[serde(default)]
    audio: Option<String>,
    #[serde(default)]
    metadata: Option<String>,
}

pub(super) fn serialize<S: Serializer>(
    headers: &Headers,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let to_hex = |tag: &Option<Tag>| {
        let unit = tag.as_ref().map(Tag::unit);
        unit.filter(|unit| unit.len() <= MAX_HEADER_LEN).map(hex::encode)
    };
    HexHeaders {
        video: to_hex(&headers.video),
        audio: to_hex(&headers.audio),
        metadata: to_hex(&headers.metadata),
    }
    .serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Headers, D::Error> {
    let headers = HexHeaders::deserialize(deserializer)?;
    let tag = |text: Option<String>, kind: TagKind| match text {
        None => Ok(None),
        Some(text) => hex::decode(text)
            .ok()
            .and_then(|unit| Tag::from_unit(BufferMut::from(&unit[..])).ok())
            .filter(|tag| tag.kind() == kind)
            .map(Some)
            .ok_or_else(|| serde::de::Error::custom(format!("not a {kind:?} tag in hex"))),
    };
    Ok(Headers {
        video: tag(headers.video, TagKind::Video)?,
        audio: tag(headers.audio, TagKind::Audio)?,
        metadata: tag(headers.metadata, TagKind::Script)?,
    })
}

/// The longest header tag that is sent, in bytes; a longer one is left out. No real decoder
/// configuration is longer, and three of them in hexadecimal fit in a message.
pub const MAX_HEADER_LEN: usize = 128 * 1024;
