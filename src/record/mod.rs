//! The recorder: writes each publication to an FLV file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter, Seek, SeekFrom, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use prometheus::{
    IntCounter, IntGauge, Registry, register_int_counter_with_registry,
    register_int_gauge_with_registry,
};
use time::OffsetDateTime;
use tokio::{runtime::Handle, task::spawn_blocking, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use downpour_hub::{Ended, ReadCount, ReadOutcome, Reader, Sink, Stream, Tap};
use downpour_media::{
    StreamKey,
    flv::{FlvWriter, Tag, Tracks},
    timeline::Timeline,
};
use downpour_sys::LogLimit;

/// Writes one FLV file per publication, `{dir}/{app}/{name}/{UTC start}.flv`. Clones share it.
///
/// - A recording is a reader of the stream's log, and the log is its queue: with a slow disk the
///   recording skips to a key frame, and never blocks the stream.
/// - Tags reach the file within a second. Whole tags are appended and nothing is rewritten but the
///   flags in the file header, so a file that a crash cuts is valid up to its last whole tag.
/// - Timestamps start at 0.
/// - After a disk failure, a full disk for example, the file is cut to its last whole tag, and removed if
///   it has none. The recording continues in it from the log where it stopped, with an attempt every
///   2 s. Media that leaves the log meanwhile is skipped to a key frame. If the file is gone, a new one
///   starts at a key frame.
#[derive(Debug, Clone)]
pub struct Recorder {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    metrics: RecordMetrics,
    /// Time from a disk failure to the next attempt.
    retry: Duration,
    runtime: Handle,
    tasks: TaskTracker,
    drain: CancellationToken,
}

impl Recorder {
    /// A recorder that writes below `dir`, which is created when it is needed. Must be called inside a
    /// tokio runtime.
    pub fn new(dir: impl Into<PathBuf>, metrics: RecordMetrics) -> Self {
        Self::with_retry(dir.into(), metrics, RETRY)
    }

    fn with_retry(dir: PathBuf, metrics: RecordMetrics, retry: Duration) -> Self {
        Self {
            shared: Arc::new(Shared {
                dir,
                metrics,
                retry,
                runtime: Handle::current(),
                tasks: TaskTracker::new(),
                drain: CancellationToken::new(),
            }),
        }
    }

    /// Spawns a task that records a stream from now to its end.
    pub fn record(&self, stream: &Arc<Stream>) {
        // Not in the task: the publisher may be gone when it first runs.
        let reader = stream.subscribe();
        let shared = self.shared.clone();
        self.shared
            .tasks
            .spawn_on(async move { shared.record(reader).await }, &self.shared.runtime);
    }

    /// Writes the rest of each stream's log, ends all recordings, and waits for the disk.
    pub async fn drain(&self) {
        self.shared.drain.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }
}

impl Sink for Recorder {
    fn stream_up(&self, stream: &Arc<Stream>) -> Option<Box<dyn Tap>> {
        self.record(stream);
        None
    }
}

/// Metrics of recordings.
#[derive(Debug, Clone)]
pub struct RecordMetrics {
    /// Files being written.
    pub active: IntGauge,
    /// Files created.
    pub files: IntCounter,
    /// Bytes written.
    pub bytes: IntCounter,
    /// Writes that failed.
    pub errors: IntCounter,
    /// Tags skipped because the disk was too slow, or failed.
    pub skipped_tags: IntCounter,
}

impl RecordMetrics {
    /// Creates the metrics and registers them in `registry`.
    ///
    /// # Errors
    /// If `registry` already has metrics of these names.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        let counter =
            |name: &str, help: &str| register_int_counter_with_registry!(name, help, registry);
        let active = register_int_gauge_with_registry!(
            "downpour_record_active",
            "Recordings being written.",
            registry
        )?;
        Ok(Self {
            active,
            files: counter("downpour_record_files_total", "Recordings begun.")?,
            bytes: counter("downpour_record_bytes_total", "Bytes recorded.")?,
            errors: counter(
                "downpour_record_errors_total",
                "Writes of recordings that failed; each is tried again.",
            )?,
            skipped_tags: counter(
                "downpour_record_skipped_tags_total",
                "Tags not recorded because the disk was too slow, or failed.",
            )?,
        })
    }
}

