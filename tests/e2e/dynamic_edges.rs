//! Edges that are not in the cloud's list: they subscribe, validate their address, and receive the
//! streams that they subscribed to.

use std::{
    net::UdpSocket,
    time::{Duration, Instant},
};

use crate::common::{
    SOON,
    compare::{
        Timestamps, assert_same_to_the_end, assert_same_while_it_lasted, media as without_script,
    },
    http::get_json,
    media,
    node::{Edge, Site, SiteSettings},
    wait_for,
};
use downpour_distribution::{
    tls::Trust,
    upstream::{
        prober::Prober,
        repair_client::{
            RepairClient, RepairClientMetrics, RepairClientSettings, RepairEvent, RepairHandle,
        },
    },
};
use downpour_media::flv::Tag;
use downpour_netem::LinkSettings;
use downpour_repair::probe::ProbeMessage;
use prometheus::Registry;
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_util::sync::CancellationToken;

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);

#[test]
fn edge_subscribes_and_receives_its_stream() {
    let site = dynamic().start();
    until_targets(&site, 1);
    site.assert_plays(media::short(), KEY);
    // The stream arrived over RTP, not as repairs.
    assert_eq!(fanned_out(&site), packet_count(&media::short().tags));
    assert!(site.packets("repaired_1") < 50.0);
}

/// The API and the metrics show the reports of an edge until it leaves.
#[test]
fn cloud_shows_the_reports_of_its_edges() {
    let mut site = dynamic().with_edge("pack_loss: 0.05").start();
    until_targets(&site, 1);
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(1), KEY);
    viewer.wait_tags(100, SOON);
    let edges = || {
        let (status, list) = get_json(site.cloud.node.http, "/api/v1/edges").unwrap();
        assert_eq!(status, 200);
        list["edges"].as_array().cloned().unwrap()
    };
    let edge = wait_for("the edge has reported", SOON, || {
        let edges = edges();
        assert_eq!(edges.len(), 1, "{edges:?}");
        let repaired = edges[0]["streams"][0]["repaired"][0].as_u64();
        repaired.filter(|repaired| *repaired > 0).map(|_| edges[0].clone())
    });
    assert_eq!((&edge["node"], &edge["protocol"]), (&"edge0".into(), &"downpour".into()));
    assert_eq!(edge["paths"][0]["state"], "up", "{edge}");
    assert_eq!((&edge["patterns"][0], &edge["streams"][0]["key"]), (&"*".into(), &KEY.into()));
    assert!(edge["round_trip_us"].as_u64() > Some(0), "{edge}");
    let metrics = site.cloud.node.metrics();
    let labels = [("edge", "edge0"), ("stream", KEY), ("fate", "repaired_1")];
    assert!(metrics.sum("downpour_edge_stream_packets", &labels) > 0.0, "{}", metrics.text());
    assert!(metrics.sum("downpour_edge_round_trip_seconds", &labels[..1]) > 0.0);
    push.kill();
    viewer.until_end(PUSH);
    wait_for("the ended stream is gone", SOON, || {
        edges()[0]["streams"].as_array().unwrap().is_empty().then_some(())
    });
    site.edges[0].node.terminate();
    wait_for("the edge is gone", SOON, || edges().is_empty().then_some(()));
    assert!(!site.cloud.node.metrics().text().contains("edge0"));
}

#[test]
fn edge_behind_a_lossy_nat_receives_every_tag() {
    let path = LinkSettings { delay: Duration::from_millis(10), ..LinkSettings::lossy(0.05) };
    let settings = SiteSettings { dynamic: true, ..SiteSettings::over(path, 7) };
    let site = settings.with_edge("latency_ms: 1000").start();
    until_targets(&site, 1);
    site.assert_plays(media::full(), KEY);
    let rtp = site.network.rtp_stats();
    assert!(rtp.sent > 1000 && rtp.dropped() > 20, "{rtp:?}");
    assert!(site.packets("repaired_1") > 20.0);
    assert_eq!(site.packets("lost"), 0.0);
}

