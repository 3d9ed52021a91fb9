//! Logging: to standard error, and to a rotated file if the settings have one.
//!
//! A line is the time, the level, the place, the message, and fields as `key=value` (`logfmt`).
//! Lines that repeat are limited (`repeats`). The level can change while the node runs, and the file
//! can be opened again after it was moved.

mod logfmt;
mod repeats;

use std::{
    io::{self, IsTerminal, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use logroller::{LogRoller, LogRollerBuilder, LogRollerError, Rotation, RotationSize};
use parking_lot::Mutex;
use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, Layer, fmt, layer::SubscriberExt, reload};

use self::{logfmt::Logfmt, repeats::Repeats};
use crate::config::{LogConfig, LogLevel};

/// Starts logging for the process. Downpour logs from `level` on, its libraries from warn on; the
/// environment variable `RUST_LOG` overrides both.
///
/// A separate thread per output writes the lines, so that a full disk or a stuck terminal does not
/// block the node. Lines that it cannot keep up with are dropped, and counted by
/// [`LogGuard::dropped_lines`].
///
/// # Errors
/// If the log file cannot be created, `RUST_LOG` is not a filter, or logging was started before.
pub fn init(level: LogLevel, file: Option<LogFile>) -> Result<LogGuard, LogError> {
    let wanted = std::env::var(EnvFilter::DEFAULT_ENV).unwrap_or_default();
    let (subscriber, guard) = subscriber(level, &wanted, file)?;
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Twice)?;
    Ok(guard)
}

/// Logs the notes and warnings from loading the settings.
pub fn log_notes(notes: &[String], warnings: &[String]) {
    for note in notes {
        tracing::info!("{note}");
    }
    for warning in warnings {
        tracing::warn!("{warning}");
    }
}

/// A log file that is rotated by size: `name` is the newest, then `name.1` and so on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogFile {
    /// The directory, created if it is missing.
    pub dir: PathBuf,
    /// Name of the newest file.
    pub name: String,
    /// Size in bytes at which a new file is started.
    pub max_bytes: u64,
    /// Number of files kept, including the newest; at least 1.
    pub count: u64,
}

impl LogFile {
    /// The log file of these settings; `None` if they have none.
    pub fn of(config: &LogConfig) -> Option<Self> {
        config.to_file.then(|| Self {
            dir: config.dir.clone(),
            name: config.file.clone(),
            max_bytes: config.file_max_bytes,
            count: config.file_count,
        })
    }
}

/// Keeps the threads of the log. Dropping it writes the queued lines; keep it until `main` returns.
#[must_use = "dropping the guard ends the log"]
pub struct LogGuard {
    _workers: Vec<WorkerGuard>,
    dropped: Vec<ErrorCounter>,
    /// Replaces the filter; `None` if `RUST_LOG` has set it.
    set_filter: Option<SetFilter>,
    file: Option<ReopenedFile>,
    repeats: Repeats,
}

type SetFilter = Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>;

impl LogGuard {
    /// Lines dropped since the start because a writer could not keep up.
    pub fn dropped_lines(&self) -> usize {
        self.dropped.iter().map(ErrorCounter::dropped_lines).sum()
    }

    /// Logs from `level` on. Returns `false` if `RUST_LOG` overrides the level.
    pub fn set_level(&self, level: LogLevel) -> bool {
        let (Some(set_filter), Ok(filter)) = (&self.set_filter, filter(level, "")) else {
            return false;
        };
        // Fails only once the log has ended.
        set_filter(filter).is_ok()
    }

    /// Opens the log file again, after it was moved away. Returns its path; `None` if the log goes to
    /// standard error only.
    ///
    /// # Errors
    /// If the file cannot be opened. The log then goes on in the old one.
    pub fn reopen(&self) -> Result<Option<PathBuf>, LogError> {
        self.file.as_ref().map(ReopenedFile::reopen).transpose()
    }

    /// Logs how many repeated lines were left out. Call it about every 10 s.
    pub fn report_left_out(&self) {
        self.repeats.report();
    }
}

