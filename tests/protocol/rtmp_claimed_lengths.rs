//! Chunk headers that claim large bodies do not allocate memory for them.

use crate::common::{
    eventually, process,
    process::resident_bytes,
    rtmp_node::{RawEncoder, RtmpServer},
};
use downpour::rtmp::listener::ServerSettings;
use downpour_rtmp::chunk::VIDEO;

#[tokio::test(flavor = "multi_thread")]
async fn claimed_lengths_do_not_allocate_memory() {
    if !process::alone(module_path!(), "claimed_lengths_do_not_allocate_memory", None) {
        return;
    }
    let server = RtmpServer::start(ServerSettings::default());
    let addr = server.addr;
    let before = resident_bytes();
    let encoders = tokio::task::spawn_blocking(move || {
        (0..100)
            .map(|i| {
                let mut encoder = RawEncoder::publish(addr, "live", &format!("claim{i}"));
                for csid in 3..60u8 {
                    encoder
                        .out
                        .extend_from_slice(&[csid, 0, 0, 0, 255, 255, 255, VIDEO, 1, 0, 0, 0]);
                    // A whole chunk of the default size, so that the next header is parsed as one.
                    encoder.out.extend_from_slice(&[7; 128]);
                }
                encoder.out.extend_from_slice(&[60, 0, 0, 0, 255, 255, 255, VIDEO, 1, 0, 0, 0]);
                encoder.out.extend_from_slice(&[7; 10]);
                encoder.send().unwrap();
                encoder
            })
            .collect::<Vec<_>>()
    })
    .await
    .unwrap();
    let name = "downpour_rtmp_received_bytes_total";
    let sent = 100.0 * (57 * 140 + 22) as f64;
    eventually("the bytes", || server.metric(name) > sent).await;
    // 5,800 claims of 16 MB: 97 GB. At 4 KB each they take 24 MB; the rest is for the test.
    let grown = resident_bytes().saturating_sub(before);
    assert!(grown < 60 << 20, "{grown} bytes");
    drop(encoders);
    server.metric_reaches("downpour_rtmp_connections", 0.0).await;
}
