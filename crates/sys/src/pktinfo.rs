//! The local address of a datagram: `IP_PKTINFO` (ip(7)) and `IPV6_PKTINFO` (ipv6(7)).
//!
//! A socket on all addresses of a host with several of them answers from the address that the routing
//! table chooses. A peer behind a NAT or a firewall lets in only answers from the address that it asked.

use std::{
    io, mem,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    ptr,
};

use crate::{
    sendmmsg::{Batch, Message},
    sockaddr::{SockAddr, set_option},
};

/// The control message that names the address to send from, or none. It is at the end of the bytes.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Source {
    bytes: [u64; SOURCE_WORDS],
}

impl Source {
    /// The control message for `from`.
    #[inline]
    pub(crate) fn new(from: Option<IpAddr>) -> Self {
        let mut source = Self { bytes: [0; SOURCE_WORDS] };
        match from {
            None => {}
            Some(IpAddr::V4(ip)) => source.set(
                (libc::IPPROTO_IP, libc::IP_PKTINFO),
                libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                },
            ),
            Some(IpAddr::V6(ip)) => source.set(
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO),
                libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: ip.octets() },
                    ipi6_ifindex: 0,
                },
            ),
        }
        source
    }

    /// `CMSG_SPACE` of the control message; 0 if there is none.
    #[inline]
    pub(crate) fn space(&self) -> usize {
        // The V6 message fills the bytes; the header of a shorter one begins later.
        if self.bytes[0] != 0 {
            space_of::<libc::in6_pktinfo>()
        } else if self.bytes.iter().any(|word| *word != 0) {
            space_of::<libc::in_pktinfo>()
        } else {
            0
        }
    }

    /// The address that the control message names.
    pub(crate) fn get(&self) -> Option<IpAddr> {
        let space = self.space();
        if space == space_of::<libc::in6_pktinfo>() {
            // SAFETY: `new` wrote this type there.
            let info: libc::in6_pktinfo = unsafe { self.data(space) };
            return Some(Ipv6Addr::from(info.ipi6_addr.s6_addr).into());
        }
        if space == 0 {
            return None;
        }
        // SAFETY: as above.
        let info: libc::in_pktinfo = unsafe { self.data(space) };
        Some(Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()).into())
    }

    fn set<T>(&mut self, (level, kind): (libc::c_int, libc::c_int), data: T) {
        let start = size_of::<Self>() - space_of::<T>();
        let head =
            libc::cmsghdr { cmsg_len: len_of::<T>() as _, cmsg_level: level, cmsg_type: kind };
        let bytes = (&raw mut self.bytes).cast::<u8>();
        // SAFETY: header and data fit in `space_of::<T>()` bytes, which end with the array.
        unsafe {
            bytes.add(start).cast::<libc::cmsghdr>().write_unaligned(head);
            bytes.add(start + size_of::<libc::cmsghdr>()).cast::<T>().write_unaligned(data);
        }
    }

    /// # Safety
    /// A message of `space` bytes with a `T` must have been set.
    unsafe fn data<T>(&self, space: usize) -> T {
        let start = size_of::<Self>() - space + size_of::<libc::cmsghdr>();
        // SAFETY: guaranteed by the caller.
        unsafe { (&raw const self.bytes).cast::<u8>().add(start).cast::<T>().read_unaligned() }
    }
}

/// Makes the socket report the local address of each datagram to [`receive`].
///
/// # Errors
/// If the kernel does not support it.
pub fn enable(socket: &UdpSocket) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: the kernel reads an int for either option (ip(7), ipv6(7)).
    unsafe {
        match socket.local_addr()? {
            SocketAddr::V4(_) => set_option(socket, libc::IPPROTO_IP, libc::IP_PKTINFO, &on),
            SocketAddr::V6(_) => {
                set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, &on)
            }
        }
    }
}

