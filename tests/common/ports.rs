//! Ports for nodes to listen on.

use std::{
    net::{Ipv4Addr, TcpListener, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    sync::{
        Mutex,
        atomic::{AtomicU16, Ordering},
    },
};

/// Returns a free TCP and UDP port, reserved for this test process.
///
/// The port is below the kernel's range of ephemeral ports: it must be free when a killed node restarts,
/// and some tests open 10,000 connections.
pub fn free() -> u16 {
    free_run(1)
}

/// Returns a port for RTP, and also reserves its parity port, two above.
pub fn free_for_rtp() -> u16 {
    free_run(3)
}

/// Returns the first of `count` consecutive free ports.
fn free_run(count: u16) -> u16 {
    // Concurrent test processes start at different ports.
    let start = (std::process::id() % u32::from(PORTS / SPREAD)) as u16 * SPREAD;
    for _ in 0..PORTS {
        let offset = NEXT.fetch_add(count, Ordering::Relaxed) % PORTS;
        let first = FIRST + (start + offset) % PORTS;
        let claims: Option<Vec<_>> = (first..first + count).map(claim).collect();
        if let Some(claims) = claims {
            CLAIMS.lock().expect("a test panicked here").extend(claims);
            return first;
        }
    }
    panic!("no port is free");
}

/// Reserves a port among all test processes. Returns `None` if it is in use.
///
/// The reservation is a socket in the abstract namespace (unix(7)): one process can bind a name, and the
/// kernel releases it when that process ends.
fn claim(port: u16) -> Option<UnixListener> {
    let name = SocketAddr::from_abstract_name(format!("downpour-test-port-{port}")).ok()?;
    let claim = UnixListener::bind_addr(&name).ok()?;
    let is_free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
        && UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok();
    is_free.then_some(claim)
}

/// Reservations of this process.
static CLAIMS: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
static NEXT: AtomicU16 = AtomicU16::new(0);
const FIRST: u16 = 12_000;
const PORTS: u16 = 20_000;
const SPREAD: u16 = 40;
