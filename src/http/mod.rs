//! HTTP: viewers of live streams, and the node's API.

pub mod api;
pub mod client;
mod head;
pub mod listener;
pub mod viewer;

pub use listener::HttpServer;
pub use viewer::{HttpMetrics, ViewerSettings};
