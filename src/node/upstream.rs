//! The upstream of a node: receives RTP from another node, and requests lost packets.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use prometheus::Registry;

use super::StartError;
use crate::{
    config::{EdgeConfig, ListenAddr, RepairProtocol},
    node, rtmp,
};
use downpour_distribution::{
    address::Destination,
    protocol::Protocol,
    tls::{ClientTls, Trust},
    upstream::{
        dispatch::{self, Cloud, Connect, Upstream},
        link_state::LinkState,
        prober::ProbeMetrics,
        repair_client::{ProtocolChoice, RepairClient, RepairClientMetrics, RepairClientSettings},
        socket::RtpSocket,
        stats::ReceiveMetrics,
        streams::{self, Streams},
    },
};
use downpour_hub::Hub;
use downpour_media::{StreamKey, flv::Tag};
use downpour_repair::{fec::PARITY_PORT_OFFSET, receiver};
use downpour_rtmp::url::InvalidRtmpUrl;
use downpour_sys::udp;

/// Settings of the upstream, taken from those of an edge.
pub struct UpstreamSettings(pub(super) EdgeConfig);

/// An upstream that is bound.
pub(super) struct Bound {
    pub(super) upstream: Upstream,
    pub(super) metrics: ReceiveMetrics,
    pub(super) link: LinkState,
    /// Addresses that RTP arrives on, one per path.
    pub(super) addrs: Vec<SocketAddr>,
}

/// Binds the sockets of RTP and prepares the repair client.
pub(super) fn bind(
    settings: UpstreamSettings,
    hub: Hub,
    registry: &Registry,
) -> Result<Bound, StartError> {
    let config = &settings.0;
    let metrics = ReceiveMetrics::register(registry)?;
    let paths = [
        Some(("rtp.addr", &config.udp_addr)),
        config.udp_addr_2.as_ref().map(|addr| ("rtp.addr_2", addr)),
    ];
    let via = config.cloud_rtp_addr.clone();
    let via_2 = config.cloud_rtp_addr_2.clone().or_else(|| via.clone());
    let mut wanted = WantedRtp::default();
    let (mut addrs, mut sockets) = (Vec::new(), Vec::new());
    for ((key, addr), via) in paths.into_iter().flatten().zip([via, via_2]) {
        let (addr, socket) = bind_rtp(config, key, addr)?;
        addrs.push(addr);
        sockets.push(wanted.add(config, addr, socket, via));
    }
    let streams = Streams::new(
        streams::Settings {
            receiver: receiver::Settings {
                latency: Duration::from_millis(config.latency_ms),
                join_latency: Duration::from_millis(config.latency_ms.max(JOIN_LATENCY_MS)),
                group: addrs.iter().any(|addr| addr.ip().is_multicast()),
                ..receiver::Settings::default()
            },
            silence: SILENCE,
            hold: Duration::from_millis(config.stream_limits.publish_grace_ms),
            max_streams: config.stream_limits.max,
            fetches_headers: true,
        },
        hub,
        metrics.clone(),
    );
    let repair_metrics = RepairClientMetrics::register(registry)?;
    let settings = dispatch::Settings {
        cloud: Cloud {
            host: config.cloud_host.clone(),
            quic_host: config.quic_addr.host().map(str::to_owned),
            quic_port: config.quic_addr.port(),
            api_host: config.api_addr.host().map(str::to_owned),
            api_port: config.api_addr.port(),
        },
        pack_loss: config.pack_loss,
        connect: match config.disable_quic {
            true => None,
            false => Some(connector(config, wanted, repair_metrics)?),
        },
        fetch_headers: Some(Box::new(|host, port, key| Box::pin(fetch_headers(host, port, key)))),
    };
    let parity = parity_sockets(config, &addrs);
    let probe_metrics = ProbeMetrics::register(registry)?;
    let upstream =
        Upstream::new(sockets, parity, settings, streams, metrics.clone(), probe_metrics);
    // To a v0 cloud there is a connection only while packets are missing.
    let link = match config.repair_protocol {
        RepairProtocol::V0 => LinkState::lazy(),
        RepairProtocol::Auto | RepairProtocol::Downpour => LinkState::default(),
    };
    let upstream = upstream.with_link_state(link.clone());
    Ok(Bound { upstream, metrics, link, addrs })
}

fn bind_rtp(
    config: &EdgeConfig,
    key: &'static str,
    addr: &ListenAddr,
) -> Result<(SocketAddr, RtpSocket), StartError> {
    let addr = node::resolve(key, addr)?;
    udp::receiver(addr, config.multicast_interface.0, config.udp_recv_buffer)
        .and_then(|socket| Ok((socket.local_addr()?, RtpSocket::new(socket))))
        .map_err(|error| StartError::listen(key, addr, &error))
}

