//! Clouds and edges as processes.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use downpour_netem::{LinkSettings, RelaySettings};
use serde_json::Value;
use tempfile::TempDir;

use super::{
    SOON,
    compare::{Timestamps, assert_same_to_the_end},
    http,
    http::Metrics,
    media::{Encoder, Media},
    network::Network,
    ports, process,
    viewer::Viewer,
    wait_for,
};

/// A cloud, its edges and the network between them.
pub struct Site {
    pub cloud: Cloud,
    pub edges: Vec<Edge>,
    pub network: Network,
    /// Configured targets of the cloud.
    pub destinations: Vec<SocketAddr>,
    dir: TempDir,
}

impl Site {
    /// One edge on a perfect network.
    pub fn start() -> Self {
        SiteSettings::default().start()
    }

    /// Pushes with `downpour push`.
    pub fn push(&self, media: &Media, key: &str) -> Encoder {
        self.push_with(media, key, &[])
    }

    pub fn push_with(&self, media: &Media, key: &str, options: &[&str]) -> Encoder {
        Encoder::downpour(media, &self.cloud.url(key), options, self.file("push", "log"))
    }

    /// Pushes with ffmpeg.
    pub fn push_ffmpeg(&self, media: &Media, key: &str) -> Encoder {
        Encoder::ffmpeg(media, &self.cloud.url(key), self.file("ffmpeg", "log"))
    }

    /// Waits until the cloud sends to this many addresses of dynamic edges.
    #[track_caller]
    pub fn until_targets(&self, count: usize) {
        wait_for("the cloud sends to the edges", SOON, || {
            (self.dynamic_targets() == count as f64).then_some(())
        });
    }

    /// Number of addresses of dynamic edges to which the cloud sends.
    #[track_caller]
    pub fn dynamic_targets(&self) -> f64 {
        let metrics = self.cloud.node.metrics();
        assert!(metrics.has("downpour_fanout_dynamic_targets"), "{}", metrics.text());
        metrics.sum("downpour_fanout_dynamic_targets", &[])
    }

    /// The first edge's packets with this `fate` label.
    #[track_caller]
    pub fn packets(&self, fate: &str) -> f64 {
        self.edges[0].packets(fate)
    }

    /// Pushes `sent`, and asserts that a viewer of the first edge gets it up to its end.
    #[track_caller]
    pub fn assert_plays(&self, sent: &Media, key: &str) {
        let viewer = self.watch(key);
        let push = self.push(sent, key);
        let pulled = viewer.until_end(PLAY);
        push.until_done(PLAY);
        assert_same_to_the_end(&sent.tags, &pulled, Timestamps::Exact);
    }

    /// Returns a function that is `true` once `count` has not changed while the cloud packetized more
    /// than `packets` packets.
    pub fn has_stopped(&self, packets: f64, count: impl Fn() -> f64) -> impl FnMut() -> bool {
        let packetized = || self.cloud.node.metrics().sum("downpour_rtp_packets_total", &[]);
        let mut before = (count(), packetized());
        move || {
            let now = (count(), packetized());
            let stopped = now.0 == before.0 && now.1 > before.1 + packets;
            if now.0 != before.0 {
                before = now;
            }
            stopped
        }
    }

    /// Plays a stream at the first edge.
    pub fn watch(&self, key: &str) -> Viewer {
        self.edges[0].watch(key)
    }

    /// Starts another edge, which is dynamic and connects to the cloud directly.
    #[track_caller]
    pub fn start_edge(&self) -> Edge {
        let dir = self.file("more", "edge");
        let name = dir.file_name().expect("a file name").to_string_lossy().into_owned();
        let lines = ["rtp_subscribe: true".to_owned()];
        let rtp = loopback(ports::free_for_rtp());
        let api = self.cloud.node.http;
        Edge::start(self.dir.path(), &name, rtp, self.cloud.quic, api, &lines)
    }

    /// A path in the site's directory at which there is no file yet.
    pub fn file(&self, name: &str, extension: &str) -> PathBuf {
        (0..)
            .map(|number| self.dir.path().join(format!("{name}-{number}.{extension}")))
            .find(|path| !path.exists())
            .expect("a free number")
    }
}

/// Settings of a [`Site`].
pub struct SiteSettings {
    pub edges: usize,
    /// The path of RTP to each edge; `None` sends directly.
    pub rtp: Option<LinkSettings>,
    /// The path of RTP to a second address of each edge, which is sent the same packets.
    pub second: Option<LinkSettings>,
    /// The path of QUIC between each edge and the cloud in both directions; `None` connects directly.
    pub quic: Option<LinkSettings>,
    /// Determines the losses of the paths.
    pub seed: u64,
    /// Relays parity beside the RTP to each edge's first address.
    pub parity: bool,
    /// Sends to a multicast group that all edges join, not to each edge.
    pub multicast: bool,
    /// The cloud has no targets in its configuration, and edges subscribe to RTP. A path of RTP is a NAT.
    pub dynamic: bool,
    /// Lines for the cloud's configuration.
    pub cloud: Vec<String>,
    /// Lines for each edge's configuration.
    pub edge: Vec<String>,
}

