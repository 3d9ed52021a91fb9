//! RTP as Downpour uses it, and the recovery of lost packets, as state machines: packets and
//! instants in, packets and events out; no socket, clock or task.

pub mod bucket;
pub mod control;
pub mod fec;
pub mod group;
pub mod history;
pub mod message;
pub mod outbox;
pub mod paths;
pub mod probe;
pub mod receiver;
pub mod resend;
pub mod rtp;
