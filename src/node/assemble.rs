//! A node: sources, the hub and sinks, put together from settings.
//!
//! ```text
//! rtmp ─────┐                              ┌─► downstream: RTP to edges
//! upstream ─┴─► admission ─► hub ──────────┼─► recorder
//!                                          └─► http: viewers
//! ```
//!
//! `cloud` and `edge` are two sets of defaults of this one node (see [`super::settings`]). A part is
//! added here in one place: where it is bound, where it runs, and where it is drained if it holds
//! media.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use super::{StartError, TaskEnded, Tasks, metrics, upstream};
use crate::{
    config::ListenAddr,
    http::{
        HttpMetrics, HttpServer, ViewerSettings,
        api::{self, ApiState, DownstreamApi},
    },
    node,
    record::{RecordMetrics, Recorder},
    rtmp::{
        ServerMetrics as RtmpMetrics,
        listener::{Server as RtmpServer, ServerSettings as RtmpSettings},
    },
};
use downpour_distribution::{
    downstream::{self, Downstream, outgoing::OutgoingStreams},
    tls::{Fingerprint, Identity},
    upstream::{dispatch::Upstream, stats::ReceiveMetrics},
};
use downpour_hub::{Admission, Hub, LogLimits, admission::Settings as AdmissionSettings};

/// What a node is to be. A part that is `None` is left out.
pub struct NodeSettings {
    /// What each stream keeps for its readers.
    pub log: LogLimits,
    /// Limits of publishers and players.
    pub admission: AdmissionSettings,
    /// RTMP from encoders, and where it listens.
    pub rtmp: Option<(Setting<ListenAddr>, RtmpSettings)>,
    /// RTP from another node.
    pub upstream: Option<upstream::UpstreamSettings>,
    /// RTP to other nodes.
    pub downstream: Option<DownstreamSettings>,
    /// HTTP, and whether viewers are served there.
    pub http: HttpSettings,
    /// The directory of recordings.
    pub record: Option<PathBuf>,
    /// Time that parts have to finish when the node ends.
    pub grace: Duration,
}

/// A value with the key that it is set by, for errors.
#[derive(Debug, Clone)]
pub struct Setting<T> {
    /// As it stands in the file.
    pub key: &'static str,
    /// The value.
    pub value: T,
}

impl<T> Setting<T> {
    /// `value`, which is set by `key`.
    pub fn new(key: &'static str, value: T) -> Self {
        Self { key, value }
    }
}

/// RTP and repair for the nodes below.
pub struct DownstreamSettings {
    /// Where edges ask for lost packets; its port goes into `part`.
    pub quic_addr: Setting<ListenAddr>,
    /// The certificate and its key, made at the first start.
    pub cert_file: PathBuf,
    /// The private key.
    pub key_file: PathBuf,
    /// Everything else.
    pub part: downstream::Settings,
}

/// The HTTP server.
pub struct HttpSettings {
    /// Where it listens.
    pub addr: Setting<ListenAddr>,
    /// Whether `/{app}/{name}.flv` is served.
    pub flv: bool,
    /// Limits of viewers.
    pub viewers: ViewerSettings,
    /// Time that connections have to finish when the node ends.
    pub grace: Duration,
}

/// Where a node listens, ports that were 0 in the settings filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAddrs {
    /// RTMP, where encoders are served.
    pub rtmp: Option<SocketAddr>,
    /// HTTP.
    pub http: SocketAddr,
    /// What the nodes below need; `None` where there are none.
    pub downstream: Option<DownstreamAddrs>,
    /// Where RTP arrives, by path; empty on a node without an upstream.
    pub rtp_in: Vec<SocketAddr>,
}

/// What edges connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownstreamAddrs {
    /// QUIC.
    pub quic: SocketAddr,
    /// The UDP port from which RTP leaves and on which edges prove their addresses; `None` in debug
    /// mode.
    pub rtp: Option<u16>,
    /// The certificate that edges see on QUIC.
    pub fingerprint: Fingerprint,
}

/// A node whose addresses are bound and that is ready to run.
pub struct Node {
    admission: Admission,
    rtmp: Option<RtmpServer>,
    upstream: Option<Upstream>,
    received: Option<ReceiveMetrics>,
    downstream: Option<Downstream>,
    recorder: Option<Recorder>,
    http: HttpServer,
    http_grace: Duration,
    addrs: NodeAddrs,
    grace: Duration,
}

