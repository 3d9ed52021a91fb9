//! What comes to the port that RTP leaves from.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use bytes::Bytes;

use super::{FanoutMetrics, metrics::Refusal};

/// Takes what comes to the RTP port: from where, and the bytes of one or more datagrams of that
/// sender, one behind the other. What it gives is sent back there, each as one datagram.
pub type OnDatagrams = Arc<dyn Fn(SocketAddr, &[u8]) -> Vec<Bytes> + Send + Sync>;

/// Reads, on a thread of its own, until nobody holds what `alive` watches.
///
/// The socket is the reader's, or all workers' where there is only one. It stays a blocking one.
pub(super) fn spawn<T: Send + Sync + 'static>(
    socket: Arc<UdpSocket>,
    on_datagrams: &OnDatagrams,
    metrics: &FanoutMetrics,
    alive: Weak<T>,
) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(LISTEN_TIMEOUT))?;
    socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
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
    // The longest datagram; the kernel may put several together up to that length (UDP GRO).
    let mut buffer = vec![0; usize::from(u16::MAX)];
    while alive.strong_count() > 0 {
        match socket.recv_from(&mut buffer) {
            Ok((len, from)) => {
                for answer in on_datagrams(from, &buffer[..len]) {
                    if let Err(error) = socket.send_to(&answer, from) {
                        metrics.errors(Refusal::from(&error)).inc();
                    }
                }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN)) => {}
            Err(error) => {
                tracing::debug!(%error, "reading the RTP port");
                thread::sleep(LISTEN_PAUSE);
            }
        }
    }
}

/// How long the last handle may be gone before a thread that waits for datagrams sees it.
const LISTEN_TIMEOUT: Duration = Duration::from_millis(500);
/// Who sends probes asks again.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(20);
/// An error that stays must not turn into a busy loop.
const LISTEN_PAUSE: Duration = Duration::from_millis(10);
