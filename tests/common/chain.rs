//! A cloud and a chain of edges, each of which is the parent of the next by its configuration.

use std::{net::SocketAddr, path::PathBuf};

use downpour_netem::{LinkSettings, RelaySettings};
use tempfile::TempDir;

use super::{
    SOON,
    http::get_json,
    media::{Encoder, Media},
    network::Network,
    node::{Cloud, Edge, loopback},
    ports, wait_for,
};

/// Cloud → parent → … → child. The last edge has no `downstream` section.
pub struct Chain {
    pub cloud: Cloud,
    /// The first edge is below the cloud.
    pub edges: Vec<Edge>,
    /// One network per hop, in the order of `edges`.
    pub hops: Vec<Network>,
    dir: TempDir,
}

impl Chain {
    /// Starts a cloud and `edges` edges, with the same kind of path on each hop for RTP and QUIC, and
    /// waits until each edge is connected and its address is validated.
    ///
    /// `seed` determines the losses. `lines` are added to each edge's configuration.
    #[track_caller]
    pub fn start(edges: usize, path: &LinkSettings, seed: u64, lines: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("no directory for the test");
        let cloud = Cloud::start(dir.path(), &[], &[]);
        let mut above = Above { quic: cloud.quic, rtp: cloud.rtp, http: cloud.node.http };
        let mut chain = Self { cloud, edges: Vec::new(), hops: Vec::new(), dir };
        for number in 0..edges {
            let mut hop = Network::new();
            // Relays derive their clients' seeds from their own, so these are far apart.
            let path = |more| RelaySettings::symmetric(path.clone(), seed + more);
            let number_seed = 1000 * number as u64;
            let quic = hop.add_quic(above.quic, path(number_seed));
            let nat = hop.add_rtp(above.rtp, path(number_seed + 500));
            chain.hops.push(hop);
            let mut config: Vec<String> = lines.iter().map(ToString::to_string).collect();
            config.push("rtp_subscribe: true".into());
            config.push(format!("cloud_rtp_addr: {nat}"));
            let [quic_below, rtp_below] = [(); 2].map(|()| loopback(ports::free()));
            if number + 1 < edges {
                let port = rtp_below.port();
                config.push(format!(
                    "downstream:\n  quic_addr: {quic_below}\n  rtp_port: {port}\n  \
                     cert_file: below.pem\n  key_file: below-key.pem"
                ));
            }
            let name = format!("edge{number}");
            let rtp = loopback(ports::free_for_rtp());
            let edge = Edge::start(chain.dir.path(), &name, rtp, quic, above.http, &config);
            above = Above { quic: quic_below, rtp: rtp_below, http: edge.node.http };
            chain.edges.push(edge);
        }
        chain.until_connected();
        chain
    }

    /// Waits until each edge has its connection, and each node above an edge sends RTP to it.
    #[track_caller]
    pub fn until_connected(&self) {
        for edge in &self.edges {
            edge.until_connected();
        }
        for node in self.nodes().take(self.edges.len()) {
            wait_for("a node sends to the edge below", SOON, || {
                let targets = node.metrics().sum("downpour_fanout_dynamic_targets", &[]);
                (targets == 1.0).then_some(())
            });
        }
    }

    /// The cloud and the edges, from above.
    pub fn nodes(&self) -> impl Iterator<Item = &super::node::Node> {
        std::iter::once(&self.cloud.node).chain(self.edges.iter().map(|edge| &edge.node))
    }

    /// The last edge.
    pub fn child(&self) -> &Edge {
        self.edges.last().expect("a chain has an edge")
    }

    /// Pushes with `downpour push`.
    pub fn push(&self, media: &Media, key: &str) -> Encoder {
        Encoder::downpour(media, &self.cloud.url(key), &[], self.log("push"))
    }

    /// The names of the edges that a node lists in `/api/v1/edges`.
    #[track_caller]
    pub fn edges_below(node: &super::node::Node) -> Vec<String> {
        let (status, list) = get_json(node.http, "/api/v1/edges").expect("no list of edges");
        assert_eq!(status, 200, "{list}");
        let edges = list["edges"].as_array().expect("edges is a list");
        edges.iter().filter_map(|edge| edge["node"].as_str().map(str::to_owned)).collect()
    }

    /// A path at which there is no file yet.
    fn log(&self, name: &str) -> PathBuf {
        (0..)
            .map(|number| self.dir.path().join(format!("{name}-{number}.log")))
            .find(|path| !path.exists())
            .expect("a free number")
    }
}

/// Addresses of the node above an edge.
struct Above {
    quic: SocketAddr,
    /// Source address of its RTP.
    rtp: SocketAddr,
    http: SocketAddr,
}
