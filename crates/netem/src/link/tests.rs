use proptest::prelude::*;

use super::*;

const STEP: Duration = Duration::from_millis(1);

/// Sends `count` numbered datagrams of 100 bytes, one per millisecond. Returns number and arrival
/// time of each delivered datagram, relative to the first transmission.
///
/// Checks that every datagram is delivered or counted as lost.
fn run(settings: LinkSettings, seed: u64, count: u32) -> (Vec<(u32, Duration)>, LinkStats) {
    let mut link = Link::new(settings, seed);
    let start = Instant::now();
    let mut arrived = Vec::new();
    let mut take = |link: &mut Link, now: Instant| {
        while let Some(deadline) = link.next_deadline().filter(|deadline| *deadline <= now) {
            let datagram = link.poll_output(deadline).unwrap();
            let number = u32::from_be_bytes(*datagram.first_chunk().unwrap());
            arrived.push((number, deadline - start));
        }
    };
    for number in 0..count {
        let now = start + STEP * number;
        take(&mut link, now);
        let mut datagram = vec![0; 100];
        datagram[..4].copy_from_slice(&number.to_be_bytes());
        link.send(now, datagram.into());
    }
    take(&mut link, start + STEP * count + Duration::from_secs(60));
    assert!(link.next_deadline().is_none());
    let stats = *link.stats();
    assert_eq!(stats.delivered, arrived.len() as u64);
    assert_eq!(stats.sent + stats.duplicated, stats.delivered + stats.dropped());
    (arrived, stats)
}

#[test]
fn default_path_delivers_everything_without_delay() {
    let (arrived, stats) = run(LinkSettings::default(), 1, 1000);
    assert!(arrived.iter().enumerate().all(|(i, a)| *a == (i as u32, STEP * i as u32)));
    assert_eq!(stats.dropped(), 0);
}

#[test]
fn outcome_depends_on_the_seed_only() {
    let settings = LinkSettings {
        loss: 0.1,
        bursts: Some(Bursts::covering(0.05, Duration::from_millis(10))),
        duplicate: 0.02,
        reorder: 0.05,
        delay: Duration::from_millis(20),
        jitter: Duration::from_millis(5),
        ..LinkSettings::default()
    };
    let first = run(settings.clone(), 7, 5000).0;
    assert_eq!(first, run(settings.clone(), 7, 5000).0);
    assert_ne!(first, run(settings, 8, 5000).0);
}

#[test]
fn random_losses_are_independent_with_the_requested_share() {
    for (seed, loss) in [(1, 0.01), (2, 0.05), (3, 0.2), (4, 0.5)] {
        let count = 100_000;
        let (arrived, stats) = run(LinkSettings::lossy(loss), seed, count);
        let share = stats.dropped_random as f64 / f64::from(count);
        // Five standard deviations of a binomial share.
        let bound = 5.0 * (loss * (1.0 - loss) / f64::from(count)).sqrt();
        assert!((share - loss).abs() < bound, "{share} of {loss}");
        // Independent losses have a mean run length of 1 / (1 - p).
        let gaps = arrived.windows(2).map(|w| w[1].0 - w[0].0 - 1).filter(|gap| *gap > 0);
        let (runs, lost) = gaps.fold((0, 0), |(runs, lost), gap| (runs + 1, lost + gap));
        let mean = f64::from(lost) / f64::from(runs);
        assert!((mean - 1.0 / (1.0 - loss)).abs() < 0.05, "{mean} at {loss}");
    }
}

#[test]
fn bursts_have_the_requested_share_and_length() {
    let length = Duration::from_millis(20);
    let settings =
        LinkSettings { bursts: Some(Bursts::covering(0.05, length)), ..LinkSettings::default() };
    let (arrived, stats) = run(settings, 11, 1_000_000);
    let share = stats.dropped_burst as f64 / 1e6;
    assert!((share - 0.05).abs() < 0.005, "{share}");
    let gaps: Vec<u32> =
        arrived.windows(2).map(|w| w[1].0 - w[0].0 - 1).filter(|gap| *gap > 0).collect();
    // At one datagram per millisecond, a burst loses one per millisecond of its length. Bursts too
    // short to hit a datagram are invisible, which adds half a datagram to the mean.
    let mean = f64::from(gaps.iter().sum::<u32>()) / gaps.len() as f64;
    assert!((mean - 20.5).abs() < 1.5, "{mean}");
}

