//! The recorder: writes each publication to an FLV file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter},
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

/// Writes one FLV file per publication, `{dir}/{app}/{name}/{UTC start}.flv`. Clones share it.
///
/// - A recording is a reader of the stream's log, and the log is its queue: with a slow disk the
///   recording skips to a key frame, and never blocks the stream.
/// - Tags reach the file within a second. Whole tags are appended and nothing is rewritten but the
///   flags in the file header, so a file that a crash cuts is valid up to its last whole tag.
/// - Timestamps start at 0.
/// - A disk failure is counted and logged, and a new file is tried after 10 s.
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
    /// Files abandoned because the disk failed.
    pub errors: IntCounter,
    /// Tags skipped because the disk was too slow.
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
                "Recordings given up because the disk failed.",
            )?,
            skipped_tags: counter(
                "downpour_record_skipped_tags_total",
                "Tags not recorded because the disk was too slow.",
            )?,
        })
    }
}

impl Shared {
    async fn record(&self, mut reader: Reader) {
        loop {
            let stream = reader.stream().clone();
            let Err(error) = self.record_file(reader).await else { return };
            self.metrics.errors.inc();
            tracing::warn!(stream = %stream.key(), dir = %self.dir.display(), %error, "recording failed");
            tokio::select! {
                () = tokio::time::sleep(self.retry) => {}
                () = self.drain.cancelled() => return,
            }
            if stream.ended() {
                return;
            }
            // A new file starts at a key frame, with the headers.
            reader = stream.subscribe();
        }
    }

