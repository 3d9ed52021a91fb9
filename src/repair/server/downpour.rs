//! `downpour/1` with one edge.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use quinn::{Connection, ConnectionError, SendDatagramError};
use ring::digest::{SHA256, digest};
use tokio::{
    sync::{Semaphore, broadcast, mpsc},
    task::JoinSet,
    time::{sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{EdgeHello, EdgeSession, Shared, bucket::TokenBucket};
use crate::{
    origin::{Headers, OriginEvent, OriginStream},
    repair::{
        close,
        control::{
            CloudMessage, EdgeMessage, Hello, Nonce, StreamInfo, StreamPattern, VERSION, Welcome,
        },
        message::{Gone, Heartbeat, Message, MessageError, Nack, encode_repair},
        resend::Resender,
        stream::{ControlStream, STREAM_TIMEOUT, StreamError, read_messages},
        transport::SERVER_UNI_STREAMS,
    },
    rtp::Ssrc,
};

/// Serves one connection until it ends, and closes it; an error says why.
pub(super) async fn serve(
    shared: &Shared,
    connection: &Connection,
    shutdown: &CancellationToken,
) -> Result<(), EdgeError> {
    let result = run(shared, connection, shutdown).await;
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
    shutdown: &CancellationToken,
) -> Result<(), EdgeError> {
    let (mut control, hello) = tokio::select! {
        hello = timeout(HELLO_TIMEOUT, accept_control(connection)) => {
            hello.map_err(|_| EdgeError::NoHello)??
        }
        () = shutdown.cancelled() => return Ok(()),
    };
    let nonce = Nonce(rand::random());
    let edge = match admit(shared, connection.remote_address(), &hello, nonce) {
        Ok(edge) => edge,
        Err(message) => {
            let error = CloudMessage::Error { code: "refused".into(), message: message.clone() };
            control.send(&error).await?;
            control.finish().await;
            return Err(EdgeError::Refused(message));
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
    let repairer = Repairer::new(shared, connection, &subscription);
    tokio::select! {
        result = session.run(events, shutdown) => result,
        result = repairer.run(stream_rx, heartbeats) => result,
        error = read_messages(connection, stream_tx) => Err(error.into()),
    }
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
    #[error("the first message was not hello")]
    NotHello,
    #[error("hello came twice")]
    HelloTwice,
    #[error("more than {MAX_PATTERNS} stream patterns")]
    TooManyPatterns,
    #[error("refused: {0}")]
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
            Self::NoHello => Some(close::TIMEOUT),
            Self::Refused(_) => Some(close::REFUSED),
            _ => Some(close::MALFORMED),
        }
    }
}

async fn accept_control(connection: &Connection) -> Result<(ControlStream, Hello), EdgeError> {
    let (send, recv) = connection.accept_bi().await?;
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
    bytes: TokenBucket,
    resender: Resender<(Arc<OriginStream>, Bytes)>,
    /// Repairs too long for a datagram, on their way on streams.
    streams: JoinSet<()>,
    stream_slots: Arc<Semaphore>,
}

impl<'a> Repairer<'a> {
    fn new(
        shared: &'a Shared,
        connection: &'a Connection,
        subscription: &'a Mutex<Subscription>,
    ) -> Self {
        let settings = &shared.settings;
        Self {
            shared,
            connection,
            subscription,
            requests: shared.request_bucket(),
            bytes: TokenBucket::new(Instant::now(), settings.repair_rate, settings.repair_burst),
            resender: Resender::new(),
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
            let next_copy = self.resender.poll_timeout();
            tokio::select! {
                datagram = self.connection.read_datagram() => self.handle(datagram?)?,
                Some(message) = streams.recv() => self.handle(message?)?,
                beat = heartbeats.recv() => if let Ok(beat) = beat {
                    self.heartbeat(beat)?;
                },
                () = sleep_until(next_copy.unwrap_or_else(Instant::now).into()),
                    if next_copy.is_some() => self.send_copies()?,
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
        let stream = self
            .shared
            .origin
            .stream(nack.ssrc)
            .filter(|stream| lock(self.subscription).wants(stream));
        self.resender.set_round_trip(self.connection.rtt());
        let mut gone = Vec::new();
        let mut fresh = 0;
        for seq in nack.seqs {
            let packet = stream.as_ref().and_then(|stream| stream.packet(seq));
            let (Some(stream), Some(packet)) = (&stream, packet) else {
                gone.push(seq);
                continue;
            };
            if !self.resender.is_new(now, nack.ssrc, seq) {
                metrics.repeated.inc();
                continue;
            }
            fresh += 1;
            if !self.send_repair(stream, &packet)? {
                self.resender.not_sent(nack.ssrc, seq);
                continue;
            }
            let further = nack.copies - 1;
            if !self.resender.copy(now, (stream.clone(), packet), further) {
                metrics.dropped_backlog.inc_by(further.into());
            }
        }
        if let Some(stream) = &stream {
            let gone = gone.len() as u64;
            stream.repairs.add(fresh + gone, 0, gone);
        }
        metrics.downpour.gone.inc_by(gone.len() as u64);
        let max_len = self.connection.max_datagram_size().unwrap_or(Message::MAX_LEN);
        for datagram in (Gone { ssrc: nack.ssrc, seqs: gone }).encode(max_len) {
            self.send_datagram(datagram)?;
        }
        Ok(())
    }

    fn send_copies(&mut self) -> Result<(), EdgeError> {
        let now = Instant::now();
        while let Some((stream, packet)) = self.resender.poll_copy(now) {
            self.send_repair(&stream, &packet)?;
        }
        Ok(())
    }

    /// Sends a packet once more, if the budget and the path have room for it; says whether.
    fn send_repair(&mut self, stream: &OriginStream, packet: &Bytes) -> Result<bool, EdgeError> {
        let metrics = &self.shared.metrics;
        if !self.bytes.take(Instant::now(), packet.len() as u64) {
            metrics.dropped_budget.inc();
            return Ok(false);
        }
        let message = encode_repair(packet);
        let fits = self.connection.max_datagram_size().is_some_and(|max| message.len() <= max);
        let sent = if fits { self.send_datagram(message)? } else { self.send_stream(message) };
        if sent {
            stream.repairs.add(0, 1, 0);
            metrics.downpour.repairs.inc();
            metrics.downpour.repair_bytes.inc_by(packet.len() as u64);
        }
        Ok(sent)
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
) -> Result<Option<Box<dyn EdgeSession>>, String> {
    let node = &hello.node;
    if node.is_empty() || node.len() > MAX_NODE_NAME || node.chars().any(char::is_control) {
        return Err("the node name is empty, too long or holds control characters".into());
    }
    if let Some(token) = &shared.settings.token {
        // Hashes are compared, so that the time it takes tells nothing about the token.
        let hash = |token: &str| digest(&SHA256, token.as_bytes());
        let given = hello.token.as_deref().map(hash);
        if given.is_none_or(|given| given.as_ref() != hash(token).as_ref()) {
            return Err("the token is wrong or missing".into());
        }
    }
    tracing::info!(%peer, node, version = hello.version, "edge said hello");
    let Some(handler) = &shared.handler else { return Ok(None) };
    let edge = EdgeHello {
        peer,
        node: node.clone(),
        token: hello.token.clone(),
        rtp_port: hello.rtp_port,
        nonce,
    };
    handler.hello(&edge).map(Some)
}

fn lock(subscription: &Mutex<Subscription>) -> MutexGuard<'_, Subscription> {
    subscription.lock().unwrap_or_else(PoisonError::into_inner)
}

const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_REPAIR_STREAMS: usize = 64;
const MAX_PATTERNS: usize = 1024;
const MAX_NODE_NAME: usize = 128;
/// Bytes of a message from an edge; the longest is a report.
const MAX_EDGE_MESSAGE: usize = 256 * 1024;
