//! What a node's settings may come to need of the machine.

use crate::{
    config::{CloudConfig, EdgeConfig},
    http::CONNECTIONS_BESIDE_VIEWERS,
    node::limits::Requirements,
};
use downpour_distribution::downstream::fanout;

/// A cloud's: its encoders' connections, API connections and recordings. Edges cost no descriptors;
/// they share the sockets of RTP and QUIC.
pub(super) fn of_cloud(config: &CloudConfig) -> Requirements {
    let encoders = config.rtmp_max_connections as u64;
    let recordings = if config.enable_record { config.max_streams as u64 } else { 0 };
    let settings = match config.enable_record {
        true => "rtmp_max_connections and, for recordings, max_streams",
        false => "rtmp_max_connections",
    };
    Requirements {
        descriptors: (encoders + recordings + OTHER_DESCRIPTORS, settings),
        connections: (encoders, "rtmp_max_connections"),
        receive_buffer: None,
        receivers: 0,
        send_buffer: Some(fanout::Settings::default().send_buffer as u64),
        streams_in: 0,
    }
}

/// An edge's: viewers, API connections and recordings.
pub(super) fn of_edge(config: &EdgeConfig) -> Requirements {
    let viewers = config.max_viewers as u64;
    let recordings = if config.enable_record { config.max_streams as u64 } else { 0 };
    let settings = match config.enable_record {
        true => "max_viewers and, for recordings, max_streams",
        false => "max_viewers",
    };
    Requirements {
        descriptors: (viewers + recordings + OTHER_DESCRIPTORS, settings),
        connections: (viewers, "max_viewers"),
        receive_buffer: Some(config.udp_recv_buffer as u64),
        receivers: 1 + u64::from(config.udp_addr_2.is_some()),
        send_buffer: None,
        streams_in: config.max_streams as u64,
    }
}

/// Connections to the API, and what a node has open besides: listening sockets, UDP sockets (two for
/// each of up to 64 workers of a cloud's fan-out), log files, the runtime's own.
const OTHER_DESCRIPTORS: u64 = CONNECTIONS_BESIDE_VIEWERS as u64 + 230;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_settings_allow_is_needed() {
        let cloud = of_cloud(&CloudConfig::default());
        assert_eq!(cloud.descriptors, (8192 + 1254, "rtmp_max_connections"));
        assert_eq!((cloud.connections.0, cloud.streams_in), (8192, 0));
        let recording = CloudConfig { enable_record: true, ..CloudConfig::default() };
        let settings = "rtmp_max_connections and, for recordings, max_streams";
        assert_eq!(of_cloud(&recording).descriptors, (8192 + 1000 + 1254, settings));

        let edge = of_edge(&EdgeConfig::default());
        assert_eq!(edge.descriptors, (10_000 + 1254, "max_viewers"));
        assert_eq!((edge.receive_buffer, edge.receivers), (Some(8 << 20), 1));
        let udp_addr_2 = Some(crate::config::ListenAddr::any(5223));
        let two = EdgeConfig { enable_record: true, udp_addr_2, ..EdgeConfig::default() };
        let two = of_edge(&two);
        assert_eq!((two.receivers, two.descriptors.0), (2, 12_254));
    }
}
