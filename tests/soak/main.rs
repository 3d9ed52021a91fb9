//! Soak test: streams, viewers and edges connect and disconnect, many of them without a proper end.
//! Afterwards, cloud and edge must use as much memory, descriptors and threads as before.
//!
//! It is short by default. `scripts/soak` runs it for ten minutes and keeps the table.

#[path = "../../benches/common/mod.rs"]
mod bench;
#[path = "../common/mod.rs"]
mod common;

use std::{
    fmt::Write as _,
    io::{self, Read, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
    path::Path,
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use common::{
    http, media,
    node::{Edge, Node, Site, SiteSettings, Usage},
    rtmp::Peer,
    wait_for,
};
use downpour::{cli::push::Clip, rtmp::client::Publisher};
use downpour_netem::LinkSettings;
use rand::{Rng, SeedableRng, rngs::SmallRng};

#[test]
fn nodes_release_all_resources_of_closed_connections() {
    let seconds = std::env::var(SECONDS).map_or(SHORT, |text| text.parse().expect(SECONDS));
    let whole = Duration::from_secs(seconds);
    let warm_up = (whole / 3).min(Duration::from_secs(60));
    // The path is lossy, so that repair takes part.
    let site =
        SiteSettings { dynamic: true, ..SiteSettings::over(LinkSettings::lossy(0.02), 4) }.start();
    site.edges[0].until_connected();

    let nodes = [&site.cloud.node, &site.edges[0].node];
    let began = settled_usage(nodes);
    let counts = Arc::<Counts>::default();
    let start = Instant::now();
    let peak = churn(&site, &counts, warm_up, 1, start);
    let warm = wait_until_idle(&site, &began, None);
    print_progress(start, "idle", &site, &counts);
    let peak = peak.max(churn(&site, &counts, whole - warm_up, 2, start));
    let end = wait_until_idle(&site, &began, Some((&warm, warm_up)));
    print_progress(start, "idle", &site, &counts);

    counts.assert_all_kinds();
    let table = table(whole, &counts, [began, peak.0, warm, end]);
    println!("{table}");
    if let Some(document) = std::env::var_os(DOCUMENT) {
        bench::document::replace_section(Path::new(&document), "soak", &table)
            .expect("the document is written");
    }
}

/// Returns the usage of the nodes once descriptors and threads are the same in two samples: nodes may
/// still have open connections of the start-up.
#[track_caller]
fn settled_usage(nodes: [&Node; 2]) -> [Usage; 2] {
    let mut last: Option<[Usage; 2]> = None;
    wait_for("the same usage of the nodes in two samples", SETTLE, || {
        if last.is_some() {
            sleep(SAMPLE_INTERVAL);
        }
        let now = nodes.map(Node::usage);
        let before = last.replace(now)?;
        let same = now.iter().zip(&before).all(|(now, before)| {
            (now.descriptors, now.threads) == (before.descriptors, before.threads)
        });
        same.then_some(now)
    })
}

/// Maximum usage of the cloud and the edge over all samples.
#[derive(Clone, Copy)]
struct Peak([Usage; 2]);

impl Peak {
    fn max(self, other: Self) -> Self {
        let [a, b] = [0, 1].map(|node| Usage {
            resident: self.0[node].resident.max(other.0[node].resident),
            descriptors: self.0[node].descriptors.max(other.0[node].descriptors),
            threads: self.0[node].threads.max(other.0[node].threads),
        });
        Self([a, b])
    }
}

/// Numbers of connections of each kind.
#[derive(Default)]
struct Counts {
    streams: AtomicU64,
    streams_cut: AtomicU64,
    viewers: AtomicU64,
    viewers_silent: AtomicU64,
    viewer_bytes: AtomicU64,
    edges: AtomicU64,
    edges_killed: AtomicU64,
    hostile: AtomicU64,
}

impl Counts {
    /// Asserts that each kind of connection occurred: otherwise the test would find no leak.
    #[track_caller]
    fn assert_all_kinds(&self) {
        let kinds = [
            ("streams", &self.streams),
            ("streams cut", &self.streams_cut),
            ("viewers", &self.viewers),
            ("viewers that do not read", &self.viewers_silent),
            ("bytes to viewers", &self.viewer_bytes),
            ("edges", &self.edges),
            ("edges killed", &self.edges_killed),
            ("hostile connections", &self.hostile),
        ];
        for (kind, count) in kinds {
            assert!(count.load(Relaxed) > 0, "no {kind}");
        }
    }
}

/// Connects and disconnects clients and edges for `length`, then waits until all clients have ended.
/// Returns the peak usage.
fn churn(site: &Site, counts: &Arc<Counts>, length: Duration, seed: u64, start: Instant) -> Peak {
    let clients = Clients::new(site, counts);
    let threads = clients.start_all(seed);
    let mut edges = EdgeChurn { site, clients: &clients, running: Vec::new() };
    let mut rng = SmallRng::seed_from_u64(seed);
    let usage = || Peak([site.cloud.node.usage(), site.edges[0].node.usage()]);
    let mut peak = usage();
    let (until, mut printed) = (Instant::now() + length, Instant::now());
    while Instant::now() < until {
        edges.step(&mut rng);
        peak = peak.max(usage());
        if printed.elapsed() >= PRINT_INTERVAL {
            printed = Instant::now();
            print_progress(start, "busy", site, counts);
        }
        sleep(Duration::from_millis(250));
    }
    clients.stop.store(true, Relaxed);
    for thread in threads {
        thread.join().expect("a client panicked");
    }
    edges.kill_all();
    peak
}

/// Edges that start and end.
struct EdgeChurn<'a> {
    site: &'a Site,
    clients: &'a Clients,
    /// Running edges and the time when each one ends.
    running: Vec<(Edge, Instant)>,
}

impl EdgeChurn<'_> {
    /// Starts an edge if there are fewer than [`EDGES`], and kills or terminates one that is due.
    fn step(&mut self, rng: &mut SmallRng) {
        let counts = &self.clients.counts;
        if self.running.len() < EDGES {
            let edge = self.site.start_edge();
            self.clients.edges.write().unwrap().push(edge.node.http);
            counts.edges.fetch_add(1, Relaxed);
            self.running.push((edge, Instant::now() + pause(rng, 2_000, 9_000)));
        }
        if let Some(index) = self.running.iter().position(|(_, end)| Instant::now() > *end) {
            let (mut edge, _) = self.running.swap_remove(index);
            self.clients.edges.write().unwrap().retain(|addr| *addr != edge.node.http);
            if rng.random_bool(0.6) {
                edge.node.kill();
                counts.edges_killed.fetch_add(1, Relaxed);
            } else {
                edge.node.terminate();
            }
        }
    }

    fn kill_all(self) {
        for (mut edge, _) in self.running {
            edge.node.assert_running();
            edge.node.kill();
            self.clients.counts.edges_killed.fetch_add(1, Relaxed);
        }
    }
}

