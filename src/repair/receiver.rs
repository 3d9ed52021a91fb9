//! What one publication's receiver does about packets that do not come: finds gaps, asks, asks
//! again, and gives up in time. No socket, no clock: every call is told what time it is.
//!
//! Packets leave in order, each at most once. A packet that is in order leaves at once; one behind
//! a gap waits for the gap, and a gap lasts at most [`Settings::latency`] from when it was seen.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::{Duration, Instant},
};

use super::resend::copy_spacing;
use crate::rtp::{Packet, Seq};

/// How long to wait and how much to hold.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long a missing packet is waited for, from when its gap was seen.
    pub latency: Duration,
    /// How long packets are waited for that were sent before this receiver joined.
    pub join_latency: Duration,
    /// Packets held behind a gap, and numbers missing in it, together.
    pub window: usize,
}

impl Default for Settings {
    fn default() -> Self {
        let latency = Duration::from_millis(500);
        Self { latency, join_latency: Duration::from_secs(1), window: 1 << 14 }
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
    /// The sender began anew at another sequence number; what follows is not its continuation.
    Restart,
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

/// Counts since the start, in packets unless it says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Packets that came, by either path, duplicates included.
    pub received: u64,
    /// Came live, after a packet with a later number.
    pub reordered: u64,
    /// Came again after it was there.
    pub duplicate: u64,
    /// Missing and asked for at least once.
    pub asked: u64,
    /// Repaired by the first, the second, and any later request.
    pub repaired: [u64; 3],
    /// Missing, and made anew from parity.
    pub parity: u64,
    /// Given up: told by [`Event::Lost`].
    pub lost: u64,
    /// By how much later than they could have been packets were there: how many within each of
    /// [`DELAY_BOUNDS_MS`], then how many over the last.
    pub delays: [u64; DELAY_BOUNDS_MS.len() + 1],
    /// Came after it had been given up.
    pub too_late: u64,
    /// Numbers in requests, repetitions included.
    pub requests: u64,
    /// Times that the sender began anew.
    pub restarts: u64,
}

/// Upper bounds of the delays that [`Stats::delays`] counts, in milliseconds.
pub const DELAY_BOUNDS_MS: [u16; 12] = [0, 2, 5, 10, 20, 50, 100, 150, 200, 300, 500, 1000];

/// Reorders and repairs one publication.
#[derive(Debug)]
pub struct Receiver {
    settings: Settings,
    /// Extended number of the window's front: the next to be handed on.
    next: u64,
    started: bool,
    joined: bool,
    window: VecDeque<Slot>,
    /// When to ask next, for each missing number that is still worth asking for. An entry whose
    /// number has come in the meantime is passed over when its time comes.
    asks: BinaryHeap<Reverse<(Instant, u64)>>,
    events: VecDeque<Event>,
    round_trip: RoundTrip,
    reordering: Reordering,
    /// A number far from the expected ones, which counts once its successor has come too.
    probation: Option<Seq>,
    given_up: VecDeque<(u64, u64)>,
    stats: Stats,
}

#[derive(Debug)]
enum Slot {
    Held(Packet),
    Missing(Missing),
}

#[derive(Debug)]
struct Missing {
    since: Instant,
    deadline: Instant,
    asked_at: Option<Instant>,
    tries: u8,
    /// Copies that the last try asked for.
    copies: u8,
    /// How often the last try is still to be repeated, in case its request was lost.
    repeats: u8,
    /// The sender said that it has it no more.
    gone: bool,
}

impl Receiver {
    /// Begins with the first packet that comes.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            next: BASE,
            started: false,
            joined: false,
            window: VecDeque::new(),
            asks: BinaryHeap::new(),
            events: VecDeque::new(),
            round_trip: RoundTrip::default(),
            reordering: Reordering::default(),
            probation: None,
            given_up: VecDeque::new(),
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

    /// Takes a packet that came at `now`.
    pub fn handle_packet(&mut self, now: Instant, packet: Packet, path: Path) {
        self.stats.received += 1;
        let seq = packet.header.seq;
        if !self.started {
            if !matches!(path, Path::Live(_)) {
                self.stats.duplicate += 1;
                return;
            }
            self.begin(seq);
        }
        let newest = self.next + self.window.len() as u64 - 1;
        let distance = i64::from(seq.distance_from(Seq(newest as u16)));
        if !matches!(path, Path::Live(_)) && distance > 0 {
            // Only what is missing is asked for, and that is never ahead of the newest.
            self.stats.duplicate += 1;
            return;
        }
        if distance.unsigned_abs() > self.settings.window as u64 {
            self.handle_stray(now, packet, path);
            return;
        }
        if matches!(path, Path::Live(_)) {
            self.probation = None;
        }
        let number = newest.wrapping_add_signed(distance);
        if distance > 0 {
            let wait = self.reordering.wait(self.round_trip.smoothed);
            self.open_gap(now, number, wait);
            self.window.push_back(Slot::Held(packet));
            self.joined = true;
        } else if number < self.next {
            match self.given_up.iter().any(|(from, to)| (*from..*to).contains(&number)) {
                true => self.stats.too_late += 1,
                false => self.stats.duplicate += 1,
            }
        } else {
            self.fill(now, number, packet, path);
        }
        self.release(now);
    }

