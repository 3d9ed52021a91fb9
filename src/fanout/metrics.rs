//! What the fan-out counts.

use std::io;

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};

/// Counters of the fan-out.
#[derive(Clone)]
pub struct FanoutMetrics {
    pub(super) datagrams: IntCounter,
    pub(super) bytes: IntCounter,
    pub(super) calls: IntCounter,
    pub(super) skipped: IntCounter,
    pub(super) errors: IntCounterVec,
    pub(super) refused_offload: IntCounter,
    pub(super) offload: IntGauge,
}

impl FanoutMetrics {
    /// Makes the handles and registers them.
    ///
    /// # Errors
    /// If their names are taken.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let errors = register_int_counter_vec_with_registry!(
            Opts::new("downpour_fanout_errors_total", "Sends that the kernel refused, by error"),
            &["error"],
            registry
        )?;
        let offload = register_int_gauge_with_registry!(
            "downpour_fanout_gso",
            "Whether UDP segmentation offload is in use",
            registry
        )?;
        Ok(Self {
            datagrams: counter(
                "downpour_fanout_datagrams_total",
                "Datagrams of RTP and parity sent",
            )?,
            bytes: counter("downpour_fanout_bytes_total", "Bytes of those datagrams")?,
            calls: counter("downpour_fanout_calls_total", "System calls that sent them")?,
            skipped: counter(
                "downpour_fanout_skipped_packets_total",
                "Packets that a worker of the fan-out did not send because it was behind; edges ask for those that are not parity",
            )?,
            errors,
            refused_offload: counter(
                "downpour_fanout_gso_refused_total",
                "Messages whose segmentation the kernel refused, and that were sent packet by packet",
            )?,
            offload,
        })
    }

    /// Datagrams that the kernel took so far.
    pub fn datagrams(&self) -> u64 {
        self.datagrams.get()
    }

    /// System calls that sent them.
    pub fn calls(&self) -> u64 {
        self.calls.get()
    }

    /// Packets that a worker did not send because it was behind.
    pub fn skipped(&self) -> u64 {
        self.skipped.get()
    }
}

/// Few different ones exist, so it can be a metric's label.
pub(super) fn error_label(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => "unreachable",
        Some(libc::ECONNREFUSED) => "refused",
        Some(libc::EPERM | libc::EACCES) => "not-permitted",
        Some(libc::ENOBUFS | libc::ENOMEM) => "no-buffers",
        Some(libc::EMSGSIZE) => "too-large",
        Some(libc::EAGAIN) => "would-block",
        _ => "other",
    }
}
