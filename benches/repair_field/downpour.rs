//! Downpour: a cloud process and an edge process; RTMP in, HTTP-FLV out.
//!
//! RTP and QUIC use two routes of the same wire, so they share its links.

use std::{io, net::SocketAddr, path::Path, time::Duration};

use crate::{
    common::process::{Process, free_address, http_get, samples},
    media::{Sink, Source},
    run::{Rig, Setup, wait_for},
    wire::{Direction, Route, Wire},
};

/// Built by cargo together with this bench.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_downpour");

pub fn start(setup: &Setup) -> io::Result<Rig> {
    let [rtmp, quic, api, rtp_source, rtp, flv] = [(); 6].map(|()| free_address());
    let wire = Wire::start(
        &[
            Route { upstream: rtp, direction: Direction::Forward },
            Route { upstream: quic, direction: Direction::Back },
        ],
        &setup.profile.clean(),
        setup.seed,
    )?;
    let cloud = node(
        setup.dir,
        "cloud",
        api,
        &[
            format!("rtmp_addr: {rtmp}"),
            format!("quic_addr: {quic}"),
            format!("api_addr: {api}"),
            format!("rtp_port: {}", rtp_source.port()),
            format!("client_addr_list: [\"{}\"]", wire.address(0)),
        ],
    )?;
    let edge = node(
        setup.dir,
        "edge",
        flv,
        &[
            format!("udp_addr: {rtp}"),
            format!("flv_addr: {flv}"),
            "cloud_host: 127.0.0.1".into(),
            format!("quic_addr: {}", wire.address(1)),
            format!("api_addr: {api}"),
            format!("latency_ms: {}", setup.budget().as_millis()),
            "insecure: true".into(),
            // The cloud's list has the edge's address on the wire.
            "rtp_subscribe: false".into(),
        ],
    )?;
    wait_for("the edge is connected to the cloud", START, || {
        let metrics = http_get(flv, "/metrics")?;
        let connected = samples(&metrics)
            .filter(|(name, _)| name.starts_with("downpour_repair_client_connected"))
            .any(|(_, value)| value > 0.0);
        Ok(connected.then_some(()))
    })?;
    let url = format!("http://{flv}/{KEY}.flv").parse().map_err(io::Error::other)?;
    let sink = Sink::flv(setup.clock, url)?;
    let url = format!("rtmp://{rtmp}/{KEY}").parse().map_err(io::Error::other)?;
    let source = Source::rtmp(setup.clock, setup.profile.cadence, url)?;
    Ok(Rig { wire, source, sink, processes: vec![cloud, edge], edge: Some(flv) })
}

/// Counters of the edge.
#[derive(Debug, Clone, Default)]
pub struct EdgeCounts {
    /// Packets per `fate` label.
    pub fates: Vec<(String, f64)>,
    /// Cumulative histogram of the time until a packet was available at the edge, repair included,
    /// even if it still waited behind a gap: bound in milliseconds, and number of packets. Empty if
    /// the edge does not export it.
    pub available: Vec<(f64, f64)>,
}

impl EdgeCounts {
    pub fn read(edge: SocketAddr) -> io::Result<Self> {
        let text = http_get(edge, "/metrics")?;
        let mut counts = Self::default();
        for (name, value) in samples(&text) {
            if name.starts_with("downpour_edge_packets_total")
                && let Some(fate) = label(name, "fate")
            {
                counts.fates.push((fate.to_owned(), value));
            }
            let family = name.split('{').next().unwrap_or_default();
            if family.starts_with("downpour_edge_")
                && family.contains("_delay")
                && family.ends_with("_bucket")
                && let Some(bound) = label(name, "le").and_then(|le| le.parse::<f64>().ok())
            {
                let scale = if family.contains("_seconds") { 1000.0 } else { 1.0 };
                match counts.available.iter_mut().find(|(known, _)| *known == bound * scale) {
                    Some((_, count)) => *count += value,
                    None => counts.available.push((bound * scale, value)),
                }
            }
        }
        counts.available.sort_by(|a, b| a.0.total_cmp(&b.0));
        Ok(counts)
    }

    /// The difference from `earlier` to `self`.
    pub fn since(&self, earlier: &Self) -> Self {
        let fates = self.fates.iter().map(|(fate, now)| {
            let then = earlier.fates.iter().find(|(known, _)| known == fate);
            (fate.clone(), now - then.map_or(0.0, |(_, then)| *then))
        });
        let available = self.available.iter().map(|(bound, now)| {
            let then = earlier.available.iter().find(|(known, _)| known == bound);
            (*bound, now - then.map_or(0.0, |(_, then)| *then))
        });
        Self { fates: fates.collect(), available: available.collect() }
    }
}

fn node(dir: &Path, role: &str, http: SocketAddr, lines: &[String]) -> io::Result<Process> {
    let dir = dir.join(role);
    std::fs::create_dir_all(&dir)?;
    std::fs::write(dir.join("node.yaml"), lines.join("\n"))?;
    let mut process = Process::start(&dir, role, PROGRAM, &[role, "--config", "node.yaml"])?;
    wait_for(&format!("the {role} answers"), START, || {
        process.check()?;
        Ok(http_get(http, "/healthz").ok().map(drop))
    })?;
    Ok(process)
}

fn label<'a>(name: &'a str, label: &str) -> Option<&'a str> {
    let (_, rest) = name.split_once(&format!("{label}=\""))?;
    rest.split('"').next()
}

const KEY: &str = "live/bench";
const START: Duration = Duration::from_secs(15);
