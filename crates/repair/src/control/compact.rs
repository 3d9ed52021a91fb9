//! Compact JSON of reports: counters that are 0 are left out. An edge may report hundreds of streams
//! per second, most of which lose nothing.

use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    ser::{SerializeMap, SerializeSeq},
};

use super::{DelayReport, PathReport, StreamReport};
use crate::receiver::{DELAY_BOUNDS_MS, MAX_PATHS};

/// Serializes the streams of a report.
pub(super) fn serialize<S: Serializer>(
    streams: &[StreamReport],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(streams.iter().map(Compact))
}

/// Deserializes the buckets of a histogram; trailing empty buckets may be left out.
pub(super) fn counts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u64>, D::Error> {
    let mut counts = Vec::deserialize(deserializer)?;
    if !counts.is_empty() && counts.len() <= DELAY_BOUNDS_MS.len() {
        counts.resize(DELAY_BOUNDS_MS.len() + 1, 0);
    }
    Ok(counts)
}

struct Compact<'a, T: ?Sized>(&'a T);

impl Serialize for Compact<'_, StreamReport> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let StreamReport { ssrc, repaired, delays, waits, paths, .. } = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("ssrc", ssrc)?;
        serialize_counts(&mut map, &self.0.counters())?;
        if *repaired != [0; 3] {
            map.serialize_entry("repaired", repaired)?;
        }
        for (name, delays) in [("delays", delays), ("waits", waits)] {
            if *delays != DelayReport::default() {
                map.serialize_entry(name, &Compact(delays))?;
            }
        }
        if *paths != [PathReport::default(); MAX_PATHS] {
            map.serialize_entry("paths", &Compact(&paths[..]))?;
        }
        map.end()
    }
}

impl Serialize for Compact<'_, DelayReport> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let DelayReport { counts, sum_us } = self.0;
        // At least one bucket: an empty list means that there is no histogram.
        let len = counts.iter().rposition(|count| *count > 0).unwrap_or(0) + 1;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("counts", &counts[..len.min(counts.len())])?;
        serialize_counts(&mut map, &[("sum_us", *sum_us)])?;
        map.end()
    }
}

impl Serialize for Compact<'_, [PathReport]> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut paths = serializer.serialize_seq(Some(self.0.len()))?;
        for path in self.0 {
            paths.serialize_element(&Compact(path))?;
        }
        paths.end()
    }
}

impl Serialize for Compact<'_, PathReport> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let PathReport { received, lost, gaps } = self.0;
        let mut map = serializer.serialize_map(None)?;
        serialize_counts(&mut map, &[("received", *received), ("lost", *lost), ("gaps", *gaps)])?;
        map.end()
    }
}

fn serialize_counts<M: SerializeMap>(
    map: &mut M,
    counts: &[(&'static str, u64)],
) -> Result<(), M::Error> {
    let mut nonzero = counts.iter().filter(|(_, count)| *count > 0);
    nonzero.try_for_each(|(name, count)| map.serialize_entry(name, count))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::control::Report;

    fn count() -> impl Strategy<Value = u64> {
        prop_oneof![3 => Just(0), 1 => any::<u64>()]
    }

    fn delays() -> impl Strategy<Value = DelayReport> {
        let counts = prop::collection::vec(count(), DELAY_BOUNDS_MS.len() + 1);
        prop_oneof![
            Just(DelayReport::default()),
            (counts, count()).prop_map(|(counts, sum_us)| DelayReport { counts, sum_us }),
        ]
    }

    fn report() -> impl Strategy<Value = StreamReport> {
        let path = [count(), count(), count()].prop_map(|[received, lost, gaps]| PathReport {
            received,
            lost,
            gaps,
        });
        let counts = prop::array::uniform9(count());
        let repaired = prop::array::uniform3(count());
        (any::<u32>(), counts, repaired, [delays(), delays()], prop::array::uniform2(path))
            .prop_map(|(ssrc, counts, repaired, [delays, waits], paths)| {
                let mut report = StreamReport {
                    ssrc,
                    repaired,
                    delays,
                    waits,
                    paths,
                    ..StreamReport::default()
                };
                for (counter, count) in report.counters_mut().into_iter().zip(counts) {
                    *counter = count;
                }
                report
            })
    }

    proptest! {
        #[test]
        fn omitted_counters_are_read_as_0(streams in prop::collection::vec(report(), 0..3)) {
            let report = Report { round_trip_us: 7, streams };
            let json = serde_json::to_string(&report).unwrap();
            prop_assert_eq!(serde_json::from_str::<Report>(&json).unwrap(), report);
        }
    }

    #[test]
    fn a_stream_without_loss_has_a_short_report() {
        let mut counts = vec![0; DELAY_BOUNDS_MS.len() + 1];
        counts[0] = 1000;
        let delays = DelayReport { counts, sum_us: 0 };
        let path = PathReport { received: 1000, ..PathReport::default() };
        let stream = StreamReport {
            ssrc: 9,
            received: 1000,
            delays: delays.clone(),
            waits: delays,
            paths: [path, PathReport::default()],
            ..StreamReport::default()
        };
        let json = serde_json::to_string(&Report { round_trip_us: 5, streams: vec![stream] });
        assert_eq!(
            json.unwrap(),
            r#"{"round_trip_us":5,"streams":[{"ssrc":9,"received":1000,"delays":{"counts":[1000]},"waits":{"counts":[1000]},"paths":[{"received":1000},{}]}]}"#
        );
    }
}
