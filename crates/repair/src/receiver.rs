//! The receiver of one publication: reorders packets, detects gaps, requests missing packets, and
//! gives them up in time.
//!
//! Packets are handed on in order, each at most once. A packet without a gap before it is handed on
//! at once; a packet after a gap waits until the gap is filled or given up, at most
//! [`Settings::latency`] plus [`GRACE`] after the gap was detected.
//!
//! A publication may arrive over two paths, each of which carries all of it. The first copy of a
//! packet counts, and only packets lost on both paths are requested.
//!
//! # States
//!
//! A receiver from [`Receiver::new`] is idle until its first live packet; one from
//! [`Receiver::starting_at`] is started at once. Each sequence number then passes through these
//! states:
//!
//! | from | event | to |
//! |---|---|---|
//! | expected | packet without a gap before it | handed on |
//! | expected | packet after a gap | held |
//! | expected | later packet, or heartbeat | missing |
//! | missing | packet over a path, as a repair, or from parity | held |
//! | missing | deadline passed by [`Receiver::handle_timeout`], [`Receiver::handle_gone`], [`Receiver::abandon_through`], full window | given up |
//! | held, given up | all earlier numbers are held or given up | handed on, [`Event::Lost`] |
//!
//! A missing packet is requested when its first wait ends ([`Receiver::poll_request`]), and again
//! when an answer is overdue, until it arrives or cannot arrive in time.
//!
//! Only [`Receiver::handle_timeout`] gives packets up because of the time. Its time may be earlier than
//! the present: a caller that was not scheduled for a while passes the time up to which it has read
//! everything that arrived.
//!
//! A restart of the sender ([`Event::Restart`]) hands on everything and starts over. With
//! [`Numbering::Guessed`] it is detected by two consecutive packets far from the window (RFC 3550
//! §A.1), or by a long run of old numbers in perfect order. With [`Numbering::Announced`], packets far
//! from the window count only near a number that the sender announced in a heartbeat.
//!
//! Invariants:
//!
//! - The window starts at the next number to hand on and has at most [`Settings::window`] entries. Its
//!   front is missing; its back is held, unless a heartbeat announced it.
//! - Every missing number that is worth requesting has an entry in the request queue whose time
//!   equals its `due`; entries with another time are outdated and skipped.
//! - During a run of packets in order (`InOrderRun`), window, events and request queue are empty.

mod dual_path;
mod requests;
mod restart;
mod stats;
mod timing;
mod window;

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    time::{Duration, Instant},
};

pub use self::{
    dual_path::MAX_PATHS,
    stats::{DELAY_BOUNDS_MS, Histogram, PathStats, Stats},
};

use self::{
    dual_path::DualPath,
    restart::{BackwardRun, RESTART_RUN},
    timing::{ControlSkew, LossEstimate, ReorderEstimate, RoundTrip, TIMER_GRAIN},
    window::{Missing, Slot},
};
use crate::rtp::{Packet, Seq};

/// Latency and memory of a [`Receiver`].
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long a missing packet is waited for after its gap was detected; [`GRACE`] is added.
    pub latency: Duration,
    /// The same for packets that were sent before the receiver joined.
    pub join_latency: Duration,
    /// The most packets in the window: held and missing ones together.
    pub window: usize,
    /// `true` if repairs may arrive like live packets, because the sender sends them to a multicast
    /// group.
    pub group: bool,
    /// How a restart of the sender's numbers is known.
    pub numbering: Numbering,
}

/// How a [`Receiver`] knows that the sender's numbers continue far from the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Numbering {
    /// From the numbers that arrive: the sender announces nothing.
    #[default]
    Guessed,
    /// From the sender's heartbeats alone.
    Announced,
}

impl Default for Settings {
    fn default() -> Self {
        let latency = Duration::from_millis(500);
        Self {
            latency,
            join_latency: Duration::from_secs(1),
            window: 1 << 14,
            group: false,
            numbering: Numbering::default(),
        }
    }
}

/// How a packet arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Live, over the path with this index: 0 or 1.
    Live(u8),
    /// As the answer to a request.
    Repair,
    /// Recovered from parity.
    Parity,
}

/// Output of the receiver, in the order of sequence numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The next packet.
    Packet(Packet),
    /// The next `n` packets were given up.
    Lost(u64),
    /// The sender restarted: the stream continues with this sequence number, and nothing before it.
    Restart(Seq),
}

/// A request for missing packets, to be sent now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Sequence numbers in ascending order.
    pub seqs: Vec<Seq>,
    /// Copies of each packet to send, a few milliseconds apart.
    pub copies: u8,
    /// When the first of the packets is given up.
    pub deadline: Instant,
}