/// Why logging did not start.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The file or its directory cannot be created.
    #[error("log.dir: cannot write the log to {}: {cause}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// The error.
        cause: LogRollerError,
    },
    /// `RUST_LOG` is not a filter.
    #[error("RUST_LOG: {0}; an example is RUST_LOG=downpour=debug")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// The process has a logger already.
    #[error("logging was started before")]
    Twice,
}

fn subscriber(
    level: LogLevel,
    wanted: &str,
    file: Option<LogFile>,
) -> Result<(impl Subscriber + Send + Sync, LogGuard), LogError> {
    let (mut workers, mut dropped) = (Vec::new(), Vec::new());
    let mut add = |(writer, worker): (NonBlocking, WorkerGuard)| {
        dropped.push(writer.error_counter());
        workers.push(worker);
        writer
    };
    let (filter, filter_handle) = reload::Layer::new(filter(level, wanted)?);
    let line = || fmt::layer().fmt_fields(Logfmt);
    let stderr = add(queued().finish(io::stderr()));
    let ansi = io::stderr().is_terminal();
    let mut layers = vec![line().with_ansi(ansi).with_writer(stderr).boxed()];
    let file = file.map(ReopenedFile::open).transpose()?;
    if let Some(file) = &file {
        let writer = add(queued().finish(file.clone()));
        layers.push(line().with_ansi(false).with_writer(writer).boxed());
    }
    let repeats = Repeats::default();
    let subscriber = tracing_subscriber::registry().with(layers).with(repeats.clone()).with(filter);
    let set_filter = wanted
        .is_empty()
        .then(|| Box::new(move |filter| filter_handle.reload(filter)) as SetFilter);
    Ok((subscriber, LogGuard { _workers: workers, dropped, set_filter, file, repeats }))
}

/// What is logged: `wanted` in the words of `RUST_LOG`, or, if that is empty, Downpour from `level` on
/// and its libraries from warn on.
fn filter(level: LogLevel, wanted: &str) -> Result<EnvFilter, LogError> {
    let own = format!("warn,downpour={}", level.as_str());
    Ok(EnvFilter::builder().parse(if wanted.is_empty() { &own } else { wanted })?)
}

/// A log file that can be opened again while lines are written to it. Clones share it.
#[derive(Clone)]
struct ReopenedFile {
    file: LogFile,
    roller: Arc<Mutex<LogRoller>>,
}

impl ReopenedFile {
    fn open(file: LogFile) -> Result<Self, LogError> {
        let roller = Arc::new(Mutex::new(roller(&file)?));
        Ok(Self { file, roller })
    }

    fn reopen(&self) -> Result<PathBuf, LogError> {
        let opened = roller(&self.file)?;
        let before = std::mem::replace(&mut *self.roller.lock(), opened);
        // Waits for the end of a rotation, and so not behind the lock.
        drop(before);
        Ok(self.file.dir.join(&self.file.name))
    }
}

impl Write for ReopenedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.roller.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.roller.lock().flush()
    }
}

fn roller(file: &LogFile) -> Result<LogRoller, LogError> {
    LogRollerBuilder::new(file.dir.as_path(), Path::new(&file.name))
        .rotation(Rotation::SizeBased(RotationSize::Bytes(file.max_bytes)))
        .max_keep_files(file.count.saturating_sub(1))
        // Dropping the roller waits until the last rotation is done.
        .graceful_shutdown(true)
        .build()
        .map_err(|cause| LogError::File { path: file.dir.join(&file.name), cause })
}

fn queued() -> NonBlockingBuilder {
    NonBlockingBuilder::default().lossy(true).buffered_lines_limit(QUEUED_LINES)
}

