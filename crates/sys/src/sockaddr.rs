//! Socket addresses and options in the kernel's layout.

use std::{
    io,
    net::{SocketAddr, SocketAddrV6},
    os::fd::AsRawFd,
};

/// Sets a socket option that neither the standard library nor socket2 offers (setsockopt(2)).
///
/// # Safety
/// `T` must be the type that the kernel reads for this option.
///
/// # Errors
/// If the kernel does not know the option, or refuses the value.
pub(crate) unsafe fn set_option<T>(
    socket: &impl AsRawFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let (value, len) = ((&raw const *value).cast(), size_of::<T>() as libc::socklen_t);
    // SAFETY: the kernel reads `len` bytes of the value; the caller guarantees its type.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An IPv4 or IPv6 socket address, or none, as a C union.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) union SockAddr {
    family: libc::sa_family_t,
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Default for SockAddr {
    /// No address.
    fn default() -> Self {
        // SAFETY: all zeroes are valid for each variant: integers.
        unsafe { std::mem::zeroed() }
    }
}

impl From<SocketAddr> for SockAddr {
    fn from(addr: SocketAddr) -> Self {
        match addr {
            SocketAddr::V4(addr) => Self {
                v4: libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: addr.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
                    sin_zero: [0; 8],
                },
            },
            SocketAddr::V6(addr) => Self {
                v6: libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: addr.port().to_be(),
                    sin6_flowinfo: addr.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: addr.ip().octets() },
                    sin6_scope_id: addr.scope_id(),
                },
            },
        }
    }
}

impl SockAddr {
    /// Returns the address, if there is one.
    pub(crate) fn get(&self) -> Option<SocketAddr> {
        // SAFETY: all variants begin with the family, which selects the variant to read. All
        // zeroes, the initial value, are valid for each.
        unsafe {
            match i32::from(self.family) {
                libc::AF_INET => {
                    let ip = self.v4.sin_addr.s_addr.to_ne_bytes();
                    Some((ip, u16::from_be(self.v4.sin_port)).into())
                }
                libc::AF_INET6 => {
                    let v6 = self.v6;
                    let (ip, port) = (v6.sin6_addr.s6_addr.into(), u16::from_be(v6.sin6_port));
                    let (flow, scope) = (v6.sin6_flowinfo, v6.sin6_scope_id);
                    Some(SocketAddrV6::new(ip, port, flow, scope).into())
                }
                _ => None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_families_convert_and_convert_back() {
        for text in ["10.1.2.3:65535", "[2001:db8::7]:1", "[fe80::1%3]:5222"] {
            let addr: SocketAddr = text.parse().unwrap();
            assert_eq!(SockAddr::from(addr).get(), Some(addr));
        }
        assert_eq!(SockAddr::default().get(), None);
    }
}
