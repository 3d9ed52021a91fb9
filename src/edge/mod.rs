//! The edge node: takes RTP, repairs what got lost, and serves viewers.

use std::{
    net::SocketAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    config::{EdgeConfig, ListenAddr, RepairProtocol},
    http::{
        HttpMetrics, HttpServer, ViewerSettings,
        api::{self, EdgeState},
    },
    node::{self, StartError, TaskEnded, Tasks, metrics},
    record::{RecordMetrics, Recorder},
};
use downpour_distribution::upstream::ingress::{self, Cloud, Connect, Upstream};
use downpour_distribution::upstream::intake::{self, Streams};
use downpour_distribution::upstream::prober::ProbeMetrics;
use downpour_distribution::upstream::socket::RtpSocket;
use downpour_distribution::upstream::stats::ReceiveMetrics;
use downpour_distribution::{
    address::Destination,
    protocol::Protocol,
    tls::{ClientTls, Trust},
    upstream::repair_client::{
        ProtocolChoice, RepairClient, RepairClientMetrics, RepairClientSettings,
    },
};
use downpour_hub::{Hub, LogLimits};
use downpour_repair::{fec::PARITY_PORT_OFFSET, receiver};
use downpour_sys::udp;

/// An edge node whose addresses are bound and that is ready to run.
pub struct Edge {
    ingress: Upstream,
    http: HttpServer,
    recorder: Option<Recorder>,
    addrs: EdgeAddrs,
    metrics: ReceiveMetrics,
    grace: Duration,
}

/// Where an edge node listens, ports that were 0 in the settings filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EdgeAddrs {
    /// RTP: an address of this machine, or a multicast group.
    pub rtp: SocketAddr,
    /// The same, of the second path.
    pub rtp_2: Option<SocketAddr>,
    /// HTTP: viewers and API.
    pub http: SocketAddr,
}

impl Edge {
    /// Binds every address.
    ///
    /// # Errors
    /// With the setting that is at fault.
    pub async fn bind(config: &EdgeConfig) -> Result<Self, StartError> {
        let hub = Hub::new(LogLimits {
            max_bytes: config.gop_cache_max_bytes,
            max_age: config.gop_cache_max_ms,
        });
        let registry = metrics::registry(hub.clone(), None)?;
        let intake_metrics = ReceiveMetrics::register(&registry)?;

        let bind = |key, addr: &ListenAddr| {
            let addr = node::resolve(key, addr)?;
            udp::receiver(addr, config.multicast_interface.0, config.udp_recv_buffer)
                .and_then(|socket| Ok((socket.local_addr()?, RtpSocket::new(socket))))
                .map_err(|error| StartError::listen(key, addr, &error))
        };
        let (rtp, socket) = bind("udp_addr", &config.udp_addr)?;
        let (rtp_2, socket_2) = match &config.udp_addr_2 {
            Some(addr) => {
                bind("udp_addr_2", addr).map(|(rtp, socket)| (Some(rtp), Some(socket)))?
            }
            None => (None, None),
        };
        let listener = node::listen("flv_addr", &config.flv_addr, config.max_viewers)?;
        let local = |key, result: std::io::Result<SocketAddr>| {
            result.map_err(|error| StartError::new(key, error))
        };
        let addrs = EdgeAddrs { rtp, rtp_2, http: local("flv_addr", listener.local_addr())? };
        let via = config.cloud_rtp_addr.clone();
        let via_2 = config.cloud_rtp_addr_2.clone().or_else(|| via.clone());
        let mut asked = Asked::default();
        let mut sockets = vec![asked.ask(config, rtp, socket, via)];
        if let (Some(rtp), Some(socket)) = (rtp_2, socket_2) {
            sockets.push(asked.ask(config, rtp, socket, via_2));
        }
        let parity = parity_sockets(config, [Some(rtp), rtp_2].into_iter().flatten());

        let record_metrics = RecordMetrics::register(&registry)?;
        let recorder =
            config.enable_record.then(|| Recorder::new(&config.record_dir, record_metrics));
        let on_start = recorder.clone();
        let intake = Streams::new(
            intake::Settings {
                receiver: receiver::Settings {
                    latency: Duration::from_millis(config.latency_ms),
                    join_latency: Duration::from_millis(config.latency_ms.max(JOIN_LATENCY_MS)),
                    group: [Some(rtp), rtp_2].into_iter().flatten().any(|a| a.ip().is_multicast()),
                    ..receiver::Settings::default()
                },
                silence: SILENCE,
                max_streams: config.max_streams,
            },
            hub.clone(),
            intake_metrics.clone(),
            move |stream| {
                if let Some(recorder) = &on_start {
                    recorder.record(stream);
                }
            },
        );
        let repair_metrics = RepairClientMetrics::register(&registry)?;
        let settings = ingress::Settings {
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
                false => Some(connector(config, asked, repair_metrics)?),
            },
        };
        let probe_metrics = ProbeMetrics::register(&registry)?;
        let ingress =
            Upstream::new(sockets, parity, settings, intake, intake_metrics.clone(), probe_metrics);
        let http = viewers(config, listener, hub, registry)?;
        Ok(Self {
            ingress,
            http,
            recorder,
            addrs,
            metrics: intake_metrics,
            grace: Duration::from_millis(config.shutdown_grace_ms),
        })
    }

    /// Where it listens.
    pub fn addrs(&self) -> EdgeAddrs {
        self.addrs
    }

    /// Its counters, which go on counting when it runs.
    pub fn metrics(&self) -> ReceiveMetrics {
        self.metrics.clone()
    }

    /// Runs until `shutdown`, then drains: streams end, viewers get what is there, recordings are
    /// written.
    ///
    /// # Errors
    /// If a part of the node ended by itself; the rest is drained all the same.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), TaskEnded> {
        let Self { ingress, http, recorder, grace, .. } = self;
        let stop = CancellationToken::new();
        let mut tasks = Tasks::default();
        tasks.spawn("RTP receiver", ingress.run(stop.clone()));
        tasks.spawn("HTTP server", http.run(stop.clone(), grace / 2));
        let outcome = tasks.run_until(&shutdown).await;
        stop.cancel();
        if tokio::time::timeout(grace, tasks.join()).await.is_err() {
            tracing::warn!("connections were cut after {grace:?}");
        }
        if let Some(recorder) = &recorder
            && tokio::time::timeout(grace, recorder.drain()).await.is_err()
        {
            tracing::error!("the disk did not take the recordings within {grace:?}");
        }
        outcome
    }
}

