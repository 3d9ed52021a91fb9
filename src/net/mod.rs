//! What all listeners share: the accept loop, connection slots, and limits of repeated log lines.

mod accept;
mod log_limit;
pub mod shards;
mod slots;

pub use accept::{AcceptCounters, AcceptLoop, AcceptSettings, Accepted, bind};
pub use log_limit::{KeyedLogLimit, LogLimit};
pub use slots::{Idle, Slot, SlotLimits};
