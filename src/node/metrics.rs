//! Metrics of the process, of streams and of admission. Other parts register theirs.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus::{
    GaugeVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
    core::{Collector, Desc},
    process_collector::ProcessCollector,
    proto::MetricFamily,
};

use downpour_distribution::downstream::outgoing::{OutgoingStream, OutgoingStreams};
use downpour_hub::{Admission, Hub, Stream};

/// Returns a registry with the metrics of the process, the build, admission, and each live stream.
///
/// # Errors
/// None in practice: the names are distinct.
pub fn registry(
    admission: &Admission,
    outgoing: Option<OutgoingStreams>,
) -> prometheus::Result<Registry> {
    let registry = Registry::new();
    registry.register(Box::new(ProcessCollector::for_self()))?;
    let build = IntGauge::with_opts(
        Opts::new("downpour_build_info", "1, with the version as a label.")
            .const_label("version", env!("CARGO_PKG_VERSION")),
    )?;
    build.set(1);
    registry.register(Box::new(build))?;
    registry.register(Box::new(StreamCollector::new(admission.hub().clone(), outgoing)?))?;
    registry.register(Box::new(AdmissionCollector::new(admission.clone())?))?;
    Ok(registry)
}

/// Reads the counters of admission per scrape.
struct AdmissionCollector {
    admission: Admission,
    takeovers: IntCounter,
    resumed: IntCounter,
}

impl AdmissionCollector {
    fn new(admission: Admission) -> prometheus::Result<Self> {
        let takeovers = IntCounter::new(
            "downpour_publisher_takeovers_total",
            "Publishers that took a key over from a silent one",
        )?;
        let resumed = IntCounter::new(
            "downpour_publications_resumed_total",
            "Publications that continued the stream of an earlier one within publish_grace_ms",
        )?;
        Ok(Self { admission, takeovers, resumed })
    }
}

impl Collector for AdmissionCollector {
    fn desc(&self) -> Vec<&Desc> {
        [self.takeovers.desc(), self.resumed.desc()].concat()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let counters = self.admission.counters();
        let pairs = [(&self.takeovers, &counters.takeovers), (&self.resumed, &counters.resumed)];
        let families = pairs.map(|(metric, counter)| {
            metric.inc_by(load(counter).saturating_sub(metric.get()));
            metric.collect()
        });
        families.concat()
    }
}

/// Encodes all metrics of `registry` in Prometheus's text format, version 0.0.4.
///
/// # Errors
/// If a collector returned metrics that the format does not allow.
pub fn encode(registry: &Registry) -> prometheus::Result<String> {
    TextEncoder::new().encode_to_string(&registry.gather())
}

/// Reads the counters of each live stream per scrape. So the series of a stream vanish with it, and
/// no label is looked up per tag.
///
/// The label `stream` has one value per live stream.
pub struct StreamCollector {
    hub: Hub,
    outgoing: Option<OutgoingStreams>,
    descs: Vec<Desc>,
}

impl StreamCollector {
    /// Collects from `hub`, and from `outgoing` on a node that sends RTP.
    ///
    /// # Errors
    /// None in practice: the names are valid.
    pub fn new(hub: Hub, outgoing: Option<OutgoingStreams>) -> prometheus::Result<Self> {
        let describe = |families: &[&dyn Collector]| -> Vec<Desc> {
            families.iter().flat_map(|family| family.desc()).cloned().collect()
        };
        let mut descs = describe(&HubFamilies::new()?.all());
        if outgoing.is_some() {
            descs.extend(describe(&OutgoingFamilies::new()?.all()));
        }
        Ok(Self { hub, outgoing, descs })
    }
}

