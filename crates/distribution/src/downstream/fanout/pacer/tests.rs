use std::{ops::Range, sync::Arc};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::downstream::{
    fanout::job::{Pace, TargetShare, Train},
    routes::Target,
};
use downpour_netem::{Link, LinkSettings};

const FRAME: Duration = Duration::from_millis(40);

fn targets(count: usize) -> Arc<[Target]> {
    (1..=count)
        .map(|n| Target::from(std::net::SocketAddr::from(([10, 0, 0, 1], n as u16))))
        .collect()
}

/// A job of 4-byte packets that contain their sequence numbers.
fn job(flow: u32, numbers: Range<u32>, to: &Arc<[Target]>, rate: u64) -> Job {
    let packets = numbers.map(|n| Bytes::copy_from_slice(&n.to_be_bytes()));
    let train = Train::collect(packets).remove(0);
    paced(flow, train, to, rate)
}

fn paced(flow: u32, train: Train, to: &Arc<[Target]>, rate: u64) -> Job {
    let share = TargetShare::of(to, Ssrc(flow), 0, 1).unwrap();
    let pace = Some(Pace { rate, interval: FRAME, held: None });
    Job { flow: Ssrc(flow), train, share, pace }
}

fn pacer(factor: f64) -> Pacer {
    Pacer::new(PaceFactor::new(factor).unwrap())
}

/// Polls at each deadline. Returns the groups and their times in microseconds after `start`.
fn drain(pacer: &mut Pacer, start: Instant) -> Vec<(u128, Group)> {
    let mut sent = Vec::new();
    while let Some(at) = pacer.next_deadline() {
        let mut due = Due::default();
        pacer.poll(at, &mut due);
        assert_eq!(due.skipped, 0);
        sent.extend(due.groups.into_iter().map(|group| ((at - start).as_micros(), group)));
    }
    sent
}

#[test]
fn groups_are_spaced_by_the_factor_times_the_rate() {
    let (start, mut pacer) = (Instant::now(), pacer(2.0));
    // 32 packets of 4 bytes, at 2 × 8000 bytes per second: 8 ms.
    pacer.push(start, job(1, 0..32, &targets(1), 8000));
    pacer.push(start, job(1, 32..33, &targets(1), 8000));
    let sent: Vec<_> =
        drain(&mut pacer, start).iter().map(|(at, g)| (*at, g.bytes.len())).collect();
    assert_eq!(sent, [(0, 32), (2000, 32), (4000, 32), (6000, 32), (8000, 4)]);
    assert!(pacer.flows.is_empty() && pacer.due.is_empty());
}

#[test]
fn a_key_frame_takes_at_most_one_frame_interval() {
    let (start, mut pacer) = (Instant::now(), pacer(2.0));
    // 400 times as many bytes as the rate allows per frame.
    pacer.push(start, job(1, 0..160, &targets(1), 40));
    let sent = drain(&mut pacer, start);
    assert_eq!(sent.len(), 20);
    assert_eq!(sent.last().map(|(at, _)| *at), Some(38_000));
    // A job behind it still ends within its own frame interval.
    pacer.push(start, job(1, 0..160, &targets(1), 40));
    let later = start + FRAME / 4;
    pacer.push(later, job(1, 160..320, &targets(1), 40));
    let sent = drain(&mut pacer, start);
    assert!(sent.last().is_some_and(|(at, _)| (48_000..50_000).contains(at)), "{sent:?}");
}

#[test]
fn targets_take_turns_and_flows_start_at_different_targets() {
    let (start, mut pacer) = (Instant::now(), pacer(1.5));
    let to = targets(4);
    pacer.push(start, job(1, 0..16, &to, 1));
    let sent = drain(&mut pacer, start);
    let times: Vec<_> = sent.iter().map(|(at, _)| *at).collect();
    assert_eq!(times, [0, 5, 10, 15, 20, 25, 30, 35].map(|ms| ms * 1000));
    let order: Vec<_> = sent.iter().map(|(_, group)| group.to.addr.port()).collect();
    assert_eq!(order[..4], order[4..]);
    pacer.push(start, job(2, 0..16, &to, 1));
    assert_ne!(drain(&mut pacer, start)[0].1.to, sent[0].1.to);
}