    /// Takes the sender's word that it sent everything up to `last`: reveals a lost tail.
    pub fn handle_heartbeat(&mut self, now: Instant, last: Seq) {
        if !self.started {
            return;
        }
        let newest = self.next + self.window.len() as u64 - 1;
        let distance = last.distance_from(Seq(newest as u16));
        if distance > 0 && distance as usize <= self.settings.window {
            // It came by another way, and may have overtaken what it tells of; what was sent before
            // we joined will not come by itself.
            let wait = match self.joined {
                true => self
                    .reordering
                    .wait(self.round_trip.smoothed)
                    .max((self.round_trip.smoothed / 4).clamp(TIMER_GRAIN, MAX_HEAD_START)),
                false => Duration::ZERO,
            };
            self.open_gap(now, newest + distance as u64 + 1, wait);
            self.release(now);
        }
    }

    /// Takes the sender's word that it holds these no more.
    pub fn handle_gone(&mut self, now: Instant, seqs: impl IntoIterator<Item = Seq>) {
        if !self.started {
            return;
        }
        for seq in seqs {
            let front = Seq(self.next as u16);
            let Ok(index) = usize::try_from(seq.distance_from(front)) else { continue };
            if let Some(Slot::Missing(missing)) = self.window.get_mut(index) {
                missing.gone = true;
            }
        }
        self.release(now);
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

    /// Numbers that are due to be asked for at `now`; call until it gives `None`.
    pub fn poll_request(&mut self, now: Instant) -> Option<Request> {
        let mut numbers = Vec::new();
        let mut asked_copies = 1;
        let mut deadline = now + self.settings.latency.max(self.settings.join_latency);
        while let Some(&Reverse((due, number))) = self.asks.peek() {
            // What falls due within the timer's grain goes along now.
            if due > now + TIMER_GRAIN || numbers.len() >= MAX_REQUEST {
                break;
            }
            let Some(copies) = self.copies_to_ask(now, number) else {
                self.asks.pop();
                continue;
            };
            if !numbers.is_empty() && copies != asked_copies {
                break;
            }
            self.asks.pop();
            self.mark_asked(now, number);
            if let Some(missing) = self.missing_at(number) {
                deadline = deadline.min(missing.deadline);
            }
            asked_copies = copies;
            numbers.push(number);
        }
        self.stats.requests += numbers.len() as u64;
        numbers.sort_unstable();
        (!numbers.is_empty()).then(|| Request {
            seqs: numbers.iter().map(|number| Seq(*number as u16)).collect(),
            copies: asked_copies,
            deadline,
        })
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

    /// Whether everything up to `last` has been handed on or given up.
    pub fn is_done_through(&self, last: Seq) -> bool {
        self.started && last.distance_from(Seq(self.next as u16)) < 0
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
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// The round trip that requests are timed by.
    pub fn round_trip(&self) -> Duration {
        self.round_trip.smoothed
    }

    fn begin(&mut self, first: Seq) {
        self.started = true;
        self.next = BASE + u64::from(first.0);
    }

    /// Marks everything from the window's end up to `number`, exclusive, as missing.
    /// They are asked for after `wait`, should they not have come by themselves. The caller
    /// releases what the window has no room for.
    fn open_gap(&mut self, now: Instant, number: u64, wait: Duration) {
        let latency = if self.joined { self.settings.latency } else { self.settings.join_latency };
        for missing in self.next + self.window.len() as u64..number {
            self.window.push_back(Slot::Missing(Missing {
                since: now,
                deadline: now + latency,
                asked_at: None,
                tries: 0,
                copies: 0,
                repeats: 0,
                gone: false,
            }));
            self.asks.push(Reverse((now + wait, missing)));
        }
    }

    fn fill(&mut self, now: Instant, number: u64, packet: Packet, path: Path) {
        let slot = &mut self.window[(number - self.next) as usize];
        let Slot::Missing(missing) = slot else {
            self.stats.duplicate += 1;
            return;
        };
        match path {
            Path::Live(_) => {
                self.stats.reordered += 1;
                self.reordering.came_late(now.saturating_duration_since(missing.since));
            }
            Path::Parity => self.stats.parity += 1,
            Path::Repair => {
                let tries = usize::from(missing.tries.clamp(1, 3));
                self.stats.repaired[tries - 1] += 1;
                self.reordering.was_lost();
                // The answer to a later try may be that to an earlier one (Karn's algorithm). The
                // repeats of one try follow it so closely that they hardly blur it.
                if let (1, Some(asked_at)) = (missing.tries, missing.asked_at) {
                    self.round_trip.sample(now, now.saturating_duration_since(asked_at));
                }
            }
        }
        *slot = Slot::Held(packet);
    }

    /// How many copies to ask for, or `None` if it is no longer missing or cannot come in time.
    fn copies_to_ask(&self, now: Instant, number: u64) -> Option<u8> {
        let missing = self.missing_at(number)?;
        let left = missing.deadline.saturating_duration_since(now);
        let too_late = match (missing.tries, missing.repeats) {
            // The round trip may be shorter than we think.
            (0, _) => false,
            (_, 0) => left < self.round_trip.least_for_a_try(),
            _ => left < self.round_trip.smoothed,
        };
        if missing.gone || too_late {
            return None;
        }
        Some(match missing.repeats {
            0 => self.effort(missing, left).0,
            _ => missing.copies,
        })
    }

    /// How many copies a new try asks for, and how often it is repeated.
    ///
    /// Requests are small, so each is said twice: that alone takes most of the way back out of the
    /// odds. Copies cost as much as the media, so they grow with the tries that failed and with
    /// the nearness of the deadline. With loss p both ways a try fails with p² + p at first,
    /// later with 2p², and the last one with 2p³.
    fn effort(&self, missing: &Missing, left: Duration) -> (u8, u8) {
        let is_last = left < self.round_trip.retry_after(1) + self.round_trip.least_for_a_try();
        match (missing.tries, is_last) {
            (0, false) => (1, 1),
            (0, true) => (2, 2),
            (_, false) => (2, 1),
            (_, true) => (3, 2),
        }
    }

    fn mark_asked(&mut self, now: Instant, number: u64) {
        let repeat_after = self.round_trip.repeat_after();
        let Some(missing) = self.missing_at(number) else { return };
        let left = missing.deadline.saturating_duration_since(now);
        let (copies, repeats) = self.effort(missing, left);
        let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.next) as usize)
        else {
            return;
        };
        if missing.repeats > 0 {
            missing.repeats -= 1;
        } else {
            if missing.tries == 0 {
                self.stats.asked += 1;
            }
            missing.tries = missing.tries.saturating_add(1);
            missing.asked_at = Some(now);
            (missing.copies, missing.repeats) = (copies, repeats);
        }
        let next_ask = match missing.repeats {
            0 => {
                // The last time that it was said may be the one that is heard, and the last copy
                // the one that comes; but where time is short, a further try is worth more.
                let patient = now + self.round_trip.retry_after(missing.copies);
                let hasty = missing.asked_at.unwrap_or(now) + self.round_trip.retry_after(1);
                match patient + self.round_trip.least_for_a_try() <= missing.deadline {
                    true => patient,
                    false => hasty.max(now + MIN_REPEAT_GAP),
                }
            }
            _ => now + repeat_after,
        };
        self.asks.push(Reverse((next_ask, number)));
    }

    fn missing_at(&self, number: u64) -> Option<&Missing> {
        match self.window.get(usize::try_from(number.checked_sub(self.next)?).ok()?)? {
            Slot::Missing(missing) => Some(missing),
            Slot::Held(_) => None,
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
        if !confirmed {
            self.probation = Some(seq);
            return;
        }
        while !self.window.is_empty() {
            self.pop_front();
        }
        self.asks.clear();
        self.given_up.clear();
        self.probation = None;
        self.stats.restarts += 1;
        self.events.push_back(Event::Restart);
        // The first of the two was not kept; it is asked for like any other.
        self.begin(seq.plus(usize::from(u16::MAX)));
        self.handle_packet(now, packet, path);
        self.stats.received -= 1;
    }

    /// Hands on what need not wait any longer, or cannot because the window is full.
    fn release(&mut self, now: Instant) {
        while let Some(slot) = self.window.front() {
            let full = self.window.len() > self.settings.window;
            match slot {
                Slot::Missing(missing) if !full && !missing.gone && missing.deadline > now => break,
                _ => self.pop_front(),
            }
        }
    }

    fn pop_front(&mut self) {
        match self.window.pop_front() {
            Some(Slot::Held(packet)) => self.events.push_back(Event::Packet(packet)),
            Some(Slot::Missing(_)) => {
                self.stats.lost += 1;
                match self.events.back_mut() {
                    Some(Event::Lost(count)) => *count += 1,
                    _ => self.events.push_back(Event::Lost(1)),
                }
                match self.given_up.back_mut() {
                    Some((_, to)) if *to == self.next => *to += 1,
                    _ => self.given_up.push_back((self.next, self.next + 1)),
                }
                if self.given_up.len() > MAX_GIVEN_UP_RANGES {
                    self.given_up.pop_front();
                }
            }
            None => return,
        }
        self.next += 1;
    }
}

/// The time from a request to its answer, smoothed as in RFC 6298 §2.
#[derive(Debug)]
struct RoundTrip {
    smoothed: Duration,
    variation: Duration,
    sampled_at: Option<Instant>,
}

impl RoundTrip {
    fn sample(&mut self, now: Instant, sample: Duration) {
        if self.sampled_at.replace(now).is_none() {
            self.smoothed = sample;
            self.variation = sample / 4;
            return;
        }
        self.variation = (self.variation * 3 + self.smoothed.abs_diff(sample)) / 4;
        self.smoothed = (self.smoothed * 7 + sample) / 8;
    }

    /// A round trip measured elsewhere counts while no answer of our own is fresh.
    fn hint(&mut self, now: Instant, round_trip: Duration, variation: Duration) {
        let fresh = |at: Instant| now.saturating_duration_since(at) < SAMPLE_FRESH;
        if !self.sampled_at.is_some_and(fresh) {
            self.smoothed = round_trip;
            self.variation = variation;
        }
    }

    /// How long after a request for so many copies the last of them is overdue.
    fn retry_after(&self, copies: u8) -> Duration {
        let margin = (self.variation * 2).clamp(MIN_MARGIN, self.smoothed / 2 + MIN_MARGIN);
        let copies = copy_spacing(self.smoothed) * u32::from(copies.saturating_sub(1));
        (self.smoothed + margin + copies + TIMER_GRAIN).max(MIN_RETRY)
    }

    /// How much time a try needs to be of use, said twice.
    fn least_for_a_try(&self) -> Duration {
        self.smoothed + self.repeat_after()
    }

    /// How long after a request it is repeated.
    fn repeat_after(&self) -> Duration {
        (self.smoothed / 16).clamp(MIN_REPEAT_GAP, MAX_REPEAT_GAP)
    }
}

impl Default for RoundTrip {
    fn default() -> Self {
        let guess = Duration::from_millis(100);
        Self { smoothed: guess, variation: guess / 8, sampled_at: None }
    }
}

/// Learns how long a number that is missing should be waited for before it counts as lost.
#[derive(Debug, Default)]
struct Reordering {
    /// Share of gaps that closed by themselves, 0..=1, over the last hundred or so.
    share: f32,
    /// How late the late ones come: follows the longest, slowly forgets it.
    lateness: Duration,
}

impl Reordering {
    fn came_late(&mut self, by: Duration) {
        self.share += (1.0 - self.share) / 64.0;
        self.lateness = match by > self.lateness {
            true => by,
            false => self.lateness - (self.lateness - by) / 32,
        };
    }

    fn was_lost(&mut self) {
        self.share -= self.share / 64.0;
    }

    /// Worth it only where reordering is common, and never longer than a quarter of the round trip:
    /// past that, asking in vain is cheaper than asking late.
    fn wait(&self, round_trip: Duration) -> Duration {
        if self.share < REORDERING_IS_COMMON {
            return Duration::ZERO;
        }
        self.lateness.min(round_trip / 4).min(MAX_REORDER_WAIT)
    }
}

/// Extended numbers begin here, so that one before the first is no underflow.
const BASE: u64 = 1 << 32;
/// Timers are that coarse; what is due within it is due.
const TIMER_GRAIN: Duration = Duration::from_millis(1);
/// Numbers in one request: two datagrams' worth at the worst.
const MAX_REQUEST: usize = 512;
/// On a path without delay, requests are not worth more than that.
const MIN_RETRY: Duration = Duration::from_millis(5);
/// What timers and queues on both ends add to a round trip that does not vary.
const MIN_MARGIN: Duration = Duration::from_millis(1);
/// How long what a heartbeat tells of is waited for, at most, before it is asked for.
const MAX_HEAD_START: Duration = Duration::from_millis(10);
const MIN_REPEAT_GAP: Duration = Duration::from_millis(2);
const MAX_REPEAT_GAP: Duration = Duration::from_millis(5);
const MAX_REORDER_WAIT: Duration = Duration::from_millis(25);
const REORDERING_IS_COMMON: f32 = 0.05;
const SAMPLE_FRESH: Duration = Duration::from_secs(5);
/// Remembered only to tell a packet that came too late from one that came twice.
const MAX_GIVEN_UP_RANGES: usize = 64;
