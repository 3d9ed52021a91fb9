//! Metrics of the RTMP server.

use prometheus::{
    IntCounter, IntCounterVec, IntGauge, Opts, Registry, register_int_counter_with_registry,
    register_int_gauge_with_registry,
};

use super::connection::CLOSE_LABELS;
use crate::net::AcceptCounters;
use downpour_media::flv::TagKind;
use downpour_rtmp::session::SessionError;

/// Metrics of the RTMP server. Clones share them.
#[derive(Debug, Clone)]
pub struct ServerMetrics {
    pub(super) connections: IntGauge,
    pub(super) accepted: IntCounter,
    pub(super) accept_errors: IntCounter,
    displaced: IntCounter,
    pub(super) refused: IntCounterVec,
    pub(super) closed: IntCounterVec,
    pub(super) protocol_errors: IntCounterVec,
    pub(super) received_bytes: IntCounter,
    pub(super) ignored_messages: IntCounter,
    audio_tags: IntCounter,
    video_tags: IntCounter,
    script_tags: IntCounter,
}

impl ServerMetrics {
    /// Creates the metrics and registers them in `registry`.
    ///
    /// # Errors
    /// If `registry` already has metrics of these names.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let family = |name: &str, help: &str, label: &str, values: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), &[label])?;
            for value in values {
                family.with_label_values(&[value]);
            }
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        let connections = register_int_gauge_with_registry!(
            "downpour_rtmp_connections",
            "RTMP connections that are open",
            registry
        )?;
        let tags =
            family("downpour_rtmp_tags_total", "Tags received, by kind", "kind", &TAG_LABELS)?;
        Ok(Self {
            connections,
            accepted: counter("downpour_rtmp_connections_total", "RTMP connections accepted")?,
            accept_errors: counter(
                "downpour_rtmp_accept_errors_total",
                "Failures to accept an RTMP connection",
            )?,
            displaced: counter(
                "downpour_rtmp_displaced_total",
                "RTMP connections without a publication closed because a new one needed their slot",
            )?,
            refused: family(
                "downpour_rtmp_refused_total",
                "RTMP connections and publications refused, by reason",
                "reason",
                &REFUSED_LABELS,
            )?,
            closed: family(
                "downpour_rtmp_closed_total",
                "RTMP connections closed, by reason",
                "reason",
                &CLOSE_LABELS,
            )?,
            protocol_errors: family(
                "downpour_rtmp_protocol_errors_total",
                "RTMP connections that broke the protocol or its limits, by kind",
                "kind",
                &SessionError::LABELS,
            )?,
            received_bytes: counter(
                "downpour_rtmp_received_bytes_total",
                "Bytes received over RTMP",
            )?,
            ignored_messages: counter(
                "downpour_rtmp_ignored_messages_total",
                "RTMP messages without effect: unknown, empty, or media outside a publication",
            )?,
            audio_tags: tags.with_label_values(&[TAG_LABELS[0]]),
            video_tags: tags.with_label_values(&[TAG_LABELS[1]]),
            script_tags: tags.with_label_values(&[TAG_LABELS[2]]),
        })
    }

    pub(super) fn accept_counters(&self) -> AcceptCounters {
        AcceptCounters {
            accepted: self.accepted.clone(),
            errors: self.accept_errors.clone(),
            refused_total: self.refused.with_label_values(&[REFUSED_CONNECTIONS]),
            refused_address: self.refused.with_label_values(&[REFUSED_ADDRESS]),
            displaced: self.displaced.clone(),
        }
    }

    pub(super) fn tags(&self, kind: TagKind) -> &IntCounter {
        match kind {
            TagKind::Audio => &self.audio_tags,
            TagKind::Video => &self.video_tags,
            TagKind::Script => &self.script_tags,
        }
    }
}

const REFUSED_CONNECTIONS: &str = "connections";
const REFUSED_ADDRESS: &str = "address";
pub(super) const REFUSED_ALREADY_LIVE: &str = "already_live";
pub(super) const REFUSED_UNAUTHORIZED: &str = "unauthorized";
pub(super) const REFUSED_FULL: &str = "full";
pub(super) const REFUSED_NAME: &str = "name";
pub(super) const REFUSED_PLAY: &str = "play";
pub(super) const REFUSED_NOT_CONNECTED: &str = "not_connected";
pub(super) const REFUSED_TOO_MANY: &str = "too_many";

const REFUSED_LABELS: [&str; 9] = [
    REFUSED_CONNECTIONS,
    REFUSED_ADDRESS,
    REFUSED_ALREADY_LIVE,
    REFUSED_UNAUTHORIZED,
    REFUSED_FULL,
    REFUSED_NAME,
    REFUSED_PLAY,
    REFUSED_NOT_CONNECTED,
    REFUSED_TOO_MANY,
];
const TAG_LABELS: [&str; 3] = ["audio", "video", "script"];
