//! Loss recovery: the receiver in virtual time, and clients and servers over loopback.

#[path = "../common/mod.rs"]
mod common;

mod group;
mod lossy;
mod receiver;
mod reports;
mod residual;
mod resume;
mod seeds;
mod storm;
mod v0;
mod v1;