impl Collector for StreamCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let (Ok(hub), Ok(outgoing)) = (HubFamilies::new(), OutgoingFamilies::new()) else {
            return Vec::new();
        };
        let streams = self.hub.streams();
        hub.streams.set(saturating(streams.len() as u64));
        streams.iter().for_each(|stream| hub.add(stream));
        let mut families: Vec<_> =
            hub.all().into_iter().flat_map(|family| family.collect()).collect();
        if let Some(source) = &self.outgoing {
            // A new stream may have the key of one that has ended.
            source.streams().iter().filter(|s| !s.ended()).for_each(|stream| outgoing.add(stream));
            families.extend(outgoing.all().into_iter().flat_map(|family| family.collect()));
        }
        families
    }
}

struct HubFamilies {
    streams: IntGauge,
    tags: IntCounterVec,
    bytes: IntCounterVec,
    key_frames: IntCounterVec,
    skipped_tags: IntCounterVec,
    viewers: IntGaugeVec,
    log_tags: IntGaugeVec,
    log_bytes: IntGaugeVec,
}

impl HubFamilies {
    fn new() -> prometheus::Result<Self> {
        Ok(Self {
            streams: IntGauge::new("downpour_streams", "Streams that are live.")?,
            tags: counter("downpour_stream_tags_total", "Tags received.", &["stream", "kind"])?,
            bytes: counter(
                "downpour_stream_bytes_total",
                "Bytes of tag bodies received.",
                &["stream", "kind"],
            )?,
            key_frames: counter(
                "downpour_stream_key_frames_total",
                "Key frames received.",
                &["stream"],
            )?,
            skipped_tags: counter(
                "downpour_stream_skipped_tags_total",
                "Tags that slow readers skipped, summed over readers.",
                &["stream"],
            )?,
            viewers: gauge("downpour_stream_viewers", "Viewers now.")?,
            log_tags: gauge("downpour_stream_log_tags", "Tags that the log holds.")?,
            log_bytes: gauge("downpour_stream_log_bytes", "Memory that the log holds.")?,
        })
    }

    fn add(&self, stream: &Stream) {
        let key = stream.key().as_str();
        let counters = stream.counters();
        for (kind, tags, bytes) in [
            ("video", &counters.video_tags, &counters.video_bytes),
            ("audio", &counters.audio_tags, &counters.audio_bytes),
        ] {
            self.tags.with_label_values(&[key, kind]).inc_by(load(tags));
            self.bytes.with_label_values(&[key, kind]).inc_by(load(bytes));
        }
        self.tags.with_label_values(&[key, "script"]).inc_by(load(&counters.script_tags));
        self.key_frames.with_label_values(&[key]).inc_by(load(&counters.key_frames));
        self.skipped_tags.with_label_values(&[key]).inc_by(load(&counters.skipped_tags));
        self.viewers.with_label_values(&[key]).set(saturating(load(&counters.viewers)));
        let (tags, bytes) = stream.held();
        self.log_tags.with_label_values(&[key]).set(saturating(tags as u64));
        self.log_bytes.with_label_values(&[key]).set(saturating(bytes as u64));
    }

    fn all(&self) -> [&dyn Collector; 8] {
        [
            &self.streams,
            &self.tags,
            &self.bytes,
            &self.key_frames,
            &self.skipped_tags,
            &self.viewers,
            &self.log_tags,
            &self.log_bytes,
        ]
    }
}

struct OutgoingFamilies {
    packets: IntCounterVec,
    bytes: IntCounterVec,
    ring_packets: IntGaugeVec,
    ring_bytes: IntGaugeVec,
    asked: IntCounterVec,
    served: IntCounterVec,
    gone: IntCounterVec,
    parity_overhead: GaugeVec,
}

