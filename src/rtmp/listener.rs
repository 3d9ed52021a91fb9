//! The RTMP server: accepts connections of encoders and publishes their streams.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use prometheus::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

pub use super::metrics::ServerMetrics;

use crate::net::{self, AcceptLoop, AcceptSettings, Accepted, SlotLimits};
use crate::{
    net::shards::Shards,
    rtmp::connection::{CloseLog, Connection},
};
use downpour_hub::Admission;
use downpour_media::flv::Tag;

/// A listening RTMP server. Each connection is a task on one of a few threads; a failure ends that
/// connection only.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    shards: Shards,
    settings: ServerSettings,
    metrics: ServerMetrics,
}

impl Server {
    /// Listens on `addr`; port 0 picks a free one. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// If it cannot listen on the address, or a thread cannot be started.
    pub fn bind(addr: SocketAddr, settings: ServerSettings) -> io::Result<Self> {
        let listener = net::bind(addr, settings.max_connections)?;
        let metrics = ServerMetrics::register(&Registry::new()).map_err(io::Error::other)?;
        Ok(Self { listener, shards: Shards::spawn(settings.threads)?, settings, metrics })
    }

    /// Counts in `metrics` instead of in unregistered ones.
    pub fn with_metrics(self, metrics: ServerMetrics) -> Self {
        Self { metrics, ..self }
    }

    /// The address that the server listens on.
    ///
    /// # Errors
    /// Those of getsockname(2).
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` is cancelled, then notifies the encoders, closes all connections, and
    /// returns once they are closed, within about two seconds. Returns early if one of its threads
    /// fails.
    pub async fn run(self, admission: Admission, shutdown: CancellationToken) {
        let Self { listener, shards, settings, metrics } = self;
        // If a thread fails, the connections of the other threads end too.
        let shutdown = shutdown.child_token();
        let accept = AcceptSettings {
            protocol: "RTMP",
            limits: SlotLimits::new(settings.max_connections, settings.max_connections_per_address),
            keepalive: KEEPALIVE,
        };
        let accept = AcceptLoop::new(listener, accept, metrics.accept_counters());
        let log = Arc::new(CloseLog::default());
        let serve = |Accepted { stream, peer, slot }: Accepted| {
            // Moves the socket to the event loop of another runtime.
            let Ok(stream) = stream.into_std() else {
                metrics.accept_errors.inc();
                return;
            };
            let (admission, metrics, log) = (admission.clone(), metrics.clone(), log.clone());
            let shutdown = shutdown.clone();
            shards.run(Box::pin(async move {
                match TcpStream::from_std(stream) {
                    Ok(stream) => {
                        let connection = Connection::new(
                            stream, peer, slot, settings, admission, metrics, log, shutdown,
                        );
                        connection.run().await;
                    }
                    Err(error) => {
                        metrics.accept_errors.inc();
                        warn!(%peer, %error, "RTMP connection lost");
                    }
                }
            }));
        };
        tokio::select! {
            () = accept.run(shutdown.clone(), serve) => {}
            () = shards.failed() => {
                error!("RTMP thread failed; the server stops");
                shutdown.cancel();
            }
        }
        shards.join().await;
    }
}

/// Settings of the RTMP server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerSettings {
    /// Connections at one time, at least 1. A further one takes the slot of the connection that has
    /// been open longest without a publication; if there is none, it is closed. Default 8192.
    pub max_connections: usize,
    /// Connections without a publication that one client address may have, at least 1; `None`, the
    /// default, is half of `max_connections`. Loopback addresses have no such limit.
    pub max_connections_per_address: Option<usize>,
    /// Time from the connection, or from the end of a publication, to the next publication. Default
    /// 10 s.
    pub publish_timeout: Duration,
    /// Silence after which a publisher is disconnected. Default 30 s.
    pub idle_timeout: Duration,
    /// Time in which an encoder must read an answer. Default 10 s: answers are a few hundred bytes,
    /// so an encoder that has not read one by then does not read at all.
    pub write_timeout: Duration,
    /// The longest media message in bytes, at most [`Tag::MAX_BODY_LEN`], the default.
    pub max_message_len: usize,
    /// Payload of outgoing chunks in bytes. Default 4096.
    pub chunk_size: u32,
    /// Threads that serve connections, at least 1. Default half of the processors, at most 16: the
    /// other half sends.
    pub threads: usize,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            max_connections: 8192,
            max_connections_per_address: None,
            publish_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(10),
            max_message_len: Tag::MAX_BODY_LEN,
            chunk_size: 4096,
            threads: std::thread::available_parallelism()
                .map_or(1, |count| (count.get() / 2).clamp(1, MAX_THREADS)),
        }
    }
}

/// One thread serves about ten thousand encoders of 200 kbit/s.
const MAX_THREADS: usize = 16;
/// Time without data after which TCP probes a connection.
const KEEPALIVE: Duration = Duration::from_secs(15);
