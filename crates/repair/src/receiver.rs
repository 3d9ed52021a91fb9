//! What one publication's receiver does about packets that do not come: finds gaps, asks, asks
//! again, and gives up in time. No socket, no clock: every call is told what time it is.
//!
//! Packets leave in order, each at most once. A packet that is in order leaves at once; one behind
//! a gap waits for the gap, and a gap lasts [`Settings::latency`] from when it was seen.
//!
//! A publication may come over two paths, each of which brings all of it. The first copy of a packet
//! counts, and only what both lost is asked for.

mod asking;
mod dual_path;
mod stats;
mod timing;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::{Duration, Instant},
};

pub use self::stats::{DELAY_BOUNDS_MS, Histogram, PathStats, Stats};
pub use crate::receiver::dual_path::MAX_PATHS;

use self::timing::{ControlSkew, LossEstimate, ReorderEstimate, RoundTrip, TIMER_GRAIN};
use crate::receiver::dual_path::Paths;
use crate::rtp::{Packet, Seq};

/// How long to wait and how much to hold.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long a missing packet is waited for, from when its gap was seen; and [`GRACE`] besides.
    pub latency: Duration,
    /// How long packets are waited for that were sent before this receiver joined.
    pub join_latency: Duration,
    /// Packets held behind a gap, and numbers missing in it, together.
    pub window: usize,
    /// Whether repairs may come as live packets do, because the sender sends them to a multicast
    /// group.
    pub group: bool,
}

impl Default for Settings {
    fn default() -> Self {
        let latency = Duration::from_millis(500);
        Self { latency, join_latency: Duration::from_secs(1), window: 1 << 14, group: false }
    }
}

/// How a packet came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// As it was first sent, over this one of the paths that the stream has: 0 or 1.
    Live(u8),
    /// As the answer to a request.
    Repair,
    /// Made anew from parity.
    Parity,
}

/// What the receiver hands on, in the order of sequence numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The next packet.
    Packet(Packet),
    /// The next `n` packets will never come.
    Lost(u64),
    /// The sender began anew; what follows begins with this number and is no continuation.
    Restart(Seq),
}

/// Numbers to ask for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// In rising order.
    pub seqs: Vec<Seq>,
    /// How many copies of each the sender should send, a few milliseconds apart.
    pub copies: u8,
    /// When the first of them is given up.
    pub deadline: Instant,
}

impl Request {
    /// The time that is left until [`Request::deadline`], in milliseconds.
    pub fn slack_ms(&self, now: Instant) -> u16 {
        let left = self.deadline.saturating_duration_since(now).as_millis();
        u16::try_from(left).unwrap_or(u16::MAX)
    }
}

/// Reorders and repairs one publication.
#[derive(Debug)]
#[repr(C)]
pub struct Receiver {
    /// In front, with what else a packet in order needs: that is one line of the cache.
    run: InOrderRun,
    settings: Settings,
    started: bool,
    joined: bool,
    window: VecDeque<Slot>,
    /// When to ask next, for each missing number that is still worth asking for. An entry whose
    /// number has come in the meantime is passed over when its time comes.
    asks: BinaryHeap<Reverse<(Instant, u64)>>,
    events: VecDeque<Event>,
    round_trip: RoundTrip,
    /// Requests made or looked for so far.
    request: u64,
    /// Missing numbers that were asked for.
    asked_now: usize,
    /// More are missing than random loss explains: the path was cut, and has much to bring.
    bulk_loss: bool,
    /// What is asked for together is asked for at whole steps of time from here.
    epoch: Option<Instant>,
    /// The number that was repaired last, and when.
    repaired_last: (u64, Option<Instant>),
    reordering: ReorderEstimate,
    losing: LossEstimate,
    lag: ControlSkew,
    paths: Paths,
    /// How long after a gap parity that could close it may come.
    parity_wait: Duration,
    /// A number far from the expected ones, which counts once its successor has come too.
    probation: Option<Seq>,
    given_up: VecDeque<(u64, u64)>,
    /// A run of live packets that all count as old.
    rerun: Option<BackwardRun>,
    /// The newest number before the sender began anew, and when that was.
    before: Option<(Seq, Instant)>,
    stats: Stats,
}