impl Shared {
    /// Records a stream to its end.
    async fn record(&self, mut reader: Reader) {
        let mut state = Writing::default();
        let mut log = LogLimit::every(FAILURE_LOG);
        loop {
            let more = self.collect(&mut reader, &mut state.batch).await;
            while !state.batch.is_empty() {
                let failed;
                (state, failed) = self.write(&reader, state).await;
                let Some(error) = failed else { break };
                self.metrics.errors.inc();
                if let Some(missed) = log.due(std::time::Instant::now()) {
                    let (stream, dir) = (reader.stream().key(), self.dir.display());
                    tracing::warn!(%stream, %dir, %error, missed, "recording failed; trying again");
                }
                if state.is_lost {
                    self.skip(&reader, state.batch.len() as u64, "its file is gone");
                    // A new file starts at a key frame, with the headers.
                    (state, reader) = (Writing::default(), reader.stream().subscribe());
                    break;
                }
                if !self.may_try_again(&reader, &mut state).await {
                    self.skip(&reader, state.batch.len() as u64, "the disk failed to its end");
                    return;
                }
            }
            if !more {
                break;
            }
        }
        if let Some(recording) = state.recording {
            let finished = blocking(move || recording.finish()).await;
            if let Err(error) = finished.and_then(|finished| finished) {
                self.metrics.errors.inc();
                tracing::warn!(stream = %reader.stream().key(), %error, "recording not synced");
            }
        }
    }

    /// Writes the batch. Returns the error if it could not be written whole; it is then still there.
    async fn write(&self, reader: &Reader, state: Writing) -> (Writing, Option<io::Error>) {
        let (dir, key) = (self.dir.clone(), reader.stream().key().clone());
        let metrics = self.metrics.clone();
        match blocking(move || state.write(&dir, &key, metrics)).await {
            Ok(written) => written,
            // The task that had the file panicked.
            Err(error) => (Writing { is_lost: true, ..Writing::default() }, Some(error)),
        }
    }

    /// Waits for the next attempt. Returns `false` if there is none: a recording whose stream has ended
    /// tries [`LAST_ATTEMPTS`] times, and one that is drained once.
    async fn may_try_again(&self, reader: &Reader, state: &mut Writing) -> bool {
        if reader.stream().ended() || self.drain.is_cancelled() {
            state.last_attempts += if self.drain.is_cancelled() { LAST_ATTEMPTS } else { 1 };
            if state.last_attempts > LAST_ATTEMPTS {
                return false;
            }
        }
        tokio::select! {
            () = tokio::time::sleep(self.retry) => {}
            () = self.drain.cancelled() => {}
        }
        true
    }

    fn skip(&self, reader: &Reader, tags: u64, why: &str) {
        self.metrics.skipped_tags.inc_by(tags);
        let stream = reader.stream().key();
        tracing::warn!(%stream, skipped_tags = tags, why, "recording lost tags");
    }

    /// Collects the tags of one write. Returns `false` after the last ones.
    async fn collect(&self, reader: &mut Reader, batch: &mut Vec<Tag>) -> bool {
        let first = tokio::select! {
            biased;
            first = reader.read(batch, BATCH_BYTES) => first,
            () = self.drain.cancelled() => {
                self.collect_rest(reader, batch);
                return false;
            }
        };
        let deadline = Instant::now() + FLUSH_INTERVAL;
        let mut bytes = 0;
        let mut last = first;
        loop {
            match last {
                Ok(count) => bytes += self.note(reader, count),
                Err(Ended) => return false,
            }
            if bytes >= BATCH_BYTES {
                return true;
            }
            match tokio::time::timeout_at(deadline, reader.read(batch, BATCH_BYTES - bytes)).await {
                Ok(read) => last = read,
                Err(_) => return true,
            }
        }
    }

