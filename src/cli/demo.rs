//! `downpour demo`: a cloud, edges and a lossy network in one process.

use std::{
    fs,
    io::{self, IsTerminal, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
    time::Duration,
};

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{
    DemoArgs, Failure, block_on,
    push::{self, Clip},
};
use crate::{
    config::{CloudConfig, DownstreamConfig, EdgeConfig, ListenAddr, LogLevel},
    node::{DownstreamAddrs, Node, NodeAddrs, NodeSettings, StartError, logging},
};
use downpour_distribution::upstream::stats::{ReceiveMetrics, StreamStats};
use downpour_hub::Hub;
use downpour_netem::{LinkSettings, RelaySettings, UdpRelay};

/// Runs a cloud, edges, a lossy network between them and a looping test stream until Ctrl-C.
///
/// # Errors
/// If the file is not FLV, an address cannot be bound, or a node fails.
pub fn run(args: &DemoArgs) -> Result<(), Failure> {
    let clip = match &args.file {
        Some(path) => Clip::open(path).map_err(|error| push::unusable(path, &error))?,
        None => Clip::read(TEST_STREAM)
            .map_err(|error| Failure::Run(format!("the built-in test stream: {error}")))?,
    };
    let _log = logging::init(LogLevel::Warn, None)?;
    block_on(|shutdown| async move { demo(args, clip, shutdown).await })
}

async fn demo(args: &DemoArgs, clip: Clip, shutdown: CancellationToken) -> Result<(), Failure> {
    let scratch = Scratch::new()?;
    let failed = |error: StartError| Failure::Run(error.to_string());
    let cloud = Node::bind(NodeSettings::from(&cloud_config(&scratch))).map_err(failed)?;
    let addrs = cloud.addrs().clone();
    let (Some(rtmp), Some(downstream)) = (addrs.rtmp, addrs.downstream) else {
        return Err(Failure::Run("the demo's cloud has no RTMP or no downstream".into()));
    };
    let mut edges = Vec::new();
    for i in 0..args.edges {
        edges.push(DemoEdge::start(i, args.loss, addrs.http, downstream)?);
    }

    println!("A cloud and {} on this machine. Watch:", count(edges.len(), "edge"));
    for edge in &edges {
        println!("    http://{}/   in a browser", edge.addrs.http);
        println!("    ffplay http://{}/{STREAM}.flv", edge.addrs.http);
    }
    println!("Publish another stream:");
    println!("    ffmpeg -re -i FILE -c copy -f flv rtmp://{rtmp}/live/NAME");
    println!("State and metrics:");
    println!("    http://{}/stat/livestat   http://{0}/metrics", addrs.http);
    println!("    http://{}/metrics", edges[0].addrs.http);
    println!("{} % of the packets between them are lost, both ways. Ctrl-C ends the demo.\n", {
        (args.loss * 1000.0).round() / 10.0
    });

    let _relays: Vec<UdpRelay> = edges.iter_mut().flat_map(|edge| edge.relays.drain(..)).collect();
    let hub = cloud.admission().hub().clone();
    let metrics: Vec<ReceiveMetrics> =
        edges.iter().filter_map(|edge| edge.edge.received()).collect();
    let nodes_stop = CancellationToken::new();
    let mut nodes = JoinSet::new();
    nodes.spawn(cloud.run(nodes_stop.clone()));
    for edge in edges {
        nodes.spawn(edge.edge.run(nodes_stop.clone()));
    }
    let url = format!("rtmp://{rtmp}/{STREAM}")
        .parse()
        .map_err(|error| Failure::Run(format!("the test stream's URL: {error}")))?;
    let stop = shutdown.clone();
    let publishing =
        tokio::spawn(async move { push::publish(&clip, &url, true, &stop, |_| ()).await });
    tokio::select! {
        () = report(&hub, &metrics) => {}
        () = shutdown.cancelled() => {}
        // A node that ends before the shutdown has failed.
        Some(ended) = nodes.join_next() => {
            ended.map_err(|error| Failure::Run(error.to_string()))??;
        }
    }
    // The encoder ends first: to it, a server that closes is an error.
    shutdown.cancel();
    let published = publishing.await;
    nodes_stop.cancel();
    while nodes.join_next().await.is_some() {}
    println!();
    match published {
        Ok(Err(error)) => Err(Failure::Run(format!("the test stream: {error}"))),
        _ => Ok(()),
    }
}

/// One edge and the lossy network in front of it.
struct DemoEdge {
    edge: Node,
    addrs: NodeAddrs,
    relays: Vec<UdpRelay>,
}

impl DemoEdge {
    fn start(
        number: usize,
        loss: f64,
        cloud_http: SocketAddr,
        cloud: DownstreamAddrs,
    ) -> Result<Self, Failure> {
        let relay = |upstream, seed| {
            let settings = RelaySettings::symmetric(LinkSettings::lossy(loss), seed);
            UdpRelay::start(upstream, settings)
                .map_err(|error| Failure::Run(format!("the lossy network: {error}")))
        };
        let mut relays = Vec::new();
        let mut quic = cloud.quic;
        let mut cloud_rtp_addr = None;
        if loss > 0.0 {
            let repair = relay(quic, 2 * number as u64)?;
            quic = repair.local_addr();
            relays.push(repair);
            if let Some(port) = cloud.rtp {
                let media = relay((Ipv4Addr::LOCALHOST, port).into(), 2 * number as u64 + 1)?;
                cloud_rtp_addr = Some(media.local_addr().into());
                relays.push(media);
            }
        }
        let config = EdgeConfig {
            udp_addr: loopback(0),
            flv_addr: usual_tcp(EdgeConfig::default().flv_addr.port() + number as u16),
            cloud_host: Ipv4Addr::LOCALHOST.to_string(),
            quic_addr: loopback(quic.port()),
            cloud_rtp_addr,
            api_addr: loopback(cloud_http.port()),
            fingerprint: Some(cloud.fingerprint),
            node_name: format!("demo-{number}"),
            // Within the default limit of every kernel, so that the demo starts without a warning.
            udp_recv_buffer: 1 << 17,
            ..EdgeConfig::default()
        };
        let edge = Node::bind(NodeSettings::from(&config))
            .map_err(|error| Failure::Run(error.to_string()))?;
        let addrs = edge.addrs().clone();
        Ok(Self { edge, addrs, relays })
    }
}

/// The directory for the demo's certificate, removed when it ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Failure> {
        let dir = std::env::temp_dir().join(format!("downpour-demo-{}", std::process::id()));
        fs::create_dir_all(&dir)
            .map_err(|error| Failure::Run(format!("{}: {error}", dir.display())))?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A failure leaves a few kilobytes in the directory for temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn cloud_config(scratch: &Scratch) -> CloudConfig {
    let usual = CloudConfig::default();
    CloudConfig {
        rtmp_addr: usual_tcp(usual.rtmp_addr.port()),
        api_addr: usual_tcp(usual.api_addr.port()),
        downstream: DownstreamConfig {
            quic_addr: usual_udp(usual.downstream.quic_addr.port()),
            rtp_port: usual_udp(usual.downstream.rtp_port).port(),
            targets: Vec::new(),
            cert_file: scratch.0.join("cloud.crt"),
            key_file: scratch.0.join("cloud.key"),
            ..usual.downstream
        },
        ..usual
    }
}

/// The address of `port` on loopback, or of a free port if that one is in use.
fn usual_tcp(port: u16) -> ListenAddr {
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok();
    loopback(if free { port } else { 0 })
}

fn usual_udp(port: u16) -> ListenAddr {
    let free = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok();
    loopback(if free { port } else { 0 })
}

fn loopback(port: u16) -> ListenAddr {
    ListenAddr::from(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

/// Prints the packets lost and repaired once per second. On a terminal it redraws one line.
async fn report(hub: &Hub, edges: &[ReceiveMetrics]) {
    let mut ticks = tokio::time::interval(Duration::from_secs(1));
    let terminal = io::stdout().is_terminal();
    loop {
        ticks.tick().await;
        let stats: Vec<StreamStats> = edges.iter().flat_map(ReceiveMetrics::streams).collect();
        let repaired = |s: &StreamStats| s.report.repaired.iter().sum::<u64>() + s.report.parity;
        let repaired = stats.iter().map(repaired).sum();
        let lost_for_good = stats.iter().map(|s| s.report.given_up).sum();
        let line = live_line(hub.len(), edges.len(), repaired, lost_for_good);
        let mut out = io::stdout().lock();
        // A closed pipe does not end the demo.
        let _ = match terminal {
            true => write!(out, "\r\x1b[K{line}").and_then(|()| out.flush()),
            false => writeln!(out, "{line}"),
        };
    }
}

/// The state of the demo in at most 80 columns. A packet that is lost on the way counts once it is
/// repaired or lost for good, so that the numbers add up.
fn live_line(streams: usize, edges: usize, repaired: u64, lost_for_good: u64) -> String {
    let lost = repaired + lost_for_good;
    let numbers =
        format!("lost on the way {lost} → repaired {repaired} → lost for good {lost_for_good}");
    let line = format!("{} × {}: {numbers}", count(streams, "stream"), count(edges, "edge"));
    // The terminal would wrap a longer line, and then it cannot be redrawn.
    if line.chars().count() <= COLUMNS { line } else { format!("{streams} × {edges}: {numbers}") }
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Columns of the narrowest terminal that is usual.
const COLUMNS: usize = 80;
const TEST_STREAM: &[u8] = include_bytes!("../../assets/test.flv");
const STREAM: &str = "live/demo";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_line_fits_a_terminal_and_adds_up() {
        assert_eq!(
            live_line(1, 2, 40, 2),
            "1 stream × 2 edges: lost on the way 42 → repaired 40 → lost for good 2"
        );
        for (streams, edges, repaired, lost) in
            [(1, 1, 0, 0), (1, 64, 123_456, 0), (12, 64, 98_765_432, 1_234_567)]
        {
            let line = live_line(streams, edges, repaired, lost);
            assert!(line.chars().count() <= COLUMNS, "{line}");
            assert!(line.contains(&(repaired + lost).to_string()), "{line}");
        }
    }
}