#[test]
fn a_released_flow_is_due_at_once() {
    let (start, mut pacer) = (Instant::now(), pacer(1.5));
    for flow in [1, 2] {
        pacer.push(start, job(flow, 0..160, &targets(3), 1));
        pacer.push(start, job(flow, 160..170, &targets(3), 1));
    }
    let mut due = Due::default();
    let now = start + Duration::from_millis(1);
    pacer.poll(now, &mut due);
    let bytes = |due: &Due| due.groups.iter().map(|group| group.bytes.len()).sum::<usize>();
    let before = bytes(&due);
    assert!(due.finished.is_empty() && before < 2 * 3 * 100, "{before}");
    pacer.release(now, Ssrc(1));
    pacer.release(now, Ssrc(9));
    pacer.poll(now, &mut due);
    assert_eq!(due.finished.len(), 2);
    pacer.release_all(now);
    let later = now + Duration::from_millis(1);
    pacer.release_all(later);
    assert_eq!(pacer.due.len(), 1);
    pacer.poll(later, &mut due);
    assert_eq!((due.finished.len(), pacer.next_deadline()), (4, None));
    assert_eq!((bytes(&due), due.skipped), (2 * 3 * 170 * 4, 0));
}

#[test]
fn neighbouring_targets_are_not_served_consecutively() {
    for count in 1..300_usize {
        let (start, mut pacer, to) = (Instant::now(), pacer(1.5), targets(count));
        pacer.push(start, job(1, 0..8, &to, 1));
        let sent = drain(&mut pacer, start);
        let mut turns = vec![usize::MAX; count];
        for (turn, (_, group)) in sent.iter().enumerate() {
            turns[usize::from(group.to.addr.port()) - 1] = turn;
        }
        assert!(sent.len() == count && !turns.contains(&usize::MAX), "each target once");
        // Twenty targets at one site: their turns are spread out.
        for site in turns.chunks_exact(20).filter(|_| count >= 40) {
            let mut turns = site.to_vec();
            turns.sort_unstable();
            let least = turns.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap_or(0);
            assert!(least * 8 * 20 >= count, "{least} of {count}");
        }
    }
}

#[test]
fn one_poll_emits_at_most_max_groups() {
    let (start, mut pacer, to) = (Instant::now(), pacer(1.5), targets(2500));
    for flow in 1..=3 {
        pacer.push(start, job(flow, 0..20, &to, 1));
        pacer.push(start, job(flow, 20..24, &to, 1));
    }
    pacer.release_all(start);
    let (mut due, mut came, mut finished) = (Due::default(), HashMap::new(), 0);
    while pacer.next_deadline().is_some() {
        pacer.poll(start, &mut due);
        assert!((1..=MAX_GROUPS).contains(&due.groups.len()));
        for group in due.groups.drain(..) {
            *came.entry(group.to.addr).or_insert(0) += group.bytes.len();
        }
        finished += due.finished.drain(..).count();
    }
    assert_eq!((finished, came.len()), (6, 2500));
    assert!(came.values().all(|bytes| *bytes == 3 * 24 * 4));
}

#[test]
fn stale_packets_are_skipped_and_counted() {
    let (start, mut pacer, to) = (Instant::now(), pacer(1.5), targets(3));
    pacer.push(start, job(1, 0..20, &to, 1));
    let mut due = Due::default();
    pacer.poll(start + FRAME * 5 / 9, &mut due);
    // Six of nine slots are sent: three groups to three targets each.
    let sent: usize = due.groups.drain(..).map(|group| group.bytes.len() / 4).sum();
    assert_eq!((sent, due.skipped), (6 * 8, 0));
    let late = start + FRAME + STALE;
    pacer.push(late - FRAME, job(1, 20..28, &to, 1));
    pacer.poll(late, &mut due);
    assert_eq!((due.skipped, due.finished.len()), (3 * 4, 2));
    assert!(due.groups.iter().all(|group| group.bytes[..4] == 20_u32.to_be_bytes()));
    assert_eq!((due.groups.len(), pacer.next_deadline()), (3, None));
    // Skipped in the middle of a group.
    pacer.push(start, job(1, 0..20, &to, 1));
    let mut due = Due::default();
    pacer.poll(start + FRAME / 9, &mut due);
    let sent: u64 = due.groups.drain(..).map(|group| group.bytes.len() as u64 / 4).sum();
    pacer.poll(late, &mut due);
    assert_eq!((sent, due.skipped), (2 * 8, 60 - 2 * 8));
}

