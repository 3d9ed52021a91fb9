//! Session of one `downpour/1` edge: hello, admission, and the control stream.
//!
//! ```text
//! control stream ──hello──> admit ──welcome──> serving ──edge finished, shutdown or error──> closed
//!       │ no hello in 5 s     │ token, handler
//!       v                     v
//!     closed           error, then closed
//! ```
//!
//! While serving, the session announces each stream that matches the subscription: `stream_up` once,
//! `stream_update` per change of headers, `stream_data` per script tag, `stream_end` once. Events of streams arrive over a bounded
//! channel; if that overflows, all streams are compared with their last announcement instead.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
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
use downpour_media::{
    StreamPattern,
    flv::{Headers, Tag},
};
use downpour_repair::{
    control::{
        CloudMessage, EdgeMessage, Hello, MAX_EDGE_MESSAGE, MAX_PATTERNS, Nonce, StreamInfo,
        VERSION, Welcome,
    },
    message::MessageError,
    rtp::Ssrc,
};

/// Serves one connection until it ends, and closes it. Returns the reason as an error, unless the edge
/// or the shutdown ended it.
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
    let (outbox, messages) = mpsc::channel(OUTBOX_CAPACITY);
    let edge = match admit(shared, connection.remote_address(), &hello, nonce, outbox) {
        Ok(edge) => edge,
        Err(error) => {
            let (code, message) = (error.word().into(), error.to_string());
            control.send(&CloudMessage::Error { code, message }).await?;
            control.finish().await;
            return Err(error);
        }
    };

    // Subscribe before listing the streams, so that none is missed in between.
    let events = shared.outgoing.subscribe();
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
    let mut session =
        ControlSession { shared, control, edge, subscription: &subscription, said_closing: false };
    session.subscribe(hello.streams).await?;

    let (stream_tx, stream_rx) = mpsc::channel(SERVER_UNI_STREAMS as usize);
    let group = hello.group.filter(|group| group.ip().is_multicast());
    let latency = Duration::from_millis(hello.latency_ms.into());
    let repairer = Repairer::new(shared, connection, &subscription, group, latency);
    tokio::select! {
        result = session.run(events, messages, shutdown) => result,
        result = repairer.run(stream_rx, heartbeats) => result,
        error = read_messages(connection, stream_tx) => Err(error.into()),
        error = handshake_timeout(established) => Err(error),
    }
}

/// Returns only if the handshake of a connection with early data does not complete in time.
async fn handshake_timeout(established: Option<ZeroRttAccepted>) -> EdgeError {
    if let Some(established) = established
        && timeout(HANDSHAKE_TIMEOUT, established).await.is_err()
    {
        return EdgeError::NoHandshake;
    }
    // If the handshake failed, the connection is closed and the other futures end.
    std::future::pending().await
}

/// Why a `downpour/1` connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum EdgeError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("control stream: {0}")]
    Control(#[from] StreamError),
    #[error("no hello came in time")]
    NoHello,
    #[error("the handshake did not complete in time")]
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
    WrongDirection,
}

impl EdgeError {
    /// `true` if the edge was not admitted.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Token | Self::Refused(_))
    }

    /// The code to close the connection with; `None` if it is closed already.
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

    /// The machine-readable code of the `error` message to a refused edge.
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

/// An edge's subscription, and the streams that were announced to it.
#[derive(Default)]
pub(super) struct Subscription {
    patterns: Vec<StreamPattern>,
    announced: HashMap<Ssrc, Announced>,
}

/// A stream as it was announced last.
struct Announced {
    stream: Arc<OutgoingStream>,
    headers: Headers,
}

impl Subscription {
    /// Byte rate of the announced streams, in bytes per second.
    pub(super) fn byte_rate(&self) -> u64 {
        let rates = self.announced.values().map(|announced| announced.stream.byte_rate());
        rates.fold(0, u64::saturating_add)
    }

    pub(super) fn has_announced(&self, ssrc: Ssrc) -> bool {
        self.announced.contains_key(&ssrc)
    }

    pub(super) fn wants(&self, stream: &OutgoingStream) -> bool {
        self.patterns.iter().any(|pattern| pattern.matches(stream.key()))
    }

