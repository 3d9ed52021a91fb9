//! The stream on its way to edges, as a cloud sends it.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use downpour::{
    origin::{Headers, Origin, OriginStream},
    repair::{
        history::History,
        server::{RepairServer, RepairServerMetrics, RepairServerSettings},
    },
    rtp::{Packetizer, Ssrc},
    tls::Identity,
};
use tokio_util::sync::CancellationToken;

use super::media::Media;

/// Publishes until it is dropped, and answers requests for repair.
pub struct Source {
    /// Where it answers.
    pub quic: SocketAddr,
    origin: Origin,
    stop: Arc<AtomicBool>,
    _runtime: tokio::runtime::Runtime,
}

impl Source {
    pub fn new() -> io::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let identity = Identity::generate().map_err(io::Error::other)?;
        let metrics = RepairServerMetrics::register(&prometheus::Registry::new())
            .map_err(io::Error::other)?;
        let origin = Origin::new();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let entered = runtime.enter();
        let settings = RepairServerSettings::default();
        let server = RepairServer::bind(any, &identity, origin.clone(), settings, metrics)
            .map_err(io::Error::other)?;
        let quic = server.local_addr()?;
        runtime.spawn(server.run(CancellationToken::new()));
        drop(entered);
        Ok(Self { quic, origin, stop: Arc::default(), _runtime: runtime })
    }

    /// Begins the stream, which goes to each of `edges`.
    pub fn publish(&self, edges: Vec<SocketAddr>) -> io::Result<()> {
        let history = History::new(5000, Duration::from_secs(10));
        let key = "live/movie".parse().map_err(io::Error::other)?;
        let stream = Arc::new(OriginStream::new(key, SSRC, 0, history));
        stream.set_headers(Headers {
            video: Some(Media::video_header()),
            audio: Some(Media::audio_header()),
            metadata: None,
        });
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
                        // What does not arrive is asked for.
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
