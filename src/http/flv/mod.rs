//! HTTP-FLV: viewers of live streams.

mod group;
pub(super) mod viewer;
mod viewers;

pub use viewer::ViewerSettings;
pub(super) use viewers::Viewers;
