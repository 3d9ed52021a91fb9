//! Peers that violate the protocol, stall, disconnect or connect in thousands. The cloud keeps running,
//! its memory is bounded, and a well-behaved stream is not affected.

use std::{
    io,
    net::{Shutdown, TcpStream},
    time::{Duration, Instant},
};

use crate::common::{
    SOON,
    compare::{Timestamps, assert_same_to_the_end},
    media::{self, Encoder},
    node::Site,
    rtmp::{self, Peer},
    viewer::Viewer,
    wait_for,
};
use downpour::node::limits::raise_descriptors;

const KEY: &str = "live/honest";
const PUSH: Duration = Duration::from_secs(60);
/// Maximum memory of the cloud since its start.
const MEMORY_BOUND: u64 = 64 << 20;
/// The same with 8192 connections of some 10 KiB each.
const CROWDED_MEMORY_BOUND: u64 = 128 << 20;

/// 400 connections with 4 chunk streams each, whose messages claim 16 MB: 25 GB.
#[test]
fn claimed_message_lengths_do_not_allocate_memory() {
    let honest = Honest::start();
    let peers: Vec<_> = (0..400)
        .map(|number| {
            let mut peer = Peer::handshaken(honest.site.cloud.rtmp).unwrap();
            // Half of them publish, so that long messages are allowed.
            if number % 2 == 0 {
                peer.publish("live", &format!("liar{number}"), 128).unwrap();
                peer.until_answer("NetStream.Publish.Start").unwrap();
            }
            for chunk_stream in 4..8 {
                let header = rtmp::header(chunk_stream, rtmp::VIDEO, 1, 0xff_ffff);
                // The node may have closed the connection at the first one.
                let _ = peer.send(&[&header[..], &[0x17; 10]].concat());
            }
            peer
        })
        .collect();
    honest.until_done(MEMORY_BOUND);
    drop(peers);
}

#[test]
fn cloud_closes_connections_with_deeply_nested_amf() {
    let honest = Honest::start();
    // The shorter ones are within the limit of a command's length, so only the depth exceeds a limit.
    for nested in [
        rtmp::nested_objects(100_000),
        rtmp::nested_arrays(100_000),
        rtmp::nested_objects(15_000),
        rtmp::nested_arrays(12_000),
    ] {
        let lies = [
            // As the first message, as the object of a command, and as metadata of a publisher.
            (rtmp::COMMAND, [&nested[..]].concat(), false),
            (
                rtmp::COMMAND,
                [rtmp::string("connect"), rtmp::number(1.0), nested.clone()].concat(),
                false,
            ),
            (
                rtmp::DATA,
                [rtmp::string("@setDataFrame"), rtmp::string("onMetaData"), nested.clone()]
                    .concat(),
                true,
            ),
            (rtmp::DATA, [rtmp::string("onMetaData"), nested.clone()].concat(), true),
        ];
        for (kind, body, publishes) in lies {
            let mut peer = Peer::handshaken(honest.site.cloud.rtmp).unwrap();
            if publishes {
                peer.publish("live", "deep", 128).unwrap();
                peer.until_answer("NetStream.Publish.Start").unwrap();
            }
            // Fails if the node closes the connection early, which is allowed.
            let _ = peer.message(kind, u32::from(publishes), &body, 128);
            let _ = peer.socket().shutdown(Shutdown::Write);
            peer.until_closed(SOON).unwrap();
        }
    }
    honest.until_done(MEMORY_BOUND);
}

/// §5.4.1 allows 1 to 2³¹-1. Other sizes end the connection.
#[test]
fn cloud_closes_connections_with_invalid_chunk_sizes() {
    let honest = Honest::start();
    for size in [0_u32, 1 << 31, u32::MAX] {
        let mut peer = Peer::handshaken(honest.site.cloud.rtmp).unwrap();
        peer.message(rtmp::SET_CHUNK_SIZE, 0, &size.to_be_bytes(), 128).unwrap();
        peer.until_closed(SOON).unwrap_or_else(|error| panic!("chunk size {size}: {error}"));
    }
    for size in [1_u32, 0x7fff_ffff] {
        let mut peer = Peer::handshaken(honest.site.cloud.rtmp).unwrap();
        peer.message(rtmp::SET_CHUNK_SIZE, 0, &size.to_be_bytes(), 128).unwrap();
        let name = format!("chunks{size}");
        peer.publish("live", &name, size as usize).unwrap();
        peer.until_answer("NetStream.Publish.Start").unwrap();
        if size > 1 {
            // A chunk of the maximum message length, of which only a few bytes are sent.
            let header = rtmp::header(4, rtmp::VIDEO, 1, 0xff_ffff);
            peer.send(&[&header[..], &[0x17; 10]].concat()).unwrap();
        }
    }
    honest.until_done(MEMORY_BOUND);
}

