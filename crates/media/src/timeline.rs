//! Timestamps of one recording or relay, continuous where the encoder's are not.

/// Timestamps that begin at 0 and go on when the encoder's start over.
#[derive(Debug, Default)]
pub struct Timeline {
    base: Option<u32>,
    newest: u32,
}

impl Timeline {
    /// The timestamp in milliseconds, shifted so that the first is 0 and none falls far behind.
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
        // Audio that is a little earlier than the first key frame would be before 0.
        if self.newest < MAX_INTERLEAVE_MS as u32 && rebased > self.newest { 0 } else { rebased }
    }
}

/// Audio and video of one moment may be this far apart, in milliseconds.
const MAX_INTERLEAVE_MS: i32 = 10_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_starts_over_does_not_go_back() {
        let mut timeline = Timeline::default();
        let rebased: Vec<_> =
            [500_000, 500_040, 500_020, 0, 40, 30].map(|t| timeline.rebase(t)).into();
        assert_eq!(rebased, [0, 40, 20, 40, 80, 70]);
        // Seven weeks on, the file's own timestamps wrap.
        let mut timeline = Timeline { base: Some(10), newest: u32::MAX - 5 };
        assert_eq!(timeline.rebase(9), u32::MAX);
        assert_eq!(timeline.rebase(15), 5);
        assert_eq!(timeline.rebase(5), 0);
    }
}
