//! A v0 connection, edge side: the retransmission protocol of existing clouds (`docs/wire.md`).
//!
//! An existing cloud ends with all of its streams if a connection or a stream is closed while it owes
//! an answer, or if a connection ends before it has seen the info stream. So a connection is never
//! just closed:
//!
//! | state | event | next state |
//! |---|---|---|
//! | established without a packet to request | – | standing by: the info stream is opened and finished |
//! | standing by | a packet is missing | closed; a new connection requests it |
//! | asking | requests and answers | the same |
//! | asking | shutdown, no answer for [`STALLED`], answers out of step | leaving, in its own task |
//! | leaving | every answer has come, or nothing has come for [`LINGER`] | info stream finished, closed |
//!
//! Requests for an SSRC that the cloud does not know are not answered, and neither are those behind
//! them; the upstream requests packets of streams that the cloud lists.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use quinn::{Connection, ReadExactError, RecvStream, SendStream, WriteError};
use tokio::{
    sync::{Notify, mpsc},
    time::{sleep, timeout},
};

use super::{
    After, Disconnect, EventSender, RepairClient, RepairClientMetrics, RepairEvent, handle::Ask,
};
use crate::protocol::close;
use downpour_repair::{
    message::{Gone, Message, Nack},
    rtp::{Seq, Ssrc, packet::HEADER_LEN},
    serial_requests::{Request, SerialRequests},
};

/// Holds a connection on which there is nothing to request, until a packet is missing. The info stream
/// is opened and finished at once, so that the cloud survives whatever ends the connection.
pub(super) async fn stand_by(
    client: &mut RepairClient,
    connection: &Connection,
) -> Result<After, Disconnect> {
    let (mut info, _answers) = connection.open_bi().await?;
    finish(&mut info).await;
    let after = tokio::select! {
        nack = client.inbox.next_nack() => nack.map_or(After::Stopped, After::Redial),
        _ = connection.closed() => return Ok(After::Idle),
        () = client.shutdown.cancelled() => After::Stopped,
    };
    connection.close(close::DONE, b"");
    Ok(after)
}

/// Requests packets until the connection fails or is left.
pub(super) async fn run(
    client: &mut RepairClient,
    connection: &Connection,
    first_nack: Nack,
) -> Result<After, Disconnect> {
    let (mut info, lengths) = connection.open_bi().await?;
    let shared = Arc::new(Shared::new());
    let RepairClient { inbox, events, metrics, shutdown, .. } = client;
    let mut receiving: Receiving =
        Box::pin(receive_answers(connection.clone(), lengths, shared.clone(), events.clone()));
    shared.want(Instant::now(), first_nack, metrics);
    let ended = tokio::select! {
        reason = &mut receiving => Err(reason),
        result = send_requests(connection, &mut info, &mut inbox.asks, &shared, metrics) => result,
        reason = shared.failed() => Err(reason),
        error = connection.closed() => Err(error.into()),
        () = shutdown.cancelled() => Ok(After::Stopped),
    };
    let Err(reason) = ended else {
        client.leaving.spawn(leave(connection.clone(), info, receiving, shared));
        return ended;
    };
    let reason = Disconnect::explain(Err(reason), connection).await;
    if connection.close_reason().is_none() {
        client.leaving.spawn(leave(connection.clone(), info, receiving, shared));
    }
    reason.map(|()| After::Stopped)
}

/// Reads answers until the connection is lost.
type Receiving = Pin<Box<dyn Future<Output = Disconnect> + Send>>;

/// Ends a connection once the cloud owes nothing. Nothing is asked meanwhile, and the answers that
/// come still count.
async fn leave(
    connection: Connection,
    mut info: SendStream,
    mut receiving: Receiving,
    shared: Arc<Shared>,
) {
    tokio::select! {
        _ = &mut receiving => return,
        () = shared.settled() => {}
        () = shared.silent() => {
            let peer = connection.remote_address();
            tracing::debug!(%peer, "v0 repair connection left with requests that are not answered");
        }
    }
    tokio::select! {
        _ = &mut receiving => {}
        () = finish(&mut info) => {}
    }
    connection.close(close::DONE, b"");
}

/// Finishes the info stream and waits until the cloud has acknowledged that.
async fn finish(info: &mut SendStream) {
    if info.finish().is_ok() {
        // On a timeout the path is broken, and the cloud learns nothing from a close either.
        let _ = timeout(FINISH_TIMEOUT, info.stopped()).await;
    }
}

