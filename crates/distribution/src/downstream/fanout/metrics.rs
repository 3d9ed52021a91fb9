//! What the fan-out counts.

use std::io;

use prometheus::{
    IntCounter, IntGauge, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_counter_with_registry, register_int_gauge_with_registry,
};

/// Counters of the fan-out.
#[derive(Clone)]
pub struct FanoutMetrics {
    pub(super) datagrams: IntCounter,
    pub(super) bytes: IntCounter,
    pub(super) calls: IntCounter,
    pub(super) skipped: IntCounter,
    errors: [IntCounter; Refusal::ALL.len()],
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
            Opts::new(
                "downpour_fanout_errors_total",
                "Packets that the kernel did not take for an address, by error"
            ),
            &["error"],
            registry
        )?;
        let errors = Refusal::ALL.map(|refusal| errors.with_label_values(&[refusal.label()]));
        let offload = register_int_gauge_with_registry!(
            "downpour_fanout_gso",
            "Sockets, up to two of each worker, that send with UDP segmentation offload",
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
                "Packets times addresses that were not sent because a worker of the fan-out was behind; edges ask for those that are not parity",
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

    /// Packets, times addresses, that a worker did not send because it was behind.
    pub fn skipped(&self) -> u64 {
        self.skipped.get()
    }

    /// Packets that the kernel did not take because of `refusal`.
    pub(super) fn errors(&self, refusal: Refusal) -> &IntCounter {
        &self.errors[refusal as usize]
    }
}

/// Why the kernel did not take a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Refusal {
    Unreachable,
    Refused,
    NotPermitted,
    NoBuffers,
    TooLarge,
    WouldBlock,
    Other,
}

impl Refusal {
    const ALL: [Self; 7] = [
        Self::Unreachable,
        Self::Refused,
        Self::NotPermitted,
        Self::NoBuffers,
        Self::TooLarge,
        Self::WouldBlock,
        Self::Other,
    ];

    /// Whether it is the way out that is full, and not the fault of one target.
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

impl From<&io::Error> for Refusal {
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
    fn each_refusal_has_its_counter() {
        let registry = Registry::new();
        let metrics = FanoutMetrics::register(&registry).unwrap();
        for (times, refusal) in Refusal::ALL.into_iter().enumerate() {
            metrics.errors(refusal).inc_by(times as u64 + 1);
        }
        let families = registry.gather();
        let errors = families.iter().find(|f| f.name().ends_with("errors_total")).unwrap();
        assert_eq!(errors.get_metric().len(), Refusal::ALL.len());
        for metric in errors.get_metric() {
            let label = metric.get_label()[0].value();
            let at = Refusal::ALL.iter().position(|refusal| refusal.label() == label).unwrap();
            assert_eq!(metric.get_counter().get_value(), at as f64 + 1.0, "{label}");
        }
    }
}