    /// The announcement that is due for a stream, if any. The caller must send it.
    pub(super) fn announcement(&mut self, stream: &Arc<OutgoingStream>) -> Option<CloudMessage> {
        let ssrc = stream.ssrc();
        let wanted = self.wants(stream);
        match self.announced.get_mut(&ssrc) {
            Some(_) if stream.ended() => {
                self.announced.remove(&ssrc);
                Some(CloudMessage::StreamEnd { ssrc, last_seq: stream.newest_seq() })
            }
            Some(announced) => {
                let headers = stream.headers();
                (announced.headers != headers).then(|| {
                    announced.headers = headers.clone();
                    CloudMessage::StreamUpdate { ssrc, headers }
                })
            }
            None if stream.ended() || !wanted => None,
            None => {
                let headers = stream.headers();
                let announced = Announced { stream: stream.clone(), headers: headers.clone() };
                self.announced.insert(ssrc, announced);
                let gop_start = stream.gop_start();
                // While the pacer holds the GOP's first burst, announce no newest packet: an edge that
                // will receive the burst must not request it. An edge that joins too late to receive it
                // requests it after the next heartbeat. Both start with this GOP.
                let newest = stream
                    .sent_seq()
                    .filter(|sent| gop_start.is_none_or(|first| sent.distance_from(first) >= 0));
                Some(CloudMessage::StreamUp(StreamInfo {
                    key: stream.key().clone(),
                    ssrc,
                    publication: Some(stream.id()),
                    start_unix_ms: stream.start_unix_ms(),
                    headers,
                    gop_start,
                    newest,
                }))
            }
        }
    }
}

/// The control-stream half of a session.
///
/// An edge that reads slowly stalls only this half. Events wait in a bounded channel meanwhile; if it
/// overflows, all streams are announced again.
struct ControlSession<'a> {
    shared: &'a Shared,
    control: ControlStream,
    edge: Option<Box<dyn EdgeSession>>,
    subscription: &'a Mutex<Subscription>,
    /// `true` once the edge was notified of the shutdown.
    said_closing: bool,
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
                        | OutgoingEvent::End(stream)) => self.announce(&stream).await?,
                    Ok(OutgoingEvent::Data(stream, tag)) => self.send_data(&stream, tag).await?,
                    Err(_) => self.announce_all().await?,
                },
                Some(message) = messages.recv() => self.control.send(&message).await?,
                () = shutdown.cancelled() => {
                    self.announce_all().await?;
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
                let mut subscription = self.subscription.lock();
                subscription.patterns.retain(|pattern| !streams.contains(pattern));
                let Subscription { patterns, announced } = &mut *subscription;
                announced.retain(|_, known| patterns.iter().any(|p| p.matches(known.stream.key())));
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
            let mut subscription = self.subscription.lock();
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
        self.announce_all().await
    }

    fn subscribed(&mut self, patterns: &[StreamPattern]) {
        if let Some(edge) = &mut self.edge {
            edge.subscribed(patterns);
        }
    }

    async fn announce(&mut self, stream: &Arc<OutgoingStream>) -> Result<(), EdgeError> {
        let announcement = self.subscription.lock().announcement(stream);
        if matches!(announcement, Some(CloudMessage::StreamEnd { .. }))
            && self.shared.outgoing.is_closing()
            && !std::mem::replace(&mut self.said_closing, true)
        {
            self.control.send(&CloudMessage::Closing {}).await?;
        }
        match announcement {
            Some(message) => Ok(self.control.send(&message).await?),
            None => Ok(()),
        }
    }

    /// Sends script data of a stream that the edge knows.
    async fn send_data(&mut self, stream: &OutgoingStream, tag: Tag) -> Result<(), EdgeError> {
        let ssrc = stream.ssrc();
        let is_known = self.subscription.lock().has_announced(ssrc);
        if is_known {
            self.control.send(&CloudMessage::StreamData { ssrc, tag }).await?;
        }
        Ok(())
    }

    /// Sends all announcements that are due, also of announced streams that were removed since.
    async fn announce_all(&mut self) -> Result<(), EdgeError> {
        let mut streams: Vec<_> = {
            let subscription = self.subscription.lock();
            subscription.announced.values().map(|announced| announced.stream.clone()).collect()
        };
        let listed = self.shared.outgoing.streams();
        streams.retain(|known| !listed.iter().any(|stream| stream.ssrc() == known.ssrc()));
        for stream in streams.iter().chain(&listed) {
            self.announce(stream).await?;
        }
        Ok(())
    }
}

