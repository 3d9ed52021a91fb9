//! What an edge node can be told.

use std::path::PathBuf;

use super::{InterfaceAddr, ListenAddr, LogLevel, RepairProtocol, Role, schema::settings};
use downpour_distribution::address::Destination;
use downpour_distribution::tls::Fingerprint;
use downpour_media::StreamPattern;

settings! {
    /// An edge node's settings: `edge.yaml`.
    pub struct EdgeConfig(
        Role::Edge, "edge.yaml", retired: ["padding_size", "chan_size", "init", "protect"]
    ) {
        "Addresses" {
            /// Where RTP arrives: :5222, or a group to join such as 239.0.0.1:5222.
            udp_addr: ListenAddr = ListenAddr::any(5222);
            /// A second address or group for the same packets: another uplink, or a group beside
            /// the unicast address; "" is none.
            udp_addr_2: Option<ListenAddr> = None;
            /// An IPv4 address of the interface that the group is joined on; "" is the system's
            /// choice.
            multicast_interface: InterfaceAddr = InterfaceAddr(None);
            /// Where viewers come: /{app}/{name}.flv, and /stats/time, /healthz, /metrics.
            flv_addr: ListenAddr = ListenAddr::any(8092);
        }
        "Cloud" {
            /// The cloud's host name or address; "" learns it, and its ports, from its datagrams.
            cloud_host: String = String::new();
            /// The cloud's QUIC port, or host:port where its host is another one.
            quic_addr: ListenAddr = ListenAddr::any(4242);
            /// The cloud's HTTP port, or host:port; asked for stream names where no downpour/1
            /// connection tells them.
            api_addr: ListenAddr = ListenAddr::any(8090);
            /// Asks the cloud to send RTP here; false when this edge's address stands in the cloud's
            /// client_addr_list and a relay or NAT lies between.
            rtp_subscribe: bool = true;
            /// Where the cloud's RTP port is reached, host:port; "" is the cloud's host and the
            /// port that it tells.
            cloud_rtp_addr: Option<Destination> = None;
            /// The same for udp_addr_2; "" is what holds for udp_addr.
            cloud_rtp_addr_2: Option<Destination> = None;
            /// How to ask for lost packets: auto, downpour, or v0 for an existing Go cloud.
            repair_protocol: RepairProtocol = RepairProtocol::Auto;
            /// true asks for no lost packets at all; video that is joined late then lacks its codec
            /// headers.
            disable_quic: bool = false;
            /// How this edge is called in the cloud's log; "" is the machine's host name.
            node_name: String = String::new();
            /// What the cloud wants to hear before it lets an edge subscribe.
            token: String = String::new();
            /// The streams to subscribe to, a list of app/name, app/* or * for all.
            streams: Vec<StreamPattern> = vec![StreamPattern::All];
        }
        "Trust" {
            /// SHA-256 of the cloud's certificate, 64 hexadecimal digits; the cloud prints it at
            /// start.
            fingerprint: Option<Fingerprint> = None;
            /// The CA that signed the cloud's certificate, PEM.
            ca_file: PathBuf = PathBuf::new();
            /// Where certificates are remembered that were trusted at first use.
            known_clouds: PathBuf = "known_clouds".into();
            /// true checks no certificate: anyone on the path can then be the cloud.
            insecure: bool = false;
        }
        "Repair" {
            /// How late a packet may come before it counts as lost, in milliseconds, 20 to 30000;
            /// 15 ms are added, for the last try.
            latency_ms: u64 = 500, in 20..=30_000;
            /// Whether to take parity packets, should the cloud send any; where RTP comes to a group or
            /// by the cloud's list, they come to the port after next.
            fec: bool = true;
            /// Bytes of kernel buffer for RTP, 65536 to 1073741824.
            udp_recv_buffer: usize = 8 << 20, in 1 << 16..=1 << 30;
            /// Share of received packets to throw away, for tests, 0 to 1.
            pack_loss: f64 = 0.0, in 0.0..=1.0;
        }
        "Viewers" {
            /// Viewers at one time, 1 to 1000000.
            max_viewers: usize = 10_000, in 1..=1_000_000;
            /// A viewer is written to at most once in so many milliseconds, 0 to 2000; 0 writes each
            /// frame at once. 350 takes a fraction of the processor time, and adds up to 350 ms of
            /// delay.
            merge_write_ms: u64 = 0, in 0..=2000;
            /// Streams at one time, 1 to 100000.
            max_streams: usize = 1000, in 1..=100_000;
            /// Media of a stream that is kept in memory for viewers, in milliseconds, 1000 to
            /// 600000.
            gop_cache_max_ms: u32 = 20_000, in 1000..=600_000;
            /// And in bytes, 1048576 to 4294967296.
            gop_cache_max_bytes: usize = 32 << 20, in 1 << 20..=4 << 30;
            /// Accepted, but HLS is not served yet.
            enable_hls: bool = false;
            /// Where HLS would be served; not used yet.
            hls_addr: ListenAddr = ListenAddr::any(7002);
            /// A certificate for HTTPS; accepted, but HTTPS is not served yet.
            cert_file: PathBuf = PathBuf::new();
            /// Its private key; not used yet.
            key_file: PathBuf = PathBuf::new();
        }
        "Recording" {
            /// Whether each stream is written to an FLV file.
            enable_record: bool = false;
            /// The directory of those files.
            record_dir: PathBuf = "records".into();
        }
        "Log and shutdown" {
            /// trace, debug, info, warn or error; the environment's RUST_LOG goes first.
            log_level: LogLevel = LogLevel::Info;
            /// Whether the log also goes to a file.
            enable_log_file: bool = false;
            /// The directory of the log files.
            log_dir: PathBuf = "logs".into();
            /// The name of the log file.
            log_file: String = "edge.log".into();
            /// Bytes after which a new log file is begun, 65536 to 17179869184.
            log_file_max_bytes: u64 = 100 << 20, in 1 << 16..=16 << 30;
            /// Log files kept, 1 to 1000.
            log_file_count: u64 = 10, in 1..=1000;
            /// Time to finish after SIGTERM, in milliseconds, 0 to 60000.
            shutdown_grace_ms: u64 = 5000, in 0..=60_000;
        }
    }
}

