//! Prometheus series of stream reports. The cloud and the edges export the same series.

use prometheus::{
    core::Desc,
    proto::{Bucket, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType},
};

use downpour_repair::{
    control::{DelayReport, StreamReport},
    receiver::DELAY_BOUNDS_MS,
};

/// Descriptors of the series of stream reports, with a common prefix and common labels.
pub struct ReportSeries {
    descs: Vec<Desc>,
    labels: &'static [&'static str],
}

impl ReportSeries {
    /// Series named `{prefix}_packets` and so on, each with `labels`.
    ///
    /// # Errors
    /// If `prefix` or a label is not a valid name.
    pub fn new(prefix: &str, labels: &'static [&'static str]) -> prometheus::Result<Self> {
        let desc = |(suffix, help, more): (&str, &str, &[&str])| {
            let names = labels.iter().chain(more).map(|label| (*label).to_owned()).collect();
            Desc::new(format!("{prefix}_{suffix}"), help.to_owned(), names, Default::default())
        };
        let descs = [
            ("packets", "RTP packets of a live stream since its start, by fate", &["fate"][..]),
            ("path_packets", "RTP packets of a live stream by path", &["path", "fate"]),
            (
                "delay_seconds",
                "Delay of packets, repairs included: arrival after the time at which they were due; in order is 0",
                &[],
            ),
            (
                "wait_seconds",
                "Wait of packets in the reorder window: delivery in order after the time at which they were due",
                &[],
            ),
        ];
        Ok(Self { descs: descs.into_iter().map(desc).collect::<Result<_, _>>()?, labels })
    }

    /// The descriptors, for [`Collector::desc`](prometheus::core::Collector::desc).
    pub fn descs(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    /// Builds the metric families of `reports`, which are pairs of label values and report.
    pub fn collect<'a>(
        &self,
        reports: impl Iterator<Item = (Vec<String>, &'a StreamReport)>,
    ) -> Vec<MetricFamily> {
        let (mut packets, mut paths, mut delays, mut waits) = Default::default();
        let push = |to: &mut Vec<Metric>, metric| to.push(metric);
        for (values, report) in reports {
            let labels: Vec<_> =
                self.labels.iter().zip(values).map(|(name, value)| label(name, value)).collect();
            for (fate, count) in report.fates() {
                push(&mut packets, gauge(&labels, &[("fate", fate.into())], count));
            }
            for (i, path) in report.paths.iter().enumerate().filter(|(_, p)| p.received > 0) {
                for (fate, count) in [("received", path.received), ("lost", path.lost)] {
                    let more = [("path", i.to_string()), ("fate", fate.into())];
                    push(&mut paths, gauge(&labels, &more, count));
                }
            }
            push(&mut delays, histogram(&labels, &report.delays));
            push(&mut waits, histogram(&labels, &report.waits));
        }
        let types = [MetricType::GAUGE, MetricType::GAUGE];
        let types = types.into_iter().chain([MetricType::HISTOGRAM; 2]);
        let metrics = [packets, paths, delays, waits];
        let families = self.descs.iter().zip(types).zip(metrics).map(|((desc, kind), metrics)| {
            let mut family = MetricFamily::default();
            family.set_name(desc.fq_name.clone());
            family.set_help(desc.help.clone());
            family.set_field_type(kind);
            family.set_metric(metrics);
            family
        });
        families.filter(|family| !family.get_metric().is_empty()).collect()
    }
}

fn label(name: &str, value: String) -> LabelPair {
    let mut label = LabelPair::default();
    label.set_name(name.to_owned());
    label.set_value(value);
    label
}

fn gauge(labels: &[LabelPair], more: &[(&str, String)], count: u64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(count as f64);
    let mut metric = Metric::from_gauge(gauge);
    let more = more.iter().map(|(name, value)| label(name, value.clone()));
    metric.set_label(labels.iter().cloned().chain(more).collect());
    metric
}

fn histogram(labels: &[LabelPair], delays: &DelayReport) -> Metric {
    let mut sum = 0u64;
    let buckets = DELAY_BOUNDS_MS.iter().zip(&delays.counts).map(|(bound, count)| {
        sum = sum.saturating_add(*count);
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(f64::from(*bound) / 1e3);
        bucket.set_cumulative_count(sum);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(delays.counts.iter().fold(0, |sum, n| sum.saturating_add(*n)));
    histogram.set_sample_sum(delays.sum_us as f64 / 1e6);
    let mut metric = Metric::from_label(labels.to_vec());
    metric.set_histogram(histogram);
    metric
}

#[cfg(test)]
mod tests {
    use prometheus::TextEncoder;

    use super::*;

    #[test]
    fn a_report_is_exported_in_the_text_format() {
        let mut report = StreamReport { received: 7, repaired: [3, 2, 1], ..Default::default() };
        report.delays = DelayReport { counts: vec![4, 0, 0, 1], sum_us: 12_000 };
        report.paths[1].received = 7;
        report.paths[1].lost = 2;
        let series = ReportSeries::new("downpour_test", &["stream"]).unwrap();
        let families = series.collect([(vec!["live/a".to_owned()], &report)].into_iter());
        let text = TextEncoder::new().encode_to_string(&families).unwrap();
        for line in [
            "# TYPE downpour_test_delay_seconds histogram",
            r#"downpour_test_packets{stream="live/a",fate="repaired_2"} 2"#,
            r#"downpour_test_path_packets{stream="live/a",path="1",fate="lost"} 2"#,
            r#"downpour_test_delay_seconds_bucket{stream="live/a",le="0.005"} 4"#,
            r#"downpour_test_delay_seconds_bucket{stream="live/a",le="0.01"} 5"#,
            r#"downpour_test_delay_seconds_bucket{stream="live/a",le="+Inf"} 5"#,
            r#"downpour_test_delay_seconds_sum{stream="live/a"} 0.012"#,
            r#"downpour_test_delay_seconds_count{stream="live/a"} 5"#,
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }
}
