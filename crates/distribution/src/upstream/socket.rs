//! The edge's RTP sockets, and which address of the cloud each one probes.

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

/// One way by which RTP comes.
pub struct RtpSocket {
    socket: Arc<UdpSocket>,
    /// `None` where RTP comes unasked: a group, or an address that the cloud has in its list.
    probing: Option<Probing>,
}

struct Probing {
    prober: Prober,
    /// Where the cloud's RTP port is reached by this path, if not where the cloud is.
    via: Option<Destination>,
    cloud: Option<SocketAddr>,
}

impl RtpSocket {
    /// Takes a bound socket, one that waits.
    pub fn new(socket: UdpSocket) -> Self {
        // Without, it costs more.
        if let Err(error) = RecvBatch::let_join(&socket) {
            tracing::info!("the kernel gives RTP packet by packet, at more cost: {error}");
        }
        Self { socket: Arc::new(socket), probing: None }
    }

    /// Asks the cloud to send RTP here, as the edge's path number `path`: at the address `via`, or
    /// at the cloud's own.
    pub fn with_prober(mut self, path: u8, via: Option<Destination>) -> Self {
        self.probing = Some(Probing { prober: Prober::new(path), via, cloud: None });
        self
    }

    /// The socket, to read from.
    pub fn socket(&self) -> &Arc<UdpSocket> {
        &self.socket
    }

    /// Something came at `now`.
    pub fn heard(&mut self, now: Instant) {
        if let Some(probing) = &mut self.probing {
            probing.prober.heard(now);
        }
    }

    /// The cloud said welcome: it is to be probed where `found` says, once that is known.
    pub fn start(&mut self, now: Instant, nonce: Nonce, welcome: &CloudRtp, found: &mut Lookups) {
        let Some(probing) = &mut self.probing else { return };
        probing.cloud = None;
        probing.prober.start(now, nonce);
        let (host, port) = match &probing.via {
            Some(via) => (via.host().to_owned(), via.port()),
            None => (welcome.host.clone(), welcome.port),
        };
        let v4_only = self.socket.local_addr().is_ok_and(|addr| addr.is_ipv4());
        let path = probing.prober.path();
        found.0.spawn(async move { (path, nonce, look_up(&host, port, v4_only).await) });
    }

    /// The connection to the cloud is gone.
    pub fn stop(&mut self, metrics: &ProbeMetrics) {
        if let Some(probing) = &mut self.probing {
            probing.prober.stop();
            metrics.set_up(&probing.prober);
        }
    }

    /// The cloud's RTP port was found, for the path that asked.
    pub fn set_cloud(&mut self, path: u8, cloud: SocketAddr) {
        if let Some(probing) = self.probing_of(path) {
            probing.cloud = Some(cloud);
        }
    }

    /// The cloud says that RTP goes to `path`.
    pub fn path_up(&mut self, now: Instant, path: u8, metrics: &ProbeMetrics) {
        if let Some(probing) = self.probing_of(path) {
            probing.prober.path_up(now);
            metrics.set_up(&probing.prober);
        }
    }

    /// Answers a challenge that came from `from`.
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
        // Not before there is somewhere to send it: a probe that is made counts as sent.
        let Some(cloud) = probing.cloud else { return };
        if let Some(probe) = probing.prober.poll_probe(now) {
            self.send(cloud, probe, metrics);
        }
    }

    /// Says once a connection, in the log, when the cloud does not send here although it should.
    pub fn complain(&mut self, now: Instant) {
        let Some(probing) = &mut self.probing else { return };
        if probing.prober.is_overdue(now) {
            let path = probing.prober.path();
            match probing.cloud {
                Some(cloud) => tracing::warn!(
                    path, %cloud,
                    "no RTP: the cloud does not confirm this path; is its RTP port open for UDP, \
                     and is that its address?"
                ),
                None => tracing::warn!(path, "no RTP: the cloud's address is not found"),
            }
        }
    }

    /// When a probe is due next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let probing = self.probing.as_ref()?;
        probing.cloud.and(probing.prober.poll_timeout())
    }

    fn probing_of(&mut self, path: u8) -> Option<&mut Probing> {
        self.probing.as_mut().filter(|probing| probing.prober.path() == path)
    }

    fn send(&self, to: SocketAddr, message: ProbeMessage, metrics: &ProbeMetrics) {
        // The socket is one that waits, for who reads it.
        let socket = SockRef::from(&*self.socket);
        let sent = socket.send_to_with_flags(&message.encode(), &to.into(), libc::MSG_DONTWAIT);
        if let Err(error) = &sent {
            tracing::debug!(%to, %error, "a probe cannot be sent");
        }
        metrics.count(&message, sent.is_ok());
    }
}

/// Where the cloud's RTP comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloudRtp {
    /// Its name or address.
    pub host: String,
    /// The port that it told.
    pub port: u16,
}

/// Addresses of the cloud that are being looked up, each for one path of one connection.
#[derive(Default)]
pub struct Lookups(JoinSet<(u8, Nonce, SocketAddr)>);

impl Lookups {
    /// The next one that is found; pending too if none is being looked up.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(u8, Nonce, SocketAddr)> {
        loop {
            match self.0.poll_join_next(cx) {
                Poll::Ready(Some(Ok(found))) => return Poll::Ready(found),
                Poll::Ready(Some(Err(error))) => tracing::error!(%error, "a look-up failed"),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Gives up all of them.
    pub fn clear(&mut self) {
        self.0.abort_all();
        self.0.detach_all();
    }
}

/// Tries until it is found.
async fn look_up(host: &str, port: u16, v4_only: bool) -> SocketAddr {
    let mut last = String::new();
    loop {
        let found = tokio::time::timeout(LOOK_UP_TIMEOUT, tokio::net::lookup_host((host, port)));
        let why = match found.await {
            Ok(Ok(addrs)) => match choose(addrs, v4_only) {
                Some(addr) => return addr,
                None => "it has no address of the kind of udp_addr".into(),
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the name server does not answer".to_owned(),
        };
        if why != last {
            tracing::warn!(host, "cannot ask the cloud for RTP: {why}");
            last = why;
        }
        tokio::time::sleep(LOOK_UP_EVERY).await;
    }
}

/// An address that a socket can send to: an IPv6 one reaches IPv4 too, by mapped addresses
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
const LOOK_UP_EVERY: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_probes_an_address_that_it_can_reach() {
        let [v4, v6] = ["10.0.0.1:5", "[2001:db8::1]:5"].map(|addr| addr.parse().unwrap());
        assert_eq!(choose([v6, v4].into_iter(), true), Some(v4));
        assert_eq!(choose([v4, v6].into_iter(), false), Some(v6));
        assert_eq!(choose([v6].into_iter(), true), None);
        let mapped = "[::ffff:10.0.0.1]:5".parse().unwrap();
        assert_eq!(choose([v4].into_iter(), false), Some(mapped));
    }
}
