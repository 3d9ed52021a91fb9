//! What a cloud node can be told.

use std::{collections::HashSet, path::PathBuf};

use super::{ClientAddr, InterfaceAddr, ListenAddr, LogLevel, Role, schema::settings};
use downpour_distribution::address::Destination;
use downpour_distribution::{AddrRange, downstream::fanout::Pacing, tls};
use downpour_repair::fec::{Fec, PARITY_PORT_OFFSET};

settings! {
    /// A cloud node's settings: `config.yaml`.
    pub struct CloudConfig(Role::Cloud, "config.yaml", retired: []) {
        "Addresses" {
            /// Where encoders push RTMP to.
            rtmp_addr: ListenAddr = ListenAddr::any(1935);
            /// Where edges ask for lost packets over QUIC.
            quic_addr: ListenAddr = ListenAddr::any(4242);
            /// Where the HTTP API listens: /stat/livestat, /api/v1/edges, /healthz, /metrics.
            api_addr: ListenAddr = ListenAddr::any(8090);
            /// The UDP port that RTP is sent from and edges prove their addresses to; 0 takes a free
            /// one.
            rtp_port: u16 = 5220;
            /// Multicast groups, and edges that cannot say hello, which get every stream: a list of
            /// ip:port or host:port, or of {addr: ip:port, fec: auto} where one has a fec of its
            /// own.
            client_addr_list: Vec<ClientAddr> = vec![
                Destination::ip([239, 0, 0, 1], 5222).into(),
                Destination::ip([127, 0, 0, 1], 5224).into(),
            ];
        }
        "RTP" {
            /// RTP packets of a stream that are held for repair, 1 to 32768.
            rtp_cache_size: usize = 5000, in 1..=32768;
            /// How long they are held at most, in milliseconds, 100 to 600000.
            rtp_cache_ms: u64 = 10_000, in 100..=600_000;
            /// Bytes of media in an RTP packet, 512 to 1180; over 1120, repairs may not fit a QUIC
            /// datagram.
            rtp_payload_max: usize = 1120, in 512..=1180;
            /// Parity packets with which edges make lost ones anew: off, auto (as much as their reports
            /// call for), or {columns: 10, rows: 5}; rows: 1 is row parity alone.
            fec: Fec = Fec::Off;
            /// Whether bursts, such as those of key frames, leave at once (off) or spread, for networks
            /// with short queues: {factor: 1.5 to 100} times the stream's rate, but within a frame's
            /// time.
            pacing: Pacing = Pacing::Off;
            /// Threads that send RTP, 0 to 64; 0 is one for each core, at most 32, half of which
            /// share what goes to few edges.
            fanout_workers: usize = 0, in 0..=64;
            /// Routers that multicast may pass, 0 to 255; 1 stays in the local network.
            multicast_ttl: u8 = 1;
            /// Whether edges on this machine get what is sent to a group.
            multicast_loop: bool = true;
            /// An IPv4 address of the interface that multicast leaves by; "" is the system's
            /// choice.
            multicast_interface: InterfaceAddr = InterfaceAddr(None);
            /// true sends no RTP at all, to look for faults without edges.
            debug: bool = false;
        }
        "Streams" {
            /// Streams at one time, 1 to 100000.
            max_streams: usize = 1000, in 1..=100_000;
            /// RTMP connections at one time, 1 to 1000000.
            rtmp_max_connections: usize = 8192, in 1..=1_000_000;
            /// A second encoder may take a stream over once the first was silent this long, in
            /// milliseconds, 100 to 600000.
            publisher_silence_ms: u64 = 5000, in 100..=600_000;
            /// Media of a stream that waits in memory for a slow disk when it is recorded, in
            /// milliseconds, 1000 to 600000.
            gop_cache_max_ms: u32 = 20_000, in 1000..=600_000;
            /// And in bytes, 1048576 to 4294967296.
            gop_cache_max_bytes: usize = 32 << 20, in 1 << 20..=4 << 30;
        }
        "Edges" {
            /// The cloud's certificate, PEM; made at first start when neither it nor the key is
            /// there.
            cert_file: PathBuf = tls::DEFAULT_CERT_FILE.into();
            /// Its private key, PEM.
            key_file: PathBuf = tls::DEFAULT_KEY_FILE.into();
            /// What an edge must say to subscribe; "" asks for nothing.
            edge_token: String = String::new();
            /// Edges connected over QUIC at one time, 1 to 1000000.
            max_edges: usize = 10_000, in 1..=1_000_000;
            /// What an edge may be sent again, in per cent of the rate of its streams, 0 to 1000;
            /// 0 is no limit. Ten seconds' worth, and no less than 2 MiB, may go at once.
            repair_budget: u32 = 100, in 0..=1000;
            /// Whether existing Go edges may ask for lost packets; they cannot say a token.
            v0_repair: bool = true;
            /// Addresses and prefixes that they may ask from, such as [10.0.0.0/8, 192.0.2.7]; []
            /// is any.
            v0_allow: Vec<AddrRange> = Vec::new();
        }
        "Recording" {
            /// Whether each publication is written to an FLV file.
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
            log_file: String = "cloud.log".into();
            /// Bytes after which a new log file is begun, 65536 to 17179869184.
            log_file_max_bytes: u64 = 100 << 20, in 1 << 16..=16 << 30;
            /// Log files kept, 1 to 1000.
            log_file_count: u64 = 10, in 1..=1000;
            /// Time to finish after SIGTERM, in milliseconds, 0 to 60000.
            shutdown_grace_ms: u64 = 5000, in 0..=60_000;
        }
    }
}

