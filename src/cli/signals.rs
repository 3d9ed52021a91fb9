//! Signals of a process.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Cancels `shutdown` at the first SIGTERM or SIGINT; a second one ends the process at once.
pub(super) async fn shut_down(shutdown: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::error!("signal handlers cannot be installed; SIGTERM will not drain");
        return;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if shutdown.is_cancelled() {
            std::process::exit(130);
        }
        tracing::info!("shutting down");
        shutdown.cancel();
    }
}

/// The signals that a running node takes. Without a handler, each of them would end the process.
pub(super) struct NodeSignals {
    hangup: Signal,
    reopen: Signal,
    ignored: Signal,
}

/// What a signal asks of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asked {
    /// SIGHUP: reload the settings.
    Reload,
    /// SIGUSR1: open the log file again.
    ReopenLog,
}

impl NodeSignals {
    /// Installs the handlers. Signals that arrive before [`NodeSignals::next`] is called wait for it.
    /// Must be called inside a tokio runtime.
    pub(super) fn install() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            reopen: signal(SignalKind::user_defined1())?,
            ignored: signal(SignalKind::user_defined2())?,
        })
    }

    /// Waits for the next signal. Cancel-safe.
    pub(super) async fn next(&mut self) -> Asked {
        loop {
            tokio::select! {
                _ = self.hangup.recv() => return Asked::Reload,
                _ = self.reopen.recv() => return Asked::ReopenLog,
                _ = self.ignored.recv() => tracing::info!("SIGUSR2 ignored: it has no meaning"),
            }
        }
    }
}
