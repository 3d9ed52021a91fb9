//! Loss recovery between nodes: clients and servers of repair over loopback.

#[path = "../common/mod.rs"]
mod common;

mod group;
mod lossy;
mod reports;
mod resume;
mod storm;
mod v0;
mod v1;
