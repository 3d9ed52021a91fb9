//! RTP as Downpour uses it, and the recovery of lost packets, as state machines: packets and
//! instants in, packets and events out; no socket, clock or task.

pub mod bucket;
pub mod control;
pub mod fec;
pub mod history;
pub mod message;
pub mod multicast_repair;
pub mod path_validation;
pub mod probe;
pub mod receiver;
pub mod repair_queue;
pub mod retransmit;
pub mod rtp;