/// What the tasks of one connection share.
struct Shared {
    state: Mutex<State>,
    /// An answer came, or the connection failed.
    changed: Notify,
}

struct State {
    requests: SerialRequests,
    failure: Option<Disconnect>,
    /// Answers can no longer be matched to requests.
    is_out_of_step: bool,
    /// When the last bytes came.
    heard: Instant,
}

impl Shared {
    fn new() -> Self {
        let requests = SerialRequests::new();
        let heard = Instant::now();
        let state = State { requests, failure: None, is_out_of_step: false, heard };
        Self { state: Mutex::new(state), changed: Notify::new() }
    }

    /// Adds the packets of a NACK, which may still be requested until its slack is used up.
    fn want(&self, now: Instant, nack: Nack, metrics: &RepairClientMetrics) {
        let deadline = now + Duration::from_millis(nack.slack_ms.into());
        let mut state = self.state.lock();
        for seq in nack.seqs {
            if !state.requests.want(now, nack.ssrc, seq, deadline) {
                metrics.suppressed.inc();
            }
        }
    }

    /// Returns the requests to write now.
    fn poll_requests(&self, connection: &Connection, metrics: &RepairClientMetrics) -> BytesMut {
        let (now, round_trip) = (Instant::now(), connection.rtt());
        let mut bytes = BytesMut::new();
        let mut state = self.state.lock();
        while let Some(Request { ssrc, seq, .. }) = state.requests.poll_request(now, round_trip) {
            bytes.put_u32(ssrc.0);
            bytes.put_u16(seq.0);
            metrics.asked.inc();
        }
        metrics.dropped_expired.inc_by(state.requests.take_expired());
        bytes
    }

    fn heard(&self) {
        self.state.lock().heard = Instant::now();
    }

    /// Records why the connection must be left.
    fn fail(&self, reason: Disconnect) {
        let mut state = self.state.lock();
        state.is_out_of_step = true;
        state.failure = Some(reason);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Returns once the answers are out of step or have stalled.
    async fn failed(&self) -> Disconnect {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(reason) = state.failure.take() {
                    return reason;
                }
                if state.requests.stalled_for(Instant::now()) > STALLED {
                    return Disconnect::Timeout("the cloud does not answer");
                }
            }
            tokio::select! {
                () = self.changed.notified() => {}
                () = sleep(STALLED / 8) => {}
            }
        }
    }

    /// Returns once every request has been answered.
    async fn settled(&self) {
        loop {
            // Before the look, so that no change between the two is missed.
            let changed = self.changed.notified();
            {
                let state = self.state.lock();
                if state.requests.is_settled() && !state.is_out_of_step {
                    return;
                }
            }
            changed.await;
        }
    }

    /// Returns once nothing has come for [`LINGER`]: a cloud that writes an answer is not silent that
    /// long on a connection that lives.
    async fn silent(&self) {
        let entered = Instant::now();
        loop {
            let since = self.state.lock().heard.max(entered);
            let left = LINGER.saturating_sub(since.elapsed());
            if left.is_zero() {
                return;
            }
            sleep(left).await;
        }
    }
}

impl From<WriteError> for Disconnect {
    fn from(error: WriteError) -> Self {
        Self::Lost(error.to_string())
    }
}

impl From<ReadExactError> for Disconnect {
    fn from(error: ReadExactError) -> Self {
        Self::Lost(error.to_string())
    }
}

/// Sends requests as NACKs arrive and answers make room.
async fn send_requests(
    connection: &Connection,
    info: &mut SendStream,
    asks: &mut mpsc::Receiver<Ask>,
    shared: &Shared,
    metrics: &RepairClientMetrics,
) -> Result<After, Disconnect> {
    loop {
        let changed = shared.changed.notified();
        let requests = shared.poll_requests(connection, metrics);
        if !requests.is_empty() {
            info.write_all(&requests).await?;
        }
        let ask = tokio::select! {
            ask = asks.recv() => ask,
            () = changed => continue,
        };
        match ask {
            Some(Ask::Nack(nack)) => shared.want(Instant::now(), nack, metrics),
            Some(Ask::Withdraw(ssrc, seq)) => {
                if shared.state.lock().requests.withdraw(ssrc, seq) {
                    metrics.suppressed.inc();
                }
            }
            // The handle is dropped: no further requests will arrive.
            None => return Ok(After::Stopped),
        }
    }
}

/// The cloud's data stream. Dropping the sending half would reset nothing, but the receiving half
/// would stop the cloud's answer.
type Data = Option<(SendStream, RecvStream)>;

