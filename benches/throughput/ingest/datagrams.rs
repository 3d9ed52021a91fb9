//! The bare loop that sends the same datagrams as the cloud, and their receiver.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use downpour_sys::udp;

use super::media::{Media, Timeline};

/// Sends the datagrams of `count` streams to `target` until it is killed: one `sendto` each, once per
/// millisecond all that are due.
pub fn send(target: SocketAddr, count: usize) -> io::Result<()> {
    let media = Media::new()?;
    let packets = media.packets();
    let mut timeline = Timeline::new(&media, count);
    let socket = UdpSocket::bind((target.ip(), 0))?;
    let start = Instant::now();
    let mut now = start;
    loop {
        let due = timeline.next();
        while now < start + due.at {
            std::thread::sleep(TICK);
            now = Instant::now();
        }
        for packet in &packets[due.tag] {
            socket.send_to(packet, target)?;
        }
    }
}

/// Counts the datagrams at `address` and prints the number every [`REPORT`], until it is killed. It
/// polls once per millisecond, so that senders do not pay for waking it.
pub fn receive(address: SocketAddr) -> io::Result<()> {
    let socket = udp::receiver(address, None, BUFFER)?;
    socket.set_nonblocking(true)?;
    let mut buffer = [0; 2048];
    let (mut count, mut report) = (0u64, Instant::now());
    loop {
        while let Ok((_, _)) = socket.recv_from(&mut buffer) {
            count += 1;
        }
        if report.elapsed() >= REPORT {
            println!("{count}");
            report = Instant::now();
        }
        std::thread::sleep(TICK);
    }
}

const TICK: Duration = Duration::from_millis(1);
const REPORT: Duration = Duration::from_millis(100);
const BUFFER: usize = 4 << 20;
