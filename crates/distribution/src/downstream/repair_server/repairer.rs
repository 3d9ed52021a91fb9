//! Repairs to one `downpour/1` edge: what it asks for in datagrams, and what it is sent.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{Connection, SendDatagramError};
use tokio::{
    sync::{Semaphore, broadcast, mpsc},
    task::JoinSet,
    time::{sleep_until, timeout},
};

use super::{
    BUDGET_AGE, Shared,
    downpour::{EdgeError, Subscription, lock},
    heartbeat::{Beats, Listener},
};
use crate::{
    congestion::RepairControl, control_stream::STREAM_TIMEOUT,
    downstream::outgoing::OutgoingStream, transport::SERVER_DATAGRAM_BUFFER,
};
use downpour_repair::{
    bucket::TokenBucket,
    message::{Gone, Heartbeat, Message, MessageError, Nack, encode_repair},
    multicast_repair::{Answer, Ask},
    repair_queue::{self, Next, Outbox, Pushed, Repair},
    retransmit::Resender,
};

/// The half of a session that runs on datagrams.
pub(super) struct Repairer<'a> {
    shared: &'a Shared,
    connection: &'a Connection,
    subscription: &'a Mutex<Subscription>,
    requests: TokenBucket,
    outbox: Outbox<Outgoing>,
    budget_set: Instant,
    /// Since when what is in the outbox cannot leave: until when, and why.
    blocked: Option<(Instant, Blocked)>,
    resender: Resender<Repair<Outgoing>>,
    /// Which of the cloud's edges this is.
    edge: u64,
    listener: Listener,
    /// The multicast group that it says it listens to, if this cloud sends to groups.
    group: Option<SocketAddr>,
    /// Repairs too long for a datagram, on their way on streams.
    streams: JoinSet<()>,
    stream_slots: Arc<Semaphore>,
}

/// A packet to be sent again.
#[derive(Clone)]
struct Outgoing {
    stream: Arc<OutgoingStream>,
    packet: Bytes,
    /// Where to, if not to the edge alone.
    group: Option<SocketAddr>,
}

