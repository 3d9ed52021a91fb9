//! `downpour/1` with one edge.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{
    Connection, ConnectionError, RecvStream, SendDatagramError, SendStream, ZeroRttAccepted,
};
use ring::digest::{SHA256, digest};
use tokio::{
    sync::{Semaphore, broadcast, mpsc},
    task::JoinSet,
    time::{sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{BUDGET_AGE, Early, EdgeHello, EdgeSession, HANDSHAKE_TIMEOUT, Shared};
use crate::{
    origin::{Headers, OriginEvent, OriginStream},
    repair::{
        bucket::TokenBucket,
        close,
        congestion::RepairControl,
        control::{
            CloudMessage, EdgeMessage, Hello, MAX_PATTERNS, Nonce, StreamInfo, StreamPattern,
            VERSION, Welcome,
        },
        group::{Answer, Ask},
        message::{Gone, Heartbeat, Message, MessageError, Nack, encode_repair},
        outbox::{self, Next, Outbox, Pushed, Repair},
        resend::Resender,
        stream::{ControlStream, STREAM_TIMEOUT, StreamError, read_messages},
        transport::{SERVER_DATAGRAM_BUFFER, SERVER_UNI_STREAMS},
    },
    rtp::Ssrc,
};

/// Serves one connection until it ends, and closes it; an error says why.
pub(super) async fn serve(
    shared: &Shared,
    connection: &Connection,
    early: Option<Early>,
    shutdown: &CancellationToken,
) -> Result<(), EdgeError> {
    let result = run(shared, connection, early, shutdown).await;
    match &result {
        Ok(()) if shutdown.is_cancelled() => {
            connection.close(close::SHUTDOWN, b"the cloud is shutting down");
        }
        Ok(()) => connection.close(close::DONE, b""),
        Err(error) => {
            if let Some(code) = error.code() {
                connection.close(code, error.to_string().as_bytes());
            }
            match error.code() {
                _ if matches!(error, EdgeError::Token) => shared.metrics.refused_token.inc(),
                Some(close::MALFORMED) => shared.metrics.malformed.inc(),
                Some(_) => shared.metrics.refused_edge.inc(),
                None => {}
            }
        }
    }
    result
}

async fn run(
    shared: &Shared,
    connection: &Connection,
    early: Option<Early>,
    shutdown: &CancellationToken,
) -> Result<(), EdgeError> {
    let (streams, established) = match early {
        Some(Early { control, established }) => (Some(control), Some(established)),
        None => (None, None),
    };
    let (mut control, hello) = tokio::select! {
        hello = timeout(HELLO_TIMEOUT, accept_control(connection, streams)) => {
            hello.map_err(|_| EdgeError::NoHello)??
        }
        () = shutdown.cancelled() => return Ok(()),
    };
    let nonce = Nonce(rand::random());
    let (outbox, messages) = mpsc::channel(CONTROL_BACKLOG);
    let edge = match admit(shared, connection.remote_address(), &hello, nonce, outbox) {
        Ok(edge) => edge,
        Err(error) => {
            let (code, message) = (error.word().into(), error.to_string());
            control.send(&CloudMessage::Error { code, message }).await?;
            control.finish().await;
            return Err(error);
        }
    };

    // Listening starts before the streams are listed, so that none falls between.
    let events = shared.origin.subscribe();
    let heartbeats = shared.heartbeats.subscribe();
    let settings = &shared.settings;
    control
        .send(&CloudMessage::Welcome(Welcome {
            version: VERSION,
            node: settings.node.clone(),
            nonce,
            rtp_port: settings.rtp_port,
        }))
        .await?;
    let subscription = Mutex::default();
    let mut session = ControlSession { shared, control, edge, subscription: &subscription };
    session.subscribe(hello.streams).await?;

    let (stream_tx, stream_rx) = mpsc::channel(SERVER_UNI_STREAMS as usize);
    let group = hello.group.filter(|group| group.ip().is_multicast());
    let repairer = Repairer::new(shared, connection, &subscription, group);
    tokio::select! {
        result = session.run(events, messages, shutdown) => result,
        result = repairer.run(stream_rx, heartbeats) => result,
        error = read_messages(connection, stream_tx) => Err(error.into()),
        error = unfinished(established) => Err(error),
    }
}

/// Returns if a handshake that was not complete when the edge's hello came does not complete soon.
async fn unfinished(established: Option<ZeroRttAccepted>) -> EdgeError {
    if let Some(established) = established
        && timeout(HANDSHAKE_TIMEOUT, established).await.is_err()
    {
        return EdgeError::NoHandshake;
    }
    // If it failed, the connection is gone, and all else on it ends.
    std::future::pending().await
}

/// Why a `downpour/1` connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum EdgeError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("the control stream: {0}")]
    Control(#[from] StreamError),
    #[error("no hello came in time")]
    NoHello,
    #[error("the handshake came to no end")]
    NoHandshake,
    #[error("the first message was not hello")]
    NotHello,
    #[error("hello came twice")]
    HelloTwice,
    #[error("more than {MAX_PATTERNS} stream patterns")]
    TooManyPatterns,
    #[error("the token is wrong or missing")]
    Token,
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("a message that only the cloud sends")]
    WrongWay,
}

impl EdgeError {
    /// What the connection is closed with, if it is not closed yet.
    fn code(&self) -> Option<quinn::VarInt> {
        match self {
            Self::Connection(_) | Self::Control(StreamError::Read(_) | StreamError::Write(_)) => {
                None
            }
            Self::NoHello | Self::NoHandshake => Some(close::TIMEOUT),
            Self::Token | Self::Refused(_) => Some(close::REFUSED),
            _ => Some(close::MALFORMED),
        }
    }

    /// The word for programs in the message that refuses an edge.
    fn word(&self) -> &'static str {
        if matches!(self, Self::Token) { "token" } else { "refused" }
    }
}

