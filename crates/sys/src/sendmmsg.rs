//! Sending many datagrams per system call: sendmmsg(2) with UDP GSO, from sockets that may share a
//! port.

use std::{
    io,
    marker::PhantomData,
    mem,
    net::{IpAddr, SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    ptr::NonNull,
    slice,
    time::Duration,
};

use crate::{
    pktinfo::Source,
    sockaddr::{SockAddr, set_option},
};

/// Reusable headers for the messages of one sendmmsg(2) call.
///
/// Each header points to the address, iovec and control message of its slot; these pointers are the
/// same for every call and written once.
pub struct Batch {
    /// Both point to [`CAPACITY`] items, owned by this batch.
    slots: NonNull<Slot>,
    headers: NonNull<libc::mmsghdr>,
    len: usize,
    /// The socket's `UDP_SEGMENT` option in bytes (udp(7)), or 0. A message with this segment needs
    /// no control message, which saves 5 to 8 % of a call.
    default_segment: u16,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        // SAFETY: all zeroes are valid for both: integers, null pointers and empty addresses.
        let (slot, header) = unsafe { (mem::zeroed::<Slot>(), mem::zeroed::<libc::mmsghdr>()) };
        let (slots, headers) = (leak([slot; CAPACITY]), leak([header; CAPACITY]));
        for index in 0..CAPACITY {
            // SAFETY: the index is in bounds, and no other reference exists yet.
            unsafe {
                let slot = slots.add(index).as_ptr();
                (*slot).control.segment.head = libc::cmsghdr {
                    cmsg_len: CONTROL_LEN as _,
                    cmsg_level: libc::SOL_UDP,
                    cmsg_type: libc::UDP_SEGMENT,
                };
                let header = &mut (*headers.add(index).as_ptr()).msg_hdr;
                header.msg_name = (&raw mut (*slot).to).cast();
                header.msg_iov = &raw mut (*slot).bytes;
                header.msg_iovlen = 1;
                header.msg_control = (&raw mut (*slot).control.segment).cast();
            }
        }
        Self { slots, headers, len: 0, default_segment: 0 }
    }

    /// Empties the batch and borrows it for messages that live for `'a`.
    pub fn begin<'a>(&mut self) -> Messages<'_, 'a> {
        self.len = 0;
        Messages { batch: self, bytes: PhantomData }
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        // SAFETY: both come from `leak` with the same number of items, and are not used again.
        unsafe {
            drop(Box::from_raw(self.slots.as_ptr().cast::<[Slot; CAPACITY]>()));
            drop(Box::from_raw(self.headers.as_ptr().cast::<[libc::mmsghdr; CAPACITY]>()));
        }
    }
}

// SAFETY: the batch owns its slots and headers. Pointers to message bytes are followed only in
// `Messages`, whose lifetime keeps the bytes borrowed.
unsafe impl Send for Batch {}

fn leak<T>(items: [T; CAPACITY]) -> NonNull<T> {
    NonNull::from(Box::leak(Box::new(items))).cast()
}

/// The messages of one sendmmsg(2) call, borrowing their bytes.
pub struct Messages<'b, 'a> {
    batch: &'b mut Batch,
    bytes: PhantomData<&'a [u8]>,
}

/// One message: a datagram, or several of the same length for the kernel to segment (UDP GSO).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message<'a> {
    /// The destination.
    pub to: SocketAddr,
    /// The local address to send from, of the family of `to`; `None` lets the routing table choose.
    pub from: Option<IpAddr>,
    /// The payload.
    pub bytes: &'a [u8],
    /// Bytes per datagram, the last one excepted; 0 sends `bytes` as one datagram.
    pub segment: u16,
}

