//! The source: sends the stream to edges as a cloud does.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use downpour_distribution::downstream::outgoing::{OutgoingStream, OutgoingStreams};
use downpour_repair::{
    history::History,
    rtp::{Packetizer, Ssrc},
};
use tokio_util::sync::CancellationToken;

use super::media::Media;
use crate::common::repair::Repair;

/// Publishes a stream and serves repair requests until it is dropped.
pub struct Source {
    /// Address of the repair server.
    pub quic: SocketAddr,
    origin: OutgoingStreams,
    stop: Arc<AtomicBool>,
    _repair: Repair,
}

impl Source {
    pub fn new() -> io::Result<Self> {
        let (repair, origin) = (Repair::new()?, OutgoingStreams::new());
        let quic = repair.serve(&origin, CancellationToken::new())?;
        Ok(Self { quic, origin, stop: Arc::default(), _repair: repair })
    }

    /// Starts to send the stream to each of `edges`.
    pub fn publish(&self, edges: Vec<SocketAddr>) -> io::Result<()> {
        let history = History::new(5000, Duration::from_secs(10));
        let key = "live/movie".parse().map_err(io::Error::other)?;
        let stream = Arc::new(OutgoingStream::new(key, SSRC, 0, history));
        stream.set_headers([Media::video_header(), Media::audio_header()].into_iter().collect());
        self.origin.insert(stream.clone());
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut packetizer = Packetizer::new(SSRC, PAYLOAD);
        let stop = self.stop.clone();
        std::thread::Builder::new().name("source".into()).spawn(move || {
            let start = Instant::now();
            for due in Media::new().take_while(|_| !stop.load(Ordering::Relaxed)) {
                std::thread::sleep((start + due.at).saturating_duration_since(Instant::now()));
                let burst = packetizer.packetize(&due.tag);
                stream.push(Instant::now(), burst.clone(), due.tag.is_key_frame());
                for packet in burst.bytes().chunks(burst.stride()) {
                    for edge in &edges {
                        // The edges request lost packets.
                        let _ = socket.send_to(packet, edge);
                    }
                }
            }
        })?;
        Ok(())
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

const SSRC: Ssrc = Ssrc(1);
const PAYLOAD: usize = 1120;
