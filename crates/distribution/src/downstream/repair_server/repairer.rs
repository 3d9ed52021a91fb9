//! Repairs to one `downpour/1` edge: its NACKs arrive and its repairs leave in datagrams.
//!
//! ```text
//! NACK ─> request limit ─> history ─> not a repeat ─┬─> group repair ─> multicast group
//!              │ flood        │ gone      │ dropped └─> outbox ─> budget, path ─> edge
//!              v              v                           │ late, full   │ copies later
//!           dropped      Gone message                     v              v
//!                                                      dropped        outbox
//! ```
//!
//! Invariants: the outbox is bounded and sends the earliest deadline first; quinn's own queue never
//! holds more than about one round trip of data, so that an urgent repair overtakes the others; every
//! dropped repair is counted by reason.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use quinn::{Connection, SendDatagramError};
use tokio::{
    sync::{Semaphore, broadcast, mpsc},
    task::JoinSet,
    time::{sleep_until, timeout},
};

use super::{
    BUDGET_AGE, Shared,
    downpour::{EdgeError, Subscription},
    heartbeat::{DueHeartbeats, HeartbeatReceiver},
};
use crate::{
    congestion::RepairControl, control_stream::STREAM_TIMEOUT,
    downstream::outgoing::OutgoingStream, transport::SERVER_DATAGRAM_BUFFER,
};
use downpour_repair::{
    bucket::TokenBucket,
    message::{Gone, Heartbeat, Message, MessageError, Nack, encode_repair},
    multicast_repair::{Answer, GroupRequest},
    repair_queue::{self, Next, Pushed, Repair, RepairQueue},
    retransmit::Retransmitter,
};

/// The datagram half of a session.
pub(super) struct Repairer<'a> {
    shared: &'a Shared,
    connection: &'a Connection,
    subscription: &'a Mutex<Subscription>,
    requests: TokenBucket,
    outbox: RepairQueue<RepairPacket>,
    budget_set: Instant,
    /// If the outbox is blocked: when to try again, and the reason.
    blocked: Option<(Instant, Blocked)>,
    resender: Retransmitter<Repair<RepairPacket>>,
    /// The number of this edge.
    edge: u64,
    heartbeat_receiver: HeartbeatReceiver,
    /// The multicast group that the edge listens to, if this cloud sends to groups.
    group: Option<SocketAddr>,
    /// Streams with repairs that are too long for a datagram.
    streams: JoinSet<()>,
    stream_slots: Arc<Semaphore>,
}

/// A packet to retransmit.
#[derive(Clone)]
struct RepairPacket {
    stream: Arc<OutgoingStream>,
    packet: Bytes,
    /// The multicast group to send it to; `None` sends it to the edge.
    group: Option<SocketAddr>,
}

/// Why repairs have to wait.
#[derive(Clone, Copy, PartialEq)]
enum Blocked {
    /// The repair budget is used up.
    Budget,
    /// The path accepts no more data for now.
    Path,
}

impl<'a> Repairer<'a> {
    pub(super) fn new(
        shared: &'a Shared,
        connection: &'a Connection,
        subscription: &'a Mutex<Subscription>,
        group: Option<SocketAddr>,
        latency: Duration,
    ) -> Self {
        let now = Instant::now();
        let edge = shared.edges.fetch_add(1, Ordering::Relaxed);
        let (rate, burst) = shared.budget(subscription.lock().byte_rate());
        Self {
            shared,
            connection,
            subscription,
            requests: shared.request_bucket(),
            outbox: RepairQueue::new(now, rate, burst),
            budget_set: now,
            blocked: None,
            resender: Retransmitter::new(),
            edge,
            heartbeat_receiver: HeartbeatReceiver::new(edge, latency),
            group: group.filter(|_| shared.group_sender.is_some()),
            streams: JoinSet::new(),
            stream_slots: Arc::new(Semaphore::new(MAX_REPAIR_STREAMS)),
        }
    }

