//! Three hundred edges that lose the same at once: the budget holds, everybody else is served as
//! before, and memory stays where it was.

use std::{
    collections::HashSet,
    sync::Arc,
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
use downpour_repair::{message::Nack, rtp::Seq};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

const EDGES: usize = 300;
/// Edges that ask for all they can, ten times a second.
const GREEDY: usize = 10;
const STORM: Duration = Duration::from_secs(5);
/// A packet of 1132 bytes each 4 ms, 2.3 Mbit/s.
const TICK: Duration = Duration::from_millis(20);
const PACKETS_A_TICK: usize = 5;
/// Per cent of the rate; half of it is what 5 % loss takes.
const BUDGET: u32 = 10;
const BURST: u64 = 100_000;

/// What one edge of the storm came to.
struct Outcome {
    asked: usize,
    answered: usize,
    bytes: u64,
    lasted: Duration,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_edges_lose_the_same_at_once() {
    if !process::alone(module_path!(), "three_hundred_edges_lose_the_same_at_once", None) {
        return;
    }
    let cloud = Cloud::start_with(RepairServerSettings {
        repair_budget: BUDGET,
        repair_burst: BURST,
        ..Default::default()
    });
    let mut stormy = Feed::start(&cloud.origin, "storm/a", 1);
    let mut calm = Feed::start(&cloud.origin, "calm/b", 2);

    // Each tick of the stream, with the one of its packets that is lost, in one tick of four.
    let (ticks, _) = watch::channel((0u64, None::<Seq>, Vec::<Seq>::new()));
    let ticks = Arc::new(ticks);
    let mut edges = Vec::new();
    for _ in 0..EDGES {
        edges.push(Edge::start(RepairClientSettings {
            streams: vec!["storm/a".parse().unwrap()],
            ..edge_settings(cloud.addr)
        }));
    }
    for edge in &mut edges {
        edge.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;
    }
    let mut other = Edge::start(RepairClientSettings {
        streams: vec!["calm/b".parse().unwrap()],
        ..edge_settings(cloud.addr)
    });
    other.wait(|event| matches!(event, RepairEvent::StreamUp(_)).then_some(())).await;

    // The stream runs before the storm, so that its rate is known.
    let publisher = tokio::spawn({
        let ticks = ticks.clone();
        async move {
            let mut beat = interval(TICK);
            beat.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut held = Vec::new();
            for count in 1u64.. {
                beat.tick().await;
                let seqs = stormy.push(PACKETS_A_TICK);
                held.extend(&seqs);
                let lost = count.is_multiple_of(4).then(|| seqs[2]);
                let recent = held.split_off(held.len().saturating_sub(500));
                held = recent.clone();
                ticks.send_replace((count, lost, recent));
            }
        }
    });
    let quiet = median(ask_now_and_then(&mut other, &mut calm, Duration::from_secs(2)).await);
    let memory = resident_bytes();

    let mut storm = JoinSet::new();
    for (i, edge) in edges.into_iter().enumerate() {
        storm.spawn(weather(edge, ticks.subscribe(), i < GREEDY));
    }
    let during = ask_now_and_then(&mut other, &mut calm, STORM).await;
    let during = median(during);
    let mut greedy_bytes = 0;
    let (mut asked, mut answered) = (0, 0);
    while let Some(outcome) = within(storm.join_next()).await {
        let (greedy, Outcome { asked: a, answered: b, bytes, lasted }) = outcome.unwrap();
        // The stream's measured rate may be a little over what it is meant to be.
        let rate = PACKETS_A_TICK as f64 * 1132.0 / TICK.as_secs_f64() * f64::from(BUDGET) / 100.0;
        let burst = (rate * 10.0).max(BURST as f64);
        let most = (rate * lasted.as_secs_f64() + burst) * 1.2;
        assert!(bytes as f64 <= most, "{bytes} bytes in {lasted:?}, {most} at most");
        if greedy {
            greedy_bytes = greedy_bytes.max(bytes);
        } else {
            asked += a;
            answered += b;
        }
    }
    publisher.abort();
    let grown = resident_bytes().saturating_sub(memory);
    println!(
        "{answered} of {asked} answered; a greedy edge got {greedy_bytes} bytes; median answer \
         {quiet:?} before, {during:?} in the storm; {} KiB more memory",
        grown / 1024
    );
    // All that was within budget: two seconds are left for what the machine was busy with.
    assert!(asked > 290 * 20, "{asked}");
    assert_eq!(answered, asked);
    let metrics = &cloud.metrics;
    assert!(metrics.deferred_budget.get() > 0 && metrics.dropped_late.get() > 0, "{metrics:?}");
    assert_eq!(metrics.dropped_backlog.get(), 0);
    assert!(during <= (quiet * 10).max(Duration::from_millis(50)), "{quiet:?} {during:?}");
    assert!(grown < 96 << 20, "{grown} bytes more");
}

/// One edge in the storm: asks for what is lost until it is there, or for all there is.
async fn weather(
    mut edge: Edge,
    mut ticks: watch::Receiver<(u64, Option<Seq>, Vec<Seq>)>,
    greedy: bool,
) -> (bool, Outcome) {
    let began = Instant::now();
    let mut missing = HashSet::new();
    let mut retry = interval(Duration::from_millis(100));
    let mut out = Outcome { asked: 0, answered: 0, bytes: 0, lasted: Duration::ZERO };
    let ssrc = downpour_repair::rtp::Ssrc(1);
    loop {
        let storming = began.elapsed() < STORM;
        if (!storming && (greedy || missing.is_empty())) || began.elapsed() > STORM * 2 {
            break;
        }
        tokio::select! {
            Ok(()) = ticks.changed(), if storming => {
                let (_, lost, _) = ticks.borrow_and_update().clone();
                if let Some(seq) = lost.filter(|_| !greedy) {
                    missing.insert(seq);
                    out.asked += 1;
                    edge.handle.nack(Nack { ssrc, copies: 1, slack_ms: 500, seqs: vec![seq] });
                }
            }
            _ = retry.tick() => {
                let seqs: Vec<_> = match greedy {
                    true => ticks.borrow().2.clone(),
                    false => missing.iter().copied().collect(),
                };
                if !seqs.is_empty() {
                    edge.handle.nack(Nack { ssrc, copies: 1, slack_ms: 500, seqs });
                }
            }
            event = edge.events.recv() => {
                if let Some(RepairEvent::Repair(packet)) = event {
                    out.bytes += packet.len() as u64;
                    let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
                    out.answered += usize::from(missing.remove(&seq));
                }
            }
        }
    }
    out.lasted = began.elapsed();
    (greedy, out)
}

/// How long each of the edge's own losses took to be repaired.
async fn ask_now_and_then(edge: &mut Edge, feed: &mut Feed, how_long: Duration) -> Vec<Duration> {
    let began = Instant::now();
    let mut times = Vec::new();
    while began.elapsed() < how_long {
        let seqs = feed.push(1);
        let nack = Nack { ssrc: feed.ssrc(), copies: 1, slack_ms: 500, seqs: seqs.clone() };
        let asked = Instant::now();
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
            times.push(asked.elapsed());
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
