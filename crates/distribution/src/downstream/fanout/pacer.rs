//! Spreads the packets of each burst over time, for networks with short queues.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::job::Job;
use crate::downstream::fanout::work_batch::STALE;
use downpour_repair::rtp::Ssrc;
use downpour_sys::buffer::Buffer;

/// Whether bursts are spread.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Pacing {
    /// A burst leaves at once.
    #[default]
    Off,
    /// It leaves at so many times its stream's rate, within a frame interval.
    Factor(PaceFactor),
}

/// How many times the stream's rate a burst leaves at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaceFactor(f64);

impl PaceFactor {
    /// The least: there must be room for what comes while a key frame leaves.
    pub const LEAST: f64 = 1.5;
    /// The most.
    pub const MOST: f64 = 100.0;

    /// `None` if it is not from [`Self::LEAST`] to [`Self::MOST`].
    pub fn new(factor: f64) -> Option<Self> {
        (Self::LEAST..=Self::MOST).contains(&factor).then_some(Self(factor))
    }

    /// As a number.
    pub fn get(self) -> f64 {
        self.0
    }
}

/// Says when which packets leave for whom.
///
/// What is of one stream has a lane, in which it keeps its order. A job's turn comes when the one
/// before it is over. It then leaves in groups of up to 8 packets; group after group goes to target
/// after target at even distances, such that the job takes as long as its bytes take at the stream's
/// rate times the factor, but ends within a frame interval of the time at which it came, or with
/// what is before it where the interval has become shorter. So a stream is never further behind than
/// the longest interval of what waits in it.
///
/// Targets that share an uplink are neighbours in the list, by their addresses, and are not served
/// one after the other: the next one is always far away in the list. The first one is another for
/// each stream.
pub(super) struct Pacer {
    factor: f64,
    lanes: HashMap<Ssrc, Lane>,
    /// When each lane has something due next.
    due: BTreeSet<(Instant, Ssrc)>,
    /// A number of targets, and the [`golden_step`] among so many: mostly the one that is needed.
    step: (usize, usize),
}

/// Some packets of a train for one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) to: SocketAddr,
    pub(super) bytes: Buffer,
    pub(super) stride: usize,
}

/// What a worker is to do.
#[derive(Default)]
pub(super) struct Due {
    pub(super) groups: Vec<Group>,
    /// Jobs of which nothing is left: they are over when those groups have left.
    pub(super) over: Vec<Job>,
    /// Packets, times targets, that waited for so long that nobody waits for them any more.
    pub(super) skipped: u64,
}

impl Pacer {
    pub(super) fn new(factor: PaceFactor) -> Self {
        Self { factor: factor.get(), lanes: HashMap::new(), due: BTreeSet::new(), step: (1, 1) }
    }

    /// Takes a job at the end of its lane. One that has no pace takes no time.
    pub(super) fn push(&mut self, now: Instant, job: Job) {
        let pace = job.pace.as_ref().map(|pace| (pace.rate, pace.interval));
        let (rate, interval) = pace.unwrap_or((u64::MAX, Duration::ZERO));
        let ssrc = job.lane;
        let lane = self.lanes.entry(ssrc).or_default();
        let starts = lane.jobs.back().map_or(now, |last| last.ends().max(now));
        let wanted = job.train.bytes().len() as f64 / (self.factor * rate.max(1) as f64);
        // Never over the interval, so it is no number that a duration cannot hold.
        let left = (now + interval).saturating_duration_since(starts);
        let takes = Duration::from_secs_f64(wanted.min(left.as_secs_f64()));
        let targets = job.share.len().max(1);
        if self.step.0 != targets {
            self.step = (targets, golden_step(targets));
        }
        let paced = Paced::new(job, starts, takes, self.step);
        if lane.jobs.is_empty() {
            self.due.insert((starts, ssrc));
        }
        lane.jobs.push_back(paced);
    }