#[test]
fn bursts_are_independent_of_the_traffic() {
    let settings = LinkSettings {
        bursts: Some(Bursts::covering(0.1, Duration::from_millis(20))),
        ..LinkSettings::default()
    };
    let start = Instant::now();
    let lost = |step: u32| -> Vec<bool> {
        let mut link = Link::new(settings.clone(), 4);
        let mut lost = Vec::new();
        for i in (0..10_000).step_by(step as usize) {
            let before = link.stats().dropped_burst;
            link.send(start + STEP * i, Bytes::from_static(b"x"));
            if i % 2 == 0 {
                lost.push(link.stats().dropped_burst > before);
            }
        }
        lost
    };
    let dense = lost(1);
    assert!(dense.iter().filter(|lost| **lost).count() > 100);
    assert_eq!(dense, lost(2));
}

#[test]
fn bursts_last_no_longer_for_a_sparse_flow() {
    let bursts = Bursts::covering(0.2, Duration::from_millis(20));
    let mut link = Link::new(LinkSettings { bursts: Some(bursts), ..LinkSettings::default() }, 3);
    let start = Instant::now();
    let count = 20_000u32;
    // At one datagram per ten seconds, the losses are independent.
    let lost: Vec<bool> = (0..count)
        .map(|i| {
            let before = link.stats().dropped_burst;
            link.send(start + Duration::from_secs(10) * i, Bytes::from_static(b"x"));
            link.stats().dropped_burst > before
        })
        .collect();
    let share = lost.iter().filter(|lost| **lost).count() as f64 / f64::from(count);
    let pairs = lost.windows(2).filter(|w| w[0] && w[1]).count() as f64 / f64::from(count);
    assert!((share - 0.2).abs() < 0.015, "{share}");
    assert!((pairs - 0.04).abs() < 0.008, "{pairs}");
}

#[test]
fn delay_and_jitter_are_bounded_and_keep_the_order() {
    let (delay, jitter) = (Duration::from_millis(50), Duration::from_millis(30));
    let (arrived, _) = run(LinkSettings { delay, jitter, ..LinkSettings::default() }, 5, 10_000);
    assert!(arrived.windows(2).all(|w| w[0].0 < w[1].0));
    for (number, at) in &arrived {
        let took = *at - STEP * *number;
        assert!(took >= delay && took <= delay + jitter, "{took:?}");
    }
    let spread = arrived.iter().map(|(number, at)| *at - STEP * *number);
    assert!(spread.clone().max().unwrap() - spread.min().unwrap() > jitter / 2);
}

#[test]
fn only_reordered_datagrams_are_late() {
    let settings = LinkSettings {
        reorder: 0.1,
        reorder_delay: Duration::from_millis(5),
        ..LinkSettings::default()
    };
    let (arrived, stats) = run(settings, 9, 50_000);
    let late = arrived.iter().filter(|(number, at)| *at > STEP * *number).count() as u64;
    assert_eq!(late, stats.reordered);
    assert!((4600..5400).contains(&late), "{late}");
    let overtaken = arrived.windows(2).filter(|w| w[0].0 > w[1].0).count();
    assert!(overtaken > 3000, "{overtaken}");
}

#[test]
fn duplicates_arrive_twice() {
    let (arrived, stats) =
        run(LinkSettings { duplicate: 0.1, ..LinkSettings::default() }, 2, 50_000);
    assert!((4600..5400).contains(&stats.duplicated), "{}", stats.duplicated);
    assert_eq!(arrived.len() as u64, 50_000 + stats.duplicated);
}

#[test]
fn rate_limit_spaces_datagrams_and_drops_at_a_full_queue() {
    // 800 bits per millisecond are sent, 400 carried; the queue holds ten datagrams.
    let settings =
        LinkSettings { rate_bps: Some(400_000), queue_bytes: 1000, ..LinkSettings::default() };
    let (arrived, stats) = run(settings, 1, 10_000);
    assert!((4980..5020).contains(&stats.dropped_queue), "{}", stats.dropped_queue);
    assert!(arrived.windows(2).all(|w| w[1].1 - w[0].1 >= Duration::from_micros(1999)));
    let longest = arrived.iter().map(|(number, at)| *at - STEP * *number).max().unwrap();
    assert!(longest <= Duration::from_millis(21), "{longest:?}");
}