/// What holds repairs up.
#[derive(Clone, Copy, PartialEq)]
enum Blocked {
    Budget,
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
        let (rate, burst) = shared.budget(lock(subscription).byte_rate());
        Self {
            shared,
            connection,
            subscription,
            requests: shared.request_bucket(),
            outbox: Outbox::new(now, rate, burst),
            budget_set: now,
            blocked: None,
            resender: Resender::new(),
            edge,
            listener: Listener::new(edge, latency),
            group: group.filter(|_| shared.group_sender.is_some()),
            streams: JoinSet::new(),
            stream_slots: Arc::new(Semaphore::new(MAX_REPAIR_STREAMS)),
        }
    }

    pub(super) async fn run(
        mut self,
        mut streams: mpsc::Receiver<Result<Bytes, MessageError>>,
        mut heartbeats: broadcast::Receiver<Arc<Beats>>,
    ) -> Result<(), EdgeError> {
        loop {
            let blocked = self.blocked.map(|(until, _)| until);
            let wake = self.resender.poll_timeout().into_iter().chain(blocked).min();
            tokio::select! {
                datagram = self.connection.read_datagram() => self.handle(datagram?)?,
                Some(message) = streams.recv() => self.handle(message?)?,
                beats = heartbeats.recv() => if let Ok(beats) = beats {
                    self.heartbeat(&beats)?;
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
            Ok(_) => Err(EdgeError::WrongWay),
            // Of a later version.
            Err(MessageError::UnknownType(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn repair(&mut self, nack: Nack) -> Result<(), EdgeError> {
        let metrics = &self.shared.metrics;
        let asked = nack.seqs.len() as u64;
        metrics.downpour.asked.inc_by(asked);
        let now = Instant::now();
        self.listener.ask(now);
        if !self.requests.take(now, asked) {
            metrics.dropped_flood.inc_by(asked);
            return Ok(());
        }
        let ssrc = nack.ssrc;
        let stream =
            self.shared.origin.stream(ssrc).filter(|stream| lock(self.subscription).wants(stream));
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
                packet: Outgoing { stream: stream.clone(), packet, group: None },
            };
            if self.group.is_some() && self.answer_by_group(now, round_trip, &mut repair) {
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

    /// Whether the group has the answer, or gets it now.
    fn answer_by_group(
        &mut self,
        now: Instant,
        round_trip: Duration,
        repair: &mut Repair<Outgoing>,
    ) -> bool {
        let (Some(group), Some(sender)) = (self.group, &self.shared.group_sender) else {
            return false;
        };
        let metrics = &self.shared.metrics;
        let ask = Ask {
            group,
            edge: self.edge,
            round_trip,
            ssrc: repair.ssrc,
            seq: repair.seq,
            copies: repair.further + 1,
            len: repair.len,
        };
        let answer = self.shared.groups().ask(now, ask, self.shared.group_budget(now));
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
                if !self.resender.copy(now, repair.clone(), further, within) {
                    metrics.dropped_backlog.inc_by(further.into());
                }
                true
            }
        }
    }

    fn count_group(&self, repair: &Repair<Outgoing>) {
        repair.packet.stream.repairs.add(0, 1, 0);
        self.shared.metrics.group_repairs.inc();
        self.shared.metrics.group_bytes.inc_by(repair.len as u64);
    }

    /// Puts a repair where it waits for its turn; how many more wait now.
    fn queue(&mut self, repair: Repair<Outgoing>) -> usize {
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

    /// Counts those of the repairs just queued that could not leave.
    fn count_deferred(&self, queued: usize) {
        let deferred = queued.min(self.outbox.len()) as u64;
        match self.blocked {
            Some((_, Blocked::Budget)) => self.shared.metrics.deferred_budget.inc_by(deferred),
            Some((_, Blocked::Path)) => self.shared.metrics.deferred_path.inc_by(deferred),
            None => {}
        }
    }

    /// Sends the copies that are due, and what has waited.
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
            // Copies are asked for near the deadline, which is an estimate: with budget to spare
            // each goes out when it is due.
            copy.deadline = copy.deadline.max(now);
            copy.further = 0;
            queued += self.queue(copy);
        }
        self.flush(now)?;
        self.count_deferred(queued);
        Ok(())
    }

    /// Sends what is most urgent, as far as budget and path allow.
    fn flush(&mut self, now: Instant) -> Result<(), EdgeError> {
        self.blocked = None;
        if self.outbox.is_empty() {
            return Ok(());
        }
        if now.saturating_duration_since(self.budget_set) >= BUDGET_AGE {
            let (rate, burst) = self.shared.budget(lock(self.subscription).byte_rate());
            self.outbox.set_budget(now, rate, burst);
            self.budget_set = now;
        }
        // What quinn holds it sends in the order in which it came, so it gets no more than goes
        // out in about a round trip: the rest waits where the urgent can overtake it.
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
                    // Small steps would only cost time: a packet or so at once.
                    self.blocked = Some((until.max(now + PATH_POLL), Blocked::Budget));
                    break;
                }
                Next::Idle => break,
            }
        }
        Ok(())
    }

    /// Sends a packet once more, if the path has room for it, and plans its copies.
    fn send_repair(&mut self, now: Instant, repair: Repair<Outgoing>) -> Result<(), EdgeError> {
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
        if !self.resender.copy(now, repair, further, within) {
            metrics.dropped_backlog.inc_by(further.into());
        }
        Ok(())
    }

    /// Whether there was room.
    fn send_datagram(&mut self, datagram: Bytes) -> Result<bool, EdgeError> {
        // Without this check quinn would make room by dropping older ones, uncounted.
        if self.connection.datagram_send_buffer_space() < datagram.len() {
            self.shared.metrics.dropped_backlog.inc();
            return Ok(false);
        }
        match self.connection.send_datagram(datagram.clone()) {
            Ok(()) => Ok(true),
            Err(SendDatagramError::ConnectionLost(error)) => Err(error.into()),
            // The path became smaller this very moment, or the edge takes none.
            Err(_) => Ok(self.send_stream(datagram)),
        }
    }

    /// Whether there was a stream to be had.
    fn send_stream(&mut self, message: Bytes) -> bool {
        while self.streams.try_join_next().is_some() {}
        let Ok(slot) = self.stream_slots.clone().try_acquire_owned() else {
            self.shared.metrics.dropped_streams.inc();
            return false;
        };
        let connection = self.connection.clone();
        self.streams.spawn(async move {
            let _slot = slot;
            // Later than this it would be of no use; dropping the stream resets it.
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

    fn heartbeat(&mut self, beats: &Beats) -> Result<(), EdgeError> {
        let beats: Vec<_> = {
            let subscription = lock(self.subscription);
            let beats = beats.to(&self.listener, Instant::now());
            beats.filter(|beat| subscription.was_told(beat.ssrc)).collect()
        };
        let Some(max_len) = self.connection.max_datagram_size() else { return Ok(()) };
        for datagram in Heartbeat::encode(&beats, max_len) {
            if self.send_datagram(datagram)? {
                self.shared.metrics.heartbeats.inc();
            }
        }
        Ok(())
    }
}

/// How soon to look again whether what waits can leave.
const PATH_POLL: Duration = Duration::from_millis(4);
const MAX_REPAIR_STREAMS: usize = 64;