impl Request {
    /// Returns the time until [`Request::deadline`], in milliseconds.
    pub fn slack_ms(&self, now: Instant) -> u16 {
        let left = self.deadline.saturating_duration_since(now).as_millis();
        u16::try_from(left).unwrap_or(u16::MAX)
    }
}

/// Reorders and repairs one publication; see the [module](self) for its states.
#[derive(Debug)]
#[repr(C)]
pub struct Receiver {
    /// First, so that a packet of the run touches one cache line.
    run: InOrderRun,
    settings: Settings,
    started: bool,
    /// `true` once a live packet arrived.
    joined: bool,
    window: VecDeque<Slot>,
    /// When to request each missing number next, earliest first; see the invariants.
    request_queue: BinaryHeap<Reverse<(Instant, u64)>>,
    events: VecDeque<Event>,
    round_trip: RoundTrip,
    /// Serial number of the last request.
    request_serial: u64,
    /// Missing numbers that were requested.
    outstanding: usize,
    /// More packets are missing than random loss explains: a path was interrupted, and many repairs
    /// are on their way.
    bulk_loss: bool,
    /// Start of the grid to which requests are aligned under heavy loss.
    batch_epoch: Option<Instant>,
    /// The number that was repaired last, and when.
    last_repair: (u64, Option<Instant>),
    reorder_estimate: ReorderEstimate,
    loss_estimate: LossEstimate,
    control_skew: ControlSkew,
    dual_path: DualPath,
    /// How long after a gap the parity that could fill it arrives.
    parity_wait: Duration,
    /// A sequence number far from the window; its successor confirms a restart of the sender.
    probation: Option<Seq>,
    /// The newest number in the sender's last heartbeat, if it was far from the window.
    announced: Option<Seq>,
    /// Requested packets that are no longer missing, for [`Receiver::poll_withdrawn`].
    withdrawn: VecDeque<Seq>,
    /// Ranges of given-up numbers, to tell late packets from duplicates.
    given_up: VecDeque<(u64, u64)>,
    /// Consecutive live packets that all count as old.
    backward_run: Option<BackwardRun>,
    /// The newest number before the last restart, and when that was.
    before_restart: Option<(Seq, Instant)>,
    stats: Stats,
}

/// Live packets that arrived over one path, each the next expected one with nothing missing. Only
/// their number is recorded; [`Receiver::end_run`] passes it to statistics and estimators.
#[derive(Debug)]
struct InOrderRun {
    /// Extended number of the window's front: the next to be handed on.
    next: u64,
    /// Packets that are not recorded elsewhere yet.
    count: u64,
    /// When the last packet arrived; `None` if the next packet cannot continue a run.
    last_at: Option<Instant>,
    path: usize,
}

impl InOrderRun {
    fn add_to(&self, stats: &mut Stats) {
        stats.received += self.count;
        stats.paths[self.path].received += self.count;
        stats.delays.add_zero(self.count);
        stats.waits.add_zero(self.count);
    }
}

impl Receiver {
    /// Creates a receiver that starts with the first live packet.
    pub fn new(settings: Settings) -> Self {
        Self {
            run: InOrderRun { next: BASE, count: 0, last_at: None, path: 0 },
            settings,
            started: false,
            joined: false,
            window: VecDeque::new(),
            request_queue: BinaryHeap::new(),
            events: VecDeque::new(),
            round_trip: RoundTrip::default(),
            request_serial: 0,
            outstanding: 0,
            bulk_loss: false,
            batch_epoch: None,
            last_repair: (0, None),
            reorder_estimate: ReorderEstimate::default(),
            loss_estimate: LossEstimate::default(),
            control_skew: ControlSkew::default(),
            dual_path: DualPath::default(),
            parity_wait: Duration::ZERO,
            probation: None,
            announced: None,
            withdrawn: VecDeque::new(),
            given_up: VecDeque::new(),
            backward_run: None,
            before_restart: None,
            stats: Stats::default(),
        }
    }

    /// Creates a receiver that starts with `first`, which was sent earlier. Packets from `first` to
    /// the first live packet are requested.
    pub fn starting_at(settings: Settings, first: Seq) -> Self {
        let mut receiver = Self::new(settings);
        receiver.start(first);
        receiver
    }

