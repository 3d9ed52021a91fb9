//! Handle of a [`RepairClient`](super::RepairClient).

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use quinn::Connection;
use tokio::sync::{mpsc, watch};

use super::RepairClientMetrics;
use crate::protocol::Protocol;
use downpour_media::StreamPattern;
use downpour_repair::{
    control::{MAX_PATTERNS, Report},
    message::Nack,
    rtp::{Seq, Ssrc},
};

/// A message to the task of the connection.
pub(super) enum Ask {
    /// Packets to request.
    Nack(Nack),
    /// A packet that need not be requested any more.
    Withdraw(Ssrc, Seq),
}

/// Sends to the cloud through a [`RepairClient`](super::RepairClient). Cloning shares it.
#[derive(Clone)]
pub struct RepairHandle {
    pub(super) asks: mpsc::Sender<Ask>,
    pub(super) report: watch::Sender<Report>,
    pub(super) wanted: watch::Sender<Vec<StreamPattern>>,
    pub(super) connected: Arc<Connected>,
    pub(super) metrics: RepairClientMetrics,
}

impl RepairHandle {
    /// Requests packets; the answers arrive as events. Never blocks: drops and counts the NACK if
    /// the queue is full.
    pub fn nack(&self, nack: Nack) {
        if let Err(error) = self.asks.try_send(Ask::Nack(nack)) {
            let (mpsc::error::TrySendError::Full(ask) | mpsc::error::TrySendError::Closed(ask)) =
                error;
            if let Ask::Nack(nack) = ask {
                self.metrics.dropped_nacks.inc_by(nack.seqs.len() as u64);
            }
        }
    }

    /// Withdraws the request for a packet that has arrived otherwise or was given up. Only a v0
    /// connection holds requests back.
    pub fn withdraw(&self, ssrc: Ssrc, seq: Seq) {
        if self.protocol() == Some(Protocol::V0) {
            // If the queue is full, the request ends at its deadline.
            let _ = self.asks.try_send(Ask::Withdraw(ssrc, seq));
        }
    }

    /// Waits until the client has ended, and the cloud has acknowledged the close or timed out.
    pub async fn closed(&self) {
        self.asks.closed().await;
    }

    /// Sends the cloud a report, split into as many messages as needed. A report that is still
    /// unsent when the next one is made is replaced by it. A v0 cloud gets no reports.
    pub fn report(&self, report: Report) {
        self.metrics.round_trip.set(report.round_trip_us as f64 / 1e6);
        self.report.send_replace(report);
    }

    /// Subscribes to more streams, now and after each reconnection. No effect on a v0 cloud.
    ///
    /// # Errors
    /// If there would be more than [`MAX_PATTERNS`] patterns. The subscription stays as it was.
    pub fn subscribe(&self, patterns: &[StreamPattern]) -> Result<(), TooManyPatterns> {
        let mut fits = true;
        self.wanted.send_if_modified(|wanted| {
            let mut more: Vec<StreamPattern> = Vec::new();
            for pattern in patterns {
                if !wanted.contains(pattern) && !more.contains(pattern) {
                    more.push(pattern.clone());
                }
            }
            fits = wanted.len() + more.len() <= MAX_PATTERNS;
            if fits {
                wanted.extend_from_slice(&more);
            }
            fits && !more.is_empty()
        });
        if fits { Ok(()) } else { Err(TooManyPatterns) }
    }

    /// Unsubscribes from patterns, each as it was subscribed. The cloud announces nothing more
    /// about those streams, not even their end.
    pub fn unsubscribe(&self, patterns: &[StreamPattern]) {
        self.wanted.send_if_modified(|wanted| {
            let before = wanted.len();
            wanted.retain(|pattern| !patterns.contains(pattern));
            wanted.len() < before
        });
    }

    /// Returns the smoothed round-trip time to the cloud, while connected.
    pub fn rtt(&self) -> Option<Duration> {
        self.connected.0.lock().as_ref().map(|(connection, _)| connection.rtt())
    }

    /// Returns the protocol of the connection, while connected.
    pub fn protocol(&self) -> Option<Protocol> {
        self.connected.0.lock().as_ref().map(|(_, protocol)| *protocol)
    }
}

/// More patterns than a cloud accepts from one edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {MAX_PATTERNS} stream patterns")]
pub struct TooManyPatterns;

/// The current connection, if any.
#[derive(Default)]
pub(super) struct Connected(Mutex<Option<(Connection, Protocol)>>);

impl Connected {
    pub(super) fn set(&self, connection: Option<(Connection, Protocol)>) {
        *self.0.lock() = connection;
    }
}
