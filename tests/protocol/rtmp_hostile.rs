//! Hostile RTMP clients are closed or ignored, and do not affect another stream.

use std::{
    io::{Read, Write},
    net::TcpStream,
    time::Duration,
};

use crate::common::{
    SOON, eventually,
    rtmp_node::{RawEncoder, Recorded, RtmpServer, SIMPLE_HANDSHAKE},
};
use downpour::rtmp::{client::Publisher, listener::ServerSettings};
use downpour_media::{
    amf0::Value,
    flv::{Tag, TagKind},
};
use downpour_rtmp::chunk::{
    AUDIO, SET_CHUNK_SIZE, SET_PEER_BANDWIDTH, USER_CONTROL, VIDEO, WINDOW_ACK_SIZE,
};

/// A server with a well-behaved stream.
struct OtherStream {
    server: RtmpServer,
    publisher: Publisher,
    sent: u32,
}

impl OtherStream {
    async fn start(settings: ServerSettings) -> Self {
        let server = RtmpServer::start(settings);
        let publisher = Publisher::connect(&server.url("live/other"), SOON).await.unwrap();
        let mut other = Self { server, publisher, sent: 0 };
        other.check().await;
        other
    }

    /// Asserts that another tag of the stream arrives.
    async fn check(&mut self) {
        let tag = Tag::new(TagKind::Audio, self.sent, &[0xaf, 1]).unwrap();
        self.sent += 1;
        self.publisher.send(&tag).await.unwrap();
        let arrived = |all: &[Recorded]| all.len() == 1 && all[0].tags.last() == Some(&tag);
        eventually("the other", || self.server.recorder.recorded("live/other", arrived)).await;
    }

