//! Metrics of the repair server.

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_vec_with_registry,
};

use crate::protocol::Protocol;

/// Metrics of a [`RepairServer`](super::RepairServer).
#[derive(Debug, Clone)]
pub struct RepairServerMetrics {
    /// Connections of v0 edges.
    pub v0: ProtocolMetrics,
    /// Connections of `downpour/1` edges.
    pub downpour: ProtocolMetrics,
    /// Connections refused because of the limit.
    pub refused_full: IntCounter,
    /// Connections whose handshake failed or timed out.
    pub refused_handshake: IntCounter,
    /// Edges refused because the token was wrong or missing.
    pub refused_token: IntCounter,
    /// Edges refused for another reason, or that sent no hello.
    pub refused_edge: IntCounter,
    /// v0 edges refused because of their address.
    pub refused_v0_address: IntCounter,
    /// Edges whose hello arrived as early data (0-RTT) of a resumed session.
    pub early_hellos: IntCounter,
    /// Connections closed because of a protocol violation by the edge.
    pub malformed: IntCounter,
    /// v0 requests for a stream that does not exist.
    pub unknown_ssrc: IntCounter,
    /// Repairs that had to wait for the edge's budget.
    pub deferred_budget: IntCounter,
    /// Repairs that had to wait for the path.
    pub deferred_path: IntCounter,
    /// Repairs dropped because too many waited for budget.
    pub dropped_budget: IntCounter,
    /// Repairs dropped because they would have missed the edge's deadline.
    pub dropped_late: IntCounter,
    /// Datagrams dropped because the path was too slow.
    pub dropped_backlog: IntCounter,
    /// Repairs too long for a datagram, dropped because too many streams were open.
    pub dropped_streams: IntCounter,
    /// Requested sequence numbers beyond the limit per second.
    pub dropped_flood: IntCounter,
    /// Requests that repeated one that had just been answered.
    pub repeated: IntCounter,
    /// Packets retransmitted to a multicast group, each copy counted.
    pub group_repairs: IntCounter,
    /// Bytes of packets retransmitted to a multicast group.
    pub group_bytes: IntCounter,
    /// Requests for packets that had just been sent to the edge's group.
    pub answered_by_group: IntCounter,
    /// Edges that named a group to which this cloud does not send.
    pub unknown_group: IntCounter,
    /// Heartbeat datagrams sent.
    pub heartbeats: IntCounter,
    /// Tasks that panicked, each of them a bug.
    pub panics: IntCounter,
}

/// Metrics per protocol.
#[derive(Debug, Clone)]
pub struct ProtocolMetrics {
    /// Open connections.
    pub open: IntGauge,
    /// Accepted connections.
    pub accepted: IntCounter,
    /// Requested sequence numbers.
    pub asked: IntCounter,
    /// Retransmitted packets, each copy counted.
    pub repairs: IntCounter,
    /// Bytes of retransmitted packets.
    pub repair_bytes: IntCounter,
    /// Requested sequence numbers that were no longer in the history, or never sent.
    pub gone: IntCounter,
}

impl RepairServerMetrics {
    /// Registers all metrics as `downpour_repair_server_…`.
    ///
    /// # Errors
    /// If `registry` already has one of them.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let factory = Factory { registry };
        let counter = |name: &str, help: &str| factory.counter(name, help);
        let [v0, downpour] = ProtocolMetrics::register(&factory)?;
        let refused = factory.counters("refused_total", "Connections refused", "reason")?;
        let dropped =
            factory.counters("dropped_total", "Packets that were not retransmitted", "reason")?;
        let deferred =
            factory.counters("deferred_total", "Packets whose repair had to wait", "reason")?;
        Ok(Self {
            v0,
            downpour,
            refused_full: refused.with_label_values(&["full"]),
            refused_handshake: refused.with_label_values(&["handshake"]),
            refused_token: refused.with_label_values(&["token"]),
            refused_v0_address: refused.with_label_values(&["v0_address"]),
            early_hellos: counter(
                "early_hellos_total",
                "Edges that reconnected with early data (0-RTT)",
            )?,
            refused_edge: refused.with_label_values(&["edge"]),
            malformed: counter("malformed_total", "Connections closed as malformed")?,
            unknown_ssrc: counter("unknown_ssrc_total", "v0 requests for unknown streams")?,
            deferred_budget: deferred.with_label_values(&["budget"]),
            deferred_path: deferred.with_label_values(&["path"]),
            dropped_late: dropped.with_label_values(&["late"]),
            dropped_budget: dropped.with_label_values(&["budget"]),
            dropped_backlog: dropped.with_label_values(&["backlog"]),
            dropped_streams: dropped.with_label_values(&["streams"]),
            dropped_flood: dropped.with_label_values(&["flood"]),
            repeated: counter(
                "repeated_total",
                "Requests that repeated one that had just been answered",
            )?,
            group_repairs: counter(
                "group_repairs_total",
                "Packets retransmitted to a multicast group",
            )?,
            group_bytes: counter(
                "group_repair_bytes_total",
                "Bytes of packets retransmitted to a multicast group",
            )?,
            answered_by_group: counter(
                "answered_by_group_total",
                "Requested packets that had just been sent to the edge's group",
            )?,
            unknown_group: counter(
                "unknown_group_total",
                "Edges that named a group to which this cloud does not send",
            )?,
            heartbeats: counter("heartbeats_total", "Heartbeat datagrams sent")?,
            panics: counter("panics_total", "Tasks that panicked")?,
        })
    }

    pub(super) fn of(&self, protocol: Protocol) -> &ProtocolMetrics {
        match protocol {
            Protocol::V0 => &self.v0,
            Protocol::Downpour => &self.downpour,
        }
    }
}

impl ProtocolMetrics {
    /// The metrics of v0 and of `downpour/1`.
    fn register(factory: &Factory<'_>) -> prometheus::Result<[Self; 2]> {
        let open = register_int_gauge_vec_with_registry!(
            Opts::new("downpour_repair_server_connections", "Edges connected for repair"),
            &["protocol"],
            factory.registry
        )?;
        let counters = |name: &str, help: &str| factory.counters(name, help, "protocol");
        let accepted = counters("connections_total", "Edges that connected")?;
        let asked = counters("asked_total", "Packets that edges requested")?;
        let repairs = counters("repairs_total", "Packets retransmitted")?;
        let repair_bytes = counters("repair_bytes_total", "Bytes of packets retransmitted")?;
        let gone = counters("gone_total", "Requested packets that were not in the history")?;
        Ok([Protocol::V0, Protocol::Downpour].map(|protocol| {
            let label = &[protocol.as_str()];
            Self {
                open: open.with_label_values(label),
                accepted: accepted.with_label_values(label),
                asked: asked.with_label_values(label),
                repairs: repairs.with_label_values(label),
                repair_bytes: repair_bytes.with_label_values(label),
                gone: gone.with_label_values(label),
            }
        }))
    }
}

/// Registers counters named `downpour_repair_server_…`.
struct Factory<'a> {
    registry: &'a Registry,
}

impl Factory<'_> {
    fn counter(&self, name: &str, help: &str) -> prometheus::Result<IntCounter> {
        let name = format!("downpour_repair_server_{name}");
        register_int_counter_with_registry!(name, help, self.registry)
    }

    fn counters(&self, name: &str, help: &str, label: &str) -> prometheus::Result<IntCounterVec> {
        let name = format!("downpour_repair_server_{name}");
        register_int_counter_vec_with_registry!(Opts::new(name, help), &[label], self.registry)
    }
}
