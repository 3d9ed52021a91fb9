//! One socket of a fan-out worker: sends packet trains to many targets in few system calls, and handles
//! the kernel's refusals.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    FanoutMetrics,
    gso::{GsoState, is_gso_error},
    metrics::SendErrorKind,
};
use crate::downstream::routes::Target;
use downpour_sys::sendmmsg::{Batch, Message, Messages, set_segment, wait_writable};
use downpour_sys::{KeyedLogLimit, LogLimit, pktinfo};

/// The socket calls that a [`UdpSender`] makes. Only `wait_writable` and `pause` block.
pub(super) trait SendSocket {
    /// As [`Messages::send`].
    fn send(&self, messages: &mut Messages<'_, '_>, first: usize) -> io::Result<usize>;

    /// Sends one datagram.
    fn send_one(&self, to: Target, packet: &[u8]) -> io::Result<()>;

    /// Sets the segment size of messages without a control message (`UDP_SEGMENT`) in bytes; 0 switches
    /// segmentation off.
    fn set_segment(&self, segment: u16) -> io::Result<()>;

    /// Blocks until the send buffer has room for a datagram, for at most `timeout`.
    fn wait_writable(&self, timeout: Duration);

    /// Blocks for `time`, where the kernel does not signal when there is room.
    fn pause(&self, time: Duration);
}

/// Sender of one worker on one socket. Several workers may share the socket.
///
/// Packets are collected in a [`Round`]. The kernel's answers decide what happens to a message:
///
/// | answer | reaction |
/// |---|---|
/// | accepted | count it; renew the round's send timeout |
/// | EAGAIN, ENOBUFS, ECONNREFUSED, EINTR | wait for room and retry, until the send timeout is used up |
/// | GSO refused, segment size was the socket's option | clear the option, retry |
/// | GSO refused | send the packets one by one, remember the target |
/// | any other error, or timeout | drop the message, count its packets as errors |
pub(super) struct UdpSender<S = UdpSocket> {
    socket: Arc<S>,
    /// Count of successful send calls on the socket, by all workers that share it.
    progress: Arc<AtomicU64>,
    gso: GsoState,
    batch: Batch,
    log: SendLog,
    metrics: FanoutMetrics,
}

impl<S: SendSocket> UdpSender<S> {
    /// `max_segments` is the most datagrams that the kernel splits one message into; 1 without GSO.
    /// `is_exclusive` is `true` if nobody else sends from the socket. `progress` is shared by all
    /// senders of the socket.
    pub(super) fn new(
        socket: Arc<S>,
        max_segments: usize,
        is_exclusive: bool,
        progress: Arc<AtomicU64>,
        metrics: FanoutMetrics,
    ) -> Self {
        let gso = GsoState::new(max_segments, is_exclusive);
        if gso.max_segments > 1 {
            metrics.gso_sockets.inc();
        }
        Self { socket, progress, gso, batch: Batch::new(), log: SendLog::new(), metrics }
    }

    /// Starts a round of sends. Messages may stay in it until [`Round::flush`].
    pub(super) fn round<'a>(&mut self) -> Round<'_, 'a, S> {
        Round {
            socket: &self.socket,
            progress: &self.progress,
            seen_progress: self.progress.load(Ordering::Relaxed),
            gso: &mut self.gso,
            messages: self.batch.begin(),
            log: &mut self.log,
            metrics: &self.metrics,
            timeout_left: SEND_TIMEOUT,
        }
    }
}

/// Round of sends that share system calls and one send timeout.
pub(super) struct Round<'o, 'a, S = UdpSocket> {
    socket: &'o S,
    progress: &'o AtomicU64,
    /// The value of `progress` that last renewed the timeout.
    seen_progress: u64,
    gso: &'o mut GsoState,
    messages: Messages<'o, 'a>,
    log: &'o mut SendLog,
    metrics: &'o FanoutMetrics,
    /// How much longer the round may wait while the kernel accepts nothing.
    timeout_left: Duration,
}

