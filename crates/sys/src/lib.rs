//! The parts of Downpour that need `unsafe`, and nothing else: shared buffers, batched socket
//! calls, timers and limits. Every other crate forbids `unsafe`.

pub mod buffer;
pub mod idle;
mod prefetch;
pub mod recvmmsg;
pub mod rlimit;
pub mod sendmmsg;
pub mod sockaddr;
#[cfg(feature = "tokio")]
pub mod timer;
pub mod udp;

pub use prefetch::prefetch;
