//! RTP sockets of an edge, and the cloud address that each of them probes.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::task::JoinSet;

use super::prober::{ProbeMetrics, Prober};
use crate::address::Destination;
use downpour_repair::{control::Nonce, probe::ProbeMessage};
use downpour_sys::recvmmsg::RecvBatch;

/// A socket on which RTP arrives.
pub struct RtpSocket {
    socket: Arc<UdpSocket>,
    /// `None` where RTP arrives without a request: a multicast group, or an address in the cloud's
    /// configuration.
    probing: Option<Probing>,
}

struct Probing {
    prober: Prober,
    /// Address of the cloud's RTP port on this path, if not the cloud's own.
    via: Option<Destination>,
    /// Resolved address to probe.
    cloud: Option<SocketAddr>,
}

impl RtpSocket {
    /// Wraps a bound, blocking socket.
    pub fn new(socket: UdpSocket) -> Self {
        if let Err(error) = RecvBatch::enable_gro(&socket) {
            tracing::info!(%error, "no UDP GRO; receiving costs more CPU");
        }
        Self { socket: Arc::new(socket), probing: None }
    }

    /// Requests RTP for this socket, as path `path` of this edge, by probing `via` or, if `None`,
    /// the cloud's own address.
    pub fn with_prober(mut self, path: u8, via: Option<Destination>) -> Self {
        self.probing = Some(Probing { prober: Prober::new(path), via, cloud: None });
        self
    }

    /// Returns the socket to read from.
    pub fn socket(&self) -> &Arc<UdpSocket> {
        &self.socket
    }

    /// Records that a datagram arrived.
    pub fn heard(&mut self, now: Instant) {
        if let Some(probing) = &mut self.probing {
            probing.prober.heard(now);
        }
    }

    /// Starts to validate the path, with the nonce of the cloud's welcome. The address is resolved
    /// by `lookups` first.
    pub fn start(&mut self, now: Instant, nonce: Nonce, rtp: &CloudRtp, lookups: &mut Lookups) {
        let Some(probing) = &mut self.probing else { return };
        probing.cloud = None;
        probing.prober.start(now, nonce);
        let (host, port) = match &probing.via {
            Some(via) => (via.host().to_owned(), via.port()),
            None => (rtp.host.clone(), rtp.port),
        };
        let v4_only = self.socket.local_addr().is_ok_and(|addr| addr.is_ipv4());
        let path = probing.prober.path();
        lookups.0.spawn(async move { (path, nonce, look_up(&host, port, v4_only).await) });
    }

    /// Stops to validate the path: the connection to the cloud is gone.
    pub fn stop(&mut self, metrics: &ProbeMetrics) {
        if let Some(probing) = &mut self.probing {
            probing.prober.stop();
            metrics.set_up(&probing.prober);
        }
    }

    /// Sets the resolved address, if this is path `path`.
    pub fn set_cloud(&mut self, path: u8, cloud: SocketAddr) {
        if let Some(probing) = self.probing_of(path) {
            probing.cloud = Some(cloud);
        }
    }

    /// Records that the cloud sends RTP to this socket, if this is path `path`.
    pub fn path_up(&mut self, now: Instant, path: u8, metrics: &ProbeMetrics) {
        if let Some(probing) = self.probing_of(path) {
            probing.prober.path_up(now);
            metrics.set_up(&probing.prober);
        }
    }

    /// Answers a challenge from address `from`.
    pub fn handle_probe_message(
        &self,
        from: SocketAddr,
        message: ProbeMessage,
        metrics: &ProbeMetrics,
    ) {
        let proof = self.probing.as_ref().and_then(|p| p.prober.handle_challenge(message));
        if let Some(proof) = proof {
            self.send(from, proof, metrics);
        }
    }

    /// Sends a probe if one is due.
    pub fn probe(&mut self, now: Instant, metrics: &ProbeMetrics) {
        let Some(probing) = &mut self.probing else { return };
        // First the address: the prober assumes that each probe is sent.
        let Some(cloud) = probing.cloud else { return };
        if let Some(probe) = probing.prober.poll_probe(now) {
            self.send(cloud, probe, metrics);
        }
    }

