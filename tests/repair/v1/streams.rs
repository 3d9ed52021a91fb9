//! Announcements, repairs, heartbeats and subscriptions.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use bytes::Bytes;
use downpour_distribution::{
    downstream::repair_server::RepairServerSettings,
    protocol::Protocol,
    upstream::repair_client::{RepairClientSettings, RepairEvent},
};
use downpour_media::flv::{Headers, Tag, TagKind};
use downpour_repair::{
    control::{CloudMessage, EdgeMessage},
    message::{Gone, Heartbeat, Message, Nack},
    rtp::{Seq, Ssrc},
};
use quinn::TransportConfig;

use super::{RawEdge, hello, nack, stream_up, welcome};
use crate::common::repair_node::{Cloud, Edge, Feed, edge_settings, within};

async fn heartbeat(edge: &mut Edge, wanted: Heartbeat) {
    let is_it = |event| matches!(event, RepairEvent::Heartbeats(beats) if beats.contains(&wanted));
    edge.wait(|event| is_it(event).then_some(())).await;
}

#[tokio::test]
async fn cloud_announces_updates_and_ends_streams() {
    let cloud = Cloud::start_with(RepairServerSettings {
        node: "cloud-1".into(),
        rtp_port: 5222,
        ..Default::default()
    });
    let mut first = Feed::start(&cloud.origin, "live/first", 1);
    let seqs = first.push(3);
    Feed::start(&cloud.origin, "other/unwanted", 2);
    let mut edge = Edge::start(RepairClientSettings {
        streams: vec!["live/*".parse().unwrap()],
        ..edge_settings(cloud.addr)
    });

    let connected = within(edge.events.recv()).await.unwrap();
    assert_eq!(connected, RepairEvent::Connected { protocol: Protocol::Downpour });
    match within(edge.events.recv()).await.unwrap() {
        RepairEvent::Welcome(welcome) => {
            assert_eq!((welcome.node.as_str(), welcome.rtp_port), ("cloud-1", 5222));
        }
        other => panic!("{other:?}"),
    }
    let info = stream_up(&mut edge).await;
    assert_eq!((info.key.as_str(), info.ssrc, info.start_unix_ms), ("live/first", Ssrc(1), 1234));
    assert_eq!((info.gop_start, info.newest), (Some(seqs[0]), Some(seqs[2])));
    assert_eq!(info.headers, Headers::default());
    assert_eq!(edge.handle.protocol(), Some(Protocol::Downpour));
    assert!(edge.handle.rtt().is_some());

    let second = Feed::start(&cloud.origin, "live/second", 3);
    let info = stream_up(&mut edge).await;
    assert_eq!((info.ssrc, info.gop_start, info.newest), (Ssrc(3), None, None));

    let tag = |kind, body: &[u8]| Tag::new(kind, 0, body).unwrap();
    let headers: Headers = [
        tag(TagKind::Video, &[0x17, 0, 0, 0, 0, 1]),
        tag(TagKind::Audio, &[0xaf, 0, 0x12]),
        tag(TagKind::Script, b"\x02\x00\x0aonMetaData"),
        tag(TagKind::Audio, b"\x95\x00mp4a\x01\x12\x10"),
    ]
    .into_iter()
    .collect();
    second.stream.set_headers(headers.clone());
    cloud.origin.updated(&second.stream);
    let wanted = RepairEvent::StreamUpdate { ssrc: Ssrc(3), headers };
    edge.wait(|event| (event == wanted).then_some(())).await;

    cloud.origin.end(&first.stream);
    let wanted = RepairEvent::StreamEnd { ssrc: Ssrc(1), last_seq: Some(seqs[2]) };
    edge.wait(|event| (event == wanted).then_some(())).await;
    edge.handle.nack(nack(&first, 1, &seqs[2..]));
    assert_eq!(edge.repair().await, first.packet(seqs[2]), "an ended stream can be repaired");

    // The end of a stream is announced before the connection of a stopping cloud closes.
    cloud.origin.end(&second.stream);
    cloud.stop().await;
    let wanted = RepairEvent::StreamEnd { ssrc: Ssrc(3), last_seq: None };
    edge.wait(|event| (event == wanted).then_some(())).await;
    assert_eq!(edge.disconnected().await, "the cloud is shutting down");
}

