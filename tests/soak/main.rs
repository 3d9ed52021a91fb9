//! Streams, viewers and edges come and go, many of them rudely; when all have left, cloud and edge
//! hold what they held before.
//!
//! A short one by default. `scripts/soak` makes it ten minutes long and keeps the table.

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
fn nothing_is_left_of_those_who_came_and_went() {
    let seconds = std::env::var(SECONDS).map_or(SHORT, |text| text.parse().expect(SECONDS));
    let whole = Duration::from_secs(seconds);
    let warm_up = (whole / 3).min(Duration::from_secs(60));
    // Over a lossy path, so that repair is a part of it.
    let site =
        SiteSettings { dynamic: true, ..SiteSettings::over(LinkSettings::lossy(0.02), 4) }.start();
    site.edges[0].until_connected();

    let nodes = [&site.cloud.node, &site.edges[0].node];
    let began = settled(nodes);
    let counts = Arc::<Counts>::default();
    let start = Instant::now();
    let live = churn(&site, &counts, warm_up, 1, start);
    let warm = at_rest(&site, &began, None);
    tell(start, "all have left", &site, &counts);
    let live = live.max(churn(&site, &counts, whole - warm_up, 2, start));
    let end = at_rest(&site, &began, Some((&warm, warm_up)));
    tell(start, "all have left", &site, &counts);

    counts.assert_all_came();
    let table = table(whole, &counts, [began, live.0, warm, end]);
    println!("{table}");
    if let Some(document) = std::env::var_os(DOCUMENT) {
        bench::document::put(Path::new(&document), "soak", &table).expect("no document");
    }
}

/// What the nodes hold once two looks agree, memory apart: those that waited for the site to come up
/// have just closed connections, of which a node may still have its end.
#[track_caller]
fn settled(nodes: [&Node; 2]) -> [Usage; 2] {
    let mut last: Option<[Usage; 2]> = None;
    wait_for("the nodes to hold the same at two looks", SETTLE, || {
        if last.is_some() {
            sleep(BETWEEN_LOOKS);
        }
        let now = nodes.map(Node::usage);
        let before = last.replace(now)?;
        let same = now.iter().zip(&before).all(|(now, before)| {
            (now.descriptors, now.threads) == (before.descriptors, before.threads)
        });
        same.then_some(now)
    })
}

/// The most that cloud and edge held at any look.
#[derive(Clone, Copy)]
struct Most([Usage; 2]);

impl Most {
    fn max(self, other: Self) -> Self {
        let [a, b] = [0, 1].map(|node| Usage {
            resident: self.0[node].resident.max(other.0[node].resident),
            descriptors: self.0[node].descriptors.max(other.0[node].descriptors),
            threads: self.0[node].threads.max(other.0[node].threads),
        });
        Self([a, b])
    }
}

/// How many came.
#[derive(Default)]
struct Counts {
    streams: AtomicU64,
    streams_cut: AtomicU64,
    viewers: AtomicU64,
    viewers_silent: AtomicU64,
    viewer_bytes: AtomicU64,
    edges: AtomicU64,
    edges_killed: AtomicU64,
    rude: AtomicU64,
}

impl Counts {
    /// A soak in which nothing happened would find no leak.
    #[track_caller]
    fn assert_all_came(&self) {
        let kinds = [
            ("streams", &self.streams),
            ("streams cut", &self.streams_cut),
            ("viewers", &self.viewers),
            ("viewers that do not read", &self.viewers_silent),
            ("bytes to viewers", &self.viewer_bytes),
            ("edges", &self.edges),
            ("edges killed", &self.edges_killed),
            ("rude connections", &self.rude),
        ];
        for (kind, count) in kinds {
            assert!(count.load(Relaxed) > 0, "no {kind}");
        }
    }
}

