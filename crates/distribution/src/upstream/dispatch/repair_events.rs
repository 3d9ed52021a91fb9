//! Events of the repair connection: applied to streams and to paths.

use std::time::Instant;

use super::{super::socket::CloudRtp, Cloud, Upstream};
use crate::{protocol::Protocol, upstream::repair_client::RepairEvent};
use downpour_repair::{control::Welcome, receiver::Path};

impl Upstream {
    /// Applies an event; `None` if the repair client has ended.
    pub(super) fn handle_event(&mut self, event: Option<RepairEvent>) {
        let now = Instant::now();
        let Some(event) = event else {
            self.connection = None;
            self.stop_probing();
            return;
        };
        let is_v0 = self.protocol() == Some(Protocol::V0);
        let streams = &mut self.streams;
        match event {
            RepairEvent::Connected { protocol } => {
                streams.set_announced(now, protocol == Protocol::Downpour);
                // Under downpour/1 the cloud may still refuse.
                if protocol == Protocol::V0 {
                    self.link.connected();
                }
                self.set_protocol(Some(protocol));
            }
            RepairEvent::Disconnected { reason } => {
                let cloud = self.cloud.as_ref().map(Cloud::quic).unwrap_or_default();
                self.link.disconnected(format!("no connection to the cloud {cloud}: {reason}"));
                streams.set_announced(now, false);
                self.set_protocol(None);
                self.stop_probing();
            }
            RepairEvent::Welcome(welcome) => {
                self.link.connected();
                self.start_probing(now, &welcome);
            }
            RepairEvent::PathUp { path, address } => {
                tracing::info!(path, %address, "path up; the cloud sends RTP");
                for socket in &mut self.sockets {
                    socket.path_up(now, path, &self.probe_metrics);
                }
            }
            RepairEvent::StreamUp(up) => {
                // Before the stream starts: it requests a whole GOP at once, and the round trip
                // determines when it repeats the request.
                if let Some(rtt) = self.connection.as_ref().and_then(|c| c.handle.rtt()) {
                    streams.set_initial_round_trip(rtt, rtt / 8);
                }
                streams.stream_up(now, up);
            }
            RepairEvent::StreamUpdate { ssrc, headers } => streams.stream_update(ssrc, headers),
            RepairEvent::Closing => streams.cloud_closes(),
            RepairEvent::StreamData { ssrc, tag } => streams.stream_data(now, ssrc, tag),
            RepairEvent::StreamEnd { ssrc, last_seq } => streams.stream_end(now, ssrc, last_seq),
            RepairEvent::Repair(packet) => streams.handle_packet(now, packet, Path::Repair),
            // A v0 cloud sends a packet before it holds it.
            RepairEvent::Gone(gone) if is_v0 => {
                streams.handle_not_held(now, gone.ssrc, &gone.seqs);
            }
            RepairEvent::Gone(gone) => streams.handle_gone(now, gone.ssrc, &gone.seqs),
            RepairEvent::Heartbeats(beats) => streams.handle_heartbeats(now, &beats),
        }
    }

    fn set_protocol(&mut self, protocol: Option<Protocol>) {
        self.last_protocol = protocol.or(self.last_protocol);
        if let Some(connection) = &mut self.connection {
            connection.protocol = protocol;
        }
    }

    /// Starts to prove this edge's RTP addresses to the cloud.
    fn start_probing(&mut self, now: Instant, welcome: &Welcome) {
        let Some(cloud) = &self.cloud else { return };
        let rtp = CloudRtp { host: cloud.host.clone(), port: welcome.rtp_port };
        self.nonce = Some(welcome.nonce);
        self.rtp_lookups.clear();
        for socket in &mut self.sockets {
            socket.start(now, welcome.nonce, &rtp, &mut self.rtp_lookups);
        }
        self.needs_poll = true;
    }

    pub(super) fn stop_probing(&mut self) {
        self.nonce = None;
        self.rtp_lookups.clear();
        for socket in &mut self.sockets {
            socket.stop(&self.probe_metrics);
        }
    }
}
