//! When the receiver requests missing packets, and with how many repetitions and copies.

use std::{
    cmp::Reverse,
    time::{Duration, Instant},
};

use super::{Missing, Receiver, Request, Slot, timing::TIMER_GRAIN};
use crate::{retransmit::SPACING, rtp::Seq};

impl Receiver {
    /// Returns the next request that is due at `now`. Call until it returns `None`.
    pub fn poll_request(&mut self, now: Instant) -> Option<Request> {
        self.request_serial += 1;
        let mut numbers = Vec::new();
        let mut request_copies = 1;
        let mut deadline = now + self.settings.latency.max(self.settings.join_latency);
        while let Some(&Reverse((due, number))) = self.request_queue.peek() {
            // Numbers that fall due within the timer's grain are included.
            if due > now + TIMER_GRAIN || numbers.len() >= MAX_REQUEST {
                break;
            }
            let Some(copies) = self.copies_to_request(now, due, number) else {
                self.request_queue.pop();
                continue;
            };
            // A repetition must not share a request or a datagram with the original.
            let too_soon = self.missing_at(number).is_some_and(|missing| {
                missing.last_request == self.request_serial || missing.repeats_left > 0 && due > now
            });
            if too_soon || !numbers.is_empty() && copies != request_copies {
                break;
            }
            self.request_queue.pop();
            if self.missing_at(number).is_some_and(|m| self.is_in_transit(now, number, m)) {
                self.postpone(now, number);
                continue;
            }
            self.mark_requested(now, number);
            if let Some(missing) = self.missing_at(number) {
                deadline = deadline.min(missing.deadline);
            }
            request_copies = copies;
            numbers.push(number);
        }
        self.stats.requests += numbers.len() as u64;
        numbers.sort_unstable();
        (!numbers.is_empty()).then(|| Request {
            seqs: numbers.iter().map(|number| Seq(*number as u16)).collect(),
            copies: request_copies,
            deadline,
        })
    }

    /// Returns how long packets missing from `number` on are waited for before they are requested.
    pub(super) fn first_wait(
        &self,
        now: Instant,
        revealed_by: Option<usize>,
        number: u64,
    ) -> Duration {
        let round_trip = self.round_trip.smoothed;
        let other_path = revealed_by.map_or(Duration::ZERO, |path| {
            self.dual_path.wait_for_other(
                now,
                path,
                number,
                round_trip.min(self.settings.latency / 4),
            )
        });
        self.wait_on_this_path().max(other_path)
    }

    /// Returns how long a missing packet may still arrive without a request: reordered, or from parity.
    fn wait_on_this_path(&self) -> Duration {
        let round_trip = self.round_trip.smoothed;
        let two_tries = self.round_trip.retry_after() + self.round_trip.min_try();
        let parity_first =
            self.parity_wait <= round_trip && self.parity_wait + two_tries <= self.settings.latency;
        let parity = if parity_first { self.parity_wait } else { Duration::ZERO };
        self.reorder_estimate.wait(round_trip).max(parity)
    }

    /// Returns the longest pause between answers while they are arriving.
    fn max_answer_gap(&self) -> Duration {
        (self.round_trip.smoothed / 4).max(MIN_ANSWER_GAP)
    }

    /// Reschedules a number whose answer is on its way.
    fn postpone(&mut self, now: Instant, number: u64) {
        let due = now + self.max_answer_gap();
        if let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        {
            missing.due = due;
            self.request_queue.push(Reverse((due, number)));
        }
    }

    /// Reschedules a number that waited for the other path, which has now lost it too.
    pub(super) fn request_earlier(&mut self, now: Instant, number: u64) {
        let due = now + self.wait_on_this_path();
        let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        else {
            return;
        };
        if missing.tries == 0 && missing.due > due {
            missing.due = due;
            self.request_queue.push(Reverse((due, number)));
        }
    }

    /// Returns how many copies to request, or `None` if the entry is outdated or the packet cannot
    /// arrive in time.
    fn copies_to_request(&self, now: Instant, due: Instant, number: u64) -> Option<u8> {
        let missing = self.missing_at(number).filter(|missing| missing.due == due)?;
        let left = missing.deadline.saturating_duration_since(now);
        let too_late = match (missing.tries, missing.repeats_left) {
            // The first try is always made: the round trip may be shorter than estimated.
            (0, _) => false,
            (_, 0) => left < self.round_trip.min_try(),
            _ => left < self.round_trip.smoothed,
        };
        if missing.hopeless || too_late {
            return None;
        }
        Some(match missing.repeats_left {
            0 => self.effort(missing, left).0,
            _ => missing.copies,
        })
    }

