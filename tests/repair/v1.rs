//! `downpour/1`: our edge and our cloud, and each against a peer that violates the protocol.

mod budget;
mod connection;
mod malformed;
mod streams;

use std::net::SocketAddr;

use downpour_distribution::upstream::repair_client::RepairEvent;
use downpour_repair::{
    control::{CloudMessage, ControlReader, EdgeMessage, Hello, StreamInfo, encode_control},
    message::Nack,
    rtp::Seq,
};
use quinn::{Connection, ConnectionError, RecvStream, SendStream, TransportConfig};

use crate::common::repair_node::{Edge, Feed, dial, quic_client, within};

fn nack(feed: &Feed, copies: u8, seqs: &[Seq]) -> Nack {
    Nack { ssrc: feed.ssrc(), copies, slack_ms: 500, seqs: seqs.to_vec() }
}

async fn welcome(edge: &mut Edge) {
    edge.wait(|event| matches!(event, RepairEvent::Welcome(_)).then_some(())).await;
}

async fn stream_up(edge: &mut Edge) -> StreamInfo {
    edge.wait(|event| match event {
        RepairEvent::StreamUp(info) => Some(info),
        _ => None,
    })
    .await
}

/// A `downpour/1` edge without the client's logic.
struct RawEdge {
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
    reader: ControlReader,
    _endpoint: quinn::Endpoint,
}

impl RawEdge {
    async fn dial(addr: SocketAddr, transport: TransportConfig) -> Self {
        let endpoint = quic_client();
        let connection = dial(&endpoint, addr, b"downpour/1", transport).await.unwrap();
        let (send, recv) = connection.open_bi().await.unwrap();
        let reader = ControlReader::new(1 << 20);
        Self { connection, send, recv, reader, _endpoint: endpoint }
    }

    async fn hello(addr: SocketAddr, transport: TransportConfig) -> Self {
        let mut edge = Self::dial(addr, transport).await;
        edge.send(&hello(&["*"])).await;
        assert!(matches!(edge.receive().await, CloudMessage::Welcome(_)));
        edge
    }

    async fn send(&mut self, message: &EdgeMessage) {
        self.send.write_all(&encode_control(message).unwrap()).await.unwrap();
    }

    async fn receive(&mut self) -> CloudMessage {
        loop {
            if let Some(message) = self.reader.next_message().unwrap() {
                return message;
            }
            let mut buffer = [0; 1000];
            let read = within(self.recv.read(&mut buffer)).await.unwrap().unwrap();
            self.reader.push(&buffer[..read]);
        }
    }

    /// Returns the code and the reason of the cloud's close.
    async fn closed(&self) -> (u64, String) {
        match within(self.connection.closed()).await {
            ConnectionError::ApplicationClosed(close) => {
                (close.error_code.into_inner(), String::from_utf8_lossy(&close.reason).into_owned())
            }
            other => panic!("{other}"),
        }
    }
}

fn hello(streams: &[&str]) -> EdgeMessage {
    EdgeMessage::Hello(Hello {
        version: 1,
        node: "raw".into(),
        token: None,
        rtp_port: None,
        rtp_paths: 1,
        group: None,
        parity: false,
        latency_ms: 500,
        streams: streams.iter().map(|pattern| pattern.parse().unwrap()).collect(),
    })
}
