//! Signals of a node: reload, a log file that is opened again, and a network that comes later.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use crate::common::{SOON, media, node::SiteSettings, ports, process::Guard, wait_for};

#[test]
fn hangup_reloads_targets_log_level_and_certificate_and_never_kills() {
    let mut site = SiteSettings { edges: 1, dynamic: true, ..SiteSettings::default() }
        .with_cloud("log_level: info")
        .with_cloud("enable_log_file: true")
        .start();
    let edge = &site.edges[0];
    edge.until_connected();
    site.until_targets(1);
    let cloud = &mut site.cloud.node;
    let fingerprints = |log: &str| log.matches("certificate reloaded fingerprint=").count();

    // A file with a mistake changes nothing.
    let config = cloud.config();
    cloud.set_config(&config.replace("log_level: info", "log_level: loud"));
    cloud.signal("HUP");
    cloud.until_logged("settings not reloaded; nothing was changed");

    // A new certificate, one more address, another level and a key that needs a restart.
    for file in ["downpour-cert.pem", "downpour-key.pem"] {
        fs::remove_file(cloud.file(file)).unwrap();
    }
    let target = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    target.set_read_timeout(Some(SOON)).unwrap();
    let list = format!("client_addr_list: [\"{}\"]", target.local_addr().unwrap());
    let changed = config
        .replace("client_addr_list: []", &list)
        .replace("log_level: info", "log_level: debug\nmax_edges: 77");
    assert_ne!(changed, config);
    cloud.set_config(&changed);
    cloud.signal("HUP");
    cloud.until_logged("certificate not reloaded; the old one stays");
    cloud
        .until_logged("changed settings take effect after a restart keys=\"downstream.max_edges\"");
    let mut announcement = [0; 64];
    assert_eq!(target.recv(&mut announcement).unwrap(), 8, "no announcement to the new address");
    assert_eq!(&announcement[..4], b"0001");
    make_certificate(&cloud.file("downpour-cert.pem"), &cloud.file("downpour-key.pem"));
    cloud.signal("HUP");
    wait_for("the certificate is reloaded", SOON, || {
        (fingerprints(&cloud.log_text()) == 1).then_some(())
    });

    // The log file is moved away and opened again.
    let log = cloud.file("logs/cloud.log");
    let moved = cloud.file("logs/moved.log");
    fs::rename(&log, &moved).unwrap();
    cloud.signal("USR1");
    wait_for("the log file is opened again", SOON, || {
        fs::read_to_string(&log).ok()?.contains("log file opened again").then_some(())
    });
    assert!(fs::read_to_string(&moved).unwrap().contains("cloud started"));
    cloud.signal("USR2");
    cloud.until_logged("SIGUSR2 ignored");

    // It works on, and logs what it did not log before.
    let push = site.push(media::full(), "live/movie");
    let viewer = site.watch("live/movie");
    viewer.wait_tags(20, SOON);
    site.cloud.node.until_logged("DEBUG downpour");
    site.cloud.node.assert_running();
    drop(push);
    assert!(site.cloud.node.terminate().0.success());
}

/// The certificate of another node.
fn make_certificate(cert: &std::path::Path, key: &std::path::Path) {
    let made = downpour_distribution::tls::Identity::load_or_create(cert, key);
    made.expect("cannot make a certificate");
}

#[test]
fn edge_waits_for_an_address_that_is_not_there_yet() {
    // An address for documentation (RFC 5737): no machine has it.
    let (status, log) = started("rtp: {addr: '203.0.113.9:5222'}", "waiting");
    assert!(log.contains("rtp.addr: 203.0.113.9:5222 is not an address of this machine"), "{log}");
    assert_eq!(status, Some(0), "{log}");
}

#[test]
fn exit_code_is_2_for_settings_alone() {
    let (status, log) = started("rtp: {addr: 5}", "is not valid");
    assert_eq!(status, Some(2), "{log}");
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap();
    let (status, log) = started(&format!("rtp: {{addr: '{addr}'}}"), "is in use");
    assert_eq!(status, Some(1), "{log}");
}

/// Starts an edge with this line in its file, waits until it logs `message`, and terminates it if it
/// runs. Returns its exit code and log.
#[track_caller]
fn started(line: &str, message: &str) -> (Option<i32>, String) {
    let dir = tempfile::tempdir().unwrap();
    let http = ports::free();
    let text = format!("{line}\nhttp: {{addr: '127.0.0.1:{http}'}}\n");
    fs::write(dir.path().join("edge.yaml"), text).unwrap();
    let log = dir.path().join("log");
    let file = fs::File::create(&log).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_downpour"))
        .arg("edge")
        .current_dir(dir.path())
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(file)
        .spawn()
        .unwrap();
    let logged = || fs::read_to_string(&log).unwrap();
    wait_for(&format!("the edge logs {message}"), SOON, || {
        logged().contains(message).then_some(())
    });
    let ended = wait_for("it runs or has ended", SOON, || match child.try_wait().unwrap() {
        Some(status) => Some(Some(status)),
        None if logged().contains("waiting") => Some(None),
        None => None,
    });
    let status = match ended {
        Some(status) => status,
        None => Guard::new(child).interrupt_within(Duration::from_secs(20)),
    };
    (status.code(), logged())
}
