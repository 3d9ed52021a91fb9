//! Admission, reconnection and trust.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use downpour_distribution::{
    downstream::{
        outgoing::OutgoingStreams,
        repair_server::{
            EdgeHandler, EdgeHello, EdgeSession, RepairServer, RepairServerMetrics,
            RepairServerSettings,
        },
    },
    tls::{Fingerprint, Identity, Trust},
    upstream::repair_client::{
        ClientError, RepairClient, RepairClientMetrics, RepairClientSettings, RepairEvent,
    },
};
use downpour_media::StreamPattern;
use downpour_repair::control::{Report, StreamReport};
use prometheus::Registry;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{nack, stream_up, welcome};
use crate::common::repair_node::{Cloud, Edge, Feed, edge_settings, until};

#[derive(Clone, Default)]
struct Handler {
    seen: Arc<Mutex<Vec<String>>>,
}

struct Session(Handler);

impl EdgeHandler for Handler {
    fn hello(&self, edge: &EdgeHello) -> Result<Box<dyn EdgeSession>, String> {
        if edge.node == "mallory" {
            return Err("mallory may not".into());
        }
        let seen = format!("hello {} {:?} {:?}", edge.node, edge.token, edge.rtp_port);
        self.seen.lock().unwrap().push(seen);
        Ok(Box::new(Session(self.clone())))
    }
}

impl EdgeSession for Session {
    fn subscribed(&mut self, streams: &[StreamPattern]) {
        self.0.seen.lock().unwrap().push(format!("wants {}", streams[0]));
    }

    fn reported(&mut self, report: Report) {
        self.0.seen.lock().unwrap().push(format!("asked {}", report.streams[0].asked));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.0.seen.lock().unwrap().push("left".into());
    }
}

#[tokio::test]
async fn handler_admits_edges_and_gets_their_reports() {
    let identity = Arc::new(Identity::generate().unwrap());
    let metrics = RepairServerMetrics::register(&Registry::new()).unwrap();
    let settings = RepairServerSettings { token: Some("secret".into()), ..Default::default() };
    let handler = Handler::default();
    let server = RepairServer::bind(
        "127.0.0.1:0".parse().unwrap(),
        &identity,
        OutgoingStreams::new(),
        settings,
        metrics.clone(),
    )
    .unwrap()
    .with_handler(Arc::new(handler.clone()));
    let cloud = Cloud::run(server, OutgoingStreams::new(), identity, metrics);

    let settings = edge_settings(cloud.addr);
    for token in [None, Some("Secret".to_owned())] {
        let mut stranger = Edge::start(RepairClientSettings { token, ..settings.clone() });
        assert_eq!(stranger.disconnected().await, "the token is wrong or missing");
        assert!(stranger.metrics.refused_token.get() >= 1);
        assert_eq!((stranger.metrics.refused_edge.get(), stranger.metrics.connects.get()), (0, 1));
    }
    let settings = RepairClientSettings { token: Some("secret".into()), ..settings };
    let mut mallory =
        Edge::start(RepairClientSettings { node: "mallory".into(), ..settings.clone() });
    assert_eq!(mallory.disconnected().await, "mallory may not");
    assert!(mallory.metrics.refused_edge.get() >= 1);
    assert_eq!(mallory.metrics.refused_token.get(), 0);
    drop(mallory);

    let mut edge = Edge::start(settings);
    welcome(&mut edge).await;
    let report = StreamReport { ssrc: 7, asked: 42, ..Default::default() };
    edge.handle.report(Report { round_trip_us: 0, streams: vec![report] });
    let seen = || handler.seen.lock().unwrap().clone();
    until(|| seen().len() == 3).await;
    edge.shutdown.cancel();
    until(|| seen().len() == 4).await;
    assert_eq!(seen(), ["hello edge-1 Some(\"secret\") Some(5004)", "wants *", "asked 42", "left"]);
    assert!(cloud.metrics.refused_edge.get() >= 1);
    assert!(cloud.metrics.refused_token.get() >= 2);
}

#[tokio::test]
async fn edge_reconnects_to_a_restarted_cloud() {
    let cloud = Cloud::start();
    let (addr, identity, origin) = (cloud.addr, cloud.identity.clone(), cloud.origin.clone());
    let mut feed = Feed::start(&origin, "live/a", 7);
    let seqs = feed.push(3);
    let mut edge = Edge::start(edge_settings(addr));
    stream_up(&mut edge).await;
    cloud.stop().await;
    edge.disconnected().await;
    assert_eq!((edge.handle.rtt(), edge.handle.protocol()), (None, None));
    edge.handle.nack(nack(&feed, 1, &seqs));

    let _cloud = Cloud::restart_at(addr, identity, origin, RepairServerSettings::default()).await;
    stream_up(&mut edge).await;
    assert_eq!(edge.metrics.dropped_nacks.get(), 3, "nacks from before are forgotten");
    edge.handle.nack(nack(&feed, 1, &seqs[..1]));
    assert_eq!(edge.repair().await, feed.packet(seqs[0]));
}

