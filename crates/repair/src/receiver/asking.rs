//! When the receiver asks, for what, and with how much effort.

use std::{
    cmp::Reverse,
    time::{Duration, Instant},
};

use super::{Missing, Receiver, Request, Slot, timing::TIMER_GRAIN};
use crate::{retransmit::SPACING, rtp::Seq};

impl Receiver {
    /// Numbers that are due to be asked for at `now`; call until it gives `None`.
    pub fn poll_request(&mut self, now: Instant) -> Option<Request> {
        self.request += 1;
        let mut numbers = Vec::new();
        let mut asked_copies = 1;
        let mut deadline = now + self.settings.latency.max(self.settings.join_latency);
        while let Some(&Reverse((due, number))) = self.asks.peek() {
            // What falls due within the timer's grain goes along now.
            if due > now + TIMER_GRAIN || numbers.len() >= MAX_REQUEST {
                break;
            }
            let Some(copies) = self.copies_to_ask(now, due, number) else {
                self.asks.pop();
                continue;
            };
            // A repetition must not be in the same request, nor in the same packet.
            let too_soon = self.missing_at(number).is_some_and(|missing| {
                missing.said_in == self.request || missing.repeats > 0 && due > now
            });
            if too_soon || !numbers.is_empty() && copies != asked_copies {
                break;
            }
            self.asks.pop();
            if self.missing_at(number).is_some_and(|m| self.is_on_its_way(now, number, m)) {
                self.postpone(now, number);
                continue;
            }
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

    /// How long what is missing from `number` on is waited for before it is asked for.
    pub(super) fn first_wait(
        &self,
        now: Instant,
        shown_by: Option<usize>,
        number: u64,
    ) -> Duration {
        let round_trip = self.round_trip.smoothed;
        let other_path = shown_by.map_or(Duration::ZERO, |path| {
            self.paths.wait_for_other(now, path, number, round_trip.min(self.settings.latency / 4))
        });
        self.wait_on_this_path().max(other_path)
    }

    /// How long what was not in order may still come by itself: late, or with its parity.
    fn wait_on_this_path(&self) -> Duration {
        let round_trip = self.round_trip.smoothed;
        let two_tries = self.round_trip.retry_after() + self.round_trip.least_for_a_try();
        let worth_it =
            self.parity_wait <= round_trip && self.parity_wait + two_tries <= self.settings.latency;
        let parity = if worth_it { self.parity_wait } else { Duration::ZERO };
        self.reordering.wait(round_trip).max(parity)
    }

    /// Answers that come in leave no longer pauses than this.
    fn stall(&self) -> Duration {
        (self.round_trip.smoothed / 4).max(MIN_STALL)
    }

    fn postpone(&mut self, now: Instant, number: u64) {
        let due = now + self.stall();
        if let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        {
            missing.due = due;
            self.asks.push(Reverse((due, number)));
        }
    }

    /// Asks for a number soon that would be asked for later only because the other path might have
    /// brought it.
    pub(super) fn hurry(&mut self, now: Instant, number: u64) {
        let due = now + self.wait_on_this_path();
        let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        else {
            return;
        };
        if missing.tries == 0 && missing.due > due {
            missing.due = due;
            self.asks.push(Reverse((due, number)));
        }
    }

    /// How many copies to ask for, or `None` if it is no longer missing or cannot come in time.
    fn copies_to_ask(&self, now: Instant, due: Instant, number: u64) -> Option<u8> {
        let missing = self.missing_at(number).filter(|missing| missing.due == due)?;
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
    /// With loss p both ways a try fails with 2p, about; said twice, with p² + p; with two copies,
    /// with 2p²; said thrice and with three copies, with 2p³. Copies cost as much as the media, so
    /// they are for what has failed already and is near its deadline: few packets come that far.
    /// Requests are small, but where much is lost there are many, so those that have time for
    /// several tries are then said once.
    fn effort(&self, missing: &Missing, left: Duration) -> (u8, u8) {
        match (self.round_trip.tries_within(left), missing.tries) {
            // Copies of so many packets would take the place of others that are in time.
            _ if self.bulk_loss => (1, 1),
            (0 | 1, 0) => (2, 2),
            (0 | 1, _) => (3, 2),
            (2, 1..) | (_, 3..) => (2, 1),
            (..=PLENTY, _) => (1, 1),
            _ => (1, u8::from(!self.losing.is_heavy())),
        }
    }

    /// Whether the answers to requests are coming in, one behind the other, and have not got to
    /// this number yet: then it is not overdue, however long ago it was asked for.
    fn is_on_its_way(&self, now: Instant, number: u64, missing: &Missing) -> bool {
        missing.tries > 0
            && self.bulk_loss
            && number > self.repaired_last.0
            && self
                .repaired_last
                .1
                .is_some_and(|at| now.saturating_duration_since(at) < self.stall())
            && now + self.round_trip.least_for_a_try() + self.round_trip.smoothed / 4
                < missing.deadline
    }

    fn mark_asked(&mut self, now: Instant, number: u64) {
        let Some(missing) = self.missing_at(number) else { return };
        let left = missing.deadline.saturating_duration_since(now);
        let (copies, repeats) = self.effort(missing, left);
        // A last try is said as often as there is still time for it and its copies.
        let spare = left.saturating_sub(self.round_trip.smoothed);
        let spacing = SPACING.min(spare / 4).max(LEAST_SPACING);
        let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        else {
            return;
        };
        if missing.repeats > 0 {
            missing.repeats -= 1;
        } else {
            if missing.tries == 0 {
                self.stats.asked += 1;
                self.asked_now += 1;
                self.bulk_loss |= self.asked_now > FLOOD;
            }
            missing.tries = missing.tries.saturating_add(1);
            missing.asked_at = Some(now);
            (missing.copies, missing.repeats) = (copies, repeats);
        }
        let next_ask = match missing.repeats {
            0 => {
                // The last time that it was said may be the one that is heard, and the answer may
                // take its time; but neither is worth waiting for where that costs a try.
                let asked_at = missing.asked_at.unwrap_or(now);
                let (patient, hasty) =
                    (self.round_trip.retry_after(), self.round_trip.retry_in_haste_after());
                let tries = |at: Instant| {
                    self.round_trip.tries_within(missing.deadline.saturating_duration_since(at))
                };
                let most = tries(asked_at + hasty);
                [now + patient, asked_at + patient, asked_at + hasty]
                    .into_iter()
                    .find(|at| tries(*at) >= most)
                    .unwrap_or(asked_at + hasty)
                    .max(now + spacing)
            }
            _ => now + spacing,
        };
        let (repeats, deadline) = (missing.repeats, missing.deadline);
        let due = if repeats == 0 { self.together(now, next_ask, deadline) } else { next_ask };
        if let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        {
            missing.due = due;
            missing.said_in = self.request;
        }
        self.asks.push(Reverse((due, number)));
    }

    /// When to ask for what is due then: where much is lost and there is time for many tries, at the
    /// next step of a sixteenth of the round trip, so that one request asks for several.
    pub(super) fn together(&mut self, now: Instant, due: Instant, deadline: Instant) -> Instant {
        let left = deadline.saturating_duration_since(due);
        if !self.losing.is_heavy() || self.round_trip.tries_within(left) <= PLENTY {
            return due;
        }
        let step = (self.round_trip.smoothed / 16).as_micros().max(1);
        let since = due.saturating_duration_since(*self.epoch.get_or_insert(now)).as_micros();
        due + Duration::from_micros(((step - since % step) % step) as u64)
    }

    pub(super) fn answered(&mut self, was_asked: bool) {
        self.asked_now -= usize::from(was_asked);
        self.bulk_loss &= self.asked_now > EBB;
    }
}

/// What is said within less goes into one packet of the repair connection, and is lost with it.
const LEAST_SPACING: Duration = Duration::from_millis(1);
/// Tries for which there is no lack of time if there is time for more.
const PLENTY: u32 = 4;
/// Missing packets asked for, all at one time, that are more than random loss explains, and at which
/// that is over.
const FLOOD: usize = 256;
const EBB: usize = 16;
const MIN_STALL: Duration = Duration::from_millis(5);
/// Numbers in one request: two datagrams' worth at the worst.
const MAX_REQUEST: usize = 512;
