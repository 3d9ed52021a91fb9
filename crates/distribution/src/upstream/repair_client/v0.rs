//! A v0 connection, edge side: the retransmission protocol of existing clouds (`docs/wire.md`),
//! with many requests in flight.
//!
//! Two defects of v0 clouds shape this module:
//! - They read each half of a request with one read, and lose synchronization if that returns only
//!   a part. So the requests in flight are few enough to fit one QUIC packet.
//! - They do not answer requests for an unknown SSRC. So each packet is matched with its request,
//!   and the older requests count as unanswered.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::{BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use quinn::{Connection, ReadExactError, RecvStream, SendStream, WriteError};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{sleep, timeout},
};

use super::{Disconnect, EventSender, RepairClient, RepairClientMetrics, RepairEvent};
use downpour_repair::{
    message::{Gone, Message, Nack},
    rtp::{Seq, Ssrc, packet::HEADER_LEN},
};

/// Runs the connection to its end; `Ok` on shutdown.
pub(super) async fn run(
    client: &mut RepairClient,
    connection: &Connection,
    first_nack: Option<Nack>,
) -> Result<(), Disconnect> {
    let RepairClient { inbox, events, metrics, shutdown, .. } = client;
    let (mut info, lengths) = connection.open_bi().await?;
    let in_flight = InFlight::default();
    // A connection that ends without an info stream brings down a v0 cloud. An empty request opens
    // it.
    let first_nack = first_nack.unwrap_or_else(|| {
        in_flight.requests.lock().push_back(Request { asked: None, ..Request::NOTHING });
        Nack { ssrc: Ssrc(0), copies: 1, slack_ms: 0, seqs: Vec::new() }
    });
    if first_nack.seqs.is_empty() {
        info.write_all(&Request::NOTHING.encode()).await?;
    }

    let mut receiving = Box::pin(receive_answers(connection, lengths, &in_flight, events));
    let ended = tokio::select! {
        result = &mut receiving => Some(result),
        result = send_requests(&mut info, first_nack, &mut inbox.nacks, &in_flight, metrics) => {
            Some(result)
        }
        result = in_flight.watch() => Some(result),
        error = connection.closed() => Some(Err(error.into())),
        () = shutdown.cancelled() => None,
    };
    let Some(ended) = ended else {
        // An unfinished answer brings down a v0 cloud, too.
        let drained = async {
            tokio::select! {
                _ = &mut receiving => {}
                () = in_flight.answered() => {}
            }
        };
        let _ = timeout(DRAIN_TIMEOUT, drained).await;
        if info.finish().is_ok() {
            let _ = timeout(DRAIN_TIMEOUT, info.stopped()).await;
        }
        return Ok(());
    };
    Disconnect::explain(ended, connection).await
}

/// A request that has not been answered.
#[derive(Debug, Clone, Copy)]
struct Request {
    ssrc: Ssrc,
    seq: Seq,
    /// When it was sent; `None` if it may stay unanswered.
    asked: Option<Instant>,
}

impl Request {
    const NOTHING: Self = Self { ssrc: Ssrc(0), seq: Seq(0), asked: None };

    fn encode(&self) -> [u8; REQUEST_LEN] {
        let [s0, s1, s2, s3] = self.ssrc.0.to_be_bytes();
        let [q0, q1] = self.seq.0.to_be_bytes();
        [s0, s1, s2, s3, q0, q1]
    }

    /// Reports the packet as gone.
    fn gone(&self, events: &EventSender) -> Result<(), Disconnect> {
        if self.asked.is_some() {
            let gone = Gone { ssrc: self.ssrc, seqs: vec![self.seq] };
            events.offer(RepairEvent::Gone(gone))?;
        }
        Ok(())
    }
}

/// The unanswered requests, oldest first.
struct InFlight {
    requests: Mutex<VecDeque<Request>>,
    /// One permit per request that may still be sent.
    slots: Semaphore,
}

impl Default for InFlight {
    fn default() -> Self {
        Self { requests: Mutex::default(), slots: Semaphore::new(MAX_IN_FLIGHT as usize) }
    }
}

impl InFlight {
    fn contains(&self, ssrc: Ssrc, seq: Seq) -> bool {
        self.requests.lock().iter().any(|request| request.ssrc == ssrc && request.seq == seq)
    }

    /// Removes the oldest request.
    fn pop(&self) -> Option<Request> {
        self.take(1).pop()
    }