    /// Logs, once per connection, that the path is not up although it should be.
    pub fn log_if_overdue(&mut self, now: Instant) {
        let Some(probing) = &mut self.probing else { return };
        if probing.prober.is_overdue(now) {
            let path = probing.prober.path();
            match probing.cloud {
                Some(cloud) => tracing::warn!(
                    path, %cloud,
                    "path not up: the cloud does not answer probes; check its address and that its \
                     RTP port is open for UDP"
                ),
                None => tracing::warn!(path, "path not up: the cloud's address is not resolved"),
            }
        }
    }

    /// Returns when the next probe is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let probing = self.probing.as_ref()?;
        probing.cloud.and(probing.prober.poll_timeout())
    }

    fn probing_of(&mut self, path: u8) -> Option<&mut Probing> {
        self.probing.as_mut().filter(|probing| probing.prober.path() == path)
    }

    fn send(&self, to: SocketAddr, message: ProbeMessage, metrics: &ProbeMetrics) {
        // The socket is blocking for its reader; a probe must not block.
        let socket = SockRef::from(&*self.socket);
        let sent = socket.send_to_with_flags(&message.encode(), &to.into(), libc::MSG_DONTWAIT);
        if let Err(error) = &sent {
            tracing::debug!(%to, %error, "probe send failed");
        }
        metrics.count(&message, sent.is_ok());
    }
}

/// The cloud's RTP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudRtp {
    /// Name or address of the cloud.
    pub host: String,
    /// Port in its welcome.
    pub port: u16,
}

/// Look-ups of the cloud's address, each for one path of one connection.
#[derive(Default)]
pub struct Lookups(JoinSet<(u8, Nonce, SocketAddr)>);

impl Lookups {
    /// Returns the next address that is resolved: path, nonce of the connection, address. Pending
    /// if there is no look-up.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(u8, Nonce, SocketAddr)> {
        loop {
            match self.0.poll_join_next(cx) {
                Poll::Ready(Some(Ok(resolved))) => return Poll::Ready(resolved),
                Poll::Ready(Some(Err(error))) => {
                    tracing::error!(%error, "address look-up task failed")
                }
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Cancels all look-ups.
    pub fn clear(&mut self) {
        self.0.abort_all();
        self.0.detach_all();
    }
}

/// Resolves the address of an RTP port. Retries until it succeeds.
async fn look_up(host: &str, port: u16, v4_only: bool) -> SocketAddr {
    let mut last = String::new();
    loop {
        let found = tokio::time::timeout(LOOK_UP_TIMEOUT, tokio::net::lookup_host((host, port)));
        let error = match found.await {
            Ok(Ok(addrs)) => match choose(addrs, v4_only) {
                Some(addr) => return addr,
                None => "no address of the family of udp_addr".into(),
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the DNS server does not answer".to_owned(),
        };
        if error != last {
            tracing::warn!(host, port, error, "cloud's RTP address not resolved; retrying");
            last = error;
        }
        tokio::time::sleep(LOOK_UP_INTERVAL).await;
    }
}

/// Returns an address that the socket can send to. An IPv6 socket reaches IPv4 by mapped addresses
/// (RFC 4291 §2.5.5.2).
fn choose(addrs: impl Iterator<Item = SocketAddr>, v4_only: bool) -> Option<SocketAddr> {
    let mapped = |addr| match addr {
        SocketAddr::V4(v4) if !v4_only => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        addr => addr,
    };
    addrs
        .filter(|addr| addr.is_ipv4() || !v4_only)
        .min_by_key(|addr| addr.is_ipv4() != v4_only)
        .map(mapped)
}

const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);
const LOOK_UP_INTERVAL: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_address_is_reachable_from_the_socket() {
        let [v4, v6] = ["10.0.0.1:5", "[2001:db8::1]:5"].map(|addr| addr.parse().unwrap());
        assert_eq!(choose([v6, v4].into_iter(), true), Some(v4));
        assert_eq!(choose([v4, v6].into_iter(), false), Some(v6));
        assert_eq!(choose([v6].into_iter(), true), None);
        let mapped = "[::ffff:10.0.0.1]:5".parse().unwrap();
        assert_eq!(choose([v4].into_iter(), false), Some(mapped));
    }
}
