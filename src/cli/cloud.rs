//! `downpour cloud`.

use super::{CloudArgs, Failure, block_on, needs, start_failure};
use crate::{
    cloud::Cloud,
    config::{CloudConfig, Loaded},
    node::{
        limits,
        logging::{self, LogFile},
    },
};

/// Runs a cloud node until SIGTERM or SIGINT.
///
/// # Errors
/// If the settings, an address or a part of the node is at fault.
pub fn run(args: &CloudArgs) -> Result<(), Failure> {
    let Loaded { config, file, notes, warnings } = CloudConfig::load(args.config.as_deref())?;
    let _log = logging::init(config.log_level, LogFile::of_cloud(&config))?;
    logging::tell(&notes, &warnings);
    for finding in limits::prepare(&needs::of_cloud(&config)) {
        tracing::warn!("{finding}");
    }
    block_on(|shutdown| async move {
        let cloud =
            Cloud::bind(&config).await.map_err(|error| start_failure(file.as_deref(), &error))?;
        let addrs = cloud.addrs();
        tracing::info!(
            "cloud {} is up: RTMP on {}, repair on {}, API on {}",
            env!("CARGO_PKG_VERSION"),
            addrs.rtmp,
            addrs.quic,
            addrs.api
        );
        tracing::info!("the certificate's fingerprint, for edges to pin: {}", addrs.fingerprint);
        if config.debug {
            tracing::warn!("debug is true: no RTP is sent");
        }
        cloud.run(shutdown).await?;
        tracing::info!("the cloud has ended in order");
        Ok(())
    })
}
