//! An edge node's settings.

use std::path::PathBuf;

use super::{
    Conflict, DownstreamConfig, InterfaceAddr, ListenAddr, LogConfig, RecordConfig, RepairProtocol,
    Role, ShutdownConfig, StreamLimits, parse::Given, schema::settings,
};
use downpour_distribution::address::Destination;
use downpour_distribution::tls::Fingerprint;
use downpour_media::StreamPattern;

settings! {
    /// An edge node's settings: `edge.yaml`.
    pub struct EdgeConfig(
        Role::Edge, "edge.yaml", retired: ["padding_size", "chan_size", "init", "protect"]
    ) {
        /// RTP from the cloud.
        rtp {
            /// Address that RTP is received on: :5222, or a group to join such as 239.0.0.1:5222.
            restart addr -> udp_addr: ListenAddr = ListenAddr::any(5222), also [udp_addr];
            /// Second address or group for the same packets: another uplink, or a group beside the
            /// unicast address; "" is none.
            restart addr_2 -> udp_addr_2: Option<ListenAddr> = None, also [udp_addr_2];
            /// IPv4 address of the interface that the group is joined on; "" is the system's choice.
            restart multicast_interface -> multicast_interface: InterfaceAddr = InterfaceAddr(None),
                also [multicast_interface];
            /// Bytes of kernel buffer per address.
            restart recv_buffer -> udp_recv_buffer: usize = 8 << 20,
                in 1 << 16..=1 << 30, also [udp_recv_buffer];
            /// Share of the received packets that is dropped, for tests.
            restart pack_loss -> pack_loss: f64 = 0.0, in 0.0..=1.0, also [pack_loss];
        }
        /// The cloud, or the parent edge, that streams come from.
        upstream {
            /// Host name or address; "" learns it and its ports from its datagrams.
            restart host -> cloud_host: String = String::new(), also [cloud_host];
            /// QUIC port, or host:port if that is another host.
            restart quic_addr -> quic_addr: ListenAddr = ListenAddr::any(4242), also [quic_addr];
            /// HTTP port, or host:port. Used to look up stream names where no downpour/1 connection
            /// announces them.
            restart api_addr -> api_addr: ListenAddr = ListenAddr::any(8090), also [api_addr];
            /// Whether to request RTP. Use false if the cloud's downstream.targets lists this edge's
            /// address and a relay or NAT lies between.
            restart subscribe -> rtp_subscribe: bool = true, also [rtp_subscribe];
            /// Address of the cloud's RTP port, host:port; "" is host and the port that the cloud
            /// announces.
            restart rtp_addr -> cloud_rtp_addr: Option<Destination> = None, also [cloud_rtp_addr];
            /// The same for rtp.addr_2; "" is rtp_addr.
            restart rtp_addr_2 -> cloud_rtp_addr_2: Option<Destination> = None,
                also [cloud_rtp_addr_2];
            /// Name of this edge in the cloud's log; "" is the machine's host name.
            restart node_name -> node_name: String = String::new(), also [node_name];
            /// Token that the cloud requires (its downstream.edge_token).
            restart token -> token: String = String::new(), also [token];
            /// Streams to subscribe to: a list of app/name, app/* or * for all.
            restart streams -> streams: Vec<StreamPattern> = vec![StreamPattern::All],
                also [streams];
        }
        /// How the cloud's certificate is verified.
        trust {
            /// SHA-256 of the certificate, 64 hexadecimal digits; the cloud logs it at start.
            restart fingerprint -> fingerprint: Option<Fingerprint> = None, also [fingerprint];
            /// CA that signed the certificate, PEM.
            restart ca_file -> ca_file: PathBuf = PathBuf::new(), also [ca_file];
            /// File that keeps the fingerprints of certificates trusted at first use.
            restart known_clouds -> known_clouds: PathBuf = "known_clouds".into(),
                also [known_clouds];
            /// true verifies nothing: anyone on the path can then pose as the cloud.
            restart insecure -> insecure: bool = false, also [insecure];
        }
        /// Repair of lost packets.
        repair {
            /// Lateness after which a packet counts as lost, in milliseconds; 15 ms more are left for
            /// the last attempt.
            restart latency_ms -> latency_ms: u64 = 500, in 20..=30_000, also [latency_ms];
            /// How lost packets are requested: auto, downpour, or v0 for an existing Go cloud.
            restart protocol -> repair_protocol: RepairProtocol = RepairProtocol::Auto,
                also [repair_protocol];
            /// true requests no lost packets; video that is joined late then lacks its codec headers.
            restart disabled -> disable_quic: bool = false, also [disable_quic];
            /// Whether to use parity packets if the cloud sends any. With RTP to a group, or without
            /// subscribing, they arrive on the port after the next.
            restart fec -> fec: bool = true, also [fec];
        }
        /// HTTP: /{app}/{name}.flv for viewers, /stats/time, /healthz, /metrics.
        http {
            /// Address that HTTP is served on.
            restart addr -> flv_addr: ListenAddr = ListenAddr::any(8092), also [flv_addr];
            /// Connections of one client address that are not viewers; 0 is half of
            /// max_viewers + 1024. Loopback addresses have no such limit.
            restart max_connections_per_address -> http_max_connections_per_address: usize = 0,
                in 0..=1_000_000;
            /// Viewers at one time.
            restart max_viewers -> max_viewers: usize = 10_000,
                in 1..=1_000_000, also [max_viewers];
            /// Least time between two writes to a viewer, in milliseconds; 0 writes each frame at
            /// once. 350 takes a fraction of the processor time and adds up to 350 ms of delay.
            restart merge_write_ms -> merge_write_ms: u64 = 0, in 0..=2000, also [merge_write_ms];
            /// Bytes that the kernel holds for a viewer that reads too slowly; 0 is 1.5 s of its stream.
            restart viewer_send_buffer -> viewer_send_buffer: u32 = 0, in 0..=1 << 30;
            /// Certificate for HTTPS, PEM. Accepted, but HTTPS is not served yet.
            restart cert_file -> cert_file: PathBuf = PathBuf::new(), also [cert_file];
            /// Private key of the certificate, PEM. Not used yet.
            restart key_file -> key_file: PathBuf = PathBuf::new(), also [key_file];
        }
        /// HLS. Accepted, but not served yet.
        hls {
            /// Whether to serve HLS.
            restart enabled -> enable_hls: bool = false, also [enable_hls];
            /// Address that HLS is served on.
            restart addr -> hls_addr: ListenAddr = ListenAddr::any(7002), also [hls_addr];
        }
        /// Edges below this node: RTP to them, and repair. A file with this section makes the edge a
        /// parent.
        downstream {
            /// Whether this edge is a parent; true if left out of a section that is there.
            restart enabled -> downstream_enabled: bool = false;
            ..downstream: DownstreamConfig = DownstreamConfig::default(), nested;
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
            ..log: LogConfig = LogConfig::named("edge.log"), flat;
        }
        /// Shutdown after SIGTERM or SIGINT.
        shutdown {
            ..shutdown: ShutdownConfig = ShutdownConfig::default(), flat;
        }
    }
}

