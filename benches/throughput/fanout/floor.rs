//! Loops of bare system calls, with everything made before that can be.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd,
    ptr, thread,
};

use downpour::rtp::Burst;
use socket2::SockRef;

use super::threads::join;
use crate::common::cpu;

/// A socket and the addresses that it sends to, as the kernel reads them.
pub struct Bare {
    socket: UdpSocket,
    names: Vec<libc::sockaddr_in>,
}

impl Bare {
    pub fn new(targets: &[SocketAddrV4]) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        SockRef::from(&socket).set_send_buffer_size(4 << 20)?;
        let name = |addr: &SocketAddrV4| libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: addr.port().to_be(),
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
            sin_zero: [0; 8],
        };
        Ok(Self { socket, names: targets.iter().map(name).collect() })
    }

    /// One `sendmsg` for as many packets as segmentation allows, to one target after the other;
    /// seconds of processor time.
    pub fn segmented(&mut self, bursts: &[Burst]) -> io::Result<f64> {
        let mut control = Control {
            head: libc::cmsghdr {
                cmsg_len: CONTROL_LEN as _,
                cmsg_level: libc::SOL_UDP,
                cmsg_type: libc::UDP_SEGMENT,
            },
            segment: 0,
            padding: [0; 6],
        };
        let began = cpu::of_this_thread();
        for burst in bursts {
            let stride = burst.stride();
            control.segment = stride as u16;
            for piece in burst.bytes().chunks(at_once(stride) * stride) {
                let mut bytes = iovec(piece);
                let mut header = header(&raw mut bytes);
                if piece.len() > stride {
                    header.msg_control = (&raw mut control).cast();
                    header.msg_controllen = size_of::<Control>() as _;
                }
                for name in &mut self.names {
                    header.msg_name = ptr::from_mut(name).cast();
                    // SAFETY: it points to a name, an iovec and a control message of the lengths
                    // that it gives, all of which outlive the call.
                    let sent =
                        unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const header, 0) };
                    if sent < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
            }
        }
        Ok(cpu::of_this_thread() - began)
    }

    /// One `sendto` a packet and target.
    pub fn one_by_one(&mut self, bursts: &[Burst]) -> io::Result<f64> {
        let began = cpu::of_this_thread();
        for burst in bursts {
            for packet in burst.bytes().chunks(burst.stride()) {
                for name in &self.names {
                    // SAFETY: both are of the lengths that are given.
                    let sent = unsafe {
                        libc::sendto(
                            self.socket.as_raw_fd(),
                            packet.as_ptr().cast(),
                            packet.len(),
                            0,
                            ptr::from_ref(name).cast(),
                            NAME_LEN,
                        )
                    };
                    if sent < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
            }
        }
        Ok(cpu::of_this_thread() - began)
    }

    /// One `sendmmsg` a packet, for up to 1024 targets.
    pub fn many(&mut self, bursts: &[Burst]) -> io::Result<f64> {
        let mut bytes = iovec(&[]);
        let bytes = &raw mut bytes;
        let mut headers: Vec<_> = self
            .names
            .iter_mut()
            .map(|name| {
                let msg_name = ptr::from_mut(name).cast();
                libc::mmsghdr { msg_hdr: libc::msghdr { msg_name, ..header(bytes) }, msg_len: 0 }
            })
            .collect();
        let began = cpu::of_this_thread();
        for burst in bursts {
            for packet in burst.bytes().chunks(burst.stride()) {
                // SAFETY: it lives until the end of this function, and nothing else refers to it.
                unsafe { *bytes = iovec(packet) };
                for headers in headers.chunks_mut(1024) {
                    // SAFETY: each points to a name and to the iovec, which outlive the call.
                    let sent = unsafe {
                        libc::sendmmsg(
                            self.socket.as_raw_fd(),
                            headers.as_mut_ptr(),
                            headers.len() as libc::c_uint,
                            0,
                        )
                    };
                    if sent != headers.len() as libc::c_int {
                        return Err(io::Error::last_os_error());
                    }
                }
            }
        }
        Ok(cpu::of_this_thread() - began)
    }
}

/// [`Bare::many`] of all of them at the same time, each in a thread of its own; seconds of processor
/// time together.
pub fn at_once_each(all: &mut [Bare], bursts: &[Burst]) -> io::Result<f64> {
    if let [one] = all {
        return one.many(bursts);
    }
    thread::scope(|scope| {
        let threads: Vec<_> =
            all.iter_mut().map(|bare| scope.spawn(move || bare.many(bursts))).collect();
        threads.into_iter().map(join).sum()
    })
}

/// Packets that go in one message with segmentation: what every kernel takes (UDP_MAX_SEGMENTS), up to
/// the longest datagram.
pub fn at_once(stride: usize) -> usize {
    SEGMENTS.min(65_507 / stride)
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

fn header(bytes: *mut libc::iovec) -> libc::msghdr {
    libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: NAME_LEN,
        msg_iov: bytes,
        msg_iovlen: 1,
        msg_control: ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// A control message of a u16.
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    segment: u16,
    padding: [u8; 6],
}

const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + size_of::<u16>();
const NAME_LEN: libc::socklen_t = size_of::<libc::sockaddr_in>() as libc::socklen_t;
const SEGMENTS: usize = 64;