/// A key frame six times the size of other frames, through 10 Mbit/s and a queue of 20 packets: the
/// table in docs/performance.md.
#[test]
fn pacing_reduces_losses_in_a_short_queue() {
    let to = targets(1);
    let lost = |packets: usize, rate: u64, factor: Option<f64>| {
        let settings = LinkSettings {
            rate_bps: Some(10_000_000),
            queue_bytes: 20 * 1132,
            ..LinkSettings::default()
        };
        let (start, mut link) = (Instant::now(), Link::new(settings, 1));
        let train = Train::collect(vec![Bytes::from(vec![0; 1132]); packets]).remove(0);
        let job = paced(1, train, &to, rate);
        let sent = match factor {
            None => {
                vec![(0, Group { to: to[0], bytes: job.train.slice(0, packets), stride: 1132 })]
            }
            Some(factor) => {
                let mut pacer = pacer(factor);
                pacer.push(start, job);
                drain(&mut pacer, start)
            }
        };
        for (at, group) in sent {
            let now = start + Duration::from_micros(at as u64);
            for packet in group.bytes.chunks(group.stride) {
                link.send(now, Bytes::copy_from_slice(packet));
            }
        }
        link.stats().dropped_queue
    };
    let mut found = Vec::new();
    for mbps in [1_u64, 2, 3, 5] {
        let rate = mbps * 1_000_000 / 8;
        // 50 frames in 2 s have the size of 55 small ones.
        let packets = (rate * 2 * 6 / 55).div_ceil(1120) as usize;
        let (at_once, paced) = (lost(packets, rate, None), lost(packets, rate, Some(2.0)));
        println!("{mbps} Mbit/s: of {packets} packets, {at_once} lost unpaced, {paced} paced");
        found.push((packets, at_once, paced));
    }
    let expected = [(25, 5, 0), (49, 29, 0), (74, 54, 17), (122, 102, 62)];
    assert_eq!(found, expected);
}

#[derive(Debug, Clone)]
struct Push {
    after: Duration,
    flow: u32,
    packets: u32,
    rate: u64,
    interval: Duration,
}

fn pushes() -> impl Strategy<Value = Vec<Push>> {
    let rate = prop_oneof![Just(0), 1..20_000_u64];
    let push = (0..50_000_u64, 1..4_u32, 1..40_u32, rate, 5..101_u64);
    let push = push.prop_map(|(after, flow, packets, rate, interval)| Push {
        after: Duration::from_micros(after),
        flow,
        packets,
        rate,
        interval: Duration::from_millis(interval),
    });
    prop::collection::vec(push, 1..40)
}

proptest! {
    /// Each target gets each packet once, in order, and no later than the longest interval.
    #[test]
    fn no_packet_is_lost_repeated_reordered_or_late(
        pushes in pushes(),
        factor in 1.5..100.0_f64,
        count in 1..100_usize,
        tick in 1..500_u64,
    ) {
        let tick = Duration::from_micros(tick * 10);
        let (start, mut pacer, to) = (Instant::now(), pacer(factor), targets(count));
        let longest = pushes.iter().map(|push| push.interval).max().unwrap_or_default();
        let mut pushed: HashMap<u32, Vec<Instant>> = HashMap::new();
        let mut came: HashMap<(u32, std::net::SocketAddr), usize> = HashMap::new();
        let (mut now, mut due) = (start, Due::default());
        let mut check = |pacer: &mut Pacer, pushed: &HashMap<u32, Vec<Instant>>, now: Instant| {
            due.groups.clear();
            pacer.poll(now, &mut due);
            for group in &due.groups {
                prop_assert!(group.bytes.len() <= GROUP * 8);
                for packet in group.bytes.chunks(8) {
                    let [flow, number] = [&packet[..4], &packet[4..]]
                        .map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap()));
                    let next = came.entry((flow, group.to.addr)).or_default();
                    prop_assert_eq!(number as usize, *next);
                    *next += 1;
                    let late = now - pushed[&flow][number as usize];
                    prop_assert!(late <= longest + tick, "{late:?}");
                }
            }
            Ok(())
        };
        for push in &pushes {
            let until = now + push.after;
            while now + tick < until {
                now += tick;
                check(&mut pacer, &pushed, now)?;
            }
            now = until;
            let times = pushed.entry(push.flow).or_default();
            let numbers = times.len() as u32..times.len() as u32 + push.packets;
            let packet = |number: u32| {
                Bytes::from([push.flow.to_be_bytes(), number.to_be_bytes()].concat())
            };
            let train = Train::collect(numbers.map(packet)).remove(0);
            times.extend((0..push.packets).map(|_| now));
            let mut job = paced(push.flow, train, &to, push.rate);
            job.pace = Some(Pace { rate: push.rate, interval: push.interval, held: None });
            pacer.push(now, job);
            check(&mut pacer, &pushed, now)?;
        }
        while pacer.next_deadline().is_some() {
            now += tick;
            check(&mut pacer, &pushed, now)?;
        }
        prop_assert_eq!((due.finished.len(), due.skipped), (pushes.len(), 0));
        prop_assert!(pacer.flows.is_empty());
        for (flow, times) in &pushed {
            for target in &to[..] {
                prop_assert_eq!(came.get(&(*flow, target.addr)), Some(&times.len()));
            }
        }
    }
}