/// Live packets that each came as the next of all, over one path, with nothing missing: all that is to
/// be known of them is how many they were. Everything else hears of them when it is looked at, see
/// [`Receiver::settle`].
#[derive(Debug)]
struct InOrderRun {
    /// Extended number of the window's front: the next to be handed on.
    next: u64,
    /// Since when nothing has heard of them.
    count: u64,
    /// When the last of them came; `None` if the next packet begins a run.
    last_at: Option<Instant>,
    path: usize,
}

/// Live packets in a row, each numbered one more than the one before, that are behind all that was
/// handed on.
#[derive(Debug)]
struct BackwardRun {
    last: Seq,
    last_at: Instant,
    count: usize,
    /// How long it has gone on, pauses left out.
    lasted: Duration,
}

#[derive(Debug)]
enum Slot {
    Held {
        packet: Packet,
        /// When it came or, if it was missing, when that was seen.
        since: Instant,
    },
    Missing(Missing),
}

#[derive(Debug)]
struct Missing {
    since: Instant,
    /// The path whose next packet showed that it is missing.
    shown_by: Option<usize>,
    /// When to ask: an entry of [`Receiver::asks`] with another time is out of date.
    due: Instant,
    deadline: Instant,
    asked_at: Option<Instant>,
    /// The request that it was part of last.
    said_in: u64,
    tries: u8,
    /// Copies that the last try asked for.
    copies: u8,
    /// How often the last try is still to be repeated, in case its request was lost.
    repeats: u8,
    /// The sender has it no more, or it is of no use any more.
    gone: bool,
}

impl InOrderRun {
    fn count_in(&self, stats: &mut Stats) {
        stats.received += self.count;
        stats.paths[self.path].received += self.count;
        stats.delays.add_zero(self.count);
        stats.waits.add_zero(self.count);
    }
}

impl Receiver {
    /// Begins with the first packet that comes.
    pub fn new(settings: Settings) -> Self {
        Self {
            run: InOrderRun { next: BASE, count: 0, last_at: None, path: 0 },
            settings,
            started: false,
            joined: false,
            window: VecDeque::new(),
            asks: BinaryHeap::new(),
            events: VecDeque::new(),
            round_trip: RoundTrip::default(),
            request: 0,
            asked_now: 0,
            bulk_loss: false,
            epoch: None,
            repaired_last: (0, None),
            reordering: ReorderEstimate::default(),
            losing: LossEstimate::default(),
            lag: ControlSkew::default(),
            paths: Paths::default(),
            parity_wait: Duration::ZERO,
            probation: None,
            given_up: VecDeque::new(),
            rerun: None,
            before: None,
            stats: Stats::default(),
        }
    }

    /// Begins with `first`, which was sent before now: all from there to the first packet that
    /// comes is asked for.
    pub fn starting_at(settings: Settings, first: Seq) -> Self {
        let mut receiver = Self::new(settings);
        receiver.begin(first);
        receiver
    }

    /// Takes a live packet that came at `now`, if it is the next one and nothing is missing, waits,
    /// or is to be polled: then it is to be handed on at once, with no event, and no poll has
    /// anything new. Otherwise nothing has happened, and it is one for [`Receiver::handle_packet`].
    ///
    /// Does what that does, for nearly all packets of a good network, at a fraction of the cost.
    pub fn handle_next(&mut self, now: Instant, seq: Seq, path: u8) -> bool {
        let path = usize::from(path).min(MAX_PATHS - 1);
        let run = &mut self.run;
        if seq != Seq(run.next as u16) {
            return false;
        }
        if run.last_at.is_some() && path == run.path {
            run.next += 1;
            run.count += 1;
            run.last_at = Some(now);
            return true;
        }
        self.settle();
        let idle = self.started
            && self.window.is_empty()
            && self.events.is_empty()
            && self.asks.is_empty();
        if !idle {
            return false;
        }
        self.stats.received += 1;
        self.rerun = None;
        self.probation = None;
        self.losing.came_after(0);
        let stats = &mut self.stats.paths[path];
        // What it passed over, the other path has brought: nothing is missing.
        self.paths.arrived(now, path, self.run.next, false, stats);
        self.lag.came(now, self.run.next);
        self.joined = true;
        self.stats.delays.add_zero(1);
        self.stats.waits.add_zero(1);
        self.run.next += 1;
        if self.paths.is_alone(path) && !self.lag.is_told() {
            self.run.path = path;
            self.run.last_at = Some(now);
        }
        true
    }