impl SiteSettings {
    /// The same path for RTP and, in both directions, for QUIC.
    pub fn over(path: LinkSettings, seed: u64) -> Self {
        Self { rtp: Some(path.clone()), quic: Some(path), seed, ..Self::default() }
    }

    pub fn with_cloud(mut self, line: &str) -> Self {
        self.cloud.push(line.into());
        self
    }

    pub fn with_edge(mut self, line: &str) -> Self {
        self.edge.push(line.into());
        self
    }

    /// Starts all processes and waits until they respond.
    #[track_caller]
    pub fn start(self) -> Site {
        let dir = tempfile::tempdir().expect("no directory for the test");
        let mut network = Network::new();
        let path = |settings: &LinkSettings, edge: usize| RelaySettings {
            // Far apart, because a relay derives its clients' seeds from its own.
            ..RelaySettings::symmetric(settings.clone(), self.seed + 100 * edge as u64)
        };
        let group = SocketAddr::from((group(), ports::free_for_rtp()));
        let [rtp, second]: [Vec<_>; 2] =
            [(); 2].map(|()| (0..self.edges).map(|_| loopback(ports::free_for_rtp())).collect());
        let destinations = if self.dynamic {
            Vec::new()
        } else if self.multicast {
            vec![group]
        } else {
            let mut destinations = Vec::new();
            for (edge, (rtp, second)) in rtp.iter().zip(&second).enumerate() {
                destinations.push(match &self.rtp {
                    Some(settings) if self.parity => {
                        network.add_rtp_and_parity(*rtp, path(settings, edge))
                    }
                    Some(settings) => network.add_rtp(*rtp, path(settings, edge)),
                    None => *rtp,
                });
                if let Some(settings) = &self.second {
                    destinations.push(network.add_rtp(*second, path(settings, edge + 25)));
                }
            }
            destinations
        };
        let cloud = Cloud::start(dir.path(), &destinations, &self.cloud);
        let edges = (0..self.edges).map(|edge| {
            let quic = match &self.quic {
                Some(settings) => network.add_quic(cloud.quic, path(settings, edge + 50)),
                None => cloud.quic,
            };
            let udp = if self.multicast { group } else { rtp[edge] };
            // A listed edge behind a relay must not subscribe: it would count as a second target.
            let mut lines = vec![format!("rtp_subscribe: {}", self.dynamic)];
            if let (true, Some(settings)) = (self.dynamic, &self.rtp) {
                let nat = network.add_rtp(cloud.rtp, path(settings, edge));
                lines.push(format!("cloud_rtp_addr: {nat}"));
            }
            if let Some(settings) = &self.second {
                lines.push(format!("udp_addr_2: {}", second[edge]));
                if self.dynamic {
                    let nat = network.add_rtp(cloud.rtp, path(settings, edge + 25));
                    lines.push(format!("cloud_rtp_addr_2: {nat}"));
                }
            }
            overlay(&mut lines, &self.edge);
            let api = cloud.node.http;
            Edge::start(dir.path(), &format!("edge{edge}"), udp, quic, api, &lines)
        });
        let edges = edges.collect();
        Site { cloud, edges, network, destinations, dir }
    }
}

impl Default for SiteSettings {
    fn default() -> Self {
        Self {
            edges: 1,
            rtp: None,
            second: None,
            quic: None,
            seed: 1,
            parity: false,
            multicast: false,
            dynamic: false,
            cloud: Vec::new(),
            edge: Vec::new(),
        }
    }
}

/// A cloud node.
pub struct Cloud {
    pub node: Node,
    pub rtmp: SocketAddr,
    pub quic: SocketAddr,
    /// Source address of its RTP.
    pub rtp: SocketAddr,
}

impl Cloud {
    #[track_caller]
    pub(super) fn start(dir: &Path, destinations: &[SocketAddr], lines: &[String]) -> Self {
        let [rtmp, quic, api, rtp] = [(); 4].map(|()| loopback(ports::free()));
        let destinations: Vec<_> = destinations.iter().map(ToString::to_string).collect();
        let mut config = vec![
            format!("rtmp_addr: {rtmp}"),
            format!("quic_addr: {quic}"),
            format!("api_addr: {api}"),
            format!("rtp_port: {}", rtp.port()),
            format!("client_addr_list: [{}]", quoted(&destinations)),
            "multicast_interface: 127.0.0.1".into(),
            "multicast_ttl: 0".into(),
        ];
        overlay(&mut config, lines);
        Self { node: Node::start("cloud", dir.join("cloud"), &config, api), rtmp, quic, rtp }
    }

