//! Assembles a node from settings: sources, the hub and sinks.
//!
//! ```text
//! rtmp ─────┐                              ┌─► downstream: RTP to edges
//! upstream ─┴─► admission ─► hub ──────────┼─► recorder
//!                                          └─► http: viewers
//! ```
//!
//! `cloud` and `edge` are two sets of defaults of this one node (see [`super::settings`]). A new part
//! is added in this file: bind it, run it, and drain it if it holds media.
//!
//! Shutdown within the grace period `G`:
//!
//! ```text
//! 0         sources: RTMP publications end at once; streams of the upstream end as it stops
//! ..G/2     downstream: queued packets leave, then edges request what they lost (LINGER)
//! ..G       recordings are written; viewers read to the end of their streams, then are cut
//! ```

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use prometheus::Registry;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{StartError, TaskEnded, Tasks, metrics, upstream};
use crate::{
    config::ListenAddr,
    http::{
        HttpMetrics, HttpServer, ViewerSettings,
        api::{self, ApiState, DownstreamApi},
        page,
        readiness::Readiness,
    },
    node,
    record::{RecordMetrics, Recorder},
    rtmp::{
        ServerMetrics as RtmpMetrics,
        listener::{Server as RtmpServer, ServerSettings as RtmpSettings},
    },
};
pub use downpour_distribution::downstream::DownstreamReload;
use downpour_distribution::{
    downstream::{self, Downstream, outgoing::OutgoingStreams},
    tls::{Fingerprint, Identity},
    upstream::{dispatch::Upstream, stats::ReceiveMetrics},
};
use downpour_hub::{Admission, Hub, LogLimits, admission::Settings as AdmissionSettings};

/// Settings of a node's parts. A part whose settings are `None` is left out.
pub struct NodeSettings {
    /// Media per stream that is kept for its readers.
    pub log: LogLimits,
    /// Limits of publishers and players.
    pub admission: AdmissionSettings,
    /// RTMP from encoders: the address to listen on, and the server's settings.
    pub rtmp: Option<(Setting<ListenAddr>, RtmpSettings)>,
    /// RTP from another node.
    pub upstream: Option<upstream::UpstreamSettings>,
    /// RTP to other nodes.
    pub downstream: Option<DownstreamSettings>,
    /// HTTP: the API, and viewers.
    pub http: HttpSettings,
    /// The directory of recordings.
    pub record: Option<PathBuf>,
    /// Time that all parts together have to finish at shutdown.
    pub grace: Duration,
}

/// A value and the key that sets it. Errors name the key.
#[derive(Debug, Clone)]
pub struct Setting<T> {
    /// The key with its section, such as `rtmp.addr`.
    pub key: &'static str,
    /// The value.
    pub value: T,
}

impl<T> Setting<T> {
    /// The value `value` of the key `key`.
    pub fn new(key: &'static str, value: T) -> Self {
        Self { key, value }
    }
}

/// RTP and repair for the nodes below.
pub struct DownstreamSettings {
    /// Address that edges connect to over QUIC. It replaces `quic_addr` of `part`.
    pub quic_addr: Setting<ListenAddr>,
    /// The certificate. It and its key are created at the first start.
    pub cert_file: PathBuf,
    /// The private key of the certificate.
    pub key_file: PathBuf,
    /// Settings of the part itself.
    pub part: downstream::Settings,
}

/// Settings of the HTTP server.
pub struct HttpSettings {
    /// The address to listen on.
    pub addr: Setting<ListenAddr>,
    /// Whether `/{app}/{name}.flv` is served.
    pub flv: bool,
    /// Limits of viewers.
    pub viewers: ViewerSettings,
    /// Time that connections have to finish at shutdown.
    pub grace: Duration,
}

