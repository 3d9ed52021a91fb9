//! Sections that both roles have: streams, recording, log, shutdown.

use std::path::{Path, PathBuf};

use super::{Conflict, LogLevel, schema::group};

group! {
    /// Streams and the media that is kept of them: the section `streams`.
    pub struct StreamLimits {
        /// Streams at one time.
        restart max -> max: usize = 1000, in 1..=100_000, also [max_streams];
        /// Time that a stream waits for its encoder, or its cloud, to come back, in milliseconds; 0
        /// ends it at once. Viewers, edges and recordings stay, and timestamps continue.
        restart publish_grace_ms -> publish_grace_ms: u64 = 5000,
            in 0..=600_000, also [publish_grace_ms];
        /// Media per stream that is kept in memory for viewers and a recording that are behind, in
        /// milliseconds. Others need the newest group of pictures only.
        restart gop_cache_max_ms -> gop_cache_max_ms: u32 = 20_000,
            in 1000..=600_000, also [gop_cache_max_ms];
        /// The same limit in bytes.
        restart gop_cache_max_bytes -> gop_cache_max_bytes: usize = 32 << 20,
            in 1 << 20..=4 << 30, also [gop_cache_max_bytes];
    }
}

group! {
    /// Recording to FLV files: the section `record`.
    pub struct RecordConfig {
        /// Whether each stream is recorded.
        restart enabled -> enabled: bool = false, also [enable_record, flv_archive];
        /// Directory of the files.
        restart dir -> dir: PathBuf = "records".into(), also [record_dir, flv_dir];
    }
}

group! {
    /// The log: the section `log`.
    pub struct LogConfig {
        /// trace, debug, info, warn or error. The environment variable RUST_LOG overrides it.
        live level -> level: LogLevel = LogLevel::Info, also [log_level, level];
        /// Whether the log is also written to a file.
        restart to_file -> to_file: bool = false, also [enable_log_file];
        /// Directory of the log files.
        restart dir -> dir: PathBuf = "logs".into(), also [log_dir];
        /// Name of the log file.
        restart file -> file: String = "downpour.log".into(), also [log_file];
        /// Bytes after which a new log file is started.
        restart file_max_bytes -> file_max_bytes: u64 = 100 << 20,
            in 1 << 16..=16 << 30, also [log_file_max_bytes];
        /// Log files that are kept.
        restart file_count -> file_count: u64 = 10, in 1..=1000, also [log_file_count];
    }
}

group! {
    /// Shutdown after SIGTERM or SIGINT: the section `shutdown`.
    pub struct ShutdownConfig {
        /// Time that connections have to finish, in milliseconds.
        restart grace_ms -> grace_ms: u64 = 5000, in 0..=60_000, also [shutdown_grace_ms];
    }
}

impl RecordConfig {
    /// The directory of recordings; `None` if nothing is recorded.
    pub fn dir(&self) -> Option<&Path> {
        self.enabled.then_some(&*self.dir)
    }
}

impl LogConfig {
    /// The defaults, with a log file of this name.
    pub(super) fn named(file: &str) -> Self {
        Self { file: file.into(), ..Self::default() }
    }

    pub(super) fn check(&self) -> Result<(), Conflict> {
        let name = &self.file[..];
        // `%` would be a pattern for dates to the rotation.
        if name.is_empty() || name == ".." || name == "." || name.contains(['/', '%', '\0']) {
            let message = format!(
                "{name:?} is not valid; use a file name without / and %, and log.dir for the directory"
            );
            return Err(Conflict::new(&["log.file"], message));
        }
        Ok(())
    }
}