impl<'a, S: SendSocket> Round<'_, 'a, S> {
    /// The longest piece of a train, in bytes, that fits in one message. At least one packet of
    /// `stride` bytes.
    pub(super) fn max_piece_len(&self, stride: usize) -> usize {
        self.gso.max_segments.min(MAX_MESSAGE / stride.max(1)).max(1) * stride.max(1)
    }

    /// Sends a piece of a train as datagrams of `stride` bytes. The last one may be shorter.
    #[inline]
    pub(super) fn send(&mut self, to: impl Into<Target>, piece: &'a [u8], stride: usize) {
        let Target { addr: to, from } = to.into();
        if piece.len() <= stride {
            return self.push(Message { to, from, bytes: piece, segment: 0 });
        }
        if self.gso.is_on_for(to) {
            let segment = stride as u16;
            if segment != self.messages.default_segment() {
                self.want_option(segment);
            }
            return self.push(Message { to, from, bytes: piece, segment });
        }
        for packet in piece.chunks(stride) {
            self.push(Message { to, from, bytes: packet, segment: 0 });
        }
    }

    /// Sends the messages that are still in the round.
    pub(super) fn flush(&mut self) {
        let mut next = 0;
        let mut sent = Sent::default();
        while next < self.messages.len() {
            let result = self.socket.send(&mut self.messages, next);
            sent.calls += 1;
            match result {
                Ok(count) => {
                    for (len, segment) in self.messages.lengths().skip(next).take(count) {
                        sent.add(len, segment);
                        if segment > 0 {
                            self.gso.accepted();
                        }
                    }
                    next += count;
                    // A key frame to a thousand edges takes half a second on a 1 Gbit/s interface:
                    // while the kernel accepts messages, the queue provides the backpressure.
                    if count > 0 {
                        self.made_progress();
                    }
                }
                Err(error) => {
                    if let Some(message) = self.messages.get(next)
                        && !self.wait_to_retry(&error)
                        && !self.clear_option(&error)
                    {
                        self.handle_failure(&message, error, &mut sent);
                        next += 1;
                    }
                }
            }
        }
        self.messages.clear();
        if let Some(error) = sent.congestion {
            self.log.congestion(Instant::now(), &error);
        }
        let metrics = self.metrics;
        metrics.calls.inc_by(sent.calls);
        metrics.datagrams.inc_by(sent.datagrams);
        metrics.bytes.inc_by(sent.bytes);
    }

    /// Makes `segment` the socket's option once enough messages in a row want it.
    fn want_option(&mut self, segment: u16) {
        // The messages that are in the round rely on the current option.
        if self.gso.wants_option(segment) && self.messages.is_empty() {
            match self.socket.set_segment(segment) {
                Ok(()) => self.messages.set_default_segment(segment),
                Err(_) => self.gso.forbid_option(),
            }
        }
    }

    /// Clears the socket's segment option if it is set and may be the cause of `error`: with it, the
    /// kernel refuses even short messages on a route that cannot segment (IPsec) or has a small MTU.
    /// Returns `true` if the send is to be retried.
    fn clear_option(&mut self, error: &io::Error) -> bool {
        let is_cause = self.messages.default_segment() > 0 && is_gso_error(error);
        if is_cause {
            self.gso.forbid_option();
            self.messages.set_default_segment(0);
            if let Err(error) = self.socket.set_segment(0) {
                tracing::warn!(%error, "UDP_SEGMENT cannot be cleared; RTP datagrams may have wrong lengths");
            }
        }
        is_cause
    }

    #[inline]
    fn push(&mut self, message: Message<'a>) {
        self.messages.push(message);
        if self.messages.is_full() {
            self.flush();
        }
    }

    fn made_progress(&mut self) {
        self.timeout_left = SEND_TIMEOUT;
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Waits if `error` is temporary and the send timeout is not used up. Returns `true` if the send is
    /// to be retried.
    fn wait_to_retry(&mut self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            Some(libc::EINTR) => true,
            // A pending ICMP error of an earlier datagram. The call has cleared it.
            Some(libc::ECONNREFUSED) => self.wait(|_| ()),
            Some(libc::EAGAIN) => {
                // Another worker may have used the room: that counts as progress of the socket.
                let progress = self.progress.load(Ordering::Relaxed);
                if std::mem::replace(&mut self.seen_progress, progress) != progress {
                    self.timeout_left = SEND_TIMEOUT;
                }
                self.wait(|socket| socket.wait_writable(SEND_TIMEOUT))
            }
            // A queue below the socket is full. The kernel does not signal when it has room.
            Some(libc::ENOBUFS) => self.wait(|socket| socket.pause(QUEUE_PAUSE)),
            _ => false,
        }
    }

    fn wait(&mut self, wait: impl FnOnce(&S)) -> bool {
        if self.timeout_left.is_zero() {
            return false;
        }
        let began = Instant::now();
        wait(self.socket);
        // At least QUEUE_PAUSE per wait, so that the number of retries is bounded.
        self.timeout_left = self.timeout_left.saturating_sub(began.elapsed().max(QUEUE_PAUSE));
        true
    }

    fn handle_failure(&mut self, message: &Message<'a>, error: io::Error, sent: &mut Sent) {
        if message.segment > 0 && is_gso_error(&error) {
            self.gso.refused(message.to, &error, self.metrics);
            let to = Target { addr: message.to, from: message.from };
            for packet in message.bytes.chunks(usize::from(message.segment)) {
                self.send_one(to, packet, sent);
            }
            return;
        }
        let packets = packets(message.bytes.len(), message.segment);
        self.fail(message.to, packets, error, sent);
    }

    fn send_one(&mut self, to: Target, packet: &[u8], sent: &mut Sent) {
        loop {
            sent.calls += 1;
            match self.socket.send_one(to, packet) {
                Ok(()) => {
                    self.made_progress();
                    return sent.add(packet.len(), 0);
                }
                Err(error) if self.wait_to_retry(&error) => {}
                Err(error) => return self.fail(to.addr, 1, error, sent),
            }
        }
    }

    fn fail(&mut self, to: SocketAddr, packets: u64, error: io::Error, sent: &mut Sent) {
        let kind = SendErrorKind::from(&error);
        self.metrics.errors(kind).inc_by(packets);
        // Congestion may fail most messages of a flush, so it is logged once, at the end.
        match kind.is_congestion() {
            true => sent.congestion = Some(error),
            false => self.log.target(Instant::now(), to, kind, &error),
        }
    }
}

