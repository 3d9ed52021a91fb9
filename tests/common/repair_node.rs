//! A repair server and repair clients on loopback, with streams that tests publish packet by packet.

use std::{
    future::Future,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use downpour_distribution::{
    downstream::{
        outgoing::{OutgoingStream, OutgoingStreams},
        repair_server::{RepairServer, RepairServerMetrics, RepairServerSettings},
    },
    tls::{ClientTls, Identity, Trust},
    upstream::repair_client::{
        RepairClient, RepairClientMetrics, RepairClientSettings, RepairEvent, RepairHandle,
    },
};
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::{
    history::History,
    rtp::{Packetizer, Seq, Ssrc},
};
use prometheus::Registry;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use super::eventually;

pub struct Cloud {
    pub addr: SocketAddr,
    pub origin: OutgoingStreams,
    pub identity: Arc<Identity>,
    pub metrics: RepairServerMetrics,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

impl Cloud {
    pub fn start() -> Self {
        Self::start_with(RepairServerSettings::default())
    }

    pub fn start_with(settings: RepairServerSettings) -> Self {
        let identity = Arc::new(Identity::generate().unwrap());
        Self::start_at("127.0.0.1:0".parse().unwrap(), identity, OutgoingStreams::new(), settings)
    }

    pub fn start_at(
        addr: SocketAddr,
        identity: Arc<Identity>,
        origin: OutgoingStreams,
        settings: RepairServerSettings,
    ) -> Self {
        let metrics = RepairServerMetrics::register(&Registry::new()).unwrap();
        let server =
            RepairServer::bind(addr, &identity, origin.clone(), settings, metrics.clone()).unwrap();
        Self::run(server, origin, identity, metrics)
    }

    /// The same at the address of a stopped cloud, whose socket may take a moment to close.
    pub async fn restart_at(
        addr: SocketAddr,
        identity: Arc<Identity>,
        origin: OutgoingStreams,
        settings: RepairServerSettings,
    ) -> Self {
        within(async {
            loop {
                let metrics = RepairServerMetrics::register(&Registry::new()).unwrap();
                let (origin, settings) = (origin.clone(), settings.clone());
                match RepairServer::bind(addr, &identity, origin.clone(), settings, metrics.clone())
                {
                    Ok(server) => return Self::run(server, origin, identity, metrics),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        })
        .await
    }

    pub fn run(
        server: RepairServer,
        origin: OutgoingStreams,
        identity: Arc<Identity>,
        metrics: RepairServerMetrics,
    ) -> Self {
        let addr = server.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(server.run(shutdown.clone()));
        Self { addr, origin, identity, metrics, shutdown, task }
    }

    pub async fn stop(self) {
        self.shutdown.cancel();
        within(self.task).await.unwrap();
    }
}

/// A stream that a test publishes.
pub struct Feed {
    pub stream: Arc<OutgoingStream>,
    packetizer: Packetizer,
}

impl Feed {
    pub fn start(origin: &OutgoingStreams, key: &str, ssrc: u32) -> Self {
        let history = History::new(5000, Duration::from_secs(60));
        let stream = Arc::new(OutgoingStream::new(key.parse().unwrap(), Ssrc(ssrc), 1234, history));
        origin.insert(stream.clone());
        Self { stream, packetizer: Packetizer::new(Ssrc(ssrc), 1120) }
    }

    /// Sends a key frame of `count` packets.
    pub fn push(&mut self, count: usize) -> Vec<Seq> {
        let first = self.packetizer.next_seq();
        let mut body = vec![0x5a; count * 1120 - Tag::HEADER_LEN];
        body[..2].copy_from_slice(&[0x17, 1]);
        let tag = Tag::new(TagKind::Video, 40, &body).unwrap();
        let burst = self.packetizer.packetize(&tag);
        assert_eq!(burst.count(), count);
        self.stream.push(Instant::now(), burst, true);
        (0..count).map(|i| first.plus(i)).collect()
    }

    pub fn packet(&self, seq: Seq) -> Bytes {
        self.stream.packet(seq).unwrap()
    }

    pub fn ssrc(&self) -> Ssrc {
        self.stream.ssrc()
    }
}

/// A [`RepairClient`] and its events.
pub struct Edge {
    pub handle: RepairHandle,
    pub events: mpsc::Receiver<RepairEvent>,
    pub metrics: RepairClientMetrics,
    pub shutdown: CancellationToken,
}

impl Edge {
    pub fn start(settings: RepairClientSettings) -> Self {
        let (sender, events) = mpsc::channel(4096);
        let metrics = RepairClientMetrics::register(&Registry::new()).unwrap();
        let shutdown = CancellationToken::new();
        let handle =
            RepairClient::spawn(settings, sender, metrics.clone(), shutdown.clone()).unwrap();
        Self { handle, events, metrics, shutdown }
    }

    /// Waits for an event for which `pick` returns a value.
    pub async fn wait<T>(&mut self, mut pick: impl FnMut(RepairEvent) -> Option<T>) -> T {
        within(async {
            loop {
                let event = self.events.recv().await.expect("the client is alive");
                if let Some(picked) = pick(event) {
                    return picked;
                }
            }
        })
        .await
    }

    pub async fn repair(&mut self) -> Bytes {
        self.wait(|event| match event {
            RepairEvent::Repair(packet) => Some(packet),
            _ => None,
        })
        .await
    }

    /// Waits until the client has ended after its shutdown.
    pub async fn wait_closed(&mut self) {
        within(async { while self.events.recv().await.is_some() {} }).await
    }

    pub async fn disconnected(&mut self) -> String {
        self.wait(|event| match event {
            RepairEvent::Disconnected { reason } => Some(reason),
            _ => None,
        })
        .await
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

pub fn edge_settings(addr: SocketAddr) -> RepairClientSettings {
    RepairClientSettings {
        cloud: addr.to_string(),
        protocol: Default::default(),
        trust: Trust::Insecure,
        node: "edge-1".into(),
        token: None,
        streams: vec!["*".parse().unwrap()],
        rtp_port: Some(5004),
        rtp_paths: 1,
        group: None,
        parity: false,
        latency: Duration::from_millis(500),
    }
}

/// A plain QUIC client.
pub fn quic_client() -> quinn::Endpoint {
    quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap()
}

pub async fn dial(
    endpoint: &quinn::Endpoint,
    addr: SocketAddr,
    alpn: &[u8],
    transport: quinn::TransportConfig,
) -> Result<quinn::Connection, quinn::ConnectionError> {
    let tls = ClientTls::new(&Trust::Insecure, "x:1", &[alpn]).unwrap();
    let mut config = quinn::ClientConfig::new(tls.crypto());
    config.transport_config(Arc::new(transport));
    within(endpoint.connect_with(config, addr, "localhost").unwrap()).await
}

/// Awaits `future` with a deadline of 15 s.
pub async fn within<F: Future>(future: F) -> F::Output {
    timeout(Duration::from_secs(15), future).await.expect("in time")
}

/// Waits until a condition holds.
pub async fn until(condition: impl FnMut() -> bool) {
    eventually("a condition of the repair service", condition).await;
}
