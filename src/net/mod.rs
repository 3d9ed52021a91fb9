//! What protocols share: the accept loop, connection slots, the HTTP client, and limits of repeated
//! log lines.

mod accept;
pub mod http_client;
mod log_limit;
mod slots;

pub use accept::{AcceptCounters, AcceptLoop, AcceptSettings, Accepted, bind};
pub use log_limit::{KeyedLogLimit, LogLimit};
pub use slots::{Idle, Slot, SlotLimits, share};
