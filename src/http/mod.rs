//! HTTP: viewers of live streams, and the node's API.

pub mod api;
pub mod client;
mod connection;
mod flv;
mod head;
pub mod listener;
mod metrics;
pub mod page;
pub mod readiness;
mod routed;

pub use flv::ViewerSettings;
pub(crate) use listener::CONNECTIONS_BESIDE_VIEWERS;
pub use listener::HttpServer;
pub use metrics::HttpMetrics;