/// Admits an edge. Returns the handler's session, or an error if the edge is refused.
fn admit(
    shared: &Shared,
    peer: SocketAddr,
    hello: &Hello,
    nonce: Nonce,
    outbox: mpsc::Sender<CloudMessage>,
) -> Result<Option<Box<dyn EdgeSession>>, EdgeError> {
    let node = &hello.node;
    if node.is_empty() || node.len() > MAX_NODE_NAME || node.chars().any(char::is_control) {
        let reason = "the node name is empty, too long or contains control characters";
        return Err(EdgeError::Refused(reason.into()));
    }
    if let Some(token) = &shared.settings.token {
        // Compare hashes, so that the time of the comparison reveals nothing about the token.
        let hash = |token: &str| digest(&SHA256, token.as_bytes());
        let given = hello.token.as_deref().map(hash);
        if given.is_none_or(|given| given.as_ref() != hash(token).as_ref()) {
            return Err(EdgeError::Token);
        }
    }
    let connected = || {
        tracing::info!(%peer, protocol = "downpour", node, version = hello.version, "edge connected");
    };
    let Some(handler) = &shared.handler else {
        connected();
        return Ok(None);
    };
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
    let session = handler.hello(&edge).map_err(EdgeError::Refused)?;
    connected();
    Ok(Some(session))
}

const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Capacity of [`EdgeHello::outbox`]. Its senders retry when it is full.
const OUTBOX_CAPACITY: usize = 16;
/// Bytes of an edge's name.
const MAX_NODE_NAME: usize = 128;

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use downpour_media::flv::TagKind;
    use downpour_repair::{
        history::History,
        receiver::{Receiver, Settings},
        rtp::{Packetizer, Seq},
    };

    /// The GOP start and newest packet in the announcement to an edge that connects now.
    fn announced(stream: &Arc<OutgoingStream>) -> (Option<Seq>, Option<Seq>) {
        let mut subscription = Subscription::default();
        subscription.patterns.push(StreamPattern::All);
        match subscription.announcement(stream) {
            Some(CloudMessage::StreamUp(up)) => (up.gop_start, up.newest),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_edge_that_joins_during_a_paced_key_frame_requests_it_only_once_it_is_sent() {
        let now = Instant::now();
        let history = History::new(100, Duration::from_secs(10));
        let stream = OutgoingStream::new("live/a".parse().unwrap(), Ssrc(1), 0, history);
        let stream = Arc::new(stream);
        stream.track_sent();
        let mut packetizer = Packetizer::new(Ssrc(1), 1120);
        let mut push = |is_key: bool| {
            let burst = packetizer.packetize(&Tag::new(TagKind::Video, 0, &[7; 5000]).unwrap());
            stream.push(now, burst.clone(), is_key);
            (
                burst.first_seq(),
                burst.last_seq(),
                OutgoingStream::sent_guard(&stream, burst.last_seq()),
            )
        };
        assert_eq!(announced(&stream), (None, None));
        let (key, last, guard) = push(true);
        assert_eq!(announced(&stream), (Some(key), None));
        drop(guard);
        assert_eq!(announced(&stream), (Some(key), Some(last)));
        let (before, _, guard) = push(false);
        assert_eq!(announced(&stream), (Some(key), Some(last)));
        drop(guard);
        let (key, last, guard) = push(true);
        assert_eq!(announced(&stream), (Some(key), None));

        let mut receiver = Receiver::starting_at(Settings::default(), key);
        receiver.handle_heartbeat(now, before);
        assert_eq!(receiver.poll_timeout(), None, "the burst is still being sent");
        drop(guard);
        assert_eq!(announced(&stream), (Some(key), Some(last)));
        receiver.handle_heartbeat(now, last);
        assert!(receiver.poll_timeout().is_some());
    }
}
