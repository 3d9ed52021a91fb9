//! Metrics of reception: counters of the node, and series per stream.

use std::sync::Arc;

use parking_lot::Mutex;
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

/// Statistics of one stream.
#[derive(Debug, Clone)]
pub struct StreamStats {
    /// The stream's key.
    pub key: StreamKey,
    /// What became of its packets since it started.
    pub report: StreamReport,
    /// Packets that are missing or wait behind a missing one.
    pub pending: usize,
    /// Packets that are missing.
    pub missing: usize,
}

/// Counters of reception, and the latest statistics of each stream. Cloning shares them.
#[derive(Clone)]
pub struct ReceiveMetrics {
    /// Datagrams that are not RTP of wire v0, and packets without a valid tag.
    pub malformed: IntCounter,
    /// Packets discarded because other packets of their tag were lost.
    pub discarded: IntCounter,
    /// Packets of publications that were never named, or had ended.
    pub unknown_dropped: IntCounter,
    /// Streams refused because of `max_streams`.
    pub refused_streams: IntCounter,
    /// NACKs dropped because there was no repair connection, or too many waited.
    pub nacks_dropped: IntCounter,
    /// Packets dropped by the setting `pack_loss`.
    pub pack_loss: IntCounter,
    /// Parity packets received.
    pub parity_received: IntCounter,
    /// Parity packets of streams that are not received; part of `parity_received`.
    pub parity_unknown: IntCounter,
    /// Parity datagrams that cannot be parsed.
    pub parity_malformed: IntCounter,
    parity_useless: IntCounter,
    parity_unrecoverable: IntCounter,
    /// Publications that restarted under the SSRC of another.
    pub restarts: IntCounter,
    /// In the order of [`StreamReport::fates`].
    fates: [IntCounter; FATES],
    streams: Arc<Mutex<Vec<StreamStats>>>,
}

impl ReceiveMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// If one of the names is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let packets = register_int_counter_vec_with_registry!(
            Opts::new("downpour_edge_packets_total", "RTP packets by fate"),
            &["fate"],
            registry
        )?;
        let parity = register_int_counter_vec_with_registry!(
            Opts::new("downpour_edge_parity_packets_total", "Parity packets by fate"),
            &["fate"],
            registry
        )?;
        let streams = Arc::default();
        registry.register(Box::new(PerStream::new(Arc::clone(&streams))?))?;
        Ok(Self {
            malformed: counter(
                "downpour_edge_malformed_total",
                "Datagrams that are not RTP of wire v0, and packets without a valid tag",
            )?,
            discarded: counter(
                "downpour_edge_discarded_packets_total",
                "Packets discarded because other packets of their tag were lost",
            )?,
            unknown_dropped: counter(
                "downpour_edge_unknown_packets_total",
                "Packets of publications that were never named, or had ended",
            )?,
            refused_streams: counter(
                "downpour_edge_refused_streams_total",
                "Streams refused because of max_streams",
            )?,
            nacks_dropped: counter(
                "downpour_edge_nacks_dropped_total",
                "NACKs dropped: no repair connection, or too many waiting",
            )?,
            pack_loss: counter(
                "downpour_edge_pack_loss_total",
                "Packets dropped by the setting pack_loss",
            )?,
            parity_received: parity.with_label_values(&["received"]),
            parity_unknown: parity.with_label_values(&["unknown_stream"]),
            parity_malformed: parity.with_label_values(&["malformed"]),
            parity_useless: parity.with_label_values(&["useless"]),
            parity_unrecoverable: parity.with_label_values(&["unrecoverable"]),
            restarts: counter(
                "downpour_edge_sender_restarts_total",
                "Restarts of a sender under the same SSRC",
            )?,
            fates: StreamReport::default()
                .fates()
                .map(|(fate, _)| packets.with_label_values(&[fate])),
            streams,
        })
    }

    /// Adds the difference between two snapshots of one stream's statistics.
    pub fn add(&self, before: &Stats, after: &Stats) {
        let fates = before.counts(Ssrc(0)).fates().into_iter().zip(after.counts(Ssrc(0)).fates());
        for (counter, ((_, before), (_, after))) in self.fates.iter().zip(fates) {
            if after > before {
                counter.inc_by(after - before);
            }
        }
        self.restarts.inc_by(after.restarts - before.restarts);
    }

    /// Adds the difference between two snapshots of one stream's FEC statistics.
    pub fn add_parity(&self, before: &fec::decoder::Stats, after: &fec::decoder::Stats) {
        let since = |of: fn(&fec::decoder::Stats) -> u64| of(after).saturating_sub(of(before));
        self.parity_useless.inc_by(since(|stats| stats.useless));
        self.parity_unrecoverable.inc_by(since(|stats| stats.unrecoverable));
        self.parity_malformed.inc_by(since(|stats| stats.malformed));
    }

    /// Returns the statistics of each stream at the last tick.
    pub fn streams(&self) -> Vec<StreamStats> {
        self.streams.lock().clone()
    }

    /// Replaces the statistics of all streams.
    pub fn publish(&self, streams: impl Iterator<Item = StreamStats>) {
        *self.streams.lock() = streams.collect();
    }
}

/// Series per stream. Collected at each scrape, so that they vanish with the stream.
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
                    "Packets that are missing or wait behind a missing one",
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
        let streams = self.streams.lock();
        for stream in &*streams {
            self.pending.with_label_values(&[stream.key.as_str()]).set(stream.pending as i64);
        }
        let reports = streams.iter().map(|stream| (vec![stream.key.to_string()], &stream.report));
        self.reports.collect(reports).into_iter().chain(self.pending.collect()).collect()
    }
}
