//! Patterns over stream keys.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::StreamKey;

/// A set of streams: `app/name` for one, `app/*` for an application, `*` for all.
///
/// ```
/// use downpour_media::StreamPattern;
/// let pattern: StreamPattern = "live/*".parse().unwrap();
/// assert!(pattern.matches(&"live/movie".parse().unwrap()));
/// assert!(!pattern.matches(&"vod/movie".parse().unwrap()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StreamPattern {
    /// All streams.
    All,
    /// All streams of an application.
    App(String),
    /// One stream.
    Stream(StreamKey),
}

impl StreamPattern {
    /// Returns `true` if the pattern covers `key`.
    pub fn matches(&self, key: &StreamKey) -> bool {
        match self {
            Self::All => true,
            Self::App(app) => key.app() == app,
            Self::Stream(stream) => key == stream,
        }
    }
}

impl FromStr for StreamPattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        if text == "*" {
            return Ok(Self::All);
        }
        // An application is valid if a key with it is.
        let app = text.strip_suffix("/*");
        let key = match app {
            Some(app) => StreamKey::new(app, "x"),
            None => text.parse(),
        };
        match (app, key) {
            (_, Err(_)) => Err(InvalidPattern),
            (None, Ok(key)) if key.as_str().contains('*') => Err(InvalidPattern),
            (None, Ok(key)) => Ok(Self::Stream(key)),
            (Some(app), Ok(_)) if app.contains(['*', '/']) => Err(InvalidPattern),
            (Some(_), Ok(key)) => Ok(Self::App(key.app().to_owned())),
        }
    }
}

impl fmt::Display for StreamPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::App(app) => write!(f, "{app}/*"),
            Self::Stream(key) => key.fmt(f),
        }
    }
}

impl Serialize for StreamPattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for StreamPattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The error for a text that is not a [`StreamPattern`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a stream pattern: write app/name, app/* or *")]
pub struct InvalidPattern;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_by_segment() {
        let key = |text: &str| text.parse::<StreamKey>().unwrap();
        let pattern = |text: &str| text.parse::<StreamPattern>();
        assert!(pattern("*").unwrap().matches(&key("live/a")));
        assert!(pattern("live/*").unwrap().matches(&key("live/a/b")));
        assert!(!pattern("live/*").unwrap().matches(&key("alive/a")));
        assert!(pattern("live/a").unwrap().matches(&key("live/a")));
        assert!(!pattern("live/a").unwrap().matches(&key("live/ab")));
    }

    #[test]
    fn malformed_patterns_are_refused() {
        for bad in ["", "/", "live", "**", "*/a", "li*e/*", "a/b/*", "live/..", "live/a*"] {
            assert_eq!(bad.parse::<StreamPattern>(), Err(InvalidPattern), "{bad:?}");
        }
    }

    #[test]
    fn patterns_print_as_they_parse() {
        for good in ["*", "live/*", "live/a/b"] {
            assert_eq!(good.parse::<StreamPattern>().unwrap().to_string(), good);
        }
    }
}
