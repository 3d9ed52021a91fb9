use std::time::UNIX_EPOCH;

use parking_lot::Mutex;

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

#[tokio::test]
async fn a_full_disk_costs_no_tag_that_the_log_still_holds() {
    let dir = tempfile::tempdir().unwrap();
    let (hub, _, metrics) = node(dir.path());
    let retry = Duration::from_millis(20);
    let recorder = Recorder::with_retry(dir.path().into(), metrics.clone(), retry);
    let mut publisher = hub.publish(key()).unwrap();
    let frames: Vec<_> =
        (0..10).map(|i| tag(TagKind::Video, i * 40, &[[0x17, 1], [i as u8; 2]].concat())).collect();
    // Full before the first byte: attempts leave no file behind.
    *FREE.lock() = Some((dir.path().into(), 0));
    recorder.record(publisher.stream());
    publisher.push(frames[0].clone());
    until(|| metrics.errors.get() >= 2).await;
    until(|| files(dir.path()).is_empty()).await;
    assert_eq!(metrics.files.get(), 0);
    // Space for two and a half tags: the torn one is cut.
    let (head, one) = (13, frames[0].framed().len());
    *FREE.lock() = Some((dir.path().into(), head + 2 * one + one / 2));
    until(|| metrics.files.get() == 1).await;
    let file = files(dir.path()).pop().unwrap();
    publisher.push(frames[1].clone());
    until(|| read(&file).len() == 2).await;
    let errors = metrics.errors.get();
    publisher.push(frames[2].clone());
    until(|| metrics.errors.get() >= errors + 2).await;
    until(|| fs::metadata(&file).unwrap().len() == (head + 2 * one) as u64).await;
    for frame in &frames[3..] {
        publisher.push(frame.clone());
    }
    // Space again: all the rest follows in the same file.
    *FREE.lock() = None;
    until(|| read(&file).len() == frames.len()).await;
    drop(publisher);
    recorder.drain().await;
    assert_eq!(read(&file), frames);
    assert_eq!((files(dir.path()).len(), metrics.skipped_tags.get()), (1, 0));
}

#[tokio::test]
async fn a_file_that_was_removed_is_followed_by_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let (hub, recorder, metrics) = node(dir.path());
    let mut publisher = hub.publish(key()).unwrap();
    recorder.record(publisher.stream());
    publisher.push(tag(TagKind::Video, 0, &[0x17, 1]));
    until(|| metrics.files.get() == 1).await;
    fs::remove_file(files(dir.path()).pop().unwrap()).unwrap();
    publisher.push(tag(TagKind::Video, 40, &[0x17, 1]));
    until(|| metrics.files.get() == 2).await;
    drop(publisher);
    recorder.drain().await;
    assert_eq!(read(&files(dir.path())[0]).len(), 1);
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

/// Bytes that are free below a directory; `None` is no limit.
static FREE: Mutex<Option<(PathBuf, usize)>> = Mutex::new(None);

/// The part of `bytes` that the disk takes.
pub(super) fn fitting<'a>(path: &Path, bytes: &'a [u8]) -> io::Result<&'a [u8]> {
    match &mut *FREE.lock() {
        Some((dir, 0)) if path.starts_with(&*dir) => Err(io::ErrorKind::StorageFull.into()),
        Some((dir, free)) if path.starts_with(&*dir) => {
            let fitting = &bytes[..bytes.len().min(*free)];
            *free -= fitting.len();
            Ok(fitting)
        }
        _ => Ok(bytes),
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
