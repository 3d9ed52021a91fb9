//! Ports for nodes to listen on.

use std::{
    net::{Ipv4Addr, TcpListener, UdpSocket},
    sync::atomic::{AtomicU16, Ordering},
};

/// A port that nobody listens on, neither TCP nor UDP, and that this process has not given out yet.
///
/// They lie below the range from which the kernel takes ports for outgoing connections: a node that
/// is killed must find its port free when it comes back, and some tests open 10,000 connections.
pub fn free() -> u16 {
    free_run(1)
}

/// A port for RTP: that of its parity, two above, is kept free too.
pub fn free_for_rtp() -> u16 {
    free_run(3)
}

/// The first of so many ports in a row.
fn free_run(count: u16) -> u16 {
    // Test processes that run at the same time take different blocks.
    let block = (std::process::id() % BLOCKS) as u16 * BLOCK;
    loop {
        let offset = NEXT.fetch_add(count, Ordering::Relaxed);
        assert!(offset < 5 * BLOCK, "no port is free");
        let first = FIRST + (block + offset) % (BLOCKS as u16 * BLOCK);
        let is_free = |port| {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
                && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok()
        };
        if (first..first + count).all(is_free) {
            return first;
        }
    }
}

static NEXT: AtomicU16 = AtomicU16::new(0);
const FIRST: u16 = 12_000;
const BLOCK: u16 = 200;
const BLOCKS: u32 = 100;