/// Waits for a datagram, as the socket's mode and timeouts say. Returns its length, its sender and, where
/// [`enable`] is in effect, the local address that it was sent to.
///
/// # Errors
/// Those of recvmsg(2).
pub fn receive(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> io::Result<(usize, SocketAddr, Option<IpAddr>)> {
    let mut from = SockAddr::default();
    let mut control = [0_u64; CONTROL_WORDS];
    let mut bytes = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: zero is a valid value of every field.
    let mut header: libc::msghdr = unsafe { mem::zeroed() };
    header.msg_name = (&raw mut from).cast();
    header.msg_namelen = size_of::<SockAddr>() as libc::socklen_t;
    header.msg_iov = &raw mut bytes;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the header points to a name, an iovec and a control buffer, with their lengths, that
    // outlive the call.
    let len = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, 0) };
    let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
    let from = from.get().ok_or_else(|| io::Error::other("a datagram without a sender"))?;
    Ok((len, from, local_address(&header)))
}

/// Sends one datagram from the local address `from`, without blocking.
///
/// # Errors
/// Those of sendmmsg(2).
pub fn send(
    socket: &UdpSocket,
    bytes: &[u8],
    to: SocketAddr,
    from: Option<IpAddr>,
) -> io::Result<()> {
    let mut batch = Batch::new();
    let mut messages = batch.begin();
    messages.push(Message { to, from, bytes, segment: 0 });
    messages.send(socket, 0).map(drop)
}

/// The address in the control messages of a received datagram, if there is one.
fn local_address(header: &libc::msghdr) -> Option<IpAddr> {
    // SAFETY: the kernel filled `msg_controllen` bytes of control messages, and the macros stay within
    // them. The data of a message of either type is the type that is read.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            let data = libc::CMSG_DATA(message);
            match ((*message).cmsg_level, (*message).cmsg_type) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    let info = ptr::read_unaligned(data.cast::<libc::in_pktinfo>());
                    return Some(Ipv4Addr::from(info.ipi_spec_dst.s_addr.to_ne_bytes()).into());
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    let info = ptr::read_unaligned(data.cast::<libc::in6_pktinfo>());
                    let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                    return Some(ip.into()).filter(|_| !ip.is_multicast());
                }
                _ => message = libc::CMSG_NXTHDR(header, message),
            }
        }
    }
    None
}

const fn space_of<T>() -> usize {
    // SAFETY: only computes.
    unsafe { libc::CMSG_SPACE(size_of::<T>() as libc::c_uint) as usize }
}

const fn len_of<T>() -> usize {
    // SAFETY: only computes.
    unsafe { libc::CMSG_LEN(size_of::<T>() as libc::c_uint) as usize }
}

/// As long as the message of an IPv6 address, the longer one.
const SOURCE_WORDS: usize = space_of::<libc::in6_pktinfo>() / size_of::<u64>();
/// More than the messages that a socket with [`enable`] and GRO gets.
const CONTROL_WORDS: usize = 16;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_address_that_was_asked_is_reported_and_answers() {
        for (any, asked) in
            [("0.0.0.0:0", &["127.0.0.2", "127.0.0.3", "127.0.0.1"][..]), ("[::]:0", &["::1"][..])]
        {
            let Ok(server) = UdpSocket::bind(any) else { continue };
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            enable(&server).unwrap();
            let port = server.local_addr().unwrap().port();
            for ip in asked {
                let ip: IpAddr = ip.parse().unwrap();
                let client = UdpSocket::bind((ip, 0)).unwrap();
                client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                // Connected: the kernel drops answers from any other address.
                client.connect((ip, port)).unwrap();
                client.send(b"who?").unwrap();
                let mut buffer = [0; 16];
                let (len, from, to) = receive(&server, &mut buffer).unwrap();
                assert_eq!((len, from), (4, client.local_addr().unwrap()));
                assert_eq!(to, Some(ip));
                send(&server, b"me", from, to).unwrap();
                assert_eq!(client.recv(&mut buffer).unwrap(), 2);
            }
        }
    }

    #[test]
    fn a_source_reads_as_it_was_made() {
        for ip in [None, Some("127.0.0.2"), Some("2001:db8::7"), Some("0.0.0.0"), Some("::")] {
            let ip = ip.map(|ip| ip.parse().unwrap());
            assert_eq!(Source::new(ip).get(), ip);
        }
        assert_eq!(Source::new(None).space(), 0);
    }
}
