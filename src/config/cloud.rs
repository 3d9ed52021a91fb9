//! A cloud node's settings.

use super::{
    Conflict, DownstreamConfig, ListenAddr, LogConfig, RecordConfig, Role, ShutdownConfig,
    StreamLimits, parse::Given, schema::settings,
};
use downpour_distribution::address::Destination;

settings! {
    /// A cloud node's settings: `config.yaml`.
    pub struct CloudConfig(Role::Cloud, "config.yaml", retired: [
        "enable_sr", "sr_api",
        // Those of the `livego.yaml` beside a Go cloud.
        "api_pull", "config_file", "enable_rtmps", "enable_tls_verify", "gop_num", "hls_addr",
        "hls_keep_after_end", "httpflv_addr", "jwt", "read_timeout", "redis_addr", "redis_pwd",
        "rtmp_noauth", "rtmps_cert", "rtmps_key", "server", "use_hls_https", "write_timeout"
    ]) {
        /// RTMP, from encoders.
        rtmp {
            /// Address that encoders push to.
            restart addr -> rtmp_addr: ListenAddr = ListenAddr::any(1935), also [rtmp_addr];
            /// RTMP connections at one time.
            restart max_connections -> rtmp_max_connections: usize = 8192,
                in 1..=1_000_000, also [rtmp_max_connections];
            /// Connections without a publication that one client address may have; 0 is half of all.
            /// Loopback addresses have no such limit.
            restart max_connections_per_address -> rtmp_max_connections_per_address: usize = 0,
                in 0..=1_000_000;
            /// Silence of a publisher after which another encoder may take over its stream, in
            /// milliseconds.
            restart publisher_silence_ms -> publisher_silence_ms: u64 = 5000,
                in 100..=600_000, also [publisher_silence_ms];
        }
        /// HTTP: /{app}/{name}.flv for viewers, /stat/livestat, /api/v1/edges, /healthz, /metrics.
        http {
            /// Address that HTTP is served on.
            restart addr -> api_addr: ListenAddr = ListenAddr::any(8090), also [api_addr];
            /// Whether viewers are served: /{app}/{name}.flv.
            restart flv -> http_flv: bool = true;
            /// Connections of one client address that are not viewers; 0 is half of
            /// max_viewers + 1024. Loopback addresses have no such limit.
            restart max_connections_per_address -> http_max_connections_per_address: usize = 0,
                in 0..=1_000_000;
            /// Viewers at one time.
            restart max_viewers -> max_viewers: usize = 10_000, in 1..=1_000_000;
            /// Least time between two writes to a viewer, in milliseconds; 0 writes each frame at
            /// once. 350 takes a fraction of the processor time and adds up to 350 ms of delay.
            restart merge_write_ms -> merge_write_ms: u64 = 0, in 0..=2000;
            /// Bytes that the kernel holds for a viewer that reads too slowly; 0 is 1.5 s of its stream.
            restart viewer_send_buffer -> viewer_send_buffer: u32 = 0, in 0..=1 << 30;
        }
        /// Edges below this node: RTP to them, and repair.
        downstream {
            ..downstream: DownstreamConfig = DownstreamConfig {
                targets: vec![
                    Destination::ip([239, 0, 0, 1], 5222).into(),
                    Destination::ip([127, 0, 0, 1], 5224).into(),
                ],
                ..DownstreamConfig::default()
            }, flat;
        }
        /// Streams and the media that is kept of them.
        streams {
            ..stream_limits: StreamLimits = StreamLimits::default(), flat;
        }
        /// Recording to FLV files.
        record {
            ..record: RecordConfig = RecordConfig::default(), flat;
        }
        /// The log.
        log {
            ..log: LogConfig = LogConfig::named("cloud.log"), flat;
        }
        /// Shutdown after SIGTERM or SIGINT.
        shutdown {
            ..shutdown: ShutdownConfig = ShutdownConfig::default(), flat;
        }
    }
}

impl CloudConfig {
    fn settle(&mut self, given: &Given) {
        self.downstream.settle(given);
    }

    fn check(&self) -> Result<(), Conflict> {
        self.downstream.check()?;
        super::check_ports(&[("rtmp.addr", &self.rtmp_addr), ("http.addr", &self.api_addr)])?;
        let rtp_out = ListenAddr::any(self.downstream.rtp_port);
        super::check_ports(&[
            ("downstream.quic_addr", &self.downstream.quic_addr),
            ("downstream.rtp_port", &rtp_out),
        ])?;
        self.log.check()
    }

    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
}
