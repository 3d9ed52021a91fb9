//! Receiving many datagrams per system call: recvmmsg(2) with UDP GRO.

use std::{
    io, mem,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    ptr,
};

use crate::sockaddr::{SockAddr, set_option};

/// Reusable buffers for the datagrams of one recvmmsg(2) call.
///
/// The call blocks, so a wake-up costs one system call; waiting in epoll(7) or poll(2) would add a
/// second one.
pub struct RecvBatch {
    slots: Box<[Slot; RecvBatch::CAPACITY]>,
    /// [`BUFFER_LEN`] bytes per slot.
    bytes: Box<[u8]>,
    /// Slots that the last call filled.
    count: usize,
    /// Slots that the last call could have filled.
    prepared: usize,
}

#[derive(Default)]
struct Slot {
    from: SockAddr,
    control: Control,
    /// Bytes of payload.
    len: usize,
    /// Bytes of control messages.
    control_len: usize,
}

impl RecvBatch {
    /// Slots filled by one call. With GRO, each may hold many datagrams of one sender.
    pub const CAPACITY: usize = 8;

    /// An empty batch.
    pub fn new() -> Self {
        let bytes = vec![0; Self::CAPACITY * BUFFER_LEN].into_boxed_slice();
        Self { slots: Box::default(), bytes, count: 0, prepared: 0 }
    }

    /// Lets the kernel coalesce consecutive datagrams of one sender (UDP GRO, udp(7)).
    ///
    /// # Errors
    /// If the kernel does not support it.
    pub fn enable_gro(socket: &UdpSocket) -> io::Result<()> {
        // SAFETY: the kernel reads an int for this option (udp(7)).
        unsafe { set_option(socket, libc::SOL_UDP, libc::UDP_GRO, &1) }
    }

    /// Blocks until a datagram arrives, then reads it and the others that are queued.
    ///
    /// # Errors
    /// Those of recvmmsg(2). The batch is empty then.
    pub fn receive(&mut self, socket: &UdpSocket) -> io::Result<()> {
        // Preparing a slot has a cost, so prepare twice the number that the last call filled.
        let prepared = (2 * self.count).clamp(2, Self::CAPACITY);
        (self.count, self.prepared) = (0, prepared);
        // SAFETY: all zeroes are valid for both: integers and null pointers.
        let mut iovecs: [libc::iovec; Self::CAPACITY] = unsafe { mem::zeroed() };
        // SAFETY: zero is a valid value of every field of an `mmsghdr`.
        let mut headers: [libc::mmsghdr; Self::CAPACITY] = unsafe { mem::zeroed() };
        let slots = self.slots.iter_mut().zip(self.bytes.chunks_exact_mut(BUFFER_LEN));
        let slots = headers.iter_mut().zip(&mut iovecs).zip(slots).take(prepared);
        for ((header, iovec), (slot, bytes)) in slots {
            iovec.iov_base = bytes.as_mut_ptr().cast();
            iovec.iov_len = bytes.len();
            let header = &mut header.msg_hdr;
            header.msg_name = (&raw mut slot.from).cast();
            header.msg_namelen = size_of::<SockAddr>() as libc::socklen_t;
            header.msg_iov = iovec;
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut slot.control).cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        // By number: glibc's wrapper is a cancellation point (pthreads(7)), which adds locked
        // instructions around the call.
        // SAFETY: each of the first `prepared` headers points to a name and a control message in
        // its own slot and to its own iovec, with their lengths, and the iovec to its own part of
        // `bytes`. All of them outlive the call, and nothing else refers to them during it.
        let count = unsafe {
            libc::syscall(
                libc::SYS_recvmmsg,
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                prepared as libc::c_uint,
                libc::MSG_WAITFORONE,
                ptr::null_mut::<libc::timespec>(),
            )
        };
        self.count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        for (slot, header) in self.slots.iter_mut().zip(&headers).take(self.count) {
            slot.len = header.msg_len as usize;
            slot.control_len = header.msg_hdr.msg_controllen as _;
        }
        Ok(())
    }

