//! What both roles do the same way: bind addresses, fail with the setting's name, run tasks.

pub mod assemble;
pub mod limits;
pub mod logging;
pub mod metrics;
pub mod settings;
pub mod upstream;

pub use assemble::{DownstreamAddrs, Node, NodeAddrs, NodeSettings};

use std::{fmt::Display, future::Future, io, net::SocketAddr};

use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;

use crate::{config::ListenAddr, net};

/// Why a node cannot start: the setting at fault, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {message}")]
pub struct StartError {
    key: &'static str,
    message: String,
}

impl StartError {
    /// The setting `key` cannot be used because of `message`.
    pub fn new(key: &'static str, message: impl Display) -> Self {
        Self { key, message: message.to_string() }
    }

    /// The address in `key` cannot be listened on.
    pub fn listen(key: &'static str, addr: impl Display, error: &io::Error) -> Self {
        Self::new(
            key,
            match error.kind() {
                io::ErrorKind::AddrInUse => {
                    format!("{addr} is taken; give another one, or end what listens there")
                }
                io::ErrorKind::PermissionDenied => {
                    format!("{addr} is not allowed; give a port over 1023, or run as root")
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

/// Looks up where the setting `key` says to listen.
pub fn resolve(key: &'static str, addr: &ListenAddr) -> Result<SocketAddr, StartError> {
    addr.resolve().map_err(|error| StartError::new(key, format!("{addr}: {error}")))
}

/// Listens for TCP where the setting `key` says, for so many connections at one time. Must be
/// called within a tokio runtime.
pub fn listen(
    key: &'static str,
    addr: &ListenAddr,
    connections: usize,
) -> Result<TcpListener, StartError> {
    let resolved = resolve(key, addr)?;
    net::bind(resolved, connections).map_err(|error| StartError::listen(key, resolved, &error))
}

/// What this machine calls itself, if it says.
pub fn host_name() -> Option<String> {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    Some(name.trim().to_owned()).filter(|name| !name.is_empty())
}

/// A node's lasting tasks. One that ends early takes the node down in an orderly way, so that its
/// supervisor starts it anew, instead of leaving it half alive.
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
    /// If a task ended by itself.
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

/// A task that should have lasted ended by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a part of the node failed: {0}")]
pub struct TaskEnded(String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_taken_is_one_clear_line() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        let error = std::net::TcpListener::bind(address).unwrap_err();
        assert_eq!(
            StartError::listen("rtmp_addr", address, &error).to_string(),
            format!("rtmp_addr: {address} is taken; give another one, or end what listens there")
        );
    }

    #[tokio::test]
    async fn a_task_that_ends_early_is_told() {
        let shutdown = CancellationToken::new();
        let mut tasks = Tasks::default();
        tasks.spawn("lasting", std::future::pending());
        tasks.spawn("short", async {});
        assert_eq!(tasks.run_until(&shutdown).await, Err(TaskEnded("short".into())));
        shutdown.cancel();
        assert_eq!(tasks.run_until(&shutdown).await, Ok(()));
    }
}
