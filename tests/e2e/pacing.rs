//! A cloud that paces: bursts come spread and in order, and nobody asks for what is on its way.

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
fn bursts_come_spread_and_in_order_and_edges_ask_for_next_to_nothing() {
    let port = ports::free_for_rtp();
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).unwrap();
    socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    // Both edges, the real one by its hello.
    let site = SiteSettings { dynamic: true, ..SiteSettings::default() }
        .with_cloud("pacing: {factor: 1.5}")
        .with_cloud(&format!("client_addr_list: [\"127.0.0.1:{port}\"]"))
        .start();
    site.edges[0].until_connected();
    site.until_targets(1);
    let listener = thread::spawn(move || listen(&socket));
    let viewer = site.watch(KEY);
    // 8 Mbit/s at 25 frames a second: 36 packets each.
    let push = site.push(media::heavy(), KEY);
    let pulled = viewer.until_end(PUSH);
    push.until_done(PUSH);
    assert_same_to_the_end(&media::heavy().tags, &pulled, Timestamps::Exact);
    let metrics = site.edges[0].node.metrics();
    let asked = metrics.sum("downpour_repair_client_asked_total", &[]);

    let packets = listener.join().unwrap();
    assert!(packets.len() > 10_000, "{} packets", packets.len());
    // A processor's queue for loopback is short, and all tests share it, so a few may be lost, and
    // asked for. Heartbeats of what has not left had 543 asked for.
    let few = packets.len() / 100;
    println!("{} packets, {asked} asked for", packets.len());
    assert!(asked <= few as f64, "{asked} asked for");
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
        .map(|burst| burst[burst.len() - 1].came - burst[0].came)
        .collect();
    spans.sort();
    // Two thirds of 40 ms, less the last group's; a machine that is busy makes them longer.
    let median = spans[spans.len() / 2];
    println!("{} bursts, half of them longer than {median:?}", spans.len());
    assert!(spans.len() > 300 && median >= Duration::from_millis(12), "{median:?}");
}

struct Came {
    came: Instant,
    seq: u16,
    timestamp: u32,
}

/// All RTP until none comes.
fn listen(socket: &UdpSocket) -> Vec<Came> {
    let (mut packets, mut buffer) = (Vec::new(), [0; 2000]);
    let mut begun = false;
    loop {
        match socket.recv(&mut buffer) {
            Ok(12..) if buffer[0] == 0x80 => {
                begun = true;
                packets.push(Came {
                    came: Instant::now(),
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

fn ended(last: &Came) -> bool {
    last.came.elapsed() > Duration::from_secs(3)
}
