//! Thousands of idle connections need little memory, and do not block encoders.

use std::{io::Write, net::TcpStream, time::Duration};

use crate::common::{
    SOON, process,
    process::resident_bytes,
    rtmp_node::{RawEncoder, RtmpServer, SIMPLE_HANDSHAKE},
};
use downpour::rtmp::{client::Publisher, listener::ServerSettings};
use downpour_media::amf0::Value;

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_are_small_and_counted() {
    if !process::alone(module_path!(), "idle_connections_are_small_and_counted", None) {
        return;
    }
    // This process has both ends.
    let count = (descriptor_limit().saturating_sub(500) / 2).min(10_000);
    let server = RtmpServer::start(ServerSettings {
        max_connections: count,
        publish_timeout: Duration::from_secs(300),
        idle_timeout: Duration::from_secs(300),
        ..ServerSettings::default()
    });
    let addr = server.addr;
    let before = resident_bytes();
    let held = tokio::task::spawn_blocking(move || {
        (0..count)
            .map(|i| match i % 4 {
                0 => TcpStream::connect(addr).unwrap(),
                1 => {
                    let mut stream = TcpStream::connect(addr).unwrap();
                    stream.write_all(&SIMPLE_HANDSHAKE[..1000]).unwrap();
                    stream
                }
                2 => {
                    let mut encoder = RawEncoder::connect(addr);
                    encoder.command(0, "connect", 1.0, &[Value::object([("app", "a".into())])]);
                    encoder.send().unwrap();
                    encoder.stream
                }
                _ => RawEncoder::publish(addr, "live", &format!("x{i}")).stream,
            })
            .collect::<Vec<_>>()
    })
    .await
    .unwrap();
    server.metric_reaches("downpour_rtmp_connections", count as f64).await;
    let each = resident_bytes().saturating_sub(before) / count;
    assert!(each < 10_000, "{each} bytes per connection");

    // Beyond the limit, a new connection displaces an idle one.
    let publisher = Publisher::connect(&server.url("live/one-more"), SOON).await.unwrap();
    server.metric_reaches("downpour_rtmp_closed_total{reason=\"displaced\"}", 1.0).await;
    assert_eq!(server.metric("downpour_rtmp_displaced_total"), 1.0);
    assert_eq!(server.metric("downpour_rtmp_refused_total{reason=\"connections\"}"), 0.0);
    drop(publisher);
    drop(held);
    server.metric_reaches("downpour_rtmp_connections", 0.0).await;
    eprintln!("{count} connections of {each} bytes");
}

fn descriptor_limit() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap();
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    line.split_whitespace().nth(3).unwrap().parse().unwrap()
}
