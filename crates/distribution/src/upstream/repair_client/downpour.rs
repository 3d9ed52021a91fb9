//! A `downpour/1` connection, edge side.

use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, SendDatagramError};
use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};

use super::{
    Disconnect, EventSender, RepairClient, RepairClientMetrics, RepairClientSettings, RepairEvent,
    handle::Ask,
};
use crate::{
    control_stream::{ControlReceiver, ControlSender, ControlStream, StreamError, read_messages},
    protocol::Protocol,
    transport::CLIENT_UNI_STREAMS,
};
use downpour_media::StreamPattern;
use downpour_repair::{
    control::{CloudMessage, EdgeMessage, Hello, MAX_CONTROL_LEN, Report, VERSION},
    message::{Message, MessageError},
};

/// A control stream on which hello has been sent.
pub(super) struct Greeted {
    control: ControlStream,
    /// The patterns that the cloud has been sent.
    subscribed: Vec<StreamPattern>,
}

/// Opens the control stream and sends hello, which subscribes to `streams`.
pub(super) async fn send_hello(
    settings: &RepairClientSettings,
    streams: Vec<StreamPattern>,
    connection: &Connection,
) -> Result<Greeted, Disconnect> {
    let (send, recv) = connection.open_bi().await?;
    let mut control = ControlStream::new(send, recv, MAX_CONTROL_LEN);
    let hello = EdgeMessage::Hello(Hello {
        version: VERSION,
        node: settings.node.clone(),
        token: settings.token.clone(),
        rtp_port: settings.rtp_port,
        rtp_paths: settings.rtp_paths,
        group: settings.group,
        parity: settings.parity,
        latency_ms: settings.latency.as_millis().try_into().unwrap_or(u32::MAX),
        streams: streams.clone(),
    });
    control.send(&hello).await?;
    Ok(Greeted { control, subscribed: streams })
}

/// Runs the connection to its end; `Ok` on shutdown. `greeted` is set if hello has been sent.
pub(super) async fn run(
    client: &mut RepairClient,
    connection: &Connection,
    greeted: Option<Greeted>,
) -> Result<(), Disconnect> {
    client.inbox.discard_nacks(&client.metrics);
    let RepairClient { settings, inbox, events, metrics, shutdown, .. } = client;
    let opening = async {
        let wanted = || inbox.wanted.borrow().clone();
        let mut greeted = match greeted {
            Some(greeted) => greeted,
            None => send_hello(settings, wanted(), connection).await?,
        };
        match timeout(WELCOME_TIMEOUT, greeted.control.receive()).await {
            Ok(Ok(Some(CloudMessage::Welcome(welcome)))) => Ok((greeted, welcome)),
            Ok(Ok(Some(CloudMessage::Error { code, message }))) => {
                Err(Disconnect::Refused { token: code == "token", message })
            }
            Ok(Ok(_)) => Err(Disconnect::Malformed("the first message was not welcome".into())),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(Disconnect::Timeout("the cloud did not say welcome in time")),
        }
    };
    let (Greeted { mut control, mut subscribed }, welcome) = tokio::select! {
        opened = opening => opened?,
        error = connection.closed() => return Err(error.into()),
        () = shutdown.cancelled() => return Ok(()),
    };
    super::log_connected(&settings.cloud, connection, Protocol::Downpour);
    events.send(RepairEvent::Welcome(welcome)).await?;

    let (stream_tx, stream_rx) = mpsc::channel(CLIENT_UNI_STREAMS as usize);
    let result = tokio::select! {
        result = send_control(
            &mut control.sender, &mut subscribed, &mut inbox.reports, &mut inbox.wanted,
        ) => result,
        result = receive_control(&mut control.receiver, events) => result,
        result = receive_messages(connection, stream_rx, events) => result,
        error = read_messages(connection, stream_tx) => Err(error.into()),
        result = send_nacks(connection, &mut inbox.asks, metrics) => result,
        () = shutdown.cancelled() => Ok(()),
        // Also while the others wait for something else.
        error = connection.closed() => Err(error.into()),
    };
    Disconnect::explain(result, connection).await
}

impl From<StreamError> for Disconnect {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Message(error) => Self::Malformed(error.to_string()),
            error => Self::Lost(error.to_string()),
        }
    }
}