    /// Asserts that the server closes `encoder` for a protocol error of this `kind`.
    async fn is_cut_off(&mut self, mut encoder: RawEncoder, kind: &str) {
        let name = format!("downpour_rtmp_protocol_errors_total{{kind=\"{kind}\"}}");
        let before = self.server.metric(&name);
        // The server may close before everything is sent.
        let closed = tokio::task::spawn_blocking(move || {
            let _ = encoder.send();
            encoder.is_closed()
        });
        assert!(closed.await.unwrap());
        self.server.metric_reaches(&name, before + 1.0).await;
        self.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn server_bounds_unfinished_messages() {
    let settings = ServerSettings { max_message_len: 1 << 20, ..ServerSettings::default() };
    let mut other = OtherStream::start(settings).await;
    let mut encoder = RawEncoder::publish(other.server.addr, "live", "x");
    encoder.message(SET_CHUNK_SIZE, 0, &0xf_0000u32.to_be_bytes());
    for csid in 5..8u8 {
        encoder.out.extend_from_slice(&[csid, 0, 0, 0, 0x0f, 0, 1, VIDEO, 1, 0, 0, 0]);
        encoder.out.extend_from_slice(&vec![1; 0xf_0000]);
    }
    other.is_cut_off(encoder, "chunk").await;

    let mut encoder = RawEncoder::publish(other.server.addr, "live", "y");
    for low in 0..70u8 {
        encoder.out.extend_from_slice(&[0, low, 0, 0, 0, 0, 0, 1, AUDIO, 1, 0, 0, 0, 9]);
    }
    other.is_cut_off(encoder, "chunk").await;

    let mut encoder = RawEncoder::publish(other.server.addr, "live", "z");
    encoder.out.extend_from_slice(&[6, 0, 0, 0, 0x10, 0, 1, VIDEO, 1, 0, 0, 0, 9]);
    other.is_cut_off(encoder, "chunk").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn amf_nested_100000_deep_is_an_error() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    for nesting in [&[0x0a, 0, 0, 0, 1][..], &[0x03, 0, 1, b'a'], &[0x08, 0, 0, 0, 1, 0, 1, b'a']] {
        let mut encoder = RawEncoder::connect(other.server.addr);
        let mut body = b"\x02\0\x07connect\0\x3f\xf0\0\0\0\0\0\0".to_vec();
        body.extend(nesting.repeat(60_000 / nesting.len()));
        encoder.message(20, 0, &body);
        other.is_cut_off(encoder, "command").await;

        // With 400,000 levels, script data is forwarded unparsed, and a command is too long.
        let deep = nesting.repeat(400_000);
        let mut encoder = RawEncoder::publish(other.server.addr, "live", "deep");
        encoder.message(20, 0, &deep);
        other.is_cut_off(encoder, "chunk").await;
    }
    let mut encoder = RawEncoder::publish(other.server.addr, "live", "script");
    let script = [&b"\x02\0\x0aonMetaData"[..], &[0x0a, 0, 0, 0, 1].repeat(400_000)].concat();
    encoder.message(18, 0, &script);
    encoder.message(AUDIO, 3, &[0xaf, 1]);
    encoder.send().unwrap();
    let arrived = |all: &[Recorded]| {
        all.first().is_some_and(|first| first.tags.iter().any(|tag| tag.body() == script))
    };
    eventually("the script", || other.server.recorder.recorded("live/script", arrived)).await;
    other.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_handles_extreme_chunk_sizes() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    for size in [0, 1 << 31, u32::MAX] {
        let mut encoder = RawEncoder::publish(other.server.addr, "live", "x");
        encoder.message(SET_CHUNK_SIZE, 0, &size.to_be_bytes());
        other.is_cut_off(encoder, "chunk").await;
    }
    for (name, size) in [("one", 1u32), ("all", i32::MAX as u32)] {
        let mut encoder = RawEncoder::publish(other.server.addr, "live", name);
        encoder.writer.set_chunk_size(size, &mut encoder.out).unwrap();
        encoder.message(VIDEO, 40, &[0x17; 100_000]);
        encoder.send().unwrap();
        encoder.hang_up();
        let expected = Tag::new(TagKind::Video, 40, &[0x17; 100_000]).unwrap();
        assert_eq!(other.server.recorder.ended(&format!("live/{name}"), 1).await, [expected]);
    }
    other.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn windows_of_0_and_1_and_floods_of_pings_are_survived() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    for window in [0u32, 1, u32::MAX] {
        let name = format!("window{window}");
        let mut encoder = RawEncoder::publish(other.server.addr, "live", &name);
        encoder.message(WINDOW_ACK_SIZE, 0, &window.to_be_bytes());
        encoder.message(SET_PEER_BANDWIDTH, 0, &[0; 5]);
        for _ in 0..1000 {
            encoder.message(USER_CONTROL, 0, &[0, 6, 1, 2, 3, 4]);
            encoder.message(AUDIO, 3, &[0xaf, 1]);
        }
        encoder.send().unwrap();
        let arrived = |all: &[Recorded]| all.first().is_some_and(|first| first.tags.len() == 1000);
        let key = format!("live/{name}");
        eventually("the tags", || other.server.recorder.recorded(&key, arrived)).await;
        other.check().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn server_closes_a_client_that_never_reads_answers() {
    let write_timeout = Duration::from_millis(500);
    let settings = ServerSettings { write_timeout, ..ServerSettings::default() };
    let mut other = OtherStream::start(settings).await;
    let mut encoder = RawEncoder::publish(other.server.addr, "live", "deaf");
    let sent = tokio::task::spawn_blocking(move || {
        for _ in 0..50_000 {
            encoder.message(USER_CONTROL, 0, &[0, 6, 1, 2, 3, 4]);
        }
        let pings = encoder.out.clone();
        // The answers fill the buffers of both sides, then the server stops reading.
        encoder.stream.set_write_timeout(Some(SOON)).unwrap();
        while encoder.stream.write_all(&pings).is_ok() {}
    });
    let name = "downpour_rtmp_closed_total{reason=\"write_timeout\"}";
    let deadline = tokio::time::Instant::now() + SOON;
    while other.server.metric(name) < 1.0 {
        assert!(tokio::time::Instant::now() < deadline, "still open");
        other.check().await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    sent.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn server_releases_connections_with_a_partial_handshake() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    let addr = other.server.addr;
    tokio::task::spawn_blocking(move || {
        for len in 0..=SIMPLE_HANDSHAKE.len() {
            let mut stream = TcpStream::connect(addr).unwrap();
            // The connection may be closed already.
            let _ = stream.write_all(&SIMPLE_HANDSHAKE[..len]);
        }
    })
    .await
    .unwrap();
    let accepted = SIMPLE_HANDSHAKE.len() as f64 + 2.0;
    other.server.metric_reaches("downpour_rtmp_connections_total", accepted).await;
    other.server.metric_reaches("downpour_rtmp_connections", 1.0).await;
    assert_eq!(other.server.metric("downpour_rtmp_closed_total{reason=\"aborted\"}"), 0.0);
    other.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_ends_publications_of_partial_sessions() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    let addr = other.server.addr;
    tokio::task::spawn_blocking(move || {
        for cut in 0.. {
            let mut encoder = RawEncoder::connect(addr);
            let app = Value::object([("app", "live".into())]);
            encoder.command(0, "connect", 1.0, &[app]);
            encoder.command(1, "publish", 3.0, &[Value::Null, format!("cut{cut}").as_str().into()]);
            encoder.message(VIDEO, 0xffff_ffff, &[0x17; 300]);
            let whole = encoder.out.len();
            encoder.out.truncate(cut);
            encoder.send().unwrap();
            encoder.hang_up();
            if cut >= whole {
                break;
            }
        }
    })
    .await
    .unwrap();
    other.server.metric_reaches("downpour_rtmp_connections", 1.0).await;
    assert_eq!(other.server.metric("downpour_rtmp_closed_total{reason=\"aborted\"}"), 0.0);
    other.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_closes_other_protocols_at_once() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    for greeting in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0x16, 3, 1, 2, 0], &[6; 1537]] {
        let addr = other.server.addr;
        let greeting = greeting.to_vec();
        let answer = tokio::task::spawn_blocking(move || {
            let mut stream = TcpStream::connect(addr).unwrap();
            stream.set_read_timeout(Some(SOON)).unwrap();
            stream.write_all(&greeting).unwrap();
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer);
            answer
        });
        assert!(answer.await.unwrap().is_empty());
        other.check().await;
    }
    let name = "downpour_rtmp_protocol_errors_total{kind=\"handshake\"}";
    other.server.metric_reaches(name, 3.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn server_closes_a_client_that_never_publishes() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    let mut encoder = RawEncoder::connect(other.server.addr);
    for _ in 0..300 {
        encoder.message(VIDEO, 0, &[0; 8000]);
    }
    other.is_cut_off(encoder, "nothing_published").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn panic_in_the_node_closes_only_its_connection() {
    let mut other = OtherStream::start(ServerSettings::default()).await;
    let mut encoder = RawEncoder::connect(other.server.addr);
    encoder.command(0, "connect", 1.0, &[Value::object([("app", "live".into())])]);
    encoder.command(1, "publish", 3.0, &[Value::Null, "panic".into()]);
    encoder.send().unwrap();
    assert!(tokio::task::spawn_blocking(move || encoder.is_closed()).await.unwrap());
    other.server.metric_reaches("downpour_rtmp_closed_total{reason=\"aborted\"}", 1.0).await;
    other.server.metric_reaches("downpour_rtmp_connections", 1.0).await;
    other.check().await;
}
