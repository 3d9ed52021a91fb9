//! The cloud node: takes publications, sends them to the edges, and repairs what got lost.

pub mod publications;

use std::{
    collections::HashSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::{task::JoinSet, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{ClientAddr, CloudConfig},
    http::{
        HttpMetrics, HttpServer, ViewerSettings,
        api::{self, CloudState},
    },
    node::{StartError, TaskEnded, Tasks, listen, metrics, resolve},
    record::{RecordMetrics, Recorder},
    rtmp::{
        ServerMetrics as RtmpMetrics,
        listener::{Server as RtmpServer, ServerSettings},
    },
};
use downpour_distribution::downstream::subscribers::{ProbeMetrics, Subscribers};
use downpour_distribution::{
    address::Destination,
    downstream::{
        edges::{Edges, metrics::ReportCollector},
        fanout::{self, Fanout, FanoutMetrics, OnDatagrams},
        outgoing::OutgoingStreams,
        repair_server::{BindError, RepairServer, RepairServerMetrics, RepairServerSettings},
        routes::{FixedTarget, Routes},
    },
    tls::{Fingerprint, Identity},
};
use downpour_hub::{Hub, LogLimits};
use downpour_repair::fec::Fec;
use downpour_sys::udp::MulticastOut;
use publications::{PublicationMetrics, Publications};

/// A cloud node whose addresses are bound and that is ready to run.
pub struct Cloud {
    rtmp: RtmpServer,
    repair: RepairServer,
    api: HttpServer,
    fanout: Option<Fanout>,
    publications: Publications,
    subscribers: Subscribers,
    recorder: Option<Recorder>,
    destinations: Vec<(Destination, Fec)>,
    addrs: CloudAddrs,
    grace: Duration,
}

/// Where a cloud node listens, ports that were 0 in the settings filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CloudAddrs {
    /// RTMP.
    pub rtmp: SocketAddr,
    /// HTTP.
    pub api: SocketAddr,
    /// QUIC.
    pub quic: SocketAddr,
    /// The UDP port that RTP comes from and that edges prove their addresses to; `None` in debug
    /// mode.
    pub rtp: Option<u16>,
    /// The certificate that edges see on QUIC.
    pub fingerprint: Fingerprint,
}

