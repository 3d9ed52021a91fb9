//! The repair budget and the limit on requests.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use downpour_distribution::downstream::repair_server::RepairServerSettings;
use downpour_repair::{message::Nack, rtp::Seq};

use super::{nack, welcome};
use crate::common::repair_node::{Cloud, Edge, Feed, edge_settings, until};

#[tokio::test]
async fn cloud_enforces_the_repair_budget() {
    let cloud = Cloud::start_with(RepairServerSettings {
        repair_budget: 1,
        repair_burst: 50_000,
        ..Default::default()
    });
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    // One per cent of the rate is less than the minimum budget: 16 KiB per second, and a burst of ten
    // seconds.
    let seqs = feed.push(200);
    let burst = 10 * 16 * 1024 / 1132;
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    let began = Instant::now();
    edge.handle.nack(Nack { slack_ms: 1000, ..nack(&feed, 1, &seqs) });
    for seq in &seqs[..burst] {
        assert_eq!(edge.repair().await, feed.packet(*seq), "in the order of the nack");
    }
    let metrics = &cloud.metrics;
    until(|| metrics.downpour.repairs.get() + metrics.dropped_late.get() == 200).await;
    let most = (10.0 + began.elapsed().as_secs_f64()) * 16.0 * 1024.0;
    assert!(metrics.downpour.repair_bytes.get() as f64 <= most);
    assert!(metrics.dropped_late.get() > 0);
    assert!(metrics.deferred_budget.get() >= 40, "{:?}", metrics.deferred_budget);
    // Within their slack of one second, queued repairs are sent as the budget refills.
    assert!(metrics.downpour.repairs.get() > burst as u64 + 5, "{:?}", metrics.downpour.repairs);

    // Queued repairs are sent by deadline, not by arrival.
    let seqs = feed.push(2);
    edge.handle.nack(Nack { slack_ms: 5000, ..nack(&feed, 1, &seqs[..1]) });
    edge.handle.nack(Nack { slack_ms: 4000, ..nack(&feed, 1, &seqs[1..]) });
    let late = feed.push(20);
    edge.handle.nack(Nack { slack_ms: 6000, ..nack(&feed, 1, &late) });
    let mut order = Vec::new();
    while order.len() < 4 {
        let packet = edge.repair().await;
        let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
        if seqs.contains(&seq) || late.contains(&seq) {
            order.push(seq);
        }
    }
    assert_eq!(order[2..], late[..2], "{order:?}");
}

#[tokio::test]
async fn budget_of_zero_is_unlimited() {
    let cloud = Cloud::start_with(RepairServerSettings {
        repair_budget: 0,
        repair_burst: 1,
        ..Default::default()
    });
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(3000);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    for part in seqs.chunks(100) {
        edge.handle.nack(nack(&feed, 1, part));
        for _ in part {
            edge.repair().await;
        }
    }
    assert_eq!(cloud.metrics.downpour.repairs.get(), 3000);
    assert_eq!(cloud.metrics.deferred_budget.get(), 0);
}

#[tokio::test]
async fn default_budget_covers_a_whole_history() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    // Four seconds at 4 Mbit/s, then an edge joins.
    let mut seqs = Vec::new();
    for _ in 0..4 {
        seqs.extend(feed.push(450));
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    let mut missing: HashSet<Seq> = seqs.into_iter().collect();
    let seqs: Vec<_> = missing.iter().copied().collect();
    edge.handle.nack(nack(&feed, 1, &seqs));
    while !missing.is_empty() {
        let packet = edge.repair().await;
        missing.remove(&Seq(u16::from_be_bytes([packet[2], packet[3]])));
    }
    assert_eq!((cloud.metrics.dropped_budget.get(), cloud.metrics.dropped_late.get()), (0, 0));
}

#[tokio::test]
async fn cloud_drops_a_flood_of_nacks() {
    let cloud = Cloud::start();
    let feed = Feed::start(&cloud.origin, "live/a", 7);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    let all: Vec<_> = (0..60_000).map(Seq).collect();
    until(|| {
        edge.handle.nack(nack(&feed, 3, &all));
        while edge.events.try_recv().is_ok() {}
        cloud.metrics.dropped_flood.get() > 0
    })
    .await;
    assert!(cloud.metrics.downpour.gone.get() > 0);
}
