//! The emulated network between cloud and edges.

use std::net::SocketAddr;

use downpour_netem::{LinkSettings, LinkStats, RelaySettings, UdpRelay};
use tokio::runtime::Runtime;

use super::ports;

/// Relays between a cloud and its edges, on a separate runtime.
pub struct Network {
    rtp: Vec<UdpRelay>,
    quic: Vec<UdpRelay>,
    /// Dropped last: the relays' tasks run on it.
    runtime: Runtime,
}

impl Network {
    pub fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("no runtime for the relays");
        Self { rtp: Vec::new(), quic: Vec::new(), runtime }
    }

    /// Adds a path for RTP. With an edge as upstream, returns the address for the cloud to send to.
    /// With the cloud as upstream, acts as a NAT and returns the address for the edge to probe.
    pub fn add_rtp(&mut self, upstream: SocketAddr, settings: RelaySettings) -> SocketAddr {
        let relay = self.relay(upstream, settings);
        let addr = relay.local_addr();
        self.rtp.push(relay);
        addr
    }

    /// Adds a path for RTP to an edge, and one of the same kind for its parity. Returns the address for
    /// the cloud to send to.
    pub fn add_rtp_and_parity(&mut self, edge: SocketAddr, settings: RelaySettings) -> SocketAddr {
        let parity = |addr: SocketAddr| SocketAddr::new(addr.ip(), addr.port() + 2);
        let listen = SocketAddr::new(edge.ip(), ports::free_for_rtp());
        let other = RelaySettings { seed: settings.seed + 1000, ..settings.clone() };
        for (listen, edge, settings) in
            [(listen, edge, settings), (parity(listen), parity(edge), other)]
        {
            let _inside = self.runtime.enter();
            let relay = UdpRelay::start_at(listen, edge, settings).expect("cannot start a relay");
            self.rtp.push(relay);
        }
        listen
    }

    /// Changes all paths of RTP, in both directions.
    pub fn set_rtp(&self, path: &LinkSettings) {
        for relay in &self.rtp {
            relay.set_settings(path.clone(), path.clone());
        }
    }

    /// Adds a path for an edge's QUIC. Returns the address for the edge to connect to.
    pub fn add_quic(&mut self, cloud: SocketAddr, settings: RelaySettings) -> SocketAddr {
        let relay = self.relay(cloud, settings);
        let addr = relay.local_addr();
        self.quic.push(relay);
        addr
    }

    /// Cuts QUIC permanently.
    pub fn cut_quic(&self) {
        for relay in &self.quic {
            relay.set_settings(LinkSettings::lossy(1.0), LinkSettings::lossy(1.0));
        }
    }

    /// Counters of RTP to the edges, and of probes to the cloud.
    pub fn rtp_stats(&self) -> LinkStats {
        let both = |relay: &UdpRelay| [relay.stats().to_upstream, relay.stats().to_client];
        total(self.rtp.iter().flat_map(both))
    }

    /// Counters of the edges' QUIC packets, and of the cloud's.
    pub fn quic_stats(&self) -> (LinkStats, LinkStats) {
        let stats = || self.quic.iter().map(UdpRelay::stats);
        (total(stats().map(|stats| stats.to_upstream)), total(stats().map(|stats| stats.to_client)))
    }

    fn relay(&self, upstream: SocketAddr, settings: RelaySettings) -> UdpRelay {
        let _inside = self.runtime.enter();
        UdpRelay::start(upstream, settings).expect("cannot start a relay")
    }
}

fn total(stats: impl Iterator<Item = LinkStats>) -> LinkStats {
    let mut sum = LinkStats::default();
    stats.for_each(|stats| sum += stats);
    sum
}
