//! The sink that sends streams to edges: RTP by the fan-out, lost packets by the repair server.

pub mod edges;
pub mod fanout;
pub mod outgoing;
pub mod parity;
pub mod repair_server;
pub mod routes;
pub mod subscribers;