/// Sends reports and changes of the subscription on the control stream.
///
/// Concurrent with [`receive_control`]: if both ends stopped reading while a write blocks on flow
/// control, they would deadlock.
async fn send_control(
    control: &mut ControlSender,
    subscribed: &mut Vec<StreamPattern>,
    reports: &mut watch::Receiver<Report>,
    wanted: &mut watch::Receiver<Vec<StreamPattern>>,
) -> Result<(), Disconnect> {
    loop {
        tokio::select! {
            Ok(()) = reports.changed() => {
                let report = reports.borrow_and_update().clone();
                for part in report.split() {
                    control.send(&EdgeMessage::Report(part)).await?;
                }
            }
            Ok(()) = wanted.changed() => {
                let patterns = wanted.borrow_and_update().clone();
                let without = |all: &[StreamPattern], some: &[StreamPattern]| -> Vec<_> {
                    all.iter().filter(|pattern| !some.contains(pattern)).cloned().collect()
                };
                let added = without(&patterns, subscribed);
                let removed = without(subscribed, &patterns);
                // Unsubscribe first, so that the total never exceeds the cloud's limit.
                if !removed.is_empty() {
                    control.send(&EdgeMessage::Unsubscribe { streams: removed }).await?;
                }
                if !added.is_empty() {
                    control.send(&EdgeMessage::Subscribe { streams: added }).await?;
                }
                *subscribed = patterns;
            }
            // The handle is dropped; events are still received.
            else => std::future::pending().await,
        }
    }
}

/// Receives the cloud's messages on the control stream.
async fn receive_control(
    control: &mut ControlReceiver,
    events: &EventSender,
) -> Result<(), Disconnect> {
    loop {
        match control.receive().await? {
            Some(CloudMessage::StreamUp(info)) => events.send(RepairEvent::StreamUp(info)).await?,
            Some(CloudMessage::StreamUpdate { ssrc, headers }) => {
                events.send(RepairEvent::StreamUpdate { ssrc, headers }).await?;
            }
            Some(CloudMessage::StreamData { ssrc, tag }) => {
                events.send(RepairEvent::StreamData { ssrc, tag }).await?;
            }
            Some(CloudMessage::StreamEnd { ssrc, last_seq }) => {
                events.send(RepairEvent::StreamEnd { ssrc, last_seq }).await?;
            }
            Some(CloudMessage::Closing {}) => events.send(RepairEvent::Closing).await?,
            Some(CloudMessage::PathUp { path, address }) => {
                events.send(RepairEvent::PathUp { path, address }).await?;
            }
            Some(CloudMessage::Error { message, .. }) => return Err(Disconnect::Lost(message)),
            Some(CloudMessage::Welcome(_)) => {
                return Err(Disconnect::Malformed("welcome came twice".into()));
            }
            Some(CloudMessage::Unknown) => {}
            None => return Err(Disconnect::Lost("the cloud ended the conversation".into())),
        }
    }
}

/// Receives repair messages, as datagrams or, if too long for one, as streams.
async fn receive_messages(
    connection: &Connection,
    mut streams: mpsc::Receiver<Result<Bytes, MessageError>>,
    events: &EventSender,
) -> Result<(), Disconnect> {
    loop {
        let message = tokio::select! {
            datagram = connection.read_datagram() => Ok(datagram?),
            Some(message) = streams.recv() => message,
        };
        match message.and_then(Message::parse) {
            Ok(Message::Repair(packet)) => events.offer(RepairEvent::Repair(packet))?,
            Ok(Message::Gone(gone)) => events.offer(RepairEvent::Gone(gone))?,
            Ok(Message::Heartbeats(beats)) => events.offer(RepairEvent::Heartbeats(beats))?,
            Ok(Message::Nack(_)) => {
                return Err(Disconnect::Malformed("a nack, which only an edge sends".into()));
            }
            // A type of a later version.
            Err(MessageError::UnknownType(_)) => {}
            Err(error) => return Err(Disconnect::Malformed(error.to_string())),
        }
    }
}

/// Sends NACKs as datagrams.
async fn send_nacks(
    connection: &Connection,
    asks: &mut mpsc::Receiver<Ask>,
    metrics: &RepairClientMetrics,
) -> Result<(), Disconnect> {
    loop {
        let nack = match asks.recv().await {
            Some(Ask::Nack(nack)) => nack,
            Some(Ask::Withdraw(..)) => continue,
            // The handle is dropped; events are still received.
            None => return Err(connection.closed().await.into()),
        };
        let Some(max_len) = connection.max_datagram_size() else {
            return Err(Disconnect::Malformed("the cloud takes no datagrams".into()));
        };
        metrics.asked.inc_by(nack.seqs.len() as u64);
        for datagram in nack.encode(max_len) {
            // Without this check, quinn would drop older datagrams, uncounted.
            if connection.datagram_send_buffer_space() < datagram.len() {
                metrics.dropped_backlog.inc();
                continue;
            }
            match connection.send_datagram(datagram) {
                Ok(()) => {}
                Err(SendDatagramError::ConnectionLost(error)) => return Err(error.into()),
                // The path MTU has just shrunk; the receiver repeats the request.
                Err(_) => metrics.dropped_backlog.inc(),
            }
        }
    }
}

const WELCOME_TIMEOUT: Duration = Duration::from_secs(5);
