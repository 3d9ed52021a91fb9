//! The limit of all log lines that repeat: whatever floods a node does not flood its log.
//!
//! A line is identified by its place in the code, its message, and the fields that name what it is
//! about ([`NAMING`]): lines about two streams are two lines; lines about two peers are one, because
//! anybody can have many addresses. Each line is written [`BURST`] times per 10 s, for at most
//! [`NAMES`] names per place. What was left out is added to the next line from the same place, as the
//! field `left_out`, or reported by [`Repeats::report`].
//!
//! Lines at debug and trace have no limit: they are switched on to see everything.

use std::{
    cell::Cell,
    collections::HashMap,
    fmt::{self, Write},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Instant,
};

use parking_lot::Mutex;
use tracing::{
    Event, Level, Subscriber,
    callsite::Identifier,
    field::{Field, Visit},
};
use tracing_subscriber::layer::{Context, Layer};

use downpour_sys::KeyedLogLimit;

/// The limits of all lines. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Repeats(Arc<Mutex<HashMap<Identifier, Place>>>);

/// One place in the code that logs.
struct Place {
    limits: KeyedLogLimit<u64>,
    /// Lines left out since the last one that was written.
    left_out: u64,
    /// The message of the line left out last.
    message: String,
}

impl Repeats {
    /// Logs, for each place from which nothing came since, how many lines were left out.
    pub(super) fn report(&self) {
        let take = |place: &mut Place| {
            let left_out = std::mem::take(&mut place.left_out);
            (left_out > 0).then(|| (std::mem::take(&mut place.message), left_out))
        };
        let found: Vec<_> = self.0.lock().values_mut().filter_map(take).collect();
        for (line, left_out) in found {
            // Not as `left_out`, which is added to a line that repeats.
            tracing::info!(line, lines = left_out, "repeated lines left out of the log");
        }
    }

    /// Returns the number of lines left out before this one; `None` to leave it out.
    fn due(&self, now: Instant, event: &Event<'_>) -> Option<u64> {
        let mut line = Line::default();
        event.record(&mut line);
        let mut places = self.0.lock();
        let place = places.entry(event.metadata().callsite()).or_insert_with(|| Place {
            limits: KeyedLogLimit::new(NAMES).with_burst(BURST),
            left_out: 0,
            message: String::new(),
        });
        if place.limits.due(now, line.hash.finish()).is_some() {
            return Some(std::mem::take(&mut place.left_out));
        }
        place.left_out += 1;
        place.message = line.message;
        None
    }
}

impl<S: Subscriber> Layer<S> for Repeats {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let is_limited = *event.metadata().level() <= Level::INFO
            // Its own reports.
            && event.metadata().module_path() != Some(module_path!());
        let due = if is_limited { self.due(Instant::now(), event) } else { Some(0) };
        LEFT_OUT.set(due.unwrap_or(0));
        due.is_some()
    }
}

/// The number of lines left out before the one that this thread writes.
pub(super) fn left_out() -> u64 {
    LEFT_OUT.get()
}

thread_local! {
    static LEFT_OUT: Cell<u64> = const { Cell::new(0) };
}

/// The identity of a line.
#[derive(Default)]
struct Line {
    message: String,
    hash: DefaultHasher,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // Writing to a String does not fail.
            let _ = write!(self.message, "{value:?}");
            self.message.hash(&mut self.hash);
        } else if NAMING.contains(&field.name()) {
            field.name().hash(&mut self.hash);
            format!("{value:?}").hash(&mut self.hash);
        }
    }
}

/// Fields that name what a line is about.
const NAMING: [&str; 6] = ["stream", "node", "target", "destination", "reason", "protocol"];
/// Lines per 10 s with the same identity.
const BURST: u32 = 5;
/// Names per place and 10 s. Further ones share one limit.
const NAMES: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    /// Writes the fields of the events that it gets.
    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<(String, u64)>>>);

    impl<S: Subscriber> Layer<S> for Written {
        fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
            let mut line = Line::default();
            event.record(&mut line);
            self.0.lock().push((line.message, left_out()));
        }
    }

    fn written(log: impl FnOnce(&Repeats)) -> Vec<(String, u64)> {
        let (repeats, written) = (Repeats::default(), Written::default());
        let subscriber = tracing_subscriber::registry().with(written.clone()).with(repeats.clone());
        tracing::subscriber::with_default(subscriber, || log(&repeats));
        written.0.lock().clone()
    }

    #[test]
    fn a_repeated_line_is_written_a_few_times_and_the_rest_is_counted() {
        let lines = written(|repeats| {
            for peer in 0..300 {
                tracing::info!(peer, "connection refused");
            }
            repeats.report();
            repeats.report();
        });
        assert_eq!(lines.len(), BURST as usize + 1, "{lines:?}");
        assert_eq!(lines[BURST as usize].0, "repeated lines left out of the log");
    }

    #[test]
    fn lines_about_two_streams_are_two_lines_and_made_up_names_are_bounded() {
        let lines = written(|_| {
            for number in 0..10_000 {
                tracing::info!(stream = %number, "stream up");
            }
            tracing::info!("another line");
        });
        assert_eq!(lines.len(), NAMES + BURST as usize + 1, "{lines:?}");
        let few = written(|_| {
            for number in 0..40 {
                tracing::warn!(stream = %(number % 20), "stream up");
            }
        });
        assert_eq!(few.len(), 40);
    }

    #[test]
    fn debug_lines_have_no_limit() {
        let lines = written(|_| (0..300).for_each(|_| tracing::debug!("packet")));
        assert_eq!(lines.len(), 300);
    }
}
