//! Stream names.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

/// A stream's name, `app/name`: the target of an encoder's publish and a viewer's play.
///
/// Safe as a path below a directory and as a metric label: both halves are non-empty, the key has
/// at most [`StreamKey::MAX_LEN`] bytes and no control characters, line separators, `\`, `?`, or
/// empty, `.` or `..` segments. No segment begins or ends with white space. Names may hold spaces and
/// `#`, which a URL has as `%20` and `%23`. `name` may contain `/`. Clones share the text.
///
/// ```
/// use downpour_media::StreamKey;
/// let key: StreamKey = "live/movie".parse().unwrap();
/// assert_eq!((key.app(), key.name()), ("live", "movie"));
/// assert!("live".parse::<StreamKey>().is_err());
/// assert_eq!("live/Camera #2".parse::<StreamKey>().unwrap().name(), "Camera #2");
/// assert!("live/../etc".parse::<StreamKey>().is_err());
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamKey(Arc<str>);

impl StreamKey {
    /// The longest key in bytes: bounds the memory and log lines that a peer can cause.
    pub const MAX_LEN: usize = 256;

    /// Joins an application and a stream name. Slashes at the ends of either are removed.
    ///
    /// # Errors
    /// If the result breaks one of the rules above.
    pub fn new(app: &str, name: &str) -> Result<Self, InvalidStreamKey> {
        let (app, name) = (app.trim_matches('/'), name.trim_matches('/'));
        if app.is_empty() || name.is_empty() {
            return Err(InvalidStreamKey("it needs an application and a name, as in live/movie"));
        }
        if app.len() + 1 + name.len() > Self::MAX_LEN {
            return Err(InvalidStreamKey("it is longer than 256 bytes"));
        }
        let key = format!("{app}/{name}");
        if key.chars().any(|c| c.is_control() || matches!(c, '\\' | '?' | '\u{2028}' | '\u{2029}'))
        {
            return Err(InvalidStreamKey(
                "it holds a control character, a line separator, \\ or ?",
            ));
        }
        if key.split('/').any(|part| part.trim() != part) {
            return Err(InvalidStreamKey("a part of it begins or ends with white space"));
        }
        if key.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
            return Err(InvalidStreamKey("it holds an empty, . or .. segment"));
        }
        Ok(Self(key.into()))
    }

    /// Returns the application: the part before the first slash.
    pub fn app(&self) -> &str {
        self.0.split_once('/').map_or("", |(app, _)| app)
    }

    /// Returns the name: the part after the first slash.
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }

    /// Returns the key as the path of a URL, percent-encoded (RFC 3986 §3.3), without a leading slash.
    pub fn to_url_path(&self) -> String {
        percent_encoding::utf8_percent_encode(&self.0, IN_PATH).to_string()
    }

    /// Returns the whole key, `app/name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for StreamKey {
    type Err = InvalidStreamKey;

    fn from_str(key: &str) -> Result<Self, InvalidStreamKey> {
        let (app, name) = key.trim_matches('/').split_once('/').unwrap_or((key, ""));
        Self::new(app, name)
    }
}

impl Borrow<str> for StreamKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for StreamKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl serde::Serialize for StreamKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> serde::Deserialize<'de> for StreamKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let key = std::borrow::Cow::<str>::deserialize(deserializer)?;
        key.parse().map_err(serde::de::Error::custom)
    }
}

/// Characters that the path of a URL encodes, beside those that are not ASCII. `%` is one: a name may
/// hold it.
const IN_PATH: &percent_encoding::AsciiSet =
    &percent_encoding::CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'<').add(b'>');

/// Why a text is not a [`StreamKey`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a stream key: {0}")]
pub struct InvalidStreamKey(&'static str);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_as_people_have_them_are_keys_and_paths_of_urls() {
        for (name, path) in [
            ("my cam", "live/my%20cam"),
            ("cam#1", "live/cam%231"),
            ("a%20b", "live/a%2520b"),
            ("a&b=1+2", "live/a&b=1+2"),
            ("é", "live/%C3%A9"),
            ("flv:x", "live/flv:x"),
        ] {
            let key = StreamKey::new("live", name).unwrap();
            assert_eq!((key.name(), key.to_url_path().as_str()), (name, path));
        }
    }

    #[test]
    fn names_that_break_paths_or_lines_are_refused() {
        for name in
            [" a", "a ", "a/ b", "a\nb", "a\tb", "a\u{2028}b", "a\\b", "a?b", "a//b", "a/.."]
        {
            assert!(StreamKey::new("live", name).is_err(), "{name:?}");
        }
    }
}
