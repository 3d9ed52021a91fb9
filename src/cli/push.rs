//! `downpour push`: publishes an FLV file over RTMP.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    sync::Arc,
    time::Duration,
};

use tokio::{
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;

use super::{Failure, PushArgs, block_on, rates::Rates};
use crate::rtmp::client::{ClientError, Publisher};
use downpour_media::flv::{FlvTags, Headers, Tag, TagKind};
use downpour_rtmp::url::RtmpUrl;

pub use super::rates::Totals;

/// Publishes a file, and prints rates to standard output. SIGTERM and SIGINT end it in order.
///
/// # Errors
/// Those of [`publish_all`].
pub fn run(args: &PushArgs) -> Result<(), Failure> {
    block_on(|stop| async move {
        publish_all(args, stop, &mut io::stdout()).await?;
        Ok(())
    })
}

/// Publishes a file until it has been sent or `stop` is cancelled. Writes the rates to `out` once per
/// second, and the totals at the end.
///
/// # Errors
/// [`Failure::Usage`] for an invalid file or URL, [`Failure::Run`] if any connection failed.
pub async fn publish_all(
    args: &PushArgs,
    stop: CancellationToken,
    out: &mut impl io::Write,
) -> Result<Totals, Failure> {
    let urls = (0..args.count)
        .map(|i| args.url.replace("{i}", &i.to_string()).parse())
        .collect::<Result<Vec<RtmpUrl>, _>>()
        .map_err(|error| Failure::Usage(format!("{}: {error}", args.url)))?;
    let path = args.file.clone();
    let clip = spawn_blocking(move || Clip::open(&path))
        .await
        .map_err(|error| Failure::Run(error.to_string()))?
        .map_err(|error| unusable(&args.file, &error))?;
    let rates = Arc::new(Rates::new(urls.len()));
    let mut connections = JoinSet::new();
    for (i, url) in (0..).zip(urls) {
        let (clip, rates, stop, repeat) = (clip.clone(), rates.clone(), stop.clone(), args.repeat);
        connections.spawn(async move {
            // Spread over time: a server's queue of connections to accept is short.
            tokio::select! {
                () = sleep(CONNECT_INTERVAL * i) => {}
                () = stop.cancelled() => return,
            }
            let _open = rates.open();
            let result = publish(&clip, &url, repeat, &stop, |tag| rates.tag(tag.body().len()));
            if let Err(error) = result.await {
                rates.error(&format!("{url}: {error}"));
            }
        });
    }
    tokio::select! {
        () = rates.report(out) => {}
        () = async { while connections.join_next().await.is_some() {} } => {}
    }
    rates.finish(out)
}

/// The failure of a file that cannot be published, with the line that makes an FLV file of it.
pub(super) fn unusable(file: &Path, error: &io::Error) -> Failure {
    let shown = file.display();
    let Some(flv) =
        (error.kind() == io::ErrorKind::InvalidData).then(|| file.with_extension("flv"))
    else {
        return Failure::Usage(format!("{shown}: {error}"));
    };
    let flv = if flv == file { file.with_extension("new.flv") } else { flv };
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', "'\\''"));
    Failure::Usage(format!(
        "{shown}: {error}; make an FLV file of it with: ffmpeg -i {} -c:v libx264 -c:a aac {}",
        quoted(file),
        quoted(&flv)
    ))
}

/// Publishes a clip over one connection at the pace of its timestamps, in a loop if `repeat`, until it
/// has been sent or `stop` is cancelled. Calls `sent` per tag.
///
/// # Errors
/// If the server cannot be reached, refuses, or closes the connection.
pub async fn publish(
    clip: &Clip,
    url: &RtmpUrl,
    repeat: bool,
    stop: &CancellationToken,
    mut sent: impl FnMut(&Tag),
) -> Result<(), ClientError> {
    let mut publisher = tokio::select! {
        publisher = Publisher::connect(url, SERVER_TIMEOUT) => publisher?,
        () = stop.cancelled() => return Ok(()),
    };
    let began = Instant::now();
    for (due, tag) in clip.play(repeat) {
        let due = began + due;
        while !stop.is_cancelled() && Instant::now() < due {
            tokio::select! {
                () = sleep_until(due.min(Instant::now() + LISTEN_INTERVAL)) => {}
                () = stop.cancelled() => {}
            }
            if Instant::now() < due {
                publisher.flush().await?;
            }
        }
        if stop.is_cancelled() {
            break;
        }
        publisher.send(&tag).await?;
        sent(&tag);
    }
    publisher.close().await
}

/// An FLV file in memory. Clones share it.
#[derive(Debug, Clone)]
pub struct Clip {
    tags: Arc<[Tag]>,
    /// Duration of one pass in milliseconds.
    period: u32,
}

impl Clip {
    /// Maximum length in bytes: the whole file is held in memory.
    pub const MAX_LEN: u64 = 1 << 30;

    /// Reads a file.
    ///
    /// # Errors
    /// Those of [`Clip::read`], and of opening the file.
    pub fn open(path: &Path) -> io::Result<Self> {
        Self::read(File::open(path)?)
    }

    /// Reads FLV to its end, or to its last whole tag.
    ///
    /// # Errors
    /// If it is not FLV, holds neither audio nor video, or is longer than [`Clip::MAX_LEN`].
    pub fn read(input: impl Read) -> io::Result<Self> {
        let mut left = Self::MAX_LEN;
        let mut tags = Vec::new();
        for tag in FlvTags::new(input) {
            let tag = tag?;
            left = left.checked_sub(tag.framed().len() as u64).ok_or_else(|| {
                io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than 1 GiB")
            })?;
            tags.push(tag);
        }
        let period = period(&tags).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "it holds neither audio nor video")
        })?;
        Ok(Self { tags: tags.into(), period })
    }

    /// Returns the tags, each with the time from the start at which it is due; endless if `repeat`.
    ///
    /// Later passes continue the timestamps, and omit headers that have not changed.
    pub fn play(&self, repeat: bool) -> Play<'_> {
        Play {
            clip: self,
            repeat,
            next: 0,
            offset: 0,
            headers: Headers::default(),
            newest: None,
            due: Duration::ZERO,
        }
    }
}