impl EdgeConfig {
    fn settle(&mut self, given: &Given) {
        // `[::1]`, as in an address with a port.
        let host = self.cloud_host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if let Some(host) = host.filter(|host| host.parse::<std::net::Ipv6Addr>().is_ok()) {
            self.cloud_host = host.to_owned();
        }
        if given.has_section("downstream") && !given.has_key("downstream.enabled") {
            self.downstream_enabled = true;
        }
        self.downstream.settle(given);
    }

    fn check(&self) -> Result<(), Conflict> {
        let fail = |keys: &[&'static str], message: &str| Err(Conflict::new(keys, message));
        if self.insecure && self.fingerprint.is_some() {
            return fail(
                &["trust.insecure"],
                "it switches off the check of the fingerprint; remove one of the two",
            );
        }
        if self.insecure && !self.ca_file.as_os_str().is_empty() {
            return fail(
                &["trust.insecure"],
                "it switches off the check against ca_file; remove one of the two",
            );
        }
        if !self.cloud_host.is_empty() && !downpour_distribution::address::is_host(&self.cloud_host)
        {
            let message = format!(
                "{:?} is not valid; use a host name or an address, without a port",
                self.cloud_host
            );
            return Err(Conflict::new(&["upstream.host"], message));
        }
        if self.udp_addr_2.is_none() && self.cloud_rtp_addr_2.is_some() {
            return fail(&["upstream.rtp_addr_2"], "it needs rtp.addr_2, which is not set");
        }
        if self.udp_addr.port() != 0 && self.udp_addr_2.as_ref() == Some(&self.udp_addr) {
            return fail(&["rtp.addr_2"], "use an address that differs from rtp.addr, or \"\"");
        }
        if self.streams.is_empty() || self.streams.len() > PATTERNS_MAX {
            return fail(&["upstream.streams"], "use 1 to 1000 patterns; [\"*\"] is every stream");
        }
        if self.node_name.len() > 128 || self.node_name.contains(char::is_control) {
            return fail(
                &["upstream.node_name"],
                "use at most 128 bytes, without control characters",
            );
        }
        if self.token.len() > 1024 {
            return fail(&["upstream.token"], "use at most 1024 bytes");
        }
        self.downstream.check()?;
        let quic = &self.downstream.quic_addr;
        let rtp_out = ListenAddr::any(self.downstream.rtp_port);
        let mut udp = vec![("rtp.addr", &self.udp_addr)];
        udp.extend(self.udp_addr_2.as_ref().map(|addr| ("rtp.addr_2", addr)));
        if self.downstream_enabled {
            udp.push(("downstream.quic_addr", quic));
            udp.push(("downstream.rtp_port", &rtp_out));
        }
        super::check_ports(&udp)?;
        self.log.check()
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.enable_hls {
            warnings.push("hls.enabled: HLS is not served yet; viewers have HTTP-FLV".into());
        }
        if !self.cert_file.as_os_str().is_empty() || !self.key_file.as_os_str().is_empty() {
            warnings.push(format!(
                "http.cert_file, http.key_file: HTTPS IS NOT SERVED. An existing Go edge serves HTTPS in \
                 place of HTTP when both files exist; this edge serves plain HTTP on {} only, and \
                 viewers with https:// links cannot connect. Put a TLS proxy in front of it, and \
                 remove both keys",
                self.flv_addr
            ));
        }
        if self.pack_loss > 0.0 {
            let share = self.pack_loss * 100.0;
            warnings
                .push(format!("rtp.pack_loss: {share} % of all packets are dropped on purpose"));
        }
        if self.insecure {
            warnings.push("trust.insecure: the cloud's certificate is not verified".into());
        }
        warnings
    }
}

/// Patterns that one edge subscribes with.
const PATTERNS_MAX: usize = 1000;