/// The clients and the addresses that they connect to.
#[derive(Clone)]
struct Clients {
    rtmp: SocketAddr,
    quic: SocketAddr,
    cloud_rtp: SocketAddr,
    api: SocketAddr,
    edge_rtp: SocketAddr,
    /// HTTP addresses of the running edges. The first one runs during the whole test.
    edges: Arc<RwLock<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
}

impl Clients {
    fn new(site: &Site, counts: &Arc<Counts>) -> Self {
        Self {
            rtmp: site.cloud.rtmp,
            quic: site.cloud.quic,
            cloud_rtp: site.cloud.rtp,
            api: site.cloud.node.http,
            edge_rtp: site.edges[0].rtp,
            edges: Arc::new(RwLock::new(vec![site.edges[0].node.http])),
            stop: Arc::default(),
            counts: counts.clone(),
        }
    }

    /// Starts the threads of all publishers, viewers and hostile clients.
    fn start_all(&self, seed: u64) -> Vec<JoinHandle<()>> {
        let seed = seed * 1000;
        let mut threads = Vec::new();
        for slot in 0..PUBLISHERS {
            let publish = move |clients: &Self, rng: &mut SmallRng| clients.publish(slot, rng);
            threads.push(self.spawn(seed + slot, publish));
        }
        for slot in 0..VIEWERS {
            threads.push(self.spawn(seed + 100 + slot, Self::watch));
        }
        for slot in 0..HOSTILE {
            threads.push(self.spawn(seed + 900 + slot, Self::attack));
        }
        threads
    }

