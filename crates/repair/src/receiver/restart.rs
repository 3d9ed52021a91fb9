//! A sender whose numbers continue far from the window: after a restart under the same SSRC, or after
//! an interruption longer than the window.

use std::time::{Duration, Instant};

use super::{Event, Numbering, Path, Receiver, timing::ControlSkew};
use crate::rtp::{Packet, Seq};

/// Consecutive live packets with consecutive sequence numbers, all before the window.
#[derive(Debug)]
pub(super) struct BackwardRun {
    last: Seq,
    last_at: Instant,
    count: usize,
    /// Duration of the run; each interval counts at most [`MAX_RUN_INTERVAL`].
    duration: Duration,
}

impl Receiver {
    /// Handles a packet too far from the window to be late or early. The numbers continue there if the
    /// sender announced so; with [`Numbering::Guessed`], if two consecutive ones arrive (RFC 3550
    /// §A.1).
    pub(super) fn handle_stray(&mut self, now: Instant, packet: Packet, path: Path) {
        let seq = packet.header.seq;
        if self.settings.numbering == Numbering::Announced {
            return self.handle_announced_stray(now, packet, path);
        }
        let confirmed = self.probation.is_some_and(|first| first.plus(1) == seq);
        if !matches!(path, Path::Live(_)) {
            self.stats.duplicate += 1;
            return;
        }
        let is_straggler = self.before_restart.is_some_and(|(newest, at)| {
            now.saturating_duration_since(at) < STRAGGLER_TIME
                && seq.distance_from(newest).unsigned_abs() as usize <= self.settings.window
        });
        if is_straggler {
            self.stats.too_late += 1;
            return;
        }
        if !confirmed {
            self.probation = Some(seq);
            return;
        }
        // The first of the two was not kept; it is requested like any other.
        self.restart(now, seq.plus(usize::from(u16::MAX)));
        self.handle_packet(now, packet, path);
        self.stats.received -= 1;
    }

    /// Handles a stray packet of a sender that announces its numbers: a path that was interrupted for
    /// longer than the window continues near the announced number; anything else is old.
    fn handle_announced_stray(&mut self, now: Instant, packet: Packet, path: Path) {
        let seq = packet.header.seq;
        let near = |at: Seq| seq.distance_from(at).unsigned_abs() as usize <= self.settings.window;
        if !matches!(path, Path::Live(_)) || !self.announced.is_some_and(near) {
            self.stats.too_late += 1;
            return;
        }
        self.restart(now, seq);
        self.handle_packet(now, packet, path);
        self.stats.received -= 1;
    }

    /// Extends or starts the backward run with an old packet. Returns `true` if the run shows that the
    /// sender restarted at recently used numbers: for some time, only old numbers arrived, in perfect
    /// order. A second path does not lag that far behind the first.
    pub(super) fn is_backward_run(&mut self, now: Instant, seq: Seq) -> bool {
        let mut run = BackwardRun { last: seq, last_at: now, count: 1, duration: Duration::ZERO };
        if let Some(before) = self.backward_run.take().filter(|run| run.last.plus(1) == seq) {
            let interval = now.saturating_duration_since(before.last_at);
            run.count += before.count;
            run.duration = before.duration + interval.min(MAX_RUN_INTERVAL);
        }
        let restarted = run.count >= RESTART_RUN && run.duration >= RESTART_DURATION;
        self.backward_run = Some(run);
        restarted
    }

    /// Hands on everything and starts over at `first`.
    pub(super) fn restart(&mut self, now: Instant, first: Seq) {
        self.before_restart = Some((Seq(self.newest() as u16), now));
        self.finish(now);
        self.control_skew = ControlSkew::default();
        self.request_queue.clear();
        self.given_up.clear();
        self.dual_path.reset();
        self.probation = None;
        self.announced = None;
        self.backward_run = None;
        self.stats.restarts += 1;
        self.events.push_back(Event::Restart(first));
        self.start(first);
    }
}

/// Packets of a backward run that shows a restart.
pub(super) const RESTART_RUN: usize = 32;
/// Duration of a backward run that shows a restart.
const RESTART_DURATION: Duration = Duration::from_secs(1);
/// Longest interval between packets that counts in a run's duration: a clock may jump.
const MAX_RUN_INTERVAL: Duration = Duration::from_millis(50);
/// How long after a restart packets from before it count as stragglers. Two paths and reordering mix
/// old and new packets in any order.
const STRAGGLER_TIME: Duration = Duration::from_secs(5);
