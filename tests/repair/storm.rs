//! Three hundred edges that lose the same packets at once: the budget holds, other edges are served as
//! before, and memory does not grow.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use crate::common::{
    process,
    process::resident_bytes,
    repair_node::{Cloud, Edge, Feed, edge_settings, within},
};
use downpour_distribution::{
    downstream::repair_server::RepairServerSettings,
    upstream::repair_client::{RepairClientSettings, RepairEvent},
};
use downpour_repair::{
    message::Nack,
    rtp::{Seq, Ssrc},
};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

const EDGES: usize = 300;
/// Edges that request every packet of the history ten times per second.
const GREEDY: usize = 10;
const STORM: Duration = Duration::from_secs(5);
/// Five packets of 1132 bytes per 20 ms, 2.3 Mbit/s.
const TICK: Duration = Duration::from_millis(20);
const PACKETS_PER_TICK: usize = 5;
/// Per cent of the rate. Repair of 5 % loss takes half of it.
const BUDGET: u32 = 10;
const BURST: u64 = 100_000;

/// A tick of the stream.
#[derive(Clone, Default)]
struct Tick {
    /// A packet of this tick that all edges lose, in one tick of four.
    lost: Option<Seq>,
    /// The last 500 packets.
    recent: Vec<Seq>,
}