/// Everything comes and goes for so long, and then leaves.
fn churn(site: &Site, counts: &Arc<Counts>, lasts: Duration, seed: u64, start: Instant) -> Most {
    let crowd = Crowd {
        rtmp: site.cloud.rtmp,
        quic: site.cloud.quic,
        cloud_rtp: site.cloud.rtp,
        api: site.cloud.node.http,
        edge_rtp: site.edges[0].rtp,
        edges: Arc::new(RwLock::new(vec![site.edges[0].node.http])),
        stop: Arc::default(),
        counts: counts.clone(),
    };
    let mut threads = Vec::new();
    for slot in 0..PUBLISHERS {
        threads.push(crowd.spawn(seed * 1000 + slot, move |crowd, rng| crowd.publish(slot, rng)));
    }
    for slot in 0..VIEWERS {
        threads.push(crowd.spawn(seed * 1000 + 100 + slot, Crowd::watch));
    }
    for slot in 0..RUDE {
        threads.push(crowd.spawn(seed * 1000 + 900 + slot, Crowd::be_rude));
    }

    let mut rng = SmallRng::seed_from_u64(seed);
    let mut most = Most([site.cloud.node.usage(), site.edges[0].node.usage()]);
    let mut edges: Vec<(Edge, Instant)> = Vec::new();
    let (until, mut told) = (Instant::now() + lasts, Instant::now());
    while Instant::now() < until {
        if edges.len() < EDGES {
            let edge = site.start_edge();
            crowd.edges.write().unwrap().push(edge.node.http);
            counts.edges.fetch_add(1, Relaxed);
            edges.push((edge, Instant::now() + pause(&mut rng, 2_000, 9_000)));
        }
        if let Some(index) = edges.iter().position(|(_, leaves)| Instant::now() > *leaves) {
            let (mut edge, _) = edges.swap_remove(index);
            crowd.edges.write().unwrap().retain(|addr| *addr != edge.node.http);
            if rng.random_bool(0.6) {
                edge.node.kill();
                counts.edges_killed.fetch_add(1, Relaxed);
            } else {
                edge.node.terminate();
            }
        }
        most = most.max(Most([site.cloud.node.usage(), site.edges[0].node.usage()]));
        if told.elapsed() >= TELL {
            told = Instant::now();
            tell(start, "coming and going", site, counts);
        }
        sleep(Duration::from_millis(250));
    }
    crowd.stop.store(true, Relaxed);
    for thread in threads {
        thread.join().expect("one of the crowd panicked");
    }
    for (mut edge, _) in edges {
        edge.node.assert_running();
        edge.node.kill();
        counts.edges_killed.fetch_add(1, Relaxed);
    }
    most
}

/// All who come and go, and where to.
#[derive(Clone)]
struct Crowd {
    rtmp: SocketAddr,
    quic: SocketAddr,
    cloud_rtp: SocketAddr,
    api: SocketAddr,
    edge_rtp: SocketAddr,
    /// Where viewers may come now; the first one stays.
    edges: Arc<RwLock<Vec<SocketAddr>>>,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
}

impl Crowd {
    /// Does something again and again until it is time to leave.
    fn spawn(
        &self,
        seed: u64,
        act: impl Fn(&Self, &mut SmallRng) -> io::Result<()> + Send + 'static,
    ) -> JoinHandle<()> {
        let crowd = self.clone();
        std::thread::spawn(move || {
            let mut rng = SmallRng::seed_from_u64(seed);
            while !crowd.left() {
                // Connections that fail are part of it: edges are killed, keys are taken.
                let _ = act(&crowd, &mut rng);
                crowd.wait(pause(&mut rng, 50, 1_000));
            }
        })
    }

    fn left(&self) -> bool {
        self.stop.load(Relaxed)
    }

    /// Waits, but not beyond the end.
    fn wait(&self, duration: Duration) {
        let until = Instant::now() + duration;
        while !self.left() && Instant::now() < until {
            sleep(Duration::from_millis(20));
        }
    }

