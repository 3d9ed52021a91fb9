//! `downpour edge`.

use super::{EdgeArgs, Failure, block_on, needs, start_failure};
use crate::{
    config::{EdgeConfig, Loaded},
    node::{
        Node, NodeSettings, limits,
        logging::{self, LogFile},
    },
};

/// Runs an edge node until SIGTERM or SIGINT.
///
/// # Errors
/// If the settings, an address or a part of the node is at fault.
pub fn run(args: &EdgeArgs) -> Result<(), Failure> {
    let Loaded { config, file, notes, warnings } = EdgeConfig::load(args.config.as_deref())?;
    let _log = logging::init(config.log_level, LogFile::of_edge(&config))?;
    logging::tell(&notes, &warnings);
    for finding in limits::prepare(&needs::of_edge(&config)) {
        tracing::warn!("{finding}");
    }
    block_on(|shutdown| async move {
        let edge = Node::bind(NodeSettings::from(&config))
            .map_err(|error| start_failure(file.as_deref(), &error))?;
        let addrs = edge.addrs();
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            rtp = ?addrs.rtp_in,
            http = %addrs.http,
            quic = addrs.downstream.map(|addrs| tracing::field::display(addrs.quic)),
            "edge started"
        );
        if config.cloud_host.is_empty() {
            tracing::info!("cloud_host is empty: waiting for a datagram of the cloud");
        }
        edge.run(shutdown).await?;
        tracing::info!("edge stopped");
        Ok(())
    })
}
