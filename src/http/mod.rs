//! HTTP: viewers of live streams, and the node's API.

pub mod api;
mod audience;
pub mod client;
mod connection;
mod group;
mod head;
pub mod listener;
mod metrics;
mod routed;
pub mod viewer;

pub(crate) use listener::CONNECTIONS_BESIDE_VIEWERS;
pub use listener::HttpServer;
pub use metrics::HttpMetrics;
pub use viewer::ViewerSettings;
