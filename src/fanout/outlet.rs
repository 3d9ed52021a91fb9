//! One socket of the fan-out.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    time::Duration,
};

use quinn_udp::{Transmit, UdpSockRef, UdpSocketState};

use super::{FanoutMetrics, error_label};

/// One socket and what the kernel offers on it.
pub(super) struct Outlet {
    socket: UdpSocket,
    state: UdpSocketState,
    gso: bool,
}

impl Outlet {
    /// Takes a bound socket, which others may read from.
    pub(super) fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // This thread has nothing else to do, so it waits for room, but not for long: the other
        // targets wait too.
        socket.set_nonblocking(false)?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        let gso = state.max_gso_segments() > 1;
        Ok(Self { socket, state, gso })
    }

    pub(super) fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// Sends `bytes` as datagrams of `stride` bytes, the last one shorter. Goes on after a failure,
    /// and gives the last one.
    pub(super) fn send(
        &mut self,
        target: SocketAddr,
        bytes: &[u8],
        stride: usize,
        metrics: &FanoutMetrics,
    ) -> io::Result<()> {
        let mut failure = Ok(());
        let mut rest = bytes;
        while !rest.is_empty() {
            let packets = match self.gso {
                true => self.state.max_gso_segments().min(MAX_GSO_BYTES / stride).max(1),
                false => 1,
            };
            let (train, after) = rest.split_at(rest.len().min(packets * stride));
            let transmit = Transmit {
                destination: target,
                ecn: None,
                contents: train,
                segment_size: (train.len() > stride).then_some(stride),
                src_ip: None,
            };
            match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
                Ok(()) => {
                    metrics.calls.inc();
                    metrics.datagrams.inc_by(train.len().div_ceil(stride) as u64);
                    metrics.bytes.inc_by(train.len() as u64);
                }
                // The kernel or the network card does not segment: from now on one by one.
                Err(error) if transmit.segment_size.is_some() && refuses_offload(&error) => {
                    self.gso = false;
                    tracing::warn!(
                        "UDP segmentation offload is refused ({error}): sending one datagram a call"
                    );
                    metrics.offload.set(0);
                    continue;
                }
                Err(error) => {
                    metrics.errors.with_label_values(&[error_label(&error)]).inc();
                    failure = Err(error);
                }
            }
            rest = after;
        }
        if self.gso {
            metrics.offload.set(1);
        }
        failure
    }
}

fn refuses_offload(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL | libc::ENOTSUP))
}

/// The largest UDP payload of IPv4: what one send with segmentation may carry.
const MAX_GSO_BYTES: usize = 65_507;
const SEND_TIMEOUT: Duration = Duration::from_millis(20);
