//! One admission for all sources of a node: a key of one source is refused to the others, and a slow
//! decision does not delay other connections.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use crate::common::{SOON, eventually, ports, rtmp_node::RtmpServer};
use downpour::{
    config::{CloudConfig, EdgeConfig},
    node::{Node, NodeSettings},
    rtmp::{
        client::{ClientError, Publisher},
        listener::ServerSettings,
    },
};
use downpour_hub::admission::{Decision, Policy, Request};
use downpour_media::flv::{Tag, TagKind};
use downpour_rtmp::url::RtmpUrl;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn encoder_is_refused_a_key_that_another_source_holds() {
    let server = RtmpServer::start(ServerSettings::default());
    let url = server.url("live/x");
    let hub = server.admission.hub();
    let held = hub.publish("live/x".parse().unwrap()).unwrap();
    let refused = Publisher::connect(&url, SOON).await.unwrap_err();
    let ClientError::Rejected { code, description } = refused else { panic!("{refused}") };
    assert_eq!(code, "NetStream.Publish.BadName");
    assert_eq!(description, "live/x already has a live publisher");
    assert_eq!(server.metric("downpour_rtmp_refused_total{reason=\"already_live\"}"), 1.0);
    assert_eq!(hub.len(), 1, "the held stream is still live");

    drop(held);
    let mut publisher = Publisher::connect(&url, SOON).await.unwrap();
    let error = hub.publish("live/x".parse().unwrap()).unwrap_err();
    assert_eq!(error.0.as_str(), "live/x", "the reverse direction");
    publisher.send(&audio(1)).await.unwrap();
    publisher.close().await.unwrap();
    assert_eq!(server.recorder.ended("live/x", 1).await, [audio(1)]);
}