/// Where parity comes beside RTP that nobody asked for: without these it is not taken, and all else
/// goes on.
fn parity_sockets(config: &EdgeConfig, rtp: impl Iterator<Item = SocketAddr>) -> Vec<RtpSocket> {
    // To an address that is proved, it comes there.
    let unasked = |addr: &SocketAddr| addr.ip().is_multicast() || !config.rtp_subscribe;
    let bind = |rtp: SocketAddr| {
        let port = rtp.port().checked_add(PARITY_PORT_OFFSET);
        let bound = match port {
            Some(port) => {
                let addr = SocketAddr::new(rtp.ip(), port);
                udp::receiver(addr, config.multicast_interface.0, PARITY_BUFFER).map(RtpSocket::new)
            }
            None => Err(std::io::Error::other("there is no such port")),
        };
        bound
            .map_err(|error| {
                tracing::warn!(
                    %rtp,
                    "no parity is taken: its port, {PARITY_PORT_OFFSET} above that of RTP, cannot \
                     be bound: {error}"
                );
            })
            .ok()
    };
    rtp.filter(|addr| config.fec && unasked(addr)).filter_map(bind).collect()
}

fn viewers(
    config: &EdgeConfig,
    listener: TcpListener,
    hub: Hub,
    registry: prometheus::Registry,
) -> Result<HttpServer, StartError> {
    let settings = ViewerSettings {
        max_viewers: config.max_viewers,
        merge_write: Duration::from_millis(config.merge_write_ms),
        ..ViewerSettings::default()
    };
    let http_metrics = HttpMetrics::register(&registry)?;
    let state = EdgeState { hub: hub.clone(), registry, started: Instant::now() };
    Ok(HttpServer::new(listener, Some(hub), api::edge_router(state), settings, http_metrics))
}

/// What the cloud is asked about RTP.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    /// The first port that is to get it.
    port: Option<u16>,
    /// Ports that are to get it.
    paths: u8,
    group: Option<SocketAddr>,
}

impl Asked {
    /// RTP comes to a group by itself, and to an address of this edge when the cloud is asked.
    fn ask(
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

/// How repair connections are opened under these settings.
fn connector(
    config: &EdgeConfig,
    asked: Asked,
    metrics: RepairClientMetrics,
) -> Result<Connect, StartError> {
    let trust = match (config.insecure, config.fingerprint, path(&config.ca_file)) {
        (true, ..) => Trust::Insecure,
        (_, Some(fingerprint), _) => Trust::Pinned(fingerprint),
        (_, _, Some(ca_file)) => Trust::Ca(ca_file),
        _ => Trust::TrustOnFirstUse(config.known_clouds.clone()),
    };
    if let Trust::TrustOnFirstUse(known_clouds) = &trust {
        // Without it no connection would be trusted, and so nothing repaired.
        std::fs::File::options().append(true).create(true).open(known_clouds).map_err(|error| {
            let path = known_clouds.display();
            StartError::new(
                "known_clouds",
                format!("{path} cannot be written: {error}; give another path, or a fingerprint"),
            )
        })?;
    }
    // Tried here so that a bad file is told at the start, not at the first loss.
    ClientTls::new(&trust, "cloud", &[]).map_err(|error| StartError::new("ca_file", error))?;
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
            rtp_port: asked.port,
            rtp_paths: asked.paths,
            group: asked.group,
            parity,
            latency,
        };
        RepairClient::spawn(settings, events, metrics.clone(), shutdown)
    }))
}

fn path(path: &std::path::Path) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then(|| path.to_owned())
}

/// Bytes of kernel buffer: parity is a part of what RTP is.
const PARITY_BUFFER: usize = 2 << 20;
/// Who joins fetches up to a whole group of pictures first.
const JOIN_LATENCY_MS: u64 = 1000;
/// Without word from the cloud, a stream is over after so long a silence.
const SILENCE: Duration = Duration::from_secs(10);