    /// Lets all that waits in a lane leave at once.
    pub(super) fn hurry(&mut self, now: Instant, lane: Ssrc) {
        let Some(jobs) = self.lanes.get_mut(&lane).map(|lane| &mut lane.jobs) else { return };
        let Some(first) = jobs.front() else { return };
        self.due.remove(&(first.next_due(), lane));
        for paced in jobs.iter_mut().filter(|paced| paced.ends() > now) {
            (paced.starts, paced.takes) = (now, Duration::ZERO);
        }
        self.due.extend(jobs.front().map(|first| (first.next_due(), lane)));
    }

    /// As [`Pacer::hurry`], all lanes.
    pub(super) fn hurry_all(&mut self, now: Instant) {
        let lanes: Vec<_> = self.lanes.keys().copied().collect();
        lanes.into_iter().for_each(|lane| self.hurry(now, lane));
    }

    /// Adds to what is `due`, up to [`MOST_GROUPS`] of them at a time: where a worker is far behind,
    /// they would be more than the memory holds. What is not there yet is due the next time.
    pub(super) fn poll(&mut self, now: Instant, due: &mut Due) {
        while let Some(&(at, ssrc)) = self.due.first()
            && at <= now
            && due.groups.len() < MOST_GROUPS
        {
            self.due.pop_first();
            let Some(lane) = self.lanes.get_mut(&ssrc) else { continue };
            while let Some(paced) = lane.jobs.front_mut() {
                match now.saturating_duration_since(paced.ends()) >= STALE {
                    true => due.skipped += paced.skip(),
                    false => paced.poll(now, &mut due.groups),
                }
                if paced.sent < paced.slots {
                    self.due.insert((paced.next_due(), ssrc));
                    break;
                }
                due.over.extend(lane.jobs.pop_front().map(|paced| paced.job));
            }
            if lane.jobs.is_empty() {
                self.lanes.remove(&ssrc);
            }
        }
    }

    /// When [`Pacer::poll`] has something next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }
}

#[derive(Default)]
struct Lane {
    /// In their order; none is without slots.
    jobs: VecDeque<Paced>,
}

struct Paced {
    job: Job,
    /// Its turn.
    starts: Instant,
    takes: Duration,
    /// Pairs of a group and a target.
    slots: usize,
    sent: usize,
    targets: usize,
    /// From one target to the next one.
    step: usize,
}

impl Paced {
    fn new(job: Job, starts: Instant, takes: Duration, (targets, step): (usize, usize)) -> Self {
        let slots = job.train.packets().div_ceil(GROUP).max(1) * targets;
        Self { job, starts, takes, slots, sent: 0, targets, step }
    }

    fn ends(&self) -> Instant {
        self.starts + self.takes
    }

    fn due(&self, slot: usize) -> Instant {
        self.starts + self.takes.mul_f64(slot as f64 / self.slots.max(1) as f64)
    }

    fn next_due(&self) -> Instant {
        self.due(self.sent)
    }

    /// The target, by its place in the list, of the one at `turn` among those of a group.
    fn target(&self, turn: usize) -> usize {
        let first = (self.job.lane.0 as usize).wrapping_mul(SPREAD) % self.targets;
        (first + turn * self.step) % self.targets
    }

    /// Adds the groups whose time has come, as long as there is room.
    fn poll(&mut self, now: Instant, groups: &mut Vec<Group>) {
        while self.sent < self.slots && groups.len() < MOST_GROUPS && self.next_due() <= now {
            let group = self.sent / self.targets;
            let target = self.target(self.sent % self.targets);
            self.sent += 1;
            if let Some(target) = self.job.share.get(target) {
                let train = &self.job.train;
                let bytes = train.slice(group * GROUP, GROUP);
                groups.push(Group { to: target.addr, bytes, stride: train.stride() });
            }
        }
    }

    /// Leaves out what is left; packets, times targets.
    fn skip(&mut self) -> u64 {
        let packets = self.job.train.packets();
        let (group, begun) = (self.sent / self.targets, self.sent % self.targets);
        let whole = packets.saturating_sub(group * GROUP);
        let twice = whole.min(GROUP) * begun;
        self.sent = self.slots;
        (whole * self.targets).saturating_sub(twice) as u64
    }
}

