//! An edge at a cloud that announces nothing: names from its API, its restart, and a late join.

use std::{
    net::{SocketAddr, UdpSocket},
    sync::Arc,
    time::{Duration, Instant},
};

use downpour_distribution::upstream::{
    dispatch::{self, Cloud, FetchHeaders, Upstream},
    prober::ProbeMetrics,
    socket::RtpSocket,
    stats::ReceiveMetrics,
    streams::{self, Streams},
};
use downpour_hub::{Hub, LogLimits, ReadOutcome};
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::{
    receiver,
    rtp::{Packetizer, Ssrc},
};
use parking_lot::Mutex;
use prometheus::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::common::repair_node::until;

/// The Go cloud's first SSRC.
const SSRC: u32 = 1_020_304;

/// The API and the RTP of a Go cloud, and an edge of ours.
struct Rig {
    hub: Hub,
    /// What `/stat/livestat` lists: key and start time, both of SSRC 1020304.
    listed: Arc<Mutex<Option<(&'static str, u64)>>>,
    rtp: UdpSocket,
    edge: SocketAddr,
    _stop: DropGuard,
}

impl Rig {
    async fn start(fetch_headers: Option<FetchHeaders>) -> Self {
        let api = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let api_port = api.local_addr().unwrap().port();
        let listed: Arc<Mutex<Option<(&'static str, u64)>>> = Arc::default();
        let answers = listed.clone();
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = api.accept().await.unwrap();
                let _ = socket.read(&mut [0; 1024]).await;
                let publishers = answers.lock().map(|(key, start)| {
                    serde_json::json!([{
                        "key": key, "url": format!("rtmp://encoders-name:1936/{key}"),
                        "start_time": start, "ssrc": SSRC, "stream_id": 1,
                    }])
                });
                let data = serde_json::json!({"publishers": publishers, "players": null});
                let body = serde_json::json!({"status": 200, "data": data}).to_string();
                let length = body.len();
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
                let _ = socket.write_all(format!("{head}{body}").as_bytes()).await;
            }
        });
        let registry = Registry::new();
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 60_000 });
        let metrics = ReceiveMetrics::register(&registry).unwrap();
        let settings = streams::Settings {
            receiver: receiver::Settings::default(),
            silence: Duration::from_secs(10),
            hold: Duration::ZERO,
            max_streams: 10,
            fetches_headers: fetch_headers.is_some(),
        };
        let streams = Streams::new(settings, hub.clone(), metrics.clone());
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let edge = socket.local_addr().unwrap();
        let cloud = Cloud {
            host: "127.0.0.1".into(),
            quic_host: None,
            quic_port: 9,
            api_host: None,
            api_port,
        };
        let settings = dispatch::Settings { cloud, pack_loss: 0.0, connect: None, fetch_headers };
        let probes = ProbeMetrics::register(&registry).unwrap();
        let sockets = vec![RtpSocket::new(socket)];
        let upstream = Upstream::new(sockets, Vec::new(), settings, streams, metrics, probes);
        let stop = CancellationToken::new();
        tokio::spawn(upstream.run(stop.clone()));
        let rtp = UdpSocket::bind("127.0.0.1:0").unwrap();
        Self { hub, listed, rtp, edge, _stop: stop.drop_guard() }
    }

    fn send(&self, packetizer: &mut Packetizer, tags: &[Tag]) {
        for tag in tags {
            let burst = packetizer.packetize(tag);
            for packet in (0..burst.count()).filter_map(|n| burst.packet(n)) {
                self.rtp.send_to(&packet, self.edge).unwrap();
            }
        }
    }

    fn read(&self, key: &str) -> Vec<Tag> {
        let mut tags = Vec::new();
        if let Some(mut reader) = self.hub.subscribe(key) {
            while let ReadOutcome::Read(_) = reader.try_read(&mut tags, usize::MAX) {}
        }
        tags
    }
}

/// A header and frames, the first of which is a key frame.
fn tags(frames: u32) -> Vec<Tag> {
    let header = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap();
    let frame = |n| {
        let first = if n == 0 { 0x17 } else { 0x27 };
        Tag::new(TagKind::Video, n * 40, &[first, 1, 0, 0, 0, n as u8]).unwrap()
    };
    std::iter::once(header).chain((0..frames).map(frame)).collect()
}

#[tokio::test]
async fn go_cloud_that_restarts_plays_again_at_once() {
    let rig = Rig::start(None).await;
    *rig.listed.lock() = Some(("live/a", 1000));
    let before = tags(50);
    rig.send(&mut Packetizer::new(Ssrc(SSRC), 1120), &before);
    until(|| rig.read("live/a").len() == before.len()).await;

    // It restarts; the stream that begins first has the SSRC now. Its name and start are looked up.
    *rig.listed.lock() = Some(("live/b", 2000));
    let after = tags(10);
    let began = Instant::now();
    rig.send(&mut Packetizer::new(Ssrc(SSRC), 1120), &after);
    until(|| rig.read("live/b").len() == after.len()).await;
    // Within a second; the rest is for a busy machine. It took 30 s where the SSRC counted as ended.
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    assert_eq!(rig.read("live/b"), after);
    let stream = rig.hub.stream("live/b").unwrap();
    assert_eq!(stream.start_unix_ms(), 2000);
    assert!(rig.hub.stream("live/a").is_none(), "its publication is over");
}

#[tokio::test]
async fn late_join_fetches_the_headers_from_the_go_cloud() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let seen = asked.clone();
    let fetch: FetchHeaders = Box::new(move |host, port, key| {
        seen.lock().push((host, port, key.to_string()));
        Box::pin(async { Ok(vec![tags(0).remove(0)]) })
    });
    let rig = Rig::start(Some(fetch)).await;
    *rig.listed.lock() = Some(("live/a", 1000));
    let all = tags(4);
    let mut packetizer = Packetizer::new(Ssrc(SSRC), 1120);
    // The header and a frame were sent before the edge began.
    all[..2].iter().for_each(|tag| drop(packetizer.packetize(tag)));
    let key = Tag::new(TagKind::Video, 80, &[0x17, 1, 0, 0, 0, 9]).unwrap();
    rig.send(&mut packetizer, std::slice::from_ref(&key));
    until(|| rig.read("live/a").len() == 2).await;
    let read = rig.read("live/a");
    assert_eq!((read[0].body(), &read[1]), (all[0].body(), &key));
    // Its own address, with the port of the URL that its encoder used.
    assert_eq!(*asked.lock(), [("127.0.0.1".to_owned(), 1936, "live/a".to_owned())]);
}