    /// `true` if the last call filled all of its slots, so that more datagrams may be queued. If not, the
    /// call has seen the queue empty.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.count == self.prepared
    }

    /// The datagrams that the last call read, grouped as the kernel coalesced them.
    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = GroDatagrams<'_>> {
        let filled = self.slots.iter().zip(self.bytes.chunks_exact(BUFFER_LEN)).take(self.count);
        filled.map(|(slot, bytes)| {
            let bytes = &bytes[..slot.len.min(bytes.len())];
            GroDatagrams {
                from: &slot.from,
                bytes,
                segment: slot.gro_segment().unwrap_or(bytes.len().max(1)),
            }
        })
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl Slot {
    /// The length in bytes of each coalesced datagram but the last; `None` if the kernel coalesced
    /// none.
    fn gro_segment(&self) -> Option<usize> {
        let Control { head, segment, .. } = &self.control;
        let is_gro = self.control_len >= Control::LEN
            && (head.cmsg_level, head.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO);
        usize::try_from(*segment).ok().filter(|segment| is_gro && *segment > 0)
    }
}

/// Consecutive datagrams of one sender, coalesced by the kernel.
pub struct GroDatagrams<'a> {
    from: &'a SockAddr,
    bytes: &'a [u8],
    /// Bytes of each datagram but the last; never 0.
    segment: usize,
}

impl<'a> GroDatagrams<'a> {
    /// The sender's address.
    #[inline]
    pub fn from(&self) -> Option<SocketAddr> {
        self.from.get()
    }

    /// The datagrams in order of arrival.
    #[inline]
    pub fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks(self.segment)
    }
}

/// The `UDP_GRO` control message (udp(7)), `CMSG_SPACE` of an int.
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    segment: libc::c_int,
    padding: [u8; size_of::<usize>() - size_of::<libc::c_int>()],
}

impl Control {
    /// `CMSG_LEN` of an int.
    const LEN: usize = size_of::<libc::cmsghdr>() + size_of::<libc::c_int>();
}

impl Default for Control {
    fn default() -> Self {
        // SAFETY: all zeroes are valid: integers.
        unsafe { mem::zeroed() }
    }
}

/// The longest datagram in bytes, and the most that the kernel coalesces.
const BUFFER_LEN: usize = u16::MAX as usize;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sendmmsg::set_segment;

    #[test]
    fn control_message_has_the_layout_of_the_kernel() {
        // SAFETY: both only compute.
        let (space, len) = unsafe { (libc::CMSG_SPACE(4), libc::CMSG_LEN(4)) };
        assert_eq!(size_of::<Control>(), space as usize);
        assert_eq!(Control::LEN, len as usize);
        assert_eq!(mem::offset_of!(Control, segment), size_of::<libc::cmsghdr>());
    }

    #[test]
    fn coalesced_datagrams_are_split_again() {
        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let gro = RecvBatch::enable_gro(&receiver).is_ok();
        let to = receiver.local_addr().unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let gso = set_segment(&sender, 100).is_ok();
        let mut batch = RecvBatch::new();
        // Twice, so that leftovers of the first call would show in the second.
        for round in 0..2u8 {
            let contents: Vec<u8> = (0..2050).map(|n| (n / 100) as u8 + round).collect();
            if gso {
                sender.send_to(&contents, to).unwrap();
            } else {
                for datagram in contents.chunks(100) {
                    sender.send_to(datagram, to).unwrap();
                }
            }
            sender.send_to(&[], to).unwrap();
            sender.send_to(&[200 + round], to).unwrap();
            let (mut datagrams, mut groups) = (Vec::new(), 0);
            while datagrams.last().map(Vec::as_slice) != Some(&[200 + round]) {
                batch.receive(&receiver).unwrap();
                for group in batch.iter() {
                    assert_eq!(group.from(), Some(sender.local_addr().unwrap()));
                    datagrams.extend(group.datagrams().map(<[u8]>::to_vec));
                    groups += 1;
                }
            }
            let (last, segments) = datagrams.split_last().unwrap();
            assert_eq!(last, &[200 + round]);
            assert_eq!(segments, contents.chunks(100).collect::<Vec<_>>());
            if gro && gso {
                assert_eq!(groups, 3);
            }
        }
    }

    #[test]
    fn shutting_down_a_socket_ends_blocked_and_later_calls() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let waiting = socket.try_clone().unwrap();
        let (started, starts) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            started.send(()).unwrap();
            let mut batch = RecvBatch::new();
            // The first may already block when the socket shuts down, the second comes later.
            (0..2).for_each(|_| batch.receive(&waiting).unwrap());
        });
        starts.recv().unwrap();
        crate::udp::shutdown_receive(&socket);
        reader.join().unwrap();
    }
}