    /// Takes a packet that came at `now`.
    pub fn handle_packet(&mut self, now: Instant, packet: Packet, path: Path) {
        self.settle();
        self.stats.received += 1;
        let seq = packet.header.seq;
        let live = match path {
            Path::Live(path) => Some(usize::from(path).min(MAX_PATHS - 1)),
            Path::Repair | Path::Parity => None,
        };
        if !self.started {
            if live.is_none() {
                self.stats.duplicate += 1;
                return;
            }
            self.begin(seq);
        }
        let newest = self.run.next + self.window.len() as u64 - 1;
        let distance = i64::from(seq.distance_from(Seq(newest as u16)));
        if path == Path::Repair && distance > 0 {
            // Only what is missing is asked for, and that is never ahead of the newest. Parity may
            // bring what nothing has yet shown to be missing: the last packets of a row.
            self.stats.duplicate += 1;
            return;
        }
        if distance.unsigned_abs() > self.settings.window as u64 {
            self.handle_stray(now, packet, path);
            return;
        }
        let number = newest.wrapping_add_signed(distance);
        if distance > 0 {
            self.rerun = None;
            self.losing.came_after(distance.unsigned_abs() - 1);
        } else if live.is_some() && number < self.run.next && self.is_rerun(now, seq) {
            // Those before it in the run were taken for old; they are asked for again.
            self.begin_anew(now, seq.plus(usize::from(u16::MAX) - RERUN_LEN + 2));
            self.handle_packet(now, packet, path);
            self.stats.received -= 1;
            return;
        }
        let mut passed = number..number;
        if let Some(path) = live {
            self.probation = None;
            let was_asked = self.missing_at(number).is_some_and(|missing| missing.tries > 0);
            let stats = &mut self.stats.paths[path];
            passed = self.paths.arrived(now, path, number, was_asked, stats);
            self.lag.came(now, number);
        }
        self.stats.parity += u64::from(path == Path::Parity && distance > 0);
        if distance == 1 && self.window.is_empty() {
            self.run.next += 1;
            self.stats.delays.add_zero(1);
            self.stats.waits.add_zero(1);
            self.events.push_back(Event::Packet(packet));
        } else if distance > 0 {
            self.open_gap(now, number, live, self.first_wait(now, live, newest + 1));
            self.window.push_back(Slot::Held { packet, since: now });
            self.stats.delays.add_zero(1);
        } else if number < self.run.next {
            match self.given_up.iter().any(|(from, to)| (*from..*to).contains(&number)) {
                true => self.stats.too_late += 1,
                false => self.stats.duplicate += 1,
            }
        } else {
            self.fill(now, number, packet, path);
        }
        self.joined |= live.is_some();
        // What the other path had shown to be missing, this one has now lost too.
        for number in passed.start.max(self.run.next)..passed.end.min(newest + 1) {
            self.hurry(now, number);
        }
        self.release(now);
    }

