//! Positions of a stream's readers: the log keeps what a slow one has still to read.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

/// The cursors of all readers of a stream.
///
/// A reader stores its cursor behind the lock of the log for reading, and the publisher reads them behind
/// that for writing, so a tag that a reader has still to read is never dropped as read.
#[derive(Debug, Default)]
pub(crate) struct Cursors {
    readers: Mutex<HashMap<u64, Arc<AtomicU64>>>,
    next_id: AtomicU64,
}

/// The cursor of one reader.
#[derive(Debug)]
pub(crate) struct Cursor {
    id: u64,
    at: Arc<AtomicU64>,
}

impl Cursors {
    pub(crate) fn add(&self, at: u64) -> Cursor {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let at = Arc::new(AtomicU64::new(at));
        self.readers.lock().insert(id, at.clone());
        Cursor { id, at }
    }

    pub(crate) fn remove(&self, cursor: &Cursor) {
        self.readers.lock().remove(&cursor.id);
    }

    /// Index of the oldest tag that a reader has still to read; [`Cursor::NOWHERE`] if there is none.
    pub(crate) fn lowest(&self) -> u64 {
        let readers = self.readers.lock();
        readers.values().map(|at| at.load(Ordering::Relaxed)).min().unwrap_or(Cursor::NOWHERE)
    }
}

impl Cursor {
    /// The cursor of a reader that waits for a start point.
    pub(crate) const NOWHERE: u64 = u64::MAX;

    pub(crate) fn set(&self, at: u64) {
        self.at.store(at, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.at.load(Ordering::Relaxed)
    }
}