/// Neither role has RTMP and an upstream, but one node may.
#[tokio::test(flavor = "multi_thread")]
async fn node_with_rtmp_and_an_upstream_refuses_a_key_from_above() {
    let dir = tempfile::tempdir().unwrap();
    let mut cloud = CloudConfig {
        rtmp_addr: "127.0.0.1:0".parse().unwrap(),
        api_addr: "127.0.0.1:0".parse().unwrap(),
        ..CloudConfig::default()
    };
    cloud.downstream.quic_addr = "127.0.0.1:0".parse().unwrap();
    cloud.downstream.rtp_port = ports::free();
    cloud.downstream.targets.clear();
    cloud.downstream.cert_file = dir.path().join("cert.pem");
    cloud.downstream.key_file = dir.path().join("key.pem");
    let above = Node::bind(NodeSettings::from(&cloud)).unwrap();
    let addrs = above.addrs().clone();
    let below = addrs.downstream.expect("a cloud serves edges");

    let edge = EdgeConfig {
        udp_addr: "127.0.0.1:0".parse().unwrap(),
        flv_addr: "127.0.0.1:0".parse().unwrap(),
        cloud_host: "127.0.0.1".into(),
        quic_addr: below.quic.to_string().parse().unwrap(),
        api_addr: addrs.http.to_string().parse().unwrap(),
        fingerprint: Some(below.fingerprint),
        ..EdgeConfig::default()
    };
    let settings = NodeSettings { rtmp: NodeSettings::from(&cloud).rtmp, ..(&edge).into() };
    let both = Node::bind(settings).unwrap();
    let rtmp_below = both.addrs().rtmp.expect("RTMP is bound");
    let hub = both.admission().hub().clone();

    let shutdown = CancellationToken::new();
    let nodes = [above, both].map(|node| tokio::spawn(node.run(shutdown.clone())));
    let url = |addr: Option<_>, key: &str| -> RtmpUrl {
        let addr: std::net::SocketAddr = addr.expect("it has RTMP");
        format!("rtmp://{addr}/{key}").parse().unwrap()
    };
    let mut encoder = Publisher::connect(&url(addrs.rtmp, "live/x"), SOON).await.unwrap();
    encoder.send(&audio(0)).await.unwrap();
    eventually("the stream arrives from upstream", || hub.stream("live/x").is_some()).await;

    let url_below = url(Some(rtmp_below), "live/x");
    let refused = Publisher::connect(&url_below, SOON).await.unwrap_err();
    let ClientError::Rejected { code, .. } = refused else { panic!("{refused}") };
    assert_eq!(code, "NetStream.Publish.BadName");
    let other = Publisher::connect(&url(Some(rtmp_below), "live/y"), SOON).await.unwrap();
    other.close().await.unwrap();

    // After the end of the upstream's stream, the key is free.
    encoder.close().await.unwrap();
    eventually("the stream has ended", || hub.stream("live/x").is_none()).await;
    Publisher::connect(&url_below, SOON).await.unwrap().close().await.unwrap();
    shutdown.cancel();
    for node in nodes {
        tokio::time::timeout(SOON, node).await.expect("the node ends").unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_decision_about_one_encoder_delays_no_other() {
    let server = RtmpServer::start(ServerSettings { threads: 1, ..ServerSettings::default() });
    let gate = Arc::new(Gate::default());
    server.admission.add_policy(gate.clone());
    let mut live = Publisher::connect(&server.url("live/fast"), SOON).await.unwrap();
    let url = server.url("live/slow");
    let slow = tokio::spawn(async move { Publisher::connect(&url, SOON).await });
    eventually("the decision is awaited", || gate.requested.load(Ordering::Relaxed)).await;

    // One thread serves both connections: each tag must pass while the decision is open.
    let received = |count: usize| {
        server
            .recorder
            .recorded("live/fast", |all| all.first().is_some_and(|live| live.tags.len() == count))
    };
    for number in 1..=30 {
        live.send(&audio(number)).await.unwrap();
        let got = || received(number as usize);
        eventually("a tag arrives during the decision", got).await;
    }
    let another = Publisher::connect(&server.url("live/another"), SOON).await.unwrap();
    assert!(!slow.is_finished(), "the decision is still open");
    server.recorder.recorded("live/slow", |all| assert!(all.is_empty()));

    gate.open.add_permits(1);
    let mut slow = slow.await.unwrap().unwrap();
    slow.send(&audio(7)).await.unwrap();
    for publisher in [slow, another, live] {
        publisher.close().await.unwrap();
    }
    assert_eq!(server.recorder.ended("live/slow", 1).await, [audio(7)]);
}

/// An encoder that leaves while the decision is open gets no key, and its connection ends with
/// `publish_timeout` at the latest.
#[tokio::test(flavor = "multi_thread")]
async fn encoder_that_leaves_during_the_decision_holds_no_key() {
    let publish_timeout = Duration::from_secs(3);
    let settings = ServerSettings { publish_timeout, threads: 1, ..ServerSettings::default() };
    let server = RtmpServer::start(settings);
    let gate = Arc::new(Gate::default());
    server.admission.add_policy(gate.clone());
    let url = server.url("live/slow");
    let gone = tokio::spawn(async move { Publisher::connect(&url, SOON).await });
    eventually("the decision is awaited", || gate.requested.load(Ordering::Relaxed)).await;
    gone.abort();
    server.metric_reaches("downpour_rtmp_connections", 0.0).await;
    gate.open.add_permits(1);
    let next = Publisher::connect(&server.url("live/slow"), SOON).await.unwrap();
    next.close().await.unwrap();
}

/// A policy that decides about encoders of `slow` only with a permit.
struct Gate {
    requested: AtomicBool,
    open: Semaphore,
}

impl Default for Gate {
    fn default() -> Self {
        Self { requested: AtomicBool::new(false), open: Semaphore::new(0) }
    }
}

impl Policy for Gate {
    fn decide<'a>(&'a self, request: &'a Request) -> Decision<'a> {
        Box::pin(async move {
            if request.key.name() == "slow" {
                self.requested.store(true, Ordering::Relaxed);
                self.open.acquire().await.expect("the gate is never closed").forget();
            }
            Ok(())
        })
    }
}

fn audio(timestamp: u32) -> Tag {
    Tag::new(TagKind::Audio, timestamp, &[0xaf, 1, 2]).unwrap()
}
