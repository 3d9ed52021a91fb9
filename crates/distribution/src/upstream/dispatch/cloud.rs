//! The cloud's address, configured or learned, and the repair connection to it.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Upstream;
use crate::{
    protocol::Protocol,
    upstream::repair_client::{RepairEvent, RepairHandle},
};

/// Addresses of a cloud.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cloud {
    /// Its name or address; empty to learn it from the first datagram.
    pub host: String,
    /// Host of its repair service, if another.
    pub quic_host: Option<String>,
    /// UDP port of its repair service.
    pub quic_port: u16,
    /// Host of its HTTP API, if another.
    pub api_host: Option<String>,
    /// TCP port of its HTTP API.
    pub api_port: u16,
}

impl Cloud {
    /// Returns the `host:port` of its repair service.
    pub fn quic(&self) -> String {
        host_port(self.quic_host.as_deref().unwrap_or(&self.host), self.quic_port)
    }

    /// Returns the `host:port` of its HTTP API.
    pub fn api(&self) -> String {
        host_port(self.api_host.as_deref().unwrap_or(&self.host), self.api_port)
    }
}

/// The repair client and its events. Dropping it closes the connection.
pub(in crate::upstream) struct Connection {
    pub(super) handle: RepairHandle,
    pub(super) events: mpsc::Receiver<RepairEvent>,
    cancel: CancellationToken,
    /// Protocol of the connection; `None` while there is none.
    pub(super) protocol: Option<Protocol>,
}

impl Connection {
    /// Closes the connection and waits until the cloud has acknowledged that, with a timeout. Reads
    /// outstanding answers meanwhile, because an unfinished answer brings down a v0 cloud.
    pub(in crate::upstream) async fn close(mut self) {
        self.cancel.cancel();
        let handle = self.handle.clone();
        // Answers that never come may keep the events open for longer than the client.
        let closed = async {
            tokio::select! {
                () = handle.closed() => {}
                () = async { while self.events.recv().await.is_some() {} } => handle.closed().await,
            }
        };
        if tokio::time::timeout(CLOSE_TIMEOUT, closed).await.is_err() {
            tracing::debug!("repair connection close timed out");
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Upstream {
    /// `true` if the cloud's address is not configured.
    pub(super) fn learns_cloud(&self) -> bool {
        self.settings.cloud.host.is_empty()
    }

    /// Returns the protocol of the repair connection, if it is established.
    pub(super) fn protocol(&self) -> Option<Protocol> {
        self.connection.as_ref()?.protocol
    }

    /// Learns the cloud's address from RTP that arrived before an announcement. The ports are the
    /// configured ones.
    pub(super) fn learn_from_source(&mut self, ip: IpAddr) {
        let host = ip.to_canonical().to_string();
        self.learn(Cloud { host, ..self.settings.cloud.clone() });
    }

    /// Connects to the cloud at a learned address.
    pub(super) fn learn(&mut self, cloud: Cloud) {
        if self.cloud.as_ref() == Some(&cloud) {
            return;
        }
        // Another cloud may send to the same multicast group: keep the one that is connected.
        if self.cloud.as_ref().is_some_and(|old| old.host != cloud.host)
            && self.protocol().is_some()
        {
            return;
        }
        tracing::info!(
            host = cloud.host,
            repair = cloud.quic(),
            api = cloud.api(),
            "cloud address learned"
        );
        self.connect(cloud);
    }

    /// Opens the repair connection, in place of the current one.
    pub(super) fn connect(&mut self, cloud: Cloud) {
        if let Some(connect) = &self.settings.connect {
            let (events_in, events) = mpsc::channel(EVENT_QUEUE);
            let cancel = CancellationToken::new();
            self.connection = match connect(&cloud.quic(), events_in, cancel.clone()) {
                Ok(handle) => {
                    self.link.disconnected(format!("connecting to the cloud {}", cloud.quic()));
                    Some(Connection { handle, events, cancel, protocol: None })
                }
                Err(error) => {
                    self.link.disconnected(format!("no connection to {}: {error}", cloud.quic()));
                    tracing::error!(cloud = cloud.quic(), %error, "repair client cannot start");
                    None
                }
            };
            self.last_protocol = None;
            self.streams.set_announced(Instant::now(), false);
            self.stop_probing();
            self.needs_poll = true;
        }
        self.cloud = Some(cloud);
    }
}

fn host_port(host: &str, port: u16) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

/// Longer than the repair client's own timeouts when it closes.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(2500);
const EVENT_QUEUE: usize = 4096;