impl Cloud {
    /// Binds every address and makes the certificate if there is none.
    ///
    /// # Errors
    /// With the setting that is at fault.
    pub async fn bind(config: &CloudConfig) -> Result<Self, StartError> {
        // Recordings are all that reads a cloud's logs; what edges ask for is in the history.
        let hub = Hub::new(match config.enable_record {
            true => LogLimits {
                max_bytes: config.gop_cache_max_bytes,
                max_age: config.gop_cache_max_ms,
            },
            false => LogLimits { max_bytes: 0, max_age: 0 },
        });
        let origin = OutgoingStreams::new();
        let registry = metrics::registry(hub.clone(), Some(origin.clone()))?;

        let rtmp_addr = resolve("rtmp_addr", &config.rtmp_addr)?;
        let rtmp_settings = ServerSettings {
            max_connections: config.rtmp_max_connections,
            ..ServerSettings::default()
        };
        let rtmp = RtmpServer::bind(rtmp_addr, rtmp_settings)
            .map_err(|error| StartError::listen("rtmp_addr", rtmp_addr, &error))?
            .with_metrics(RtmpMetrics::register(&registry)?);

        let identity = Identity::load_or_create(&config.cert_file, &config.key_file)
            .map_err(|error| StartError::new("cert_file", error))?;
        let quic_addr = resolve("quic_addr", &config.quic_addr)?;
        let api_listener = listen("api_addr", &config.api_addr, 0)?;

        let fanout_settings = fanout::Settings {
            port: config.rtp_port,
            multicast: MulticastOut {
                ttl: config.multicast_ttl,
                looped: config.multicast_loop,
                interface: config.multicast_interface.0,
            },
            workers: config.fanout_workers,
            pacing: config.pacing,
            ..fanout::Settings::default()
        };
        let fanout_metrics = FanoutMetrics::register(&registry)?;
        let routes = Routes::new(&registry)?;
        routes.set_edge_fec(config.fec);
        let edges = Edges::default();
        registry.register(Box::new(ReportCollector::new(edges.clone())?))?;
        let probe_metrics = ProbeMetrics::register(&registry)?;
        let subscribers =
            Subscribers::new(routes.clone(), origin.clone(), edges.clone(), probe_metrics);
        let probed = subscribers.clone();
        let on_datagrams: OnDatagrams =
            Arc::new(move |from, bytes| probed.handle_datagrams(Instant::now(), from, bytes));
        let fanout = match config.debug {
            true => None,
            false => Some(
                Fanout::spawn(&fanout_settings, routes, &on_datagrams, fanout_metrics)
                    .map_err(|error| StartError::listen("rtp_port", config.rtp_port, &error))?,
            ),
        };
        let repair_settings = RepairServerSettings {
            node: node_name(),
            rtp_port: fanout.as_ref().map_or(config.rtp_port, Fanout::local_port),
            v0: config.v0_repair,
            max_connections: config.max_edges,
            v0_allow: config.v0_allow.clone(),
            repair_budget: config.repair_budget,
            token: Some(config.edge_token.clone()).filter(|token| !token.is_empty()),
            ..RepairServerSettings::default()
        };
        let mut repair = RepairServer::bind(
            quic_addr,
            &identity,
            origin.clone(),
            repair_settings,
            RepairServerMetrics::register(&registry)?,
        )
        .map_err(|error| match error {
            BindError::Socket(_, error) => StartError::listen("quic_addr", quic_addr, &error),
            BindError::Tls(error) => StartError::new("cert_file", error),
        })?
        .with_handler(Arc::new(subscribers.clone()));
        if let Some(fanout) = &fanout {
            repair = repair.with_group_sender(Arc::new(fanout.clone()));
        }

        let record_metrics = RecordMetrics::register(&registry)?;
        let recorder =
            config.enable_record.then(|| Recorder::new(&config.record_dir, record_metrics));
        let on_start = recorder.clone();
        let publications = Publications::new(
            publications::Settings {
                cache_packets: config.rtp_cache_size,
                cache_age: Duration::from_millis(config.rtp_cache_ms),
                payload_max: config.rtp_payload_max,
                silence: Duration::from_millis(config.publisher_silence_ms),
                max_streams: config.max_streams,
            },
            hub.clone(),
            origin.clone(),
            fanout.clone(),
            PublicationMetrics::register(&registry)?,
            move |stream| {
                if let Some(recorder) = &on_start {
                    recorder.record(stream);
                }
            },
        );

        let local = |key, result: std::io::Result<SocketAddr>| {
            result.map_err(|error| StartError::new(key, error))
        };
        let addrs = CloudAddrs {
            rtmp: local("rtmp_addr", rtmp.local_addr())?,
            api: local("api_addr", api_listener.local_addr())?,
            quic: local("quic_addr", repair.local_addr())?,
            rtp: fanout.as_ref().map(Fanout::local_port),
            fingerprint: identity.fingerprint(),
        };
        let with_fec =
            |client: &ClientAddr| (client.addr.clone(), client.fec.unwrap_or(config.fec));
        let destinations = config.client_addr_list.iter().map(with_fec).collect();
        let state = CloudState {
            hub,
            origin,
            edges,
            registry: registry.clone(),
            started: Instant::now(),
            rtmp_port: addrs.rtmp.port(),
        };
        let api = HttpServer::new(
            api_listener,
            None,
            api::cloud_router(state),
            ViewerSettings { max_viewers: 0, ..ViewerSettings::default() },
            HttpMetrics::register(&registry)?,
        );
        Ok(Self {
            rtmp,
            repair,
            api,
            fanout,
            publications,
            subscribers,
            recorder,
            destinations,
            addrs,
            grace: Duration::from_millis(config.shutdown_grace_ms),
        })
    }

    /// Where it listens.
    pub fn addrs(&self) -> CloudAddrs {
        self.addrs
    }