    /// Returns how many copies a new try requests, and how often its request is repeated.
    ///
    /// With loss p in both directions a try fails with a probability of about 2p; requested twice,
    /// p + p²; requested twice with two copies, 2p²; three times with three copies, 2p³. Copies cost
    /// as much as media, so they are for packets near their deadline that failed before: few get that
    /// far. Requests are small, but there are many of them under heavy loss. Those with time for
    /// several tries are then sent once.
    fn effort(&self, missing: &Missing, left: Duration) -> (u8, u8) {
        match (self.round_trip.tries_within(left), missing.tries) {
            // Copies would displace repairs of other packets.
            _ if self.bulk_loss => (1, 1),
            (0 | 1, 0) => (2, 2),
            (0 | 1, _) => (3, 2),
            (2, 1..) | (_, 3..) => (2, 1),
            (..=AMPLE_TRIES, _) => (1, 1),
            _ => (1, u8::from(!self.loss_estimate.is_heavy())),
        }
    }

    /// `true` if answers are arriving in order and have not reached this number yet: then it is not
    /// overdue, however long ago it was requested.
    fn is_in_transit(&self, now: Instant, number: u64, missing: &Missing) -> bool {
        missing.tries > 0
            && self.bulk_loss
            && number > self.last_repair.0
            && self
                .last_repair
                .1
                .is_some_and(|at| now.saturating_duration_since(at) < self.max_answer_gap())
            && now + self.round_trip.min_try() + self.round_trip.smoothed / 4 < missing.deadline
    }

    /// Records a request of a number, and schedules its repetition or next try.
    fn mark_requested(&mut self, now: Instant, number: u64) {
        let Some(missing) = self.missing_at(number) else { return };
        let left = missing.deadline.saturating_duration_since(now);
        let (copies, repeats) = self.effort(missing, left);
        // Repetitions of a last try must leave time for the answer and its copies.
        let spare = left.saturating_sub(self.round_trip.smoothed);
        let spacing = SPACING.min(spare / 4).max(MIN_SPACING);
        let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        else {
            return;
        };
        if missing.repeats_left > 0 {
            missing.repeats_left -= 1;
        } else {
            if missing.tries == 0 {
                self.stats.asked += 1;
                self.outstanding += 1;
                self.bulk_loss |= self.outstanding > BULK_LOSS_ABOVE;
            }
            missing.tries = missing.tries.saturating_add(1);
            missing.asked_at = Some(now);
            (missing.copies, missing.repeats_left) = (copies, repeats);
        }
        let next_request = match missing.repeats_left {
            0 => {
                // The last repetition may be the one that arrives, and the answer may be late; but
                // waiting for either must not cost a try.
                let asked_at = missing.asked_at.unwrap_or(now);
                let (patient, hasty) =
                    (self.round_trip.retry_after(), self.round_trip.hasty_retry_after());
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
        let (repeats, deadline) = (missing.repeats_left, missing.deadline);
        let due = if repeats == 0 {
            self.align_to_batch(now, next_request, deadline)
        } else {
            next_request
        };
        if let Some(Slot::Missing(missing)) = self.window.get_mut((number - self.run.next) as usize)
        {
            missing.due = due;
            missing.last_request = self.request_serial;
        }
        self.request_queue.push(Reverse((due, number)));
    }

    /// Returns when to send a request that is due at `due`. Under heavy loss and with time for many
    /// tries, the next multiple of a sixteenth of the round trip, so that one request carries several
    /// numbers.
    pub(super) fn align_to_batch(
        &mut self,
        now: Instant,
        due: Instant,
        deadline: Instant,
    ) -> Instant {
        let left = deadline.saturating_duration_since(due);
        if !self.loss_estimate.is_heavy() || self.round_trip.tries_within(left) <= AMPLE_TRIES {
            return due;
        }
        let step = (self.round_trip.smoothed / 16).as_micros().max(1);
        let since = due.saturating_duration_since(*self.batch_epoch.get_or_insert(now)).as_micros();
        due + Duration::from_micros(((step - since % step) % step) as u64)
    }

    /// Updates the number of outstanding requests when a missing packet arrived or was given up.
    pub(super) fn record_answer(&mut self, was_asked: bool) {
        self.outstanding -= usize::from(was_asked);
        self.bulk_loss &= self.outstanding > BULK_LOSS_UNTIL;
    }
}

/// Shorter intervals put a repetition into the same QUIC packet, to be lost with the original.
const MIN_SPACING: Duration = Duration::from_millis(1);
/// With time for more tries than this, a single request suffices for each.
const AMPLE_TRIES: u32 = 4;
/// Outstanding packets above which random loss is no longer the explanation, and the number at which
/// bulk loss ends (hysteresis).
const BULK_LOSS_ABOVE: usize = 256;
const BULK_LOSS_UNTIL: usize = 16;
const MIN_ANSWER_GAP: Duration = Duration::from_millis(5);
/// Sequence numbers per request: two datagrams in the worst case.
const MAX_REQUEST: usize = 512;
