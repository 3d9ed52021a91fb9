//! Test streams, encoders that push them, and ffmpeg's verdict on what came out.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::Duration,
};

use super::{compare::read_flv, node::tail, process, wait_for};
use downpour::flv::Tag;

/// An FLV file and its tags.
pub struct Media {
    pub path: PathBuf,
    pub tags: Vec<Tag>,
}

/// 10 s of H.264 and AAC: about 1200 RTP packets, so that the sequence numbers, which start at
/// 65000, wrap half way.
pub fn full() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| Media::new(ASSET.into()))
}

/// Its first 5 s.
pub fn short() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| made("short.flv", &["-i", ASSET, "-t", "5", "-c", "copy"]))
}

/// The video of [`short`].
pub fn video_only() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| made("video.flv", &["-i", ASSET, "-t", "5", "-c", "copy", "-an"]))
}

/// The audio of [`short`].
pub fn audio_only() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| made("audio.flv", &["-i", ASSET, "-t", "5", "-c", "copy", "-vn"]))
}

/// 14 s of video at 8 Mbit/s, more than the kernel buffers for a viewer that does not read.
pub fn heavy() -> &'static Media {
    static MEDIA: OnceLock<Media> = OnceLock::new();
    MEDIA.get_or_init(|| {
        let noise = "nullsrc=size=320x240:rate=25:duration=14,noise=alls=100:allf=t:all_seed=7";
        let rate = "-b:v 8M -minrate 8M -maxrate 8M -bufsize 4M -g 25 -keyint_min 25 -bf 0";
        let mut args = vec!["-f", "lavfi", "-i", noise, "-c:v", "libx264", "-preset", "ultrafast"];
        args.extend(rate.split(' '));
        args.extend(["-pix_fmt", "yuv420p", "-sc_threshold", "0"]);
        made("heavy.flv", &args)
    })
}

/// An encoder's process; killed when dropped.
pub struct Encoder {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Encoder {
    /// ffmpeg, sending a file as it is, in real time.
    pub fn ffmpeg(media: &Media, url: &str, log: PathBuf) -> Self {
        let mut command = Command::new("ffmpeg");
        command.args(["-hide_banner", "-loglevel", "error", "-nostdin", "-re", "-i"]);
        command.arg(&media.path).args(["-c", "copy", "-f", "flv", url]);
        Self::spawn(command, "ffmpeg", log)
    }

    /// `downpour push`.
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

    /// Waits until it has sent everything.
    #[track_caller]
    pub fn until_done(mut self, deadline: Duration) {
        let status = wait_for(&format!("{} ends", self.name), deadline, || {
            self.child.try_wait().expect("cannot wait for an encoder")
        });
        assert!(status.success(), "{} failed: {status}\n{}", self.name, tail(&self.log, 20));
    }

    /// Waits until it has given up.
    #[track_caller]
    pub fn until_failed(mut self, deadline: Duration) {
        let status = wait_for(&format!("{} gives up", self.name), deadline, || {
            self.child.try_wait().expect("cannot wait for an encoder")
        });
        assert!(!status.success(), "{} was not refused", self.name);
    }

    /// Stops it where it is: its connection stays and nothing comes any more.
    pub fn freeze(&self) {
        process::signal(self.child.id(), "STOP");
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("cannot wait for an encoder").is_some()
    }

    /// Kills it without a word of farewell to the cloud.
    pub fn kill(self) {}
}

impl Drop for Encoder {
    fn drop(&mut self) {
        // Both fail if it has ended, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {}:\n{}", self.name, tail(&self.log, 20));
        }
    }
}

/// Asserts that ffprobe and a full decode by ffmpeg have nothing to complain about, and that there
/// is exactly one stream of each of `codecs`.
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
    decode.args(["-f", "null", "-"]);
    run(decode);
}

/// Runs a program that must succeed and say nothing on standard error; gives what it printed.
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

/// Makes a file with ffmpeg, under another name first: test processes may run at the same time.
fn made(name: &str, args: &[&str]) -> Media {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(dir).expect("cannot make the directory for test media");
    let (path, unfinished) = (dir.join(name), dir.join(format!("{}-{name}", std::process::id())));
    let mut ffmpeg = Command::new("ffmpeg");
    ffmpeg.args(["-hide_banner", "-loglevel", "error", "-nostdin", "-y"]).args(args);
    ffmpeg.args(["-f", "flv", "-flvflags", "no_duration_filesize"]).arg(&unfinished);
    run(ffmpeg);
    std::fs::rename(&unfinished, &path).expect("cannot put test media in place");
    Media::new(path)
}

const ASSET: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/test.flv");