    /// Takes the sender's word that it sent everything up to `last`: reveals a lost tail. Says whether
    /// it has; else the polls have nothing new.
    pub fn handle_heartbeat(&mut self, now: Instant, last: Seq) -> bool {
        if !self.started {
            return false;
        }
        let newest = self.run.next + self.window.len() as u64 - 1;
        let distance = last.distance_from(Seq(newest as u16));
        if distance >= 0 {
            // A sender that goes on has not begun anew, whatever comes of it.
            self.rerun = None;
        }
        if distance <= 0 {
            self.lag.decay();
            return false;
        }
        self.settle();
        if distance as usize <= self.settings.window {
            // It came by another way, and may have overtaken what it tells of; what was sent before
            // we joined will not come by itself.
            let end = newest + distance as u64 + 1;
            if self.joined {
                let due = now + self.lag.wait();
                let head_start = (self.round_trip.smoothed / 4).clamp(TIMER_GRAIN, MAX_HEAD_START);
                let wait = self.first_wait(now, None, newest + 1).max(head_start);
                self.open_gap(due, end, None, wait);
                self.lag.told(now, end - 1);
            } else {
                self.open_gap(now, end, None, Duration::ZERO);
            }
            self.release(now);
        }
        true
    }

    /// Takes the sender's word that it holds these no more.
    pub fn handle_gone(&mut self, now: Instant, seqs: impl IntoIterator<Item = Seq>) {
        if !self.started {
            return;
        }
        for seq in seqs {
            let front = Seq(self.run.next as u16);
            let Ok(index) = usize::try_from(seq.distance_from(front)) else { continue };
            if let Some(Slot::Missing(missing)) = self.window.get_mut(index) {
                missing.gone = true;
            }
        }
        self.release(now);
    }

    /// Says that everything up to `last` is of no use any more, because the tag that it is part of
    /// lacks a packet for good: what is missing of it is neither asked nor waited for.
    pub fn abandon_through(&mut self, now: Instant, last: Seq) {
        let Ok(last) = usize::try_from(last.distance_from(Seq(self.run.next as u16))) else {
            return;
        };
        for slot in self.window.iter_mut().take(last + 1) {
            if let Slot::Missing(missing) = slot
                && !missing.gone
            {
                missing.gone = true;
                self.stats.abandoned += 1;
            }
        }
        self.release(now);
    }

    /// Tells how long after a packet the parity comes that could replace it; zero if there is none.
    /// A gap is not asked for before that, where asking takes longer and there is time for two tries
    /// besides.
    pub fn set_parity_wait(&mut self, wait: Duration) {
        self.parity_wait = wait;
    }

