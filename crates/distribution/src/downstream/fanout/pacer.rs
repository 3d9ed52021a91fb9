//! Pacer: spreads the packets of each burst over time, for networks with short queues.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::{job::Job, pacing::PaceFactor};
use crate::downstream::{fanout::work_batch::STALE, routes::Target};
use downpour_repair::rtp::Ssrc;
use downpour_sys::buffer::Buffer;

/// Schedule of one worker's packets: earliest deadline first over all flows, first in first out within
/// a flow.
///
/// A job is **waiting** until the job before it in its flow ends, then **sending** until its last group
/// is sent, then **finished**:
///
/// - [`Pacer::push`] appends a job to its flow and fixes its start (the end of the job before it) and
///   its duration: its bytes at the stream's rate times the factor, but no longer than to the end of
///   the frame interval that starts at the push.
/// - [`Pacer::poll`] emits the groups that are due. A group is up to [`GROUP`] packets for one target.
///   The groups of a job are evenly spaced over its duration: the first group to each target, then the
///   second group to each target, and so on. A job that should have ended [`STALE`] ago is skipped.
/// - [`Pacer::release`] makes everything in a flow due now.
///
/// Invariants: a flow is in `due` exactly once while it has jobs; a flow without jobs is removed; no
/// flow lags further behind than the longest frame interval among its waiting jobs.
///
/// The target list is mostly sorted by address, so targets behind one uplink are neighbours. Consecutive
/// groups go to targets far apart in the list ([`golden_step`]), and each flow starts at another
/// target.
pub(super) struct Pacer {
    factor: f64,
    flows: HashMap<Ssrc, Flow>,
    /// The time at which each flow has its next group.
    due: BTreeSet<(Instant, Ssrc)>,
    /// Cache of [`golden_step`]: the latest number of targets, and its step.
    step: (usize, usize),
}

/// Consecutive packets of a train, for one target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) to: Target,
    pub(super) bytes: Buffer,
    pub(super) stride: usize,
}

/// Output of [`Pacer::poll`].
#[derive(Default)]
pub(super) struct Due {
    pub(super) groups: Vec<Group>,
    /// Jobs that are finished once `groups` are sent.
    pub(super) finished: Vec<Job>,
    /// Packets, counted once per target, that were skipped because they were too late.
    pub(super) skipped: u64,
}

impl Pacer {
    pub(super) fn new(factor: PaceFactor) -> Self {
        Self { factor: factor.get(), flows: HashMap::new(), due: BTreeSet::new(), step: (1, 1) }
    }

    /// Appends a job to its flow. A job without a pace has no duration.
    pub(super) fn push(&mut self, now: Instant, job: Job) {
        let pace = job.pace.as_ref().map(|pace| (pace.rate, pace.interval));
        let (rate, interval) = pace.unwrap_or((u64::MAX, Duration::ZERO));
        let ssrc = job.flow;
        let flow = self.flows.entry(ssrc).or_default();
        let starts = flow.jobs.back().map_or(now, |last| last.ends().max(now));
        let wanted = job.train.bytes().len() as f64 / (self.factor * rate.max(1) as f64);
        // Limited by the interval, so `from_secs_f64` cannot panic.
        let left = (now + interval).saturating_duration_since(starts);
        let takes = Duration::from_secs_f64(wanted.min(left.as_secs_f64()));
        let targets = job.share.len().max(1);
        if self.step.0 != targets {
            self.step = (targets, golden_step(targets));
        }
        let paced = PacedJob::new(job, starts, takes, self.step);
        if flow.jobs.is_empty() {
            self.due.insert((starts, ssrc));
        }
        flow.jobs.push_back(paced);
    }

    /// Makes all packets of a flow due now.
    pub(super) fn release(&mut self, now: Instant, ssrc: Ssrc) {
        let Some(jobs) = self.flows.get_mut(&ssrc).map(|flow| &mut flow.jobs) else { return };
        let Some(first) = jobs.front() else { return };
        self.due.remove(&(first.next_due(), ssrc));
        for paced in jobs.iter_mut().filter(|paced| paced.ends() > now) {
            (paced.starts, paced.takes) = (now, Duration::ZERO);
        }
        self.due.extend(jobs.front().map(|first| (first.next_due(), ssrc)));
    }

    /// Makes all packets of all flows due now.
    pub(super) fn release_all(&mut self, now: Instant) {
        let flows: Vec<_> = self.flows.keys().copied().collect();
        flows.into_iter().for_each(|ssrc| self.release(now, ssrc));
    }

