//! The source that receives streams from another node: RTP in, repair by request.

pub mod dispatch;
pub mod link_state;
pub mod livestat;
mod parity;
pub mod prober;
mod receive;
pub mod repair_client;
pub mod socket;
pub mod stats;
pub mod streams;
