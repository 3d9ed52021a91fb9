//! System calls that the standard library does not have: many datagrams with one call, and one port
//! for many sockets.

use std::{
    io,
    marker::PhantomData,
    mem,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    ptr::NonNull,
    slice,
    time::Duration,
};

use crate::sockaddr::{SockAddr, set_option};

/// Room for the messages of one `sendmmsg` call, to be used again and again.
///
/// What is the same for all messages is written once: where each header finds its address, its bytes
/// and its control message.
pub struct Batch {
    /// Both have [`CAPACITY`] items, and are this batch's own.
    slots: NonNull<Slot>,
    headers: NonNull<libc::mmsghdr>,
    len: usize,
    /// What the socket cuts into where a message says nothing (`UDP_SEGMENT` as an option, udp(7)), or
    /// 0: messages that want that have no control message, which saves 5 to 8 % of a call.
    default_segment: u16,
}

impl Batch {
    pub fn new() -> Self {
        // SAFETY: of both, all zeroes are a value: integers, null pointers and empty addresses.
        let (slot, header) = unsafe { (mem::zeroed::<Slot>(), mem::zeroed::<libc::mmsghdr>()) };
        let (slots, headers) = (leak([slot; CAPACITY]), leak([header; CAPACITY]));
        for index in 0..CAPACITY {
            // SAFETY: it is one of the items, and nobody else knows of them yet.
            unsafe {
                let slot = slots.add(index).as_ptr();
                (*slot).control.head = libc::cmsghdr {
                    cmsg_len: CONTROL_LEN as _,
                    cmsg_level: libc::SOL_UDP,
                    cmsg_type: libc::UDP_SEGMENT,
                };
                let header = &mut (*headers.add(index).as_ptr()).msg_hdr;
                header.msg_name = (&raw mut (*slot).to).cast();
                header.msg_iov = &raw mut (*slot).bytes;
                header.msg_iovlen = 1;
                header.msg_control = (&raw mut (*slot).control).cast();
            }
        }
        Self { slots, headers, len: 0, default_segment: 0 }
    }

    /// An empty batch for messages that live for `'a`.
    pub fn begin<'a>(&mut self) -> Messages<'_, 'a> {
        self.len = 0;
        Messages { batch: self, bytes: PhantomData }
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // SAFETY: they come from `leak`, with as many items, and nobody uses them after this.
        unsafe {
            drop(Box::from_raw(self.slots.as_ptr().cast::<[Slot; CAPACITY]>()));
            drop(Box::from_raw(self.headers.as_ptr().cast::<[libc::mmsghdr; CAPACITY]>()));
        }
    }
}

// SAFETY: nobody else has its pointers. Those to messages are followed only in `Messages`, whose
// lifetime holds what they point to.
unsafe impl Send for Batch {}

fn leak<T>(items: [T; CAPACITY]) -> NonNull<T> {
    NonNull::from(Box::leak(Box::new(items))).cast()
}

/// Messages of one call, and the bytes that they borrow.
pub struct Messages<'b, 'a> {
    batch: &'b mut Batch,
    bytes: PhantomData<&'a [u8]>,
}

/// One message as it was pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    pub to: SocketAddr,
    pub bytes: &'a [u8],
    /// Bytes of each datagram that the kernel is to cut it into; 0 is one datagram.
    pub segment: u16,
}

