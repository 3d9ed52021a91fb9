//! UDP sockets as RTP needs them: large buffers, multicast groups, the kernel's offloads.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, UdpSocket},
};

use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};

use crate::sockaddr::set_option;

/// How RTP leaves for multicast groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MulticastOut {
    /// Routers that a packet may pass, 0..=255; 1 stays in the local network.
    pub ttl: u8,
    /// Whether members on this machine get a copy.
    pub looped: bool,
    /// The interface to send from, by its IPv4 address; `None` lets the routing table choose.
    pub interface: Option<Ipv4Addr>,
}

impl Default for MulticastOut {
    fn default() -> Self {
        Self { ttl: 1, looped: true, interface: None }
    }
}

/// Whose a port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// One socket's.
    Own,
    /// Shared with others of this user that say so too (SO_REUSEPORT), to send from it only: what
    /// comes to this socket is dropped.
    Shared,
}

/// A socket to send RTP from, with a send buffer of `buffer` bytes if the kernel allows it.
///
/// # Errors
/// If the address is taken, or an option is refused.
pub fn sender(
    addr: SocketAddr,
    port: Port,
    buffer: usize,
    multicast: MulticastOut,
) -> io::Result<UdpSocket> {
    let socket = socket(addr)?;
    if port == Port::Shared {
        socket.set_reuse_port(true)?;
        // Nobody reads it, so nothing is to pile up: it may get what comes to a multicast group.
        socket.attach_filter(&[SockFilter::new(libc::BPF_RET as u16, 0, 0, 0)])?;
    }
    match addr {
        SocketAddr::V4(_) => {
            socket.set_multicast_ttl_v4(multicast.ttl.into())?;
            socket.set_multicast_loop_v4(multicast.looped)?;
            if let Some(interface) = multicast.interface {
                socket.set_multicast_if_v4(&interface)?;
            }
        }
        SocketAddr::V6(_) => {
            // The IPv4 socket has the same port.
            socket.set_only_v6(true)?;
            socket.set_multicast_hops_v6(multicast.ttl.into())?;
            socket.set_multicast_loop_v6(multicast.looped)?;
        }
    }
    socket.bind(&addr.into())?;
    let granted = enlarge(buffer, |n| socket.set_send_buffer_size(n), || socket.send_buffer_size());
    // Once for all that share a port: the first of them had it for itself, and asks for as much.
    if port == Port::Own {
        warn_if_small("net.core.wmem_max", buffer, granted);
    }
    Ok(socket.into())
}

/// A socket to receive RTP on. If `addr` is a multicast group, joins it on `interface`; several
/// nodes of one machine may then share the port.
///
/// # Errors
/// If the address is taken, or the group cannot be joined.
pub fn receiver(
    addr: SocketAddr,
    interface: Option<Ipv4Addr>,
    buffer: usize,
) -> io::Result<UdpSocket> {
    let socket = socket(addr)?;
    if addr.ip().is_multicast() {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&addr.into())?;
    match addr.ip() {
        IpAddr::V4(group) if group.is_multicast() => {
            socket.join_multicast_v4(&group, &interface.unwrap_or(Ipv4Addr::UNSPECIFIED))?;
            // Only this group, not every group that some socket of the machine joined.
            socket.set_multicast_all_v4(false)?;
        }
        IpAddr::V6(group) if group.is_multicast() => socket.join_multicast_v6(&group, 0)?,
        _ => {}
    }
    let granted = enlarge(buffer, |n| socket.set_recv_buffer_size(n), || socket.recv_buffer_size());
    warn_if_small("net.core.rmem_max", buffer, granted);
    Ok(socket.into())
}

/// Ends the calls that wait for what comes to `socket`, and all that come later.
pub fn end_waits(socket: &UdpSocket) {
    // That it is not connected is told as an error, and those who wait are woken all the same.
    let _ = SockRef::from(socket).shutdown(Shutdown::Read);
}

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))
}

/// Asks for a buffer and tells what the kernel gave, in the same measure.
fn enlarge(
    wanted: usize,
    set: impl Fn(usize) -> io::Result<()>,
    size: impl Fn() -> io::Result<usize>,
) -> usize {
    // A refusal is seen in the size that results.
    let _ = set(wanted);
    // Linux doubles what is asked, to make room for its own bookkeeping (socket(7)).
    size().unwrap_or(0) / 2
}

fn warn_if_small(sysctl: &str, wanted: usize, granted: usize) {
    if granted < wanted {
        tracing::warn!("{}", small_buffer(sysctl, wanted as u64, granted as u64));
    }
}

/// Sends without checksums, which makes the kernel refuse segmentation offload on this socket
/// (`SO_NO_CHECK`): how tests produce that refusal.
///
/// # Errors
/// As setsockopt(2).
pub fn disable_checksums(socket: &UdpSocket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads an int for this option (socket(7)).
    unsafe { set_option(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, &on) }
}

/// The warning for a socket buffer of `granted` bytes where `wanted` were asked for, with the line to
/// type. `sysctl` is the kernel setting that bounds it.
pub fn small_buffer(sysctl: &str, wanted: u64, granted: u64) -> String {
    format!(
        "the kernel gives UDP buffers of {granted} bytes instead of {wanted}: bursts may be \
         dropped; run: sysctl -w {sysctl}={wanted}"
    )
}
