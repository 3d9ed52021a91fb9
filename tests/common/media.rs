//! Test streams, encoders that push them, and checks by ffmpeg.

use std::{
    fs::File,
    iter,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use downpour_media::flv::{Tag, TagKind};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{compare::read_flv, node::tail, process, viewer::save, wait_for};

/// An FLV file and its tags.
pub struct Media {
    pub path: PathBuf,
    pub tags: Vec<Tag>,
}

/// 10 s of H.264 and AAC that take 2.5 s to send: about 1200 RTP packets, so that the sequence
/// numbers, which start at 65000, wrap half way.
pub fn full() -> &'static Media {
    full_at(4)
}

/// The same stream at another speed. At 1 it is the file in `assets`, with one group of pictures per
/// second; at 2 and 4 all timestamps are divided.
pub fn full_at(speed: u32) -> &'static Media {
    static MEDIA: [OnceLock<Media>; 3] = [const { OnceLock::new() }; 3];
    let name = match speed {
        1 => return MEDIA[0].get_or_init(|| Media::new(ASSET.into())),
        2 | 4 => format!("full-{speed}.flv"),
        _ => panic!("no media at speed {speed}"),
    };
    MEDIA[speed as usize / 2].get_or_init(|| made(&name, faster(&full_at(1).tags, speed)))
}

/// The first 5 s of the stream, in 2.5 s: a group of pictures is half a second.
pub fn short() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| made("short.flv", first_half()))
}

/// The video of [`short`].
pub fn video_only() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| made("video.flv", without(first_half(), TagKind::Audio)))
}

/// The audio of [`short`].
pub fn audio_only() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| made("audio.flv", without(first_half(), TagKind::Video)))
}

/// 14 s of video at 8 Mbit/s, more than the kernel buffers for a viewer that does not read. The
/// pictures are noise that cannot be decoded.
pub fn heavy() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| {
        let mut rng = SmallRng::seed_from_u64(7);
        let header = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1, 0x64, 0, 0x1f]);
        let frame = |number: u32| {
            let mut body = vec![0; 40_000];
            rng.fill(&mut body[5..]);
            body[..2].copy_from_slice(&[if number.is_multiple_of(25) { 0x17 } else { 0x27 }, 1]);
            Tag::new(TagKind::Video, number * 40, &body)
        };
        let tags: Result<_, _> = iter::once(header).chain((0..14 * 25).map(frame)).collect();
        made("heavy.flv", tags.expect("a frame is too long"))
    })
}

/// The first 5 s, twice as fast.
fn first_half() -> Vec<Tag> {
    let tags = full_at(1).tags.iter().filter(|tag| tag.timestamp() < 5000);
    faster(&tags.cloned().collect::<Vec<_>>(), 2)
}

fn faster(tags: &[Tag], speed: u32) -> Vec<Tag> {
    tags.iter().map(|tag| tag.with_timestamp(tag.timestamp() / speed)).collect()
}

fn without(tags: Vec<Tag>, kind: TagKind) -> Vec<Tag> {
    tags.into_iter().filter(|tag| tag.kind() != kind).collect()
}

/// An encoder's process; killed when dropped.
pub struct Encoder {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Encoder {
    /// Starts ffmpeg, which sends a file without transcoding in real time.
    pub fn ffmpeg(media: &Media, url: &str, log: PathBuf) -> Self {
        let mut command = Command::new("ffmpeg");
        command.args(["-hide_banner", "-loglevel", "error", "-nostdin", "-re", "-i"]);
        command.arg(&media.path).args(["-c", "copy", "-f", "flv", url]);
        Self::spawn(command, "ffmpeg", log)
    }

    /// Starts `downpour push`.
    pub fn downpour(media: &Media, url: &str, options: &[&str], log: PathBuf) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_downpour"));
        command.arg("push").arg(&media.path).arg(url).args(options).env_remove("RUST_LOG");
        Self::spawn(command, "downpour push", log)
    }

    fn spawn(mut command: Command, name: &str, log: PathBuf) -> Self {
        let file = File::create(&log).expect("cannot make a log file");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("cannot share a log file"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot run {name}: {error}"));
        Self { child, name: name.into(), log }
    }

    /// Waits until the encoder has sent everything.
    #[track_caller]
    pub fn until_done(mut self, deadline: Duration) {
        let status = wait_for(&format!("{} ends", self.name), deadline, || {
            self.child.try_wait().expect("cannot wait for an encoder")
        });
        assert!(status.success(), "{} failed: {status}\n{}", self.name, tail(&self.log, 20));
    }

    /// Waits until the encoder has failed.
    #[track_caller]
    pub fn until_failed(mut self, deadline: Duration) {
        let status = wait_for(&format!("{} fails", self.name), deadline, || {
            self.child.try_wait().expect("cannot wait for an encoder")
        });
        assert!(!status.success(), "{} was not refused", self.name);
    }

    /// Stops the process: its connection stays open, but it sends nothing.
    pub fn freeze(&self) {
        process::signal(self.child.id(), "STOP");
    }

    /// `true` if the process has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("cannot wait for an encoder").is_some()
    }

    /// Kills the process without an end of the publication.
    pub fn kill(self) {}
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // Both fail if the process has ended, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {}:\n{}", self.name, tail(&self.log, 20));
        }
    }
}

/// Asserts that ffprobe and a full decode by ffmpeg report no error, and that the file has exactly one
/// stream per entry of `codecs`.
#[track_caller]
pub fn assert_decodes(path: &Path, codecs: &[&str]) {
    let mut probe = Command::new("ffprobe");
    probe.args(["-v", "error", "-show_entries", "stream=codec_name", "-of", "csv=p=0"]).arg(path);
    let mut found: Vec<_> = run(probe).lines().map(str::to_owned).collect();
    found.sort();
    let mut codecs = codecs.to_vec();
    codecs.sort_unstable();
    assert_eq!(found, codecs, "codecs of {}", path.display());
    let mut decode = Command::new("ffmpeg");
    decode.args(["-nostdin", "-v", "error", "-xerror", "-i"]).arg(path);
    // By default times are rounded to frames of the rate that the pictures' header states, which is
    // the rate at speed 1.
    decode.args(["-fps_mode", "passthrough", "-enc_time_base:v", "1/1000", "-f", "null", "-"]);
    run(decode);
}

/// Runs a program that must succeed without output on standard error. Returns its standard output.
#[track_caller]
pub fn run(mut command: Command) -> String {
    let output = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.trim().is_empty(), "{command:?}: {errors}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Media {
    fn new(path: PathBuf) -> Self {
        Self { tags: read_flv(&path), path }
    }
}

/// Writes a file atomically: test processes may run at the same time.
fn made(name: &str, tags: Vec<Tag>) -> Media {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(dir).expect("cannot make the directory for test media");
    let (path, unfinished) = (dir.join(name), dir.join(format!("{}-{name}", std::process::id())));
    save(&tags, &unfinished);
    std::fs::rename(&unfinished, &path).expect("cannot put test media in place");
    Media { path, tags }
}

const ASSET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/test.flv");
