//! The retransmission service of the existing cloud, for the edges that are in the field
//! (`docs/wire.md`).
//!
//! An existing edge reads a packet with a single read and then panics or loses its place if that
//! brings only a part. So a packet is written before its length, and goes out first: once the edge
//! has seen the length, the whole packet is there.

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

/// Serves one connection until it ends; an error says why.
pub(super) async fn serve(
    shared: &Shared,
    connection: &Connection,
    shutdown: &CancellationToken,
) -> Result<(), V0Error> {
    // The receiving half is kept: dropping it would tell the edge to stop sending on a stream that
    // it closes, and checks, itself.
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
    // What is on its way shall arrive: an existing edge panics if its packet does not.
    sleep(LINGER).await;
    Ok(())
}

/// Why a v0 connection ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum V0Error {
    #[error("the edge does not let the cloud open the data stream")]
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
    /// Whether the data stream ever carried a byte: until then the edge does not know it.
    data_flowed: bool,
    /// Limits on what one edge can make us do; the edge waits.
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

    /// Answers the requests of one info stream, however they are split or pipelined. Each answer is
    /// written before the next request is read, so an edge that does not read holds up itself.
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
                // An existing edge looks for the data stream before it reads the length, so a
                // first answer of "not held" would keep it waiting for ever.
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

    /// Answers one request; tells whether the packet was held.
    async fn answer(
        &mut self,
        info: &mut SendStream,
        ssrc: Ssrc,
        seq: Seq,
    ) -> Result<bool, V0Error> {
        let metrics = &self.shared.metrics;
        metrics.v0.asked.inc();
        pause(self.requests.charge(Instant::now(), 1)).await;
        let stream = self.shared.origin.stream(ssrc);
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

/// A sleep that costs nothing when it is none.
async fn pause(duration: Duration) {
    if !duration.is_zero() {
        sleep(duration).await;
    }
}

/// SSRC and sequence number.
const REQUEST_LEN: usize = 6;
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
const HANG_TIMEOUT: Duration = Duration::from_secs(1);
const LINGER: Duration = Duration::from_millis(200);