async fn accept_control(
    connection: &Connection,
    streams: Option<(SendStream, RecvStream)>,
) -> Result<(ControlStream, Hello), EdgeError> {
    let (send, recv) = match streams {
        Some(streams) => streams,
        None => connection.accept_bi().await?,
    };
    let mut control = ControlStream::new(send, recv, MAX_EDGE_MESSAGE);
    match control.receive().await? {
        Some(EdgeMessage::Hello(hello)) => Ok((control, hello)),
        _ => Err(EdgeError::NotHello),
    }
}

/// What the edge wants and what it was told.
#[derive(Default)]
struct Subscription {
    patterns: Vec<StreamPattern>,
    told: HashMap<Ssrc, Told>,
}

struct Told {
    stream: Arc<OriginStream>,
    headers: Headers,
}

impl Subscription {
    /// Bytes a second of the streams that the edge gets.
    fn byte_rate(&self) -> u64 {
        let rates = self.told.values().map(|told| told.stream.byte_rate());
        rates.fold(0, u64::saturating_add)
    }

    fn wants(&self, stream: &OriginStream) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(stream.key()))
    }

    /// What is to be told about a stream, given what was.
    fn news(&mut self, stream: &Arc<OriginStream>) -> Option<CloudMessage> {
        let ssrc = stream.ssrc();
        let wanted = self.wants(stream);
        match self.told.get_mut(&ssrc) {
            Some(_) if stream.ended() => {
                self.told.remove(&ssrc);
                Some(CloudMessage::StreamEnd { ssrc, last_seq: stream.newest_seq() })
            }
            Some(told) => {
                let headers = stream.headers();
                (told.headers != headers).then(|| {
                    told.headers = headers.clone();
                    CloudMessage::StreamUpdate { ssrc, headers }
                })
            }
            None if stream.ended() || !wanted => None,
            None => {
                let headers = stream.headers();
                self.told.insert(ssrc, Told { stream: stream.clone(), headers: headers.clone() });
                Some(CloudMessage::StreamUp(StreamInfo {
                    key: stream.key().clone(),
                    ssrc,
                    start_unix_ms: stream.start_unix_ms(),
                    headers,
                    gop_start: stream.gop_start(),
                    newest: stream.newest_seq(),
                }))
            }
        }
    }
}

