//! Settings of the nodes below a node: RTP to edges, and repair. A cloud always has them, an edge
//! if it is a parent.

use std::{collections::HashSet, path::PathBuf};

use super::{ClientAddr, Conflict, Given, InterfaceAddr, ListenAddr, check_pair, schema::group};
use downpour_distribution::{AddrRange, downstream::fanout::Pacing, tls};
use downpour_repair::fec::{Fec, PARITY_PORT_OFFSET};

group! {
    /// How a node serves the edges below it: the section `downstream`.
    pub struct DownstreamConfig {
        /// Address that edges connect to over QUIC, to subscribe and to request lost packets.
        restart quic_addr -> quic_addr: ListenAddr = ListenAddr::any(4242), also [quic_addr];
        /// UDP port that RTP is sent from and on which edges validate their addresses; 0 takes a
        /// free one.
        restart rtp_port -> rtp_port: u16 = 5220, in 0..=65535, also [rtp_port];
        /// Addresses that get every stream without subscribing: multicast groups and existing Go
        /// edges. A list of ip:port, host:port or `{addr: ip:port, fec: auto}`.
        live targets -> targets: Vec<ClientAddr> = Vec::new(), also [client_addr_list];
        /// Edges connected over QUIC at one time.
        restart max_edges -> max_edges: usize = 10_000, in 1..=1_000_000, also [max_edges];
        /// Token that an edge must present to subscribe; "" requires none.
        restart edge_token -> edge_token: String = String::new(), also [edge_token];
        /// Certificate for QUIC, PEM. Created at the first start if neither it nor the key exists.
        live cert_file -> cert_file: PathBuf = tls::DEFAULT_CERT_FILE.into(), also [cert_file];
        /// Private key of the certificate, PEM.
        live key_file -> key_file: PathBuf = tls::DEFAULT_KEY_FILE.into(), also [key_file];
        /// Rate of repair packets per edge, in per cent of the rate of its streams; 0 is no limit.
        /// A burst may be ten seconds' worth, and at least 2 MiB.
        restart repair_budget -> repair_budget: u32 = 100, in 0..=1000, also [repair_budget];
        /// Whether existing Go edges may request lost packets. They cannot present a token.
        restart v0_repair -> v0_repair: bool = true, also [v0_repair];
        /// Addresses and prefixes that Go edges may request from, such as `[10.0.0.0/8,
        /// 192.0.2.7]`; `[]` allows all.
        restart v0_allow -> v0_allow: Vec<AddrRange> = Vec::new(), also [v0_allow];
        /// Parity packets, from which edges rebuild lost packets: off, auto (as much as the edges'
        /// loss reports call for), or `{columns: 10, rows: 5}`. `rows: 1` is row parity only.
        restart fec -> fec: Fec = Fec::Off, also [fec];
        /// off sends a frame's packets at once. `{factor: 1.5 to 100}` spreads them at that multiple of
        /// the stream's rate, within one frame's time, for networks with short queues. targets does so
        /// with factor 2 for the addresses in targets only: Go edges have short buffers.
        restart pacing -> pacing: Pacing = Pacing::Targets, also [pacing];
        /// Whether the codec headers are sent again before each key frame while targets lists addresses,
        /// so that a Go edge that joins late or restarts plays.
        restart repeat_headers -> repeat_headers: bool = true;
        /// RTP packets per stream that are kept for repair.
        restart rtp_cache_size -> rtp_cache_size: usize = 5000, in 1..=32768, also [rtp_cache_size];
        /// Age at which they are dropped, in milliseconds. If rtp_cache_size is set alone, only the
        /// number limits them.
        restart rtp_cache_ms -> rtp_cache_ms: u64 = 10_000,
            in 100..=RTP_CACHE_MS_MAX, also [rtp_cache_ms];
        /// Bytes of media per RTP packet. Over 1120, repair packets may not fit a QUIC datagram.
        restart rtp_payload_max -> rtp_payload_max: usize = 1120,
            in 512..=1180, also [rtp_payload_max];
        /// Threads that send RTP. 0 is one per core, at most 32; half of them share the streams that
        /// go to few edges.
        restart fanout_workers -> fanout_workers: usize = 0, in 0..=64, also [fanout_workers];
        /// TTL of multicast packets: the number of routers they may pass. 1 stays in the local
        /// network.
        restart multicast_ttl -> multicast_ttl: u8 = 1, in 0..=255, also [multicast_ttl];
        /// Whether edges on this machine get multicast packets.
        restart multicast_loop -> multicast_loop: bool = true, also [multicast_loop];
        /// IPv4 address of the interface that multicast leaves by; "" is the system's choice.
        restart multicast_interface -> multicast_interface: InterfaceAddr = InterfaceAddr(None),
            also [multicast_interface];
        /// true sends no RTP at all, to look for faults without edges.
        restart debug -> debug: bool = false, also [debug];
    }
}