/// The result of one edge.
struct Outcome {
    greedy: bool,
    requested: usize,
    repaired: usize,
    bytes: u64,
    lasted: Duration,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn budget_holds_when_300_edges_lose_the_same_packets() {
    if !process::alone(module_path!(), "budget_holds_when_300_edges_lose_the_same_packets", None) {
        return;
    }
    let cloud = Cloud::start_with(RepairServerSettings {
        repair_budget: BUDGET,
        repair_burst: BURST,
        ..Default::default()
    });
    let stormy = Feed::start(&cloud.origin, "storm/a", 1);
    let mut calm = Feed::start(&cloud.origin, "calm/b", 2);
    let mut edges = Vec::new();
    for _ in 0..EDGES {
        edges.push(start_edge(&cloud, "storm/a"));
    }
    for edge in &mut edges {
        stream_up(edge).await;
    }
    let mut other = start_edge(&cloud, "calm/b");
    stream_up(&mut other).await;

    // The stream runs before the storm, so that the cloud has measured its rate.
    let (ticks, received) = watch::channel(Tick::default());
    let publisher = tokio::spawn(publish(stormy, ticks));
    let quiet = median(repair_times(&mut other, &mut calm, Duration::from_secs(2)).await);
    let memory = resident_bytes();

    let mut storm = JoinSet::new();
    for (i, edge) in edges.into_iter().enumerate() {
        storm.spawn(run_edge(edge, received.clone(), i < GREEDY));
    }
    let during = median(repair_times(&mut other, &mut calm, STORM).await);
    let mut outcomes = Vec::new();
    while let Some(outcome) = within(storm.join_next()).await {
        outcomes.push(outcome.unwrap());
    }
    publisher.abort();
    let grown = resident_bytes().saturating_sub(memory);
    assert_budgets_held(&outcomes);
    println!(
        "median repair time {quiet:?} before, {during:?} in the storm; {} KiB more memory",
        grown / 1024
    );
    let metrics = &cloud.metrics;
    assert!(metrics.deferred_budget.get() > 0 && metrics.dropped_late.get() > 0, "{metrics:?}");
    assert_eq!(metrics.dropped_backlog.get(), 0);
    assert!(during <= (quiet * 10).max(Duration::from_millis(50)), "{quiet:?} {during:?}");
    assert!(grown < 96 << 20, "{grown} bytes more");
}

fn start_edge(cloud: &Cloud, stream: &str) -> Edge {
    Edge::start(RepairClientSettings {
        streams: vec![stream.parse().unwrap()],
        ..edge_settings(cloud.addr)
    })
}

async fn stream_up(edge: &mut Edge) {
    edge.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;
}

/// Publishes the stream in real time until it is aborted.
async fn publish(mut feed: Feed, ticks: watch::Sender<Tick>) {
    let mut timer = interval(TICK);
    timer.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut recent = Vec::new();
    for count in 1u64.. {
        timer.tick().await;
        let seqs = feed.push(PACKETS_PER_TICK);
        recent.extend(&seqs);
        recent.drain(..recent.len().saturating_sub(500));
        let lost = count.is_multiple_of(4).then(|| seqs[2]);
        ticks.send_replace(Tick { lost, recent: recent.clone() });
    }
}

/// Asserts that no edge got more bytes than its budget, and that all losses of the other edges were
/// repaired.
#[track_caller]
fn assert_budgets_held(outcomes: &[Outcome]) {
    let rate = PACKETS_PER_TICK as f64 * 1132.0 / TICK.as_secs_f64() * f64::from(BUDGET) / 100.0;
    let burst = (rate * 10.0).max(BURST as f64);
    for Outcome { bytes, lasted, .. } in outcomes {
        // The measured rate of the stream may be slightly higher than the nominal one.
        let max = (rate * lasted.as_secs_f64() + burst) * 1.2;
        assert!(*bytes as f64 <= max, "{bytes} bytes in {lasted:?}, {max} allowed");
    }
    let modest = || outcomes.iter().filter(|outcome| !outcome.greedy);
    let requested: usize = modest().map(|outcome| outcome.requested).sum();
    let repaired: usize = modest().map(|outcome| outcome.repaired).sum();
    let greedy = outcomes.iter().filter(|outcome| outcome.greedy);
    let greedy_bytes = greedy.map(|outcome| outcome.bytes).max().unwrap_or(0);
    println!("{repaired} of {requested} repaired; a greedy edge got {greedy_bytes} bytes");
    // All of it is within the budget. At least 20 losses per edge; a busy machine may skip ticks.
    assert!(requested > 290 * 20, "{requested}");
    assert_eq!(repaired, requested);
}

/// Runs one edge through the storm. It requests its lost packets until they arrive or, if `greedy`,
/// all packets of the history.
async fn run_edge(mut edge: Edge, mut ticks: watch::Receiver<Tick>, greedy: bool) -> Outcome {
    let began = Instant::now();
    let mut missing = HashSet::new();
    let mut retry = interval(Duration::from_millis(100));
    let (mut requested, mut repaired, mut bytes) = (0, 0, 0);
    let nack = |seqs| Nack { ssrc: Ssrc(1), copies: 1, slack_ms: 500, seqs };
    loop {
        let storming = began.elapsed() < STORM;
        if (!storming && (greedy || missing.is_empty())) || began.elapsed() > STORM * 2 {
            break;
        }
        tokio::select! {
            Ok(()) = ticks.changed(), if storming => {
                let lost = ticks.borrow_and_update().lost;
                if let Some(seq) = lost.filter(|_| !greedy) {
                    missing.insert(seq);
                    requested += 1;
                    edge.handle.nack(nack(vec![seq]));
                }
            }
            _ = retry.tick() => {
                let seqs: Vec<_> = match greedy {
                    true => ticks.borrow().recent.clone(),
                    false => missing.iter().copied().collect(),
                };
                if !seqs.is_empty() {
                    edge.handle.nack(nack(seqs));
                }
            }
            event = edge.events.recv() => {
                if let Some(RepairEvent::Repair(packet)) = event {
                    bytes += packet.len() as u64;
                    let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
                    repaired += usize::from(missing.remove(&seq));
                }
            }
        }
    }
    Outcome { greedy, requested, repaired, bytes, lasted: began.elapsed() }
}

/// Requests one packet of `feed` per 100 ms for `length`. Returns the time of each repair.
async fn repair_times(edge: &mut Edge, feed: &mut Feed, length: Duration) -> Vec<Duration> {
    let began = Instant::now();
    let mut times = Vec::new();
    while began.elapsed() < length {
        let seqs = feed.push(1);
        let nack = Nack { ssrc: feed.ssrc(), copies: 1, slack_ms: 500, seqs: seqs.clone() };
        let requested = Instant::now();
        edge.handle.nack(nack);
        let wanted = feed.packet(seqs[0]);
        let answer = timeout(
            Duration::from_secs(1),
            edge.wait(|event| match event {
                RepairEvent::Repair(packet) if packet == wanted => Some(()),
                _ => None,
            }),
        );
        if answer.await.is_ok() {
            times.push(requested.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    times
}

fn median(mut times: Vec<Duration>) -> Duration {
    assert!(times.len() >= 5, "{times:?}");
    times.sort_unstable();
    times[times.len() / 2]
}
