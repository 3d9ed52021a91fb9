//! Stream names.

use std::{borrow::Borrow, fmt, str::FromStr, sync::Arc};

/// A stream's name, `app/name`: the target of an encoder's publish and a viewer's play.
///
/// Safe as a path below a directory and as a metric label: both halves are non-empty, the key has
/// at most [`StreamKey::MAX_LEN`] bytes and no control characters, white space, `\`, `?`, `#`, or
/// empty, `.` or `..` segments. `name` may contain `/`. Clones share the text.
///
/// ```
/// use downpour_media::StreamKey;
/// let key: StreamKey = "live/movie".parse().unwrap();
/// assert_eq!((key.app(), key.name()), ("live", "movie"));
/// assert!("live".parse::<StreamKey>().is_err());
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
        if key.chars().any(|c| c.is_control() || c.is_whitespace() || matches!(c, '\\' | '?' | '#'))
        {
            return Err(InvalidStreamKey("it holds a space, a control character, \\, ? or #"));
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

/// Why a text is not a [`StreamKey`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a stream key: {0}")]
pub struct InvalidStreamKey(&'static str);
