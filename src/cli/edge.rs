//! `downpour edge`.

use std::path::Path;

use super::{
    EdgeArgs, Failure,
    node::{self, NodeConfig},
    requirements,
};
use crate::{
    config::{DownstreamConfig, EdgeConfig, LogConfig, RecordConfig},
    node::{NodeAddrs, NodeSettings, limits::Requirements},
};

/// Runs an edge node until SIGTERM or SIGINT.
///
/// # Errors
/// If the settings or an address cannot be used, or a part of the node fails.
pub fn run(args: &EdgeArgs) -> Result<(), Failure> {
    node::run::<EdgeConfig>(args.config.as_deref())
}

impl NodeConfig for EdgeConfig {
    fn log(&self) -> &LogConfig {
        &self.log
    }

    fn set_log_level(&mut self, other: &Self) {
        self.log.level = other.log.level;
    }

    fn record(&self) -> &RecordConfig {
        &self.record
    }

    fn state_files(&self) -> Vec<(&'static str, &Path)> {
        let is_pinned = self.fingerprint.is_some() || !self.ca_file.as_os_str().is_empty();
        match self.disable_quic || self.insecure || is_pinned {
            true => Vec::new(),
            false => {
                let dir = self.known_clouds.parent().unwrap_or(Path::new(""));
                vec![("trust.known_clouds", dir)]
            }
        }
    }

    fn has_token(&self) -> bool {
        !self.token.is_empty()
    }

    fn downstream(&self) -> Option<&DownstreamConfig> {
        self.downstream_enabled.then_some(&self.downstream)
    }

    fn downstream_mut(&mut self) -> &mut DownstreamConfig {
        &mut self.downstream
    }

    fn requirements(&self) -> Requirements {
        requirements::of_edge(self)
    }

    fn node(&self) -> NodeSettings {
        self.into()
    }

    fn log_start(&self, addrs: &NodeAddrs) {
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            rtp = ?addrs.rtp_in,
            http = %addrs.http,
            quic = addrs.downstream.map(|addrs| tracing::field::display(addrs.quic)),
            "edge started"
        );
        if self.cloud_host.is_empty() {
            tracing::info!("waiting for a datagram of the cloud: upstream.host is empty");
        }
    }
}