#[test]
fn edge_reconnects_to_a_killed_cloud_before_the_timeout() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (edge_runtime, first, second) = (runtime(), runtime(), runtime());
    let cloud = first.block_on(async { Cloud::start() });
    let (addr, identity, origin) = (cloud.addr, cloud.identity.clone(), cloud.origin.clone());
    Feed::start(&origin, "live/a", 7);
    let mut edge = edge_runtime.block_on(async {
        let mut edge = Edge::start(edge_settings(addr));
        stream_up(&mut edge).await;
        edge
    });
    // The killed cloud sends nothing, not even a close.
    std::mem::forget(cloud);
    first.shutdown_timeout(Duration::from_secs(1));
    let killed = Instant::now();
    let _cloud = second.block_on(async {
        Cloud::start_at(addr, identity, origin, RepairServerSettings::default())
    });
    edge_runtime.block_on(stream_up(&mut edge));
    // Well below the idle timeout of 10 s: the new process resets the old one's connections.
    assert!(killed.elapsed() < Duration::from_secs(5), "{:?}", killed.elapsed());
}

#[tokio::test]
async fn edge_refuses_a_certificate_that_is_not_pinned() {
    let cloud = Cloud::start();
    let pinned = |fingerprint: Fingerprint| RepairClientSettings {
        trust: Trust::Pinned(fingerprint),
        ..edge_settings(cloud.addr)
    };
    let mut edge = Edge::start(pinned(cloud.identity.fingerprint()));
    welcome(&mut edge).await;

    let other = Identity::generate().unwrap().fingerprint();
    let mut edge = Edge::start(pinned(other));
    let reason = edge.disconnected().await;
    let wanted = format!(
        "the certificate of cloud {} has the fingerprint {}, but {other} is pinned",
        cloud.addr,
        cloud.identity.fingerprint()
    );
    assert!(reason.starts_with(&wanted), "{reason}");
    assert_eq!(edge.metrics.connects.get(), 0);
    assert!(edge.metrics.connect_failures.get() > 0);
    assert!(edge.metrics.refused_certificate.get() > 0);
    until(|| cloud.metrics.refused_handshake.get() > 0).await;
}

#[tokio::test]
async fn trust_on_first_use_refuses_a_changed_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("known-clouds");
    let cloud = Cloud::start();
    let addr = cloud.addr;
    let settings =
        RepairClientSettings { trust: Trust::TrustOnFirstUse(file.clone()), ..edge_settings(addr) };
    let mut edge = Edge::start(settings.clone());
    welcome(&mut edge).await;
    let kept = fs::read_to_string(&file).unwrap();
    assert_eq!(kept, format!("{addr} {}\n", cloud.identity.fingerprint()));
    cloud.stop().await;
    edge.disconnected().await;

    let identity = Arc::new(Identity::generate().unwrap());
    let _cloud =
        Cloud::restart_at(addr, identity, OutgoingStreams::new(), RepairServerSettings::default())
            .await;
    let refusal = edge
        .wait(|event| match event {
            RepairEvent::Disconnected { reason } if reason.contains("changed") => Some(reason),
            RepairEvent::Welcome(_) => panic!("trusted a changed certificate"),
            _ => None,
        })
        .await;
    assert!(refusal.contains(&format!("remove line 1 of {}", file.display())), "{refusal}");
    assert_eq!(fs::read_to_string(&file).unwrap(), kept);

    // The remedy in the message works without a restart.
    fs::write(&file, "").unwrap();
    welcome(&mut edge).await;
}

#[tokio::test]
async fn edge_verifies_the_host_name_with_a_ca() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
    let identity = Arc::new(Identity::load_or_create(&paths[0], &paths[1]).unwrap());
    let addr = "127.0.0.1:0".parse().unwrap();
    let cloud =
        Cloud::start_at(addr, identity, OutgoingStreams::new(), RepairServerSettings::default());
    let settings = |host: &str, ca: &Path| RepairClientSettings {
        cloud: format!("{host}:{}", cloud.addr.port()),
        trust: Trust::Ca(ca.into()),
        ..edge_settings(cloud.addr)
    };
    let mut edge = Edge::start(settings("localhost", &paths[0]));
    welcome(&mut edge).await;
    let mut edge = Edge::start(settings("127.0.0.1", &paths[0]));
    let reason = edge.disconnected().await;
    assert!(reason.starts_with("the certificate of cloud 127.0.0.1:"), "{reason}");
    assert!(edge.metrics.refused_certificate.get() > 0);
    until(|| cloud.metrics.refused_handshake.get() > 0).await;
}

#[tokio::test]
async fn client_refuses_an_invalid_cloud_address() {
    for cloud in ["", "cloud", ":4242", "cloud:", "cloud:x", "a b:1", "cloud:99999"] {
        let settings = RepairClientSettings {
            cloud: cloud.into(),
            ..edge_settings("127.0.0.1:1".parse().unwrap())
        };
        let metrics = RepairClientMetrics::register(&Registry::new()).unwrap();
        let spawned =
            RepairClient::spawn(settings, mpsc::channel(1).0, metrics, CancellationToken::new());
        assert!(matches!(spawned, Err(ClientError::Cloud(_))), "{cloud:?}");
    }
}
