//! A repair server for streams that a bench publishes itself.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use downpour_distribution::{
    downstream::{
        outgoing::OutgoingStreams,
        repair_server::{RepairServer, RepairServerMetrics, RepairServerSettings},
    },
    tls::Identity,
};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

/// Runs repair servers on a separate thread until it is dropped.
pub struct Repair {
    runtime: Runtime,
    identity: Identity,
}

impl Repair {
    pub fn new() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let identity = Identity::generate().map_err(io::Error::other)?;
        Ok(Self { runtime, identity })
    }

    /// Starts a server for the streams of `origin` and returns its address. It runs until `shutdown`.
    pub fn serve(
        &self,
        origin: &OutgoingStreams,
        shutdown: CancellationToken,
    ) -> io::Result<SocketAddr> {
        let _inside = self.runtime.enter();
        let metrics = RepairServerMetrics::register(&prometheus::Registry::new())
            .map_err(io::Error::other)?;
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let settings = RepairServerSettings::default();
        let server = RepairServer::bind(any, &self.identity, origin.clone(), settings, metrics)
            .map_err(io::Error::other)?;
        let address = server.local_addr()?;
        self.runtime.spawn(server.run(shutdown));
        Ok(address)
    }
}