    /// Runs until `shutdown`, then drains: no new publishers, edges told of every stream's end,
    /// recordings written.
    ///
    /// # Errors
    /// If a part of the node ended by itself; the rest is drained all the same.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), TaskEnded> {
        let Self { rtmp, repair, api, fanout, publications, subscribers, recorder, .. } = self;
        let (ingest, egress) = (CancellationToken::new(), CancellationToken::new());
        let mut tasks = Tasks::default();
        tasks.spawn("RTMP server", rtmp.run(Arc::new(publications.clone()), ingest.clone()));
        tasks.spawn("repair server", repair.run(egress.clone()));
        tasks.spawn("HTTP server", api.run(egress.clone(), HTTP_GRACE));
        tasks.spawn("parity", drive_parity(publications.clone(), egress.clone()));
        tasks.spawn("expiry", expire(publications.clone(), subscribers, egress.clone()));
        if let Some(fanout) = fanout.clone() {
            let (watched, ending) = (fanout.clone(), egress.clone());
            tasks.spawn("fan-out", async move {
                tokio::select! {
                    () = watched.failed() => {}
                    () = ending.cancelled() => {}
                }
            });
            let ports = (self.addrs.quic.port(), self.addrs.api.port());
            let announcing = announce(fanout, self.destinations, ports, egress.clone());
            tasks.spawn("announcement", announcing);
        }
        let outcome = tasks.run_until(&shutdown).await;
        ingest.cancel();
        let ended = publications.end_all();
        if let Some(fanout) = &fanout
            && !fanout.drain(self.grace / 2).await
        {
            tracing::warn!("not all that waited for the fan-out has left");
        }
        if ended > 0 {
            // An edge that misses the tail asks for it within a round trip or two.
            tokio::time::sleep(LINGER.min(self.grace / 2)).await;
        }
        if let Some(recorder) = &recorder
            && tokio::time::timeout(self.grace, recorder.drain()).await.is_err()
        {
            tracing::error!("the disk did not take the recordings within {:?}", self.grace);
        }
        egress.cancel();
        if tokio::time::timeout(self.grace, tasks.join()).await.is_err() {
            tracing::warn!("connections were cut after {:?}", self.grace);
        }
        outcome
    }
}

/// Keeps the fan-out's targets current and tells them the ports now and then: an edge takes that
/// from its first datagram only, and may be started at any time (wire v0).
async fn announce(
    fanout: Fanout,
    destinations: Vec<(Destination, Fec)>,
    (quic_port, api_port): (u16, u16),
    shutdown: CancellationToken,
) {
    let mut datagram = BytesMut::with_capacity(8);
    datagram.put_slice(b"0001");
    datagram.put_u16(quic_port);
    datagram.put_u16(api_port);
    let datagram: Bytes = datagram.freeze();
    let mut targets = Targets::new(destinations);
    fanout.routes().set_fixed(targets.known());
    let mut ticks = tokio::time::interval(ANNOUNCE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = targets.next() => if changed {
                fanout.routes().set_fixed(targets.known());
                fanout.send_to_fixed(datagram.clone());
            },
            _ = ticks.tick() => {
                targets.look_up();
                fanout.send_to_fixed(datagram.clone());
            }
        }
    }
}

/// The destinations and the address that each was last found to have.
struct Targets {
    destinations: Vec<(Destination, Fec)>,
    addresses: Vec<Option<SocketAddr>>,
    failed: HashSet<usize>,
    last_round: Option<Instant>,
    look_ups: JoinSet<(usize, Result<SocketAddr, String>)>,
}

impl Targets {
    /// Addresses are known at once; names are after [`Targets::look_up`].
    fn new(destinations: Vec<(Destination, Fec)>) -> Self {
        let literal =
            |(d, _): &(Destination, Fec)| Some((d.host().parse::<IpAddr>().ok()?, d.port()).into());
        Self {
            addresses: destinations.iter().map(literal).collect(),
            destinations,
            failed: HashSet::new(),
            last_round: None,
            look_ups: JoinSet::new(),
        }
    }

    fn known(&self) -> Vec<FixedTarget> {
        let known = self.addresses.iter().zip(&self.destinations);
        known
            .filter_map(|(addr, (_, fec))| Some(FixedTarget { addr: (*addr)?, fec: *fec }))
            .collect()
    }

