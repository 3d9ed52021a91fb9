//! UDP sockets for RTP: large kernel buffers, multicast groups, shared ports.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, UdpSocket},
};

use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};

use crate::sockaddr::set_option;

/// How a socket sends to multicast groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MulticastOut {
    /// Time to live in router hops; 1 keeps packets in the local network.
    pub ttl: u8,
    /// `true` if group members on this machine get a copy.
    pub looped: bool,
    /// The IPv4 address of the interface to send from; `None` lets the routing table choose.
    pub interface: Option<Ipv4Addr>,
}

impl Default for MulticastOut {
    fn default() -> Self {
        Self { ttl: 1, looped: true, interface: None }
    }
}

/// How a sending socket holds its port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// Exclusively.
    Own,
    /// Shared with other such sockets of the same user (SO_REUSEPORT), for sending only: the socket
    /// drops what it receives.
    Shared,
}

/// Binds a socket to send RTP from, with a send buffer of `buffer` bytes if the kernel allows it.
/// Logs a warning if it does not.
///
/// # Errors
/// If the address is in use, or the kernel refuses an option.
pub fn sender(
    addr: SocketAddr,
    port: Port,
    buffer: usize,
    multicast: MulticastOut,
) -> io::Result<UdpSocket> {
    let socket = socket(addr)?;
    if port == Port::Shared {
        socket.set_reuse_port(true)?;
        // A filter that accepts 0 bytes: nobody reads this socket, and multicast could fill it.
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
            // An IPv4 socket is bound to the same port.
            socket.set_only_v6(true)?;
            socket.set_multicast_hops_v6(multicast.ttl.into())?;
            socket.set_multicast_loop_v6(multicast.looped)?;
        }
    }
    socket.bind(&addr.into())?;
    let granted = enlarge(buffer, |n| socket.set_send_buffer_size(n), || socket.send_buffer_size());
    // Warn once per port: the first socket of a shared port is opened with `Port::Own`.
    if port == Port::Own {
        warn_if_small("net.core.wmem_max", buffer, granted);
    }
    Ok(socket.into())
}

/// Binds a socket to receive RTP on, with a receive buffer of `buffer` bytes if the kernel allows
/// it. Logs a warning if it does not.
///
/// If `addr` is a multicast group, joins it on `interface`; other sockets of this machine may then
/// share the port.
///
/// # Errors
/// If the address is in use, or the group cannot be joined.
pub fn receiver(
    addr: SocketAddr,
    interface: Option<Ipv4Addr>,
    buffer: usize,
) -> io::Result<UdpSocket> {
    let socket = socket(addr)?;
    if addr.ip().is_multicast() {
        socket.set_reuse_address(true)?;
    }
    if addr.is_ipv6() {
        // `[::]` is every IPv4 address, too, whatever net.ipv6.bindv6only says.
        socket.set_only_v6(false)?;
    }
    socket.bind(&addr.into())?;
    match addr.ip() {
        IpAddr::V4(group) if group.is_multicast() => {
            socket.join_multicast_v4(&group, &interface.unwrap_or(Ipv4Addr::UNSPECIFIED))?;
            // Receive this group only, not every group that a socket of this machine has joined.
            socket.set_multicast_all_v4(false)?;
        }
        IpAddr::V6(group) if group.is_multicast() => socket.join_multicast_v6(&group, 0)?,
        _ => {}
    }
    let granted = enlarge(buffer, |n| socket.set_recv_buffer_size(n), || socket.recv_buffer_size());
    warn_if_small("net.core.rmem_max", buffer, granted);
    Ok(socket.into())
}

/// Shuts down the receiving side: blocked receive calls and all later ones return at once.
pub fn shutdown_receive(socket: &UdpSocket) {
    // An unconnected socket reports ENOTCONN, and wakes its readers all the same.
    let _ = SockRef::from(socket).shutdown(Shutdown::Read);
}

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP))
}

/// Requests a buffer of `wanted` bytes and returns the bytes that the kernel granted.
fn enlarge(
    wanted: usize,
    set: impl Fn(usize) -> io::Result<()>,
    size: impl Fn() -> io::Result<usize>,
) -> usize {
    // The resulting size shows a refusal.
    let _ = set(wanted);
    // Linux doubles the request, for its own bookkeeping (socket(7)).
    size().unwrap_or(0) / 2
}

fn warn_if_small(sysctl: &str, wanted: usize, granted: usize) {
    if granted < wanted {
        tracing::warn!("{}", small_buffer_warning(sysctl, wanted as u64, granted as u64));
    }
}

/// Sends without checksums (`SO_NO_CHECK`). Linux then refuses segmentation offload on this socket:
/// tests produce that refusal with it.
///
/// # Errors
/// Those of setsockopt(2).
pub fn disable_checksums(socket: &UdpSocket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads an int for this option (socket(7)).
    unsafe { set_option(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, &on) }
}

/// The warning for a socket buffer of `granted` bytes where `wanted` were requested, with the
/// command that fixes it. `sysctl` is the kernel setting that limits the size.
pub fn small_buffer_warning(sysctl: &str, wanted: u64, granted: u64) -> String {
    format!(
        "the kernel gives UDP buffers of {granted} bytes instead of {wanted}: bursts may be \
         dropped; run: sysctl -w {sysctl}={wanted}"
    )
}
