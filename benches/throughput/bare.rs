//! Loops of bare system calls, with everything made before that can be.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd,
    ptr, thread,
};

use downpour_repair::rtp::Burst;
use socket2::SockRef;

use crate::{common::cpu, fanout::threads::join};

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
        let mut messages = self.messages(&mut bytes);
        let began = cpu::of_this_thread();
        for burst in bursts {
            for packet in burst.bytes().chunks(burst.stride()) {
                messages.send(packet)?;
            }
        }
        Ok(cpu::of_this_thread() - began)
    }

    /// Sends each of `frames` to all targets, for up to 1024 of them in a call, in packets of
    /// `stride` bytes that the socket cuts (`UDP_SEGMENT`, udp(7)).
    pub fn cut_each<T: AsRef<[u8]>>(
        &mut self,
        frames: impl IntoIterator<Item = io::Result<T>>,
        stride: u16,
    ) -> io::Result<()> {
        set_udp(&self.socket, libc::UDP_SEGMENT, stride.into())?;
        let stride = usize::from(stride);
        let mut bytes = iovec(&[]);
        let mut messages = self.messages(&mut bytes);
        for frame in frames {
            for piece in frame?.as_ref().chunks(at_once(stride) * stride) {
                messages.send(piece)?;
            }
        }
        Ok(())
    }

    /// Messages to all targets, of the same `bytes`, which they say when they are sent.
    fn messages<'a>(&'a mut self, bytes: &'a mut libc::iovec) -> Messages<'a> {
        let bytes = ptr::from_mut(bytes);
        let message = |name: &mut libc::sockaddr_in| libc::mmsghdr {
            msg_hdr: libc::msghdr { msg_name: ptr::from_mut(name).cast(), ..header(bytes) },
            msg_len: 0,
        };
        let headers = self.names.iter_mut().map(message).collect();
        Messages { socket: &self.socket, headers, bytes }
    }
}

struct Messages<'a> {
    socket: &'a UdpSocket,
    headers: Vec<libc::mmsghdr>,
    /// What all headers point to, borrowed as long.
    bytes: *mut libc::iovec,
}

impl Messages<'_> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: it is borrowed, and only the headers refer to it.
        unsafe { *self.bytes = iovec(bytes) };
        let mut rest = &mut self.headers[..];
        while !rest.is_empty() {
            let count = rest.len().min(1024);
            // SAFETY: each points to a name and to the iovec, which outlive the call.
            let sent = unsafe {
                libc::sendmmsg(self.socket.as_raw_fd(), rest.as_mut_ptr(), count as libc::c_uint, 0)
            };
            match usize::try_from(sent) {
                Ok(sent @ 1..) => rest = &mut rest[sent..],
                _ => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
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

/// Sets an option of udp(7).
pub fn set_udp(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: it reads the integer that it is given.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            option,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
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
