//! Every byte that goes to an address of `downstream.targets`, where a Go edge may be.

use std::{sync::Arc, time::Duration};

use downpour_distribution::{
    address::Destination,
    downstream::{
        self, Downstream,
        fanout::{self, Pacing},
        outgoing::OutgoingStreams,
        repair_server::RepairServerSettings,
        tap::SenderSettings,
    },
    tls::Identity,
};
use downpour_hub::{Hub, LogLimits};
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::fec::Fec;
use prometheus::Registry;
use tokio::net::UdpSocket;
use tokio_util::sync::CancellationToken;

use crate::common::repair_node::within;

/// A socket in the place of a Go edge, and a node that sends to it.
struct Rig {
    go_edge: UdpSocket,
    hub: Hub,
    outgoing: OutgoingStreams,
    _stop: tokio_util::sync::DropGuard,
}

impl Rig {
    async fn start(repeat_headers: bool) -> Self {
        let go_edge = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let port = go_edge.local_addr().unwrap().port();
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 10_000 });
        let outgoing = OutgoingStreams::new();
        let settings = downstream::Settings {
            streams: SenderSettings {
                history_packets: 100,
                history_age: Duration::from_secs(10),
                payload_max: 1120,
                repeat_headers,
            },
            fanout: Some(fanout::Settings {
                port: 0,
                pacing: Pacing::Targets,
                ..fanout::Settings::default()
            }),
            targets: vec![(Destination::ip([127, 0, 0, 1], port), Fec::Auto)],
            edge_fec: Fec::Auto,
            quic_addr: "127.0.0.1:0".parse().unwrap(),
            repair: RepairServerSettings::default(),
        };
        let identity = Identity::generate().unwrap();
        let node =
            Downstream::bind(settings, &identity, outgoing.clone(), &Registry::new()).unwrap();
        hub.add_sink(node.sink());
        let stop = CancellationToken::new();
        tokio::spawn(node.run((4242, 8090), stop.clone()));
        Self { go_edge, hub, outgoing, _stop: stop.drop_guard() }
    }

    /// The next datagram, whatever it is.
    async fn any(&self) -> Vec<u8> {
        let mut buffer = vec![0; 2048];
        let length = within(self.go_edge.recv(&mut buffer)).await.unwrap();
        buffer.truncate(length);
        buffer
    }

    /// The next datagram that is no announcement.
    async fn rtp(&self) -> Vec<u8> {
        loop {
            let datagram = self.any().await;
            if datagram != ANNOUNCEMENT {
                return datagram;
            }
        }
    }
}

/// `0001`, 4242, 8090.
const ANNOUNCEMENT: [u8; 8] = [0x30, 0x30, 0x30, 0x31, 0x10, 0x92, 0x1f, 0x9a];
const HEADER: &[u8] = &[0x17, 0, 0, 0, 0, 0x01, 0x64, 0x00];
const AAC_HEADER: &[u8] = &[0xaf, 0, 0x12, 0x10];

fn tag(kind: TagKind, timestamp: u32, body: &[u8]) -> Tag {
    Tag::new(kind, timestamp, body).unwrap()
}

/// A packet: what differs between packets, then the payload as it is on the wire.
fn packet(marker: bool, seq: u16, timestamp: u32, ssrc: u32, payload: &[&[u8]]) -> Vec<u8> {
    let first = [0x80, if marker { 0xe4 } else { 0x64 }];
    let (seq, timestamp, ssrc) = (seq.to_be_bytes(), timestamp.to_be_bytes(), ssrc.to_be_bytes());
    [&first[..], &seq[..], &timestamp[..], &ssrc[..], &payload.concat()[..]].concat()
}