/// Lines queued per writer, a few MB at most.
const QUEUED_LINES: usize = 16_384;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn file(dir: &Path) -> LogFile {
        LogFile { dir: dir.join("logs"), name: "node.log".into(), max_bytes: 4096, count: 3 }
    }

    fn written(level: LogLevel, wanted: &str, log: impl FnOnce()) -> String {
        let dir = tempfile::tempdir().unwrap();
        let file = LogFile { max_bytes: 1 << 20, ..file(dir.path()) };
        let (subscriber, guard) = subscriber(level, wanted, Some(file.clone())).unwrap();
        tracing::subscriber::with_default(subscriber, log);
        assert_eq!(guard.dropped_lines(), 0);
        drop(guard);
        fs::read_to_string(file.dir.join(file.name)).unwrap()
    }

    fn log_lines() {
        tracing::info!(stream = "live/movie", "own info");
        tracing::debug!("own debug");
        tracing::info!(target: "quinn", "library info");
        tracing::warn!(target: "quinn", "library warning");
    }

    #[test]
    fn level_applies_to_downpour_and_libraries_log_warnings_only() {
        let text = written(LogLevel::Info, "", log_lines);
        assert!(text.contains("own info") && text.contains("stream=\"live/movie\""), "{text}");
        assert!(text.contains("library warning"));
        assert!(!text.contains("own debug") && !text.contains("library info"));
        assert!(!text.contains('\u{1b}'), "no colours in a file");
        assert!(written(LogLevel::Debug, "", log_lines).contains("own debug"));
        assert!(!written(LogLevel::Error, "", log_lines).contains("own info"));
    }

    #[test]
    fn fields_are_quoted_for_a_logfmt_parser() {
        let text = written(LogLevel::Info, "", || {
            tracing::info!(reason = %"the client left", peer = %"[::1]:7", n = 3, "viewer closed");
            tracing::info!(node = "a\nb=\"c\"", "edge hello");
        });
        let lines: Vec<_> = text.lines().collect();
        assert!(lines[0].ends_with("viewer closed reason=\"the client left\" peer=[::1]:7 n=3"));
        assert!(lines[1].ends_with(r#"edge hello node="a\nb=\"c\"""#), "{text}");
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn level_changes_while_the_log_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let file = LogFile { max_bytes: 1 << 20, ..file(dir.path()) };
        let (subscriber, guard) = subscriber(LogLevel::Error, "", Some(file.clone())).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            log_lines();
            assert!(guard.set_level(LogLevel::Debug));
            log_lines();
        });
        drop(guard);
        let text = fs::read_to_string(file.dir.join(file.name)).unwrap();
        assert_eq!(text.matches("own info").count(), 1, "{text}");
        assert!(text.contains("own debug"), "{text}");
        let (_, guard) = super::subscriber(LogLevel::Info, "downpour=warn", None).unwrap();
        assert!(!guard.set_level(LogLevel::Debug));
    }

    #[test]
    fn file_that_was_moved_away_is_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let file = LogFile { max_bytes: 1 << 20, ..file(dir.path()) };
        let path = file.dir.join(&file.name);
        let mut reopened = ReopenedFile::open(file).unwrap();
        writeln!(reopened, "before").unwrap();
        reopened.flush().unwrap();
        fs::rename(&path, path.with_extension("old")).unwrap();
        assert_eq!(reopened.reopen().unwrap(), path);
        writeln!(reopened, "after").unwrap();
        drop(reopened);
        assert_eq!(fs::read_to_string(path.with_extension("old")).unwrap(), "before\n");
        assert_eq!(fs::read_to_string(path).unwrap(), "after\n");
    }

    #[test]
    fn rust_log_overrides_the_level() {
        let text = written(LogLevel::Error, "quinn=info", log_lines);
        assert!(text.contains("library info") && !text.contains("own info"), "{text}");
        assert!(matches!(
            subscriber(LogLevel::Info, "downpour=loud", None).err(),
            Some(LogError::Filter(_))
        ));
    }

    #[test]
    fn file_is_rotated_and_old_ones_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let file = file(dir.path());
        let mut roller = roller(&file).unwrap();
        for line in 0..1000 {
            use std::io::Write;
            writeln!(roller, "line {line:060}").unwrap();
        }
        drop(roller);
        let files: Vec<_> = fs::read_dir(&file.dir).unwrap().map(|f| f.unwrap()).collect();
        assert_eq!(files.len(), 3, "{files:?}");
        assert!(files.iter().all(|f| f.metadata().unwrap().len() <= file.max_bytes));
        let newest = fs::read_to_string(file.dir.join(&file.name)).unwrap();
        assert!(newest.ends_with("999\n"));
    }

    #[test]
    fn error_names_a_directory_that_cannot_be_created() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("logs"), "a file").unwrap();
        let error = subscriber(LogLevel::Info, "", Some(file(dir.path()))).err().unwrap();
        assert!(error.to_string().contains("logs/node.log"), "{error}");
    }
}
