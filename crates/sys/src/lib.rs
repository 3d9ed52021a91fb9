//! The parts of Downpour that need `unsafe`: shared buffers, batched socket calls, timers and
//! process limits. Every other crate of the workspace forbids `unsafe`.
//!
//! | module | contents |
//! |---|---|
//! | [`access`] | permissions on files |
//! | [`buffer`] | reference-counted buffers carved out of shared blocks |
//! | [`idle`] | nap or block: how a worker thread idles |
//! | [`pktinfo`] | the local address of a datagram, where a host has several |
//! | [`recvmmsg`], [`sendmmsg`] | many datagrams per system call, with GRO and GSO |
//! | [`heap`] | freed memory, back to the system |
//! | [`rlimit`] | the limit of file descriptors |
//! | `timer` | a timerfd(2) that other threads set while a tokio task waits for it (feature `tokio`) |
//! | [`udp`] | UDP sockets for RTP: large buffers, multicast |
//!
//! Linux only. The default features pull in no async runtime.

#![warn(missing_docs, unreachable_pub)]

pub mod access;
pub mod buffer;
pub mod heap;
pub mod idle;
mod log_limit;
pub mod pktinfo;
mod prefetch;
pub mod recvmmsg;
pub mod rlimit;
pub mod sendmmsg;
mod sockaddr;
#[cfg(feature = "tokio")]
pub mod timer;
pub mod udp;

pub use log_limit::{KeyedLogLimit, LogLimit};
pub use prefetch::prefetch;
