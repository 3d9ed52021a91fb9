//! Loops of bare system calls with everything else prepared in advance.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd,
    ptr, thread,
};

use downpour_repair::rtp::Burst;
use socket2::SockRef;

use crate::{common::cpu, fanout::threads::join};

/// A socket and its target addresses in the kernel's format.
pub struct Bare {
    socket: UdpSocket,
    addresses: Vec<libc::sockaddr_in>,
}

impl Bare {
    pub fn new(targets: &[SocketAddrV4]) -> io::Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        SockRef::from(&socket).set_send_buffer_size(4 << 20)?;
        let address = |addr: &SocketAddrV4| libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: addr.port().to_be(),
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(addr.ip().octets()) },
            sin_zero: [0; 8],
        };
        Ok(Self { socket, addresses: targets.iter().map(address).collect() })
    }

    /// Calls `sendmsg` per target and as many packets as segmentation allows. Returns the seconds of
    /// processor time.
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
            for message in burst.bytes().chunks(max_segments(stride) * stride) {
                let mut bytes = iovec(message);
                let mut header = header(&raw mut bytes);
                if message.len() > stride {
                    header.msg_control = (&raw mut control).cast();
                    header.msg_controllen = size_of::<Control>() as _;
                }
                for address in &mut self.addresses {
                    header.msg_name = ptr::from_mut(address).cast();
                    // SAFETY: the header points to an address, an iovec and a control message of the
                    // stated lengths, which outlive the call.
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

    /// Calls `sendto` per packet and target. Returns the seconds of processor time.
    pub fn one_by_one(&mut self, bursts: &[Burst]) -> io::Result<f64> {
        let began = cpu::of_this_thread();
        for burst in bursts {
            for packet in burst.bytes().chunks(burst.stride()) {
                for address in &self.addresses {
                    // SAFETY: both pointers are valid for the stated lengths.
                    let sent = unsafe {
                        libc::sendto(
                            self.socket.as_raw_fd(),
                            packet.as_ptr().cast(),
                            packet.len(),
                            0,
                            ptr::from_ref(address).cast(),
                            ADDRESS_LEN,
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

    /// Calls `sendmmsg` per packet and up to 1024 targets. Returns the seconds of processor time.
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

    /// Sends each of `frames` to all targets, up to 1024 per call, in packets of `stride` bytes that
    /// the kernel segments (`UDP_SEGMENT`, udp(7)).
    pub fn send_frames<T: AsRef<[u8]>>(
        &mut self,
        frames: impl IntoIterator<Item = io::Result<T>>,
        stride: u16,
    ) -> io::Result<()> {
        set_udp(&self.socket, libc::UDP_SEGMENT, stride.into())?;
        let stride = usize::from(stride);
        let mut bytes = iovec(&[]);
        let mut messages = self.messages(&mut bytes);
        for frame in frames {
            for message in frame?.as_ref().chunks(max_segments(stride) * stride) {
                messages.send(message)?;
            }
        }
        Ok(())
    }

    /// One message per target, all with the same `bytes`, which [`Messages::send`] sets.
    fn messages<'a>(&'a mut self, bytes: &'a mut libc::iovec) -> Messages<'a> {
        let bytes = ptr::from_mut(bytes);
        let message = |address: &mut libc::sockaddr_in| libc::mmsghdr {
            msg_hdr: libc::msghdr { msg_name: ptr::from_mut(address).cast(), ..header(bytes) },
            msg_len: 0,
        };
        let headers = self.addresses.iter_mut().map(message).collect();
        Messages { socket: &self.socket, headers, bytes }
    }
}

/// Prepared messages with the same contents, one per target.
struct Messages<'a> {
    socket: &'a UdpSocket,
    headers: Vec<libc::mmsghdr>,
    /// Shared by all headers, and borrowed for `'a`.
    bytes: *mut libc::iovec,
}

impl Messages<'_> {
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: the iovec is mutably borrowed for 'a, and nothing else accesses it during this call.
        unsafe { *self.bytes = iovec(bytes) };
        let mut rest = &mut self.headers[..];
        while !rest.is_empty() {
            let count = rest.len().min(1024);
            // SAFETY: each header points to an address and to the iovec, which outlive the call.
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

/// Runs [`Bare::many`] of all of them concurrently, each in a thread. Returns the sum of their seconds
/// of processor time.
pub fn many_in_threads(all: &mut [Bare], bursts: &[Burst]) -> io::Result<f64> {
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
    // SAFETY: the pointer is valid for the stated length.
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

/// Maximum number of packets of `stride` bytes per message with segmentation: the limit of all kernels
/// (UDP_MAX_SEGMENTS), and the maximum length of a datagram.
pub fn max_segments(stride: usize) -> usize {
    SEGMENTS.min(65_507 / stride)
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

fn header(bytes: *mut libc::iovec) -> libc::msghdr {
    libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: ADDRESS_LEN,
        msg_iov: bytes,
        msg_iovlen: 1,
        msg_control: ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// A control message with a u16.
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    segment: u16,
    padding: [u8; 6],
}

const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + size_of::<u16>();
const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_in>() as libc::socklen_t;
const SEGMENTS: usize = 64;
