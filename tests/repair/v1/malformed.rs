//! Peers that violate the protocol.

use bytes::Bytes;
use downpour_distribution::tls::Identity;
use downpour_media::StreamPattern;
use downpour_repair::{
    control::{EdgeMessage, encode_control},
    message::{Nack, encode_repair},
    rtp::{Seq, Ssrc},
};
use quinn::TransportConfig;

use super::{RawEdge, hello};
use crate::common::repair_node::{Cloud, Edge, edge_settings, until};

#[tokio::test]
async fn cloud_closes_a_malformed_edge_with_a_reason() {
    let cloud = Cloud::start();
    let frame = |json: &str| [&(json.len() as u32).to_be_bytes()[..], json.as_bytes()].concat();
    let two_hellos = [
        encode_control(&hello(&[])).unwrap().to_vec(),
        encode_control(&hello(&[])).unwrap().to_vec(),
    ]
    .concat();
    let patterns: Vec<StreamPattern> =
        (0..1025).map(|i| format!("live/{i}").parse().unwrap()).collect();
    let mut many = encode_control(&hello(&[])).unwrap().to_vec();
    many.extend(encode_control(&EdgeMessage::Subscribe { streams: patterns }).unwrap());
    let cases: [(Vec<u8>, &str); 7] = [
        (frame(r#"{"type":"report"}"#), "the first message was not hello"),
        (frame("nonsense"), "invalid control message"),
        (frame(r#"{"type":"hello","version":1,"node":"e","streams":["?"]}"#), "stream pattern"),
        (vec![0, 0, 0, 0], "control message of 0 bytes"),
        (vec![0xff; 4], "control message of 4294967295 bytes"),
        (two_hellos, "hello came twice"),
        (many, "more than 1024 stream patterns"),
    ];
    let count = cases.len() as u64;
    for (bytes, wanted) in cases {
        let mut edge = RawEdge::dial(cloud.addr, TransportConfig::default()).await;
        edge.send.write_all(&bytes).await.unwrap();
        let (code, reason) = edge.closed().await;
        assert_eq!(code, 1, "{reason}");
        assert!(reason.contains(wanted), "{reason:?} should contain {wanted:?}");
    }
    assert_eq!(cloud.metrics.malformed.get(), count);

    let datagrams: [(&[u8], &str); 3] = [
        (&[1, 9, 0, 0, 0, 7, 0, 1, 0, 0], "nack for 9 copies"),
        (&[1, 1, 0, 0], "length does not match"),
        (&[4, 0, 0, 0, 0, 7, 0, 1], "a message that only the cloud sends"),
    ];
    for (datagram, wanted) in datagrams {
        let edge = RawEdge::hello(cloud.addr, TransportConfig::default()).await;
        edge.connection.send_datagram(Bytes::from_static(&[250, 1, 2])).unwrap();
        edge.connection.send_datagram(Bytes::copy_from_slice(datagram)).unwrap();
        let (code, reason) = edge.closed().await;
        assert!(code == 1 && reason.contains(wanted), "{code} {reason:?}");
    }
    until(|| cloud.metrics.malformed.get() == count + 3).await;

    let edge = RawEdge::hello(cloud.addr, TransportConfig::default()).await;
    let mut stream = edge.connection.open_uni().await.unwrap();
    let _ = stream.write_all(&[1; 5000]).await;
    let _ = stream.finish();
    assert!(edge.closed().await.1.contains("at most 2048 are allowed"));
}

#[tokio::test]
async fn cloud_closes_an_edge_without_hello() {
    let cloud = Cloud::start();
    let edge = RawEdge::dial(cloud.addr, TransportConfig::default()).await;
    assert_eq!(edge.closed().await, (2, "no hello came in time".into()));
    assert_eq!(cloud.metrics.refused_edge.get(), 1);
}

#[tokio::test]
async fn edge_closes_a_malformed_cloud_with_a_reason() {
    let identity = Identity::generate().unwrap();
    let config = identity.server_config(&[b"downpour/1"]).unwrap();
    let endpoint = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = endpoint.local_addr().unwrap();
    // Each connection violates the protocol in another way.
    let welcome = br#"{"type":"welcome","version":1,"node":"c","rtp_port":1,"nonce":"00000000000000000000000000000000"}"#;
    let frame = |json: &[u8]| [&(json.len() as u32).to_be_bytes()[..], json].concat();
    let violations: Vec<(Vec<u8>, Option<Bytes>)> = vec![
        (frame(br#"{"type":"later"}"#), None),
        (vec![0, 0x20, 0, 0], None),
        ([frame(welcome), frame(welcome)].concat(), None),
        (frame(welcome), Some(Bytes::from_static(&[2, 0x80]))),
        (
            frame(welcome),
            Nack { ssrc: Ssrc(1), copies: 1, slack_ms: 500, seqs: vec![Seq(1)] }.encode(100).pop(),
        ),
    ];
    let served = violations.clone();
    tokio::spawn(async move {
        for (control, datagram) in served {
            let connection = endpoint.accept().await.unwrap().await.unwrap();
            let (mut send, _recv) = connection.accept_bi().await.unwrap();
            send.write_all(&control).await.unwrap();
            if let Some(datagram) = datagram {
                connection.send_datagram(encode_repair(&[0x80; 20])).unwrap();
                connection.send_datagram(datagram).unwrap();
            }
            connection.closed().await;
        }
    });
    let mut edge = Edge::start(edge_settings(addr));
    for wanted in
        ["not welcome", "2097152 bytes", "welcome came twice", "does not match its type", "nack"]
    {
        let reason = edge.disconnected().await;
        assert!(reason.contains("broke the protocol") && reason.contains(wanted), "{reason}");
    }
    assert_eq!(edge.metrics.malformed.get(), violations.len() as u64);
    assert_eq!(edge.metrics.connected_downpour.get(), 0);
}
