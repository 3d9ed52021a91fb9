#![doc = include_str!("../README.md")]
#![warn(missing_docs, unreachable_pub)]

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
pub mod serial_requests;
