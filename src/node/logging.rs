//! Logging: to standard error, and to a rotated file if the settings have one.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use logroller::{LogRollerBuilder, LogRollerError, Rotation, RotationSize};
use tracing::Subscriber;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{EnvFilter, Layer, fmt, layer::SubscriberExt};

use crate::config::{CloudConfig, EdgeConfig, LogLevel};

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
    /// The log file of a cloud; `None` if its settings have none.
    pub fn of_cloud(config: &CloudConfig) -> Option<Self> {
        config.enable_log_file.then(|| Self {
            dir: config.log_dir.clone(),
            name: config.log_file.clone(),
            max_bytes: config.log_file_max_bytes,
            count: config.log_file_count,
        })
    }

    /// The log file of an edge; `None` if its settings have none.
    pub fn of_edge(config: &EdgeConfig) -> Option<Self> {
        config.enable_log_file.then(|| Self {
            dir: config.log_dir.clone(),
            name: config.log_file.clone(),
            max_bytes: config.log_file_max_bytes,
            count: config.log_file_count,
        })
    }
}

/// Keeps the threads of the log. Dropping it writes the queued lines; keep it until `main` returns.
#[must_use = "dropping the guard ends the log"]
pub struct LogGuard {
    _workers: Vec<WorkerGuard>,
    dropped: Vec<ErrorCounter>,
}

impl LogGuard {
    /// Lines dropped since the start because a writer could not keep up.
    pub fn dropped_lines(&self) -> usize {
        self.dropped.iter().map(ErrorCounter::dropped_lines).sum()
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
    let mut guard = LogGuard { _workers: Vec::new(), dropped: Vec::new() };
    let mut add = |(writer, worker): (NonBlocking, WorkerGuard)| {
        guard.dropped.push(writer.error_counter());
        guard._workers.push(worker);
        writer
    };
    let own = format!("warn,downpour={}", level.as_str());
    let filter = EnvFilter::builder().parse(if wanted.is_empty() { &own } else { wanted })?;
    let stderr = add(queued().finish(std::io::stderr()));
    let mut layers =
        vec![fmt::layer().with_ansi(std::io::stderr().is_terminal()).with_writer(stderr).boxed()];
    if let Some(file) = file {
        let writer = add(queued().finish(roller(&file)?));
        layers.push(fmt::layer().with_ansi(false).with_writer(writer).boxed());
    }
    Ok((tracing_subscriber::registry().with(layers).with(filter), guard))
}

fn roller(file: &LogFile) -> Result<logroller::LogRoller, LogError> {
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
