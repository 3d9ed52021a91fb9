//! A cloud with pacing: bursts are spread and in order, and edges do not request packets that are still
//! queued.

use std::{
    net::{Ipv4Addr, UdpSocket},
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    compare::{Timestamps, assert_same_to_the_end},
    media,
    node::SiteSettings,
    ports,
};

const KEY: &str = "live/movie";
const PUSH: Duration = Duration::from_secs(60);

#[test]
fn cloud_spreads_bursts_without_causing_requests() {
    let port = ports::free_for_rtp();
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    // A listener in the list, and a dynamic edge.
    let site = SiteSettings { dynamic: true, ..SiteSettings::default() }
        .with_cloud("pacing: {factor: 1.5}")
        .with_cloud(&format!("client_addr_list: [\"127.0.0.1:{port}\"]"))
        .start();
    site.edges[0].until_connected();
    site.until_targets(1);
    let listener = thread::spawn(move || listen(&socket));
    let viewer = site.watch(KEY);
    // 8 Mbit/s at 25 frames per second: 36 packets per frame.
    let push = site.push(media::heavy(), KEY);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::heavy().tags, &pulled, Timestamps::Exact);
    let metrics = site.edges[0].node.metrics();
    let requested = metrics.sum("downpour_repair_client_asked_total", &[]);

    let packets = listener.join().unwrap();
    assert!(packets.len() > 10_000, "{} packets", packets.len());
    // The kernel's queue for loopback is short and shared by all tests, so a few may be lost and
    // requested. Heartbeats that include queued packets caused 543 requests.
    let few = packets.len() / 100;
    println!("{} packets, {requested} requested", packets.len());
    assert!(requested <= few as f64, "{requested} requested");
    let mut missing = 0;
    for pair in packets.windows(2) {
        let ahead = pair[1].seq.wrapping_sub(pair[0].seq);
        assert!((1..1000).contains(&ahead), "{} after {}", pair[1].seq, pair[0].seq);
        missing += usize::from(ahead - 1);
    }
    assert!(missing <= few, "{missing} are missing");
    let mut spans: Vec<_> = packets
        .chunk_by(|a, b| a.timestamp == b.timestamp)
        .filter(|burst| burst.len() >= 24)
        .map(|burst| burst[burst.len() - 1].at - burst[0].at)
        .collect();
    spans.sort();
    // Two thirds of 40 ms, minus the last group of packets. On a busy machine they are longer.
    let median = spans[spans.len() / 2];
    println!("{} bursts, median length {median:?}", spans.len());
    assert!(spans.len() > 300 && median >= Duration::from_millis(12), "{median:?}");
}

struct Received {
    at: Instant,
    seq: u16,
    timestamp: u32,
}

/// Receives RTP until none arrives for 3 s.
fn listen(socket: &UdpSocket) -> Vec<Received> {
    let (mut packets, mut buffer) = (Vec::new(), [0; 2000]);
    let mut begun = false;
    loop {
        match socket.recv(&mut buffer) {
            Ok(12..) if buffer[0] == 0x80 => {
                begun = true;
                packets.push(Received {
                    at: Instant::now(),
                    seq: u16::from_be_bytes([buffer[2], buffer[3]]),
                    timestamp: u32::from_be_bytes([buffer[4], buffer[5], buffer[6], buffer[7]]),
                });
            }
            // Announcements, every few seconds.
            Ok(_) if begun && packets.last().is_some_and(ended) => return packets,
            Err(_) if begun => return packets,
            Ok(_) | Err(_) => {}
        }
    }
}

fn ended(last: &Received) -> bool {
    last.at.elapsed() > Duration::from_secs(3)
}
