//! Threads that read the RTP port and answer the probes that arrive there.

use std::{
    io,
    net::UdpSocket,
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use bytes::Bytes;

use super::{FanoutMetrics, metrics::SendErrorKind};
use crate::downstream::routes::Target;
use downpour_sys::pktinfo;

/// Callback for datagrams that arrive at the RTP port. Its arguments are the sender's address, with the
/// local address that it sent to, and the bytes of one or more datagrams of that sender, back to back
/// (UDP GRO). Each returned buffer is sent back to the sender as one datagram, from that address.
pub type OnDatagrams = Arc<dyn Fn(Target, &[u8]) -> Vec<Bytes> + Send + Sync>;

/// Starts a thread that reads `socket` until the last owner of `alive` is gone.
///
/// The socket stays in blocking mode. Workers send from it too if they have no sockets of their own.
pub(super) fn spawn<T: Send + Sync + 'static>(
    socket: Arc<UdpSocket>,
    on_datagrams: &OnDatagrams,
    metrics: &FanoutMetrics,
    alive: Weak<T>,
) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(READ_TIMEOUT))?;
    if let Err(error) = pktinfo::enable(&socket) {
        tracing::info!(%error, "local addresses of probes unknown; answers leave from the default one");
    }
    let (on_datagrams, metrics) = (on_datagrams.clone(), metrics.clone());
    let thread = thread::Builder::new().name("rtp-port".into());
    thread.spawn(move || listen(&socket, &on_datagrams, &metrics, &alive)).map(drop)
}

fn listen<T>(
    socket: &UdpSocket,
    on_datagrams: &OnDatagrams,
    metrics: &FanoutMetrics,
    alive: &Weak<T>,
) {
    // The kernel joins datagrams of one sender up to the largest UDP payload (UDP GRO).
    let mut buffer = vec![0; usize::from(u16::MAX)];
    while alive.strong_count() > 0 {
        match pktinfo::receive(socket, &mut buffer) {
            Ok((len, addr, from)) => {
                for answer in on_datagrams(Target { addr, from }, &buffer[..len]) {
                    // One that the kernel does not take at once is lost; the edge repeats its probe.
                    if let Err(error) = pktinfo::send(socket, &answer, addr, from) {
                        metrics.errors(SendErrorKind::from(&error)).inc();
                    }
                }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN)) => {}
            Err(error) => {
                tracing::debug!(%error, "RTP port read failed");
                thread::sleep(ERROR_PAUSE);
            }
        }
    }
}

/// Interval at which a reader without datagrams checks whether the fan-out still exists.
const READ_TIMEOUT: Duration = Duration::from_millis(500);
/// Wait after an error, so that a lasting error does not become a busy loop.
const ERROR_PAUSE: Duration = Duration::from_millis(10);