    /// Starts a thread that repeats `act` until the clients stop.
    fn spawn(
        &self,
        seed: u64,
        act: impl Fn(&Self, &mut SmallRng) -> io::Result<()> + Send + 'static,
    ) -> JoinHandle<()> {
        let clients = self.clone();
        std::thread::spawn(move || {
            let mut rng = SmallRng::seed_from_u64(seed);
            while !clients.stopped() {
                // Failures are expected: edges are killed, and stream keys may be in use.
                let _ = act(&clients, &mut rng);
                clients.wait(pause(&mut rng, 50, 1_000));
            }
        })
    }

    fn stopped(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Waits for `duration`, or until the clients stop.
    fn wait(&self, duration: Duration) {
        let until = Instant::now() + duration;
        while !self.stopped() && Instant::now() < until {
            sleep(Duration::from_millis(20));
        }
    }

    /// Publishes for some seconds, then ends the publication or only closes the connection.
    fn publish(&self, slot: u64, rng: &mut SmallRng) -> io::Result<()> {
        let clip = Clip::open(&media::short().path)?;
        let url = format!("rtmp://{}/live/s{slot}", self.rtmp);
        let url = url.parse().map_err(|error| io::Error::other(format!("{error}")))?;
        let lasts = pause(rng, 1_000, 8_000);
        let cut = rng.random_bool(0.5);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut publisher =
                Publisher::connect(&url, TIMEOUT).await.map_err(io::Error::other)?;
            self.counts.streams.fetch_add(1, Relaxed);
            let start = Instant::now();
            for (due, tag) in clip.play(true) {
                tokio::time::sleep_until((start + due).into()).await;
                if self.stopped() || start.elapsed() > lasts {
                    break;
                }
                publisher.send(&tag).await.map_err(io::Error::other)?;
            }
            if cut {
                self.counts.streams_cut.fetch_add(1, Relaxed);
                return Ok(());
            }
            publisher.close().await.map_err(io::Error::other)
        })
    }

    /// Plays a stream for some seconds, or stays connected without reading.
    fn watch(&self, rng: &mut SmallRng) -> io::Result<()> {
        let edge = {
            let edges = self.edges.read().unwrap();
            edges[rng.random_range(0..edges.len())]
        };
        let slot = rng.random_range(0..PUBLISHERS);
        let mut socket = http::request(edge, &format!("/live/s{slot}.flv"))?;
        if http::read_head(&mut socket)?.status != 200 {
            return Ok(());
        }
        self.counts.viewers.fetch_add(1, Relaxed);
        let lasts = pause(rng, 500, 6_000);
        if rng.random_bool(0.25) {
            self.counts.viewers_silent.fetch_add(1, Relaxed);
            self.wait(lasts);
            return Ok(());
        }
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let until = Instant::now() + lasts;
        let mut buffer = vec![0; 64 * 1024];
        while !self.stopped() && Instant::now() < until {
            match socket.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => _ = self.counts.viewer_bytes.fetch_add(count as u64, Relaxed),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Violates a protocol in a random way.
    fn attack(&self, rng: &mut SmallRng) -> io::Result<()> {
        self.counts.hostile.fetch_add(1, Relaxed);
        let lasts = pause(rng, 100, 3_000);
        let edge = self.edges.read().unwrap()[0];
        let mut noise = vec![0; rng.random_range(1..1400)];
        rng.fill(&mut noise[..]);
        match rng.random_range(0..9) {
            0 => drop(Peer::connect(self.rtmp)?),
            1 => {
                // Half a handshake.
                let mut peer = Peer::connect(self.rtmp)?;
                peer.send(&common::rtmp::client_hello()[..700])?;
                self.wait(lasts);
            }
            2 => {
                let mut peer = Peer::handshaken(self.rtmp)?;
                peer.send(&noise)?;
                self.wait(lasts);
            }
            3 => {
                // Starts a publication without media, then resets the connection.
                let mut peer = Peer::handshaken(self.rtmp)?;
                peer.publish("live", &format!("hostile{}", rng.random_range(0..4)), 128)?;
                self.wait(lasts);
                reset(peer.socket())?;
            }
            4 => {
                let mut socket = TcpStream::connect(edge)?;
                socket.write_all(b"GET /live/s1.flv HTT")?;
                self.wait(lasts);
            }
            5 => {
                let mut socket = TcpStream::connect(if rng.random() { edge } else { self.api })?;
                socket.write_all(&noise)?;
                self.wait(lasts);
                reset(&socket)?;
            }
            6 => _ = http::get(edge, "/live/none.flv")?,
            7 => {
                let paths = ["/metrics", "/stat/livestat", "/api/v1/edges", "/nothing"];
                http::get(self.api, paths[rng.random_range(0..paths.len())])?;
            }
            _ => {
                let socket = UdpSocket::bind("127.0.0.1:0")?;
                for to in [self.quic, self.cloud_rtp, self.edge_rtp] {
                    socket.send_to(&noise, to)?;
                    // The next one starts like RTP: version 2, payload type 100.
                    if let [b0, b1, ..] = &mut noise[..] {
                        (*b0, *b1) = (0x80, 100);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Waits until the gauges of both nodes are back at their initial values, and their usage is that of the
/// start and of the warm-up. Returns the usage.
#[track_caller]
fn wait_until_idle(
    site: &Site,
    began: &[Usage; 2],
    warm: Option<(&[Usage; 2], Duration)>,
) -> [Usage; 2] {
    let (cloud, edge) = (&site.cloud.node, &site.edges[0].node);
    // Connections of killed edges and of silent publishers end by a timeout.
    wait_for("no connections, viewers, streams and edges", LEAVE, || {
        let (cloud, edge) = (cloud.metrics(), edge.metrics());
        let is_zero = |metrics: &http::Metrics, gauges: &[&str]| {
            gauges.iter().all(|gauge| {
                assert!(metrics.has(gauge), "no metric {gauge}");
                // The request for the metrics is a connection, too.
                let own = f64::from(u8::from(*gauge == "downpour_http_connections"));
                metrics.sum(gauge, &[]) <= own
            })
        };
        let no_edges = cloud.sum("downpour_repair_server_connections", &[]) == 1.0
            && cloud.sum("downpour_fanout_dynamic_targets", &[]) == 1.0
            // These series end with their streams.
            && cloud.sum("downpour_ring_packets", &[]) == 0.0
            && edge.sum("downpour_stream_log_tags", &[]) == 0.0;
        (no_edges && is_zero(&cloud, &CLOUD_GAUGES) && is_zero(&edge, &EDGE_GAUGES)).then_some(())
    });
    let mut last = [cloud.usage(), edge.usage()];
    let until = Instant::now() + SETTLE;
    loop {
        let now = [cloud.usage(), edge.usage()];
        let back = now.iter().zip(began).all(|(now, began)| {
            now.descriptors == began.descriptors && now.threads <= began.threads
        });
        let small = warm.is_none_or(|(warm, lasted)| {
            let pairs = now.iter().zip(warm);
            pairs.into_iter().all(|(now, warm)| now.resident <= warm.resident + slack(warm, lasted))
        });
        if back && small && now == last {
            return now;
        }
        assert!(
            Instant::now() < until,
            "leak: cloud and edge used {began:?} at the start, {warm:?} after the warm-up, and {now:?} \
             now",
            warm = warm.map(|(warm, _)| warm)
        );
        last = now;
        sleep(SAMPLE_INTERVAL);
    }
}

/// Bytes by which the memory of a node may grow after the warm-up. The allocator keeps the memory of the
/// peak load, which a short warm-up may not reach.
fn slack(warm: &Usage, warm_up: Duration) -> u64 {
    let short = if warm_up < Duration::from_secs(60) { 8 << 20 } else { 2 << 20 };
    warm.resident / 20 + short
}

fn print_progress(start: Instant, phase: &str, site: &Site, counts: &Counts) {
    let [cloud, edge] = [&site.cloud.node, &site.edges[0].node].map(|node| {
        let Usage { resident, descriptors, threads } = node.usage();
        format!("{:.1} MiB, {descriptors} fds, {threads} threads", mib(resident))
    });
    println!(
        "{:4} s, {phase}: cloud {cloud}; edge {edge}; so far {} streams, {} viewers, {} edges, \
         {} hostile connections",
        start.elapsed().as_secs(),
        counts.streams.load(Relaxed),
        counts.viewers.load(Relaxed),
        counts.edges.load(Relaxed),
        counts.hostile.load(Relaxed),
    );
    let _ = io::stdout().flush();
}

fn table(whole: Duration, counts: &Counts, states: [[Usage; 2]; 4]) -> String {
    let count = |count: &AtomicU64| count.load(Relaxed);
    let mut text = format!(
        "On {}, at {}: {} s with {} streams ({} of them without a proper end), {} viewers ({} did not \
         read; {} MB to the others), {} edges ({} killed) and {} hostile connections.\n\n\
         | | memory: cloud | edge | descriptors: cloud | edge | threads: cloud | edge |\n\
         |---|---|---|---|---|---|---|\n",
        bench::machine::machine(),
        bench::machine::commit(),
        whole.as_secs(),
        count(&counts.streams),
        count(&counts.streams_cut),
        count(&counts.viewers),
        count(&counts.viewers_silent),
        count(&counts.viewer_bytes) / 1_000_000,
        count(&counts.edges),
        count(&counts.edges_killed),
        count(&counts.hostile),
    );
    let names = ["start", "peak", "idle after the warm-up", "idle at the end"];
    for (name, [cloud, edge]) in names.iter().zip(states) {
        let _ = writeln!(
            text,
            "| {name} | {:.1} MiB | {:.1} MiB | {} | {} | {} | {} |",
            mib(cloud.resident),
            mib(edge.resident),
            cloud.descriptors,
            edge.descriptors,
            cloud.threads,
            edge.threads
        );
    }
    text
}

/// Makes the close of `socket` a reset.
fn reset(socket: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

fn pause(rng: &mut SmallRng, least_ms: u64, most_ms: u64) -> Duration {
    Duration::from_millis(rng.random_range(least_ms..most_ms))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Environment variables: the length in seconds, and the document for the table.
const SECONDS: &str = "DOWNPOUR_SOAK_SECONDS";
const DOCUMENT: &str = "DOWNPOUR_SOAK_DOCUMENT";
const SHORT: u64 = 15;
const PUBLISHERS: u64 = 6;
const VIEWERS: u64 = 24;
const HOSTILE: u64 = 4;
/// In addition to the permanent one.
const EDGES: usize = 2;
const PRINT_INTERVAL: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than the timeouts: 10 s for killed edges and silent streams, 30 s for silent encoders.
const LEAVE: Duration = Duration::from_secs(60);
/// Longer than a connection takes to close.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// Threads for blocking work end after 10 s without work.
const SETTLE: Duration = Duration::from_secs(40);
/// Gauges that are 0 without clients.
const CLOUD_GAUGES: [&str; 3] =
    ["downpour_streams", "downpour_rtmp_connections", "downpour_http_connections"];
const EDGE_GAUGES: [&str; 3] =
    ["downpour_streams", "downpour_http_viewers", "downpour_http_connections"];
