//! A packet missing at many edges of a multicast group is sent to the group once.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use crate::common::repair_node::{Cloud, Edge, Feed, edge_settings, until};
use bytes::Bytes;
use downpour_distribution::{
    downstream::{
        outgoing::OutgoingStreams,
        repair_server::{GroupSender, RepairServer, RepairServerMetrics, RepairServerSettings},
    },
    tls::Identity,
    upstream::repair_client::{RepairClientSettings, RepairEvent},
};
use downpour_repair::message::Nack;
use prometheus::Registry;

const GROUP: &str = "239.0.0.1:5222";

/// Accepts one group and records the packets sent to it.
#[derive(Default)]
struct Sent(Mutex<Vec<Bytes>>);

impl GroupSender for Sent {
    fn send(&self, group: SocketAddr, packet: Bytes) -> bool {
        let known = group == GROUP.parse().unwrap();
        if known {
            self.0.lock().unwrap().push(packet);
        }
        known
    }
}

fn start(sent: &Arc<Sent>) -> Cloud {
    let identity = Arc::new(Identity::generate().unwrap());
    let metrics = RepairServerMetrics::register(&Registry::new()).unwrap();
    let origin = OutgoingStreams::new();
    let server = RepairServer::bind(
        "127.0.0.1:0".parse().unwrap(),
        &identity,
        origin.clone(),
        RepairServerSettings::default(),
        metrics.clone(),
    )
    .unwrap()
    .with_group_sender(sent.clone());
    Cloud::run(server, origin, identity, metrics)
}

async fn edges(cloud: &Cloud, count: usize, group: Option<&str>) -> Vec<Edge> {
    let mut edges = Vec::new();
    for _ in 0..count {
        let mut edge = Edge::start(RepairClientSettings {
            group: group.map(|group| group.parse().unwrap()),
            ..edge_settings(cloud.addr)
        });
        edge.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;
        edges.push(edge);
    }
    edges
}

#[tokio::test]
async fn cloud_answers_a_group_once() {
    let sent = Arc::new(Sent::default());
    let cloud = start(&sent);
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let members = edges(&cloud, 8, Some(GROUP)).await;
    let mut alone = edges(&cloud, 1, None).await.remove(0);
    let seqs = feed.push(3);
    let nack = Nack { ssrc: feed.ssrc(), copies: 2, slack_ms: 500, seqs: seqs.clone() };
    for edge in &members {
        edge.handle.nack(nack.clone());
    }
    alone.handle.nack(nack);

    let metrics = &cloud.metrics;
    until(|| metrics.downpour.asked.get() == 27).await;
    // An edge without a group is answered by unicast, with copies.
    for i in 0..6 {
        assert_eq!(alone.repair().await, feed.packet(seqs[i % 3]));
    }
    until(|| metrics.group_repairs.get() >= 6).await;
    let group: Vec<_> = sent.0.lock().unwrap().clone();
    for seq in &seqs {
        let times = group.iter().filter(|packet| **packet == feed.packet(*seq)).count();
        // Two copies as requested. On a machine that stalls, the requests may count as two losses.
        assert!((2..=4).contains(&times), "{times}");
    }
    assert_eq!(metrics.group_bytes.get(), group.iter().map(|p| p.len() as u64).sum::<u64>());
    // Per packet, two of the eight are answered by unicast, the rest by multicast.
    assert!(metrics.answered_by_group.get() >= 6, "{:?}", metrics.answered_by_group);
    let unicast = metrics.downpour.repairs.get();
    assert!((6..=24).contains(&unicast), "{unicast}");
}

#[tokio::test]
async fn cloud_sends_no_repairs_to_an_unknown_group() {
    let sent = Arc::new(Sent::default());
    let cloud = start(&sent);
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    // An unknown group, and an address that is not multicast.
    for (claim, times) in [("239.9.9.9:5222", 1), ("127.0.0.1:5222", 0)] {
        let mut members = edges(&cloud, 5, Some(claim)).await;
        let seqs = feed.push(2);
        for edge in &members {
            let seqs = seqs.clone();
            edge.handle.nack(Nack { ssrc: feed.ssrc(), copies: 1, slack_ms: 500, seqs });
        }
        for edge in &mut members {
            for seq in &seqs {
                assert_eq!(edge.repair().await, feed.packet(*seq));
            }
        }
        assert!(cloud.metrics.unknown_group.get() >= times);
    }
    assert_eq!(sent.0.lock().unwrap().len(), 0);
    assert_eq!(cloud.metrics.group_repairs.get(), 0);
}
