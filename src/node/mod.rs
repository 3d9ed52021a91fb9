//! A node: its parts and their settings, metrics, logging, and the limits of the machine.

pub mod assemble;
pub mod limits;
pub mod logging;
mod memory;
pub mod metrics;
pub mod settings;
pub mod upstream;

pub use assemble::{DownstreamAddrs, DownstreamReload, Node, NodeAddrs, NodeSettings};

use std::{fmt::Display, future::Future, io, net::SocketAddr};

use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{config::ListenAddr, net};

/// Why a node cannot start: the setting at fault, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {message}")]
pub struct StartError {
    key: &'static str,
    message: String,
    cause: Cause,
}

/// What must change for a node to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The settings.
    Settings,
    /// Something on this machine, such as a program that uses the port.
    Machine,
    /// The network: an address or a route is missing, and comes when an interface does.
    Network,
}

impl StartError {
    /// The setting `key` cannot be used; `message` says why.
    pub fn new(key: &'static str, message: impl Display) -> Self {
        Self { key, message: message.to_string(), cause: Cause::Settings }
    }

    /// The node cannot listen on the address in `key`.
    pub fn listen(key: &'static str, addr: impl Display, error: &io::Error) -> Self {
        let (cause, message) = match error.kind() {
            io::ErrorKind::AddrInUse => (
                Cause::Machine,
                format!("{addr} is in use; change it, or stop the program that listens there"),
            ),
            io::ErrorKind::PermissionDenied => (
                Cause::Settings,
                format!("{addr} is not permitted; use a port above 1023, or run as root"),
            ),
            io::ErrorKind::AddrNotAvailable => {
                (Cause::Network, format!("{addr} is not an address of this machine"))
            }
            io::ErrorKind::NetworkDown | io::ErrorKind::NetworkUnreachable => {
                (Cause::Network, format!("cannot listen on {addr}: {error}"))
            }
            // To join a group takes an interface and a route.
            _ if error.raw_os_error() == Some(libc::ENODEV) => {
                (Cause::Network, format!("no network interface for {addr}"))
            }
            _ => (Cause::Machine, format!("cannot listen on {addr}: {error}")),
        };
        Self { key, message, cause }
    }

    /// The setting at fault.
    pub fn key(&self) -> &'static str {
        self.key
    }

    /// `true` if the node can start once the network is there.
    pub fn is_network(&self) -> bool {
        self.cause == Cause::Network
    }

    /// `true` if the node may start later with the same settings.
    pub fn is_machine(&self) -> bool {
        self.cause != Cause::Settings
    }
}

impl From<prometheus::Error> for StartError {
    fn from(error: prometheus::Error) -> Self {
        Self::new("metrics", error)
    }
}

/// Resolves the address in the setting `key`.
///
/// # Errors
/// If its host name cannot be resolved.
pub fn resolve(key: &'static str, addr: &ListenAddr) -> Result<SocketAddr, StartError> {
    addr.resolve().map_err(|error| StartError {
        key,
        message: format!("{addr}: {error}"),
        cause: Cause::Machine,
    })
}

/// Listens for TCP on the address in the setting `key`, for about `connections` connections at one
/// time. Must be called within a tokio runtime.
///
/// # Errors
/// If the address cannot be resolved or listened on.
pub fn listen(
    key: &'static str,
    addr: &ListenAddr,
    connections: usize,
) -> Result<TcpListener, StartError> {
    let resolved = resolve(key, addr)?;
    net::bind(resolved, connections).map_err(|error| StartError::listen(key, resolved, &error))
}

/// Returns the host name of this machine, if it has one.
pub fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

/// The tasks that run as long as a node. If one ends early, the node shuts down in order and its
/// supervisor restarts it: better than a node of which a part is missing.
#[derive(Default)]
pub struct Tasks {
    tasks: JoinSet<&'static str>,
}

impl Tasks {
    /// Runs `task` under `name`.
    pub fn spawn(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(async move {
            task.await;
            name
        });
    }

    /// Waits for `shutdown`, or for the first task to end.
    ///
    /// # Errors
    /// If a task ended.
    pub async fn run_until(&mut self, shutdown: &CancellationToken) -> Result<(), TaskEnded> {
        tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            Some(ended) = self.tasks.join_next() => Err(TaskEnded(match ended {
                Ok(name) => name.to_owned(),
                Err(error) => error.to_string(),
            })),
        }
    }

    /// Waits until every task has ended.
    pub async fn join(&mut self) {
        while self.tasks.join_next().await.is_some() {}
    }
}

/// A task ended before the node was shut down.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a part of the node failed: {0}")]
pub struct TaskEnded(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_about_a_port_in_use_is_one_line() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = std::net::TcpListener::bind(address).unwrap_err();
        assert_eq!(
            StartError::listen("rtmp.addr", address, &error).to_string(),
            format!(
                "rtmp.addr: {address} is in use; change it, or stop the program that listens there"
            )
        );
    }

    #[test]
    fn missing_network_differs_from_wrong_settings_and_from_a_port_in_use() {
        let cause = |number| {
            let error = StartError::listen("rtp.addr", ":1", &io::Error::from_raw_os_error(number));
            (error.is_network(), error.is_machine())
        };
        assert_eq!(cause(libc::ENODEV), (true, true));
        assert_eq!(cause(libc::EADDRNOTAVAIL), (true, true));
        assert_eq!(cause(libc::ENETUNREACH), (true, true));
        assert_eq!(cause(libc::EADDRINUSE), (false, true));
        assert_eq!(cause(libc::EACCES), (false, false));
        assert!(!StartError::new("rtp.addr", "use another").is_machine());
    }

    #[tokio::test]
    async fn task_that_ends_early_is_an_error() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::default();
        tasks.spawn("lasting", std::future::pending());
        tasks.spawn("short", async {});
        assert_eq!(tasks.run_until(&shutdown).await, Err(TaskEnded("short".into())));
        shutdown.cancel();
        assert_eq!(tasks.run_until(&shutdown).await, Ok(()));
    }
}
