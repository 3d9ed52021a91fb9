//! A script tag as a hexadecimal FLV tag without `PreviousTagSize`.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

use downpour_media::flv::{Tag, TagKind};
use downpour_sys::buffer::BufferMut;

pub(super) fn serialize<S: Serializer>(tag: &Tag, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex::encode(tag.unit()))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Tag, D::Error> {
    hex::decode(String::deserialize(deserializer)?)
        .ok()
        .filter(|unit| unit.len() <= MAX_DATA_LEN)
        .and_then(|unit| Tag::from_unit(BufferMut::from(&unit[..])).ok())
        .filter(|tag| tag.kind() == TagKind::Script)
        .ok_or_else(|| D::Error::custom("not a script tag in hex"))
}

/// The longest script tag that is sent to edges, in bytes, its header included: 64 KiB.
pub const MAX_DATA_LEN: usize = 64 * 1024;
