//! What the repair client counts.

use prometheus::{
    Gauge, IntCounter, IntGauge, Opts, Registry, register_gauge_with_registry,
    register_int_counter_vec_with_registry, register_int_counter_with_registry,
    register_int_gauge_vec_with_registry,
};

use super::Disconnect;
use crate::protocol::Protocol;

/// Counters of a [`RepairClient`](super::RepairClient).
#[derive(Debug, Clone)]
pub struct RepairClientMetrics {
    /// 1 while connected to a v0 cloud.
    pub connected_v0: IntGauge,
    /// 1 while connected to a `downpour/1` cloud.
    pub connected_downpour: IntGauge,
    /// The round trip to the cloud, smoothed, in seconds; 0 before there was one.
    pub round_trip: Gauge,
    /// Connections made.
    pub connects: IntCounter,
    /// Attempts that failed.
    pub connect_failures: IntCounter,
    /// Connections whose hello went with the first packet (0-RTT).
    pub early_hellos: IntCounter,
    /// Attempts that ended because the cloud's certificate is not trusted.
    pub refused_certificate: IntCounter,
    /// Attempts that ended because the cloud did not take this edge's token.
    pub refused_token: IntCounter,
    /// Attempts that ended because the cloud does not want this edge for another reason.
    pub refused_edge: IntCounter,
    /// Attempts that ended because the cloud does not speak the protocol.
    pub refused_protocol: IntCounter,
    /// Sequence numbers asked for.
    pub asked: IntCounter,
    /// Packets that came back.
    pub repairs: IntCounter,
    /// Bytes of packets that came back.
    pub repair_bytes: IntCounter,
    /// Sequence numbers that the cloud no longer holds.
    pub gone: IntCounter,
    /// Sequence numbers not asked for again while a v0 cloud still owes the answer.
    pub suppressed: IntCounter,
    /// Sequence numbers not asked for: too many nacks waited, or there was no connection.
    pub dropped_nacks: IntCounter,
    /// Nack datagrams dropped because the path takes them too slowly.
    pub dropped_backlog: IntCounter,
    /// Events dropped because the receiver was too slow.
    pub dropped_events: IntCounter,
    /// Connections closed because the cloud broke the protocol.
    pub malformed: IntCounter,
}

impl RepairClientMetrics {
    /// Registers all of them as `downpour_repair_client_…`.
    ///
    /// # Errors
    /// If one is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            register_int_counter_with_registry!(
                format!("downpour_repair_client_{name}"),
                help,
                registry
            )
        };
        let connected = register_int_gauge_vec_with_registry!(
            Opts::new("downpour_repair_client_connected", "Whether there is a cloud to ask"),
            &["protocol"],
            registry
        )?;
        let dropped = register_int_counter_vec_with_registry!(
            Opts::new("downpour_repair_client_dropped_total", "What did not get through"),
            &["what"],
            registry
        )?;
        let refused = register_int_counter_vec_with_registry!(
            Opts::new("downpour_repair_client_refused_total", "Connections that were refused"),
            &["reason"],
            registry
        )?;
        Ok(Self {
            connected_v0: connected.with_label_values(&[Protocol::V0.as_str()]),
            connected_downpour: connected.with_label_values(&[Protocol::Downpour.as_str()]),
            round_trip: register_gauge_with_registry!(
                "downpour_repair_client_round_trip_seconds",
                "The round trip to the cloud, smoothed",
                registry
            )?,
            connects: counter("connects_total", "Connections made")?,
            connect_failures: counter("connect_failures_total", "Attempts that failed")?,
            early_hellos: counter("early_hellos_total", "Connections back in one round trip")?,
            refused_certificate: refused.with_label_values(&["certificate"]),
            refused_token: refused.with_label_values(&["token"]),
            refused_edge: refused.with_label_values(&["edge"]),
            refused_protocol: refused.with_label_values(&["protocol"]),
            asked: counter("asked_total", "Packets asked for")?,
            repairs: counter("repairs_total", "Packets that came back")?,
            repair_bytes: counter("repair_bytes_total", "Bytes of packets that came back")?,
            gone: counter("gone_total", "Packets that the cloud no longer holds")?,
            suppressed: counter("suppressed_total", "Requests that were still in flight")?,
            dropped_nacks: dropped.with_label_values(&["nack"]),
            dropped_backlog: dropped.with_label_values(&["backlog"]),
            dropped_events: dropped.with_label_values(&["event"]),
            malformed: counter("malformed_total", "Connections closed as malformed")?,
        })
    }

    /// Counts why a connection ended, where that has a counter.
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

    pub(super) fn connected(&self, protocol: Protocol) -> &IntGauge {
        match protocol {
            Protocol::V0 => &self.connected_v0,
            Protocol::Downpour => &self.connected_downpour,
        }
    }
}