    /// Gives up what is due and makes [`Receiver::poll_request`] and [`Receiver::poll_event`]
    /// ready.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.release(now);
    }

    /// Tells the path's round trip, as the repair connection measures it. Answered requests refine
    /// it.
    pub fn set_round_trip(&mut self, now: Instant, round_trip: Duration, variation: Duration) {
        self.round_trip.hint(now, round_trip, variation);
    }

    /// The next thing to hand on.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When to call [`Receiver::handle_timeout`] and the polls again, if nothing comes before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let ask = self.asks.peek().map(|Reverse((due, _))| *due);
        let give_up = match self.window.front() {
            Some(Slot::Missing(missing)) => Some(missing.deadline),
            _ => None,
        };
        ask.into_iter().chain(give_up).min()
    }

    /// Waits for nothing any more: [`Receiver::poll_event`] gives all that is there, and what is
    /// missing as lost.
    pub fn finish(&mut self, now: Instant) {
        while !self.window.is_empty() {
            self.pop_front(now);
        }
    }

    /// Whether everything up to `last` has been handed on or given up.
    pub fn is_done_through(&self, last: Seq) -> bool {
        self.started && last.distance_from(Seq(self.run.next as u16)) < 0
    }

    /// Number of packets held behind a gap and of missing ones, together.
    pub fn pending(&self) -> usize {
        self.window.len()
    }

    /// Number of missing packets that are still waited for; walks the window.
    pub fn missing(&self) -> usize {
        self.window.iter().filter(|slot| matches!(slot, Slot::Missing(_))).count()
    }

    /// The counts so far.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats;
        self.run.count_in(&mut stats);
        stats
    }

    /// Lets everything hear of the packets of the run, and ends it: what comes next may be none.
    fn settle(&mut self) {
        if let Some(last_at) = self.run.last_at.take() {
            self.run.count_in(&mut self.stats);
            let count = std::mem::take(&mut self.run.count);
            self.paths.came_in_a_row(last_at, self.run.path, count);
            self.losing.came_in_a_row(count);
        }
    }

    fn begin(&mut self, first: Seq) {
        self.started = true;
        self.run.next = BASE + u64::from(first.0);
    }

    /// Marks everything from the window's end up to `number`, exclusive, as missing.
    /// They are asked for after `wait`, should they not have come by themselves. The caller
    /// releases what the window has no room for.
    fn open_gap(&mut self, now: Instant, number: u64, shown_by: Option<usize>, wait: Duration) {
        let latency = if self.joined { self.settings.latency } else { self.settings.join_latency };
        let deadline = now + latency + GRACE;
        let due = self.together(now, now + wait, deadline);
        for missing in self.run.next + self.window.len() as u64..number {
            self.window.push_back(Slot::Missing(Missing {
                since: now,
                shown_by,
                due,
                deadline,
                asked_at: None,
                said_in: 0,
                tries: 0,
                copies: 0,
                repeats: 0,
                gone: false,
            }));
            self.asks.push(Reverse((due, missing)));
        }
    }

    fn fill(&mut self, now: Instant, number: u64, packet: Packet, path: Path) {
        let slot = &mut self.window[(number - self.run.next) as usize];
        let Slot::Missing(missing) = slot else {
            self.stats.duplicate += 1;
            return;
        };
        let since = missing.since;
        let delay = now.saturating_duration_since(since);
        let asked_for = missing.asked_at.map(|at| now.saturating_duration_since(at));
        match path {
            Path::Parity => {
                self.stats.parity += 1;
                self.reordering.was_lost();
            }
            // Nobody brings it but the sender that was asked, to all of a group at once.
            Path::Live(_) if asked_for.is_some_and(|ago| ago >= self.round_trip.least()) => {
                self.stats.repaired[usize::from(missing.tries.clamp(1, 3)) - 1] += 1;
                self.reordering.was_lost();
            }
            Path::Live(path) => {
                // Not what word of it has overtaken, nor what another of the group asked for.
                let again = self.settings.group && asked_for.is_some();
                if missing.shown_by == Some(usize::from(path)) && !again {
                    self.stats.reordered += 1;
                    self.reordering.came_late(delay);
                }
            }
            Path::Repair => {
                self.repaired_last = (number, Some(now));
                self.stats.repaired[usize::from(missing.tries.clamp(1, 3)) - 1] += 1;
                self.reordering.was_lost();
                // The answer to a later try may be that to an earlier one (Karn's algorithm). The
                // repeats of one try follow it so closely that they hardly blur it. And in a flood
                // it tells how many were sent before it.
                if let (1, Some(ago), false) = (missing.tries, asked_for, self.bulk_loss) {
                    self.round_trip.sample(now, ago);
                }
            }
        }
        *slot = Slot::Held { packet, since };
        self.stats.delays.add(delay);
        self.answered(asked_for.is_some());
    }

    fn missing_at(&self, number: u64) -> Option<&Missing> {
        match self.window.get(usize::try_from(number.checked_sub(self.run.next)?).ok()?)? {
            Slot::Missing(missing) => Some(missing),
            Slot::Held { .. } => None,
        }
    }

    /// A packet too far from the expected ones to be late or early. Two in a row, the second right
    /// behind the first, mean that the sender began anew (RFC 3550 §A.1).
    fn handle_stray(&mut self, now: Instant, packet: Packet, path: Path) {
        let seq = packet.header.seq;
        let confirmed = self.probation.is_some_and(|first| first.plus(1) == seq);
        if !matches!(path, Path::Live(_)) {
            self.stats.duplicate += 1;
            return;
        }
        let of_before = self.before.is_some_and(|(newest, at)| {
            now.saturating_duration_since(at) < STRAGGLERS_COME
                && seq.distance_from(newest).unsigned_abs() as usize <= self.settings.window
        });
        if of_before {
            self.stats.too_late += 1;
            return;
        }
        if !confirmed {
            self.probation = Some(seq);
            return;
        }
        // The first of the two was not kept; it is asked for like any other.
        self.begin_anew(now, seq.plus(usize::from(u16::MAX)));
        self.handle_packet(now, packet, path);
        self.stats.received -= 1;
    }

    /// Whether the sender began anew at numbers that it used not long ago: for some time nothing but
    /// old ones has come, in perfect order. A second path does not lag so far behind the first.
    fn is_rerun(&mut self, now: Instant, seq: Seq) -> bool {
        let mut rerun = BackwardRun { last: seq, last_at: now, count: 1, lasted: Duration::ZERO };
        if let Some(before) = self.rerun.take().filter(|before| before.last.plus(1) == seq) {
            let pause = now.saturating_duration_since(before.last_at);
            rerun.count += before.count;
            rerun.lasted = before.lasted + pause.min(RERUN_PAUSE);
        }
        let is_rerun = rerun.count >= RERUN_LEN && rerun.lasted >= RERUN_LASTS;
        self.rerun = Some(rerun);
        is_rerun
    }

    fn begin_anew(&mut self, now: Instant, first: Seq) {
        let newest = self.run.next + self.window.len() as u64 - 1;
        self.before = Some((Seq(newest as u16), now));
        self.finish(now);
        self.lag = ControlSkew::default();
        self.asks.clear();
        self.given_up.clear();
        self.paths.reset();
        self.probation = None;
        self.rerun = None;
        self.stats.restarts += 1;
        self.events.push_back(Event::Restart(first));
        self.begin(first);
    }

    /// Hands on what need not wait any longer, or cannot because the window is full.
    fn release(&mut self, now: Instant) {
        while let Some(slot) = self.window.front() {
            let full = self.window.len() > self.settings.window;
            match slot {
                Slot::Missing(missing) if !full && !missing.gone && missing.deadline > now => break,
                _ => self.pop_front(now),
            }
        }
    }

    fn pop_front(&mut self, now: Instant) {
        match self.window.pop_front() {
            Some(Slot::Held { packet, since }) => {
                self.stats.waits.add(now.saturating_duration_since(since));
                self.events.push_back(Event::Packet(packet));
            }
            Some(Slot::Missing(missing)) => {
                self.answered(missing.tries > 0);
                self.stats.lost += 1;
                match self.events.back_mut() {
                    Some(Event::Lost(count)) => *count += 1,
                    _ => self.events.push_back(Event::Lost(1)),
                }
                match self.given_up.back_mut() {
                    Some((_, to)) if *to == self.run.next => *to += 1,
                    _ => self.given_up.push_back((self.run.next, self.run.next + 1)),
                }
                if self.given_up.len() > MAX_GIVEN_UP_RANGES {
                    self.given_up.pop_front();
                }
            }
            None => return,
        }
        self.run.next += 1;
    }
}

/// Extended numbers begin here, so that one before the first is no underflow.
const BASE: u64 = 1 << 32;
/// Old numbers in a row, and the time that they go on for, after which they are no stragglers. A
/// pause counts for so much at most: a clock may jump.
const RERUN_LEN: usize = 32;
const RERUN_LASTS: Duration = Duration::from_secs(1);
const RERUN_PAUSE: Duration = Duration::from_millis(50);
/// How long packets from before the sender began anew are taken for stragglers, which two paths and
/// reordering bring in any order.
const STRAGGLERS_COME: Duration = Duration::from_secs(5);
/// How much longer than its latency a packet is waited for, so that a latency of n round trips is
/// time for n tries, timers being as coarse as they are. Playout buffers were measured to add 2 to
/// 16 ms to theirs.
pub const GRACE: Duration = Duration::from_millis(15);
/// How long what a heartbeat tells of is waited for, at most, before it is asked for.
const MAX_HEAD_START: Duration = Duration::from_millis(10);
/// Remembered only to tell a packet that came too late from one that came twice.
const MAX_GIVEN_UP_RANGES: usize = 64;
