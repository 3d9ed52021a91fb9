//! A cloud with several addresses answers from the one that an edge asked: an edge's firewall lets
//! nothing else in.

use std::{
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::Duration,
};

use downpour_distribution::downstream::{
    edges::Edges,
    fanout::{self, Fanout, FanoutMetrics, OnDatagrams, Pacing},
    outgoing::OutgoingStreams,
    repair_server::{EdgeHandler, EdgeHello},
    routes::Routes,
    subscribers::{ProbeMetrics, Subscribers},
};
use downpour_repair::{control::Nonce, probe::ProbeMessage, rtp::Ssrc};
use prometheus::Registry;
use std::sync::Arc;
use tokio::sync::mpsc;

const NONCE: Nonce = Nonce([3; 16]);

/// All of 127.0.0.0/8 is local.
#[test]
fn challenges_and_rtp_come_from_the_address_that_was_asked() {
    for pacing in [Pacing::Off, Pacing::Targets] {
        let registry = Registry::new();
        let routes = Routes::new(&registry).unwrap();
        let subscribers = Subscribers::new(
            routes.clone(),
            OutgoingStreams::new(),
            Edges::default(),
            ProbeMetrics::register(&registry).unwrap(),
        );
        let probed = subscribers.clone();
        let on_datagrams: OnDatagrams = Arc::new(move |from, bytes| {
            probed.handle_datagrams(std::time::Instant::now(), from, bytes)
        });
        let settings = fanout::Settings { port: 0, pacing, ..fanout::Settings::default() };
        let metrics = FanoutMetrics::register(&registry).unwrap();
        let fanout = Fanout::spawn(&settings, routes.clone(), &on_datagrams, metrics).unwrap();

        let asked = SocketAddr::from(([127, 0, 0, 2], fanout.local_port()));
        let edge = UdpSocket::bind((Ipv4Addr::new(127, 0, 0, 3), 0)).unwrap();
        edge.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // Connected: the kernel drops what comes from any other address.
        edge.connect(asked).unwrap();
        let (outbox, _messages) = mpsc::channel(1);
        let mut session = subscribers
            .hello(&EdgeHello {
                peer: edge.local_addr().unwrap(),
                node: "edge".into(),
                token: None,
                rtp_port: Some(edge.local_addr().unwrap().port()),
                rtp_paths: 1,
                group: None,
                parity: false,
                latency: Duration::from_millis(500),
                nonce: NONCE,
                outbox,
            })
            .unwrap();
        session.subscribed(&["*".parse().unwrap()]);

        edge.send(&ProbeMessage::Probe { path: 0, nonce: NONCE }.encode()).unwrap();
        let mut buffer = [0; 2048];
        let length = edge.recv(&mut buffer).unwrap();
        let Ok((ProbeMessage::Challenge { cookie, .. }, _)) =
            ProbeMessage::parse(&buffer[..length])
        else {
            panic!("{:?}", &buffer[..length]);
        };
        edge.send(&ProbeMessage::Proof { path: 0, nonce: NONCE, cookie }.encode()).unwrap();
        let mut route = routes.route("live/a".parse().unwrap(), Ssrc(7));
        let media = crate::common::wait_for("the path is proven", crate::common::SOON, || {
            let media = route.targets(std::time::Instant::now()).media.clone();
            (!media.is_empty()).then_some(media)
        });
        // One packet, and a train that is segmented.
        for length in [100, 1000] {
            let packets = (0..5).map(|n| bytes::Bytes::from(vec![n; length]));
            for train in fanout::Train::collect(packets) {
                fanout.send(Ssrc(7), train, &media, None);
            }
            for n in 0..5 {
                assert_eq!(edge.recv(&mut buffer).unwrap(), length);
                assert_eq!(buffer[..length], vec![n; length]);
            }
        }
    }
}
