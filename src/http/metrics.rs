//! Metrics of HTTP connections and viewers.

use prometheus::{
    IntCounter, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};

use super::flv::viewer::Closed;
use crate::net::AcceptCounters;

/// Metrics of HTTP connections and viewers.
#[derive(Debug, Clone)]
pub struct HttpMetrics {
    /// Open connections, including viewers.
    pub connections: IntGauge,
    /// Connections accepted, including those that were then refused.
    pub accepted: IntCounter,
    /// Idle connections closed because a new one needed their slot.
    pub displaced: IntCounter,
    /// Current viewers.
    pub viewers: IntGauge,
    /// Current viewers that are behind their stream, each served by a separate task: they have just
    /// joined, or read slower than the stream is sent.
    pub viewers_behind: IntGauge,
    /// Viewers admitted.
    pub viewers_total: IntCounter,
    /// Bytes of FLV written to viewers.
    pub bytes: IntCounter,
    /// Tags that viewers skipped because they were too slow.
    pub skipped_tags: IntCounter,
    /// Failures to accept a connection, for example when file descriptors run out.
    pub accept_errors: IntCounter,
    pub(super) closed: ClosedCounters,
    pub(super) refused: RefusedCounters,
}

#[derive(Debug, Clone)]
pub(super) struct ClosedCounters {
    ended: IntCounter,
    client: IntCounter,
    timeout: IntCounter,
    revoked: IntCounter,
    error: IntCounter,
    pub(super) cut: IntCounter,
}

#[derive(Debug, Clone)]
pub(super) struct RefusedCounters {
    pub(super) not_live: IntCounter,
    pub(super) viewers_full: IntCounter,
    pub(super) unauthorized: IntCounter,
    pub(super) connections_full: IntCounter,
    pub(super) address_full: IntCounter,
    pub(super) bad_request: IntCounter,
    pub(super) head_timeout: IntCounter,
}

impl HttpMetrics {
    /// Creates the metrics and registers them in `registry`.
    ///
    /// # Errors
    /// If `registry` already has metrics of these names.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let gauge =
            |name: &str, help: &str| register_int_gauge_with_registry!(name, help, registry);
        let closed = register_int_counter_vec_with_registry!(
            Opts::new("downpour_http_viewers_closed_total", "Viewers that left, by reason."),
            &["reason"],
            registry
        )?;
        let refused = register_int_counter_vec_with_registry!(
            Opts::new("downpour_http_refused_total", "Requests refused, by reason."),
            &["reason"],
            registry
        )?;
        Ok(Self {
            connections: gauge("downpour_http_connections", "HTTP connections now.")?,
            accepted: counter("downpour_http_connections_total", "HTTP connections accepted.")?,
            displaced: counter(
                "downpour_http_displaced_total",
                "Idle HTTP connections closed because a new one needed their slot.",
            )?,
            viewers: gauge("downpour_http_viewers", "HTTP-FLV viewers now.")?,
            viewers_behind: gauge(
                "downpour_http_viewers_behind",
                "HTTP-FLV viewers now that have just come, or are too slow for their stream.",
            )?,
            viewers_total: counter("downpour_http_viewers_total", "Viewers ever admitted.")?,
            bytes: counter("downpour_http_viewer_bytes_total", "Bytes of FLV sent to viewers.")?,
            skipped_tags: counter(
                "downpour_http_skipped_tags_total",
                "Tags that slow viewers skipped.",
            )?,
            accept_errors: counter(
                "downpour_http_accept_errors_total",
                "Connections that could not be accepted.",
            )?,
            closed: ClosedCounters {
                ended: closed.with_label_values(&["ended"]),
                client: closed.with_label_values(&["client"]),
                timeout: closed.with_label_values(&["timeout"]),
                revoked: closed.with_label_values(&["revoked"]),
                error: closed.with_label_values(&["error"]),
                cut: closed.with_label_values(&["cut"]),
            },
            refused: RefusedCounters {
                not_live: refused.with_label_values(&["not_live"]),
                viewers_full: refused.with_label_values(&["viewers_full"]),
                unauthorized: refused.with_label_values(&["unauthorized"]),
                connections_full: refused.with_label_values(&["connections_full"]),
                address_full: refused.with_label_values(&["address_full"]),
                bad_request: refused.with_label_values(&["bad_request"]),
                head_timeout: refused.with_label_values(&["head_timeout"]),
            },
        })
    }

    pub(super) fn accept_counters(&self) -> AcceptCounters {
        AcceptCounters {
            accepted: self.accepted.clone(),
            errors: self.accept_errors.clone(),
            refused_total: self.refused.connections_full.clone(),
            refused_address: self.refused.address_full.clone(),
            displaced: self.displaced.clone(),
        }
    }
}

impl ClosedCounters {
    pub(super) fn count(&self, reason: &Closed) {
        match reason {
            Closed::Ended => &self.ended,
            Closed::Client => &self.client,
            Closed::Timeout => &self.timeout,
            Closed::Revoked => &self.revoked,
            Closed::Error(_) => &self.error,
        }
        .inc();
    }
}
