//! What a decoder needs before the first frame.

use super::Tag;

/// A stream's metadata and codec headers, the newest of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers {
    /// `onMetaData`, without a leading `@setDataFrame`.
    pub metadata: Option<Tag>,
    /// The newest video sequence header.
    pub video: Option<Tag>,
    /// The newest audio sequence header.
    pub audio: Option<Tag>,
}
