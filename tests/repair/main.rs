//! Loss recovery between nodes: repair clients and servers over loopback.

#[path = "../common/mod.rs"]
mod common;

mod go_cloud;
mod group;
mod lossy;
mod reports;
mod resume;
mod storm;
mod v0;
mod v0_golden;
mod v1;