/// The edge subscribes to one of two streams. The cloud does not send packets of the other.
#[test]
fn edge_receives_only_subscribed_streams() {
    let site = dynamic().with_edge("streams: [\"live/*\"]").start();
    until_targets(&site, 1);
    let viewer = site.watch(KEY);
    let other = site.push(media::short(), "other/movie");
    let push = site.push(media::short(), KEY);
    wait_for("both are live", SOON, || (site.cloud.publications().len() == 2).then_some(()));
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    other.until_done(PUSH);
    assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
    assert_eq!(fanned_out(&site), packet_count(&media::short().tags), "one stream was sent");
    assert!(site.packets("received") >= fanned_out(&site), "the stream was received");
    // A few late packets of the ended stream count as unknown; the other stream has 562.
    let unknown = site.edges[0].node.metrics().sum("downpour_edge_unknown_packets_total", &[]);
    assert!(unknown < 50.0, "{unknown}");
}

/// The edge changes its subscriptions during the stream.
#[test]
fn unsubscribing_stops_the_packets_until_the_next_subscription() {
    let site = SiteSettings { edges: 0, ..dynamic() }.start();
    let mut client = Client::start(&site, &["other/*"]);
    client.until_up();
    let _push = site.push_with(media::full(), KEY, &["--loop"]);
    wait_for("it is live", SOON, || (site.cloud.publications().len() == 1).then_some(()));
    assert_eq!(fanned_out(&site), 0.0);

    client.handle.subscribe(&["live/*".parse().unwrap()]).unwrap();
    client.wait("packets arrive", |client| client.rtp > 20);
    client.handle.unsubscribe(&["live/*".parse().unwrap()]);
    let mut stopped = site.has_stopped(20.0, || fanned_out(&site));
    client.wait("the cloud sends no more packets of the live stream", |_| stopped());
    let received = client.rtp;
    client.handle.subscribe(&["live/movie".parse().unwrap()]).unwrap();
    client.wait("packets arrive again", |client| client.rtp > received + 20);
}

#[test]
fn wrong_token_prevents_rtp_and_is_logged() {
    let site = dynamic().with_cloud("edge_token: secret").with_edge("token: wrong").start();
    let refused = || {
        let metrics = site.cloud.node.metrics();
        metrics.sum("downpour_repair_server_refused_total", &[("reason", "token")])
    };
    wait_for("the edge is refused", SOON, || (refused() > 0.0).then_some(()));
    site.push(media::short(), KEY).until_done(PUSH);
    assert_eq!(fanned_out(&site), 0.0);
    assert_eq!(site.dynamic_targets(), 0.0);
    let log = site.edges[0].node.log_text();
    assert!(log.contains("the token is wrong or missing"), "{log}");
}

/// An edge that loses power does not unsubscribe. The cloud stops sending after a timeout.
#[test]
fn cloud_stops_sending_to_a_killed_edge() {
    let settings = SiteSettings { edges: 2, ..dynamic() };
    let mut site = settings.start();
    until_targets(&site, 2);
    site.edges[0].node.kill();
    let killed = Instant::now();
    wait_for("the dead edge is dropped", Duration::from_secs(30), || {
        (site.dynamic_targets() == 1.0).then_some(())
    });
    assert!(killed.elapsed() < Duration::from_secs(22), "it took {:?}", killed.elapsed());
    // The other edge is served as before.
    let viewer = site.edges[1].watch(KEY);
    let push = site.push(media::short(), KEY);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::short().tags, &pulled, Timestamps::Exact);
    site.edges[1].node.terminate();
    wait_for("the terminated edge is dropped", SOON, || {
        (site.dynamic_targets() == 0.0).then_some(())
    });
}

#[test]
fn restarted_edge_receives_its_stream_again() {
    let mut site = dynamic().start();
    until_targets(&site, 1);
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(100, SOON);
    site.edges[0].node.kill();
    assert_same_while_it_lasted(&media::full_at(2).tags, &viewer.leave(), Timestamps::Exact);
    site.edges[0].node.restart();
    let viewer = site.watch(KEY);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::full_at(2).tags, &pulled, Timestamps::Exact);
    // The cloud has not dropped the old connection yet, and the port is the same. Packets still arrive
    // once, except for those that arrived while they were requested.
    assert!(site.packets("duplicate") < 100.0, "{}", site.packets("duplicate"));
    assert!(
        site.packets("received") > 2.0 * site.packets("repaired_1"),
        "most packets arrive without repair"
    );
}

#[test]
fn restarted_cloud_sends_again() {
    let mut site = dynamic().start();
    until_targets(&site, 1);
    let viewer = site.watch(KEY);
    let push = site.push(media::full_at(2), KEY);
    viewer.wait_tags(100, SOON);
    site.cloud.node.kill();
    drop(push);
    site.cloud.node.restart();
    viewer.until_end(SOON);
    until_targets(&site, 1);
    site.assert_plays(media::short(), KEY);
}

