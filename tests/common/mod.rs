//! What the end-to-end tests share: nodes as processes of the real binary, encoders, viewers, a bad
//! network between, and the comparison of what went in with what came out.
//!
//! Everything is on loopback, and nothing waits by sleeping for luck: [`wait_for`] polls a
//! condition until a deadline, which is generous because test machines are busy.

// Each test binary compiles this for itself and uses a part of it.
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

/// How long anything that should happen at once may take on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// Polls until `condition` gives something. Panics with `what` when `deadline` has passed.
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