/// The step from target to target such that the turns of two neighbours are about the golden section
/// of all turns apart: those of a few dozen are then spread evenly.
fn golden_step(targets: usize) -> usize {
    let golden = (targets as f64 * 0.618_034).round() as usize;
    let near = (0..targets).flat_map(|by| [golden + by, golden.saturating_sub(by)]);
    // Only one that has an inverse comes to each target; some of them are too near a simple fraction.
    let possible = near.filter_map(|apart| Some((apart, inverse(apart, targets)?))).take(8);
    let evenness = |apart: usize| {
        let spread = (1..targets.min(32)).map(|neighbour| {
            let apart = neighbour * apart % targets;
            neighbour * apart.min(targets - apart)
        });
        spread.min()
    };
    possible.max_by_key(|(apart, _)| evenness(*apart)).map_or(1, |(_, step)| step)
}

/// What times `number` is 1 more than a multiple of `modulus` (the extended Euclidean algorithm).
fn inverse(number: usize, modulus: usize) -> Option<usize> {
    let modulus = i64::try_from(modulus).ok().filter(|modulus| *modulus > 1)?;
    let (mut rests, mut factors) = ((modulus, i64::try_from(number).ok()? % modulus), (0, 1));
    while rests.1 != 0 {
        let times = rests.0 / rests.1;
        rests = (rests.1, rests.0 - times * rests.1);
        factors = (factors.1, factors.0 - times * factors.1);
    }
    (rests.0 == 1).then_some(factors.0.rem_euclid(modulus) as usize)
}

/// A stream's frame interval by its media's clock, so that an encoder's fits and starts do not show.
#[derive(Debug, Default)]
pub struct FrameInterval {
    last: Option<u32>,
    interval: Option<Duration>,
}

impl FrameInterval {
    /// Takes a video frame's timestamp in milliseconds, which wraps.
    pub fn add(&mut self, timestamp: u32) {
        let since = self.last.map(|last| timestamp.wrapping_sub(last));
        // A header has its frame's timestamp; after a jump, the next frame tells.
        match since {
            Some(0) => return,
            Some(ms @ 1..=MOST_INTERVAL_MS) => {
                self.interval = Some(Duration::from_millis(ms.max(LEAST_INTERVAL_MS).into()));
            }
            _ => {}
        }
        self.last = Some(timestamp);
    }

    /// From the last frame but one to the last, 5 to 100 ms; 20 ms where there is no video.
    pub fn get(&self) -> Duration {
        self.interval.unwrap_or(UNKNOWN_INTERVAL)
    }
}