impl Node {
    /// Binds every address, and makes the certificate if there is none. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// With the setting that is at fault.
    pub fn bind(settings: NodeSettings) -> Result<Self, StartError> {
        let hub = Hub::new(settings.log);
        let admission = Admission::new(hub.clone(), settings.admission);
        let outgoing = settings.downstream.is_some().then(OutgoingStreams::new);
        let registry = metrics::registry(&admission, outgoing.clone())?;

        let rtmp = settings.rtmp.map(|(addr, rtmp)| bind_rtmp(&addr, rtmp, &registry));
        let rtmp = rtmp.transpose()?;
        let addr = settings.http.addr;
        let players = settings.http.viewers.max_viewers;
        let listener = node::listen(addr.key, &addr.value, players)?;
        let http_addr = local(addr.key, listener.local_addr())?;
        let downstream = match (settings.downstream, &outgoing) {
            (Some(downstream), Some(outgoing)) => {
                Some(bind_downstream(downstream, outgoing.clone(), &registry)?)
            }
            _ => None,
        };
        // The order of sinks is the order of taps: packets leave before anything else is done.
        if let Some((downstream, _)) = &downstream {
            hub.add_sink(downstream.sink());
        }
        let record_metrics = RecordMetrics::register(&registry)?;
        let recorder = settings.record.map(|dir| Recorder::new(dir, record_metrics));
        if let Some(recorder) = &recorder {
            hub.add_sink(Arc::new(recorder.clone()));
        }
        let upstream = settings
            .upstream
            .map(|upstream| upstream::bind(upstream, hub.clone(), &registry))
            .transpose()?;

        let addrs = NodeAddrs {
            rtmp: rtmp.as_ref().map(|(key, rtmp)| local(key, rtmp.local_addr())).transpose()?,
            http: http_addr,
            downstream: downstream.as_ref().map(|(_, addrs)| *addrs),
            rtp_in: upstream.as_ref().map_or_else(Vec::new, |upstream| upstream.addrs.clone()),
        };
        let state = ApiState {
            hub: hub.clone(),
            registry: registry.clone(),
            started: std::time::Instant::now(),
            downstream: downstream.as_ref().map(|(downstream, _)| DownstreamApi {
                outgoing: downstream.outgoing().clone(),
                edges: downstream.edges().clone(),
                rtmp_port: addrs.rtmp.map_or(0, |addr| addr.port()),
            }),
        };
        let viewers = settings.http.flv.then(|| admission.clone());
        let http_metrics = HttpMetrics::register(&registry)?;
        let http = HttpServer::new(
            listener,
            viewers,
            api::router(state),
            settings.http.viewers,
            http_metrics,
        );
        let (upstream, received) = match upstream {
            Some(bound) => (Some(bound.upstream), Some(bound.metrics)),
            None => (None, None),
        };
        Ok(Self {
            admission,
            rtmp: rtmp.map(|(_, rtmp)| rtmp),
            upstream,
            received,
            downstream: downstream.map(|(downstream, _)| downstream),
            recorder,
            http,
            http_grace: settings.http.grace,
            addrs,
            grace: settings.grace,
        })
    }

    /// Where it listens.
    pub fn addrs(&self) -> &NodeAddrs {
        &self.addrs
    }

    /// Who publishes and plays here, and how to end that.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Counters of the streams that come from another node, which go on while the node runs; `None`
    /// without an upstream.
    pub fn received(&self) -> Option<ReceiveMetrics> {
        self.received.clone()
    }

    /// Runs until `shutdown`, then drains: sources end, edges learn of each stream's end, viewers and
    /// recordings get what is there.
    ///
    /// # Errors
    /// If a part of the node ended early; the rest is drained all the same.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), TaskEnded> {
        let Self { admission, rtmp, upstream, downstream, recorder, http, http_grace, .. } = self;
        let grace = self.grace;
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
        if let (Some(downstream), Some(addrs)) = (downstream, self.addrs.downstream) {
            let ports = (addrs.quic.port(), self.addrs.http.port());
            sink_tasks.spawn("RTP sender", downstream.run(ports, sinks.clone()));
        }
        sink_tasks.spawn("HTTP server", http.run(sinks.clone(), http_grace));

        let outcome = tokio::select! {
            outcome = source_tasks.run_until(&shutdown) => outcome,
            outcome = sink_tasks.run_until(&shutdown) => outcome,
        };
        sources.cancel();
        let sent = drain.is_some() && !admission.hub().is_empty();
        let ended = admission.end_all();
        tracing::debug!(publications = ended, "sources are ending");
        if has_upstream && drain.is_some() {
            // What edges below get is complete once the streams from above have ended.
            let _ = tokio::time::timeout(grace / 2, source_tasks.join()).await;
        }
        if let Some(drain) = &drain
            && !drain.wait(grace / 2).await
        {
            tracing::warn!("packets were still queued for edges at the end");
        }
        if sent {
            // An edge that misses the tail asks for it within a round trip or two.
            tokio::time::sleep(LINGER.min(grace / 2)).await;
        }
        // Viewers finish when their streams end, which those of an upstream do when it ends.
        sinks.cancel();
        if tokio::time::timeout(grace, source_tasks.join()).await.is_err() {
            tracing::warn!(grace_ms = grace.as_millis(), "source connections were cut");
        }
        if let Some(recorder) = &recorder
            && tokio::time::timeout(grace, recorder.drain()).await.is_err()
        {
            tracing::error!(grace_ms = grace.as_millis(), "recordings were not written in time");
        }
        if tokio::time::timeout(grace, sink_tasks.join()).await.is_err() {
            tracing::warn!(grace_ms = grace.as_millis(), "connections were cut");
        }
        outcome
    }
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
        .map_err(|error| StartError::new("cert_file", error))?;
    part.quic_addr = node::resolve(quic_addr.key, &quic_addr.value)?;
    let downstream =
        Downstream::bind(part, &identity, outgoing, registry).map_err(|error| match error {
            downstream::BindError::Rtp(port, error) => StartError::listen("rtp_port", port, &error),
            downstream::BindError::Quic(addr, error) => {
                StartError::listen(quic_addr.key, addr, &error)
            }
            downstream::BindError::Tls(error) => StartError::new("cert_file", error),
            downstream::BindError::Metrics(error) => error.into(),
        })?;
    let addrs = DownstreamAddrs {
        quic: local(quic_addr.key, downstream.quic_addr())?,
        rtp: downstream.rtp_port(),
        fingerprint: identity.fingerprint(),
    };
    Ok((downstream, addrs))
}

fn local(key: &'static str, addr: std::io::Result<SocketAddr>) -> Result<SocketAddr, StartError> {
    addr.map_err(|error| StartError::new(key, error))
}

/// Time in which edges may ask for the tail of streams that end with the node.
const LINGER: Duration = Duration::from_millis(300);