    /// Removes the requests up to the one for this packet; `None` if there is none for it.
    fn pop_to(&self, ssrc: Ssrc, seq: Seq) -> Option<Vec<Request>> {
        let index = self
            .requests
            .lock()
            .iter()
            .position(|request| request.ssrc == ssrc && request.seq == seq)?;
        Some(self.take(index + 1))
    }

    fn take(&self, count: usize) -> Vec<Request> {
        let mut requests = self.requests.lock();
        let count = count.min(requests.len());
        let taken: Vec<_> = requests.drain(..count).collect();
        self.slots.add_permits(taken.iter().filter(|request| request.asked.is_some()).count());
        taken
    }

    /// Returns once the oldest request has waited for [`ANSWER_TIMEOUT`].
    async fn watch(&self) -> Result<(), Disconnect> {
        loop {
            sleep(ANSWER_TIMEOUT / 4).await;
            let oldest = self.requests.lock().iter().find_map(|request| request.asked);
            if oldest.is_some_and(|asked| asked.elapsed() > ANSWER_TIMEOUT) {
                return Err(Disconnect::Timeout("the cloud does not answer"));
            }
        }
    }

    /// Returns once every request has been answered.
    async fn answered(&self) {
        // An error means a closed semaphore; it is never closed.
        let _ = self.slots.acquire_many(MAX_IN_FLIGHT).await;
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

/// Sends a request for each packet of each NACK; waits while too many are in flight.
async fn send_requests(
    info: &mut SendStream,
    first_nack: Nack,
    nacks: &mut mpsc::Receiver<Nack>,
    in_flight: &InFlight,
    metrics: &RepairClientMetrics,
) -> Result<(), Disconnect> {
    let mut nack = Some(first_nack);
    while let Some(Nack { ssrc, seqs, .. }) = nack {
        let mut requests = BytesMut::new();
        for seq in seqs {
            if in_flight.contains(ssrc, seq) {
                metrics.suppressed.inc();
                continue;
            }
            let slot = match in_flight.slots.try_acquire() {
                Ok(slot) => slot,
                Err(_) => {
                    info.write_all(&requests).await?;
                    requests.clear();
                    let slot = in_flight.slots.acquire().await;
                    slot.map_err(|_| Disconnect::Stopped)?
                }
            };
            // Returned with the answer.
            slot.forget();
            let request = Request { ssrc, seq, asked: Some(Instant::now()) };
            in_flight.requests.lock().push_back(request);
            requests.put_slice(&request.encode());
            metrics.asked.inc();
        }
        info.write_all(&requests).await?;
        nack = nacks.recv().await;
    }
    // The handle is dropped: there will be no more requests.
    Err(Disconnect::Stopped)
}

/// Receives the answers.
async fn receive_answers(
    connection: &Connection,
    mut lengths: RecvStream,
    in_flight: &InFlight,
    events: &EventSender,
) -> Result<(), Disconnect> {
    // The cloud's stream is visible once it has sent bytes. Dropping the sending half would reset
    // it.
    let mut data: Option<(SendStream, RecvStream)> = None;
    loop {
        let mut length = [0; 2];
        lengths.read_exact(&mut length).await?;
        let length = usize::from(u16::from_be_bytes(length));
        if length == 0 {
            let request = in_flight.pop();
            request.ok_or_else(|| out_of_step("an answer to nothing"))?.gone(events)?;
            continue;
        }
        if !(HEADER_LEN..Message::MAX_LEN).contains(&length) {
            return Err(Disconnect::Malformed(format!("a packet of {length} bytes")));
        }
        let data = match &mut data {
            Some((_, data)) => data,
            None => &mut data.insert(connection.accept_bi().await?).1,
        };
        let mut packet = vec![0; length];
        data.read_exact(&mut packet).await?;
        let (ssrc, seq) = identify(&packet).ok_or_else(|| out_of_step("no RTP packet"))?;
        let mut answered =
            in_flight.pop_to(ssrc, seq).ok_or_else(|| out_of_step("a packet nobody asked for"))?;
        answered.pop();
        for unanswered in answered {
            unanswered.gone(events)?;
        }
        events.offer(RepairEvent::Repair(Bytes::from(packet)))?;
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

/// 768 bytes of requests, which fit the smallest QUIC packet.
const MAX_IN_FLIGHT: u32 = 128;
const REQUEST_LEN: usize = 6;
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
const DRAIN_TIMEOUT: Duration = Duration::from_millis(300);