/// Sockets for parity packets that arrive without a request. Without such a socket the node works,
/// but has no parity.
fn parity_sockets(config: &EdgeConfig, rtp: &[SocketAddr]) -> Vec<RtpSocket> {
    // A validated address gets parity on the port of RTP.
    let unrequested = |addr: &&SocketAddr| addr.ip().is_multicast() || !config.rtp_subscribe;
    let bind = |rtp: &SocketAddr| {
        let bound = match rtp.port().checked_add(PARITY_PORT_OFFSET) {
            Some(port) => {
                let addr = SocketAddr::new(rtp.ip(), port);
                udp::receiver(addr, config.multicast_interface.0, PARITY_BUFFER).map(RtpSocket::new)
            }
            None => Err(std::io::Error::other("the port would be above 65535")),
        };
        bound
            .map_err(|error| {
                tracing::warn!(
                    %rtp,
                    port_offset = PARITY_PORT_OFFSET,
                    %error,
                    "parity is off: its port cannot be bound"
                );
            })
            .ok()
    };
    rtp.iter().filter(|addr| config.fec && unrequested(addr)).filter_map(bind).collect()
}

/// The RTP that this node requests from the node above.
#[derive(Debug, Clone, Copy, Default)]
struct WantedRtp {
    /// The UDP port of the first path.
    port: Option<u16>,
    /// The number of paths.
    paths: u8,
    /// The multicast group that RTP arrives by, if any.
    group: Option<SocketAddr>,
}

impl WantedRtp {
    /// Adds a socket: RTP to a unicast address is requested, RTP to a group arrives without a request.
    fn add(
        &mut self,
        config: &EdgeConfig,
        addr: SocketAddr,
        socket: RtpSocket,
        via: Option<Destination>,
    ) -> RtpSocket {
        if addr.ip().is_multicast() {
            self.group = self.group.or(Some(addr));
            return socket;
        }
        if !config.rtp_subscribe {
            return socket;
        }
        self.port = self.port.or(Some(addr.port()));
        self.paths += 1;
        socket.with_prober(self.paths - 1, via)
    }
}

/// Returns the function that opens repair connections.
fn connector(
    config: &EdgeConfig,
    wanted: WantedRtp,
    metrics: RepairClientMetrics,
) -> Result<Connect, StartError> {
    let trust = trust(config)?;
    // A bad file is an error at start, not at the first loss.
    ClientTls::new(&trust, "cloud", &[])
        .map_err(|error| StartError::new("trust.ca_file", error))?;
    let protocol = match config.repair_protocol {
        RepairProtocol::Auto => ProtocolChoice::Auto,
        RepairProtocol::V0 => ProtocolChoice::Only(Protocol::V0),
        RepairProtocol::Downpour => ProtocolChoice::Only(Protocol::Downpour),
    };
    let name = Some(config.node_name.clone()).filter(|name| !name.is_empty());
    let node = name.or_else(node::host_name).unwrap_or_else(|| "edge".into());
    let token = Some(config.token.clone()).filter(|token| !token.is_empty());
    let streams = config.streams.clone();
    let (parity, latency) = (config.fec, Duration::from_millis(config.latency_ms));
    Ok(Box::new(move |cloud, events, shutdown| {
        let settings = RepairClientSettings {
            cloud: cloud.to_owned(),
            protocol,
            trust: trust.clone(),
            node: node.clone(),
            token: token.clone(),
            streams: streams.clone(),
            rtp_port: wanted.port,
            rtp_paths: wanted.paths,
            group: wanted.group,
            parity,
            latency,
        };
        RepairClient::spawn(settings, events, metrics.clone(), shutdown)
    }))
}

/// Fetches the codec headers of a stream from an RTMP server, such as a Go cloud.
async fn fetch_headers(host: String, port: u16, key: StreamKey) -> Result<Vec<Tag>, String> {
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let url = format!("rtmp://{host}:{port}/{key}");
    let because = |error: &dyn std::fmt::Display| format!("{url}: {error}");
    let parsed = url.parse().map_err(|error: InvalidRtmpUrl| because(&error))?;
    rtmp::client::fetch_headers(&parsed).await.map_err(|error| because(&error))
}

fn trust(config: &EdgeConfig) -> Result<Trust, StartError> {
    let trust = match (config.insecure, config.fingerprint, path(&config.ca_file)) {
        (true, ..) => Trust::Insecure,
        (_, Some(fingerprint), _) => Trust::Pinned(fingerprint),
        (_, _, Some(ca_file)) => Trust::Ca(ca_file),
        _ => Trust::TrustOnFirstUse(config.known_clouds.clone()),
    };
    if let Trust::TrustOnFirstUse(known_clouds) = &trust {
        // Without this file no connection is trusted, and no packet repaired.
        std::fs::File::options().append(true).create(true).open(known_clouds).map_err(|error| {
            let path = known_clouds.display();
            StartError::new(
                "trust.known_clouds",
                format!("cannot write {path}: {error}; change it, or set trust.fingerprint"),
            )
        })?;
    }
    Ok(trust)
}

fn path(path: &Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

/// Receive buffer of a parity socket in bytes: parity is a fraction of the media.
const PARITY_BUFFER: usize = 2 << 20;
/// A node that joins a stream first fetches up to a whole group of pictures.
const JOIN_LATENCY_MS: u64 = 1000;
/// A stream ends after this silence, even if no message announces its end.
const SILENCE: Duration = Duration::from_secs(10);
