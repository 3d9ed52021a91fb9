//! `downpour/1` with one edge.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use quinn::{Connection, ConnectionError, RecvStream, SendStream, ZeroRttAccepted};
use ring::digest::{SHA256, digest};
use tokio::{
    sync::{broadcast, mpsc},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Early, EdgeHello, EdgeSession, HANDSHAKE_TIMEOUT, Shared, repairer::Repairer};
use crate::{
    control_stream::{ControlStream, StreamError, read_messages},
    downstream::outgoing::{OutgoingEvent, OutgoingStream},
    protocol::close,
    transport::SERVER_UNI_STREAMS,
};
use downpour_media::{StreamPattern, flv::Headers};
use downpour_repair::{
    control::{
        CloudMessage, EdgeMessage, Hello, MAX_EDGE_MESSAGE, MAX_PATTERNS, Nonce, StreamInfo,
        VERSION, Welcome,
    },
    message::MessageError,
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
    let latency = Duration::from_millis(hello.latency_ms.into());
    let repairer = Repairer::new(shared, connection, &subscription, group, latency);
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
pub(super) struct Subscription {
    patterns: Vec<StreamPattern>,
    told: HashMap<Ssrc, Told>,
}

struct Told {
    stream: Arc<OutgoingStream>,
    headers: Headers,
}

impl Subscription {
    /// Bytes a second of the streams that the edge gets.
    pub(super) fn byte_rate(&self) -> u64 {
        let rates = self.told.values().map(|told| told.stream.byte_rate());
        rates.fold(0, u64::saturating_add)
    }

    pub(super) fn was_told(&self, ssrc: Ssrc) -> bool {
        self.told.contains_key(&ssrc)
    }

    pub(super) fn wants(&self, stream: &OutgoingStream) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(stream.key()))
    }

    /// What is to be told about a stream, given what was.
    pub(super) fn news(&mut self, stream: &Arc<OutgoingStream>) -> Option<CloudMessage> {
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
                let gop_start = stream.gop_start();
                // While the group's first burst is on its way, none of it has been sent. Who is to
                // get that burst must not ask for it, and who joins too late for it asks when a
                // heartbeat tells that it has left; both begin with it.
                let newest = stream
                    .left_seq()
                    .filter(|left| gop_start.is_none_or(|first| left.distance_from(first) >= 0));
                Some(CloudMessage::StreamUp(StreamInfo {
                    key: stream.key().clone(),
                    ssrc,
                    start_unix_ms: stream.start_unix_ms(),
                    headers,
                    gop_start,
                    newest,
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
        mut events: broadcast::Receiver<OutgoingEvent>,
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
                    Ok(OutgoingEvent::Up(stream) | OutgoingEvent::Update(stream)
                        | OutgoingEvent::End(stream)) => self.tell(&stream).await?,
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

    async fn tell(&mut self, stream: &Arc<OutgoingStream>) -> Result<(), EdgeError> {
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
        parity: hello.parity,
        latency: Duration::from_millis(hello.latency_ms.into()),
        nonce,
        outbox,
    };
    handler.hello(&edge).map(Some).map_err(EdgeError::Refused)
}

pub(super) fn lock(subscription: &Mutex<Subscription>) -> MutexGuard<'_, Subscription> {
    subscription.lock().unwrap_or_else(PoisonError::into_inner)
}

const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Messages that wait for the control stream; who sends them tries again.
const CONTROL_BACKLOG: usize = 16;
const MAX_NODE_NAME: usize = 128;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use downpour_media::flv::{Tag, TagKind};
    use downpour_repair::{
        history::History,
        receiver::{Receiver, Settings},
        rtp::{Packetizer, Seq},
    };

    /// What is told of a publication to an edge that comes now.
    fn told(stream: &Arc<OutgoingStream>) -> (Option<Seq>, Option<Seq>) {
        let mut subscription = Subscription::default();
        subscription.patterns.push(StreamPattern::All);
        match subscription.news(stream) {
            Some(CloudMessage::StreamUp(up)) => (up.gop_start, up.newest),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_comes_while_a_key_frame_leaves_begins_with_it_and_asks_when_it_has_left() {
        let now = Instant::now();
        let history = History::new(100, Duration::from_secs(10));
        let stream = OutgoingStream::new("live/a".parse().unwrap(), Ssrc(1), 0, history);
        let stream = Arc::new(stream);
        stream.leaves_later();
        let mut packetizer = Packetizer::new(Ssrc(1), 1120);
        let mut push = |is_key: bool| {
            let burst = packetizer.packetize(&Tag::new(TagKind::Video, 0, &[7; 5000]).unwrap());
            stream.push(now, burst.clone(), is_key);
            (
                burst.first_seq(),
                burst.last_seq(),
                OutgoingStream::departure(&stream, burst.last_seq()),
            )
        };
        assert_eq!(told(&stream), (None, None));
        let (key, last, departure) = push(true);
        assert_eq!(told(&stream), (Some(key), None));
        drop(departure);
        assert_eq!(told(&stream), (Some(key), Some(last)));
        let (before, _, departure) = push(false);
        assert_eq!(told(&stream), (Some(key), Some(last)));
        drop(departure);
        let (key, last, departure) = push(true);
        assert_eq!(told(&stream), (Some(key), None));

        let mut receiver = Receiver::starting_at(Settings::default(), key);
        receiver.handle_heartbeat(now, before);
        assert_eq!(receiver.poll_timeout(), None, "it is on its way");
        drop(departure);
        assert_eq!(told(&stream), (Some(key), Some(last)));
        receiver.handle_heartbeat(now, last);
        assert!(receiver.poll_timeout().is_some());
    }
}