#[tokio::test]
async fn cloud_answers_nacks_with_repairs_and_gone() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(600);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;

    // Across the wrap. Few enough for any socket buffer, because nothing is requested twice here.
    let wanted = &seqs[510..570];
    let mut asked = wanted.to_vec();
    asked.extend([Seq(64), Seq(900), Seq(64999)]);
    edge.handle.nack(nack(&feed, 1, &asked));
    edge.handle.nack(Nack { ssrc: Ssrc(99), copies: 1, slack_ms: 500, seqs: vec![Seq(1)] });
    let (mut repaired, mut gone) = (HashSet::new(), HashSet::new());
    let deadline = Instant::now() + Duration::from_secs(10);
    while repaired.len() < 60 || gone.len() < 4 {
        assert!(Instant::now() < deadline, "{} {gone:?} {:?}", repaired.len(), cloud.metrics);
        match edge.wait(Some).await {
            RepairEvent::Repair(packet) => {
                let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
                assert_eq!(packet, feed.packet(seq));
                assert!(repaired.insert(seq), "one copy was requested");
            }
            RepairEvent::Gone(part) => {
                gone.extend(part.seqs.into_iter().map(|seq| (part.ssrc.0, seq.0)));
            }
            _ => {}
        }
    }
    // The 600 packets from 65000 on reach to 63.
    assert_eq!(gone, HashSet::from([(7, 64), (7, 900), (7, 64999), (99, 1)]));
    assert_eq!(repaired, wanted.iter().copied().collect());
    let metrics = &cloud.metrics.downpour;
    assert_eq!((metrics.asked.get(), metrics.repairs.get(), metrics.gone.get()), (64, 60, 4));
    assert_eq!(edge.metrics.asked.get(), 64);
    assert_eq!(edge.metrics.repairs.get(), 60);
}

#[tokio::test]
async fn cloud_spaces_copies() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(2);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    welcome(&mut edge).await;
    edge.handle.nack(nack(&feed, 3, &seqs));
    let mut at = Vec::new();
    for i in 0..6 {
        assert_eq!(edge.repair().await, feed.packet(seqs[i % 2]));
        at.push(Instant::now());
    }
    assert!(at[5] - at[0] >= Duration::from_millis(4), "{:?}", at[5] - at[0]);
    assert_eq!(cloud.metrics.downpour.repairs.get(), 6);
    assert_eq!(cloud.metrics.downpour.asked.get(), 2);
}

#[tokio::test]
async fn heartbeats_reveal_a_lost_tail() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let mut edge = Edge::start(edge_settings(cloud.addr));
    stream_up(&mut edge).await;
    let seqs = feed.push(5);
    let pushed = Instant::now();
    let beat = Heartbeat { ssrc: Ssrc(7), last: seqs[4] };
    heartbeat(&mut edge, beat).await;
    assert!(pushed.elapsed() < Duration::from_millis(500), "{:?}", pushed.elapsed());
    for _ in 0..3 {
        heartbeat(&mut edge, beat).await;
    }
    assert!(pushed.elapsed() >= Duration::from_millis(190), "heartbeats become less frequent");
}

#[tokio::test]
async fn cloud_sends_oversized_messages_on_streams() {
    let cloud = Cloud::start();
    let mut feed = Feed::start(&cloud.origin, "live/a", 7);
    let seqs = feed.push(20);
    let mut small = TransportConfig::default();
    small.datagram_receive_buffer_size(Some(600));
    let mut none = TransportConfig::default();
    none.datagram_receive_buffer_size(None);
    for transport in [small, none] {
        let edge = RawEdge::hello(cloud.addr, transport).await;
        // This nack is sent on a stream, too.
        let mut stream = edge.connection.open_uni().await.unwrap();
        stream.write_all(&nack(&feed, 1, &seqs).encode(2000)[0]).await.unwrap();
        stream.finish().unwrap();
        let mut repaired = HashSet::new();
        for _ in &seqs {
            let mut stream = within(edge.connection.accept_uni()).await.unwrap();
            let message = Bytes::from(within(stream.read_to_end(2048)).await.unwrap());
            let Ok(Message::Repair(packet)) = Message::parse(message) else { panic!() };
            let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
            assert_eq!(packet, feed.packet(seq));
            repaired.insert(seq);
        }
        assert_eq!(repaired.len(), 20);
    }
}

