//! Metrics of path validation at the RTP port.

use prometheus::{IntCounter, Opts, Registry, register_int_counter_vec_with_registry};

/// Metrics of path validation, by outcome.
#[derive(Clone)]
pub struct ProbeMetrics {
    pub(super) challenged: IntCounter,
    pub(super) proven: IntCounter,
    pub(super) alive: IntCounter,
    pub(super) too_soon: IntCounter,
    pub(super) unknown_nonce: IntCounter,
    pub(super) bad_cookie: IntCounter,
    pub(super) malformed: IntCounter,
    pub(super) lost: IntCounter,
    pub(super) at_target: IntCounter,
}

impl ProbeMetrics {
    /// Creates the metrics and registers them.
    ///
    /// # Errors
    /// If `registry` already has metrics of these names.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let outcomes = register_int_counter_vec_with_registry!(
            Opts::new(
                "downpour_probes_total",
                "Path validation datagrams of edges, by outcome; `lost` counts paths that timed out"
            ),
            &["outcome"],
            registry
        )?;
        let outcome = |label: &str| outcomes.with_label_values(&[label]);
        Ok(Self {
            challenged: outcome("challenged"),
            proven: outcome("proven"),
            alive: outcome("alive"),
            too_soon: outcome("too_soon"),
            unknown_nonce: outcome("unknown_nonce"),
            bad_cookie: outcome("bad_cookie"),
            malformed: outcome("malformed"),
            lost: outcome("lost"),
            at_target: outcome("at_target"),
        })
    }
}