impl EdgeConfig {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let fail = |key, message: &str| Err((key, message.to_owned()));
        if self.insecure && self.fingerprint.is_some() {
            return fail(
                "insecure",
                "it switches off the check that fingerprint asks for; leave one",
            );
        }
        if self.insecure && !self.ca_file.as_os_str().is_empty() {
            return fail("insecure", "it switches off the check that ca_file asks for; leave one");
        }
        if !self.cloud_host.is_empty() && !downpour_distribution::address::is_host(&self.cloud_host)
        {
            return fail(
                "cloud_host",
                "give a host name or an address, without a port or brackets",
            );
        }
        if self.udp_addr_2.is_none() && self.cloud_rtp_addr_2.is_some() {
            return fail("cloud_rtp_addr_2", "it is for udp_addr_2, which is \"\"");
        }
        if self.udp_addr.port() != 0 && self.udp_addr_2.as_ref() == Some(&self.udp_addr) {
            return fail("udp_addr_2", "give another address than udp_addr, or \"\"");
        }
        if self.streams.is_empty() || self.streams.len() > PATTERNS_MAX {
            return fail("streams", "give 1 to 1000 patterns; [\"*\"] is every stream");
        }
        if self.node_name.len() > 128 || self.node_name.contains(char::is_control) {
            return fail("node_name", "give at most 128 bytes, without control characters");
        }
        if self.token.len() > 1024 {
            return fail("token", "give at most 1024 bytes");
        }
        super::check_log_file(&self.log_file)
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.enable_hls {
            warnings.push("enable_hls: HLS is not served yet; viewers have HTTP-FLV".into());
        }
        if !self.cert_file.as_os_str().is_empty() || !self.key_file.as_os_str().is_empty() {
            warnings.push("cert_file, key_file: HTTPS is not served yet; they are not read".into());
        }
        if self.pack_loss > 0.0 {
            let share = self.pack_loss * 100.0;
            warnings
                .push(format!("pack_loss: {share} % of all packets are thrown away on purpose"));
        }
        if self.insecure {
            warnings.push("insecure: the cloud's certificate is not checked".into());
        }
        warnings
    }
}

/// Patterns that one edge subscribes with.
const PATTERNS_MAX: usize = 1000;
