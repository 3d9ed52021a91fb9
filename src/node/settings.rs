//! Settings of a node from those of a cloud and of an edge: two sets of defaults of one node.

use std::{path::Path, time::Duration};

use super::{
    assemble::{DownstreamSettings, HttpSettings, NodeSettings, Setting},
    upstream::UpstreamSettings,
};
use crate::{
    config::{ClientAddr, CloudConfig, DownstreamConfig, EdgeConfig, StreamLimits},
    http::ViewerSettings,
    net,
    rtmp::listener::ServerSettings as RtmpSettings,
};
use downpour_distribution::{
    address::Destination,
    downstream::{self, fanout, repair_server::RepairServerSettings, tap::SenderSettings},
};
use downpour_hub::{LogLimits, admission};
use downpour_repair::fec::Fec;
use downpour_sys::udp::MulticastOut;

impl From<&CloudConfig> for NodeSettings {
    fn from(config: &CloudConfig) -> Self {
        let grace = Duration::from_millis(config.shutdown.grace_ms);
        Self {
            log: stream_log(&config.stream_limits),
            admission: admission::Settings {
                publisher_silence: Duration::from_millis(config.publisher_silence_ms),
                publish_grace: stream_grace(&config.stream_limits),
                max_streams: config.stream_limits.max,
                max_players: config.max_viewers,
                ..admission::Settings::default()
            },
            rtmp: Some((
                Setting::new("rtmp.addr", config.rtmp_addr.clone()),
                RtmpSettings {
                    max_connections: config.rtmp_max_connections,
                    max_connections_per_address: net::share(
                        config.rtmp_max_connections_per_address,
                    ),
                    ..RtmpSettings::default()
                },
            )),
            upstream: None,
            downstream: Some(downstream(&config.downstream, "cloud")),
            http: HttpSettings {
                addr: Setting::new("http.addr", config.api_addr.clone()),
                flv: config.http_flv,
                viewers: viewers(
                    config.max_viewers,
                    config.merge_write_ms,
                    config.http_max_connections_per_address,
                    config.viewer_send_buffer,
                ),
                grace: grace / 2,
            },
            record: config.record.dir().map(Path::to_owned),
            grace,
        }
    }
}

impl From<&EdgeConfig> for NodeSettings {
    fn from(config: &EdgeConfig) -> Self {
        let grace = Duration::from_millis(config.shutdown.grace_ms);
        Self {
            log: stream_log(&config.stream_limits),
            admission: admission::Settings {
                max_streams: config.stream_limits.max,
                max_players: config.max_viewers,
                ..admission::Settings::default()
            },
            rtmp: None,
            upstream: Some(UpstreamSettings(config.clone())),
            downstream: config.downstream_enabled.then(|| downstream(&config.downstream, "edge")),
            http: HttpSettings {
                addr: Setting::new("http.addr", config.flv_addr.clone()),
                flv: true,
                viewers: viewers(
                    config.max_viewers,
                    config.merge_write_ms,
                    config.http_max_connections_per_address,
                    config.viewer_send_buffer,
                ),
                grace: grace / 2,
            },
            record: config.record.dir().map(Path::to_owned),
            grace,
        }
    }
}

fn stream_log(limits: &StreamLimits) -> LogLimits {
    LogLimits { max_bytes: limits.gop_cache_max_bytes, max_age: limits.gop_cache_max_ms }
}

fn stream_grace(limits: &StreamLimits) -> Duration {
    Duration::from_millis(limits.publish_grace_ms)
}

fn viewers(
    max_viewers: usize,
    merge_write_ms: u64,
    per_address: usize,
    send_buffer: u32,
) -> ViewerSettings {
    ViewerSettings {
        max_viewers,
        unsent: (send_buffer > 0).then_some(send_buffer),
        max_connections_per_address: net::share(per_address),
        merge_write: Duration::from_millis(merge_write_ms),
        ..ViewerSettings::default()
    }
}

/// Addresses that get every stream, and the parity of each.
pub(crate) fn targets(config: &DownstreamConfig) -> Vec<(Destination, Fec)> {
    let with_fec = |target: &ClientAddr| (target.addr.clone(), target.fec.unwrap_or(config.fec));
    config.targets.iter().map(with_fec).collect()
}

/// `default_name` is the node's name if the machine has no host name.
fn downstream(config: &DownstreamConfig, default_name: &str) -> DownstreamSettings {
    let fanout = fanout::Settings {
        port: config.rtp_port,
        multicast: MulticastOut {
            ttl: config.multicast_ttl,
            looped: config.multicast_loop,
            interface: config.multicast_interface.0,
        },
        workers: config.fanout_workers,
        pacing: config.pacing,
        ..fanout::Settings::default()
    };
    DownstreamSettings {
        quic_addr: Setting::new("downstream.quic_addr", config.quic_addr.clone()),
        cert_file: config.cert_file.clone(),
        key_file: config.key_file.clone(),
        part: downstream::Settings {
            streams: SenderSettings {
                history_packets: config.rtp_cache_size,
                history_age: Duration::from_millis(config.rtp_cache_ms),
                payload_max: config.rtp_payload_max,
                repeat_headers: config.repeat_headers,
            },
            fanout: (!config.debug).then_some(fanout),
            targets: targets(config),
            edge_fec: config.fec,
            // Replaced by the address above once that is resolved.
            quic_addr: ([0, 0, 0, 0], 0).into(),
            repair: RepairServerSettings {
                node: super::host_name().unwrap_or_else(|| default_name.into()),
                rtp_port: config.rtp_port,
                v0: config.v0_repair,
                max_connections: config.max_edges,
                v0_allow: config.v0_allow.clone(),
                repair_budget: config.repair_budget,
                token: Some(config.edge_token.clone()).filter(|token| !token.is_empty()),
                ..RepairServerSettings::default()
            },
        },
    }
}