/// The addresses that a node listens on. A port that is 0 in the settings is the actual one here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAddrs {
    /// RTMP; `None` on a node without encoders.
    pub rtmp: Option<SocketAddr>,
    /// HTTP.
    pub http: SocketAddr,
    /// The addresses of the downstream; `None` on a node without one.
    pub downstream: Option<DownstreamAddrs>,
    /// Addresses that RTP arrives on, one per path; empty on a node without an upstream.
    pub rtp_in: Vec<SocketAddr>,
}

/// Addresses and certificate that edges use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownstreamAddrs {
    /// QUIC.
    pub quic: SocketAddr,
    /// UDP port that RTP is sent from and on which edges validate their addresses; `None` in debug
    /// mode.
    pub rtp: Option<u16>,
    /// Fingerprint of the certificate on QUIC.
    pub fingerprint: Fingerprint,
}

/// A node whose addresses are bound and which is ready to run.
pub struct Node {
    admission: Admission,
    rtmp: Option<RtmpServer>,
    upstream: Option<Upstream>,
    received: Option<ReceiveMetrics>,
    downstream: Option<Downstream>,
    recorder: Option<Recorder>,
    http: HttpServer,
    http_grace: Duration,
    draining: CancellationToken,
    addrs: NodeAddrs,
    grace: Duration,
}

impl Node {
    /// Binds all addresses, and creates the certificate if there is none. Must be called inside a
    /// tokio runtime.
    ///
    /// # Errors
    /// If an address, a certificate file or another setting cannot be used. The error names its key.
    pub fn bind(settings: NodeSettings) -> Result<Self, StartError> {
        let hub = Hub::new(settings.log);
        let admission = Admission::new(hub.clone(), settings.admission);
        let outgoing = settings.downstream.is_some().then(OutgoingStreams::new);
        let registry = metrics::registry(&admission, outgoing.clone())?;

        // The first: at boot its network may be missing, and then the rest is not needed.
        let upstream = settings
            .upstream
            .map(|upstream| upstream::bind(upstream, hub.clone(), &registry))
            .transpose()?;
        let rtmp = settings.rtmp.map(|(addr, rtmp)| bind_rtmp(&addr, rtmp, &registry));
        let rtmp = rtmp.transpose()?;
        let addr = &settings.http.addr;
        let listener = node::listen(addr.key, &addr.value, settings.http.viewers.max_viewers)?;
        let http_addr = local(addr.key, listener.local_addr())?;
        let downstream = match (settings.downstream, &outgoing) {
            (Some(downstream), Some(outgoing)) => {
                Some(bind_downstream(downstream, outgoing.clone(), &registry)?)
            }
            _ => None,
        };
        let record_metrics = RecordMetrics::register(&registry)?;
        let recorder = settings.record.map(|dir| Recorder::new(dir, record_metrics));
        add_sinks(&hub, downstream.as_ref().map(|(downstream, _)| downstream), recorder.as_ref());

        let addrs = NodeAddrs {
            rtmp: rtmp.as_ref().map(|(key, rtmp)| local(key, rtmp.local_addr())).transpose()?,
            http: http_addr,
            downstream: downstream.as_ref().map(|(_, addrs)| *addrs),
            rtp_in: upstream.as_ref().map_or_else(Vec::new, |upstream| upstream.addrs.clone()),
        };
        let draining = CancellationToken::new();
        let link = upstream.as_ref().map(|upstream| upstream.link.clone());
        let state = ApiState {
            hub,
            registry: registry.clone(),
            started: std::time::Instant::now(),
            readiness: Readiness { upstream: link, draining: draining.clone() },
            downstream: downstream.as_ref().map(|(part, _)| downstream_api(part, addrs.rtmp)),
        };
        let HttpSettings { flv, viewers, grace: http_grace, .. } = settings.http;
        let mut router = api::router(state);
        if flv {
            router = router.merge(page::router(admission.hub().clone()));
        }
        let http = HttpServer::new(
            listener,
            flv.then(|| admission.clone()),
            router,
            viewers,
            HttpMetrics::register(&registry)?,
        );
        let (upstream, received) = upstream.map(|bound| (bound.upstream, bound.metrics)).unzip();
        Ok(Self {
            admission,
            rtmp: rtmp.map(|(_, rtmp)| rtmp),
            upstream,
            received,
            downstream: downstream.map(|(downstream, _)| downstream),
            recorder,
            http,
            http_grace,
            draining,
            addrs,
            grace: settings.grace,
        })
    }