/// One edge, which is not in the cloud's list.
fn dynamic() -> SiteSettings {
    SiteSettings { dynamic: true, ..SiteSettings::default() }
}

/// Waits until the cloud has validated `count` addresses and the edges know it.
#[track_caller]
fn until_targets(site: &Site, count: usize) {
    site.until_targets(count);
    wait_for("the paths of the edges are up", SOON, || {
        let up = |edge: &Edge| edge.node.metrics().sum("downpour_edge_path_up", &[]);
        let up: f64 = site.edges.iter().map(up).sum();
        (up == count as f64).then_some(())
    });
}

/// Datagrams that the cloud sent. The list of targets is empty, so all of them are media.
#[track_caller]
fn fanned_out(site: &Site) -> f64 {
    let metrics = site.cloud.node.metrics();
    assert!(metrics.has("downpour_fanout_datagrams_total"), "{}", metrics.text());
    metrics.sum("downpour_fanout_datagrams_total", &[])
}

/// Number of RTP packets of a stream.
fn packet_count(tags: &[Tag]) -> f64 {
    let packets = |tag: &Tag| tag.unit().len().div_ceil(1120);
    without_script(tags).iter().map(packets).sum::<usize>() as f64
}

/// The network part of an edge: a repair connection and an RTP socket.
struct Client {
    handle: RepairHandle,
    events: mpsc::Receiver<RepairEvent>,
    socket: UdpSocket,
    prober: Prober,
    cloud: std::net::SocketAddr,
    up: bool,
    /// Received RTP packets.
    rtp: usize,
    shutdown: CancellationToken,
    /// Dropped last: the client's task runs on it.
    _runtime: Runtime,
}

impl Client {
    fn start(site: &Site, streams: &[&str]) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let settings = RepairClientSettings {
            cloud: site.cloud.quic.to_string(),
            protocol: Default::default(),
            trust: Trust::Insecure,
            node: "client".into(),
            token: None,
            streams: streams.iter().map(|pattern| pattern.parse().unwrap()).collect(),
            rtp_port: Some(socket.local_addr().unwrap().port()),
            rtp_paths: 1,
            group: None,
            parity: false,
            latency: Duration::from_millis(500),
        };
        let metrics = RepairClientMetrics::register(&Registry::new()).unwrap();
        let (sender, events) = mpsc::channel(4096);
        let shutdown = CancellationToken::new();
        let _inside = runtime.enter();
        let handle = RepairClient::spawn(settings, sender, metrics, shutdown.clone()).unwrap();
        drop(_inside);
        Self {
            handle,
            events,
            socket,
            prober: Prober::new(0),
            cloud: site.cloud.rtp,
            up: false,
            rtp: 0,
            shutdown,
            _runtime: runtime,
        }
    }

    #[track_caller]
    fn until_up(&mut self) {
        self.wait("the path is up", |client| client.up);
    }

    /// Runs the client until `condition` holds.
    #[track_caller]
    fn wait(&mut self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        wait_for(what, SOON, || {
            self.drive();
            condition(self).then_some(())
        });
    }

    fn drive(&mut self) {
        let now = Instant::now();
        while let Ok(event) = self.events.try_recv() {
            match event {
                RepairEvent::Welcome(welcome) => {
                    assert_eq!(welcome.rtp_port, self.cloud.port());
                    self.prober.start(now, welcome.nonce);
                }
                RepairEvent::PathUp { path: 0, address } => {
                    assert_eq!(address, self.socket.local_addr().unwrap());
                    self.up = true;
                }
                _ => {}
            }
        }
        let mut buffer = [0; 2000];
        while let Ok((len, from)) = self.socket.recv_from(&mut buffer) {
            assert_eq!(from, self.cloud);
            let datagram = &buffer[..len];
            if let Ok((message, _)) = ProbeMessage::parse(datagram) {
                let proof = self.prober.handle_challenge(message).expect("a challenge");
                self.socket.send_to(&proof.encode(), self.cloud).unwrap();
            } else {
                assert!(
                    self.up || self.prober.poll_timeout().is_some(),
                    "RTP before path validation"
                );
                self.rtp += 1;
            }
        }
        if let Some(probe) = self.prober.poll_probe(now) {
            self.socket.send_to(&probe.encode(), self.cloud).unwrap();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}
