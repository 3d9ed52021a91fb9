//! End-to-end tests: clouds and edges as processes, encoders, viewers and an emulated network.

#[path = "../common/mod.rs"]
mod common;

mod cloud_viewers;
mod comebacks;
mod demo;
mod discovery;
mod dynamic_edges;
mod hostile_publishers;
mod lossy_network;
mod many_viewers;
mod multicast;
mod operation;
mod pacing;
mod parents;
mod parity;
mod push_to_viewer;
mod restarts;
mod several_addresses;
mod signals;
mod starved;
mod supervisor;
mod two_paths;