    pub fn url(&self, key: &str) -> String {
        format!("rtmp://{}/{key}", self.rtmp)
    }

    /// Key and SSRC of each publication in `/stat/livestat`.
    pub fn publications(&self) -> Vec<(String, u64)> {
        self.node.publications()
    }

    /// The recorded files, oldest first.
    pub fn recordings(&self) -> Vec<PathBuf> {
        self.node.recordings()
    }
}

/// An edge node.
pub struct Edge {
    pub node: Node,
    /// Receives RTP at this address.
    pub rtp: SocketAddr,
}

impl Edge {
    /// Starts an edge of a cloud or a parent with the QUIC address `quic` and the HTTP address `api`.
    #[track_caller]
    pub(super) fn start(
        dir: &Path,
        name: &str,
        udp: SocketAddr,
        quic: SocketAddr,
        api: SocketAddr,
        lines: &[String],
    ) -> Self {
        let flv = loopback(ports::free());
        let mut config = vec![
            format!("udp_addr: {udp}"),
            format!("flv_addr: {flv}"),
            "cloud_host: 127.0.0.1".into(),
            format!("quic_addr: {quic}"),
            format!("api_addr: {api}"),
            format!("node_name: {name}"),
        ];
        if udp.ip().is_multicast() {
            config.push("multicast_interface: 127.0.0.1".into());
        }
        overlay(&mut config, lines);
        Self { node: Node::start("edge", dir.join(name), &config, flv), rtp: udp }
    }

    pub fn watch(&self, key: &str) -> Viewer {
        Viewer::watch(self.node.http, key)
    }

    /// The edge's packets with this `fate` label.
    #[track_caller]
    pub fn packets(&self, fate: &str) -> f64 {
        let metrics = self.node.metrics();
        assert!(metrics.has("downpour_edge_packets_total"), "{}", metrics.text());
        metrics.sum("downpour_edge_packets_total", &[("fate", fate)])
    }

    /// Waits until the edge is connected to the cloud: before that, it cannot request repairs.
    #[track_caller]
    pub fn until_connected(&self) {
        wait_for("the edge is connected to the cloud", SOON, || {
            (self.node.metrics().sum("downpour_repair_client_connected", &[]) > 0.0).then_some(())
        });
    }
}

/// Adds `lines` to a configuration, replacing lines with the same key.
fn overlay(config: &mut Vec<String>, lines: &[String]) {
    let key = |line: &str| line.split(':').next().map(str::to_owned);
    config.retain(|line| !lines.iter().any(|own| key(own) == key(line)));
    config.extend_from_slice(lines);
}

/// A process with its configuration, directory and log.
pub struct Node {
    role: &'static str,
    dir: PathBuf,
    /// Address of `/healthz` and `/metrics`.
    pub http: SocketAddr,
    child: Option<Child>,
}

impl Node {
    #[track_caller]
    fn start(role: &'static str, dir: PathBuf, config: &[String], http: SocketAddr) -> Self {
        std::fs::create_dir_all(&dir).expect("cannot make a node's directory");
        std::fs::write(dir.join("node.yaml"), config.join("\n")).expect("cannot write a config");
        let mut node = Self { role, dir, http, child: None };
        node.restart();
        node
    }

