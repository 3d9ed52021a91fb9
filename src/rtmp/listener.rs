//! The RTMP server: takes encoders' connections and hands their tags to the node.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use prometheus::Registry;
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    time::{self, Instant},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, warn};

pub use super::metrics::ServerMetrics;

use crate::node::limits;
use crate::{
    net::shards::Shards,
    rtmp::{connection::Connection, metrics::REFUSED_CONNECTIONS},
};
use downpour_hub::admission::PublishHandler;
use downpour_media::flv::Tag;

/// A listening RTMP server. Each connection is a task of its own, on one of a few threads; its
/// failure ends it alone.
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
    /// If the address cannot be had, or no threads.
    pub fn bind(addr: SocketAddr, settings: ServerSettings) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let metrics = ServerMetrics::register(&Registry::new()).map_err(io::Error::other)?;
        let listener = socket.listen(limits::backlog(settings.max_connections))?;
        Ok(Self { listener, shards: Shards::spawn(settings.threads)?, settings, metrics })
    }

    /// Counts in `metrics`, not in ones that nobody sees.
    pub fn with_metrics(self, metrics: ServerMetrics) -> Self {
        Self { metrics, ..self }
    }

    /// The address that the server listens on.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until `shutdown` is cancelled, then closes all connections, whose encoders are told,
    /// and returns when they are gone: within two seconds or so. Returns early if one of its threads
    /// fails.
    pub async fn run(self, handler: Arc<dyn PublishHandler>, shutdown: CancellationToken) {
        let Self { listener, shards, settings, metrics } = self;
        // Ends the connections of the other threads where one has failed.
        let shutdown = shutdown.child_token();
        let slots = Arc::new(Semaphore::new(settings.max_connections));
        let (mut full, mut failing) = (RareLog::default(), RareLog::default());
        let mut backoff = MIN_BACKOFF;
        loop {
            let accepted = tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = shards.failed() => {
                    error!("a thread of the RTMP server has failed");
                    shutdown.cancel();
                    break;
                }
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    backoff = MIN_BACKOFF;
                    metrics.accepted.inc();
                    let Ok(slot) = slots.clone().try_acquire_owned() else {
                        metrics.refused.with_label_values(&[REFUSED_CONNECTIONS]).inc();
                        if let Some(missed) = full.due(Instant::now()) {
                            let limit = settings.max_connections;
                            warn!(%peer, limit, missed, "RTMP connection refused: too many");
                        }
                        continue;
                    };
                    // It leaves this runtime's event loop for another one.
                    let Ok(stream) = stream.into_std() else {
                        metrics.accept_errors.inc();
                        continue;
                    };
                    let (handler, metrics) = (handler.clone(), metrics.clone());
                    let shutdown = shutdown.clone();
                    shards.run(Box::pin(async move {
                        let _slot = slot;
                        match TcpStream::from_std(stream) {
                            Ok(stream) => {
                                let connection = Connection::new(
                                    stream, peer, settings, handler, metrics, shutdown,
                                );
                                connection.run().await;
                            }
                            Err(error) => {
                                metrics.accept_errors.inc();
                                warn!(%peer, %error, "RTMP connection lost");
                            }
                        }
                    }));
                }
                Err(error) => {
                    // Out of descriptors, most likely: that passes, and accepting again at once
                    // would only burn the processor.
                    metrics.accept_errors.inc();
                    if let Some(missed) = failing.due(Instant::now()) {
                        warn!(%error, missed, "cannot accept RTMP connections");
                    }
                    tokio::select! {
                        () = shutdown.cancelled() => break,
                        () = time::sleep(backoff) => backoff = (backoff * 2).min(MAX_BACKOFF),
                    }
                }
            }
        }
        drop(listener);
        shards.join().await;
    }
}

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServerSettings {
    /// Connections at a time; more are closed at once. Default 8192.
    pub max_connections: usize,
    /// From the connection, or from the end of a publication, to the next publication. Default
    /// 10 s.
    pub publish_timeout: Duration,
    /// How long a publisher may send nothing. Default 30 s.
    pub idle_timeout: Duration,
    /// How long an encoder may leave what we send unread. Default 10 s: answers are a few hundred
    /// bytes, so who takes none in this time does not read at all.
    pub write_timeout: Duration,
    /// The longest media message in bytes; [`Tag::MAX_BODY_LEN`] at most, which is the default.
    pub max_message_len: usize,
    /// The payload of the chunks that we send, in bytes. Default 4096.
    pub chunk_size: u32,
    /// Threads that serve connections, 1 at least. Default half of the processors, and 16 at most:
    /// the other half is for those who send.
    pub threads: usize,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            max_connections: 8192,
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

/// Keeps a warning that a flood of connections causes from flooding the log.
#[derive(Debug, Default)]
struct RareLog {
    last: Option<Instant>,
    missed: u64,
}

impl RareLog {
    /// Whether to log now, and how often it was not logged since the last time.
    fn due(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now - last < LOG_INTERVAL) {
            self.missed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.missed))
    }
}

/// One serves some ten thousand encoders of 200 kbit/s.
const MAX_THREADS: usize = 16;
const MIN_BACKOFF: Duration = Duration::from_millis(10);
const MAX_BACKOFF: Duration = Duration::from_secs(1);
const LOG_INTERVAL: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_warning_is_logged_every_ten_seconds_with_what_was_missed() {
        let (mut log, now) = (RareLog::default(), Instant::now());
        assert_eq!(log.due(now), Some(0));
        assert_eq!((log.due(now), log.due(now)), (None, None));
        assert_eq!((log.due(now + LOG_INTERVAL), log.due(now)), (Some(2), None));
    }
}