/// See [`Clip::play`].
#[derive(Debug)]
pub struct Play<'a> {
    clip: &'a Clip,
    repeat: bool,
    /// Index of the next tag.
    next: usize,
    /// Added to the timestamps of this pass.
    offset: u32,
    /// The headers that were returned last.
    headers: Headers,
    /// The newest timestamp of media.
    newest: Option<u32>,
    due: Duration,
}

impl Iterator for Play<'_> {
    type Item = (Duration, Tag);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let Some(tag) = self.clip.tags.get(self.next) else {
                if !self.repeat {
                    return None;
                }
                // Ends: a clip has at least one tag that is not omitted below.
                self.next = 0;
                self.offset = self.offset.wrapping_add(self.clip.period);
                continue;
            };
            let first_pass = self.offset == 0;
            self.next += 1;
            let timestamp = tag.timestamp().wrapping_add(self.offset);
            if is_header(tag) {
                let is_news = self.headers.learn(tag) || !tag.is_header();
                if !first_pass && !is_news {
                    continue;
                }
            } else {
                let step = timestamp.wrapping_sub(*self.newest.get_or_insert(timestamp)) as i32;
                if step > 0 {
                    self.due += Duration::from_millis(step.unsigned_abs().into()).min(MAX_PAUSE);
                }
                if !(-MAX_INTERLEAVE_MS..=0).contains(&step) {
                    self.newest = Some(timestamp);
                }
            }
            return Some((self.due, tag.with_timestamp(timestamp)));
        }
    }
}

/// Milliseconds from the first frame to the end of the last one; `None` without frames.
fn period(tags: &[Tag]) -> Option<u32> {
    let media = || tags.iter().filter(|tag| !is_header(tag));
    let first = media().next()?.timestamp();
    let end_of = |kind| {
        let mut times = media()
            .filter(|tag| tag.kind() == kind)
            .map(|tag| tag.timestamp().wrapping_sub(first))
            .rev();
        let last = times.next()?;
        let step = times.next().map_or(1, |before| last.wrapping_sub(before));
        Some(last.wrapping_add(step.clamp(1, MAX_FRAME_MS)))
    };
    end_of(TagKind::Video).max(end_of(TagKind::Audio))
}

fn is_header(tag: &Tag) -> bool {
    tag.kind() == TagKind::Script || tag.is_header()
}

const SERVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which an idle publisher handles messages of the server.
const LISTEN_INTERVAL: Duration = Duration::from_secs(1);
const CONNECT_INTERVAL: Duration = Duration::from_millis(1);
/// A larger gap between two timestamps is a jump, not a pause.
const MAX_PAUSE: Duration = Duration::from_secs(10);
const MAX_INTERLEAVE_MS: i32 = 10_000;
const MAX_FRAME_MS: u32 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_media::flv::FlvWriter;

    #[test]
    fn later_passes_continue_the_timestamps_without_headers() {
        let tags = [
            tag(TagKind::Script, 0, b"\x02\x00\x0aonMetaData\x05"),
            tag(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]),
            tag(TagKind::Audio, 0, &[0xaf, 0, 0x12]),
            tag(TagKind::Video, 1000, &[0x17, 1]),
            tag(TagKind::Audio, 990, &[0xaf, 1]),
            tag(TagKind::Video, 1040, &[0x27, 1]),
            tag(TagKind::Audio, 1013, &[0xaf, 1]),
        ];
        let clip = Clip::read(&file(&tags)[..]).unwrap();
        let once: Vec<_> = clip.play(false).collect();
        assert!(once.iter().map(|(_, tag)| tag).eq(&tags));
        let due: Vec<_> = once.iter().map(|(due, _)| due.as_millis()).collect();
        assert_eq!(due, [0, 0, 0, 0, 0, 40, 40]);
        let second: Vec<_> = clip
            .play(true)
            .skip(tags.len())
            .take(5)
            .map(|(due, tag)| (due.as_millis(), tag.kind(), tag.timestamp()))
            .collect();
        let (video, audio) = (TagKind::Video, TagKind::Audio);
        assert_eq!(
            second,
            [
                (80, video, 1080),
                (80, audio, 1070),
                (120, video, 1120),
                (120, audio, 1093),
                (160, video, 1160),
            ]
        );
    }

    #[test]
    fn headers_that_change_inside_the_file_are_sent_in_each_pass() {
        let tags = [
            tag(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]),
            tag(TagKind::Video, 0, &[0x17, 1]),
            tag(TagKind::Video, 40, &[0x17, 0, 0, 0, 0, 2]),
            tag(TagKind::Video, 40, &[0x17, 1]),
        ];
        let clip = Clip::read(&file(&tags)[..]).unwrap();
        let played: Vec<_> = clip.play(true).take(12).map(|(_, tag)| tag).collect();
        for (i, tag) in played.iter().enumerate() {
            assert_eq!(tag.body(), tags[i % 4].body());
            assert_eq!(tag.timestamp(), i as u32 / 4 * 80 + tags[i % 4].timestamp());
        }
    }

    #[test]
    fn jump_of_the_timestamps_is_no_pause() {
        let times = [5, u32::MAX, 3_000_000, 3_000_020, 40, 60];
        let tags = times.map(|time| tag(TagKind::Audio, time, &[0x2f, 1]));
        let clip = Clip::read(&file(&tags)[..]).unwrap();
        let due: Vec<_> = clip.play(false).map(|(due, _)| due.as_millis()).collect();
        assert_eq!(due, [0, 0, 10_000, 10_020, 10_020, 10_040]);
    }

    #[test]
    fn file_of_another_kind_gets_the_line_that_converts_it() {
        let error = Clip::read(&b"\0\0\0\x20ftypisom"[..]).unwrap_err();
        let failure = unusable(Path::new("my 'best' film.mp4"), &error).to_string();
        assert!(failure.contains("not FLV"), "{failure}");
        let line = r"ffmpeg -i 'my '\''best'\'' film.mp4' -c:v libx264 -c:a aac 'my '\''best'\'' film.flv'";
        assert!(failure.ends_with(line), "{failure}");
        let error = io::ErrorKind::NotFound.into();
        assert!(!unusable(Path::new("a.flv"), &error).to_string().contains("ffmpeg"));
    }

    #[test]
    fn file_without_frames_or_not_flv_is_refused() {
        let only_headers = file(&[tag(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1])]);
        for (bytes, expected) in
            [(&only_headers[..], "neither audio nor video"), (b"RIFF", "not FLV"), (b"", "neither")]
        {
            let error = Clip::read(bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    fn file(tags: &[Tag]) -> Vec<u8> {
        let mut writer = FlvWriter::new(Vec::new()).unwrap();
        tags.iter().for_each(|tag| writer.write(tag).unwrap());
        writer.into_inner()
    }

    fn tag(kind: TagKind, timestamp: u32, body: &[u8]) -> Tag {
        Tag::new(kind, timestamp, body).unwrap()
    }
}
