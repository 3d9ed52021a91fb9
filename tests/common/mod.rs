//! Shared by the tests: nodes as processes, encoders, viewers, an emulated network, and comparisons of
//! pushed with pulled streams.
//!
//! Everything is on loopback. Tests do not sleep for a fixed time: [`wait_for`] polls a condition until
//! a deadline, which is long because test machines are busy.

// Each test binary compiles this module and uses a part of it.
#![allow(dead_code)]

pub mod chain;
pub mod compare;
pub mod http;
pub mod http_node;
pub mod media;
pub mod network;
pub mod node;
pub mod ports;
pub mod process;
pub mod repair_node;
pub mod rtmp;
pub mod rtmp_node;
pub mod viewer;

use std::time::{Duration, Instant};

/// Deadline on a busy machine for events that should happen at once.
pub const SOON: Duration = Duration::from_secs(20);

/// Polls until `condition` returns a value. Panics with `what` after `deadline`.
#[track_caller]
pub fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + deadline;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < until, "{what}: not within {deadline:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The same for a test on a tokio runtime.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < until, "{what}: not within {SOON:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
