//! Shared by the listeners of all protocols: the accept loop, connection slots, and threads.

mod accept;
pub mod shards;
mod slots;

pub use accept::{AcceptCounters, AcceptLoop, AcceptSettings, Accepted, bind};
pub use slots::{Idle, Slot, SlotLimits, share};
