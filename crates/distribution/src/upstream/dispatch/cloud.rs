//! Where the cloud is, and the repair connection to it.

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

/// Where the cloud is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cloud {
    /// Its name or address; empty while it is to be learned from the first datagram.
    pub host: String,
    /// Where it answers QUIC, if elsewhere.
    pub quic_host: Option<String>,
    /// Its port for repair.
    pub quic_port: u16,
    /// Where it answers HTTP, if elsewhere.
    pub api_host: Option<String>,
    /// Its port for the HTTP API.
    pub api_port: u16,
}

impl Cloud {
    /// `host:port` of its repair service.
    pub fn quic(&self) -> String {
        host_port(self.quic_host.as_deref().unwrap_or(&self.host), self.quic_port)
    }

    /// `host:port` of its API.
    pub fn api(&self) -> String {
        host_port(self.api_host.as_deref().unwrap_or(&self.host), self.api_port)
    }
}

/// A repair connection, which ends when this is dropped.
pub(in crate::upstream) struct Connection {
    pub(super) handle: RepairHandle,
    pub(super) events: mpsc::Receiver<RepairEvent>,
    pub(super) cancel: CancellationToken,
    pub(super) protocol: Option<Protocol>,
}

impl Connection {
    /// Closes it, and waits until that has been told. Answers that are under way to an existing cloud's
    /// edge are taken, because that cloud does not stand it when they are not.
    pub(in crate::upstream) async fn close(mut self) {
        self.cancel.cancel();
        let handle = self.handle.clone();
        let closed = async {
            while self.events.recv().await.is_some() {}
            handle.closed().await;
        };
        if tokio::time::timeout(CLOSE_PATIENCE, closed).await.is_err() {
            tracing::debug!("the repair connection does not close in time");
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Upstream {
    pub(super) fn must_learn(&self) -> bool {
        self.settings.cloud.host.is_empty()
    }

    pub(super) fn protocol(&self) -> Option<Protocol> {
        self.repair.as_ref()?.protocol
    }

    /// RTP came before any announcement: the ports are the configured ones until one comes.
    pub(super) fn learn_from_source(&mut self, ip: IpAddr) {
        let host = ip.to_canonical().to_string();
        self.learn(Cloud { host, ..self.settings.cloud.clone() });
    }

    pub(super) fn learn(&mut self, cloud: Cloud) {
        if self.cloud.as_ref() == Some(&cloud) {
            return;
        }
        // A cloud that still answers is not given up for another that shares the group.
        if self.cloud.as_ref().is_some_and(|old| old.host != cloud.host)
            && self.protocol().is_some()
        {
            return;
        }
        tracing::info!(
            "the cloud is {}: repair at {}, API at {}",
            cloud.host,
            cloud.quic(),
            cloud.api()
        );
        self.connect(cloud);
    }

    pub(super) fn connect(&mut self, cloud: Cloud) {
        if let Some(connect) = &self.settings.connect {
            let (events_in, events) = mpsc::channel(EVENT_QUEUE);
            let cancel = CancellationToken::new();
            self.repair = match connect(&cloud.quic(), events_in, cancel.clone()) {
                Ok(handle) => Some(Connection { handle, events, cancel, protocol: None }),
                Err(error) => {
                    tracing::error!("no repair from {}: {error}", cloud.quic());
                    None
                }
            };
            self.intake.set_told(Instant::now(), false);
            self.stop_probing();
            self.begun = true;
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

/// Longer than each of the client's waits at its end.
const CLOSE_PATIENCE: Duration = Duration::from_millis(1500);
const EVENT_QUEUE: usize = 4096;