    /// Adds the groups that are due at `now`, until `due` holds [`MAX_GROUPS`]. The rest stays due for
    /// the next call: if the worker is far behind, all of it would not fit in memory.
    pub(super) fn poll(&mut self, now: Instant, due: &mut Due) {
        while let Some(&(at, ssrc)) = self.due.first()
            && at <= now
            && due.groups.len() < MAX_GROUPS
        {
            self.due.pop_first();
            let Some(flow) = self.flows.get_mut(&ssrc) else { continue };
            while let Some(paced) = flow.jobs.front_mut() {
                match now.saturating_duration_since(paced.ends()) >= STALE {
                    true => due.skipped += paced.skip(),
                    false => paced.poll(now, &mut due.groups),
                }
                if paced.sent < paced.slots {
                    self.due.insert((paced.next_due(), ssrc));
                    break;
                }
                due.finished.extend(flow.jobs.pop_front().map(|paced| paced.job));
            }
            if flow.jobs.is_empty() {
                self.flows.remove(&ssrc);
            }
        }
    }

    /// The time of the next group; `None` if there are no jobs.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }
}

#[derive(Default)]
struct Flow {
    /// In sending order. Each job has at least one slot.
    jobs: VecDeque<PacedJob>,
}

/// A job and its schedule.
struct PacedJob {
    job: Job,
    /// When the first group is due.
    starts: Instant,
    takes: Duration,
    /// Number of groups times targets.
    slots: usize,
    /// Slots that are sent.
    sent: usize,
    targets: usize,
    /// Distance in the list from one target to the next, modulo `targets`.
    step: usize,
}

impl PacedJob {
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

    /// The index of the target that gets a group as number `turn`.
    fn target(&self, turn: usize) -> usize {
        let first = (self.job.flow.0 as usize).wrapping_mul(SPREAD) % self.targets;
        (first + turn * self.step) % self.targets
    }

    /// Adds the groups that are due, until `groups` holds [`MAX_GROUPS`].
    fn poll(&mut self, now: Instant, groups: &mut Vec<Group>) {
        while self.sent < self.slots && groups.len() < MAX_GROUPS && self.next_due() <= now {
            let group = self.sent / self.targets;
            let target = self.target(self.sent % self.targets);
            self.sent += 1;
            if let Some(target) = self.job.share.get(target) {
                let train = &self.job.train;
                let bytes = train.slice(group * GROUP, GROUP);
                groups.push(Group { to: target, bytes, stride: train.stride() });
            }
        }
    }

    /// Marks the job as sent. Returns the number of packets left out, counted once per target.
    fn skip(&mut self) -> u64 {
        let packets = self.job.train.packets();
        let (group, served) = (self.sent / self.targets, self.sent % self.targets);
        let unsent = packets.saturating_sub(group * GROUP);
        // `served` targets already have the current group.
        let sent = unsent.min(GROUP) * served;
        self.sent = self.slots;
        (unsent * self.targets).saturating_sub(sent) as u64
    }
}

/// The step through the target list that serves each target once and keeps the turns of neighbours far
/// apart: by about `targets` divided by the golden ratio, which spreads a few dozen neighbours evenly.
fn golden_step(targets: usize) -> usize {
    let golden = (targets as f64 * 0.618_034).round() as usize;
    let near = (0..targets).flat_map(|by| [golden + by, golden.saturating_sub(by)]);
    // A step visits each target only if it has an inverse. Of the nearest eight, take the most even
    // one: some are close to a simple fraction of `targets`.
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

/// The modular inverse of `number`, by the extended Euclidean algorithm; `None` if there is none.
fn inverse(number: usize, modulus: usize) -> Option<usize> {
    let modulus = i64::try_from(modulus).ok().filter(|modulus| *modulus > 1)?;
    let (mut remainders, mut factors) = ((modulus, i64::try_from(number).ok()? % modulus), (0, 1));
    while remainders.1 != 0 {
        let quotient = remainders.0 / remainders.1;
        remainders = (remainders.1, remainders.0 - quotient * remainders.1);
        factors = (factors.1, factors.0 - quotient * factors.1);
    }
    (remainders.0 == 1).then_some(factors.0.rem_euclid(modulus) as usize)
}

/// Packets per group, sent back to back: few enough for a short queue, and one message with GSO.
const GROUP: usize = 8;
/// Most groups per poll: a few hundred KB of memory, and more than one system call sends.
const MAX_GROUPS: usize = 4096;
/// A prime, so that flows with consecutive SSRCs start at targets far apart.
const SPREAD: usize = 7919;

#[cfg(test)]
mod tests;
