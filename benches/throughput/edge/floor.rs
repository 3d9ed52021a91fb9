//! The floor: reads many datagrams per call and counts them.

use std::{
    io::{self, Write},
    mem,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    path::Path,
    ptr,
    time::{Duration, Instant},
};

use downpour_sys::udp;
use quinn_udp::{UdpSockRef, UdpSocketState};

/// Counts the datagrams at `address` until a [`QUESTION`] arrives, then prints the number and returns.
pub fn run(address: SocketAddr) -> io::Result<()> {
    let socket = udp::receiver(address, None, BUFFER)?;
    // Enables UDP_GRO.
    UdpSocketState::new(UdpSockRef::from(&socket))?;
    socket.set_nonblocking(false)?;
    let mut buffers = vec![[0; LARGEST]; BATCH];
    let mut count = 0u64;
    loop {
        let reads = read(&socket, &mut buffers)?;
        for (bytes, &(len, stride)) in buffers.iter().zip(reads.iter().map_while(Option::as_ref)) {
            if &bytes[..len] == QUESTION {
                println!("{count}");
                return io::stdout().flush();
            }
            count += len.div_ceil(stride.max(1)) as u64;
        }
    }
}

/// Waits for one datagram and reads all that are queued. Returns the length of each read and of the
/// datagrams in it.
///
/// quinn-udp's receive function would wait for a full batch, which an edge cannot do.
fn read(
    socket: &UdpSocket,
    buffers: &mut [[u8; LARGEST]],
) -> io::Result<[Option<(usize, usize)>; BATCH]> {
    let mut controls = [[0u64; 8]; BATCH];
    let mut slices: [libc::iovec; BATCH] = std::array::from_fn(|i| libc::iovec {
        iov_base: buffers[i].as_mut_ptr().cast(),
        iov_len: buffers[i].len(),
    });
    // SAFETY: plain data, for which all zeros are valid.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { mem::zeroed() };
    for ((message, slice), control) in messages.iter_mut().zip(&mut slices).zip(&mut controls) {
        message.msg_hdr.msg_iov = slice;
        message.msg_hdr.msg_iovlen = 1;
        message.msg_hdr.msg_control = control.as_mut_ptr().cast();
        message.msg_hdr.msg_controllen = mem::size_of_val(control) as _;
    }
    // SAFETY: the messages point to buffers of the stated lengths, which outlive the call.
    let count = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            BATCH as libc::c_uint,
            libc::MSG_WAITFORONE,
            ptr::null_mut(),
        )
    };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let mut reads = [None; BATCH];
    for (read, message) in reads.iter_mut().zip(&messages).take(count) {
        let len = message.msg_len as usize;
        let mut stride = len;
        // SAFETY: the kernel has written the control messages that the header describes.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(&message.msg_hdr);
            while let Some(head) = control.as_ref() {
                if (head.cmsg_level, head.cmsg_type) == (libc::SOL_UDP, libc::UDP_GRO) {
                    stride = ptr::read_unaligned(libc::CMSG_DATA(control).cast::<i32>()) as usize;
                }
                control = libc::CMSG_NXTHDR(&message.msg_hdr, control);
            }
        }
        *read = Some((len, stride));
    }
    Ok(reads)
}

/// Asks the floor at `address` for the number of datagrams, reads the answer from `log`, and thereby
/// ends the floor.
pub fn ask_count(address: SocketAddr, log: &Path) -> io::Result<u64> {
    let socket = UdpSocket::bind((address.ip(), 0))?;
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        // Fails after the floor has ended.
        let _ = socket.send_to(QUESTION, address);
        std::thread::sleep(Duration::from_millis(100));
        if let Some(count) =
            std::fs::read_to_string(log)?.lines().last().and_then(|line| line.parse().ok())
        {
            return Ok(count);
        }
    }
    Err(io::Error::other("the floor does not answer"))
}

const QUESTION: &[u8] = b"how many";
const BUFFER: usize = 8 << 20;
const BATCH: usize = 32;
/// Maximum length of a GRO read.
const LARGEST: usize = u16::MAX as usize;
const PATIENCE: Duration = Duration::from_secs(5);