impl OutgoingFamilies {
    fn new() -> prometheus::Result<Self> {
        let stream = &["stream"];
        Ok(Self {
            packets: counter(
                "downpour_rtp_packets_total",
                "RTP packets built, each counted once however many edges it goes to.",
                stream,
            )?,
            bytes: counter("downpour_rtp_bytes_total", "Bytes of RTP packets built.", stream)?,
            ring_packets: gauge("downpour_ring_packets", "Packets held for repair.")?,
            ring_bytes: gauge("downpour_ring_bytes", "Bytes held for repair.")?,
            asked: counter("downpour_repair_asked_total", "Packets asked for again.", stream)?,
            served: counter(
                "downpour_repair_served_total",
                "Packets sent again, each copy counted.",
                stream,
            )?,
            gone: counter(
                "downpour_repair_gone_total",
                "Packets asked for that were no longer held.",
                stream,
            )?,
            parity_overhead: GaugeVec::new(
                Opts::new(
                    "downpour_fec_overhead_ratio",
                    "Parity packets a media packet, of those receivers that get most.",
                ),
                stream,
            )?,
        })
    }

    fn add(&self, stream: &OutgoingStream) {
        let key = &[stream.key().as_str()];
        let (packets, bytes) = stream.pushed();
        self.packets.with_label_values(key).inc_by(packets);
        self.bytes.with_label_values(key).inc_by(bytes);
        let (packets, bytes) = stream.held();
        self.ring_packets.with_label_values(key).set(saturating(packets as u64));
        self.ring_bytes.with_label_values(key).set(saturating(bytes as u64));
        self.asked.with_label_values(key).inc_by(load(&stream.repairs.asked));
        self.served.with_label_values(key).inc_by(load(&stream.repairs.served));
        self.gone.with_label_values(key).inc_by(load(&stream.repairs.gone));
        self.parity_overhead.with_label_values(key).set(stream.parity_overhead());
    }

    fn all(&self) -> [&dyn Collector; 8] {
        [
            &self.packets,
            &self.bytes,
            &self.ring_packets,
            &self.ring_bytes,
            &self.asked,
            &self.served,
            &self.gone,
            &self.parity_overhead,
        ]
    }
}

fn counter(name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
    IntCounterVec::new(Opts::new(name, help), labels)
}

fn gauge(name: &str, help: &str) -> prometheus::Result<IntGaugeVec> {
    IntGaugeVec::new(Opts::new(name, help), &["stream"])
}

fn load(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn saturating(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use downpour_hub::{LogLimits, admission};
    use downpour_media::{
        StreamKey,
        flv::{Tag, TagKind},
    };
    use downpour_repair::{history::History, rtp::Ssrc};

    #[test]
    fn series_of_a_stream_appear_and_vanish_with_it() {
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 10_000 });
        let outgoing = OutgoingStreams::new();
        let registry = registry(
            &Admission::new(hub.clone(), admission::Settings::default()),
            Some(outgoing.clone()),
        )
        .unwrap();
        let key: StreamKey = "live/movie".parse().unwrap();
        let mut publisher = hub.publish(key.clone()).unwrap();
        publisher.push(Tag::new(TagKind::Video, 0, &[0x17, 1, 0, 0, 0]).unwrap());
        let viewer = publisher.stream().viewer();
        let history = History::new(100, Duration::from_secs(1));
        let stream = std::sync::Arc::new(OutgoingStream::new(key, Ssrc(7), 0, history));
        stream.repairs.asked.fetch_add(3, Ordering::Relaxed);
        outgoing.insert(stream.clone());

        let text = encode(&registry).unwrap();
        for line in [
            "downpour_streams 1",
            "downpour_stream_bytes_total{kind=\"video\",stream=\"live/movie\"} 5",
            "downpour_stream_key_frames_total{stream=\"live/movie\"} 1",
            "downpour_stream_viewers{stream=\"live/movie\"} 1",
            "downpour_repair_asked_total{stream=\"live/movie\"} 3",
            "downpour_ring_packets{stream=\"live/movie\"} 0",
            concat!("downpour_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
        assert!(text.contains("process_resident_memory_bytes"));

        drop((viewer, publisher));
        outgoing.end(&stream);
        let text = encode(&registry).unwrap();
        assert!(!text.contains("live/movie"), "{text}");
    }
}