    fn collect_rest(&self, reader: &mut Reader, batch: &mut Vec<Tag>) {
        // Bounded by the size of the log.
        while let ReadOutcome::Read(count) = reader.try_read(batch, usize::MAX) {
            self.note(reader, count);
        }
    }

    fn note(&self, reader: &Reader, count: ReadCount) -> usize {
        if count.skipped > 0 {
            self.metrics.skipped_tags.inc_by(count.skipped);
            tracing::warn!(
                stream = %reader.stream().key(),
                skipped_tags = count.skipped,
                "recording skipped to a key frame: the disk is too slow"
            );
        }
        count.bytes
    }
}

/// The file of a recording, and the tags that are to be written next.
#[derive(Default)]
struct Writing {
    recording: Option<Recording>,
    batch: Vec<Tag>,
    /// `true` if the file cannot be continued: the batch, from the middle of a group of pictures, cannot
    /// begin another one.
    is_lost: bool,
    /// Failed attempts since the end of the stream.
    last_attempts: u32,
}

impl Writing {
    fn write(
        mut self,
        dir: &Path,
        key: &StreamKey,
        metrics: RecordMetrics,
    ) -> (Self, Option<io::Error>) {
        let recording = match self.recording.take() {
            Some(recording) if recording.is_in_place() => Ok(recording),
            Some(recording) => {
                self.is_lost = true;
                let path = recording.path.display();
                Err(io::Error::new(io::ErrorKind::NotFound, format!("{path} was removed")))
            }
            None => Recording::create(dir, key, SystemTime::now(), metrics),
        };
        match recording.map(|recording| recording.write(&self.batch)) {
            Ok(Ok(recording)) => {
                self.recording = Some(recording);
                self.batch.clear();
                (self, None)
            }
            Ok(Err(failed)) => {
                let (recording, error) = *failed;
                self.keep_whole_tags(recording);
                (self, Some(error))
            }
            Err(error) => (self, Some(error)),
        }
    }

    /// Cuts a file whose last write failed, so that it can be continued.
    fn keep_whole_tags(&mut self, recording: Recording) {
        let begun = recording.whole > 0;
        self.recording = recording.cut().unwrap_or_else(|error| {
            tracing::warn!(%error, "failed recording not cut to its last whole tag");
            None
        });
        self.is_lost = begun && self.recording.is_none();
    }
}

/// A file that is being written.
struct Recording {
    path: PathBuf,
    key: StreamKey,
    writer: FlvWriter<BufWriter<Disk>>,
    timeline: Timeline,
    metrics: RecordMetrics,
    /// Bytes up to the end of the last batch, which reached the file; 0 before the first.
    whole: u64,
}

impl Recording {
    fn create(
        dir: &Path,
        key: &StreamKey,
        now: SystemTime,
        metrics: RecordMetrics,
    ) -> io::Result<Self> {
        let (path, file) = create_new(&dir.join(key.as_str()), &utc_name(now))?;
        let disk = Disk { file, path: path.clone() };
        let writer = FlvWriter::with_tracks(
            BufWriter::with_capacity(WRITE_BUFFER, disk),
            Tracks::default(),
        )?;
        metrics.active.inc();
        let timeline = Timeline::default();
        Ok(Self { path, key: key.clone(), writer, timeline, metrics, whole: 0 })
    }

