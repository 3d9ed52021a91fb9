//! What the edge's receiving side counts.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::{
    IntCounter, IntGaugeVec, Opts, Registry,
    core::{Collector, Desc},
    proto::MetricFamily,
    register_int_counter_vec_with_registry, register_int_counter_with_registry,
};

use crate::report_metrics::ReportSeries;
use downpour_media::StreamKey;
use downpour_repair::control::FATES;
use downpour_repair::{control::StreamReport, fec, receiver::Stats, rtp::Ssrc};

/// How one stream fares now.
#[derive(Debug, Clone)]
pub struct StreamStats {
    /// The stream's name.
    pub key: StreamKey,
    /// What became of its packets since it came up.
    pub report: StreamReport,
    /// Packets that are missing, or wait behind a missing one.
    pub pending: usize,
    /// Packets that are missing.
    pub missing: usize,
}

/// Counters of the intake, and the streams' own numbers for the next scrape.
#[derive(Clone)]
pub struct ReceiveMetrics {
    /// Datagrams that are no RTP of wire v0, and packets that hold no tag.
    pub malformed: IntCounter,
    /// Packets that came whole and were of no use, because others of their tag were lost.
    pub discarded: IntCounter,
    /// Packets of publications that nobody named, or that had ended.
    pub unknown_dropped: IntCounter,
    /// Streams not received because there were too many.
    pub refused_streams: IntCounter,
    /// Requests dropped because the repair connection did not take them.
    pub nacks_dropped: IntCounter,
    /// Packets dropped on purpose: `pack_loss`.
    pub pack_loss: IntCounter,
    /// Parity packets that came.
    pub parity_received: IntCounter,
    /// Of those: of streams that are not received.
    pub parity_unknown: IntCounter,
    /// Datagrams that should be parity and are none.
    pub parity_malformed: IntCounter,
    parity_useless: IntCounter,
    parity_unrecoverable: IntCounter,
    restarts: IntCounter,
    /// As [`StreamReport::fates`] has them.
    fates: [IntCounter; FATES],
    streams: Arc<Mutex<Vec<StreamStats>>>,
}

impl ReceiveMetrics {
    /// Makes the handles and registers them.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let packets = register_int_counter_vec_with_registry!(
            Opts::new("downpour_edge_packets_total", "RTP packets by what became of them"),
            &["fate"],
            registry
        )?;
        let parity = register_int_counter_vec_with_registry!(
            Opts::new("downpour_edge_parity_packets_total", "Parity by what became of it"),
            &["fate"],
            registry
        )?;
        let streams = Arc::default();
        registry.register(Box::new(PerStream::new(Arc::clone(&streams))?))?;
        Ok(Self {
            malformed: counter(
                "downpour_edge_malformed_total",
                "Datagrams that are no RTP of wire v0, and packets that hold no tag",
            )?,
            discarded: counter(
                "downpour_edge_discarded_packets_total",
                "Packets that were of no use because others of their tag were lost",
            )?,
            unknown_dropped: counter(
                "downpour_edge_unknown_packets_total",
                "Packets dropped because nobody named their publication, or it had ended",
            )?,
            refused_streams: counter(
                "downpour_edge_refused_streams_total",
                "Streams not received because there were too many",
            )?,
            nacks_dropped: counter(
                "downpour_edge_nacks_dropped_total",
                "Requests dropped because the repair connection did not take them",
            )?,
            pack_loss: counter(
                "downpour_edge_pack_loss_total",
                "Packets dropped on purpose, by the setting pack_loss",
            )?,
            parity_received: parity.with_label_values(&["received"]),
            parity_unknown: parity.with_label_values(&["unknown_stream"]),
            parity_malformed: parity.with_label_values(&["malformed"]),
            parity_useless: parity.with_label_values(&["useless"]),
            parity_unrecoverable: parity.with_label_values(&["unrecoverable"]),
            restarts: counter(
                "downpour_edge_sender_restarts_total",
                "Times that a sender began anew under the same SSRC",
            )?,
            fates: StreamReport::default()
                .fates()
                .map(|(fate, _)| packets.with_label_values(&[fate])),
            streams,
        })
    }

    /// Adds what happened between two states of one stream's counts.
    pub fn add(&self, before: &Stats, after: &Stats) {
        let fates = before.counts(Ssrc(0)).fates().into_iter().zip(after.counts(Ssrc(0)).fates());
        for (counter, ((_, before), (_, after))) in self.fates.iter().zip(fates) {
            if after > before {
                counter.inc_by(after - before);
            }
        }
        self.restarts.inc_by(after.restarts - before.restarts);
    }

    /// Adds what happened between two states of one stream's counts of parity.
    pub fn add_parity(&self, before: &fec::decoder::Stats, after: &fec::decoder::Stats) {
        let since = |of: fn(&fec::decoder::Stats) -> u64| of(after).saturating_sub(of(before));
        self.parity_useless.inc_by(since(|stats| stats.useless));
        self.parity_unrecoverable.inc_by(since(|stats| stats.unrecoverable));
        self.parity_malformed.inc_by(since(|stats| stats.malformed));
    }

    /// How each stream fared a moment ago.
    pub fn streams(&self) -> Vec<StreamStats> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets what the next scrape tells of each stream.
    pub fn publish(&self, streams: impl Iterator<Item = StreamStats>) {
        *self.streams.lock().unwrap_or_else(PoisonError::into_inner) = streams.collect();
    }
}

/// The streams' own series, made at each scrape so that they go when the stream goes.
struct PerStream {
    reports: ReportSeries,
    pending: IntGaugeVec,
    streams: Arc<Mutex<Vec<StreamStats>>>,
}

impl PerStream {
    fn new(streams: Arc<Mutex<Vec<StreamStats>>>) -> prometheus::Result<Self> {
        Ok(Self {
            reports: ReportSeries::new("downpour_edge_stream", &["stream"])?,
            pending: IntGaugeVec::new(
                Opts::new(
                    "downpour_edge_stream_pending_packets",
                    "Packets that are missing, or wait behind a missing one",
                ),
                &["stream"],
            )?,
            streams,
        })
    }
}

impl Collector for PerStream {
    fn desc(&self) -> Vec<&Desc> {
        self.reports.descs().into_iter().chain(self.pending.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.pending.reset();
        let streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in &*streams {
            self.pending.with_label_values(&[stream.key.as_str()]).set(stream.pending as i64);
        }
        let reports = streams.iter().map(|stream| (vec![stream.key.to_string()], &stream.report));
        self.reports.collect(reports).into_iter().chain(self.pending.collect()).collect()
    }
}
