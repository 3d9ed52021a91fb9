//! What an operator sees: readiness, and a log that says who came and is not flooded.

use std::{io::Write, net::TcpStream, time::Duration};

use crate::common::{
    SOON, http, media,
    node::{Node, SiteSettings},
    wait_for,
};

/// The status and the reasons of `/readyz`.
fn ready(node: &Node) -> (u16, String) {
    let (status, answer) = http::get_json(node.http, "/readyz").expect("no answer");
    (status, answer["reasons"].to_string())
}

#[test]
fn edge_is_ready_while_its_cloud_is_there() {
    let mut site = SiteSettings { dynamic: true, ..SiteSettings::default() }.start();
    site.edges[0].until_connected();
    wait_for("the edge is ready", SOON, || (ready(&site.edges[0].node).0 == 200).then_some(()));
    assert_eq!(ready(&site.cloud.node), (200, "[]".into()));
    site.cloud.node.kill();
    let reasons = wait_for("the edge is not ready", Duration::from_secs(60), || {
        let (status, reasons) = ready(&site.edges[0].node);
        (status == 503).then_some(reasons)
    });
    assert!(reasons.contains("no connection to the cloud 127.0.0.1:"), "{reasons}");
    assert!(site.edges[0].node.health().is_some(), "/healthz depends on the cloud");
    site.cloud.node.restart();
    wait_for("the edge is ready again", Duration::from_secs(60), || {
        (ready(&site.edges[0].node).0 == 200).then_some(())
    });
}

#[test]
fn refused_token_is_no_connection() {
    let site = SiteSettings { dynamic: true, ..SiteSettings::default() }
        .with_cloud("edge_token: right")
        .with_edge("token: wrong")
        .start();
    let edge = &site.edges[0].node;
    let reasons = wait_for("the edge says why it is not ready", SOON, || {
        let (status, reasons) = ready(edge);
        (status == 503 && reasons.contains("token")).then_some(reasons)
    });
    assert!(reasons.contains("no connection to the cloud"), "{reasons}");
    site.cloud.node.until_logged("edge refused");
    assert!(!edge.log_text().contains("repair connection established"), "{}", edge.log_text());
    let log = site.cloud.node.log_text();
    assert!(!log.contains("edge connected"), "{log}");
    assert!(log.contains("reason=\"the token is wrong or missing\""), "{log}");
}

#[test]
fn log_says_what_an_encoder_sends_and_is_not_flooded() {
    let site = SiteSettings::default().start();
    // In real time: the rate is measured over three seconds.
    let _push = site.push(media::full_at(1), "live/movie");
    let cloud = &site.cloud.node;
    cloud.until_logged("RTMP publication runs stream=live/movie");
    let log = cloud.log_text();
    let line = log.lines().find(|line| line.contains("publication runs")).unwrap();
    assert!(line.contains(" video=\"h264\"") && line.contains(" audio=\"aac\""), "{line}");
    assert!(line.contains(" kbits_per_s="), "{line}");

    let before = log.lines().count();
    for _ in 0..300 {
        let mut junk = TcpStream::connect(site.cloud.rtmp).unwrap();
        // The node may close first.
        let _ = junk.write_all(&[0xff; 3000]);
    }
    wait_for("the node has refused all", SOON, || {
        let metrics = cloud.metrics();
        (metrics.sum("downpour_rtmp_connections_total", &[]) >= 301.0
            && metrics.sum("downpour_rtmp_connections", &[]) <= 1.0)
            .then_some(())
    });
    let lines = cloud.log_text().lines().count() - before;
    assert!(lines <= 20, "{lines} lines for 300 connections");
}