/// A window of 0 must not cause a division by zero or an acknowledgement per byte.
#[test]
fn cloud_accepts_an_acknowledgement_window_of_zero() {
    let honest = Honest::start();
    for window in [0_u32, 1, u32::MAX] {
        let mut peer = Peer::handshaken(honest.site.cloud.rtmp).unwrap();
        peer.message(rtmp::WINDOW_SIZE, 0, &window.to_be_bytes(), 128).unwrap();
        peer.publish("live", &format!("window{window}"), 128).unwrap();
        peer.until_answer("NetStream.Publish.Start").unwrap();
        // The peer does not read the acknowledgements.
        for _ in 0..2000 {
            if peer.message(rtmp::VIDEO, 1, &[0x27, 1, 0, 0, 0, 1, 2, 3], 128).is_err() {
                break;
            }
        }
    }
    honest.until_done(MEMORY_BOUND);
}

/// A connection that ends after each byte of the handshake, in order and with a reset.
#[test]
fn cloud_releases_connections_with_a_partial_handshake() {
    let honest = Honest::start();
    let whole = [rtmp::client_hello(), vec![7; rtmp::HANDSHAKE_LEN]].concat();
    for len in 0..=whole.len() {
        let mut peer = Peer::connect(honest.site.cloud.rtmp).unwrap();
        peer.send(&whole[..len]).unwrap();
        if len % 2 == 0 {
            // A reset, which discards undelivered data.
            socket2::SockRef::from(peer.socket()).set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    // The node has released all of them.
    let cloud = &honest.site.cloud.node;
    wait_for("the broken connections are gone", SOON, || {
        (cloud.metrics().sum("downpour_rtmp_connections", &[]) <= 1.0).then_some(())
    });
    honest.until_done(MEMORY_BOUND);
}

/// Ten thousand connections without data, of which the cloud keeps 8192.
#[test]
fn ten_thousand_idle_connections() {
    // The cloud inherits the limit.
    let files = raise_descriptors(65_536).unwrap().soft as usize;
    // This process and the cloud each need one descriptor per connection and some others.
    let count = 10_000.min(files.saturating_sub(1500));
    let honest = Honest::start();
    let node = &honest.site.cloud.node;
    let addr = honest.site.cloud.rtmp;
    let mut peers = Vec::with_capacity(count);
    let until = Instant::now() + Duration::from_secs(30);
    while peers.len() < count {
        assert!(Instant::now() < until, "only {} connections", peers.len());
        match TcpStream::connect_timeout(&addr, Duration::from_secs(5)) {
            Ok(peer) => peers.push(peer),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            Err(error) => panic!("connection {}: {error}", peers.len()),
        }
    }
    // Those that exceed the limit are closed: the longest idle ones in favour of new ones, or by the
    // idle timeout if connecting took long.
    let beyond = count.saturating_sub(8192 - 1);
    wait_for("as many connections as exceed the limit are closed", SOON, || {
        let metrics = node.metrics();
        let displaced = metrics.sum("downpour_rtmp_displaced_total", &[]);
        let closed = metrics.sum("downpour_rtmp_closed_total", &[]) as usize;
        (closed >= beyond && (beyond == 0 || displaced > 0.0)).then_some(())
    });
    assert!(node.metrics().sum("downpour_rtmp_connections", &[]) <= 8192.0);
    // Silent connections are closed by the timeout.
    let mut last = Peer::connect(addr).unwrap();
    last.until_closed(SOON).unwrap();
    drop(peers);
    wait_for("the idle connections are gone", SOON, || {
        (node.metrics().sum("downpour_rtmp_connections", &[]) <= 1.0).then_some(())
    });
    honest.until_done(CROWDED_MEMORY_BOUND);
}

/// A well-behaved stream and its viewer.
struct Honest {
    site: Site,
    push: Encoder,
    viewer: Viewer,
}

impl Honest {
    /// Starts both and waits for media.
    fn start() -> Self {
        let site = Site::start();
        site.edges[0].until_connected();
        let viewer = site.watch(KEY);
        let push = site.push(media::full_at(2), KEY);
        viewer.wait_tags(10, SOON);
        Self { site, push, viewer }
    }

    /// Asserts that the viewer received the whole stream, that the cloud runs within its memory bound,
    /// and that it accepts another publisher.
    #[track_caller]
    fn until_done(self, memory_bound: u64) {
        let Self { mut site, push, viewer } = self;
        let pulled = viewer.until_end(PUSH);
        push.until_done(PUSH);
        assert_same_to_the_end(&media::full_at(2).tags, &pulled, Timestamps::Exact);
        site.cloud.node.assert_running();
        site.edges[0].node.assert_running();
        assert!(site.cloud.node.health().is_some(), "the cloud does not respond");
        let peak = site.cloud.node.peak_memory();
        println!("the cloud used {} MiB", peak >> 20);
        assert!(peak < memory_bound, "the cloud used {} MiB", peak >> 20);
        let mut next = Peer::handshaken(site.cloud.rtmp).unwrap();
        next.publish("live", "next", 128).unwrap();
        next.until_answer("NetStream.Publish.Start").unwrap();
    }
}