/// The half of a session that runs on the control stream.
///
/// A slow reader holds up only this half: events then pile up in the origin's bounded channel, and
/// when that overflows the streams are listed afresh.
struct ControlSession<'a> {
    shared: &'a Shared,
    control: ControlStream,
    edge: Option<Box<dyn EdgeSession>>,
    subscription: &'a Mutex<Subscription>,
}

impl ControlSession<'_> {
    async fn run(
        &mut self,
        mut events: broadcast::Receiver<OriginEvent>,
        mut messages: mpsc::Receiver<CloudMessage>,
        shutdown: &CancellationToken,
    ) -> Result<(), EdgeError> {
        loop {
            tokio::select! {
                message = self.control.receive() => match message? {
                    None => return Ok(()),
                    Some(message) => self.handle(message).await?,
                },
                event = events.recv() => match event {
                    Ok(OriginEvent::Up(stream) | OriginEvent::Update(stream)
                        | OriginEvent::End(stream)) => self.tell(&stream).await?,
                    Err(_) => self.tell_all().await?,
                },
                Some(message) = messages.recv() => self.control.send(&message).await?,
                () = shutdown.cancelled() => {
                    self.tell_all().await?;
                    self.control.finish().await;
                    return Ok(());
                }
            }
        }
    }

    async fn handle(&mut self, message: EdgeMessage) -> Result<(), EdgeError> {
        match message {
            EdgeMessage::Hello(_) => Err(EdgeError::HelloTwice),
            EdgeMessage::Subscribe { streams } => self.subscribe(streams).await,
            EdgeMessage::Unsubscribe { streams } => {
                let mut subscription = lock(self.subscription);
                subscription.patterns.retain(|pattern| !streams.contains(pattern));
                let Subscription { patterns, told } = &mut *subscription;
                told.retain(|_, told| patterns.iter().any(|p| p.matches(told.stream.key())));
                let patterns = subscription.patterns.clone();
                drop(subscription);
                self.subscribed(&patterns);
                Ok(())
            }
            EdgeMessage::Report(report) => {
                if let Some(edge) = &mut self.edge {
                    edge.reported(report);
                }
                Ok(())
            }
            EdgeMessage::Unknown => Ok(()),
        }
    }

    async fn subscribe(&mut self, streams: Vec<StreamPattern>) -> Result<(), EdgeError> {
        let patterns = {
            let mut subscription = lock(self.subscription);
            for pattern in streams {
                if !subscription.patterns.contains(&pattern) {
                    if subscription.patterns.len() >= MAX_PATTERNS {
                        return Err(EdgeError::TooManyPatterns);
                    }
                    subscription.patterns.push(pattern);
                }
            }
            subscription.patterns.clone()
        };
        self.subscribed(&patterns);
        self.tell_all().await
    }

    fn subscribed(&mut self, patterns: &[StreamPattern]) {
        if let Some(edge) = &mut self.edge {
            edge.subscribed(patterns);
        }
    }

    async fn tell(&mut self, stream: &Arc<OriginStream>) -> Result<(), EdgeError> {
        let news = lock(self.subscription).news(stream);
        match news {
            Some(message) => Ok(self.control.send(&message).await?),
            None => Ok(()),
        }
    }

    /// Tells what has changed about all streams, those included that are no longer listed.
    async fn tell_all(&mut self) -> Result<(), EdgeError> {
        let mut streams: Vec<_> =
            lock(self.subscription).told.values().map(|told| told.stream.clone()).collect();
        let listed = self.shared.origin.streams();
        streams.retain(|told| !listed.iter().any(|stream| stream.ssrc() == told.ssrc()));
        for stream in streams.iter().chain(&listed) {
            self.tell(stream).await?;
        }
        Ok(())
    }
}

