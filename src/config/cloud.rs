//! A cloud node's settings.

use std::path::PathBuf;

use super::{
    Conflict, DownstreamConfig, ListenAddr, LogLevel, Role, parse::Given, schema::settings,
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
            /// Connections of one client address that are not viewers; 0 is half of all 1024.
            /// Loopback addresses have no such limit.
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
            /// Streams at one time.
            restart max -> max_streams: usize = 1000, in 1..=100_000, also [max_streams];
            /// Time that a stream waits for its encoder to come back, in milliseconds; 0 ends it with its
            /// publication. Viewers, edges and recordings stay, and timestamps continue.
            restart publish_grace_ms -> publish_grace_ms: u64 = 5000,
                in 0..=600_000, also [publish_grace_ms];
            /// Media per stream that is kept in memory for viewers and a recording that are behind, in
            /// milliseconds. Others need the newest group of pictures only.
            restart gop_cache_max_ms -> gop_cache_max_ms: u32 = 20_000,
                in 1000..=600_000, also [gop_cache_max_ms];
            /// The same limit in bytes.
            restart gop_cache_max_bytes -> gop_cache_max_bytes: usize = 32 << 20,
                in 1 << 20..=4 << 30, also [gop_cache_max_bytes];
        }
        /// Recording to FLV files.
        record {
            /// Whether each publication is recorded.
            restart enabled -> enable_record: bool = false,
                also [enable_record, flv_archive];
            /// Directory of the files.
            restart dir -> record_dir: PathBuf = "records".into(),
                also [record_dir, flv_dir];
        }
        /// The log.
        log {
            /// trace, debug, info, warn or error. The environment variable RUST_LOG overrides it.
            restart level -> log_level: LogLevel = LogLevel::Info, also [log_level, level];
            /// Whether the log is also written to a file.
            restart to_file -> enable_log_file: bool = false, also [enable_log_file];
            /// Directory of the log files.
            restart dir -> log_dir: PathBuf = "logs".into(), also [log_dir];
            /// Name of the log file.
            restart file -> log_file: String = "cloud.log".into(), also [log_file];
            /// Bytes after which a new log file is started.
            restart file_max_bytes -> log_file_max_bytes: u64 = 100 << 20,
                in 1 << 16..=16 << 30, also [log_file_max_bytes];
            /// Log files that are kept.
            restart file_count -> log_file_count: u64 = 10, in 1..=1000, also [log_file_count];
        }
        /// Shutdown after SIGTERM or SIGINT.
        shutdown {
            /// Time that connections have to finish, in milliseconds.
            restart grace_ms -> shutdown_grace_ms: u64 = 5000,
                in 0..=60_000, also [shutdown_grace_ms];
        }
    }
}

impl CloudConfig {
    fn settle(&mut self, given: &Given) {
        self.downstream.settle(given);
    }

    fn check(&self) -> Result<(), Conflict> {
        self.downstream.check()?;
        super::check_log_file(&self.log_file)
    }

    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
}
