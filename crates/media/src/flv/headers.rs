//! The headers that a decoder needs before the first frame.

use super::Tag;

/// The newest metadata and codec headers of a stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Headers {
    /// The `onMetaData` script tag, without a leading `@setDataFrame`.
    pub metadata: Option<Tag>,
    /// The newest video sequence header.
    pub video: Option<Tag>,
    /// The newest audio sequence header.
    pub audio: Option<Tag>,
}
