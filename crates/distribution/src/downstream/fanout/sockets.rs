//! The sockets of the RTP port: one per worker and address family, and one reader per family.
//!
//! A NAT lets packets in only from the port that the edge behind it has sent to, so all workers send
//! from one port. With one shared socket, the workers would contend for the cache lines of its memory
//! counters, and each datagram would check the socket's wait queue, where the reader waits. So each
//! worker has a socket, all of them share the port (SO_REUSEPORT, socket(7)), and everything that
//! arrives goes to the first socket of the port: the reader's.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    sync::{Arc, atomic::AtomicU64},
};

use quinn_udp::{UdpSockRef, UdpSocketState};
use socket2::SockRef;

use super::Settings;
use downpour_sys::sendmmsg::deliver_to_first;
use downpour_sys::udp::{self, Port};

/// The sockets of one worker.
#[derive(Clone)]
pub(super) struct WorkerSockets {
    pub(super) v4: WorkerSocket,
    /// `None` on a machine without IPv6.
    pub(super) v6: Option<WorkerSocket>,
}

/// A socket that a worker sends from.
#[derive(Clone)]
pub(super) struct WorkerSocket {
    pub(super) socket: Arc<UdpSocket>,
    /// Most datagrams that the kernel splits one message into; 1 without GSO.
    pub(super) max_segments: usize,
    /// `true` if only this worker sends from the socket.
    pub(super) is_exclusive: bool,
    /// Count of successful send calls on the socket, by all workers that share it.
    pub(super) progress: Arc<AtomicU64>,
}

/// The RTP port: IPv4, and IPv6 where the machine has it.
pub(super) struct Ports {
    /// One item per worker.
    pub(super) workers: Vec<WorkerSockets>,
    /// The sockets that receive what arrives at the port, one per family.
    pub(super) readers: Vec<Arc<UdpSocket>>,
    pub(super) number: u16,
}

impl Ports {
    /// Binds the RTP port for `workers` workers.
    ///
    /// # Errors
    /// If the port is taken or an option is refused.
    pub(super) fn open(settings: &Settings, workers: usize) -> io::Result<Self> {
        let open = |ip: IpAddr, port| Family::open(SocketAddr::new(ip, port), settings, workers);
        let v4 = open(Ipv4Addr::UNSPECIFIED.into(), settings.port)?;
        let number = v4.reader.local_addr()?.port();
        // Without IPv6 the fan-out starts all the same; the first send to an IPv6 target logs a warning.
        let v6 = open(Ipv6Addr::UNSPECIFIED.into(), number).ok();
        let (v6_senders, v6_reader) = v6.map(|v6| (v6.senders, v6.reader)).unzip();
        let mut v6_senders = v6_senders.into_iter().flatten();
        let workers = v4.senders.into_iter().map(|v4| WorkerSockets { v4, v6: v6_senders.next() });
        let readers = [v4.reader].into_iter().chain(v6_reader);
        Ok(Self { workers: workers.collect(), readers: readers.collect(), number })
    }
}

/// The sockets of one address family.
struct Family {
    senders: Vec<WorkerSocket>,
    reader: Arc<UdpSocket>,
}

impl Family {
    fn open(addr: SocketAddr, settings: &Settings, workers: usize) -> io::Result<Self> {
        let (buffer, multicast) = (settings.send_buffer, settings.multicast);
        // Packets in a send buffer are late and appear in no metric, so the workers share its size.
        let share = (buffer / workers.max(1)).max(MIN_SEND_BUFFER.min(buffer));
        // The reader binds without SO_REUSEPORT, so that a port of another process is never shared.
        let reader = udp::sender(addr, Port::Own, buffer, multicast)?;
        let addr = reader.local_addr()?;
        let prepare = |socket: UdpSocket| -> io::Result<_> {
            let max_segments = match settings.segmentation {
                true => UdpSocketState::new(UdpSockRef::from(&socket))?.max_gso_segments(),
                false => 1,
            };
            let (socket, progress) = (Arc::new(socket), Arc::default());
            Ok(WorkerSocket { socket, max_segments, is_exclusive: true, progress })
        };
        let exclusive = || -> io::Result<Vec<_>> {
            SockRef::from(&reader).set_reuse_port(true)?;
            let open = |_| prepare(udp::sender(addr, Port::Shared, share, multicast)?);
            let senders = (0..workers).map(open).collect::<io::Result<_>>()?;
            deliver_to_first(&reader)?;
            Ok(senders)
        };
        match exclusive() {
            Ok(senders) => Ok(Self { senders, reader: Arc::new(reader) }),
            Err(error) => {
                // A sandbox may lack SO_REUSEPORT or the socket filter.
                tracing::info!(%error, "RTP port cannot be shared; workers send from one socket, which costs more CPU");
                // Fails only if setting it failed too.
                let _ = SockRef::from(&reader).set_reuse_port(false);
                let sender = WorkerSocket { is_exclusive: false, ..prepare(reader)? };
                let reader = sender.socket.clone();
                Ok(Self { senders: vec![sender; workers], reader })
            }
        }
    }
}

/// Smallest send buffer of a worker in bytes: about twenty of the longest trains.
const MIN_SEND_BUFFER: usize = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_and_reader_have_separate_sockets_on_one_port() {
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