    /// Starts the process with the same configuration and waits until it responds.
    #[track_caller]
    pub fn restart(&mut self) {
        assert!(self.child.is_none(), "the {} still runs", self.role);
        let log = File::options().create(true).append(true).open(self.log());
        let log = log.expect("cannot open a node's log");
        let child = Command::new(env!("CARGO_BIN_EXE_downpour"))
            .args([self.role, "--config", "node.yaml"])
            .current_dir(&self.dir)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("cannot share a log file"))
            .stderr(log)
            .spawn()
            .expect("cannot run downpour");
        self.child = Some(child);
        wait_for(&format!("the {} responds", self.role), SOON, || {
            self.assert_running();
            self.health()
        });
    }

    /// Kills the process, as a power failure would.
    #[track_caller]
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("the node runs");
        child.kill().expect("cannot kill a node");
        child.wait().expect("cannot wait for a node");
    }

    /// Sends SIGTERM. Returns the exit status and the time until the exit.
    #[track_caller]
    pub fn terminate(&mut self) -> (ExitStatus, Duration) {
        let mut child = self.child.take().expect("the node runs");
        let start = Instant::now();
        process::signal(child.id(), "TERM");
        while start.elapsed() < SOON {
            if let Some(status) = child.try_wait().expect("cannot wait for a node") {
                return (status, start.elapsed());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.child = Some(child);
        panic!("the {} still runs after SIGTERM", self.role);
    }

    #[track_caller]
    pub fn assert_running(&mut self) {
        let child = self.child.as_mut().expect("the node runs");
        if let Some(status) = child.try_wait().expect("cannot wait for a node") {
            self.child = None;
            panic!("the {} ended: {status}\n{}", self.role, tail(&self.log(), 40));
        }
    }

    /// The response of `/healthz`; `None` if the node does not respond.
    pub fn health(&self) -> Option<Value> {
        let (status, health) = http::get_json(self.http, "/healthz").ok()?;
        (status == 200).then_some(health)
    }

    /// The number of streams in `/healthz`.
    #[track_caller]
    pub fn streams(&self) -> u64 {
        let health = self.health().unwrap_or_else(|| panic!("the {} does not answer", self.role));
        health["streams"].as_u64().expect("no count of streams")
    }

    /// Key and SSRC of each publication that `/stat/livestat` lists, on a cloud or a parent.
    #[track_caller]
    pub fn publications(&self) -> Vec<(String, u64)> {
        let Ok((200, answer)) = http::get_json(self.http, "/stat/livestat") else {
            panic!("no live statistics")
        };
        let publishers = answer["data"]["publishers"].as_array().cloned().unwrap_or_default();
        let entry = |entry: &Value| Some((entry["key"].as_str()?.into(), entry["ssrc"].as_u64()?));
        publishers.iter().map(|publisher| entry(publisher).expect("malformed entry")).collect()
    }

    /// The `data` of `/stats/time` for a stream; `None` if the stream is not live.
    #[track_caller]
    pub fn stream_time(&self, key: &str) -> Option<Value> {
        let path = format!("/stats/time?stream={key}");
        let (status, mut answer) = http::get_json(self.http, &path).expect("no /stats/time");
        assert!(matches!(status, 200 | 404), "/stats/time: {answer}");
        (status == 200).then(|| answer["data"].take())
    }

    #[track_caller]
    pub fn metrics(&self) -> Metrics {
        Metrics::scrape(self.http)
            .unwrap_or_else(|error| panic!("no metrics of the {}: {error}", self.role))
    }

    /// Peak memory in bytes (`VmHWM`).
    #[track_caller]
    pub fn peak_memory(&self) -> u64 {
        self.status("VmHWM") * 1024
    }

    /// Current usage.
    #[track_caller]
    pub fn usage(&self) -> Usage {
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", self.pid()));
        Usage {
            resident: self.status("VmRSS") * 1024,
            descriptors: descriptors.expect("no descriptors").count() as u64,
            threads: self.status("Threads"),
        }
    }

    /// A number in `/proc/PID/status`.
    #[track_caller]
    fn status(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(path).expect("no status");
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        number.unwrap_or_else(|| panic!("no {name}"))
    }

    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the node runs").id()
    }

    /// The files under `record_dir`, sorted by name.
    pub fn recordings(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        collect_files(&self.dir.join("records"), &mut files);
        files.sort();
        files
    }

    /// Sends it a signal, by the name that kill(1) gives it.
    #[track_caller]
    pub fn signal(&self, name: &str) {
        process::signal(self.pid(), name);
    }

    /// Its configuration file.
    pub fn config(&self) -> String {
        std::fs::read_to_string(self.file("node.yaml")).expect("no configuration")
    }

    /// Writes its configuration file, which it reads at its next start or reload.
    pub fn set_config(&self, text: &str) {
        std::fs::write(self.file("node.yaml"), text).expect("cannot write a configuration");
    }

    /// A file in its directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Waits until it has logged a text.
    #[track_caller]
    pub fn until_logged(&self, text: &str) {
        wait_for(&format!("the {} logs {text:?}", self.role), SOON, || {
            self.log_text().contains(text).then_some(())
        });
    }

    /// The log so far.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).expect("no log")
    }

    fn log(&self) -> PathBuf {
        self.dir.join("node.log")
    }
}

/// Resources of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of memory (`VmRSS`).
    pub resident: u64,
    pub descriptors: u64,
    pub threads: u64,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Both fail if the process has ended, which is fine.
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- {}:\n{}", self.dir.display(), tail(&self.log(), 40));
        }
    }
}

/// The last lines of a log.
pub fn tail(log: &Path, count: usize) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

fn collect_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            collect_files(&path, files);
        } else {
            files.push(path);
        }
    }
}

pub fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A group of the local scope (RFC 2365 §6.1) that other tests do not use at the same time.
fn group() -> Ipv4Addr {
    let [a, b] = rand::random::<[u8; 2]>();
    Ipv4Addr::new(239, 255, a, b.clamp(1, 254))
}

fn quoted(items: &[String]) -> String {
    items.iter().map(|item| format!("\"{item}\"")).collect::<Vec<_>>().join(", ")
}

/// Time for a stream to be pushed and played.
const PLAY: Duration = Duration::from_secs(60);
