//! An edge that loses its connection resumes within one round trip, with the same trust checks.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::common::repair_node::{Cloud, Edge, Feed, edge_settings, until};
use downpour_distribution::{
    downstream::{outgoing::OutgoingStreams, repair_server::RepairServerSettings},
    tls::{Identity, Trust},
    upstream::repair_client::{RepairClientSettings, RepairEvent},
};
use downpour_netem::{LinkSettings, RelaySettings, UdpRelay};
use downpour_repair::control::{DelayReport, MAX_EDGE_MESSAGE, Report, StreamReport};

const ROUND_TRIP: Duration = Duration::from_millis(400);

/// Makes the cloud close the connection, by a report that exceeds its limit. Returns the reason.
async fn cut(edge: &mut Edge) -> String {
    let counts = vec![1; MAX_EDGE_MESSAGE / 2];
    let delays = DelayReport { counts, sum_us: 0 };
    let streams = vec![StreamReport { delays, ..StreamReport::default() }];
    edge.handle.report(Report { round_trip_us: 0, streams });
    edge.disconnected().await
}

async fn welcome(edge: &mut Edge) {
    edge.wait(|event| matches!(event, RepairEvent::Welcome(_)).then_some(())).await;
}

fn distant(cloud: &Cloud) -> UdpRelay {
    let path = LinkSettings { delay: ROUND_TRIP / 2, ..LinkSettings::default() };
    UdpRelay::start(cloud.addr, RelaySettings::symmetric(path, 1)).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edge_resumes_within_one_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(3);
    let relay = distant(&cloud);
    let known = dir.path().join("known");
    let mut edge = Edge::start(RepairClientSettings {
        trust: Trust::TrustOnFirstUse(known.clone()),
        ..edge_settings(relay.local_addr())
    });
    let began = Instant::now();
    welcome(&mut edge).await;
    assert!(
        began.elapsed() >= ROUND_TRIP * 2,
        "the first connection takes a handshake and a hello"
    );
    assert_eq!((edge.metrics.early_hellos.get(), cloud.metrics.early_hellos.get()), (0, 0));

    // A busy machine may delay some of the attempts, but not all.
    let mut fastest = Duration::MAX;
    let mut cuts = 0;
    while fastest > ROUND_TRIP * 7 / 4 && cuts < 5 {
        let reason = cut(&mut edge).await;
        assert!(reason.contains("control message of"), "{reason}");
        cuts += 1;
        let began = Instant::now();
        welcome(&mut edge).await;
        fastest = fastest.min(began.elapsed());
        assert_eq!(edge.metrics.early_hellos.get(), cuts);
        until(|| cloud.metrics.early_hellos.get() == cuts).await;
    }
    println!(
        "welcome {fastest:?} after the cut, at {ROUND_TRIP:?}, pause before dialling included"
    );
    // Includes the pause of up to 100 ms before the client dials.
    assert!(fastest <= ROUND_TRIP * 7 / 4, "{fastest:?}");
    assert_eq!(fs::read_to_string(&known).unwrap().lines().count(), 1);

    // The resumed connection works.
    edge.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;
    edge.handle.nack(downpour_repair::message::Nack {
        ssrc: feed.ssrc(),
        copies: 1,
        slack_ms: 2000,
        seqs: seqs[..1].to_vec(),
    });
    assert_eq!(edge.repair().await, feed.packet(seqs[0]));
    assert_eq!(cloud.metrics.refused_handshake.get(), 0);
}

#[tokio::test]
async fn edge_repeats_the_hello_to_a_restarted_cloud() {
    let cloud = Cloud::start();
    let (addr, identity, origin) = (cloud.addr, cloud.identity.clone(), cloud.origin.clone());
    Feed::start(&origin, "live/a", 7);
    let mut edge = Edge::start(RepairClientSettings {
        trust: Trust::Pinned(identity.fingerprint()),
        ..edge_settings(addr)
    });
    welcome(&mut edge).await;
    cut(&mut edge).await;
    welcome(&mut edge).await;
    assert_eq!(edge.metrics.early_hellos.get(), 1);
    cloud.stop().await;
    edge.disconnected().await;

    // The same certificate, but a process without sessions.
    let cloud = Cloud::restart_at(addr, identity, origin, RepairServerSettings::default()).await;
    edge.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;
    assert_eq!((edge.metrics.early_hellos.get(), cloud.metrics.early_hellos.get()), (1, 0));
    assert_eq!(edge.metrics.malformed.get(), 0);
    // The new session can be resumed.
    cut(&mut edge).await;
    welcome(&mut edge).await;
    assert_eq!(edge.metrics.early_hellos.get(), 2);
}

#[tokio::test]
async fn changed_trust_prevents_resumption() {
    let dir = tempfile::tempdir().unwrap();
    let known = dir.path().join("known");
    let cloud = Cloud::start();
    let mut edge = Edge::start(RepairClientSettings {
        trust: Trust::TrustOnFirstUse(known.clone()),
        ..edge_settings(cloud.addr)
    });
    welcome(&mut edge).await;
    // The operator has replaced the known certificate.
    let other = Identity::generate().unwrap().fingerprint();
    fs::write(&known, format!("{} {other}\n", cloud.addr)).unwrap();
    cut(&mut edge).await;
    let refusal = edge.disconnected().await;
    assert!(refusal.contains("has changed from"), "{refusal}");
    assert!(edge.metrics.refused_certificate.get() >= 1);
    assert_eq!((edge.metrics.early_hellos.get(), cloud.metrics.early_hellos.get()), (0, 0));
}

#[tokio::test]
async fn edge_refuses_a_changed_certificate_despite_a_session() {
    let cloud = Cloud::start();
    let addr = cloud.addr;
    let mut edge = Edge::start(RepairClientSettings {
        trust: Trust::Pinned(cloud.identity.fingerprint()),
        token: Some("secret".into()),
        ..edge_settings(addr)
    });
    welcome(&mut edge).await;
    cloud.stop().await;
    edge.disconnected().await;
    let identity = Arc::new(Identity::generate().unwrap());
    let cloud =
        Cloud::restart_at(addr, identity, OutgoingStreams::new(), RepairServerSettings::default())
            .await;
    let refusal = edge
        .wait(|event| match event {
            RepairEvent::Disconnected { reason } if reason.contains("is pinned") => Some(reason),
            RepairEvent::Welcome(_) => panic!("trusted a changed certificate"),
            _ => None,
        })
        .await;
    assert!(refusal.contains("has the fingerprint"), "{refusal}");
    until(|| cloud.metrics.refused_handshake.get() > 0).await;
    // Early data is encrypted for the old cloud only.
    assert_eq!((cloud.metrics.early_hellos.get(), cloud.metrics.downpour.accepted.get()), (0, 0));
    assert!(edge.metrics.refused_certificate.get() >= 1);
}