    /// The addresses that the node listens on.
    pub fn addrs(&self) -> &NodeAddrs {
        &self.addrs
    }

    /// The node's admission: lists publications and playbacks, and revokes them.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Changes the downstream while the node runs; `None` on a node without one.
    pub fn downstream_reload(&self) -> Option<DownstreamReload> {
        self.downstream.as_ref().map(Downstream::reload)
    }

    /// Counters of the streams that arrive from another node, updated while the node runs; `None` on
    /// a node without an upstream.
    pub fn received(&self) -> Option<ReceiveMetrics> {
        self.received.clone()
    }

    /// Runs until `shutdown` is cancelled, then drains within the grace period: sources end, edges are
    /// notified of each stream's end, viewers and recordings get the media that is left.
    ///
    /// # Errors
    /// If a part ended before the shutdown. The other parts are drained.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), TaskEnded> {
        let Self { admission, rtmp, upstream, downstream, recorder, http, http_grace, .. } = self;
        let (sources, sinks) = (CancellationToken::new(), CancellationToken::new());
        let mut source_tasks = Tasks::default();
        let mut sink_tasks = Tasks::default();
        if let Some(rtmp) = rtmp {
            source_tasks.spawn("RTMP server", rtmp.run(admission.clone(), sources.clone()));
        }
        if let Some(upstream) = upstream {
            source_tasks.spawn("RTP receiver", upstream.run(sources.clone()));
        }
        let has_upstream = !self.addrs.rtp_in.is_empty();
        let drain = downstream.as_ref().map(Downstream::drain);
        let outgoing = downstream.as_ref().map(|downstream| downstream.outgoing().clone());
        if let (Some(downstream), Some(addrs)) = (downstream, self.addrs.downstream) {
            let ports = (addrs.quic.port(), self.addrs.http.port());
            sink_tasks.spawn("RTP sender", downstream.run(ports, sinks.clone()));
        }
        let memory = super::memory::give_back(admission.clone(), sinks.clone());
        sink_tasks.spawn("memory", memory);
        sink_tasks.spawn("HTTP server", http.run(sinks.clone(), http_grace));

        let outcome = tokio::select! {
            outcome = source_tasks.run_until(&shutdown) => outcome,
            outcome = sink_tasks.run_until(&shutdown) => outcome,
        };
        self.draining.cancel();
        let grace = Grace::starting_now(self.grace);
        // Asked before the sources end: their streams leave the hub at once.
        let had_streams = !admission.hub().is_empty();
        if let Some(outgoing) = outgoing {
            // Before the streams end: edges below keep their viewers.
            outgoing.close();
        }
        sources.cancel();
        let publications = admission.end_all();
        tracing::debug!(publications, "node is draining");
        if let Some(drain) = drain {
            if has_upstream {
                // The streams from above end with their receiver.
                let _ = timeout_at(grace.half, source_tasks.join()).await;
            }
            drain_downstream(&drain, &grace, had_streams).await;
        }
        // Each viewer is closed at the end of its stream.
        sinks.cancel();
        if timeout_at(grace.half, source_tasks.join()).await.is_err() {
            tracing::warn!(grace_ms = grace.ms, "source connections cut: they did not end in time");
        }
        if let Some(recorder) = &recorder
            && timeout_at(grace.end, recorder.drain()).await.is_err()
        {
            tracing::error!(grace_ms = grace.ms, "recordings cut: the disk is too slow");
        }
        if timeout_at(grace.end, sink_tasks.join()).await.is_err() {
            tracing::warn!(grace_ms = grace.ms, "HTTP and QUIC connections cut");
        }
        outcome
    }
}

