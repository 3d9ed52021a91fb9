//! `downpour cloud`.

use std::path::Path;

use super::{
    CloudArgs, Failure,
    node::{self, NodeConfig},
    requirements,
};
use crate::{
    config::{CloudConfig, DownstreamConfig, LogConfig, RecordConfig},
    node::{DownstreamAddrs, NodeAddrs, NodeSettings, limits::Requirements},
};

/// Runs a cloud node until SIGTERM or SIGINT.
///
/// # Errors
/// If the settings or an address cannot be used, or a part of the node fails.
pub fn run(args: &CloudArgs) -> Result<(), Failure> {
    node::run::<CloudConfig>(args.config.as_deref())
}

impl NodeConfig for CloudConfig {
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
        Vec::new()
    }

    fn has_token(&self) -> bool {
        false
    }

    fn downstream(&self) -> Option<&DownstreamConfig> {
        Some(&self.downstream)
    }

    fn downstream_mut(&mut self) -> &mut DownstreamConfig {
        &mut self.downstream
    }

    fn requirements(&self) -> Requirements {
        requirements::of_cloud(self)
    }

    fn node(&self) -> NodeSettings {
        self.into()
    }

    fn log_start(&self, addrs: &NodeAddrs) {
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            rtmp = addrs.rtmp.map(tracing::field::display),
            quic = addrs.downstream.map(|addrs| tracing::field::display(addrs.quic)),
            http = %addrs.http,
            "cloud started"
        );
        if let Some(DownstreamAddrs { fingerprint, .. }) = addrs.downstream {
            tracing::info!(%fingerprint, "certificate for edges to pin");
        }
        if self.downstream.debug {
            tracing::warn!("no RTP is sent: downstream.debug is true");
        }
    }
}
