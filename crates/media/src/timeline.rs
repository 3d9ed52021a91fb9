//! Continuous timestamps for a recording or a relay.

/// Maps an encoder's timestamps to a timeline that starts at 0 and stays continuous when the
/// encoder restarts its clock.
///
/// A timestamp more than 10 s behind the newest is a clock restart: it continues at the newest.
/// Smaller steps back are interleaving of audio and video and are kept.
#[derive(Debug, Default, Clone)]
pub struct Timeline {
    /// The encoder's timestamp at 0 of this timeline; `None` before the first.
    base: Option<u32>,
    /// The largest timestamp returned, modulo 2³².
    newest: u32,
}

impl Timeline {
    /// Returns `timestamp` on this timeline. Both are in milliseconds and wrap at 2³².
    pub fn rebase(&mut self, timestamp: u32) -> u32 {
        let base = *self.base.get_or_insert(timestamp);
        let rebased = timestamp.wrapping_sub(base);
        let step = rebased.wrapping_sub(self.newest) as i32;
        if step < -MAX_INTERLEAVE_MS {
            self.base = Some(timestamp.wrapping_sub(self.newest));
            return self.newest;
        }
        if step > 0 {
            self.newest = rebased;
            return rebased;
        }
        // Audio slightly earlier than the first key frame would be negative: clamp to 0.
        if self.newest < MAX_INTERLEAVE_MS as u32 && rebased > self.newest { 0 } else { rebased }
    }
}

/// The largest step back, in milliseconds, that is interleaving and not a clock restart.
const MAX_INTERLEAVE_MS: i32 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeline_continues_when_the_encoders_clock_restarts() {
        let mut timeline = Timeline::default();
        let rebased: Vec<_> =
            [500_000, 500_040, 500_020, 0, 40, 30].map(|t| timeline.rebase(t)).into();
        assert_eq!(rebased, [0, 40, 20, 40, 80, 70]);
    }

    #[test]
    fn timeline_wraps_at_32_bits() {
        let mut timeline = Timeline { base: Some(10), newest: u32::MAX - 5 };
        assert_eq!(timeline.rebase(9), u32::MAX);
        assert_eq!(timeline.rebase(15), 5);
        assert_eq!(timeline.rebase(5), 0);
    }
}
