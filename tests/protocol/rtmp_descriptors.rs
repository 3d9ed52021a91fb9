//! A server without free file descriptors accepts again once some are free.

use std::{net::TcpStream, time::Duration};

use crate::common::{SOON, eventually, process, rtmp_node::RtmpServer};
use downpour::rtmp::{client::Publisher, listener::ServerSettings};

#[tokio::test(flavor = "multi_thread")]
async fn server_recovers_from_a_lack_of_descriptors() {
    if !process::alone(module_path!(), "server_recovers_from_a_lack_of_descriptors", Some(120)) {
        return;
    }
    let server = RtmpServer::start(ServerSettings::default());
    // Clients connect until the server has no descriptor for its end.
    let addr = server.addr;
    let clients = tokio::task::spawn_blocking(move || {
        std::iter::from_fn(|| TcpStream::connect(addr).ok()).collect::<Vec<_>>()
    });
    let clients = clients.await.unwrap();
    let name = "downpour_rtmp_accept_errors_total";
    eventually("a failure to accept", || server.metric(name) >= 2.0).await;
    // The pauses grow from 10 ms, so half a second allows six more attempts. A busy loop makes
    // thousands.
    let errors = server.metric(name);
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(server.metric(name) <= errors + 7.0, "{} in half a second", server.metric(name));

    drop(clients);
    server.metric_reaches("downpour_rtmp_connections", 0.0).await;
    Publisher::connect(&server.url("live/x"), SOON).await.unwrap();
}