impl<'a> Messages<'_, 'a> {
    /// Adds a message; those over the batch's capacity are left out, and `false`.
    #[inline]
    pub fn push(&mut self, message: Message<'a>) -> bool {
        let at = self.batch.len;
        if at >= CAPACITY {
            return false;
        }
        // SAFETY: it is one of the items, and this has the batch for itself.
        let (slot, header) = unsafe {
            (self.batch.slots.add(at).as_mut(), &mut self.batch.headers.add(at).as_mut().msg_hdr)
        };
        slot.to = message.to.into();
        slot.bytes.iov_base = message.bytes.as_ptr().cast_mut().cast();
        slot.bytes.iov_len = message.bytes.len();
        slot.control.segment = message.segment;
        header.msg_namelen = match message.to {
            SocketAddr::V4(_) => size_of::<libc::sockaddr_in>(),
            SocketAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
        } as libc::socklen_t;
        header.msg_controllen = control_len(slot, self.batch.default_segment) as _;
        self.batch.len += 1;
        true
    }

    /// What the socket was said to cut into by itself, or 0.
    #[inline]
    pub fn default_segment(&self) -> u16 {
        self.batch.default_segment
    }

    /// Says that the socket cuts into `segment` bytes by itself from now on, or not at all if that is
    /// 0. What becomes of these messages stays the same.
    pub fn set_default_segment(&mut self, segment: u16) {
        self.batch.default_segment = segment;
        for index in 0..self.batch.len {
            // SAFETY: it is one of the items, and this has the batch for itself.
            let (slot, header) = unsafe {
                (self.batch.slots.add(index).as_ref(), self.batch.headers.add(index).as_mut())
            };
            header.msg_hdr.msg_controllen = control_len(slot, segment) as _;
        }
    }

    /// Takes all messages out.
    pub fn clear(&mut self) {
        self.batch.len = 0;
    }

    pub fn len(&self) -> usize {
        self.batch.len
    }

    #[inline]
    pub fn is_full(&self) -> bool {
        self.batch.len == CAPACITY
    }

    /// The message at `index`.
    pub fn get(&self, index: usize) -> Option<Message<'a>> {
        let slot = self.slots().get(index)?;
        let libc::iovec { iov_base, iov_len } = slot.bytes;
        // SAFETY: they come from a slice that lives for 'a.
        let bytes = unsafe { slice::from_raw_parts(iov_base.cast_const().cast(), iov_len) };
        Some(Message { to: slot.to.get()?, bytes, segment: slot.control.segment })
    }

    /// The length and the segment of each message.
    #[inline]
    pub fn lengths(&self) -> impl Iterator<Item = (usize, u16)> {
        self.slots().iter().map(|slot| (slot.bytes.iov_len, slot.control.segment))
    }

    /// Sends the messages from `first` on, without waiting; says how many of them the kernel took.
    ///
    /// # Errors
    /// What is wrong with the one at `first`. None has gone then.
    pub fn send(&mut self, socket: &UdpSocket, first: usize) -> io::Result<usize> {
        let count = self.batch.len.saturating_sub(first);
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: each of the headers points to a name, an iovec and a control message in its own
        // slot, of the lengths that it gives, and the iovec to bytes that live for 'a. The kernel
        // writes to the headers only.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.batch.headers.add(first).as_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    fn slots(&self) -> &[Slot] {
        // SAFETY: so many are there and in use, and they change only with `&mut self`.
        unsafe { slice::from_raw_parts(self.batch.slots.as_ptr(), self.batch.len) }
    }
}

/// Bytes of a slot's control message, which the kernel need not read where the socket does by itself
/// what it says.
#[inline]
fn control_len(slot: &Slot, default_segment: u16) -> usize {
    let segment = slot.control.segment;
    let is_too_short = segment == 0 && slot.bytes.iov_len <= usize::from(default_segment);
    if segment == default_segment || is_too_short { 0 } else { size_of::<Control>() }
}

/// Has a socket cut every longer message into datagrams of `segment` bytes, or none if that is 0.
///
/// # Errors
/// If the kernel cannot.
pub fn set_segment(socket: &UdpSocket, segment: u16) -> io::Result<()> {
    // SAFETY: it is a number, which the kernel reads as an int (udp(7)).
    unsafe { set_option(socket, libc::SOL_UDP, libc::UDP_SEGMENT, &libc::c_int::from(segment)) }
}

/// Waits until a socket has room for a datagram, or until `timeout` is over.
pub fn wait_for_room(socket: &UdpSocket, timeout: Duration) {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let timeout = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: it writes to the one pollfd that it is given. Whatever it says, sending says more.
    unsafe { libc::poll(&raw mut poll, 1, timeout) };
}

/// Of all sockets that share a port, `any` among them, the one that had it first gets what comes.
///
/// # Errors
/// If the kernel does not know of that, or a sandbox has none of it.
pub fn give_all_to_first(any: &UdpSocket) -> io::Result<()> {
    let mut first = [libc::sock_filter { code: libc::BPF_RET as u16, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: first.as_mut_ptr() };
    // SAFETY: it is a program of the length that it gives, which the kernel copies.
    unsafe { set_option(any, libc::SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program) }
}

#[derive(Clone, Copy)]
struct Slot {
    to: SockAddr,
    bytes: libc::iovec,
    control: Control,
}

/// `UDP_SEGMENT` as a control message (udp(7)): `CMSG_SPACE` of a u16.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    head: libc::cmsghdr,
    segment: u16,
    padding: [u8; size_of::<usize>() - 2],
}

