//! `downpour edge`.

use super::{EdgeArgs, Failure, block_on, requirements, start_failure};
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
/// If the settings or an address cannot be used, or a part of the node fails.
pub fn run(args: &EdgeArgs) -> Result<(), Failure> {
    let Loaded { config, file, notes, warnings } = EdgeConfig::load(args.config.as_deref())?;
    let _log = logging::init(config.log_level, LogFile::of_edge(&config))?;
    logging::log_notes(&notes, &warnings);
    for advice in limits::prepare(&requirements::of_edge(&config)) {
        tracing::warn!("{advice}");
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
            tracing::info!("waiting for a datagram of the cloud: upstream.host is empty");
        }
        edge.run(shutdown).await?;
        tracing::info!("edge stopped");
        Ok(())
    })
}
