//! Outputs of a node: sinks, and their taps on single streams.

use std::{sync::Arc, time::Instant};

use downpour_media::flv::Tag;

use crate::Stream;

/// An output of the node. [`Hub::add_sink`](crate::Hub::add_sink) registers it.
///
/// A sink that reads at its own pace (recorder, HLS, push) spawns a [`Reader`](crate::Reader) and
/// returns `None`. A sink that must see each tag on the publisher's thread returns a [`Tap`].
///
/// Sinks and taps are called while the publication is locked. They may use the hub, but must not
/// revoke the publication that calls them: a task must do that.
pub trait Sink: Send + Sync {
    /// Called once per stream, before its first tag, on the publisher's thread: must not block.
    ///
    /// [`Stream::headers`] has the headers that are known so far.
    fn stream_up(&self, stream: &Arc<Stream>) -> Option<Box<dyn Tap>>;
}

/// A sink's callback for the tags of one stream. It is dropped when the stream ends.
pub trait Tap: Send {
    /// Handles the next tag, before it enters the stream's log, on the publisher's thread: must not
    /// block. `now` is the time of arrival.
    fn push(&mut self, now: Instant, tag: &Tag);
}
