//! Records publications as FLV files.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufWriter},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use prometheus::{
    IntCounter, IntGauge, Registry, register_int_counter_with_registry,
    register_int_gauge_with_registry,
};
use tokio::{runtime::Handle, task::spawn_blocking, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use downpour_hub::{Ended, ReadCount, ReadOutcome, Reader, Sink, Stream, Tap};
use downpour_media::{
    StreamKey,
    flv::{FlvWriter, Tag},
    timeline::Timeline,
};

/// Writes one FLV file per publication, `{dir}/{app}/{name}/{UTC start}.flv`. Cloning shares it.
///
/// A recording is one more reader of the stream's log, which is its queue as well: a disk that is
/// too slow makes it skip to a key frame, and never holds the stream up. What was received reaches
/// the file within a second, in whole tags and without going back to rewrite anything, so that the
/// file is good up to its last whole tag wherever a crash cuts it. Timestamps are rebased to begin
/// at 0. When the disk fails, that is counted and logged, and a new file is tried later.
#[derive(Debug, Clone)]
pub struct Recorder {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    metrics: RecordMetrics,
    /// After the disk failed.
    retry: Duration,
    runtime: Handle,
    tasks: TaskTracker,
    drain: CancellationToken,
}

impl Recorder {
    /// A recorder into `dir`, which is made when it is needed. Must be called inside a runtime.
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

    /// Records a stream from here to its end, in a task.
    pub fn record(&self, stream: &Arc<Stream>) {
        // Subscribed here and now: the publisher may already have gone when the task gets to run.
        let reader = stream.subscribe();
        let shared = self.shared.clone();
        self.shared
            .tasks
            .spawn_on(async move { shared.record(reader).await }, &self.shared.runtime);
    }

    /// Writes what the streams' logs still hold, ends all recordings, and waits for the disk.
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

/// What recordings do.
#[derive(Debug, Clone)]
pub struct RecordMetrics {
    /// Files being written now.
    pub active: IntGauge,
    /// Files begun.
    pub files: IntCounter,
    /// Bytes written.
    pub bytes: IntCounter,
    /// Files given up because the disk failed.
    pub errors: IntCounter,
    /// Tags left out because the disk was too slow.
    pub skipped_tags: IntCounter,
}

impl RecordMetrics {
    /// Makes and registers the metrics.
    ///
    /// # Errors
    /// If their names are taken in `registry`.
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
            // A new file begins like any other, at a key frame with its headers.
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

    /// Gathers tags until it is time to write them; `false` after the last ones.
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
        // The log's own bound is the bound here.
        while let ReadOutcome::Read(count) = reader.try_read(batch, usize::MAX) {
            self.note(reader, count);
        }
    }

    fn note(&self, reader: &Reader, count: ReadCount) -> usize {
        if count.skipped > 0 {
            self.metrics.skipped_tags.inc_by(count.skipped);
            tracing::warn!(
                stream = %reader.stream().key(),
                tags = count.skipped,
                "the disk is too slow for the recording: skipped to a key frame"
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
        let writer = FlvWriter::new(BufWriter::with_capacity(WRITE_BUFFER, file))?;
        metrics.files.inc();
        metrics.active.inc();
        tracing::info!(stream = %key, path = %path.display(), "recording");
        Ok(Self { path, writer, timeline: Timeline::default(), metrics, counted: 0 })
    }

    fn write(&mut self, tags: &[Tag]) -> io::Result<()> {
        for tag in tags {
            self.writer.write_at(tag, self.timeline.rebase(tag.timestamp()))?;
        }
        self.writer.flush()?;
        self.metrics.bytes.inc_by(self.writer.bytes() - self.counted);
        self.counted = self.writer.bytes();
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.writer.flush()?;
        self.writer.get_ref().get_ref().sync_all()?;
        tracing::info!(path = %self.path.display(), bytes = self.writer.bytes(), "recorded");
        Ok(())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.metrics.active.dec();
    }
}

/// Creates `{dir}/{name}.flv`, or `{name}-1.flv` and so on while that is taken.
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
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (mut days, of_day) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let mut year = 1970;
    loop {
        let length = if is_leap(year) { 366 } else { 365 };
        if days < length {
            break;
        }
        days -= length;
        year += 1;
    }
    let february = if is_leap(year) { 29 } else { 28 };
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!(
        "{year:04}{month:02}{:02}-{:02}{:02}{:02}.{:03}",
        days + 1,
        of_day / 3600,
        of_day / 60 % 60,
        of_day % 60,
        since.subsec_millis()
    )
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    spawn_blocking(work).await.map_err(io::Error::other)?
}

/// Well below the second that is promised.
const FLUSH_INTERVAL: Duration = Duration::from_millis(500);
/// Tags that wait for one write; one tag may be more.
const BATCH_BYTES: usize = 1 << 20;
const WRITE_BUFFER: usize = 64 * 1024;
const RETRY: Duration = Duration::from_secs(10);
const MAX_SAME_NAME: u32 = 1000;

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use downpour_hub::{Hub, LogLimits};
    use downpour_media::flv::{FlvTags, TagKind};

    #[tokio::test]
    async fn each_publication_gets_a_file_with_all_its_tags_from_0() {
        let dir = tempfile::tempdir().unwrap();
        let (hub, recorder, metrics) = node(dir.path());
        for _ in 0..2 {
            let mut publisher = hub.publish(key()).unwrap();
            recorder.record(publisher.stream());
            for tag in [
                tag(TagKind::Video, u32::MAX - 9, &[0x17, 0]),
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
                    tag(TagKind::Video, 0, &[0x17, 0]),
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
    async fn tags_reach_the_file_while_the_stream_is_live_and_draining_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let (hub, recorder, metrics) = node(dir.path());
        let mut publisher = hub.publish(key()).unwrap();
        recorder.record(publisher.stream());
        publisher.push(tag(TagKind::Video, 0, &[0x17, 1]));
        until(|| metrics.bytes.get() > 0).await;
        let file = files(dir.path()).pop().unwrap();
        assert_eq!(read(&file).len(), 1);
        publisher.push(tag(TagKind::Video, 40, &[0x27, 1]));
        recorder.drain().await;
        assert_eq!(read(&file).len(), 2);
    }

    #[tokio::test]
    async fn a_disk_that_fails_is_counted_and_hurts_nobody() {
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
    fn an_older_file_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        for expected in ["a.flv", "a-1.flv", "a-2.flv"] {
            let (path, mut file) = create_new(dir.path(), "a").unwrap();
            assert_eq!(path, dir.path().join(expected));
            file.write_all(b"x").unwrap();
        }
    }

    #[test]
    fn names_are_utc() {
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
