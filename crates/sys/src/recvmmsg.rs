//! Many datagrams with one call of recvmmsg(2), which waits for the first of them.

use std::{
    io, mem,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    ptr,
};

use crate::sockaddr::{SockAddr, set_option};

/// Room for the datagrams of one call, to be used again and again.
///
/// The calls wait, so that a socket costs one of them for each time that it is woken: waiting in
/// epoll(7) or poll(2) would be another.
pub struct RecvBatch {
    slots: Box<[Slot; RecvBatch::MOST]>,
    /// As many places of [`LONGEST`] as there are slots.
    bytes: Box<[u8]>,
    /// How many the last call filled.
    count: usize,
}

#[derive(Default)]
struct Slot {
    from: SockAddr,
    control: Control,
    /// Bytes that were read, and of control messages.
    len: usize,
    control_len: usize,
}

impl RecvBatch {
    /// Reads of one call, each of which may hold many datagrams of one sender.
    pub const MOST: usize = 8;

    /// Nothing is read yet.
    pub fn new() -> Self {
        let bytes = vec![0; Self::MOST * LONGEST].into_boxed_slice();
        Self { slots: Box::default(), bytes, count: 0 }
    }

    /// Has the kernel put datagrams of one sender together, as many as it has (UDP GRO).
    ///
    /// # Errors
    /// If the kernel cannot do that.
    pub fn let_join(socket: &UdpSocket) -> io::Result<()> {
        // SAFETY: it is a switch, which the kernel reads as an int (udp(7)).
        unsafe { set_option(socket, libc::SOL_UDP, libc::UDP_GRO, &1) }
    }

    /// Waits for a datagram, and takes what else is there.
    ///
    /// # Errors
    /// As recvmmsg(2). Nothing has been read then.
    pub fn wait(&mut self, socket: &UdpSocket) -> io::Result<()> {
        // Twice what came last is enough, and to prepare for all of it takes long.
        let most = (2 * self.count).clamp(2, Self::MOST);
        self.count = 0;
        // SAFETY: all zeroes are a value of both: integers and null pointers.
        let mut iovecs: [libc::iovec; Self::MOST] = unsafe { mem::zeroed() };
        let mut headers: [libc::mmsghdr; Self::MOST] = unsafe { mem::zeroed() };
        let room = self.slots.iter_mut().zip(self.bytes.chunks_exact_mut(LONGEST));
        let room = headers.iter_mut().zip(&mut iovecs).zip(room).take(most);
        for ((header, iovec), (slot, bytes)) in room {
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
        // By its number: glibc's recvmmsg is a cancellation point (pthreads(7)), which sets and takes back
        // a flag with locked instructions around the call.
        // SAFETY: each of the first `most` headers points to a name and a control message in its own
        // slot and to an iovec, of the lengths that it gives, and the iovec to its own part of
        // `bytes`. All of them outlive the call, and nothing else refers to them meanwhile.
        let count = unsafe {
            libc::syscall(
                libc::SYS_recvmmsg,
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                most as libc::c_uint,
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

    /// What the last call read: of each sender some datagrams, one behind the other.
    pub fn trains(&self) -> impl Iterator<Item = GroDatagrams<'_>> {
        let reads = self.slots.iter().zip(self.bytes.chunks_exact(LONGEST)).take(self.count);
        reads.map(|(slot, bytes)| {
            let bytes = &bytes[..slot.len.min(bytes.len())];
            GroDatagrams {
                from: &slot.from,
                bytes,
                stride: slot.stride().unwrap_or(bytes.len().max(1)),
            }
        })
    }
}

impl Slot {
    /// Bytes from one datagram to the next, where the kernel put some together.
    fn stride(&self) -> Option<usize> {
        let Control { head, stride, .. } = &self.control;
        let is_there = self.control_len >= Control::LEN
            && (head.cmsg_level, head.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO);
        usize::try_from(*stride).ok().filter(|stride| is_there && *stride > 0)
    }
}

/// Datagrams of one sender.
pub struct GroDatagrams<'a> {
    from: &'a SockAddr,
    bytes: &'a [u8],
    stride: usize,
}

impl<'a> GroDatagrams<'a> {
    /// Who sent them.
    pub fn from(&self) -> Option<SocketAddr> {
        self.from.get()
    }

    /// Each of them.
    pub fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks(self.stride)
    }
}

/// `UDP_GRO` as a control message (udp(7)): `CMSG_SPACE` of an int.
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    stride: libc::c_int,
    padding: [u8; size_of::<usize>() - size_of::<libc::c_int>()],
}

