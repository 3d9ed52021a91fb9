//! Repairs over a path that loses packets: random loss must not starve them.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::common::repair_node::{Cloud, Edge, Feed, edge_settings};
use downpour_distribution::upstream::repair_client::RepairEvent;
use downpour_repair::{message::Nack, rtp::Seq};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{net::UdpSocket, sync::mpsc, time::sleep_until};

const ONE_WAY: Duration = Duration::from_millis(50);
const ROUND_TRIP: Duration = Duration::from_millis(100);

/// Forwards datagrams between one client and `cloud` with a delay of [`ONE_WAY`], and drops `percent`
/// of them.
async fn lossy_path(cloud: SocketAddr, percent: u32) -> SocketAddr {
    let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let back = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    back.connect(cloud).await.unwrap();
    let addr = front.local_addr().unwrap();
    let client = Arc::new(Mutex::new(None));
    for (seed, to_cloud) in [(1, true), (2, false)] {
        let (front, back, client) = (front.clone(), back.clone(), client.clone());
        let (queue, mut queued) = mpsc::unbounded_channel::<(Instant, Vec<u8>)>();
        let (from, to) = if to_cloud { (front.clone(), back) } else { (back, front) };
        let peer = client.clone();
        tokio::spawn(async move {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut buffer = [0; 2048];
            while let Ok((len, source)) = from.recv_from(&mut buffer).await {
                if to_cloud {
                    *peer.lock().unwrap() = Some(source);
                }
                if !rng.random_ratio(percent, 100) {
                    queue.send((Instant::now() + ONE_WAY, buffer[..len].to_vec())).unwrap();
                }
            }
        });
        tokio::spawn(async move {
            while let Some((due, datagram)) = queued.recv().await {
                sleep_until(due.into()).await;
                let target = *client.lock().unwrap();
                let sent = match (to_cloud, target) {
                    (true, _) => to.send(&datagram).await,
                    (false, Some(target)) => to.send_to(&datagram, target).await,
                    (false, None) => continue,
                };
                sent.unwrap();
            }
        });
    }
    addr
}

/// Requests one packet per 3 ms, and each again every 1.1 round trips until it arrives. Returns the
/// time that each took.
async fn repair_times(percent: u32) -> Vec<Duration> {
    const PACKETS: usize = 1000;
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(PACKETS);
    let addr = lossy_path(cloud.addr, percent).await;
    let mut edge = Edge::start(edge_settings(addr));
    edge.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;

    let mut fresh = seqs.into_iter();
    let mut first_requested: HashMap<Seq, Instant> = HashMap::new();
    let mut retries: VecDeque<(Instant, Seq)> = VecDeque::new();
    let mut times = Vec::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(3));
    let deadline = Instant::now() + Duration::from_secs(30);
    while times.len() < PACKETS {
        assert!(Instant::now() < deadline, "{} of {PACKETS} arrived", times.len());
        tokio::select! {
            _ = ticks.tick() => {
                let now = Instant::now();
                let mut due: Vec<_> = fresh.next().into_iter().collect();
                first_requested.extend(due.iter().map(|seq| (*seq, now)));
                while retries.front().is_some_and(|(at, _)| *at <= now) {
                    due.extend(retries.pop_front().map(|(_, seq)| seq));
                }
                due.retain(|seq| first_requested.contains_key(seq));
                retries.extend(due.iter().map(|seq| (now + ROUND_TRIP * 11 / 10, *seq)));
                if !due.is_empty() {
                    edge.handle.nack(Nack { ssrc: feed.ssrc(), copies: 1, slack_ms: 500, seqs: due });
                }
            }
            event = edge.events.recv() => if let Some(RepairEvent::Repair(packet)) = event {
                let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
                times.extend(first_requested.remove(&seq).map(|at| at.elapsed()));
            },
        }
    }
    times
}

/// Fraction of repairs that took longer than `limit`.
fn late(times: &[Duration], limit: Duration) -> f64 {
    times.iter().filter(|time| **time > limit).count() as f64 / times.len() as f64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_loss_does_not_starve_repairs() {
    // At 10 % loss per direction, 19 % of attempts fail, and 4.5 round trips allow four attempts.
    // With Cubic, half of the packets had not arrived after 30 s.
    let times = repair_times(10).await;
    let late = late(&times, ROUND_TRIP * 9 / 2);
    assert!(late < 0.05, "{late}");
}