impl<'a> Messages<'_, 'a> {
    /// Adds a message. Returns `false`, without adding it, if the batch is full.
    #[inline]
    pub fn push(&mut self, message: Message<'a>) -> bool {
        let at = self.batch.len;
        if at >= CAPACITY {
            return false;
        }
        // SAFETY: `at` is in bounds, and `&mut self` excludes other references.
        let (slot, header) = unsafe {
            (self.batch.slots.add(at).as_mut(), &mut self.batch.headers.add(at).as_mut().msg_hdr)
        };
        slot.to = message.to.into();
        slot.bytes.iov_base = message.bytes.as_ptr().cast_mut().cast();
        slot.bytes.iov_len = message.bytes.len();
        slot.control.segment.segment = message.segment;
        slot.control.source = Source::new(message.from);
        header.msg_control = slot.control_start();
        header.msg_namelen = match message.to {
            SocketAddr::V4(_) => size_of::<libc::sockaddr_in>(),
            SocketAddr::V6(_) => size_of::<libc::sockaddr_in6>(),
        } as libc::socklen_t;
        header.msg_controllen = control_len(slot, self.batch.default_segment) as _;
        self.batch.len += 1;
        true
    }

    /// The socket's segment as last set with [`Messages::set_default_segment`]; 0 is none.
    #[inline]
    pub fn default_segment(&self) -> u16 {
        self.batch.default_segment
    }

    /// Declares that the socket's own segment is now `segment` bytes ([`set_segment`]), or none if
    /// 0. Messages already in the batch keep their segments.
    pub fn set_default_segment(&mut self, segment: u16) {
        self.batch.default_segment = segment;
        for index in 0..self.batch.len {
            // SAFETY: `index` is in bounds, and `&mut self` excludes other references.
            let (slot, header) = unsafe {
                (self.batch.slots.add(index).as_ref(), self.batch.headers.add(index).as_mut())
            };
            header.msg_hdr.msg_controllen = control_len(slot, segment) as _;
        }
    }

    /// Removes all messages.
    pub fn clear(&mut self) {
        self.batch.len = 0;
    }

    /// Messages in the batch.
    pub fn len(&self) -> usize {
        self.batch.len
    }

    /// `true` if there is no message in the batch.
    pub fn is_empty(&self) -> bool {
        self.batch.len == 0
    }

    /// `true` if the batch takes no further message.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.batch.len == CAPACITY
    }

    /// The message at `index`, if there is one.
    pub fn get(&self, index: usize) -> Option<Message<'a>> {
        let slot = self.slots().get(index)?;
        let libc::iovec { iov_base, iov_len } = slot.bytes;
        // SAFETY: pointer and length come from a slice that lives for 'a.
        let bytes = unsafe { slice::from_raw_parts(iov_base.cast_const().cast(), iov_len) };
        let (from, segment) = (slot.control.source.get(), slot.control.segment.segment);
        Some(Message { to: slot.to.get()?, from, bytes, segment })
    }

    /// Length and segment of each message, in bytes.
    #[inline]
    pub fn lengths(&self) -> impl Iterator<Item = (usize, u16)> {
        self.slots().iter().map(|slot| (slot.bytes.iov_len, slot.control.segment.segment))
    }

    /// Sends the messages from `first` on, without blocking. Returns how many the kernel accepted.
    ///
    /// # Errors
    /// The error of the message at `first`. Nothing has been sent then.
    pub fn send(&mut self, socket: &UdpSocket, first: usize) -> io::Result<usize> {
        let count = self.batch.len.saturating_sub(first);
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: each header points to a name, an iovec and a control message in its own slot,
        // with their lengths, and the iovec to bytes that live for 'a. The kernel writes to the
        // headers only.
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
        // SAFETY: the first `len` slots are initialised and change only through `&mut self`.
        unsafe { slice::from_raw_parts(self.batch.slots.as_ptr(), self.batch.len) }
    }
}

/// Bytes of a slot's control messages. There is none for the segment where the socket's own has the same
/// effect.
#[inline]
fn control_len(slot: &Slot, default_segment: u16) -> usize {
    let segment = slot.control.segment.segment;
    let is_too_short = segment == 0 && slot.bytes.iov_len <= usize::from(default_segment);
    let has_none = segment == default_segment || is_too_short;
    slot.control.source.space() + if has_none { 0 } else { size_of::<SegmentControl>() }
}

