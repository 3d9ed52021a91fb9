//! The sockets that RTP leaves from: one for each worker, all of them on one port.
//!
//! Edges behind a NAT let in only what comes from the port that they have sent to, so all workers must
//! send from it. If they did so from one socket, each datagram would cost them the counters of its
//! memory, which they would take from each other's caches, and a look at who waits for the socket:
//! its reader does. So they have sockets of their own, which share the port (SO_REUSEPORT,
//! socket(7)), and all that comes goes to the first one, which is the reader's.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Arc, atomic::AtomicU64},
};

use quinn_udp::{UdpSockRef, UdpSocketState};
use socket2::SockRef;

use super::Settings;
use downpour_sys::sendmmsg::give_all_to_first;
use downpour_sys::udp::{self, Port};

/// What one worker sends from.
#[derive(Clone)]
pub(super) struct Sockets {
    pub(super) v4: SendSocket,
    /// `None` on a machine without IPv6.
    pub(super) v6: Option<SendSocket>,
}

/// One socket to send from.
#[derive(Clone)]
pub(super) struct SendSocket {
    pub(super) socket: Arc<UdpSocket>,
    /// The most datagrams that the kernel cuts out of one message; 1 is for none.
    pub(super) segments: usize,
    /// Whether only one worker, and nobody else, sends from it.
    pub(super) is_own: bool,
    /// Calls in which the kernel took something, of all workers that send from it.
    pub(super) progress: Arc<AtomicU64>,
}

/// One port of one or both families.
pub(super) struct Ports {
    /// For each worker.
    pub(super) workers: Vec<Sockets>,
    /// Those that what comes to the port is read from.
    pub(super) readers: Vec<Arc<UdpSocket>>,
    pub(super) number: u16,
}

impl Ports {
    /// Takes the RTP port, for so many workers.
    ///
    /// # Errors
    /// If the port is taken or an option is refused.
    pub(super) fn open(settings: &Settings, workers: usize) -> io::Result<Self> {
        let open = |ip: IpAddr, port| Family::open(SocketAddr::new(ip, port), settings, workers);
        let v4 = open(Ipv4Addr::UNSPECIFIED.into(), settings.port)?;
        let number = v4.reader.local_addr()?.port();
        // A machine without IPv6 seldom has IPv6 edges; if it has, that is told when one is sent to.
        let v6 = open(Ipv6Addr::UNSPECIFIED.into(), number).ok();
        let (v6_senders, v6_reader) = v6.map(|v6| (v6.senders, v6.reader)).unzip();
        let mut v6_senders = v6_senders.into_iter().flatten();
        let workers = v4.senders.into_iter().map(|v4| Sockets { v4, v6: v6_senders.next() });
        let readers = [v4.reader].into_iter().chain(v6_reader);
        Ok(Self { workers: workers.collect(), readers: readers.collect(), number })
    }
}

/// Of IPv4 or IPv6.
struct Family {
    senders: Vec<SendSocket>,
    reader: Arc<UdpSocket>,
}

impl Family {
    fn open(addr: SocketAddr, settings: &Settings, workers: usize) -> io::Result<Self> {
        let (buffer, multicast) = (settings.send_buffer, settings.multicast);
        // What the kernel holds is late, and is counted by nobody: not that much for each of many.
        let share = (buffer / workers.max(1)).max(LEAST_SEND_BUFFER.min(buffer));
        // That port is taken first, by itself: what is taken already must not be shared.
        let reader = udp::sender(addr, Port::Own, buffer, multicast)?;
        let addr = reader.local_addr()?;
        let prepare = |socket: UdpSocket| -> io::Result<_> {
            let segments = match settings.segmentation {
                true => UdpSocketState::new(UdpSockRef::from(&socket))?.max_gso_segments(),
                false => 1,
            };
            let (socket, progress) = (Arc::new(socket), Arc::default());
            Ok(SendSocket { socket, segments, is_own: true, progress })
        };
        let own = || -> io::Result<Vec<_>> {
            SockRef::from(&reader).set_reuse_port(true)?;
            let open = |_| prepare(udp::sender(addr, Port::Shared, share, multicast)?);
            let senders = (0..workers).map(open).collect::<io::Result<_>>()?;
            give_all_to_first(&reader)?;
            Ok(senders)
        };
        match own() {
            Ok(senders) => Ok(Self { senders, reader: Arc::new(reader) }),
            Err(error) => {
                // A sandbox may not have it.
                tracing::info!("workers send RTP from one socket, at more cost: {error}");
                // If not even that could be set, this cannot either, and need not be.
                let _ = SockRef::from(&reader).set_reuse_port(false);
                let sender = SendSocket { is_own: false, ..prepare(reader)? };
                let reader = sender.socket.clone();
                Ok(Self { senders: vec![sender; workers], reader })
            }
        }
    }
}

/// Bytes: some twenty of the longest trains.
const LEAST_SEND_BUFFER: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_worker_has_a_socket_of_its_own_and_the_reader_another() {
        let ports = Ports::open(&Settings { port: 0, ..Settings::default() }, 3).unwrap();
        let senders = ports.workers.iter().map(|sockets| &sockets.v4.socket);
        let mut all: Vec<_> = senders.chain(&ports.readers[..1]).map(Arc::as_ptr).collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 4);
        for sockets in &ports.workers {
            assert_eq!(sockets.v4.socket.local_addr().unwrap().port(), ports.number);
        }
    }
}
