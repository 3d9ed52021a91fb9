//! The sink that sends streams to other nodes: packets to edges, and repairs on request.

pub mod edges;
pub mod fanout;
pub mod outgoing;
pub mod parity;
pub mod repair_server;
pub mod routes;
pub mod subscribers;
