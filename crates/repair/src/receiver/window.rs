//! The window: packets held behind a gap, and the numbers missing in it.

use std::{
    cmp::Reverse,
    time::{Duration, Instant},
};

use super::{Event, GRACE, Path, Receiver};
use crate::rtp::{Packet, Seq};

/// One sequence number of the window.
#[derive(Debug)]
pub(super) enum Slot {
    Held {
        packet: Packet,
        /// When it arrived or, if it was missing, when that was detected.
        since: Instant,
    },
    Missing(Missing),
}

/// A missing packet.
#[derive(Debug)]
pub(super) struct Missing {
    /// When it was detected.
    pub(super) since: Instant,
    /// The path whose later packet revealed it; `None` for a heartbeat or parity.
    pub(super) revealed_by: Option<usize>,
    /// When to request it next: equals the time of its entry in [`Receiver::request_queue`].
    pub(super) due: Instant,
    /// When it is given up.
    pub(super) deadline: Instant,
    /// When the last try was first sent.
    pub(super) asked_at: Option<Instant>,
    /// Serial number of the last request that contained it.
    pub(super) last_request: u64,
    /// Tries so far, repetitions not counted.
    pub(super) tries: u8,
    /// Copies that the last try requested.
    pub(super) copies: u8,
    /// How often the last try is still to be repeated, in case its request was lost.
    pub(super) repeats_left: u8,
    /// The sender no longer holds it, or it is useless.
    pub(super) hopeless: bool,
}

impl Receiver {
    /// Stores or hands on a packet near the window. `live` is the path of a live packet; `newest` and
    /// `number` are extended sequence numbers.
    #[inline]
    pub(super) fn accept(
        &mut self,
        now: Instant,
        packet: Packet,
        path: Path,
        live: Option<usize>,
        number: u64,
        newest: u64,
    ) {
        let mut skipped = number..number;
        if let Some(path) = live {
            self.probation = None;
            let was_asked = self.missing_at(number).is_some_and(|missing| missing.tries > 0);
            let stats = &mut self.stats.paths[path];
            skipped = self.dual_path.record(now, path, number, was_asked, stats);
            self.control_skew.record_arrival(now, number);
        }
        self.stats.parity += u64::from(path == Path::Parity && number > newest);
        if number == newest + 1 && self.window.is_empty() {
            self.run.next += 1;
            self.stats.delays.add_zero(1);
            self.stats.waits.add_zero(1);
            self.events.push_back(Event::Packet(packet));
        } else if number > newest {
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
        // Numbers missing on the other path that this path has now skipped too.
        for number in skipped.start.max(self.run.next)..skipped.end.min(newest + 1) {
            self.request_earlier(now, number);
        }
        self.release(now);
    }

    /// Marks all numbers from the end of the window to `number`, exclusive, as missing. They are
    /// requested after `wait` unless they arrive before. The caller must call [`Self::release`], which
    /// limits the window.
    pub(super) fn open_gap(
        &mut self,
        now: Instant,
        number: u64,
        revealed_by: Option<usize>,
        wait: Duration,
    ) {
        let latency = if self.joined { self.settings.latency } else { self.settings.join_latency };
        let deadline = now + latency + GRACE;
        let due = self.align_to_batch(now, now + wait, deadline);
        for missing in self.newest() + 1..number {
            self.window.push_back(Slot::Missing(Missing {
                since: now,
                revealed_by,
                due,
                deadline,
                asked_at: None,
                last_request: 0,
                tries: 0,
                copies: 0,
                repeats_left: 0,
                hopeless: false,
            }));
            self.request_queue.push(Reverse((due, missing)));
        }
    }

    /// Stores a packet in its slot of the window, and counts how it arrived.
    fn fill(&mut self, now: Instant, number: u64, packet: Packet, path: Path) {
        let slot = &mut self.window[(number - self.run.next) as usize];
        let Slot::Missing(missing) = slot else {
            self.stats.duplicate += 1;
            return;
        };
        let since = missing.since;
        let delay = now.saturating_duration_since(since);
        let since_request = missing.asked_at.map(|at| now.saturating_duration_since(at));
        match path {
            Path::Parity => {
                self.stats.parity += 1;
                self.reorder_estimate.record_lost();
            }
            // A repair that the sender sent to the whole multicast group.
            Path::Live(_)
                if since_request.is_some_and(|ago| ago >= self.round_trip.min_answer()) =>
            {
                self.stats.repaired[usize::from(missing.tries.clamp(1, 3)) - 1] += 1;
                self.reorder_estimate.record_lost();
            }
            Path::Live(path) => {
                // Excludes packets that a heartbeat overtook, and repairs that another edge of the
                // group requested.
                let may_be_repair = self.settings.group && since_request.is_some();
                if missing.revealed_by == Some(usize::from(path)) && !may_be_repair {
                    self.stats.reordered += 1;
                    self.reorder_estimate.record_reordered(delay);
                }
            }
            Path::Repair => {
                self.last_repair = (number, Some(now));
                self.stats.repaired[usize::from(missing.tries.clamp(1, 3)) - 1] += 1;
                self.reorder_estimate.record_lost();
                // Karn's algorithm: the answer to a later try is ambiguous. The repetitions of one
                // try follow so closely that they hardly matter. Under bulk loss the time contains
                // the transmission of all packets before this one.
                if let (1, Some(ago), false) = (missing.tries, since_request, self.bulk_loss) {
                    self.round_trip.sample(now, ago);
                }
            }
        }
        *slot = Slot::Held { packet, since };
        self.stats.delays.add(delay);
        self.record_answer(since_request.is_some());
        if since_request.is_some() && path != Path::Repair {
            self.withdraw(number);
        }
    }

    pub(super) fn missing_at(&self, number: u64) -> Option<&Missing> {
        match self.window.get(usize::try_from(number.checked_sub(self.run.next)?).ok()?)? {
            Slot::Missing(missing) => Some(missing),
            Slot::Held { .. } => None,
        }
    }

    /// Hands on all packets that need not wait any longer, or cannot because the window is full.
    pub(super) fn release(&mut self, now: Instant) {
        while let Some(slot) = self.window.front() {
            let full = self.window.len() > self.settings.window;
            match slot {
                Slot::Missing(missing) if !full && !missing.hopeless => break,
                _ => self.pop_front(now),
            }
        }
    }

    /// Notes that a requested packet need not be requested any more.
    fn withdraw(&mut self, number: u64) {
        if self.withdrawn.len() >= MAX_WITHDRAWN {
            self.withdrawn.pop_front();
        }
        self.withdrawn.push_back(Seq(number as u16));
    }

    /// Hands on the front of the window, or gives it up if it is missing.
    pub(super) fn pop_front(&mut self, now: Instant) {
        match self.window.pop_front() {
            Some(Slot::Held { packet, since }) => {
                self.stats.waits.add(now.saturating_duration_since(since));
                self.events.push_back(Event::Packet(packet));
            }
            Some(Slot::Missing(missing)) => {
                self.record_answer(missing.tries > 0);
                if missing.tries > 0 {
                    self.withdraw(self.run.next);
                }
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

/// Given-up ranges that are remembered to tell late packets from duplicates.
const MAX_GIVEN_UP_RANGES: usize = 64;
/// Withdrawn requests that are kept for a caller that does not poll them.
const MAX_WITHDRAWN: usize = 1024;
