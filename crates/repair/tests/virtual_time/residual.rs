//! Residual loss, delay and overhead at latencies of 2 to 6 round trips: receiver and sender in virtual
//! time, compared with measurements of SRT and with this project's targets.

use std::time::Duration;

use downpour_netem::{Bursts, LinkSettings};
use downpour_repair::receiver::DELAY_BOUNDS_MS;

use crate::sim::{Run, lossy};

/// One network and its targets.
struct Cell {
    /// In milliseconds.
    round_trip: u64,
    link: LinkSettings,
    description: &'static str,
    /// Residual loss in per cent at latencies of 2, 3, 4 and 6 round trips.
    targets: [f64; 4],
    /// Maximum of additional bytes per media byte: measured for SRT 1.5.1. Times 1.5 at 2 and 3 round trips.
    max_overhead: f64,
}

#[test]
fn residual_loss_and_overhead_meet_the_targets() {
    let iid = |round_trip, loss, description, targets, max_overhead| Cell {
        round_trip,
        link: lossy(Duration::from_millis(round_trip / 2), loss),
        description,
        targets,
        max_overhead,
    };
    let bursts = LinkSettings {
        bursts: Some(Bursts::covering(0.05, Duration::from_millis(8))),
        ..lossy(Duration::from_millis(50), 0.0)
    };
    let cells = [
        iid(20, 0.05, "5 %", [0.1, 0.005, 0.0, 0.0], 0.09),
        iid(20, 0.2, "20 %", [1.0, 0.1, 0.01, 0.0], 0.32),
        iid(100, 0.05, "5 %", [0.1, 0.002, 0.0, 0.0], 0.09),
        iid(100, 0.1, "10 %", [0.3, 0.01, 0.0001, 0.0], 0.15),
        iid(100, 0.2, "20 %", [1.0, 0.1, 0.01, 0.0], 0.32),
        iid(200, 0.1, "10 %", [0.92, 0.14, 0.04, 0.007], 0.15),
        iid(100, 0.3, "30 %", [4.2, 1.7, 0.41, 0.03], 0.6),
        Cell {
            round_trip: 100,
            link: bursts,
            description: "5 % in bursts of 8 ms",
            targets: [0.4, 0.05, 0.005, 0.0],
            max_overhead: 0.1,
        },
    ];
    for Cell { round_trip, link, description, targets, max_overhead } in cells {
        for (budget, target) in [2, 3, 4, 6].into_iter().zip(targets) {
            let latency = Duration::from_millis(round_trip * budget);
            let Measured { sent, lost, late, longest_loss, last, overhead } =
                measure(&link, round_trip, latency);
            println!(
                "{round_trip:3} ms {description:21} {budget} round trips: {:.5} % lost (target \
                 {target}), longest loss {longest_loss}, {:4.1} % more bytes, last {last:?}, {:.2} % \
                 late",
                lost as f64 / sent as f64 * 100.0,
                overhead * 100.0,
                late as f64 / sent as f64 * 100.0,
            );
            // The target, plus three standard deviations.
            let allowed = target / 100.0 * sent as f64;
            assert!(lost as f64 <= allowed + 3.0 * allowed.sqrt() + 1.0, "{lost} of {sent}");
            let limit = if budget < 4 { max_overhead * 1.5 } else { max_overhead };
            let on_time = late as f64 / sent as f64 <= 0.01;
            assert!(on_time || description != "5 %", "{late} of {sent} were late");
            assert!(overhead <= limit, "{overhead:.3} at {description}, {budget} round trips");
        }
    }
}

/// Sums over ten runs, and their maxima of `longest_loss`, `last` and `overhead`.
struct Measured {
    sent: u64,
    lost: u64,
    late: u64,
    /// Maximum number of consecutive lost packets.
    longest_loss: u64,
    /// The longest additional delay.
    last: Duration,
    overhead: f64,
}

fn measure(link: &LinkSettings, round_trip: u64, latency: Duration) -> Measured {
    // The first histogram bound of at least 1.25 round trips. At 5 % loss, 99 % of packets must
    // arrive within it.
    let on_time = DELAY_BOUNDS_MS.partition_point(|bound| u64::from(*bound) < round_trip * 5 / 4);
    let mut sum = Measured {
        sent: 0,
        lost: 0,
        late: 0,
        longest_loss: 0,
        last: Duration::ZERO,
        overhead: 0.0,
    };
    for seed in 0..10 {
        let out = Run::field(link, latency, 10_000, seed).play();
        sum.lost += out.lost;
        sum.sent += out.sent;
        sum.longest_loss = sum.longest_loss.max(out.longest_hole);
        let longest_delay = out.delays.iter().max().copied().unwrap_or_default();
        sum.last = sum.last.max(longest_delay.saturating_sub(link.delay));
        sum.overhead = sum.overhead.max(out.overhead);
        sum.late += out.stats.delays.counts[on_time + 1..].iter().sum::<u64>();
    }
    sum
}