    /// Handles a live packet received at `now` if it is the next one and the receiver is otherwise
    /// empty: nothing is missing, held, or to be polled. Returns `true` if so: the caller hands the
    /// packet on itself, there is no event, and no poll has a new result. Returns `false` without any
    /// effect otherwise: the packet must be passed to [`Receiver::handle_packet`].
    ///
    /// Equivalent to that, for nearly all packets on a good network, at a fraction of the cost.
    #[inline]
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
        self.start_run(now, path)
    }

    /// Handles a packet received at `now`.
    pub fn handle_packet(&mut self, now: Instant, packet: Packet, path: Path) {
        self.end_run();
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
            self.start(seq);
        }
        let newest = self.newest();
        let distance = i64::from(seq.distance_from(Seq(newest as u16)));
        if path == Path::Repair && distance > 0 {
            // Only missing packets are requested, and they are never ahead of the newest. Parity may
            // bring the last packets of a row before anything revealed that they are missing.
            self.stats.duplicate += 1;
            return;
        }
        if distance.unsigned_abs() > self.settings.window as u64 {
            self.handle_stray(now, packet, path);
            return;
        }
        let number = newest.wrapping_add_signed(distance);
        if distance > 0 {
            self.backward_run = None;
            self.loss_estimate.record(distance.unsigned_abs() - 1);
        } else if live.is_some()
            && self.settings.numbering == Numbering::Guessed
            && number < self.run.next
            && self.is_backward_run(now, seq)
        {
            // The earlier packets of the run were taken for duplicates; they are requested again.
            self.restart(now, seq.plus(usize::from(u16::MAX) - RESTART_RUN + 2));
            self.handle_packet(now, packet, path);
            self.stats.received -= 1;
            return;
        }
        self.accept(now, packet, path, live, number, newest);
    }

    /// Handles the sender's announcement that it has sent everything up to `last`, which reveals loss
    /// at the tail. Returns `false` if nothing changed, so that no poll has a new result.
    pub fn handle_heartbeat(&mut self, now: Instant, last: Seq) -> bool {
        if !self.started {
            return false;
        }
        let newest = self.newest();
        let distance = last.distance_from(Seq(newest as u16));
        let is_far = distance.unsigned_abs() as usize > self.settings.window;
        self.announced = is_far.then_some(last);
        if distance >= 0 {
            // The sender has not restarted.
            self.backward_run = None;
        }
        if distance <= 0 {
            self.control_skew.decay();
            return false;
        }
        self.end_run();
        if distance as usize <= self.settings.window {
            // The heartbeat takes another route and may overtake the packets it announces. Packets
            // sent before the receiver joined will not arrive without a request.
            let end = newest + distance as u64 + 1;
            if self.joined {
                let due = now + self.control_skew.wait();
                let head_start = (self.round_trip.smoothed / 4).clamp(TIMER_GRAIN, MAX_HEAD_START);
                let wait = self.first_wait(now, None, newest + 1).max(head_start);
                self.open_gap(due, end, None, wait);
                self.control_skew.announce(now, end - 1);
            } else {
                self.open_gap(now, end, None, Duration::ZERO);
            }
            self.release(now);
        }
        true
    }

    /// Handles the answer of a sender that may not hold these packets *yet* (wire v0): requests them
    /// again soon, as long as they may arrive in time.
    pub fn handle_not_held(&mut self, now: Instant, seqs: impl IntoIterator<Item = Seq>) {
        for seq in seqs {
            let distance = seq.distance_from(Seq(self.run.next as u16));
            let Ok(index) = usize::try_from(distance) else { continue };
            let Some(Slot::Missing(missing)) = self.window.get_mut(index) else { continue };
            if missing.hopeless {
                continue;
            }
            let pause = NOT_HELD_PAUSE * (1 << missing.tries.saturating_sub(1).min(4));
            missing.due = now + pause;
            missing.repeats_left = 0;
            self.request_queue.push(Reverse((missing.due, self.run.next + index as u64)));
        }
    }

    /// Handles the sender's refusal: it no longer holds these packets, so they are given up.
    pub fn handle_gone(&mut self, now: Instant, seqs: impl IntoIterator<Item = Seq>) {
        if !self.started {
            return;
        }
        for seq in seqs {
            let front = Seq(self.run.next as u16);
            let Ok(index) = usize::try_from(seq.distance_from(front)) else { continue };
            if let Some(Slot::Missing(missing)) = self.window.get_mut(index) {
                missing.hopeless = true;
            }
        }
        self.release(now);
    }

    /// Gives up all missing packets up to `last`, because the tag they belong to lost a packet and is
    /// useless.
    pub fn abandon_through(&mut self, now: Instant, last: Seq) {
        let Ok(last) = usize::try_from(last.distance_from(Seq(self.run.next as u16))) else {
            return;
        };
        for slot in self.window.iter_mut().take(last + 1) {
            if let Slot::Missing(missing) = slot
                && !missing.hopeless
            {
                missing.hopeless = true;
                self.stats.abandoned += 1;
            }
        }
        self.release(now);
    }

    /// Sets how long after a packet the parity that could replace it arrives; zero without parity. A
    /// gap is not requested before that, if a request takes longer and there is time for two tries
    /// afterwards.
    pub fn set_parity_wait(&mut self, wait: Duration) {
        self.parity_wait = wait;
    }

    /// Gives up packets whose deadline is not after `until`, the time up to which everything that
    /// arrived has been passed in. Call [`Receiver::poll_request`] and [`Receiver::poll_event`]
    /// afterwards.
    pub fn handle_timeout(&mut self, until: Instant) {
        while let Some(Slot::Missing(missing)) = self.window.front()
            && missing.deadline <= until
        {
            self.pop_front(until);
            self.release(until);
        }
    }

    /// Sets how a restart of the sender's numbers is known.
    pub fn set_numbering(&mut self, numbering: Numbering) {
        self.settings.numbering = numbering;
    }

    /// Returns the next packet that was requested and has arrived otherwise, or was given up.
    pub fn poll_withdrawn(&mut self) -> Option<Seq> {
        self.withdrawn.pop_front()
    }

    /// Sets the round trip as measured by the repair connection. Answers to requests refine it.
    pub fn set_round_trip(&mut self, now: Instant, round_trip: Duration, variation: Duration) {
        self.round_trip.hint(now, round_trip, variation);
    }

    /// Returns the next event, or `None` if there is none.
    #[inline]
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Returns when to call [`Receiver::handle_timeout`] and the polls if nothing arrives before.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let request = self.request_queue.peek().map(|Reverse((due, _))| *due);
        let give_up = match self.window.front() {
            Some(Slot::Missing(missing)) => Some(missing.deadline),
            _ => None,
        };
        request.into_iter().chain(give_up).min()
    }

    /// Gives up every missing packet, so that [`Receiver::poll_event`] returns everything held.
    pub fn finish(&mut self, now: Instant) {
        while !self.window.is_empty() {
            self.pop_front(now);
        }
    }

    /// `true` if everything up to `last` has been handed on or given up.
    pub fn is_done_through(&self, last: Seq) -> bool {
        self.started && last.distance_from(Seq(self.run.next as u16)) < 0
    }

    /// Returns how far `seq` is ahead of the newest packet, held or missing, or behind it; `None` before
    /// the first packet.
    pub fn distance_to_newest(&self, seq: Seq) -> Option<i32> {
        self.started.then(|| seq.distance_from(Seq(self.newest() as u16)))
    }

    /// Returns the number of packets in the window, held and missing.
    pub fn pending(&self) -> usize {
        self.window.len()
    }

    /// Returns the number of missing packets; walks the window.
    pub fn missing(&self) -> usize {
        self.window.iter().filter(|slot| matches!(slot, Slot::Missing(_))).count()
    }

    /// Returns the statistics since the start.
    pub fn stats(&self) -> Stats {
        let mut stats = self.stats;
        self.run.add_to(&mut stats);
        stats
    }

    /// Handles the next packet at the start of a run; see [`Receiver::handle_next`].
    fn start_run(&mut self, now: Instant, path: usize) -> bool {
        self.end_run();
        let is_empty = self.started
            && self.window.is_empty()
            && self.events.is_empty()
            && self.request_queue.is_empty();
        if !is_empty {
            return false;
        }
        self.stats.received += 1;
        self.backward_run = None;
        self.probation = None;
        self.loss_estimate.record(0);
        let stats = &mut self.stats.paths[path];
        // The other path has brought every packet that this one skipped: nothing is missing.
        self.dual_path.record(now, path, self.run.next, false, stats);
        self.control_skew.record_arrival(now, self.run.next);
        self.joined = true;
        self.stats.delays.add_zero(1);
        self.stats.waits.add_zero(1);
        self.run.next += 1;
        if self.dual_path.is_only(path) && !self.control_skew.is_pending() {
            self.run.path = path;
            self.run.last_at = Some(now);
        }
        true
    }

    /// Records the packets of the run and ends it.
    #[inline]
    fn end_run(&mut self) {
        if let Some(last_at) = self.run.last_at.take() {
            self.run.add_to(&mut self.stats);
            let count = std::mem::take(&mut self.run.count);
            self.dual_path.record_run(last_at, self.run.path, count);
            self.loss_estimate.record_run(count);
        }
    }

    /// Returns the extended number of the newest packet, held or missing.
    #[inline]
    fn newest(&self) -> u64 {
        self.run.next + self.window.len() as u64 - 1
    }

    fn start(&mut self, first: Seq) {
        self.started = true;
        self.run.next = BASE + u64::from(first.0);
    }
}

/// First extended number: large enough that no number before the first underflows.
const BASE: u64 = 1 << 32;
/// Added to the latency of every packet, so that a latency of n round trips has time for n tries in
/// spite of coarse timers. Playout buffers were measured to add 2 to 16 ms to theirs.
pub const GRACE: Duration = Duration::from_millis(15);
/// Pause before a packet that the sender may not hold yet is requested again; doubles per try.
const NOT_HELD_PAUSE: Duration = Duration::from_millis(5);
/// Longest wait for a packet that a heartbeat announced before it is requested.
const MAX_HEAD_START: Duration = Duration::from_millis(10);
