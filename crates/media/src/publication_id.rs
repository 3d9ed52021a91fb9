//! The identity of a publication, which distinguishes it from the next one of its stream.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The identity of one publication, the same at every node that it passes: 64 random bits, written as
/// 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicationId(pub u64);

impl fmt::Display for PublicationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for PublicationId {
    type Err = InvalidPublicationId;

    fn from_str(text: &str) -> Result<Self, InvalidPublicationId> {
        let hex = text.len() == 16 && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        let id = hex.then(|| u64::from_str_radix(text, 16).ok()).flatten();
        id.map(Self).ok_or(InvalidPublicationId)
    }
}

impl Serialize for PublicationId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicationId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A text that is not a [`PublicationId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a publication id: it has 16 hexadecimal digits")]
pub struct InvalidPublicationId;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_and_nothing_else_is_one() {
        for id in [0, 1, 0xfedc_ba98_7654_3210, u64::MAX].map(PublicationId) {
            assert_eq!(id.to_string().parse(), Ok(id));
        }
        for bad in ["", "0", "+123456789abcdef", "0123456789abcdefg", "0123456789abcde"] {
            assert_eq!(bad.parse::<PublicationId>(), Err(InvalidPublicationId), "{bad}");
        }
    }
}