impl SendSocket for UdpSocket {
    #[inline]
    fn send(&self, messages: &mut Messages<'_, '_>, first: usize) -> io::Result<usize> {
        messages.send(self, first)
    }

    fn send_one(&self, to: Target, packet: &[u8]) -> io::Result<()> {
        // The socket is in blocking mode, because a thread reads it; this does not block.
        pktinfo::send(self, packet, to.addr, to.from)
    }

    fn set_segment(&self, segment: u16) -> io::Result<()> {
        set_segment(self, segment)
    }

    fn wait_writable(&self, timeout: Duration) {
        wait_writable(self, timeout);
    }

    fn pause(&self, time: Duration) {
        thread::sleep(time);
    }
}

/// Log lines of failed sends, at most one per [`LOG_INTERVAL`] and cause.
struct SendLog {
    targets: KeyedLogLimit<(SocketAddr, SendErrorKind)>,
    congestion: LogLimit,
}

impl SendLog {
    fn new() -> Self {
        let targets = KeyedLogLimit::every(LOG_INTERVAL, MAX_LOGGED_TARGETS);
        Self { targets, congestion: LogLimit::every(LOG_INTERVAL) }
    }

    fn target(&mut self, now: Instant, to: SocketAddr, kind: SendErrorKind, error: &io::Error) {
        if let Some(missed) = self.targets.due(now, (to, kind)) {
            tracing::warn!(target = %to, %error, missed, "RTP send failed");
        }
    }

    fn congestion(&mut self, now: Instant, error: &io::Error) {
        if let Some(missed) = self.congestion.due(now) {
            let waited_ms = SEND_TIMEOUT.as_millis() as u64;
            tracing::warn!(waited_ms, %error, missed, "RTP dropped: the kernel accepts no packets");
        }
    }
}

/// Totals of one flush.
#[derive(Default)]
struct Sent {
    calls: u64,
    datagrams: u64,
    bytes: u64,
    /// The latest error by which packets were dropped because of congestion.
    congestion: Option<io::Error>,
}

impl Sent {
    #[inline]
    fn add(&mut self, len: usize, segment: u16) {
        self.bytes += len as u64;
        self.datagrams += packets(len, segment);
    }
}

/// The number of datagrams of a message.
#[inline]
fn packets(len: usize, segment: u16) -> u64 {
    match u32::from(segment) {
        0 => 1,
        // A message is at most 64 KiB, and a division of 32 bits is faster than one of 64.
        segment => u64::from((len as u32).div_ceil(segment)),
    }
}

/// Most bytes of a message with GSO: the largest UDP payload of IPv4.
const MAX_MESSAGE: usize = 65_507;
/// How long a round waits while the kernel accepts nothing; its other targets wait too.
const SEND_TIMEOUT: Duration = Duration::from_millis(20);
/// Wait while a queue is full: about the time that a 1 Gbit/s interface takes for fifty packets.
const QUEUE_PAUSE: Duration = Duration::from_micros(500);
/// Most pairs of target and error with a log limit each.
const MAX_LOGGED_TARGETS: usize = 10_000;
/// Least time between two log lines of one cause.
pub(super) const LOG_INTERVAL: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests;