/// Sets a socket's own GSO segment: the kernel segments every longer message without a control
/// message into datagrams of `segment` bytes. 0 turns it off.
///
/// # Errors
/// If the kernel does not support it.
pub fn set_segment(socket: &UdpSocket, segment: u16) -> io::Result<()> {
    // SAFETY: the kernel reads an int for this option (udp(7)).
    unsafe { set_option(socket, libc::SOL_UDP, libc::UDP_SEGMENT, &libc::c_int::from(segment)) }
}

/// Blocks until the socket's send buffer has room for a datagram, or until `timeout` has passed.
pub fn wait_writable(socket: &UdpSocket, timeout: Duration) {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    let timeout = libc::c_int::try_from(timeout.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: the call writes to the one pollfd. Its result is ignored: the next send reports
    // errors.
    unsafe { libc::poll(&raw mut poll, 1, timeout) };
}

/// Delivers all datagrams for a shared port (SO_REUSEPORT) to the socket that was bound to it
/// first. `any` is any socket of the group.
///
/// # Errors
/// If the kernel does not support it, or a sandbox forbids it.
pub fn deliver_to_first(any: &UdpSocket) -> io::Result<()> {
    let mut return_0 = [libc::sock_filter { code: libc::BPF_RET as u16, jt: 0, jf: 0, k: 0 }];
    let program = libc::sock_fprog { len: 1, filter: return_0.as_mut_ptr() };
    // SAFETY: the kernel reads a sock_fprog for this option and copies the program, whose length
    // is right.
    unsafe { set_option(any, libc::SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, &program) }
}

#[derive(Clone, Copy)]
struct Slot {
    to: SockAddr,
    bytes: libc::iovec,
    control: Control,
}

impl Slot {
    /// Where the control messages begin.
    #[inline]
    fn control_start(&mut self) -> *mut libc::c_void {
        let space = self.control.source.space();
        let control = &raw mut self.control;
        // SAFETY: the source's message ends where that of the segment begins, and is no longer than the
        // bytes before it.
        unsafe { (&raw mut (*control).segment).cast::<u8>().sub(space).cast() }
    }
}

/// The control messages of a slot. That of the source ends where that of the segment begins, so that
/// the two are one buffer for either family, and each can be left out.
#[derive(Clone, Copy)]
#[repr(C)]
struct Control {
    source: Source,
    segment: SegmentControl,
}

/// The `UDP_SEGMENT` control message (udp(7)), `CMSG_SPACE` of a u16.
#[derive(Clone, Copy)]
#[repr(C)]
struct SegmentControl {
    head: libc::cmsghdr,
    segment: u16,
    padding: [u8; size_of::<usize>() - 2],
}

/// `CMSG_LEN` of a u16.
const CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + size_of::<u16>();
/// Messages per call. More save little, and their headers fall out of the CPU's cache.
const CAPACITY: usize = 64;
/// From Linux's asm-generic/socket.h; the libc crate has it for Android only.
const SO_ATTACH_REUSEPORT_CBPF: libc::c_int = 51;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_holds_and_sends_the_pushed_messages() {
        let (sender, receiver) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let to = receiver.local_addr().unwrap();
        let mut batch = Batch::new();
        let bytes: Vec<u8> = (0..25).collect();
        let mut messages = batch.begin();
        let segmented = Message { to, from: None, bytes: &bytes, segment: 10 };
        let whole = Message { to, from: None, bytes: &bytes[..7], segment: 0 };
        assert!(messages.push(segmented) && messages.push(whole));
        assert_eq!(messages.get(0), Some(segmented));
        assert_eq!(messages.get(1), Some(whole));
        assert_eq!(messages.get(2), None);
        assert_eq!(messages.len(), 2);
        let mut buffer = [0; 100];
        // Starting at the second message, as after a partial send.
        assert_eq!(messages.send(&sender, 1).unwrap(), 1);
        assert_eq!(receiver.recv(&mut buffer).unwrap(), 7);
        assert_eq!(messages.send(&sender, 0).unwrap(), 2);
        let lengths = [(); 4].map(|()| receiver.recv(&mut buffer).unwrap());
        assert_eq!(lengths, [10, 10, 5, 7]);
        assert_eq!(messages.send(&sender, 2).unwrap(), 0);
        messages.clear();
        assert!(messages.is_empty());
        assert_eq!(messages.send(&sender, 0).unwrap(), 0);
        while messages.push(whole) {}
        assert!(messages.is_full());
    }

    #[test]
    fn the_sockets_own_segment_leaves_the_sent_datagrams_unchanged() {
        let (sender, receiver) =
            (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
        receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let to = receiver.local_addr().unwrap();
        let bytes: Vec<u8> = (0..25).collect();
        let mut batch = Batch::new();
        let mut controls = Vec::new();
        // The socket's segment when messages are pushed, and when they are sent.
        for (before, after) in [(0, 0), (0, 10), (10, 10), (10, 12), (12, 0)] {
            set_segment(&sender, after).unwrap();
            let mut messages = batch.begin();
            messages.set_default_segment(before);
            for (len, segment) in [(25, 10), (25, 12), (25, 0), (7, 0), (10, 0)] {
                assert!(messages.push(Message { to, from: None, bytes: &bytes[..len], segment }));
            }
            messages.set_default_segment(after);
            assert_eq!(messages.default_segment(), after);
            assert_eq!(messages.send(&sender, 0).unwrap(), 5);
            let mut buffer = [0; 100];
            let lengths = [(); 9].map(|()| receiver.recv(&mut buffer).unwrap());
            assert_eq!(lengths, [10, 10, 5, 12, 12, 1, 25, 7, 10], "{before}, then {after}");
            // SAFETY: five headers are in use.
            let headers = unsafe { slice::from_raw_parts(batch.headers.as_ptr(), 5) };
            controls
                .push(headers.iter().filter(|header| header.msg_hdr.msg_controllen > 0).count());
        }
        assert_eq!(controls, [2, 2, 2, 2, 2]);
    }

    #[test]
    fn control_message_has_the_layout_of_the_kernel() {
        // SAFETY: both only compute.
        let (space, len) = unsafe { (libc::CMSG_SPACE(2), libc::CMSG_LEN(2)) };
        assert_eq!(size_of::<SegmentControl>(), space as usize);
        assert_eq!(CONTROL_LEN, len as usize);
        assert_eq!(mem::offset_of!(SegmentControl, segment), size_of::<libc::cmsghdr>());
        assert_eq!(mem::offset_of!(Control, segment), size_of::<Source>());
    }

    /// All of 127.0.0.0/8 is local.
    #[test]
    fn messages_leave_from_the_address_that_they_name() {
        for (any, to, sources) in [
            ("0.0.0.0:0", "127.0.0.1:0", &["127.0.0.2", "127.0.0.3"][..]),
            ("[::]:0", "[::1]:0", &["::1"][..]),
        ] {
            let (Ok(sender), Ok(receiver)) = (UdpSocket::bind(any), UdpSocket::bind(to)) else {
                continue;
            };
            receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let (to, bytes) = (receiver.local_addr().unwrap(), [7; 25]);
            let mut batch = Batch::new();
            let mut messages = batch.begin();
            let froms: Vec<Option<IpAddr>> =
                sources.iter().map(|ip| Some(ip.parse().unwrap())).chain([None]).collect();
            for from in &froms {
                for segment in [0, 10] {
                    let message = Message { to, from: *from, bytes: &bytes, segment };
                    assert!(messages.push(message));
                    assert_eq!(messages.get(messages.len() - 1), Some(message));
                }
            }
            let count = messages.len();
            assert_eq!(messages.send(&sender, 0).unwrap(), count);
            let mut buffer = [0; 100];
            for from in froms {
                for length in [25, 10, 10, 5] {
                    let (received, source) = receiver.recv_from(&mut buffer).unwrap();
                    assert_eq!(received, length);
                    assert_eq!(source.ip(), from.unwrap_or(to.ip()));
                }
            }
        }
    }

    #[test]
    fn the_error_of_the_first_message_is_returned() {
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut batch = Batch::new();
        let mut messages = batch.begin();
        let to = "255.255.255.255:9".parse().unwrap();
        messages.push(Message { to, from: None, bytes: &[1], segment: 0 });
        let error = messages.send(&sender, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        wait_writable(&sender, Duration::from_secs(5));
    }
}
