//! What a node's settings may come to need of the machine.

use crate::{
    config::{CloudConfig, DownstreamConfig, EdgeConfig},
    http::CONNECTIONS_BESIDE_VIEWERS,
    node::limits::{Connections, Requirements},
};
use downpour_distribution::downstream::fanout;

/// Requirements of a cloud: connections of encoders, viewers and API clients, and recordings. Edges
/// need no descriptors; they share the sockets of RTP and QUIC.
pub(super) fn of_cloud(config: &CloudConfig) -> Requirements {
    let encoders = Connections::encoders(config.rtmp_max_connections as u64);
    let viewers = config.http_flv.then(|| Connections::viewers(config.max_viewers as u64));
    let connections: Vec<_> = [Some(encoders), viewers].into_iter().flatten().collect();
    let recordings = config.record.enabled.then_some(config.stream_limits.max as u64);
    Requirements {
        descriptors: descriptors(&connections, recordings),
        connections,
        receive_buffer: None,
        receivers: 0,
        send_buffer: send_buffer(&config.downstream),
        streams_in: 0,
    }
}

/// Requirements of an edge: connections of viewers and API clients, recordings, and the sockets that
/// RTP arrives on; of a parent, the sockets that RTP leaves by as well.
pub(super) fn of_edge(config: &EdgeConfig) -> Requirements {
    let connections = vec![Connections::viewers(config.max_viewers as u64)];
    let recordings = config.record.enabled.then_some(config.stream_limits.max as u64);
    Requirements {
        descriptors: descriptors(&connections, recordings),
        connections,
        receive_buffer: Some(config.udp_recv_buffer as u64),
        receivers: 1 + u64::from(config.udp_addr_2.is_some()),
        send_buffer: config.downstream_enabled.then(|| send_buffer(&config.downstream)).flatten(),
        streams_in: config.stream_limits.max as u64,
    }
}

/// The file descriptors, and the settings that they are for.
fn descriptors(connections: &[Connections], recordings: Option<u64>) -> (u64, String) {
    let count = connections.iter().map(|listener| listener.count).sum::<u64>();
    let settings: Vec<_> = connections.iter().map(|listener| listener.setting).collect();
    let mut settings = settings.join(", ");
    if recordings.is_some() {
        settings += " and, for recordings, streams.max";
    }
    (count + recordings.unwrap_or(0) + OTHER_DESCRIPTORS, settings)
}

/// Bytes of send buffer that the sockets of RTP ask for; `None` if no RTP is sent.
fn send_buffer(config: &DownstreamConfig) -> Option<u64> {
    (!config.debug).then(|| fanout::Settings::default().send_buffer as u64)
}

/// Connections to the API and everything else that a node opens: listening sockets, UDP sockets (two
/// for each of up to 64 workers of the fan-out), log files, those of the runtime.
const OTHER_DESCRIPTORS: u64 = CONNECTIONS_BESIDE_VIEWERS as u64 + 230;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RecordConfig;

    #[test]
    fn cloud_needs_descriptors_for_encoders_and_viewers() {
        let cloud = of_cloud(&CloudConfig::default());
        let settings = "rtmp.max_connections, http.max_viewers";
        assert_eq!(cloud.descriptors, (8192 + 10_000 + 1254, settings.into()));
        assert_eq!(cloud.connections, [Connections::encoders(8192), Connections::viewers(10_000)]);
        assert_eq!(cloud.streams_in, 0);
    }

    #[test]
    fn cloud_without_viewers_needs_none_of_their_descriptors() {
        let cloud = of_cloud(&CloudConfig { http_flv: false, ..CloudConfig::default() });
        assert_eq!(cloud.descriptors, (8192 + 1254, "rtmp.max_connections".into()));
        assert_eq!(cloud.connections, [Connections::encoders(8192)]);
    }

    #[test]
    fn recordings_need_a_descriptor_per_stream() {
        let record = RecordConfig { enabled: true, ..RecordConfig::default() };
        let recording = CloudConfig { record: record.clone(), ..CloudConfig::default() };
        let settings = "rtmp.max_connections, http.max_viewers and, for recordings, streams.max";
        let expected = (8192 + 10_000 + 1000 + 1254, settings.into());
        assert_eq!(of_cloud(&recording).descriptors, expected);
        let recording = EdgeConfig { record, ..EdgeConfig::default() };
        assert_eq!(of_edge(&recording).descriptors.0, 10_000 + 1000 + 1254);
    }

    #[test]
    fn edge_needs_descriptors_for_viewers_and_a_receive_buffer_per_address() {
        let edge = of_edge(&EdgeConfig::default());
        assert_eq!(edge.descriptors, (10_000 + 1254, "http.max_viewers".into()));
        assert_eq!(edge.receive_buffer, Some(8 << 20));
        assert_eq!(edge.receivers, 1);
        let udp_addr_2 = Some(crate::config::ListenAddr::any(5223));
        let edge = of_edge(&EdgeConfig { udp_addr_2, ..EdgeConfig::default() });
        assert_eq!(edge.receivers, 2);
    }

    #[test]
    fn edge_needs_a_send_buffer_if_it_is_a_parent() {
        assert_eq!(of_edge(&EdgeConfig::default()).send_buffer, None);
        let parent = EdgeConfig { downstream_enabled: true, ..EdgeConfig::default() };
        let expected = of_cloud(&CloudConfig::default()).send_buffer;
        assert!(expected.is_some());
        assert_eq!(of_edge(&parent).send_buffer, expected);
    }
}