impl Control {
    /// `CMSG_LEN` of an int.
    const LEN: usize = size_of::<libc::cmsghdr>() + size_of::<libc::c_int>();
}

impl Default for Control {
    fn default() -> Self {
        // SAFETY: all zeroes are a value of it: integers.
        unsafe { mem::zeroed() }
    }
}

/// The longest datagram, which is also what the kernel puts together at most.
const LONGEST: usize = u16::MAX as usize;

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn its_control_message_is_laid_out_as_the_kernel_writes_it() {
        // SAFETY: they compute.
        let (space, len) = unsafe { (libc::CMSG_SPACE(4), libc::CMSG_LEN(4)) };
        assert_eq!((size_of::<Control>(), Control::LEN), (space as usize, len as usize));
        assert_eq!(mem::offset_of!(Control, stride), size_of::<libc::cmsghdr>());
    }

    #[test]
    fn reads_are_taken_apart_into_datagrams() {
        use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};

        let receiver = UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let joins = RecvBatch::let_join(&receiver).is_ok();
        let to = receiver.local_addr().unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let state = UdpSocketState::new(UdpSockRef::from(&sender)).unwrap();
        let mut reads = RecvBatch::new();
        // Twice, so that what the first call left does not show in the second.
        for round in 0..2u8 {
            let contents: Vec<u8> = (0..2050).map(|n| (n / 100) as u8 + round).collect();
            let segment_size = (state.max_gso_segments() > 1).then_some(100);
            if segment_size.is_some() {
                let train = Transmit {
                    destination: to,
                    ecn: None,
                    contents: &contents,
                    segment_size,
                    src_ip: None,
                };
                state.try_send(UdpSockRef::from(&sender), &train).unwrap();
            } else {
                for datagram in contents.chunks(100) {
                    sender.send_to(datagram, to).unwrap();
                }
            }
            sender.send_to(&[], to).unwrap();
            sender.send_to(&[200 + round], to).unwrap();
            let (mut datagrams, mut trains) = (Vec::new(), 0);
            while datagrams.last().map(Vec::as_slice) != Some(&[200 + round]) {
                reads.wait(&receiver).unwrap();
                for train in reads.trains() {
                    assert_eq!(train.from(), Some(sender.local_addr().unwrap()));
                    datagrams.extend(train.datagrams().map(<[u8]>::to_vec));
                    trains += 1;
                }
            }
            let (last, train) = datagrams.split_last().unwrap();
            assert_eq!(last, &[200 + round]);
            assert_eq!(train, contents.chunks(100).collect::<Vec<_>>());
            assert!(!(joins && segment_size.is_some()) || trains == 3, "{trains}");
        }
    }

    #[test]
    fn a_socket_that_is_shut_down_ends_the_wait() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let waiting = socket.try_clone().unwrap();
        let (began, begins) = std::sync::mpsc::channel();
        let waits = std::thread::spawn(move || {
            began.send(()).unwrap();
            let mut reads = RecvBatch::new();
            // Both a call that waits already and one that comes later.
            (0..2).for_each(|_| reads.wait(&waiting).unwrap());
        });
        begins.recv().unwrap();
        crate::udp::end_waits(&socket);
        waits.join().unwrap();
    }
}
