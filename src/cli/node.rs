//! What `downpour cloud` and `downpour edge` have in common: settings, log, signals, reload.

use std::{
    path::{Path, PathBuf},
    pin::pin,
    time::{Duration, Instant},
};

use tokio::time::{MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{
    Failure, files,
    signals::{Asked, NodeSignals},
};
use crate::{
    config::{self, DownstreamConfig, Loaded, LogConfig, RecordConfig, Reload, Settings},
    node::{
        DownstreamReload, Node, NodeAddrs, NodeSettings, StartError,
        limits::{self, Requirements},
        logging::{self, LogFile, LogGuard},
        settings,
    },
};
use downpour_sys::LogLimit;

/// The settings of a role, as far as both roles use them.
pub(super) trait NodeConfig: Settings {
    /// The section `log`.
    fn log(&self) -> &LogConfig;

    /// Makes `log.level` that of `other`.
    fn set_log_level(&mut self, other: &Self);

    /// The section `record`.
    fn record(&self) -> &RecordConfig;

    /// Further keys of files that the node writes, and the directories of these files.
    fn state_files(&self) -> Vec<(&'static str, &Path)>;

    /// `true` if the file has a token that the node presents.
    fn has_token(&self) -> bool;

    /// The section `downstream`; `None` on a node without one.
    fn downstream(&self) -> Option<&DownstreamConfig>;

    /// The section `downstream`.
    fn downstream_mut(&mut self) -> &mut DownstreamConfig;

    /// What the settings may come to need of the machine.
    fn requirements(&self) -> Requirements;

    /// The settings of the node.
    fn node(&self) -> NodeSettings;

    /// Logs that the node has started.
    fn log_start(&self, addrs: &NodeAddrs);
}

/// Runs a node until SIGTERM or SIGINT.
///
/// SIGHUP reloads the settings that are marked live, and the certificate. SIGUSR1 opens the log file
/// again. SIGUSR2 is ignored.
///
/// # Errors
/// If the settings or an address cannot be used, or a part of the node fails.
pub(super) fn run<T: NodeConfig>(named: Option<&Path>) -> Result<(), Failure> {
    let runtime = super::runtime()?;
    // Before anything else, because a signal without a handler ends the process.
    let signals = {
        let _inside = runtime.enter();
        NodeSignals::install()
    };
    let signals =
        signals.map_err(|error| Failure::Run(format!("cannot handle signals: {error}")))?;
    let default = Path::new(T::FILE);
    let Loaded { config, notes, warnings, .. } = config::load::<T>(named, default)?;
    let log = logging::init(config.log().level, LogFile::of(config.log()))?;
    logging::log_notes(&notes, &warnings);
    let file = named.unwrap_or(default).to_owned();
    logging::log_notes(&[], &files::exposed(&config, &file));
    for advice in limits::prepare(&config.requirements()) {
        tracing::warn!("{advice}");
    }
    let process = Process { config, file, log, signals };
    super::run_on(runtime, |shutdown| process.run(shutdown))
}

/// A node's process: its settings, log and signals.
struct Process<T> {
    /// The settings in force.
    config: T,
    file: PathBuf,
    log: LogGuard,
    signals: NodeSignals,
}

impl<T: NodeConfig> Process<T> {
    async fn run(mut self, shutdown: CancellationToken) -> Result<(), Failure> {
        let Some(node) = self.bind(&shutdown).await? else {
            tracing::info!("{} stopped", T::ROLE);
            return Ok(());
        };
        self.config.log_start(node.addrs());
        let reload = node.downstream_reload();
        let mut running = pin!(node.run(shutdown.clone()));
        let mut ticks = interval(LogLimit::INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ended = &mut running => {
                    ended?;
                    self.log.report_left_out();
                    tracing::info!("{} stopped", T::ROLE);
                    return Ok(());
                }
                asked = self.signals.next(), if !shutdown.is_cancelled() => {
                    self.handle(asked, reload.as_ref());
                }
                _ = ticks.tick() => self.log.report_left_out(),
            }
        }
    }

    /// Binds the node. While the network is not there yet, as at boot, it waits and tries again.
    /// Returns `None` if the node is shut down meanwhile.
    async fn bind(&mut self, shutdown: &CancellationToken) -> Result<Option<Node>, Failure> {
        let mut limit = LogLimit::new();
        let mut waited = false;
        loop {
            let error = match Node::bind(self.config.node()) {
                Ok(node) => {
                    if waited {
                        tracing::info!("the network is there");
                    }
                    return Ok(Some(node));
                }
                Err(error) => error,
            };
            // After a failed attempt, its own sockets may be open for a moment.
            let may_wait = error.is_network() || waited && error.is_machine();
            if !may_wait {
                return Err(self.start_failure(&error));
            }
            waited = true;
            if let Some(missed) = limit.due(Instant::now()) {
                tracing::warn!(%error, missed, "the network is not there yet; waiting");
            }
            tokio::select! {
                () = shutdown.cancelled() => return Ok(None),
                () = sleep(NETWORK_RETRY) => {}
                asked = self.signals.next() => self.handle(asked, None),
            }
        }
    }

    fn start_failure(&self, error: &StartError) -> Failure {
        let message = format!("{}: {error}", self.file.display());
        if error.is_machine() { Failure::Run(message) } else { Failure::Usage(message) }
    }

    fn handle(&mut self, asked: Asked, downstream: Option<&DownstreamReload>) {
        match asked {
            Asked::Reload => self.reload(downstream),
            Asked::ReopenLog => match self.log.reopen() {
                Ok(Some(path)) => tracing::info!(path = %path.display(), "log file opened again"),
                Ok(None) => tracing::info!("no log file to open again: log.to_file is false"),
                Err(error) => tracing::error!(%error, "log file not opened again"),
            },
        }
    }

    /// Applies the changes of the file that take effect on reload. A file with a mistake changes
    /// nothing.
    fn reload(&mut self, downstream: Option<&DownstreamReload>) {
        let loaded = config::read(&self.file)
            .map_err(|error| format!("{}: cannot read it: {error}", self.file.display()))
            .and_then(|text| {
                config::parse::<T>(&self.file, &text).map_err(|error| error.to_string())
            });
        let new = match loaded {
            Ok(Loaded { config, warnings, .. }) => {
                logging::log_notes(&[], &warnings);
                config
            }
            Err(error) => {
                tracing::error!(error, "settings not reloaded; nothing was changed");
                return;
            }
        };
        let (live, restart) = changed_keys(&self.config, &new);
        take_live(&mut self.config, &new);
        if live.iter().any(|key| key == "log.level") && !self.log.set_level(new.log().level) {
            tracing::warn!(
                "log.level has no effect: the environment variable RUST_LOG overrides it"
            );
        }
        if let (Some(downstream), Some(config)) = (downstream, self.config.downstream()) {
            downstream.set_targets(settings::targets(config));
            match downstream.reload_certificate(&config.cert_file, &config.key_file) {
                Ok(fingerprint) => tracing::info!(%fingerprint, "certificate reloaded"),
                Err(error) => {
                    tracing::error!(%error, "certificate not reloaded; the old one stays")
                }
            }
        }
        tracing::info!(changed = live.join(","), "settings reloaded");
        if !restart.is_empty() {
            tracing::warn!(
                keys = restart.join(","),
                "changed settings take effect after a restart"
            );
        }
    }
}

/// The keys whose values differ: those that take effect on reload, and the others.
fn changed_keys<T: Settings>(old: &T, new: &T) -> (Vec<String>, Vec<String>) {
    let (old, new) = (old.sections(), new.sections());
    let keys = |sections: Vec<config::Section>| sections.into_iter().flat_map(|s| s.keys);
    let changed = keys(old).zip(keys(new)).filter(|(old, new)| old.value != new.value);
    let (live, restart): (Vec<_>, Vec<_>) =
        changed.map(|(_, new)| new.spec).partition(|spec| spec.reload == Reload::Live);
    let paths = |specs: Vec<config::Spec>| specs.iter().map(config::Spec::path).collect();
    (paths(live), paths(restart))
}

/// Copies the values that take effect on reload.
fn take_live<T: NodeConfig>(config: &mut T, new: &T) {
    config.set_log_level(new);
    if let Some(new) = new.downstream() {
        config.downstream_mut().take_live(new);
    }
}

const NETWORK_RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{CloudConfig, EdgeConfig, LogLevel};

    #[test]
    fn every_live_key_is_taken_on_reload() {
        fn check<T: NodeConfig>(text: &str) {
            let new = config::parse::<T>(Path::new("new.yaml"), text).unwrap().config;
            let mut config = config::parse::<T>(Path::new("old.yaml"), OLD).unwrap().config;
            let sections = new.sections();
            let live = sections.iter().flat_map(|section| &section.keys);
            let live = live.filter(|key| key.spec.reload == Reload::Live).count();
            assert_eq!(changed_keys(&config, &new).0.len(), live, "a live key is not in the test");
            take_live(&mut config, &new);
            assert_eq!(changed_keys(&config, &new).0, [""; 0]);
        }
        const OLD: &str = "downstream: {}\n";
        let new = "log: {level: warn}\ndownstream:\n  targets: [10.0.0.7:5222]\n  cert_file: a.pem\n  \
                   key_file: b.pem\n";
        check::<CloudConfig>(new);
        check::<EdgeConfig>(new);
    }

    #[test]
    fn changed_keys_are_separated_by_when_they_take_effect() {
        let old = CloudConfig::default();
        let mut new = old.clone();
        new.log.level = LogLevel::Debug;
        new.max_viewers = 7;
        let (live, restart) = changed_keys(&old, &new);
        assert_eq!(live, ["log.level"]);
        assert_eq!(restart, ["http.max_viewers"]);
    }
}