#[tokio::test]
async fn edge_changes_its_subscriptions() {
    let cloud = Cloud::start();
    let a = Feed::start(&cloud.origin, "live/a", 1);
    let mut b = Feed::start(&cloud.origin, "live/b", 2);
    let seqs = b.push(1);
    let mut edge = RawEdge::dial(cloud.addr, TransportConfig::default()).await;
    edge.send(&hello(&["live/a"])).await;
    assert!(matches!(edge.receive().await, CloudMessage::Welcome(_)));
    assert!(matches!(edge.receive().await, CloudMessage::StreamUp(info) if info.ssrc == Ssrc(1)));

    // A stream that is not subscribed to is not repaired either.
    let ask = nack(&b, 1, &seqs).encode(1000).remove(0);
    edge.connection.send_datagram(ask.clone()).unwrap();
    let answer = within(edge.connection.read_datagram()).await.unwrap();
    assert_eq!(
        Message::parse(answer),
        Ok(Message::Gone(Gone { ssrc: Ssrc(2), seqs: seqs.clone() }))
    );

    edge.send(&EdgeMessage::Subscribe { streams: vec!["live/*".parse().unwrap()] }).await;
    assert!(matches!(edge.receive().await, CloudMessage::StreamUp(info) if info.ssrc == Ssrc(2)));
    edge.connection.send_datagram(ask).unwrap();
    within(async {
        loop {
            let datagram = edge.connection.read_datagram().await.unwrap();
            if let Ok(Message::Repair(packet)) = Message::parse(datagram) {
                return assert_eq!(packet, b.packet(seqs[0]));
            }
        }
    })
    .await;

    edge.send(&EdgeMessage::Unsubscribe { streams: vec!["live/*".parse().unwrap()] }).await;
    // Unknown messages are ignored.
    edge.send.write_all(b"\0\0\0\x10{\"type\":\"dance\"}").await.unwrap();
    edge.send(&EdgeMessage::Subscribe { streams: vec!["x/y".parse().unwrap()] }).await;
    Feed::start(&cloud.origin, "x/y", 3);
    assert!(matches!(edge.receive().await, CloudMessage::StreamUp(info) if info.ssrc == Ssrc(3)));
    cloud.origin.end(&b.stream);
    cloud.origin.end(&a.stream);
    let message = edge.receive().await;
    assert_eq!(message, CloudMessage::StreamEnd { ssrc: Ssrc(1), last_seq: None });
}

#[tokio::test]
async fn slow_edge_receives_the_final_state() {
    let cloud = Cloud::start();
    let mut transport = TransportConfig::default();
    transport.stream_receive_window(2000u32.into());
    let mut edge = RawEdge::hello(cloud.addr, transport).await;
    let feeds: Vec<_> =
        (1..=3000).map(|i| Feed::start(&cloud.origin, &format!("live/{i}"), i)).collect();
    for feed in feeds.iter().step_by(2) {
        cloud.origin.end(&feed.stream);
        cloud.origin.remove(feed.ssrc());
    }
    let live: HashSet<_> = feeds.iter().skip(1).step_by(2).map(|feed| feed.ssrc().0).collect();
    let mut announced = HashSet::new();
    while announced != live {
        match edge.receive().await {
            CloudMessage::StreamUp(info) => assert!(announced.insert(info.ssrc.0)),
            CloudMessage::StreamEnd { ssrc, .. } => assert!(announced.remove(&ssrc.0)),
            other => panic!("{other:?}"),
        }
    }
}