#[test]
fn blackouts_occur_once_or_periodically() {
    let once = Blackout { start: STEP * 100, length: STEP * 50, period: None };
    let again = Blackout { start: STEP * 1000, length: STEP * 10, period: Some(STEP * 100) };
    let settings = LinkSettings { blackouts: vec![once, again], ..LinkSettings::default() };
    let (arrived, stats) = run(settings, 1, 2000);
    assert_eq!(stats.dropped_blackout, 50 + 10 * 10);
    let seen = |number| arrived.iter().any(|(n, _)| *n == number);
    assert!(seen(99) && !seen(100) && !seen(149) && seen(150));
    assert!(!seen(1000) && seen(1010) && !seen(1105));
}

#[test]
fn new_settings_do_not_affect_datagrams_in_flight() {
    let delay = Duration::from_millis(10);
    let mut link = Link::new(LinkSettings { delay, ..LinkSettings::default() }, 1);
    let start = Instant::now();
    link.send(start, Bytes::from_static(b"before"));
    link.set_settings(LinkSettings::cut());
    link.send(start, Bytes::from_static(b"during"));
    link.set_settings(LinkSettings::default());
    link.send(start, Bytes::from_static(b"after"));
    assert_eq!(link.poll_output(start), None);
    assert_eq!(link.poll_output(start + delay).unwrap(), "before");
    // A shorter delay does not let datagrams overtake.
    assert_eq!(link.poll_output(start + delay).unwrap(), "after");
    assert_eq!(link.next_deadline(), None);
}

#[test]
fn bytes_in_flight_are_bounded() {
    let delay = Duration::from_secs(3600);
    let mut link = Link::new(LinkSettings { delay, ..LinkSettings::default() }, 1);
    let datagram = Bytes::from(vec![0; 60_000]);
    let now = Instant::now();
    (0..2000).for_each(|_| link.send(now, datagram.clone()));
    assert_eq!(link.in_flight.len(), MAX_IN_FLIGHT / datagram.len());
    assert_eq!(link.stats().dropped_queue as usize, 2000 - link.in_flight.len());
}

fn any_settings() -> impl Strategy<Value = LinkSettings> {
    let share = || prop_oneof![Just(0.0), Just(1.0), 0.0..1.0f64];
    let millis = |most: u64| (0..most).prop_map(Duration::from_millis);
    let bursts = (millis(100), millis(100), share())
        .prop_map(|(mean_gap, mean_length, loss)| Bursts { mean_gap, mean_length, loss });
    let blackout = (millis(300), millis(100), prop::option::of(millis(200)))
        .prop_map(|(start, length, period)| Blackout { start, length, period });
    let path = (millis(50), millis(50), millis(50), prop::option::of(10_000..1_000_000u64));
    (
        (share(), share(), share()),
        path,
        prop::option::of(bursts),
        prop::collection::vec(blackout, 0..3),
        0..5000usize,
    )
        .prop_map(|((loss, duplicate, reorder), path, bursts, blackouts, queue_bytes)| {
            let (delay, jitter, reorder_delay, rate_bps) = path;
            LinkSettings {
                loss,
                bursts,
                duplicate,
                reorder,
                reorder_delay,
                delay,
                jitter,
                rate_bps,
                queue_bytes,
                blackouts,
            }
        })
}

proptest! {
    #[test]
    fn every_loss_is_counted_and_order_is_kept_without_reordering(
        settings in any_settings(), seed: u64,
    ) {
        let (arrived, stats) = run(settings.clone(), seed, 400);
        prop_assert!(stats.duplicated <= stats.sent && stats.reordered <= 2 * stats.sent);
        if settings.reorder == 0.0 {
            prop_assert!(arrived.windows(2).all(|w| w[0].0 <= w[1].0));
        }
        if settings.duplicate == 0.0 {
            prop_assert!(arrived.iter().all(|(number, _)| *number < 400));
            prop_assert_eq!(stats.duplicated, 0);
        }
        for (number, at) in arrived {
            prop_assert!(at >= STEP * number + settings.delay);
        }
    }
}