/// The half of a session that runs on datagrams.
struct Repairer<'a> {
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
    /// The multicast group that it says it listens to, if this cloud sends to groups.
    group: Option<SocketAddr>,
    /// Repairs too long for a datagram, on their way on streams.
    streams: JoinSet<()>,
    stream_slots: Arc<Semaphore>,
}

/// A packet to be sent again.
#[derive(Clone)]
struct Outgoing {
    stream: Arc<OriginStream>,
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
    fn new(
        shared: &'a Shared,
        connection: &'a Connection,
        subscription: &'a Mutex<Subscription>,
        group: Option<SocketAddr>,
    ) -> Self {
        let now = Instant::now();
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
            edge: shared.edges.fetch_add(1, Ordering::Relaxed),
            group: group.filter(|_| shared.group_sender.is_some()),
            streams: JoinSet::new(),
            stream_slots: Arc::new(Semaphore::new(MAX_REPAIR_STREAMS)),
        }
    }

    async fn run(
        mut self,
        mut streams: mpsc::Receiver<Result<Bytes, MessageError>>,
        mut heartbeats: broadcast::Receiver<Heartbeat>,
    ) -> Result<(), EdgeError> {
        loop {
            let blocked = self.blocked.map(|(until, _)| until);
            let wake = self.resender.poll_timeout().into_iter().chain(blocked).min();
            tokio::select! {
                datagram = self.connection.read_datagram() => self.handle(datagram?)?,
                Some(message) = streams.recv() => self.handle(message?)?,
                beat = heartbeats.recv() => if let Ok(beat) = beat {
                    self.heartbeat(beat)?;
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
        let deadline = outbox::deadline(now, slack, round_trip);
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

    fn heartbeat(&mut self, beat: Heartbeat) -> Result<(), EdgeError> {
        if !lock(self.subscription).told.contains_key(&beat.ssrc) {
            return Ok(());
        }
        if self.connection.max_datagram_size().is_some() && self.send_datagram(beat.encode())? {
            self.shared.metrics.heartbeats.inc();
        }
        Ok(())
    }
}

/// Lets an edge in, or says why not.
fn admit(
    shared: &Shared,
    peer: SocketAddr,
    hello: &Hello,
    nonce: Nonce,
    outbox: mpsc::Sender<CloudMessage>,
) -> Result<Option<Box<dyn EdgeSession>>, EdgeError> {
    let node = &hello.node;
    if node.is_empty() || node.len() > MAX_NODE_NAME || node.chars().any(char::is_control) {
        let reason = "the node name is empty, too long or holds control characters";
        return Err(EdgeError::Refused(reason.into()));
    }
    if let Some(token) = &shared.settings.token {
        // Hashes are compared, so that the time it takes tells nothing about the token.
        let hash = |token: &str| digest(&SHA256, token.as_bytes());
        let given = hello.token.as_deref().map(hash);
        if given.is_none_or(|given| given.as_ref() != hash(token).as_ref()) {
            return Err(EdgeError::Token);
        }
    }
    tracing::info!(%peer, node, version = hello.version, "edge said hello");
    let Some(handler) = &shared.handler else { return Ok(None) };
    let edge = EdgeHello {
        peer,
        node: node.clone(),
        token: hello.token.clone(),
        rtp_port: hello.rtp_port,
        rtp_paths: hello.rtp_paths,
        group: hello.group,
        nonce,
        outbox,
    };
    handler.hello(&edge).map(Some).map_err(EdgeError::Refused)
}

fn lock(subscription: &Mutex<Subscription>) -> MutexGuard<'_, Subscription> {
    subscription.lock().unwrap_or_else(PoisonError::into_inner)
}

const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How soon to look again whether what waits can leave.
const PATH_POLL: Duration = Duration::from_millis(1);
/// Messages that wait for the control stream; who sends them tries again.
const CONTROL_BACKLOG: usize = 16;
const MAX_REPAIR_STREAMS: usize = 64;
const MAX_NODE_NAME: usize = 128;
/// Bytes of a message from an edge; the longest is a report.
const MAX_EDGE_MESSAGE: usize = 256 * 1024;