impl CloudConfig {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let mut seen = HashSet::new();
        for client in &self.client_addr_list {
            let destination = &client.addr;
            if !seen.insert(destination.to_string()) {
                return Err((
                    "client_addr_list",
                    format!("{destination} stands there twice; leave one"),
                ));
            }
        }
        if seen.len() > DESTINATIONS_MAX {
            let message =
                format!("{} addresses are too many; {DESTINATIONS_MAX} at most", seen.len());
            return Err(("client_addr_list", message));
        }
        self.check_parity()?;
        if self.v0_allow.len() > V0_RANGES_MAX {
            let message = format!(
                "{} ranges are too many; give {V0_RANGES_MAX} at most",
                self.v0_allow.len()
            );
            return Err(("v0_allow", message));
        }
        if self.edge_token.len() > 1024 {
            return Err(("edge_token", "give at most 1024 bytes".into()));
        }
        super::check_log_file(&self.log_file)?;
        super::check_pair(&self.cert_file, &self.key_file)
    }

    /// Parity for an address of the list needs a port of its own there.
    fn check_parity(&self) -> Result<(), (&'static str, String)> {
        let fail = |message: String| Err(("client_addr_list", message));
        // Whatever their hosts: a socket on all addresses of a host gets what comes to a group that
        // anybody there has joined (Linux, IP_MULTICAST_ALL).
        let ports: HashSet<_> = self.client_addr_list.iter().map(|c| c.addr.port()).collect();
        let mut matrices = Vec::new();
        for ClientAddr { addr, fec } in &self.client_addr_list {
            let fec = fec.unwrap_or(self.fec);
            if fec == Fec::Off {
                continue;
            }
            let Some(port) = addr.port().checked_add(PARITY_PORT_OFFSET) else {
                return fail(format!(
                    "parity for {addr} would go to port + {PARITY_PORT_OFFSET}, and there is none; \
                     take a lower port, or switch its fec off"
                ));
            };
            if ports.contains(&port) {
                return fail(format!(
                    "parity for {addr} goes to port + {PARITY_PORT_OFFSET}, {port}, at which this list \
                     has an edge that might take it for media; change one, or switch its fec off"
                ));
            }
            if let Fec::Fixed(matrix) = fec
                && !matrices.contains(&matrix)
            {
                matrices.push(matrix);
            }
        }
        if matrices.len() > MATRICES_MAX {
            let count = matrices.len();
            return fail(format!(
                "{count} different matrices for fec are too many; {MATRICES_MAX} at most"
            ));
        }
        Ok(())
    }

    fn warnings(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Each is looked at for each connection.
const V0_RANGES_MAX: usize = 1000;
/// Addresses that are sent to without a hello.
const DESTINATIONS_MAX: usize = 10_000;
/// Each costs every stream an encoder.
const MATRICES_MAX: usize = 8;
