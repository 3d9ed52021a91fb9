//! Events of the repair connection, and what they do to streams and paths.

use std::time::Instant;

use super::{super::socket::CloudRtp, Upstream};
use crate::{protocol::Protocol, upstream::repair_client::RepairEvent};
use downpour_repair::{control::Welcome, receiver::Path};

impl Upstream {
    pub(super) fn handle_event(&mut self, event: Option<RepairEvent>) {
        let now = Instant::now();
        let Some(event) = event else {
            // The client ends only when it is told to.
            self.repair = None;
            self.stop_probing();
            return;
        };
        let intake = &mut self.intake;
        match event {
            RepairEvent::Connected { protocol } => {
                intake.set_told(now, protocol == Protocol::Downpour);
                if let Some(repair) = &mut self.repair {
                    repair.protocol = Some(protocol);
                }
            }
            RepairEvent::Disconnected { .. } => {
                intake.set_told(now, false);
                if let Some(repair) = &mut self.repair {
                    repair.protocol = None;
                }
                self.stop_probing();
            }
            RepairEvent::Welcome(welcome) => self.start_probing(now, &welcome),
            RepairEvent::PathUp { path, address } => {
                tracing::info!(path, %address, "the cloud sends RTP to this edge");
                for socket in &mut self.sockets {
                    socket.path_up(now, path, &self.probe_metrics);
                }
            }
            RepairEvent::StreamUp(up) => {
                // It asks for a whole group of pictures at once, and times its retries by this.
                if let Some(rtt) = self.repair.as_ref().and_then(|repair| repair.handle.rtt()) {
                    intake.expect_round_trip(rtt, rtt / 8);
                }
                intake.stream_up(now, up);
            }
            RepairEvent::StreamUpdate { ssrc, headers } => intake.stream_update(ssrc, headers),
            RepairEvent::StreamEnd { ssrc, last_seq } => intake.stream_end(now, ssrc, last_seq),
            RepairEvent::Repair(packet) => {
                intake.handle_packet(now, packet, Path::Repair);
            }
            RepairEvent::Gone(gone) => intake.gone(now, gone.ssrc, &gone.seqs),
            RepairEvent::Heartbeats(beats) => intake.heartbeats(now, &beats),
        }
    }

    pub(super) fn start_probing(&mut self, now: Instant, welcome: &Welcome) {
        let Some(cloud) = &self.cloud else { return };
        let rtp = CloudRtp { host: cloud.host.clone(), port: welcome.rtp_port };
        self.nonce = Some(welcome.nonce);
        self.found.clear();
        for socket in &mut self.sockets {
            socket.start(now, welcome.nonce, &rtp, &mut self.found);
        }
        self.begun = true;
    }

    pub(super) fn stop_probing(&mut self) {
        self.nonce = None;
        self.found.clear();
        for socket in &mut self.sockets {
            socket.stop(&self.probe_metrics);
        }
    }
}