/// `CMSG_LEN` of a u16.
const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + size_of::<u16>();
/// Messages of one call: as many as a chunk of targets has. More save little and leave the cache.
const CAPACITY: usize = 64;
/// As in Linux's asm-generic/socket.h; libc has it for Android only.
const SO_ATTACH_REUSEPORT_CBPF: libc::c_int = 51;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_pushed_is_what_it_holds_and_sends() {
        let (sender, receiver) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let to = receiver.local_addr().unwrap();
        let mut batch = Batch::new();
        let bytes: Vec<u8> = (0..25).collect();
        let mut messages = batch.begin();
        let cut = Message { to, bytes: &bytes, segment: 10 };
        let whole = Message { to, bytes: &bytes[..7], segment: 0 };
        assert!(messages.push(cut) && messages.push(whole));
        assert_eq!((messages.get(0), messages.get(1)), (Some(cut), Some(whole)));
        assert_eq!((messages.len(), messages.get(2)), (2, None));
        let mut buffer = [0; 100];
        // From the second on, first: a partial send goes on like this.
        assert_eq!(messages.send(&sender, 1).unwrap(), 1);
        assert_eq!(receiver.recv(&mut buffer).unwrap(), 7);
        assert_eq!(messages.send(&sender, 0).unwrap(), 2);
        let lengths = [(); 4].map(|()| receiver.recv(&mut buffer).unwrap());
        assert_eq!(lengths, [10, 10, 5, 7]);
        assert_eq!(messages.send(&sender, 2).unwrap(), 0);
        messages.clear();
        assert_eq!((messages.len(), messages.send(&sender, 0).unwrap()), (0, 0));
        while messages.push(whole) {}
        assert!(messages.is_full());
    }

    #[test]
    fn what_the_socket_cuts_by_itself_changes_nothing_of_what_leaves() {
        let (sender, receiver) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let to = receiver.local_addr().unwrap();
        let bytes: Vec<u8> = (0..25).collect();
        let mut batch = Batch::new();
        let mut controls = Vec::new();
        // Pushed before it is set and after it, to one that cuts and one that no longer does.
        for (before, after) in [(0, 0), (0, 10), (10, 10), (10, 12), (12, 0)] {
            set_segment(&sender, after).unwrap();
            let mut messages = batch.begin();
            messages.set_default_segment(before);
            for (len, segment) in [(25, 10), (25, 12), (25, 0), (7, 0), (10, 0)] {
                assert!(messages.push(Message { to, bytes: &bytes[..len], segment }));
            }
            messages.set_default_segment(after);
            assert_eq!(messages.default_segment(), after);
            assert_eq!(messages.send(&sender, 0).unwrap(), 5);
            let mut buffer = [0; 100];
            let lengths = [(); 9].map(|()| receiver.recv(&mut buffer).unwrap());
            assert_eq!(lengths, [10, 10, 5, 12, 12, 1, 25, 7, 10], "{before}, then {after}");
            // SAFETY: so many headers were filled.
            let headers = unsafe { slice::from_raw_parts(batch.headers.as_ptr(), 5) };
            controls
                .push(headers.iter().filter(|header| header.msg_hdr.msg_controllen > 0).count());
        }
        assert_eq!(controls, [2, 2, 2, 2, 2]);
    }

    #[test]
    fn its_control_message_is_laid_out_as_the_kernel_reads_it() {
        // SAFETY: they compute.
        let (space, len) = unsafe { (libc::CMSG_SPACE(2), libc::CMSG_LEN(2)) };
        assert_eq!((size_of::<Control>(), CONTROL_LEN), (space as usize, len as usize));
        assert_eq!(mem::offset_of!(Control, segment), size_of::<libc::cmsghdr>());
    }

    #[test]
    fn an_error_is_that_of_the_first_and_takes_nothing_with_it() {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut batch = Batch::new();
        let mut messages = batch.begin();
        let to = "255.255.255.255:9".parse().unwrap();
        messages.push(Message { to, bytes: &[1], segment: 0 });
        let error = messages.send(&sender, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        wait_for_room(&sender, Duration::from_secs(5));
    }
}
