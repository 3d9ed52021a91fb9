//! Settings of pacing, and the frame interval that it works with.

use std::time::Duration;

/// How bursts are spread over time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum Pacing {
    /// Each burst is sent at once.
    #[default]
    Off,
    /// As [`Self::Factor`] 2, to the addresses that get every stream: the socket buffers of existing Go
    /// edges are shorter than a key frame. Other addresses get each burst at once.
    Targets,
    /// Each burst is sent at this multiple of its stream's rate, but within one frame interval.
    Factor(PaceFactor),
}

impl Pacing {
    /// The factor of the bursts that are paced.
    pub(super) fn factor(self) -> Option<PaceFactor> {
        match self {
            Self::Off => None,
            Self::Targets => Some(PaceFactor::OF_TARGETS),
            Self::Factor(factor) => Some(factor),
        }
    }
}

/// The rate of a paced burst, as a multiple of its stream's rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaceFactor(f64);

impl PaceFactor {
    /// The smallest factor. It leaves capacity for the frames that follow while a key frame is sent.
    pub const MIN: f64 = 1.5;
    /// The largest factor.
    pub const MAX: f64 = 100.0;
    /// With this factor, a Go edge lost nothing of key frames of 130 kB.
    const OF_TARGETS: Self = Self(2.0);

    /// Returns `None` unless `factor` is between [`Self::MIN`] and [`Self::MAX`].
    pub fn new(factor: f64) -> Option<Self> {
        (Self::MIN..=Self::MAX).contains(&factor).then_some(Self(factor))
    }

    /// The factor as a number.
    pub fn get(self) -> f64 {
        self.0
    }
}

/// A stream's frame interval, measured by its media timestamps rather than by arrival, so that the
/// encoder's jitter has no influence.
#[derive(Debug, Default)]
pub struct FrameInterval {
    last: Option<u32>,
    interval: Option<Duration>,
}

impl FrameInterval {
    /// Adds the timestamp of a video frame, in milliseconds modulo 2³².
    pub fn add(&mut self, timestamp: u32) {
        let since = self.last.map(|last| timestamp.wrapping_sub(last));
        match since {
            // A sequence header has the timestamp of its frame.
            Some(0) => return,
            Some(ms @ 1..=MAX_INTERVAL_MS) => {
                self.interval = Some(Duration::from_millis(ms.max(MIN_INTERVAL_MS).into()));
            }
            // The timestamps jumped: wait for the next frame.
            _ => {}
        }
        self.last = Some(timestamp);
    }

    /// The time between the last two frames, limited to 5 to 100 ms. Returns 20 ms without video.
    pub fn get(&self) -> Duration {
        self.interval.unwrap_or(DEFAULT_INTERVAL)
    }
}

const MIN_INTERVAL_MS: u32 = 5;
const MAX_INTERVAL_MS: u32 = 100;
const DEFAULT_INTERVAL: Duration = Duration::from_millis(20);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_follows_the_media_timestamps() {
        let mut interval = FrameInterval::default();
        assert_eq!(interval.get(), DEFAULT_INTERVAL);
        let steps = [
            (0, 20),
            (0, 20),
            (33, 33),
            (33, 33),
            (67, 34),
            (90_000, 34),
            (90_040, 40),
            (90_041, 5),
        ];
        for (timestamp, expected) in steps {
            interval.add(timestamp);
            assert_eq!(interval.get().as_millis(), expected, "{timestamp}");
        }
        interval.add(u32::MAX - 9);
        interval.add(30);
        assert_eq!(interval.get(), Duration::from_millis(40));
    }

    #[test]
    fn a_factor_outside_its_range_is_refused() {
        for (factor, valid) in [(1.5, true), (100.0, true), (1.49, false), (101.0, false)] {
            assert_eq!(PaceFactor::new(factor).is_some(), valid, "{factor}");
        }
        assert_eq!(PaceFactor::new(f64::NAN), None);
    }
}
