//! Rates and totals that `push` and `pull` print.

use std::{
    fmt, io,
    sync::atomic::{AtomicU64, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use super::Failure;

/// Counters of all connections of one command.
#[derive(Debug)]
pub(super) struct Rates {
    began: Instant,
    wanted: usize,
    open: AtomicUsize,
    bytes: AtomicU64,
    tags: AtomicU64,
    errors: AtomicUsize,
    first_error: Mutex<Option<String>>,
}

impl Rates {
    pub(super) fn new(wanted: usize) -> Self {
        Self {
            began: Instant::now(),
            wanted,
            open: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            tags: AtomicU64::new(0),
            errors: AtomicUsize::new(0),
            first_error: Mutex::default(),
        }
    }

    /// Counts a connection as open until the guard is dropped.
    pub(super) fn open(&self) -> OpenGuard<'_> {
        self.open.fetch_add(1, Ordering::Relaxed);
        OpenGuard(self)
    }

    pub(super) fn tag(&self, body_len: usize) {
        self.tags.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(body_len as u64, Ordering::Relaxed);
    }

    pub(super) fn error(&self, error: &impl fmt::Display) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        self.first_error.lock().get_or_insert_with(|| error.to_string());
    }

    /// Writes a line per second while it is polled. Ignores errors of `out`, such as a closed pipe.
    pub(super) async fn report(&self, out: &mut impl io::Write) {
        let mut ticks = tokio::time::interval(SECOND);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        ticks.tick().await;
        let (mut bytes, mut at) = (0, Instant::now());
        loop {
            ticks.tick().await;
            let (now_bytes, now) = (self.bytes.load(Ordering::Relaxed), Instant::now());
            let kbits = kbits(now_bytes - bytes, now - at);
            (bytes, at) = (now_bytes, now);
            let _ = writeln!(
                out,
                "{:.0} s: {} of {} connections, {kbits:.0} kbit/s, {} tags, {} errors",
                self.began.elapsed().as_secs_f64(),
                self.open.load(Ordering::Relaxed),
                self.wanted,
                self.tags.load(Ordering::Relaxed),
                self.errors.load(Ordering::Relaxed),
            );
        }
    }

    /// Writes the totals. Fails if any connection failed.
    pub(super) fn finish(&self, out: &mut impl io::Write) -> Result<Totals, Failure> {
        let totals = Totals {
            connections: self.wanted,
            tags: self.tags.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            first_error: self.first_error.lock().clone(),
            elapsed: self.began.elapsed(),
        };
        let _ = writeln!(out, "{totals}");
        match &totals.first_error {
            None => Ok(totals),
            Some(first) => Err(Failure::Run(match totals.connections {
                1 => first.clone(),
                all => format!("{} of {all} connections failed, the first: {first}", totals.errors),
            })),
        }
    }
}

pub(super) struct OpenGuard<'a>(&'a Rates);

impl Drop for OpenGuard<'_> {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Totals of a command over all its connections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Totals {
    /// Connections attempted.
    pub connections: usize,
    /// Tags sent or received.
    pub tags: u64,
    /// Bytes of their bodies.
    pub bytes: u64,
    /// Connections that failed or broke.
    pub errors: usize,
    /// The first error.
    pub first_error: Option<String>,
    /// Time from the start to the end.
    pub elapsed: Duration,
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "total: {} connections, {} tags, {} bytes in {:.1} s ({:.0} kbit/s), {} errors",
            self.connections,
            self.tags,
            self.bytes,
            self.elapsed.as_secs_f64(),
            kbits(self.bytes, self.elapsed),
            self.errors,
        )
    }
}

fn kbits(bytes: u64, elapsed: Duration) -> f64 {
    bytes as f64 * 8.0 / 1000.0 / elapsed.as_secs_f64().max(0.001)
}

const SECOND: Duration = Duration::from_secs(1);
