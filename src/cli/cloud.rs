//! `downpour cloud`.

use super::{CloudArgs, Failure, block_on, requirements, start_failure};
use crate::{
    config::{CloudConfig, Loaded},
    node::{
        DownstreamAddrs, Node, NodeSettings, limits,
        logging::{self, LogFile},
    },
};

/// Runs a cloud node until SIGTERM or SIGINT.
///
/// # Errors
/// If the settings or an address cannot be used, or a part of the node fails.
pub fn run(args: &CloudArgs) -> Result<(), Failure> {
    let Loaded { config, file, notes, warnings } = CloudConfig::load(args.config.as_deref())?;
    let _log = logging::init(config.log_level, LogFile::of_cloud(&config))?;
    logging::log_notes(&notes, &warnings);
    for advice in limits::prepare(&requirements::of_cloud(&config)) {
        tracing::warn!("{advice}");
    }
    block_on(|shutdown| async move {
        let cloud = Node::bind(NodeSettings::from(&config))
            .map_err(|error| start_failure(file.as_deref(), &error))?;
        let addrs = cloud.addrs();
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
        if config.downstream.debug {
            tracing::warn!("no RTP is sent: downstream.debug is true");
        }
        cloud.run(shutdown).await?;
        tracing::info!("cloud stopped");
        Ok(())
    })
}
