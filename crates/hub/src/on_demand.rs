//! Sources that run only while a player wants their stream.
//!
//! ```text
//!               first guard                    last guard dropped
//! unwanted ───────────────────► wanted(key) ─────────────────────► unwanted(key)
//! ```
//!
//! Invariants: sources are called one change at a time, in order, and without a lock, so that a call
//! may publish, ask for another stream or drop guards. The calls for a key alternate and end with the
//! state that the guards left. Memory is bounded by the number of keys that have guards.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use downpour_media::StreamKey;
use parking_lot::Mutex;

/// A source that starts when a stream is asked for: a relay, an upstream subscription.
/// [`Hub::add_on_demand`](crate::Hub::add_on_demand) registers it.
///
/// The calls for one key alternate. They come from the task that asks or from another that asks at
/// the same time, so they must not block. They may call the hub.
pub trait OnDemand: Send + Sync {
    /// The stream has its first [`Wanted`] guard.
    fn wanted(&self, key: &StreamKey);

    /// The stream's last [`Wanted`] guard was dropped.
    fn unwanted(&self, key: &StreamKey);
}

/// The streams that are asked for, and the sources that may bring them.
#[derive(Default)]
pub(crate) struct Demand {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sources: Vec<Arc<dyn OnDemand>>,
    keys: HashMap<StreamKey, KeyDemand>,
    changes: VecDeque<Change>,
    /// A thread is calling sources; it takes later changes, too.
    reporting: bool,
}

#[derive(Default)]
struct KeyDemand {
    guards: usize,
    /// `true` if sources were last called with `wanted`.
    reported: bool,
    /// `true` while the key is in [`State::changes`].
    queued: bool,
}

/// A change that sources have not been notified of.
enum Change {
    /// The key may have got its first guard or lost its last one.
    Key(StreamKey),
    /// A source was added. It starts with the keys that are wanted already.
    Source(Arc<dyn OnDemand>),
}

impl Demand {
    pub(crate) fn add(&self, source: Arc<dyn OnDemand>) {
        self.state.lock().changes.push_back(Change::Source(source));
        self.report();
    }

    pub(crate) fn want(self: &Arc<Self>, key: &StreamKey) -> Wanted {
        self.state.lock().count(key, |guards| guards + 1);
        let wanted = Wanted { demand: self.clone(), key: key.clone() };
        self.report();
        wanted
    }

    /// Calls sources until they know all changes, unless another thread does.
    fn report(&self) {
        if std::mem::replace(&mut self.state.lock().reporting, true) {
            return;
        }
        let mut reporting = Reporting { state: &self.state, done: false };
        while let Some(call) = reporting.next() {
            call();
        }
    }
}

impl State {
    fn count(&mut self, key: &StreamKey, change: impl FnOnce(usize) -> usize) {
        let demand = self.keys.entry(key.clone()).or_default();
        demand.guards = change(demand.guards);
        if (demand.guards > 0) != demand.reported && !demand.queued {
            demand.queued = true;
            self.changes.push_back(Change::Key(key.clone()));
        }
    }

    /// Takes the next change and returns the calls that it needs.
    fn take_change(&mut self) -> Option<Box<dyn FnOnce()>> {
        while let Some(change) = self.changes.pop_front() {
            let key = match change {
                Change::Key(key) => key,
                Change::Source(source) => {
                    self.sources.push(source.clone());
                    let wanted = self.keys.iter().filter(|(_, demand)| demand.reported);
                    let wanted: Vec<_> = wanted.map(|(key, _)| key.clone()).collect();
                    return Some(Box::new(move || {
                        wanted.iter().for_each(|key| source.wanted(key));
                    }));
                }
            };
            let Some(demand) = self.keys.get_mut(&key) else { continue };
            demand.queued = false;
            let wanted = demand.guards > 0;
            let changed = wanted != demand.reported;
            demand.reported = wanted;
            if !wanted {
                self.keys.remove(&key);
            }
            if changed {
                let sources = self.sources.clone();
                return Some(Box::new(move || {
                    sources.iter().for_each(|source| match wanted {
                        true => source.wanted(&key),
                        false => source.unwanted(&key),
                    });
                }));
            }
        }
        None
    }
}

/// The right to call sources. A source that panics passes it on.
struct Reporting<'a> {
    state: &'a Mutex<State>,
    done: bool,
}

impl Reporting<'_> {
    /// The next calls. `None` once there are none: the right is given up in the same moment, so that
    /// no change is left to nobody.
    fn next(&mut self) -> Option<Box<dyn FnOnce()>> {
        let mut state = self.state.lock();
        let call = state.take_change();
        if call.is_none() {
            state.reporting = false;
            self.done = true;
        }
        call
    }
}

impl Drop for Reporting<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.state.lock().reporting = false;
        }
    }
}

/// Keeps a stream wanted until it is dropped.
#[must_use = "the stream is wanted only while this guard lives"]
pub struct Wanted {
    demand: Arc<Demand>,
    key: StreamKey,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        self.demand.state.lock().count(&self.key, |guards| guards - 1);
        self.demand.report();
    }
}

#[cfg(test)]
mod tests;
