//! What the repair server counts.

use prometheus::{
    IntCounter, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_vec_with_registry,
};

use crate::protocol::Protocol;

/// Counters of a [`RepairServer`](super::RepairServer).
#[derive(Debug, Clone)]
pub struct RepairServerMetrics {
    /// Connections of v0 edges.
    pub v0: ProtocolMetrics,
    /// Connections of `downpour/1` edges.
    pub downpour: ProtocolMetrics,
    /// Connections refused because there are too many.
    pub refused_full: IntCounter,
    /// Connections that never finished the handshake.
    pub refused_handshake: IntCounter,
    /// Edges whose token was wrong or missing.
    pub refused_token: IntCounter,
    /// Edges that may not subscribe for another reason, or did not say hello.
    pub refused_edge: IntCounter,
    /// v0 edges whose address is not among those allowed.
    pub refused_v0_address: IntCounter,
    /// Edges whose hello came as early data (0-RTT) of a resumed session.
    pub early_hellos: IntCounter,
    /// Connections closed because the edge broke the protocol.
    pub malformed: IntCounter,
    /// v0 requests for a stream that does not exist.
    pub unknown_ssrc: IntCounter,
    /// Repairs that had to wait because the edge's budget was spent.
    pub deferred_budget: IntCounter,
    /// Repairs that had to wait because the path takes them too slowly.
    pub deferred_path: IntCounter,
    /// Repairs dropped because too many waited for budget.
    pub dropped_budget: IntCounter,
    /// Repairs dropped because they would have come after the edge's deadline.
    pub dropped_late: IntCounter,
    /// Datagrams dropped because the path takes them too slowly.
    pub dropped_backlog: IntCounter,
    /// Repairs too long for a datagram, dropped because too many streams were in flight.
    pub dropped_streams: IntCounter,
    /// Sequence numbers asked for faster than any edge needs to.
    pub dropped_flood: IntCounter,
    /// Requests that only repeated one that had just been answered.
    pub repeated: IntCounter,
    /// Packets sent again to a multicast group, each copy counted.
    pub group_repairs: IntCounter,
    /// Bytes of packets sent again to a multicast group.
    pub group_bytes: IntCounter,
    /// Packets asked for that had just been sent to the edge's group.
    pub answered_by_group: IntCounter,
    /// Times that an edge turned out to claim a group that this cloud does not send to.
    pub unknown_group: IntCounter,
    /// Datagrams of heartbeats sent.
    pub heartbeats: IntCounter,
    /// Bugs: tasks that panicked.
    pub panics: IntCounter,
}

/// What is counted for each protocol.
#[derive(Debug, Clone)]
pub struct ProtocolMetrics {
    /// Connections open now.
    pub open: IntGauge,
    /// Connections ever accepted.
    pub accepted: IntCounter,
    /// Sequence numbers asked for.
    pub asked: IntCounter,
    /// Packets sent again, each copy counted.
    pub repairs: IntCounter,
    /// Bytes of packets sent again.
    pub repair_bytes: IntCounter,
    /// Sequence numbers no longer held or never sent.
    pub gone: IntCounter,
}

impl RepairServerMetrics {
    /// Registers all of them as `downpour_repair_server_…`.
    ///
    /// # Errors
    /// If one is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counters = |name: &str, help: &str, label: &str| -> prometheus::Result<_> {
            let name = format!("downpour_repair_server_{name}");
            let counters =
                register_int_counter_vec_with_registry!(Opts::new(name, help), &[label], registry)?;
            Ok(counters)
        };
        let counter = |name: &str, help: &str| {
            register_int_counter_with_registry!(
                format!("downpour_repair_server_{name}"),
                help,
                registry
            )
        };

        let open = register_int_gauge_vec_with_registry!(
            Opts::new("downpour_repair_server_connections", "Edges connected for repair"),
            &["protocol"],
            registry
        )?;
        let accepted = counters("connections_total", "Edges that connected", "protocol")?;
        let asked = counters("asked_total", "Packets that edges asked for", "protocol")?;
        let repairs = counters("repairs_total", "Packets sent again", "protocol")?;
        let repair_bytes =
            counters("repair_bytes_total", "Bytes of packets sent again", "protocol")?;
        let gone = counters("gone_total", "Packets asked for in vain", "protocol")?;
        let protocol = |protocol: Protocol| {
            let label = &[protocol.as_str()];
            ProtocolMetrics {
                open: open.with_label_values(label),
                accepted: accepted.with_label_values(label),
                asked: asked.with_label_values(label),
                repairs: repairs.with_label_values(label),
                repair_bytes: repair_bytes.with_label_values(label),
                gone: gone.with_label_values(label),
            }
        };

        let refused = counters("refused_total", "Connections refused", "reason")?;
        let dropped = counters("dropped_total", "Packets that were not sent again", "reason")?;
        let deferred = counters("deferred_total", "Packets whose repair had to wait", "reason")?;
        Ok(Self {
            v0: protocol(Protocol::V0),
            downpour: protocol(Protocol::Downpour),
            refused_full: refused.with_label_values(&["full"]),
            refused_handshake: refused.with_label_values(&["handshake"]),
            refused_token: refused.with_label_values(&["token"]),
            refused_v0_address: refused.with_label_values(&["v0_address"]),
            early_hellos: counter("early_hellos_total", "Edges that were back in one round trip")?,
            refused_edge: refused.with_label_values(&["edge"]),
            malformed: counter("malformed_total", "Connections closed as malformed")?,
            unknown_ssrc: counter("unknown_ssrc_total", "v0 requests for no stream")?,
            deferred_budget: deferred.with_label_values(&["budget"]),
            deferred_path: deferred.with_label_values(&["path"]),
            dropped_late: dropped.with_label_values(&["late"]),
            dropped_budget: dropped.with_label_values(&["budget"]),
            dropped_backlog: dropped.with_label_values(&["backlog"]),
            dropped_streams: dropped.with_label_values(&["streams"]),
            dropped_flood: dropped.with_label_values(&["flood"]),
            repeated: counter("repeated_total", "Requests answered a moment before")?,
            group_repairs: counter("group_repairs_total", "Packets sent again to a group")?,
            group_bytes: counter(
                "group_repair_bytes_total",
                "Bytes of packets sent again to a group",
            )?,
            answered_by_group: counter(
                "answered_by_group_total",
                "Packets asked for that had just been sent to the group",
            )?,
            unknown_group: counter("unknown_group_total", "Claims to groups that are not ours")?,
            heartbeats: counter(
                "heartbeats_total",
                "Datagrams sent that tell how far streams have come",
            )?,
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