#[tokio::test]
async fn a_go_edge_gets_these_bytes_and_no_others() {
    let rig = Rig::start(true).await;
    assert_eq!(rig.any().await, ANNOUNCEMENT);
    let mut publisher = rig.hub.publish("live/a".parse().unwrap()).unwrap();
    let ssrc = rig.outgoing.streams()[0].ssrc().0;
    let long: Vec<u8> = [0x27, 1, 0, 0, 0].into_iter().chain((0..1295).map(|i| i as u8)).collect();
    for tag in [
        tag(TagKind::Script, 0, b"\x02\x00\x0aonMetaData\x05"),
        tag(TagKind::Video, 0, HEADER),
        tag(TagKind::Audio, 0, AAC_HEADER),
        tag(TagKind::Video, 0, &[0x57, 0]),
        tag(TagKind::Audio, 0, &[0xaf]),
        tag(TagKind::Video, 0, &[]),
        tag(TagKind::Audio, 0, &[]),
        tag(TagKind::Video, 16, &[0x17, 1, 0, 0, 0, 0x65]),
        tag(TagKind::Script, 16, b"\x02\x00\x0aonTextData\x05"),
        tag(TagKind::Video, 40, &long),
        tag(TagKind::Video, 40, &[0x17, 2, 0, 0]),
        tag(TagKind::Video, 16_777_216, &[0x17, 1, 0, 0, 0, 0x65]),
        tag(TagKind::Audio, 16_777_217, &[0xaf, 1]),
    ] {
        publisher.push(tag);
    }
    let key: &[u8] = &[9, 0, 0, 6, 0, 0, 0, 1, 0, 0, 0, 0x17, 1, 0, 0, 0, 0x65];
    let late = 16_777_216u32.wrapping_mul(90);
    let expected = [
        packet(true, 65000, 0, ssrc, &[&[9, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0], HEADER]),
        packet(true, 65001, 0, ssrc, &[&[8, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0], AAC_HEADER]),
        packet(
            true,
            65002,
            1440,
            ssrc,
            &[&[9, 0, 0, 6, 0, 0, 16, 0, 0, 0, 0, 0x17, 1, 0, 0, 0, 0x65]],
        ),
        packet(
            false,
            65003,
            3600,
            ssrc,
            &[&[9, 0, 0x05, 0x14, 0, 0, 40, 0, 0, 0, 0], &long[..1120 - 11]],
        ),
        packet(true, 65004, 3600, ssrc, &[&long[1120 - 11..]]),
        // The headers again, with numbers of their own and the key frame's time, one tick late.
        packet(true, 65005, late + 1, ssrc, &[&[9, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0], HEADER]),
        packet(true, 65006, late + 1, ssrc, &[&[8, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0], AAC_HEADER]),
        packet(true, 65007, late, ssrc, &[key]),
        packet(true, 65008, late + 90, ssrc, &[&[8, 0, 0, 2, 0, 0, 1, 1, 0, 0, 0, 0xaf, 1]]),
    ];
    for (i, expected) in expected.iter().enumerate() {
        assert_eq!(rig.rtp().await, *expected, "datagram {i}");
    }
    // The end of a stream sends nothing: the next bytes are those of the next stream.
    drop(publisher);
    let mut publisher = rig.hub.publish("live/b".parse().unwrap()).unwrap();
    publisher.push(tag(TagKind::Audio, 0, AAC_HEADER));
    let next = rig.rtp().await;
    assert_eq!(next[..4], [0x80, 0xe4, 0xfd, 0xe8]);
    assert_eq!(next[12..], *tag(TagKind::Audio, 0, AAC_HEADER).unit());
    assert!(rig.outgoing.streams().iter().any(|s| s.ssrc().0.to_be_bytes() == next[8..12]));
}

#[tokio::test]
async fn headers_are_not_repeated_where_the_setting_is_off() {
    let rig = Rig::start(false).await;
    let mut publisher = rig.hub.publish("live/a".parse().unwrap()).unwrap();
    // The node has looked up its targets once the announcement came.
    assert_eq!(rig.any().await, ANNOUNCEMENT);
    publisher.push(tag(TagKind::Video, 0, HEADER));
    for ms in [0, 40, 80] {
        publisher.push(tag(TagKind::Video, ms, &[0x17, 1, 0, 0, 0, 0x65]));
    }
    for seq in 65000..65004u16 {
        assert_eq!(rig.rtp().await[2..4], seq.to_be_bytes());
    }
    drop(publisher);
    let stream = Arc::clone(&rig.outgoing.streams()[0]);
    assert_eq!(stream.newest_seq().map(|seq| seq.0), Some(65003));
}