/// Packets that leave back to back: short queues take them, and GSO makes one call of them.
const GROUP: usize = 8;
/// What one poll gives at most: a few hundred KB to hold, and more than any call sends.
const MOST_GROUPS: usize = 4096;
/// Prime, so that streams which follow each other begin far apart.
const SPREAD: usize = 7919;
const LEAST_INTERVAL_MS: u32 = 5;
const MOST_INTERVAL_MS: u32 = 100;
const UNKNOWN_INTERVAL: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
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
        (1..=count).map(|n| Target { addr: ([10, 0, 0, 1], n as u16).into() }).collect()
    }

    /// Packets of 4 bytes, which say their number.
    fn job(lane: u32, numbers: Range<u32>, to: &Arc<[Target]>, rate: u64) -> Job {
        let packets = numbers.map(|n| Bytes::copy_from_slice(&n.to_be_bytes()));
        let train = Train::collect(packets).remove(0);
        paced(lane, train, to, rate)
    }

    fn paced(lane: u32, train: Train, to: &Arc<[Target]>, rate: u64) -> Job {
        let share = TargetShare::of(to, Ssrc(lane), 0, 1).unwrap();
        let pace = Some(Pace { rate, interval: FRAME, held: None });
        Job { lane: Ssrc(lane), train, share, pace }
    }

    fn pacer(factor: f64) -> Pacer {
        Pacer::new(PaceFactor::new(factor).unwrap())
    }

    /// Polls whenever something is due; what left when, in microseconds.
    fn drain(pacer: &mut Pacer, start: Instant) -> Vec<(u128, Group)> {
        let mut left = Vec::new();
        while let Some(at) = pacer.next_deadline() {
            let mut due = Due::default();
            pacer.poll(at, &mut due);
            assert_eq!(due.skipped, 0);
            left.extend(due.groups.into_iter().map(|group| ((at - start).as_micros(), group)));
        }
        left
    }

    #[test]
    fn a_burst_leaves_in_groups_at_the_factor_times_the_rate() {
        let (start, mut pacer) = (Instant::now(), pacer(2.0));
        // 32 packets of 4 bytes, at 2 × 8000 bytes a second: 8 ms.
        pacer.push(start, job(1, 0..32, &targets(1), 8000));
        pacer.push(start, job(1, 32..33, &targets(1), 8000));
        let left: Vec<_> =
            drain(&mut pacer, start).iter().map(|(at, g)| (*at, g.bytes.len())).collect();
        assert_eq!(left, [(0, 32), (2000, 32), (4000, 32), (6000, 32), (8000, 4)]);
        assert!(pacer.lanes.is_empty() && pacer.due.is_empty());
    }

    #[test]
    fn a_key_frame_takes_a_frame_interval_at_most() {
        let (start, mut pacer) = (Instant::now(), pacer(2.0));
        // 400 times what a frame may have.
        pacer.push(start, job(1, 0..160, &targets(1), 40));
        let left = drain(&mut pacer, start);
        assert_eq!(left.len(), 20);
        assert_eq!(left.last().map(|(at, _)| *at), Some(38_000));
        // What comes behind it ends in its own time.
        pacer.push(start, job(1, 0..160, &targets(1), 40));
        let later = start + FRAME / 4;
        pacer.push(later, job(1, 160..320, &targets(1), 40));
        let left = drain(&mut pacer, start);
        assert!(left.last().is_some_and(|(at, _)| (48_000..50_000).contains(at)), "{left:?}");
    }

    #[test]
    fn targets_take_turns_and_streams_begin_at_different_ones() {
        let (start, mut pacer) = (Instant::now(), pacer(1.5));
        let to = targets(4);
        pacer.push(start, job(1, 0..16, &to, 1));
        let left = drain(&mut pacer, start);
        let times: Vec<_> = left.iter().map(|(at, _)| *at).collect();
        assert_eq!(times, [0, 5, 10, 15, 20, 25, 30, 35].map(|ms| ms * 1000));
        let order: Vec<_> = left.iter().map(|(_, group)| group.to.port()).collect();
        assert_eq!(order[..4], order[4..]);
        pacer.push(start, job(2, 0..16, &to, 1));
        assert_ne!(drain(&mut pacer, start)[0].1.to, left[0].1.to);
    }

    #[test]
    fn what_has_ended_leaves_at_once() {
        let (start, mut pacer) = (Instant::now(), pacer(1.5));
        for lane in [1, 2] {
            pacer.push(start, job(lane, 0..160, &targets(3), 1));
            pacer.push(start, job(lane, 160..170, &targets(3), 1));
        }
        let mut due = Due::default();
        let now = start + Duration::from_millis(1);
        pacer.poll(now, &mut due);
        let bytes = |due: &Due| due.groups.iter().map(|group| group.bytes.len()).sum::<usize>();
        let before = bytes(&due);
        assert!(due.over.is_empty() && before < 2 * 3 * 100, "{before}");
        pacer.hurry(now, Ssrc(1));
        pacer.hurry(now, Ssrc(9));
        pacer.poll(now, &mut due);
        assert_eq!(due.over.len(), 2);
        pacer.hurry_all(now);
        let later = now + Duration::from_millis(1);
        pacer.hurry_all(later);
        assert_eq!(pacer.due.len(), 1);
        pacer.poll(later, &mut due);
        assert_eq!((due.over.len(), pacer.next_deadline()), (4, None));
        assert_eq!((bytes(&due), due.skipped), (2 * 3 * 170 * 4, 0));
    }

    #[test]
    fn neighbours_are_not_served_one_after_the_other() {
        for count in 1..300_usize {
            let (start, mut pacer, to) = (Instant::now(), pacer(1.5), targets(count));
            pacer.push(start, job(1, 0..8, &to, 1));
            let left = drain(&mut pacer, start);
            let mut turns = vec![usize::MAX; count];
            for (turn, (_, group)) in left.iter().enumerate() {
                turns[usize::from(group.to.port()) - 1] = turn;
            }
            assert!(left.len() == count && !turns.contains(&usize::MAX), "each once");
            // Of twenty at one site, there is time between any two.
            for site in turns.chunks_exact(20).filter(|_| count >= 40) {
                let mut turns = site.to_vec();
                turns.sort_unstable();
                let least = turns.windows(2).map(|pair| pair[1] - pair[0]).min().unwrap_or(0);
                assert!(least * 8 * 20 >= count, "{least} of {count}");
            }
        }
    }

    #[test]
    fn however_much_is_due_only_so_much_is_given_at_a_time() {
        let (start, mut pacer, to) = (Instant::now(), pacer(1.5), targets(2500));
        for lane in 1..=3 {
            pacer.push(start, job(lane, 0..20, &to, 1));
            pacer.push(start, job(lane, 20..24, &to, 1));
        }
        pacer.hurry_all(start);
        let (mut due, mut came, mut over) = (Due::default(), HashMap::new(), 0);
        while pacer.next_deadline().is_some() {
            pacer.poll(start, &mut due);
            assert!((1..=MOST_GROUPS).contains(&due.groups.len()));
            for group in due.groups.drain(..) {
                *came.entry(group.to).or_insert(0) += group.bytes.len();
            }
            over += due.over.drain(..).count();
        }
        assert_eq!((over, came.len()), (6, 2500));
        assert!(came.values().all(|bytes| *bytes == 3 * 24 * 4));
    }

    #[test]
    fn what_was_to_leave_long_ago_is_left_out_and_counted() {
        let (start, mut pacer, to) = (Instant::now(), pacer(1.5), targets(3));
        pacer.push(start, job(1, 0..20, &to, 1));
        let mut due = Due::default();
        pacer.poll(start + FRAME * 5 / 9, &mut due);
        // Of three groups to three targets each, it has sent six.
        let sent: usize = due.groups.drain(..).map(|group| group.bytes.len() / 4).sum();
        assert_eq!((sent, due.skipped), (6 * 8, 0));
        let late = start + FRAME + STALE;
        pacer.push(late - FRAME, job(1, 20..28, &to, 1));
        pacer.poll(late, &mut due);
        assert_eq!((due.skipped, due.over.len()), (3 * 4, 2));
        assert!(due.groups.iter().all(|group| group.bytes[..4] == 20_u32.to_be_bytes()));
        assert_eq!((due.groups.len(), pacer.next_deadline()), (3, None));
        // In the middle of a group.
        pacer.push(start, job(1, 0..20, &to, 1));
        let mut due = Due::default();
        pacer.poll(start + FRAME / 9, &mut due);
        let sent: u64 = due.groups.drain(..).map(|group| group.bytes.len() as u64 / 4).sum();
        pacer.poll(late, &mut due);
        assert_eq!((sent, due.skipped), (2 * 8, 60 - 2 * 8));
    }

    #[test]
    fn the_interval_is_that_of_the_media() {
        let mut interval = FrameInterval::default();
        assert_eq!(interval.get(), UNKNOWN_INTERVAL);
        let steps = [
            (0, 20),
            (0, 20),
            (33, 33),
            (33, 33),
            (67, 34),
            (90_000, 34),
            (90_040, 40),
            (90_041, 5),
        ];
        for (timestamp, expected) in steps {
            interval.add(timestamp);
            assert_eq!(interval.get().as_millis(), expected, "{timestamp}");
        }
        interval.add(u32::MAX - 9);
        interval.add(30);
        assert_eq!(interval.get(), FRAME);
    }

    #[test]
    fn a_factor_has_bounds() {
        for (factor, valid) in [(1.5, true), (100.0, true), (1.49, false), (101.0, false)] {
            assert_eq!(PaceFactor::new(factor).is_some(), valid, "{factor}");
        }
        assert_eq!(PaceFactor::new(f64::NAN), None);
    }

    /// A key frame of six times the others' size through 10 Mbit/s and a queue of 20 packets, as
    /// docs/performance.md has it.
    #[test]
    fn a_short_queue_loses_less() {
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
            let left = match factor {
                None => vec![(
                    0,
                    Group { to: to[0].addr, bytes: job.train.slice(0, packets), stride: 1132 },
                )],
                Some(factor) => {
                    let mut pacer = pacer(factor);
                    pacer.push(start, job);
                    drain(&mut pacer, start)
                }
            };
            for (at, group) in left {
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
            // 50 frames in 2 s are 55 of the small ones.
            let packets = (rate * 2 * 6 / 55).div_ceil(1120) as usize;
            let (at_once, paced) = (lost(packets, rate, None), lost(packets, rate, Some(2.0)));
            println!("{mbps} Mbit/s: of {packets}, {at_once} are lost at once, {paced} paced");
            found.push((packets, at_once, paced));
        }
        let expected = [(25, 5, 0), (49, 29, 0), (74, 54, 17), (122, 102, 62)];
        assert_eq!(found, expected);
    }

    #[derive(Debug, Clone)]
    struct Push {
        after: Duration,
        lane: u32,
        packets: u32,
        rate: u64,
        interval: Duration,
    }

    fn pushes() -> impl Strategy<Value = Vec<Push>> {
        let rate = prop_oneof![Just(0), 1..20_000_u64];
        let push = (0..50_000_u64, 1..4_u32, 1..40_u32, rate, 5..101_u64);
        let push = push.prop_map(|(after, lane, packets, rate, interval)| Push {
            after: Duration::from_micros(after),
            lane,
            packets,
            rate,
            interval: Duration::from_millis(interval),
        });
        prop::collection::vec(push, 1..40)
    }

    proptest! {
        /// Each packet once to each target, in its stream's order, and none later than the
        /// longest interval after it came.
        #[test]
        fn nothing_is_lost_doubled_turned_round_or_late(
            pushes in pushes(),
            factor in 1.5..100.0_f64,
            count in 1..100_usize,
            tick in 1..500_u64,
        ) {
            let tick = Duration::from_micros(tick * 10);
            let (start, mut pacer, to) = (Instant::now(), pacer(factor), targets(count));
            let longest = pushes.iter().map(|push| push.interval).max().unwrap_or_default();
            let mut pushed: HashMap<u32, Vec<Instant>> = HashMap::new();
            let mut came: HashMap<(u32, SocketAddr), usize> = HashMap::new();
            let (mut now, mut due) = (start, Due::default());
            let mut check = |pacer: &mut Pacer, pushed: &HashMap<u32, Vec<Instant>>, now: Instant| {
                due.groups.clear();
                pacer.poll(now, &mut due);
                for group in &due.groups {
                    prop_assert!(group.bytes.len() <= GROUP * 8);
                    for packet in group.bytes.chunks(8) {
                        let [lane, number] = [&packet[..4], &packet[4..]]
                            .map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap()));
                        let next = came.entry((lane, group.to)).or_default();
                        prop_assert_eq!(number as usize, *next);
                        *next += 1;
                        let late = now - pushed[&lane][number as usize];
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
                let times = pushed.entry(push.lane).or_default();
                let numbers = times.len() as u32..times.len() as u32 + push.packets;
                let packet = |number: u32| {
                    Bytes::from([push.lane.to_be_bytes(), number.to_be_bytes()].concat())
                };
                let train = Train::collect(numbers.map(packet)).remove(0);
                times.extend((0..push.packets).map(|_| now));
                let mut job = paced(push.lane, train, &to, push.rate);
                job.pace = Some(Pace { rate: push.rate, interval: push.interval, held: None });
                pacer.push(now, job);
                check(&mut pacer, &pushed, now)?;
            }
            while pacer.next_deadline().is_some() {
                now += tick;
                check(&mut pacer, &pushed, now)?;
            }
            prop_assert_eq!((due.over.len(), due.skipped), (pushes.len(), 0));
            prop_assert!(pacer.lanes.is_empty());
            for (lane, times) in &pushed {
                for target in &to[..] {
                    prop_assert_eq!(came.get(&(*lane, target.addr)), Some(&times.len()));
                }
            }
        }
    }
}
