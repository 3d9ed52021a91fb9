//! Reports of more streams than fit in one message.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use crate::common::repair_node::{Cloud, Edge, edge_settings, until};
use downpour_distribution::{
    downstream::{
        outgoing::{OutgoingStream, OutgoingStreams},
        repair_server::{EdgeHandler, EdgeHello, EdgeSession, RepairServer, RepairServerMetrics},
    },
    tls::Identity,
    upstream::repair_client::RepairEvent,
};
use downpour_media::{
    StreamPattern,
    flv::{Headers, Tag, TagKind},
};
use downpour_repair::{
    control::{MAX_REPORTED, Report, StreamReport},
    history::History,
    rtp::Ssrc,
};
use prometheus::Registry;

/// The last report of each stream, and the number of reports.
#[derive(Clone, Default)]
struct Ledger(Arc<Mutex<(HashMap<u32, u64>, usize)>>);

impl EdgeHandler for Ledger {
    fn hello(&self, _: &EdgeHello) -> Result<Box<dyn EdgeSession>, String> {
        Ok(Box::new(self.clone()))
    }

    fn v0_connected(&self, _: SocketAddr) -> Box<dyn Send> {
        Box::new(())
    }
}

impl EdgeSession for Ledger {
    fn subscribed(&mut self, _: &[StreamPattern]) {}

    fn reported(&mut self, report: Report) {
        assert!(report.streams.len() <= MAX_REPORTED);
        let mut ledger = self.0.lock().unwrap();
        ledger.1 += 1;
        ledger.0.extend(report.streams.iter().map(|stream| (stream.ssrc, stream.received)));
    }
}

/// The cloud announces all streams at the same time. Both directions exceed the flow-control window.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edge_reports_thousands_of_streams() {
    let origin = OutgoingStreams::new();
    let mut body = vec![0; 1000];
    body[..2].copy_from_slice(&[0x17, 0]);
    let header = Tag::new(TagKind::Video, 0, &body).unwrap();
    let headers: Headers = std::iter::once(header).collect();
    for ssrc in 0..STREAMS {
        let history = History::new(1, std::time::Duration::from_secs(1));
        let key = format!("live/{ssrc}").parse().unwrap();
        let stream = OutgoingStream::new(key, Ssrc(ssrc), 0, history);
        stream.set_headers(headers.clone());
        origin.insert(Arc::new(stream));
    }
    let identity = Arc::new(Identity::generate().unwrap());
    let metrics = RepairServerMetrics::register(&Registry::new()).unwrap();
    let ledger = Ledger::default();
    let addr = "127.0.0.1:0".parse().unwrap();
    let settings = Default::default();
    let server = RepairServer::bind(addr, &identity, origin.clone(), settings, metrics.clone())
        .unwrap()
        .with_handler(Arc::new(ledger.clone()));
    let cloud = Cloud::run(server, origin, identity, metrics);

    let mut edge = Edge::start(edge_settings(cloud.addr));
    edge.wait(|event| matches!(event, RepairEvent::Welcome(_)).then_some(())).await;
    let parts = (STREAMS as usize).div_ceil(MAX_REPORTED);
    for round in 1..=3 {
        let about = |ssrc| StreamReport { ssrc, received: round, ..StreamReport::default() };
        edge.handle.report(Report { round_trip_us: 9, streams: (0..STREAMS).map(about).collect() });
        let all = |ledger: &HashMap<_, _>| {
            ledger.len() == STREAMS as usize && ledger.values().all(|received| *received == round)
        };
        until(|| all(&ledger.0.lock().unwrap().0)).await;
        assert_eq!(ledger.0.lock().unwrap().1, round as usize * parts);
    }
    // An empty report is sent, too.
    edge.handle.report(Report::default());
    until(|| ledger.0.lock().unwrap().1 == 3 * parts + 1).await;
    let mut ups = 0;
    while ups < STREAMS {
        edge.wait(|event| match event {
            RepairEvent::StreamUp(_) => Some(()),
            RepairEvent::Disconnected { reason } => panic!("{reason}"),
            _ => None,
        })
        .await;
        ups += 1;
    }
    assert_eq!(edge.metrics.connects.get(), 1);
}

const STREAMS: u32 = 3000;
