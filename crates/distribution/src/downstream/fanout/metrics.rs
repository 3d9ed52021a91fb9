//! Metrics of the fan-out, and the classes of send errors.

use std::io;

use prometheus::{
    IntCounter, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};

/// Metrics of the fan-out. Clones share the counters.
#[derive(Clone)]
pub struct FanoutMetrics {
    pub(super) datagrams: IntCounter,
    pub(super) bytes: IntCounter,
    pub(super) calls: IntCounter,
    pub(super) skipped: IntCounter,
    errors: [IntCounter; SendErrorKind::ALL.len()],
    pub(super) gso_refused: IntCounter,
    pub(super) gso_sockets: IntGauge,
}

impl FanoutMetrics {
    /// Creates the metrics and registers them.
    ///
    /// # Errors
    /// If `registry` already has metrics of these names.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let errors = register_int_counter_vec_with_registry!(
            Opts::new(
                "downpour_fanout_errors_total",
                "Packets that the kernel refused to send to an address, by error"
            ),
            &["error"],
            registry
        )?;
        let errors = SendErrorKind::ALL.map(|kind| errors.with_label_values(&[kind.label()]));
        let gso_sockets = register_int_gauge_with_registry!(
            "downpour_fanout_gso",
            "Sockets, up to two per worker, that send with UDP segmentation offload",
            registry
        )?;
        Ok(Self {
            datagrams: counter(
                "downpour_fanout_datagrams_total",
                "Datagrams of RTP and parity sent",
            )?,
            bytes: counter(
                "downpour_fanout_bytes_total",
                "Bytes of RTP and parity sent, without UDP headers",
            )?,
            calls: counter("downpour_fanout_calls_total", "System calls that sent RTP and parity")?,
            skipped: counter(
                "downpour_fanout_skipped_packets_total",
                "Packets, counted once per address, that were not sent because a fan-out worker was behind; edges request them again unless they are parity",
            )?,
            errors,
            gso_refused: counter(
                "downpour_fanout_gso_refused_total",
                "Messages that the kernel refused to segment, and that were sent packet by packet",
            )?,
            gso_sockets,
        })
    }

    /// Datagrams that the kernel accepted.
    pub fn datagrams(&self) -> u64 {
        self.datagrams.get()
    }

    /// System calls that sent datagrams.
    pub fn calls(&self) -> u64 {
        self.calls.get()
    }

    /// Packets, counted once per address, that were dropped because a worker was behind.
    pub fn skipped(&self) -> u64 {
        self.skipped.get()
    }

    /// The counter of packets that the kernel refused because of `kind`.
    pub(super) fn errors(&self, kind: SendErrorKind) -> &IntCounter {
        &self.errors[kind as usize]
    }
}

/// Class of an error that the kernel returned for a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum SendErrorKind {
    Unreachable,
    Refused,
    NotPermitted,
    NoBuffers,
    TooLarge,
    WouldBlock,
    Other,
}

impl SendErrorKind {
    const ALL: [Self; 7] = [
        Self::Unreachable,
        Self::Refused,
        Self::NotPermitted,
        Self::NoBuffers,
        Self::TooLarge,
        Self::WouldBlock,
        Self::Other,
    ];

    /// `true` if a queue of this machine is full: no fault of the target.
    pub(super) fn is_congestion(self) -> bool {
        matches!(self, Self::NoBuffers | Self::WouldBlock)
    }

    fn label(self) -> &'static str {
        match self {
            Self::Unreachable => "unreachable",
            Self::Refused => "refused",
            Self::NotPermitted => "not-permitted",
            Self::NoBuffers => "no-buffers",
            Self::TooLarge => "too-large",
            Self::WouldBlock => "would-block",
            Self::Other => "other",
        }
    }
}

impl From<&io::Error> for SendErrorKind {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH) => Self::Unreachable,
            Some(libc::ECONNREFUSED) => Self::Refused,
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted,
            Some(libc::ENOBUFS | libc::ENOMEM) => Self::NoBuffers,
            Some(libc::EMSGSIZE) => Self::TooLarge,
            Some(libc::EAGAIN) => Self::WouldBlock,
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_kind_has_its_counter() {
        let registry = Registry::new();
        let metrics = FanoutMetrics::register(&registry).unwrap();
        for (times, kind) in SendErrorKind::ALL.into_iter().enumerate() {
            metrics.errors(kind).inc_by(times as u64 + 1);
        }
        let families = registry.gather();
        let errors = families.iter().find(|f| f.name().ends_with("errors_total")).unwrap();
        assert_eq!(errors.get_metric().len(), SendErrorKind::ALL.len());
        for metric in errors.get_metric() {
            let label = metric.get_label()[0].value();
            let at = SendErrorKind::ALL.iter().position(|kind| kind.label() == label).unwrap();
            assert_eq!(metric.get_counter().get_value(), at as f64 + 1.0, "{label}");
        }
    }
}