/// The deadlines of a shutdown.
struct Grace {
    /// Of the sources and the downstream.
    half: Instant,
    /// Of recordings and viewers.
    end: Instant,
    ms: u128,
}

impl Grace {
    fn starting_now(grace: Duration) -> Self {
        let now = Instant::now();
        Self { half: now + grace / 2, end: now + grace, ms: grace.as_millis() }
    }
}

/// Waits until the queued packets have left, and then for requests of edges that lost the last ones.
async fn drain_downstream(drain: &downstream::Drain, grace: &Grace, had_streams: bool) {
    let left = grace.half.saturating_duration_since(Instant::now());
    let linger = if had_streams { LINGER.min(left / 2) } else { Duration::ZERO };
    if !drain.wait(left - linger).await {
        tracing::warn!(grace_ms = grace.ms, "packets to edges dropped: they were still queued");
    }
    tokio::time::sleep(linger).await;
}

fn bind_rtmp(
    addr: &Setting<ListenAddr>,
    settings: RtmpSettings,
    registry: &Registry,
) -> Result<(&'static str, RtmpServer), StartError> {
    let resolved = node::resolve(addr.key, &addr.value)?;
    let server = RtmpServer::bind(resolved, settings)
        .map_err(|error| StartError::listen(addr.key, resolved, &error))?
        .with_metrics(RtmpMetrics::register(registry)?);
    Ok((addr.key, server))
}

fn bind_downstream(
    settings: DownstreamSettings,
    outgoing: OutgoingStreams,
    registry: &Registry,
) -> Result<(Downstream, DownstreamAddrs), StartError> {
    let DownstreamSettings { quic_addr, cert_file, key_file, mut part } = settings;
    let identity = Identity::load_or_create(&cert_file, &key_file)
        .map_err(|error| StartError::new("downstream.cert_file", error))?;
    part.quic_addr = node::resolve(quic_addr.key, &quic_addr.value)?;
    let downstream =
        Downstream::bind(part, &identity, outgoing, registry).map_err(|error| match error {
            downstream::BindError::Rtp(port, error) => {
                let port = format!("UDP port {port}");
                StartError::listen("downstream.rtp_port", port, &error)
            }
            downstream::BindError::Quic(addr, error) => {
                StartError::listen(quic_addr.key, addr, &error)
            }
            downstream::BindError::Tls(error) => StartError::new("downstream.cert_file", error),
            downstream::BindError::Metrics(error) => error.into(),
        })?;
    let addrs = DownstreamAddrs {
        quic: local(quic_addr.key, downstream.quic_addr())?,
        rtp: downstream.rtp_port(),
        fingerprint: identity.fingerprint(),
    };
    Ok((downstream, addrs))
}

/// Taps run in the order in which sinks are added: packets leave first.
fn add_sinks(hub: &Hub, downstream: Option<&Downstream>, recorder: Option<&Recorder>) {
    if let Some(downstream) = downstream {
        hub.add_sink(downstream.sink());
    }
    if let Some(recorder) = recorder {
        hub.add_sink(Arc::new(recorder.clone()));
    }
}

fn downstream_api(downstream: &Downstream, rtmp: Option<SocketAddr>) -> DownstreamApi {
    DownstreamApi {
        outgoing: downstream.outgoing().clone(),
        edges: downstream.edges().clone(),
        rtmp_port: rtmp.map(|addr| addr.port()),
    }
}

fn local(key: &'static str, addr: std::io::Result<SocketAddr>) -> Result<SocketAddr, StartError> {
    addr.map_err(|error| StartError::new(key, error))
}

/// Time for edges to request the last packets of streams that end with the node: a round trip or two.
const LINGER: Duration = Duration::from_millis(300);
