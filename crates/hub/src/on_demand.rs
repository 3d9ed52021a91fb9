//! Sources that run only while somebody wants their stream.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use downpour_media::StreamKey;
use parking_lot::{Mutex, RwLock};

/// A source that starts when a stream is asked for: a relay, an upstream subscription.
/// [`Hub::add_on_demand`](crate::Hub::add_on_demand) registers it.
///
/// Both calls come from the task of whoever asks and must not block. They alternate per key.
pub trait OnDemand: Send + Sync {
    /// Somebody asks for the stream: the first one.
    fn wanted(&self, key: &StreamKey);

    /// The last one who asked for the stream has gone.
    fn unwanted(&self, key: &StreamKey);
}

/// Which streams are asked for, and the sources that can bring them.
#[derive(Default)]
pub(crate) struct Demand {
    sources: RwLock<Vec<Arc<dyn OnDemand>>>,
    /// Guards per key.
    wanted: Mutex<HashMap<StreamKey, usize>>,
}

impl Demand {
    pub(crate) fn add(&self, source: Arc<dyn OnDemand>) {
        self.sources.write().push(source);
    }

    /// `None` where no source waits for demand, which costs nothing.
    pub(crate) fn want(self: &Arc<Self>, key: &StreamKey) -> Option<Wanted> {
        let sources = self.sources.read();
        if sources.is_empty() {
            return None;
        }
        // The calls are made behind the lock, so that they alternate.
        let mut wanted = self.wanted.lock();
        let count = wanted.entry(key.clone()).or_default();
        *count += 1;
        if *count == 1 {
            sources.iter().for_each(|source| source.wanted(key));
        }
        Some(Wanted { demand: self.clone(), key: key.clone() })
    }
}

/// Keeps a stream wanted until it is dropped.
pub struct Wanted {
    demand: Arc<Demand>,
    key: StreamKey,
}

impl Drop for Wanted {
    fn drop(&mut self) {
        let sources = self.demand.sources.read();
        let mut wanted = self.demand.wanted.lock();
        if let Entry::Occupied(mut count) = wanted.entry(self.key.clone()) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
                sources.iter().for_each(|source| source.unwanted(&self.key));
            }
        }
    }
}