    async fn record_file(&self, mut reader: Reader) -> io::Result<()> {
        let key = reader.stream().key().clone();
        let mut recording: Option<Recording> = None;
        let mut batch = Vec::new();
        loop {
            let more = self.collect(&mut reader, &mut batch).await;
            if !batch.is_empty() {
                let (dir, key, metrics) = (self.dir.clone(), key.clone(), self.metrics.clone());
                (recording, batch) = blocking(move || {
                    let mut recording = match recording {
                        Some(recording) => recording,
                        None => Recording::create(&dir, &key, SystemTime::now(), metrics)?,
                    };
                    recording.write(&batch)?;
                    batch.clear();
                    Ok((Some(recording), batch))
                })
                .await?;
            }
            if !more {
                return match recording {
                    Some(recording) => blocking(move || recording.finish()).await,
                    None => Ok(()),
                };
            }
        }
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

/// A file that is being written.
struct Recording {
    path: PathBuf,
    writer: FlvWriter<BufWriter<File>>,
    timeline: Timeline,
    metrics: RecordMetrics,
    counted: u64,
}

impl Recording {
    fn create(
        dir: &Path,
        key: &StreamKey,
        now: SystemTime,
        metrics: RecordMetrics,
    ) -> io::Result<Self> {
        let (path, file) = create_new(&dir.join(key.as_str()), &utc_name(now))?;
        let file = BufWriter::with_capacity(WRITE_BUFFER, file);
        let writer = FlvWriter::with_tracks(file, Tracks::default())?;
        metrics.files.inc();
        metrics.active.inc();
        tracing::info!(stream = %key, path = %path.display(), "recording started");
        Ok(Self { path, writer, timeline: Timeline::default(), metrics, counted: 0 })
    }

    fn write(&mut self, tags: &[Tag]) -> io::Result<()> {
        for tag in tags {
            self.writer.write_at(tag, self.timeline.rebase(tag.timestamp()))?;
        }
        self.writer.flush_with_flags()?;
        self.metrics.bytes.inc_by(self.writer.bytes() - self.counted);
        self.counted = self.writer.bytes();
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().get_ref().sync_all()?;
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

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Well below the second within which tags reach the file.
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);
/// Bytes of tags per write; a single tag may be larger.
const BATCH_BYTES: usize = 1 << 20;
const WRITE_BUFFER: usize = 64 * 1024;
const RETRY: Duration = Duration::from_secs(10);
const MAX_SAME_NAME: u32 = 1000;

#[cfg(test)]
mod tests {
    use std::{io::Write, time::UNIX_EPOCH};

    use super::*;
    use downpour_hub::{Hub, LogLimits};
    use downpour_media::flv::{FlvTags, TagKind};

    #[tokio::test]
    async fn each_publication_gets_a_file_with_timestamps_from_0() {
        let dir = tempfile::tempdir().unwrap();
        let (hub, recorder, metrics) = node(dir.path());
        for _ in 0..2 {
            let mut publisher = hub.publish(key()).unwrap();
            recorder.record(publisher.stream());
            for tag in [
                tag(TagKind::Video, u32::MAX - 9, &[0x17, 0, 0, 0, 0, 1]),
                tag(TagKind::Video, u32::MAX - 9, &[0x17, 1]),
                tag(TagKind::Audio, u32::MAX - 19, &[0xaf, 1]),
                tag(TagKind::Video, 30, &[0x27, 1]),
                tag(TagKind::Audio, 25, &[0xaf, 2]),
            ] {
                publisher.push(tag);
            }
        }
        recorder.drain().await;
        let files = files(dir.path());
        assert_eq!(files.len(), 2);
        for file in files {
            assert_eq!(
                read(&file),
                [
                    tag(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]),
                    tag(TagKind::Video, 0, &[0x17, 1]),
                    tag(TagKind::Audio, 0, &[0xaf, 1]),
                    tag(TagKind::Video, 40, &[0x27, 1]),
                    tag(TagKind::Audio, 35, &[0xaf, 2]),
                ]
            );
        }
        assert_eq!((metrics.files.get(), metrics.active.get(), metrics.errors.get()), (2, 0, 0));
    }

    #[tokio::test]
    async fn tags_reach_the_file_while_the_stream_is_live_and_drain_writes_the_rest() {
        let dir = tempfile::tempdir().unwrap();
        let (hub, recorder, metrics) = node(dir.path());
        let mut publisher = hub.publish(key()).unwrap();
        recorder.record(publisher.stream());
        publisher.push(tag(TagKind::Video, 0, &[0x17, 1]));
        until(|| metrics.bytes.get() > 0).await;
        let file = files(dir.path()).pop().unwrap();
        assert_eq!(read(&file).len(), 1);
        let flags = || fs::read(&file).unwrap()[4];
        assert_eq!(flags(), 1, "video only");
        publisher.push(tag(TagKind::Video, 40, &[0x27, 1]));
        publisher.push(tag(TagKind::Audio, 40, &[0xaf, 1]));
        recorder.drain().await;
        assert_eq!(read(&file).len(), 3);
        assert_eq!(flags(), 5, "audio came late");
    }

    #[tokio::test]
    async fn recording_restarts_after_a_disk_failure() {
        let dir = tempfile::tempdir().unwrap();
        let in_the_way = dir.path().join("live");
        fs::write(&in_the_way, b"not a directory").unwrap();
        let (hub, _, metrics) = node(dir.path());
        let retry = Duration::from_millis(50);
        let recorder = Recorder::with_retry(dir.path().into(), metrics.clone(), retry);
        let mut publisher = hub.publish(key()).unwrap();
        recorder.record(publisher.stream());
        publisher.push(tag(TagKind::Video, 0, &[0x17, 1]));
        until(|| metrics.errors.get() >= 2).await;
        fs::remove_file(in_the_way).unwrap();
        publisher.push(tag(TagKind::Video, 40, &[0x27, 1]));
        until(|| metrics.bytes.get() > 0).await;
        drop(publisher);
        recorder.drain().await;
        assert_eq!(read(&files(dir.path())[0]).len(), 2);
    }

    #[test]
    fn existing_file_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        for expected in ["a.flv", "a-1.flv", "a-2.flv"] {
            let (path, mut file) = create_new(dir.path(), "a").unwrap();
            assert_eq!(path, dir.path().join(expected));
            file.write_all(b"x").unwrap();
        }
    }

    #[test]
    fn file_names_are_utc() {
        for (secs, name) in [
            (0, "19700101-000000.007"),
            (951_782_399, "20000228-235959.007"),
            (951_782_400, "20000229-000000.007"),
            (1_709_251_199, "20240229-235959.007"),
            (1_767_225_599, "20251231-235959.007"),
            (4_107_542_400, "21000301-000000.007"),
        ] {
            assert_eq!(utc_name(UNIX_EPOCH + Duration::new(secs, 7_000_000)), name);
        }
    }

    fn node(dir: &Path) -> (Hub, Recorder, RecordMetrics) {
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 60_000 });
        let metrics = RecordMetrics::register(&Registry::new()).unwrap();
        (hub, Recorder::new(dir, metrics.clone()), metrics)
    }

    fn files(dir: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(dir.join("live/movie")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn read(path: &Path) -> Vec<Tag> {
        FlvTags::new(File::open(path).unwrap()).map(Result::unwrap).collect()
    }

    fn key() -> StreamKey {
        "live/movie".parse().unwrap()
    }

    fn tag(kind: TagKind, timestamp: u32, body: &[u8]) -> Tag {
        Tag::new(kind, timestamp, body).unwrap()
    }

    async fn until(condition: impl Fn() -> bool) {
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(std::time::Instant::now() < deadline, "not in time");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}