/// Receives the answers until the connection is lost. Once they are out of step, reads and discards
/// what comes: the cloud must be able to finish what it writes.
async fn receive_answers(
    connection: Connection,
    mut lengths: RecvStream,
    shared: Arc<Shared>,
    events: EventSender,
) -> Disconnect {
    let mut data: Data = None;
    loop {
        match receive_answer(&connection, &mut lengths, &mut data, &shared, &events).await {
            Ok(()) => shared.changed.notify_waiters(),
            Err(reason @ Disconnect::Malformed(_)) => {
                shared.fail(reason);
                return discard(&connection, lengths, data, &shared).await;
            }
            Err(reason) => return reason,
        }
    }
}

async fn receive_answer(
    connection: &Connection,
    lengths: &mut RecvStream,
    data: &mut Data,
    shared: &Shared,
    events: &EventSender,
) -> Result<(), Disconnect> {
    let mut length = [0; 2];
    lengths.read_exact(&mut length).await?;
    shared.heard();
    let length = usize::from(u16::from_be_bytes(length));
    if length == 0 {
        let request = shared.state.lock().requests.not_held(Instant::now());
        let request = request.ok_or_else(|| out_of_step("an answer to nothing"))?;
        offer(events, gone(request));
        return Ok(());
    }
    if !(HEADER_LEN..Message::MAX_LEN).contains(&length) {
        return Err(Disconnect::Malformed(format!("a packet of {length} bytes")));
    }
    // The cloud's stream is visible once it has sent bytes.
    let data = match data {
        Some((_, data)) => data,
        None => &mut data.insert(connection.accept_bi().await?).1,
    };
    let mut packet = vec![0; length];
    data.read_exact(&mut packet).await?;
    shared.heard();
    let (ssrc, seq) = identify(&packet).ok_or_else(|| out_of_step("no RTP packet"))?;
    let unanswered = shared.state.lock().requests.answered(Instant::now(), ssrc, seq);
    for request in unanswered.ok_or_else(|| out_of_step("a packet nobody asked for"))? {
        offer(events, gone(request));
    }
    offer(events, RepairEvent::Repair(Bytes::from(packet)));
    Ok(())
}

/// Offers an event. While a connection is left, the receiver may be gone; the answers are still read.
fn offer(events: &EventSender, event: RepairEvent) {
    let _ = events.offer(event);
}

fn gone(request: Request) -> RepairEvent {
    RepairEvent::Gone(Gone { ssrc: request.ssrc, seqs: vec![request.seq] })
}

/// Reads both streams and discards the bytes, until the connection is lost.
async fn discard(
    connection: &Connection,
    mut lengths: RecvStream,
    data: Data,
    shared: &Shared,
) -> Disconnect {
    let discard_data = async {
        let (_sending, mut data) = match data {
            Some(data) => data,
            None => match connection.accept_bi().await {
                Ok(data) => data,
                Err(_) => return,
            },
        };
        discard_stream(&mut data, shared).await;
        std::future::pending().await
    };
    let discard_lengths = async {
        discard_stream(&mut lengths, shared).await;
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = discard_data => Disconnect::Stopped,
        () = discard_lengths => Disconnect::Stopped,
        error = connection.closed() => error.into(),
    }
}

async fn discard_stream(stream: &mut RecvStream, shared: &Shared) {
    let mut buffer = [0; 2048];
    while let Ok(Some(_)) = stream.read(&mut buffer).await {
        shared.heard();
    }
}

/// Returns the SSRC and sequence number of an RTP packet (RFC 3550 §5.1).
fn identify(packet: &[u8]) -> Option<(Ssrc, Seq)> {
    let &[first, _, q0, q1, _, _, _, _, s0, s1, s2, s3] = packet.first_chunk::<HEADER_LEN>()?;
    let ssrc = Ssrc(u32::from_be_bytes([s0, s1, s2, s3]));
    (first >> 6 == 2).then_some((ssrc, Seq(u16::from_be_bytes([q0, q1]))))
}

fn out_of_step(what: &str) -> Disconnect {
    Disconnect::Malformed(format!("requests and answers are out of step: {what}"))
}

/// Time without any answer after which the requests go over a new connection.
const STALLED: Duration = Duration::from_secs(2);
/// Silence after which a connection that is left is closed although answers are missing: requests for
/// a stream that has just ended are never answered.
const LINGER: Duration = Duration::from_secs(60);
const FINISH_TIMEOUT: Duration = Duration::from_millis(1000);