impl DownstreamConfig {
    /// Copies the values that take effect on reload.
    pub(crate) fn take_live(&mut self, new: &Self) {
        self.targets.clone_from(&new.targets);
        self.cert_file.clone_from(&new.cert_file);
        self.key_file.clone_from(&new.key_file);
    }

    /// A file of an existing cloud has the size of its cache alone: no time may cut that short.
    pub(super) fn settle(&mut self, given: &Given) {
        let has = |key: &str| given.has_key(&format!("downstream.{key}"));
        if has("rtp_cache_size") && !has("rtp_cache_ms") {
            self.rtp_cache_ms = RTP_CACHE_MS_MAX;
        }
    }

    pub(super) fn check(&self) -> Result<(), Conflict> {
        let mut seen = HashSet::new();
        for target in &self.targets {
            if !seen.insert(target.addr.to_string()) {
                let message = format!("{target} is listed twice; remove one");
                return Err(Conflict::new(TARGETS, message));
            }
        }
        if seen.len() > TARGETS_MAX {
            let message =
                format!("{} addresses are too many; use at most {TARGETS_MAX}", seen.len());
            return Err(Conflict::new(TARGETS, message));
        }
        self.check_parity()?;
        if self.v0_allow.len() > V0_RANGES_MAX {
            let count = self.v0_allow.len();
            let message = format!("{count} ranges are too many; use at most {V0_RANGES_MAX}");
            return Err(Conflict::new(&["downstream.v0_allow"], message));
        }
        if self.edge_token.len() > 1024 {
            return Err(Conflict::new(&["downstream.edge_token"], "use at most 1024 bytes"));
        }
        check_pair(&self.cert_file, &self.key_file)
    }

    /// Parity for a target goes to another port of its host, which must be free for it.
    fn check_parity(&self) -> Result<(), Conflict> {
        let fail = |message: String| Err(Conflict::new(TARGETS_AND_FEC, message));
        // Hosts do not matter: a wildcard socket receives packets of every group that any process of
        // its host has joined (Linux, IP_MULTICAST_ALL).
        let ports: HashSet<_> = self.targets.iter().map(|target| target.addr.port()).collect();
        let mut matrices = Vec::new();
        for ClientAddr { addr, fec } in &self.targets {
            let fec = fec.unwrap_or(self.fec);
            if fec == Fec::Off {
                continue;
            }
            let Some(port) = addr.port().checked_add(PARITY_PORT_OFFSET) else {
                return fail(format!(
                    "parity for {addr} would go to its port + {PARITY_PORT_OFFSET}, which is over \
                     65535; use a lower port, or set its fec to off"
                ));
            };
            if ports.contains(&port) {
                return fail(format!(
                    "parity for {addr} goes to its port + {PARITY_PORT_OFFSET}, {port}, and an entry \
                     of downstream.targets receives media on that port; change one of them, or set \
                     the fec of {addr} to off"
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
                "{count} different matrices for fec are too many; use at most {MATRICES_MAX}"
            ));
        }
        Ok(())
    }
}

const RTP_CACHE_MS_MAX: u64 = 600_000;
const TARGETS: &[&str] = &["downstream.targets"];
const TARGETS_AND_FEC: &[&str] = &["downstream.targets", "downstream.fec"];
/// Each is compared with each connection's address.
const V0_RANGES_MAX: usize = 1000;
/// Addresses that get RTP without subscribing.
const TARGETS_MAX: usize = 10_000;
/// Each costs every stream an encoder.
const MATRICES_MAX: usize = 8;