    /// Begins to look up what is due: names that failed each time, the others now and then, since
    /// they may move. One slow name server holds up nothing else.
    fn look_up(&mut self) {
        if !self.look_ups.is_empty() {
            return;
        }
        let all = self.last_round.is_none_or(|at| at.elapsed() >= LOOK_UP_EVERY);
        if all {
            self.last_round = Some(Instant::now());
        }
        for (i, (destination, _)) in self.destinations.iter().enumerate() {
            let is_name = destination.host().parse::<IpAddr>().is_err();
            if is_name && (all || self.failed.contains(&i)) {
                let (host, port) = (destination.host().to_owned(), destination.port());
                let current = self.addresses[i];
                self.look_ups.spawn(async move {
                    let found = tokio::net::lookup_host((host, port));
                    let found = match tokio::time::timeout(LOOK_UP_TIMEOUT, found).await {
                        Ok(Ok(addresses)) => {
                            choose(addresses, current).ok_or("no address".to_owned())
                        }
                        Ok(Err(error)) => Err(error.to_string()),
                        Err(_) => Err("the name server does not answer".to_owned()),
                    };
                    (i, found)
                });
            }
        }
    }

    /// Waits for the next look-up to end; says whether the known addresses changed. A name that
    /// cannot be found now keeps the address that it had.
    async fn next(&mut self) -> bool {
        let Some(Ok((i, found))) = self.look_ups.join_next().await else {
            return std::future::pending().await;
        };
        let (destination, _) = &self.destinations[i];
        match found {
            Ok(address) => {
                if self.failed.remove(&i) {
                    tracing::info!("client_addr_list: {destination} is found again");
                }
                self.addresses[i].replace(address) != Some(address)
            }
            Err(why) => {
                if self.failed.insert(i) {
                    tracing::error!("client_addr_list: {destination} is not found: {why}");
                }
                false
            }
        }
    }
}

/// One of the addresses of a name: the one that it had if that is among them, since an edge must not
/// lose its stream to the order of a name server's answers; else IPv4 before IPv6, as an edge that
/// listens on `:5222` has.
fn choose(
    addresses: impl Iterator<Item = SocketAddr>,
    current: Option<SocketAddr>,
) -> Option<SocketAddr> {
    addresses.min_by_key(|address| (Some(*address) != current, address.is_ipv6()))
}

async fn expire(publications: Publications, subscribers: Subscribers, shutdown: CancellationToken) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = ticks.tick() => {
                publications.expire(Instant::now());
                subscribers.handle_timeout(Instant::now());
            }
        }
    }
}

async fn drive_parity(publications: Publications, shutdown: CancellationToken) {
    tokio::select! {
        () = shutdown.cancelled() => {}
        () = publications.drive_parity() => {}
    }
}

fn node_name() -> String {
    crate::node::host_name().unwrap_or_else(|| "cloud".into())
}

const LINGER: Duration = Duration::from_millis(300);
const ANNOUNCE_EVERY: Duration = Duration::from_secs(5);
/// Names may move to other addresses.
const LOOK_UP_EVERY: Duration = Duration::from_secs(30);
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);
const HTTP_GRACE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_sent_to_at_once_and_names_when_they_are_found() {
        let destinations = ["127.0.0.1:5000", "localhost:5001", "no-such-name.invalid:5002"];
        let destinations = destinations.map(|d| (d.parse().unwrap(), Fec::Auto)).to_vec();
        let mut targets = Targets::new(destinations);
        let literal = FixedTarget { addr: ([127, 0, 0, 1], 5000).into(), fec: Fec::Auto };
        assert_eq!(targets.known(), [literal]);
        targets.look_up();
        let mut changes = 0;
        while !targets.look_ups.is_empty() {
            changes += usize::from(targets.next().await);
        }
        assert_eq!(changes, 1);
        assert_eq!((targets.known().len(), targets.failed.len()), (2, 1));
        assert!(targets.known()[1].addr.ip().is_loopback());
        // What was found once is kept when it cannot be found any more.
        targets.look_ups.spawn(async { (1, Err("gone".into())) });
        assert!(!targets.next().await);
        assert_eq!(targets.known().len(), 2);

        let [v6, a, b] = ["[::1]:1", "10.0.0.1:1", "10.0.0.2:1"].map(|a| a.parse().unwrap());
        assert_eq!(choose([v6, a, b].into_iter(), None), Some(a));
        assert_eq!(choose([v6, a, b].into_iter(), Some(b)), Some(b));
        assert_eq!(choose([v6].into_iter(), Some(b)), Some(v6));
    }
}
