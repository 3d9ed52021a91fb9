//! Prometheus collector for the reports of edges.

use std::collections::BTreeMap;

use prometheus::{
    GaugeVec, IntGauge, Opts,
    core::{Collector, Desc},
    proto::MetricFamily,
};

use super::Edges;
use crate::report_metrics::ReportSeries;
use downpour_repair::control::{DelayReport, StreamReport};

/// Collector that creates the series of each edge and stream per scrape, so that they disappear with
/// the edge.
///
/// There are about 12,000 series at most: [`MAX_REPORTS`] pairs of edge and stream have their own, and
/// the rest is summed under an empty `edge` and `stream`. Edges of the same name are summed too.
pub struct ReportCollector {
    edges: Edges,
    reports: ReportSeries,
    round_trip: GaugeVec,
    summed: IntGauge,
}

impl ReportCollector {
    /// A collector for `edges`.
    ///
    /// # Errors
    /// None in practice: the metric names are valid.
    pub fn new(edges: Edges) -> prometheus::Result<Self> {
        Ok(Self {
            edges,
            // The same names as on the edges themselves.
            reports: ReportSeries::new("downpour_edge_stream", &["edge", "stream"])?,
            round_trip: GaugeVec::new(
                Opts::new(
                    "downpour_edge_round_trip_seconds",
                    "Round-trip time that the edge reported",
                ),
                &["edge"],
            )?,
            summed: IntGauge::new(
                "downpour_edge_reports_summed",
                "Reports summed in the series with empty labels because there are too many",
            )?,
        })
    }
}

impl Collector for ReportCollector {
    /// Leaves the series of the reports out: a registry takes a name once, and on a parent the
    /// upstream has registered these names for the parent's streams. `gather` merges both.
    fn desc(&self) -> Vec<&Desc> {
        self.round_trip.desc().into_iter().chain(self.summed.desc()).collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let mut reports: BTreeMap<(String, String), StreamReport> = BTreeMap::new();
        let mut rest = StreamReport::default();
        let (mut round_trips, mut summed) = (BTreeMap::new(), 0);
        self.edges.for_each(|edge| {
            let Some(node) = &edge.node else { return };
            if let Some(micros) = edge.round_trip_us
                && (round_trips.len() < MAX_REPORTS || round_trips.contains_key(node))
            {
                round_trips.insert(node.clone(), micros as f64 / 1e6);
            }
            for stream in &edge.streams {
                let labels = (node.clone(), stream.key.to_string());
                let sum = match reports.len() < MAX_REPORTS || reports.contains_key(&labels) {
                    true => reports.entry(labels).or_default(),
                    false => {
                        summed += 1;
                        &mut rest
                    }
                };
                add(sum, &stream.report);
            }
        });
        if summed > 0 {
            reports.insert(Default::default(), rest);
        }
        self.summed.set(summed);
        self.round_trip.reset();
        for (node, seconds) in &round_trips {
            self.round_trip.with_label_values(&[node]).set(*seconds);
        }
        let series = reports
            .iter()
            .map(|((edge, stream), report)| (vec![edge.clone(), stream.clone()], report));
        let families = self.reports.collect(series).into_iter();
        families.chain(self.round_trip.collect()).chain(self.summed.collect()).collect()
    }
}

/// Adds the counts of a report. They come from an edge and may have any value.
fn add(sum: &mut StreamReport, report: &StreamReport) {
    for (sum, (_, more)) in sum.counters_mut().into_iter().zip(report.counters()) {
        *sum = sum.saturating_add(more);
    }
    for (sum, more) in sum.repaired.iter_mut().zip(&report.repaired) {
        *sum = sum.saturating_add(*more);
    }
    for (sum, more) in sum.paths.iter_mut().zip(&report.paths) {
        sum.received = sum.received.saturating_add(more.received);
        sum.lost = sum.lost.saturating_add(more.lost);
        sum.gaps = sum.gaps.saturating_add(more.gaps);
    }
    add_delays(&mut sum.delays, &report.delays);
    add_delays(&mut sum.waits, &report.waits);
}