    /// Publishes for some seconds, and ends the publication or just goes.
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
                if self.left() || start.elapsed() > lasts {
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

    /// Watches for some seconds, or only seems to.
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
        while !self.left() && Instant::now() < until {
            match socket.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => _ = self.counts.viewer_bytes.fetch_add(count as u64, Relaxed),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One of the things that nobody should do.
    fn be_rude(&self, rng: &mut SmallRng) -> io::Result<()> {
        self.counts.rude.fetch_add(1, Relaxed);
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
                let mut peer = Peer::shaken(self.rtmp)?;
                peer.send(&noise)?;
                self.wait(lasts);
            }
            3 => {
                // Publishes nothing, and is gone without a word.
                let mut peer = Peer::shaken(self.rtmp)?;
                peer.publish("live", &format!("rude{}", rng.random_range(0..4)), 128)?;
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
                    // The same with the head of RTP: version 2, payload type 100.
                    if let [b0, b1, ..] = &mut noise[..] {
                        (*b0, *b1) = (0x80, 100);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Waits until both nodes say that nobody is there and hold what they held; gives that.
#[track_caller]
fn at_rest(site: &Site, began: &[Usage; 2], warm: Option<(&[Usage; 2], Duration)>) -> [Usage; 2] {
    let (cloud, edge) = (&site.cloud.node, &site.edges[0].node);
    // Gone edges are told by the timeout of their connections, and those of a rude publisher by
    // silence.
    wait_for("nobody is there any more", LEAVE, || {
        let (cloud, edge) = (cloud.metrics(), edge.metrics());
        let here = |metrics: &http::Metrics, gauges: &[&str]| {
            gauges.iter().all(|gauge| {
                assert!(metrics.has(gauge), "there is no {gauge}");
                // The look at the metrics is itself a connection.
                let own = f64::from(u8::from(*gauge == "downpour_http_connections"));
                metrics.sum(gauge, &[]) <= own
            })
        };
        let alone = cloud.sum("downpour_repair_server_connections", &[]) == 1.0
            && cloud.sum("downpour_fanout_dynamic_targets", &[]) == 1.0
            // These series go with their streams.
            && cloud.sum("downpour_ring_packets", &[]) == 0.0
            && edge.sum("downpour_stream_log_tags", &[]) == 0.0;
        (alone && here(&cloud, &CLOUD_GAUGES) && here(&edge, &EDGE_GAUGES)).then_some(())
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
            "more is held than before: cloud and edge began with {began:?}, held {warm:?} when all \
             had left once, and hold {now:?}",
            warm = warm.map(|(warm, _)| warm)
        );
        last = now;
        sleep(BETWEEN_LOOKS);
    }
}

/// Bytes that a node may hold more at the end than after the warm-up: the allocator keeps what the
/// most who came at one time needed, and after a short warm-up that is still to come.
fn slack(warm: &Usage, warm_up: Duration) -> u64 {
    let short = if warm_up < Duration::from_secs(60) { 8 << 20 } else { 2 << 20 };
    warm.resident / 20 + short
}

fn tell(start: Instant, what: &str, site: &Site, counts: &Counts) {
    let [cloud, edge] = [&site.cloud.node, &site.edges[0].node].map(|node| {
        let Usage { resident, descriptors, threads } = node.usage();
        format!("{:.1} MiB, {descriptors} fds, {threads} threads", mib(resident))
    });
    println!(
        "{:4} s, {what}: cloud {cloud}; edge {edge}; so far {} streams, {} viewers, {} edges, \
         {} rude ones",
        start.elapsed().as_secs(),
        counts.streams.load(Relaxed),
        counts.viewers.load(Relaxed),
        counts.edges.load(Relaxed),
        counts.rude.load(Relaxed),
    );
    // Who reads along wants it now.
    let _ = io::stdout().flush();
}

fn table(whole: Duration, counts: &Counts, states: [[Usage; 2]; 4]) -> String {
    let count = |count: &AtomicU64| count.load(Relaxed);
    let mut text = format!(
        "On {}, at {}: {} s in which {} streams came and went ({} of them cut), {} viewers (of whom \
         {} did not read; {} MB to the others), {} edges ({} killed) and {} rude connections.\n\n\
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
        count(&counts.rude),
    );
    let names = ["at the start", "most", "after the warm-up, all gone", "at the end, all gone"];
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

/// Closes with a reset, whatever is on its way.
fn reset(socket: &TcpStream) -> io::Result<()> {
    socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO))
}

fn pause(rng: &mut SmallRng, least_ms: u64, most_ms: u64) -> Duration {
    Duration::from_millis(rng.random_range(least_ms..most_ms))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Environment: how long to run, in seconds, and the document that is to hold the table.
const SECONDS: &str = "DOWNPOUR_SOAK_SECONDS";
const DOCUMENT: &str = "DOWNPOUR_SOAK_DOCUMENT";
const SHORT: u64 = 15;
const PUBLISHERS: u64 = 6;
const VIEWERS: u64 = 24;
const RUDE: u64 = 4;
/// Besides the one that stays.
const EDGES: usize = 2;
const TELL: Duration = Duration::from_secs(10);
const TIMEOUT: Duration = Duration::from_secs(10);
/// A connection of an edge that was killed is given up after 10 s, a stream that fell silent after
/// as long, an encoder's that says nothing after 30 s.
const LEAVE: Duration = Duration::from_secs(60);
/// Longer than a connection takes to close.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// Threads for blocking work end 10 s after it.
const SETTLE: Duration = Duration::from_secs(40);
/// What is to be 0 when all have left, the lasting edge's own apart.
const CLOUD_GAUGES: [&str; 3] =
    ["downpour_streams", "downpour_rtmp_connections", "downpour_http_connections"];
const EDGE_GAUGES: [&str; 3] =
    ["downpour_streams", "downpour_http_viewers", "downpour_http_connections"];
