//! A node: its parts and their settings, metrics, logging, and the limits of the machine.

pub mod assemble;
pub mod limits;
pub mod logging;
mod memory;
pub mod metrics;
pub mod settings;
pub mod upstream;

pub use assemble::{DownstreamAddrs, Node, NodeAddrs, NodeSettings};

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
}

impl StartError {
    /// The setting `key` cannot be used; `message` says why.
    pub fn new(key: &'static str, message: impl Display) -> Self {
        Self { key, message: message.to_string() }
    }

    /// The node cannot listen on the address in `key`.
    pub fn listen(key: &'static str, addr: impl Display, error: &io::Error) -> Self {
        Self::new(
            key,
            match error.kind() {
                io::ErrorKind::AddrInUse => {
                    format!("{addr} is in use; change it, or stop the program that listens there")
                }
                io::ErrorKind::PermissionDenied => {
                    format!("{addr} is not permitted; use a port above 1023, or run as root")
                }
                io::ErrorKind::AddrNotAvailable => {
                    format!("{addr} is not an address of this machine")
                }
                _ => format!("cannot listen on {addr}: {error}"),
            },
        )
    }

    /// The setting at fault.
    pub fn key(&self) -> &'static str {
        self.key
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
    addr.resolve().map_err(|error| StartError::new(key, format!("{addr}: {error}")))
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