    pub(super) async fn run(
        mut self,
        mut streams: mpsc::Receiver<Result<Bytes, MessageError>>,
        mut heartbeats: broadcast::Receiver<Arc<DueHeartbeats>>,
    ) -> Result<(), EdgeError> {
        loop {
            let blocked = self.blocked.map(|(until, _)| until);
            let wake = self.resender.poll_timeout().into_iter().chain(blocked).min();
            tokio::select! {
                datagram = self.connection.read_datagram() => self.handle(datagram?)?,
                Some(message) = streams.recv() => self.handle(message?)?,
                due = heartbeats.recv() => if let Ok(due) = due {
                    self.send_heartbeats(&due)?;
                },
                () = sleep_until(wake.unwrap_or_else(Instant::now).into()), if wake.is_some() => {
                    self.send_due()?;
                }
            }
        }
    }

    fn handle(&mut self, datagram: Bytes) -> Result<(), EdgeError> {
        match Message::parse(datagram) {
            Ok(Message::Nack(nack)) => self.repair(nack),
            Ok(_) => Err(EdgeError::WrongDirection),
            // A message of a later version.
            Err(MessageError::UnknownType(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn repair(&mut self, nack: Nack) -> Result<(), EdgeError> {
        let metrics = &self.shared.metrics;
        let asked = nack.seqs.len() as u64;
        metrics.downpour.asked.inc_by(asked);
        let now = Instant::now();
        self.heartbeat_receiver.requested(now);
        if !self.requests.take(now, asked) {
            metrics.dropped_flood.inc_by(asked);
            return Ok(());
        }
        let ssrc = nack.ssrc;
        let wanted = |stream: &Arc<_>| self.subscription.lock().wants(stream);
        let stream = self.shared.outgoing.stream(ssrc).filter(wanted);
        let round_trip = self.connection.rtt();
        self.resender.set_round_trip(round_trip);
        let slack = Duration::from_millis(nack.slack_ms.into());
        let deadline = repair_queue::deadline(now, slack, round_trip);
        let mut gone = Vec::new();
        let (mut fresh, mut queued) = (0, 0);
        for seq in nack.seqs {
            let packet = stream.as_ref().and_then(|stream| stream.packet(seq));
            let (Some(stream), Some(packet)) = (&stream, packet) else {
                gone.push(seq);
                continue;
            };
            if !self.resender.is_new(now, ssrc, seq) {
                metrics.repeated.inc();
                continue;
            }
            fresh += 1;
            let mut repair = Repair {
                ssrc,
                seq,
                deadline,
                len: packet.len(),
                further: nack.copies - 1,
                packet: RepairPacket { stream: stream.clone(), packet, group: None },
            };
            // A Go edge in the group that began after the stream's end would not find it in the API.
            let may_group = self.group.is_some() && !stream.ended();
            if may_group && self.answer_by_group(now, round_trip, &mut repair) {
                continue;
            }
            queued += self.queue(repair);
        }
        self.flush(now)?;
        self.count_deferred(queued);
        if let Some(stream) = &stream {
            let gone = gone.len() as u64;
            stream.repairs.add(fresh + gone, 0, gone);
        }
        let metrics = &self.shared.metrics;
        metrics.downpour.gone.inc_by(gone.len() as u64);
        let max_len = self.connection.max_datagram_size().unwrap_or(Message::MAX_LEN);
        for datagram in (Gone { ssrc, seqs: gone }).encode(max_len) {
            self.send_datagram(datagram)?;
        }
        Ok(())
    }

    /// Answers a request by a packet to the edge's multicast group, if many members request it. Returns
    /// `false` if the packet has to be sent to the edge instead.
    fn answer_by_group(
        &mut self,
        now: Instant,
        round_trip: Duration,
        repair: &mut Repair<RepairPacket>,
    ) -> bool {
        let (Some(group), Some(sender)) = (self.group, &self.shared.group_sender) else {
            return false;
        };
        let metrics = &self.shared.metrics;
        let ask = GroupRequest {
            group,
            edge: self.edge,
            round_trip,
            ssrc: repair.ssrc,
            seq: repair.seq,
            copies: repair.further + 1,
            len: repair.len,
        };
        let answer = self.shared.groups().handle_request(now, ask, self.shared.group_budget(now));
        match answer {
            Answer::Unicast => false,
            Answer::Covered => {
                metrics.answered_by_group.inc();
                true
            }
            Answer::Group { at_once, further } => {
                if at_once && !sender.send(group, repair.packet.packet.clone()) {
                    metrics.unknown_group.inc();
                    self.shared.groups().refused(now, group);
                    return false;
                }
                if at_once {
                    self.count_group(repair);
                } else {
                    metrics.answered_by_group.inc();
                }
                repair.packet.group = Some(group);
                let within = repair.deadline.saturating_duration_since(now);
                if !self.resender.schedule_copies(now, repair.clone(), further, within) {
                    metrics.dropped_backlog.inc_by(further.into());
                }
                true
            }
        }
    }

    fn count_group(&self, repair: &Repair<RepairPacket>) {
        repair.packet.stream.repairs.add(0, 1, 0);
        self.shared.metrics.group_repairs.inc();
        self.shared.metrics.group_bytes.inc_by(repair.len as u64);
    }

    /// Adds a repair to the outbox. Returns the number of repairs added: 0 or 1.
    fn queue(&mut self, repair: Repair<RepairPacket>) -> usize {
        let metrics = &self.shared.metrics;
        match self.outbox.push(repair) {
            Pushed::Queued => 1,
            Pushed::Merged => {
                metrics.repeated.inc();
                0
            }
            Pushed::Dropped(dropped) => {
                self.resender.not_sent(dropped.ssrc, dropped.seq);
                match self.blocked {
                    Some((_, Blocked::Path)) => metrics.dropped_backlog.inc(),
                    _ => metrics.dropped_budget.inc(),
                }
                0
            }
        }
    }

    /// Counts the repairs, of the `queued` ones, that are still in the outbox after a flush.
    fn count_deferred(&self, queued: usize) {
        let deferred = queued.min(self.outbox.len()) as u64;
        match self.blocked {
            Some((_, Blocked::Budget)) => self.shared.metrics.deferred_budget.inc_by(deferred),
            Some((_, Blocked::Path)) => self.shared.metrics.deferred_path.inc_by(deferred),
            None => {}
        }
    }

    /// Sends the copies that are due and the repairs that were blocked.
    fn send_due(&mut self) -> Result<(), EdgeError> {
        let now = Instant::now();
        let mut queued = 0;
        while let Some(mut copy) = self.resender.poll_copy(now) {
            if let (Some(group), Some(sender)) = (copy.packet.group, &self.shared.group_sender) {
                if sender.send(group, copy.packet.packet.clone()) {
                    self.count_group(&copy);
                }
                continue;
            }
            // A copy is often due close to the deadline, which is only an estimate: do not drop it as
            // late if the budget allows it.
            copy.deadline = copy.deadline.max(now);
            copy.further = 0;
            queued += self.queue(copy);
        }
        self.flush(now)?;
        self.count_deferred(queued);
        Ok(())
    }

    /// Sends repairs from the outbox, earliest deadline first, as far as budget and path allow.
    fn flush(&mut self, now: Instant) -> Result<(), EdgeError> {
        self.blocked = None;
        if self.outbox.is_empty() {
            return Ok(());
        }
        if now.saturating_duration_since(self.budget_set) >= BUDGET_AGE {
            let (rate, burst) = self.shared.budget(self.subscription.lock().byte_rate());
            self.outbox.set_budget(now, rate, burst);
            self.budget_set = now;
        }
        // quinn sends its datagrams in order. Give it no more than it sends in about one round trip, so
        // that urgent repairs can overtake the rest in the outbox.
        let window = self.connection.stats().path.cwnd.max(RepairControl::FLOOR);
        let window = usize::try_from(window).unwrap_or(usize::MAX);
        let reserve = SERVER_DATAGRAM_BUFFER.saturating_sub(window);
        while !self.outbox.is_empty() {
            if self.connection.datagram_send_buffer_space() < reserve + Message::MAX_LEN {
                self.blocked = Some((now + PATH_POLL, Blocked::Path));
                break;
            }
            match self.outbox.poll(now) {
                Next::Send(repair) => self.send_repair(now, repair)?,
                Next::Late(repair) => {
                    self.resender.not_sent(repair.ssrc, repair.seq);
                    self.shared.metrics.dropped_late.inc();
                }
                Next::Wait(until) => {
                    // Not too often: each wake-up should find budget for about one packet.
                    self.blocked = Some((until.max(now + PATH_POLL), Blocked::Budget));
                    break;
                }
                Next::Idle => break,
            }
        }
        Ok(())
    }

    /// Retransmits a packet, if the path has room, and schedules its further copies.
    fn send_repair(&mut self, now: Instant, repair: Repair<RepairPacket>) -> Result<(), EdgeError> {
        let metrics = &self.shared.metrics;
        let message = encode_repair(&repair.packet.packet);
        let fits = self.connection.max_datagram_size().is_some_and(|max| message.len() <= max);
        let sent = if fits { self.send_datagram(message)? } else { self.send_stream(message) };
        if !sent {
            self.resender.not_sent(repair.ssrc, repair.seq);
            return Ok(());
        }
        self.resender.sent(now, repair.ssrc, repair.seq);
        repair.packet.stream.repairs.add(0, 1, 0);
        metrics.downpour.repairs.inc();
        metrics.downpour.repair_bytes.inc_by(repair.len as u64);
        let further = repair.further;
        let within = repair.deadline.saturating_duration_since(now);
        if !self.resender.schedule_copies(now, repair, further, within) {
            metrics.dropped_backlog.inc_by(further.into());
        }
        Ok(())
    }

    /// Sends a datagram, or a stream if it is too long. Returns `false` if there was no room.
    fn send_datagram(&mut self, datagram: Bytes) -> Result<bool, EdgeError> {
        // Without room, quinn would silently drop its oldest datagrams.
        if self.connection.datagram_send_buffer_space() < datagram.len() {
            self.shared.metrics.dropped_backlog.inc();
            return Ok(false);
        }
        match self.connection.send_datagram(datagram.clone()) {
            Ok(()) => Ok(true),
            Err(SendDatagramError::ConnectionLost(error)) => Err(error.into()),
            // The MTU has just become smaller, or the edge accepts no datagrams.
            Err(_) => Ok(self.send_stream(datagram)),
        }
    }

    /// Sends a message on a stream. Returns `false` if too many streams are open.
    fn send_stream(&mut self, message: Bytes) -> bool {
        while self.streams.try_join_next().is_some() {}
        let Ok(slot) = self.stream_slots.clone().try_acquire_owned() else {
            self.shared.metrics.dropped_streams.inc();
            return false;
        };
        let connection = self.connection.clone();
        self.streams.spawn(async move {
            let _slot = slot;
            // After the timeout the repair is useless. Dropping the stream resets it.
            let _ = timeout(STREAM_TIMEOUT, async {
                let mut stream = connection.open_uni().await.ok()?;
                stream.write_all(&message).await.ok()?;
                stream.finish().ok()?;
                stream.stopped().await.ok()
            })
            .await;
        });
        true
    }

    fn send_heartbeats(&mut self, due: &DueHeartbeats) -> Result<(), EdgeError> {
        let heartbeats: Vec<_> = {
            let subscription = self.subscription.lock();
            let heartbeats = due.to(&self.heartbeat_receiver, Instant::now());
            heartbeats.filter(|heartbeat| subscription.has_announced(heartbeat.ssrc)).collect()
        };
        let Some(max_len) = self.connection.max_datagram_size() else { return Ok(()) };
        for datagram in Heartbeat::encode(&heartbeats, max_len) {
            if self.send_datagram(datagram)? {
                self.shared.metrics.heartbeats.inc();
            }
        }
        Ok(())
    }
}

/// Least time until a blocked outbox is tried again.
const PATH_POLL: Duration = Duration::from_millis(4);
/// Most repairs in flight on streams.
const MAX_REPAIR_STREAMS: usize = 64;
