//! The v0 protocol: the retransmission service of the existing Go cloud, for its edges in the field
//! (`docs/wire.md`).
//!
//! A v0 edge reads a packet with a single read. If that returns only a part of the packet, the edge
//! panics or loses its position in the stream. So the packet is written before its length, on a stream
//! of higher priority: when the edge reads the length, it has already received the whole packet.

use std::time::{Duration, Instant};

use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, WriteError};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::{BUDGET_AGE, Shared};
use crate::protocol::close;
use downpour_repair::{
    bucket::TokenBucket,
    rtp::{Seq, Ssrc},
};

/// Serves one connection until it ends. Returns the reason as an error, unless the server ended it.
pub(super) async fn serve(
    shared: &Shared,
    connection: &Connection,
    shutdown: &CancellationToken,
) -> Result<(), V0Error> {
    // Keep the receiving half: dropping it would send STOP_SENDING on a stream that the edge closes
    // itself, and the edge checks the result of that.
    let (data, _data_recv) =
        timeout(OPEN_TIMEOUT, connection.open_bi()).await.map_err(|_| V0Error::NoDataStream)??;
    data.set_priority(1).ok();
    let mut session = Session::new(shared, data);
    loop {
        let (info, requests) = tokio::select! {
            info = connection.accept_bi() => info?,
            () = shutdown.cancelled() => break,
        };
        let served = tokio::select! {
            served = session.serve(info, requests) => served?,
            () = shutdown.cancelled() => break,
        };
        if served == Served::EdgeHangs {
            connection.close(close::DONE, b"that packet is not held");
            return Ok(());
        }
    }
    // Let the last packets arrive: a v0 edge panics if the packet that it requested does not.
    sleep(LINGER).await;
    Ok(())
}

/// Why a v0 connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum V0Error {
    #[error("the edge allows no stream for data")]
    NoDataStream,
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("the info stream: {0}")]
    Read(#[from] ReadError),
    #[error(transparent)]
    Write(#[from] WriteError),
}

struct Session<'a> {
    shared: &'a Shared,
    data: SendStream,
    /// `true` once the data stream has carried a byte. Until then the edge does not see the stream.
    data_flowed: bool,
    /// Limits of one edge's requests and repairs. An edge that exceeds them has to wait.
    requests: TokenBucket,
    bytes: TokenBucket,
    budget_set: Instant,
}

#[derive(PartialEq)]
enum Served {
    /// The edge finished its info stream.
    Finished,
    /// The edge waits for a data stream that it cannot see.
    EdgeHangs,
}

impl<'a> Session<'a> {
    fn new(shared: &'a Shared, data: SendStream) -> Self {
        let now = Instant::now();
        let (rate, burst) = shared.total_budget(now);
        Self {
            shared,
            data,
            data_flowed: false,
            requests: shared.request_bucket(),
            bytes: TokenBucket::new(now, rate, burst),
            budget_set: now,
        }
    }

    /// Answers the requests of one info stream. Requests may be split or pipelined. Each answer is
    /// written before the next request is read, so an edge that does not read answers stalls only
    /// itself.
    async fn serve(
        &mut self,
        mut info: SendStream,
        mut requests: RecvStream,
    ) -> Result<Served, V0Error> {
        let mut buffer = [0; REQUEST_LEN * 256];
        let mut held = 0;
        let mut answered_gone = false;
        loop {
            let read = requests.read(&mut buffer[held..]);
            let read = if answered_gone && !self.data_flowed {
                // A v0 edge accepts the data stream before it reads the length. If the first answer is
                // "not held", no data follows and the edge waits forever.
                match timeout(HANG_TIMEOUT, read).await {
                    Ok(read) => read?,
                    Err(_) => return Ok(Served::EdgeHangs),
                }
            } else {
                read.await?
            };
            let Some(read) = read else { break };
            held += read;
            let (whole, part) = buffer[..held].as_chunks::<REQUEST_LEN>();
            for &[s0, s1, s2, s3, q0, q1] in whole {
                let ssrc = Ssrc(u32::from_be_bytes([s0, s1, s2, s3]));
                let seq = Seq(u16::from_be_bytes([q0, q1]));
                answered_gone |= !self.answer(&mut info, ssrc, seq).await?;
            }
            let (start, part) = (held - part.len(), part.len());
            buffer.copy_within(start..held, 0);
            held = part;
        }
        info.finish().ok();
        Ok(Served::Finished)
    }

    /// Answers one request. Returns `true` if the packet was in the history.
    async fn answer(
        &mut self,
        info: &mut SendStream,
        ssrc: Ssrc,
        seq: Seq,
    ) -> Result<bool, V0Error> {
        let metrics = &self.shared.metrics;
        metrics.v0.asked.inc();
        pause(self.requests.charge(Instant::now(), 1)).await;
        let stream = self.shared.outgoing.stream(ssrc);
        if stream.is_none() {
            metrics.unknown_ssrc.inc();
        }
        let packet = stream.as_ref().and_then(|s| s.packet(seq).or_else(|| s.header_packet(seq)));
        if let Some(stream) = &stream {
            stream.repairs.add(1, u64::from(packet.is_some()), u64::from(packet.is_none()));
        }
        let length = packet.as_ref().and_then(|packet| u16::try_from(packet.len()).ok());
        let (Some(packet), Some(length)) = (packet, length) else {
            metrics.v0.gone.inc();
            info.write_all(&0u16.to_be_bytes()).await?;
            return Ok(false);
        };
        let now = Instant::now();
        if now.saturating_duration_since(self.budget_set) >= BUDGET_AGE {
            let (rate, burst) = self.shared.total_budget(now);
            self.bytes.set(now, rate, burst);
            self.budget_set = now;
        }
        let wait = self.bytes.charge(now, packet.len() as u64);
        if !wait.is_zero() {
            metrics.deferred_budget.inc();
        }
        pause(wait).await;
        self.data.write_all(&packet).await?;
        self.data_flowed = true;
        info.write_all(&length.to_be_bytes()).await?;
        metrics.v0.repairs.inc();
        metrics.v0.repair_bytes.inc_by(packet.len() as u64);
        Ok(true)
    }
}

/// Sleeps, without a trip through the timer if `duration` is zero.
async fn pause(duration: Duration) {
    if !duration.is_zero() {
        sleep(duration).await;
    }
}

/// Bytes of a request: SSRC and sequence number.
const REQUEST_LEN: usize = 6;
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Silence after "not held" that shows that the edge waits for the data stream.
const HANG_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for the last packets to arrive before the connection is closed.
const LINGER: Duration = Duration::from_millis(200);