    /// Writes whole tags. If that fails, the recording is as before, but for the bytes in the file.
    fn write(mut self, tags: &[Tag]) -> Result<Self, Box<(Self, io::Error)>> {
        let timeline = self.timeline.clone();
        if let Err(error) = self.try_write(tags) {
            self.timeline = timeline;
            return Err(Box::new((self, error)));
        }
        if self.whole == 0 {
            self.metrics.files.inc();
            tracing::info!(stream = %self.key, path = %self.path.display(), "recording started");
        }
        self.metrics.bytes.inc_by(self.writer.bytes() - self.whole);
        self.whole = self.writer.bytes();
        Ok(self)
    }

    fn try_write(&mut self, tags: &[Tag]) -> io::Result<()> {
        for tag in tags {
            self.writer.write_at(tag, self.timeline.rebase(tag.timestamp()))?;
        }
        self.writer.flush_with_flags()
    }

    /// Cuts the file to its last whole tag after a failure. Removes it and returns `None` if there is
    /// no tag.
    fn cut(mut self) -> io::Result<Option<Self>> {
        if self.whole == 0 {
            fs::remove_file(&self.path)?;
            return Ok(None);
        }
        let mut file = self.writer.get_ref().get_ref().file.try_clone()?;
        file.set_len(self.whole)?;
        file.seek(SeekFrom::Start(self.whole))?;
        let disk = Disk { file, path: self.path.clone() };
        let buffer = BufWriter::with_capacity(WRITE_BUFFER, disk);
        let writer = FlvWriter::resume(buffer, self.whole, self.writer.tracks());
        // Not flushed: the buffer holds the part of a tag that could not be written.
        let _ = std::mem::replace(&mut self.writer, writer).into_inner().into_parts();
        Ok(Some(self))
    }

    /// `false` if the file was removed or replaced.
    fn is_in_place(&self) -> bool {
        let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let open = self.writer.get_ref().get_ref().file.metadata().map(id);
        let named = fs::metadata(&self.path).map(id);
        matches!((open, named), (Ok(open), Ok(named)) if open == named)
    }

    fn finish(mut self) -> io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().get_ref().file.sync_all()?;
        let bytes = self.writer.bytes();
        tracing::info!(path = %self.path.display(), bytes, "recording finished");
        Ok(())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.metrics.active.dec();
    }
}

/// The file, with its path for error messages. Tests make it full.
struct Disk {
    file: File,
    path: PathBuf,
}

impl Seek for Disk {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        #[cfg(test)]
        let bytes = tests::fitting(&self.path, bytes)?;
        self.file.write(bytes).map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", self.path.display()))
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Creates `{dir}/{name}.flv`, or `{name}-1.flv` and so on if that exists.
fn create_new(dir: &Path, name: &str) -> io::Result<(PathBuf, File)> {
    fs::create_dir_all(dir)?;
    for n in 0..MAX_SAME_NAME {
        let path = match n {
            0 => dir.join(format!("{name}.flv")),
            n => dir.join(format!("{name}-{n}.flv")),
        };
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(io::ErrorKind::AlreadyExists, format!("too many recordings named {name}")))
}

/// `YYYYMMDD-HHMMSS.mmm` in UTC.
fn utc_name(time: SystemTime) -> String {
    let time = OffsetDateTime::from(time);
    format!(
        "{:04}{:02}{:02}-{:02}{:02}{:02}.{:03}",
        time.year(),
        u8::from(time.month()),
        time.day(),
        time.hour(),
        time.minute(),
        time.second(),
        time.millisecond()
    )
}

/// Fails if `work` panics.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)
}

/// Well below the second within which tags reach the file.
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);
/// Bytes of tags per write; a single tag may be larger.
const BATCH_BYTES: usize = 1 << 20;
const WRITE_BUFFER: usize = 64 * 1024;
/// A failed attempt leaves nothing behind, and the log reaches back 20 s by default.
const RETRY: Duration = Duration::from_secs(2);
/// Attempts after the end of a stream.
const LAST_ATTEMPTS: u32 = 3;
const FAILURE_LOG: Duration = Duration::from_secs(60);
const MAX_SAME_NAME: u32 = 1000;

#[cfg(test)]
mod tests;
