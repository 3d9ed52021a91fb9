//! Metrics of the repair client.

use prometheus::{
    Gauge, IntCounter, IntGauge, Opts, Registry, register_gauge_with_registry,
    register_int_counter_vec_with_registry, register_int_counter_with_registry,
    register_int_gauge_vec_with_registry,
};

use super::Disconnect;
use crate::protocol::Protocol;

/// Metrics of a [`RepairClient`](super::RepairClient). Cloning shares them.
#[derive(Debug, Clone)]
pub struct RepairClientMetrics {
    /// 1 while connected to a v0 cloud.
    pub connected_v0: IntGauge,
    /// 1 while connected to a `downpour/1` cloud.
    pub connected_downpour: IntGauge,
    /// Smoothed round-trip time to the cloud in seconds; 0 until measured.
    pub round_trip: Gauge,
    /// Connections established.
    pub connects: IntCounter,
    /// Connection attempts that failed.
    pub connect_failures: IntCounter,
    /// Connections whose hello the cloud accepted as 0-RTT data.
    pub early_hellos: IntCounter,
    /// Connections that failed because the cloud's certificate is not trusted.
    pub refused_certificate: IntCounter,
    /// Connections that the cloud refused because of this edge's token.
    pub refused_token: IntCounter,
    /// Connections that the cloud refused for another reason.
    pub refused_edge: IntCounter,
    /// Connections that failed because the cloud does not speak the protocol.
    pub refused_protocol: IntCounter,
    /// Sequence numbers requested.
    pub asked: IntCounter,
    /// Repaired packets received.
    pub repairs: IntCounter,
    /// Bytes of the repaired packets.
    pub repair_bytes: IntCounter,
    /// Sequence numbers that the cloud no longer holds.
    pub gone: IntCounter,
    /// Sequence numbers not requested because an earlier request was waiting or in flight (v0), or the
    /// packet had arrived otherwise.
    pub suppressed: IntCounter,
    /// Sequence numbers not requested because too many NACKs waited, or there was no connection.
    pub dropped_nacks: IntCounter,
    /// Sequence numbers not requested because the answer of a v0 cloud would have been too late.
    pub dropped_expired: IntCounter,
    /// NACK datagrams dropped because the send buffer was full.
    pub dropped_backlog: IntCounter,
    /// Events dropped because their channel was full.
    pub dropped_events: IntCounter,
    /// Connections closed because the cloud broke the protocol.
    pub malformed: IntCounter,
}

impl RepairClientMetrics {
    /// Registers the metrics as `downpour_repair_client_…`.
    ///
    /// # Errors
    /// If one of the names is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            register_int_counter_with_registry!(
                format!("downpour_repair_client_{name}"),
                help,
                registry
            )
        };
        let connected = register_int_gauge_vec_with_registry!(
            Opts::new("downpour_repair_client_connected", "1 while connected with this protocol"),
            &["protocol"],
            registry
        )?;
        let dropped = register_int_counter_vec_with_registry!(
            Opts::new("downpour_repair_client_dropped_total", "NACKs and events dropped, by kind"),
            &["what"],
            registry
        )?;
        let refused = register_int_counter_vec_with_registry!(
            Opts::new("downpour_repair_client_refused_total", "Connections refused, by reason"),
            &["reason"],
            registry
        )?;
        Ok(Self {
            connected_v0: connected.with_label_values(&[Protocol::V0.as_str()]),
            connected_downpour: connected.with_label_values(&[Protocol::Downpour.as_str()]),
            round_trip: register_gauge_with_registry!(
                "downpour_repair_client_round_trip_seconds",
                "Smoothed round-trip time to the cloud",
                registry
            )?,
            connects: counter("connects_total", "Connections established")?,
            connect_failures: counter("connect_failures_total", "Connection attempts that failed")?,
            early_hellos: counter(
                "early_hellos_total",
                "Connections with hello accepted as 0-RTT data",
            )?,
            refused_certificate: refused.with_label_values(&["certificate"]),
            refused_token: refused.with_label_values(&["token"]),
            refused_edge: refused.with_label_values(&["edge"]),
            refused_protocol: refused.with_label_values(&["protocol"]),
            asked: counter("asked_total", "Packets requested")?,
            repairs: counter("repairs_total", "Repaired packets received")?,
            repair_bytes: counter("repair_bytes_total", "Bytes of repaired packets received")?,
            gone: counter("gone_total", "Requested packets that the cloud no longer held")?,
            suppressed: counter(
                "suppressed_total",
                "Requests suppressed because an earlier one was in flight",
            )?,
            dropped_nacks: dropped.with_label_values(&["nack"]),
            dropped_expired: dropped.with_label_values(&["expired"]),
            dropped_backlog: dropped.with_label_values(&["backlog"]),
            dropped_events: dropped.with_label_values(&["event"]),
            malformed: counter(
                "malformed_total",
                "Connections closed because the cloud broke the protocol",
            )?,
        })
    }

    /// Counts the reason for which a connection ended, if it has a counter.
    pub(super) fn count(&self, reason: &Disconnect) {
        match reason {
            Disconnect::Malformed(_) => self.malformed.inc(),
            Disconnect::Certificate(_) => self.refused_certificate.inc(),
            Disconnect::Protocol(_) => self.refused_protocol.inc(),
            Disconnect::Refused { token: true, .. } => self.refused_token.inc(),
            Disconnect::Refused { token: false, .. } => self.refused_edge.inc(),
            _ => {}
        }
    }

    /// Returns the gauge of a protocol.
    pub(super) fn connected(&self, protocol: Protocol) -> &IntGauge {
        match protocol {
            Protocol::V0 => &self.connected_v0,
            Protocol::Downpour => &self.connected_downpour,
        }
    }
}