fn add_delays(sum: &mut DelayReport, more: &DelayReport) {
    if sum.counts.len() < more.counts.len() {
        sum.counts.resize(more.counts.len(), 0);
    }
    for (sum, more) in sum.counts.iter_mut().zip(&more.counts) {
        *sum = sum.saturating_add(*more);
    }
    sum.sum_us = sum.sum_us.saturating_add(more.sum_us);
}

/// Pairs of edge and stream with separate series, up to 54 series each.
pub const MAX_REPORTS: usize = 217;

#[cfg(test)]
mod tests {
    use prometheus::{Registry, TextEncoder};

    use super::*;
    use crate::{
        downstream::edges::{EdgeInfo, StreamInfo},
        upstream::stats::{ReceiveMetrics, StreamStats},
    };

    #[test]
    fn parent_exports_its_own_reports_and_those_of_its_edges() {
        let (registry, edges) = (Registry::new(), Edges::default());
        let upstream = ReceiveMetrics::register(&registry).unwrap();
        registry.register(Box::new(ReportCollector::new(edges.clone()).unwrap())).unwrap();
        let _listed = edges.insert(edge("child", 1));
        upstream.publish(std::iter::once(StreamStats {
            key: "live/0".parse().unwrap(),
            report: StreamReport { received: 3, ..Default::default() },
            pending: 0,
            missing: 0,
        }));
        let text = TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        for line in [
            r#"downpour_edge_stream_packets{stream="live/0",fate="received"} 3"#,
            r#"downpour_edge_stream_packets{edge="child",stream="live/0",fate="received"} 10"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert_eq!(text.matches("# TYPE downpour_edge_stream_packets ").count(), 1);
    }

    fn edge(node: &str, streams: usize) -> EdgeInfo {
        let mut info = EdgeInfo::new("127.0.0.1:9".parse().unwrap(), "downpour");
        info.node = Some(node.into());
        info.round_trip_us = Some(20_000);
        info.streams = (0..streams)
            .map(|i| StreamInfo {
                key: format!("live/{i}").parse().unwrap(),
                fec: None,
                report: StreamReport {
                    received: 10,
                    parity: u64::MAX,
                    delays: DelayReport { counts: vec![10; 13], sum_us: 5 },
                    ..Default::default()
                },
            })
            .collect();
        info
    }

    #[test]
    fn the_number_of_series_is_bounded() {
        let edges = Edges::default();
        let registry = Registry::new();
        registry.register(Box::new(ReportCollector::new(edges.clone()).unwrap())).unwrap();
        let scrape = || TextEncoder::new().encode_to_string(&registry.gather()).unwrap();
        let mut listed: Vec<_> = ["a", "a", "b"].map(|node| edges.insert(edge(node, 1))).into();
        let text = scrape();
        for line in [
            r#"downpour_edge_stream_packets{edge="a",stream="live/0",fate="received"} 20"#,
            r#"downpour_edge_stream_packets{edge="b",stream="live/0",fate="received"} 10"#,
            r#"downpour_edge_stream_delay_seconds_count{edge="a",stream="live/0"} 260"#,
            r#"downpour_edge_round_trip_seconds{edge="a"} 0.02"#,
            "downpour_edge_reports_summed 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        listed.extend((0..300).map(|i| edges.insert(edge(&format!("edge-{i}"), 10))));
        let text = scrape();
        let series = text.lines().filter(|line| !line.starts_with('#')).count();
        assert!(series <= 10_500, "{series} series");
        let rest = 3003 - 1 - MAX_REPORTS;
        assert!(text.contains(&format!("downpour_edge_reports_summed {rest}")), "{text}");
        let sum = format!(
            r#"downpour_edge_stream_packets{{edge="",stream="",fate="received"}} {}"#,
            rest * 10
        );
        assert!(text.contains(&sum), "{sum}");
        listed.clear();
        assert!(!scrape().contains("edge="));
    }
}
