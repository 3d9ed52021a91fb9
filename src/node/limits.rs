//! Compares what the settings may need with what the machine allows.
//!
//! [`Requirements`] come from the settings and [`SystemLimits`] from the machine. Where a limit is
//! below a requirement, an [`Advice`] has the command that raises it. A node logs it at start;
//! `downpour check` prints it.

use std::fmt;

pub use downpour_sys::rlimit::{Descriptors, raise_descriptors};

/// The most that a node may need under its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirements {
    /// File descriptors, and the settings that they are for.
    pub descriptors: (u64, String),
    /// TCP connections, one entry per listener.
    pub connections: Vec<Connections>,
    /// Bytes of each UDP socket's receive buffer; `None` leaves the system's default.
    pub receive_buffer: Option<u64>,
    /// UDP sockets with a receive buffer of that size.
    pub receivers: u64,
    /// Bytes of each UDP socket's send buffer; `None` leaves the system's default.
    pub send_buffer: Option<u64>,
    /// Streams that arrive over UDP.
    pub streams_in: u64,
}

/// TCP connections that a listener may have at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connections {
    /// How many.
    pub count: u64,
    /// The setting that limits them.
    pub setting: &'static str,
    /// Kernel memory of each, in bytes, while its peer keeps up.
    pub bytes: u64,
}

impl Connections {
    /// RTMP connections. What arrives is read at once, so a packet or two wait in each.
    pub fn encoders(count: u64) -> Self {
        Self { count, setting: "rtmp.max_connections", bytes: 4 << 10 }
    }

    /// HTTP-FLV viewers. A frame or two are in flight on each connection; one whose peer falls
    /// behind may take all of `net.ipv4.tcp_wmem`.
    pub fn viewers(count: u64) -> Self {
        Self { count, setting: "http.max_viewers", bytes: 16 << 10 }
    }
}

/// Limits of the machine and of this process; `None` where a limit cannot be read, as in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SystemLimits {
    /// `RLIMIT_NOFILE` of this process.
    pub descriptors: Option<Descriptors>,
    /// `fs.nr_open`: the maximum of `RLIMIT_NOFILE`.
    pub nr_open: Option<u64>,
    /// `net.core.rmem_max`: the maximum of a receive buffer, in bytes.
    pub rmem_max: Option<u64>,
    /// `net.core.wmem_max`: the maximum of a send buffer, in bytes.
    pub wmem_max: Option<u64>,
    /// `net.core.somaxconn`: connections that may wait to be accepted.
    pub somaxconn: Option<u64>,
    /// `net.core.netdev_max_backlog`: packets that may wait for a processor.
    pub netdev_max_backlog: Option<u64>,
    /// `net.ipv4.tcp_mem`, in pages: below the first number there is no memory pressure, from the
    /// second on there is, and the third is the maximum.
    pub tcp_mem: Option<[u64; 3]>,
    /// `net.ipv4.udp_mem`, the same.
    pub udp_mem: Option<[u64; 3]>,
    /// Bytes per page.
    pub page: u64,
}

impl SystemLimits {
    /// Reads the limits of this machine and this process.
    pub fn read() -> Self {
        let read = |name: &str| {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            std::fs::read_to_string(path).ok()
        };
        let one = |name| read(name)?.trim().parse().ok();
        let three = |name| three_numbers(&read(name)?);
        Self {
            descriptors: Descriptors::of_this_process().ok(),
            nr_open: one("fs.nr_open"),
            rmem_max: one("net.core.rmem_max"),
            wmem_max: one("net.core.wmem_max"),
            somaxconn: one("net.core.somaxconn"),
            netdev_max_backlog: one("net.core.netdev_max_backlog"),
            tcp_mem: three("net.ipv4.tcp_mem"),
            udp_mem: three("net.ipv4.udp_mem"),
            page: downpour_sys::rlimit::page_size(),
        }
    }
}

/// A limit that is too low: what that leads to, and the command that raises it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice(String);

impl Advice {
    /// The kernel gives UDP sockets buffers of `granted` bytes instead of `wanted`, because of its
    /// setting `sysctl`.
    pub fn small_buffer(sysctl: &str, wanted: u64, granted: u64) -> Self {
        Self(downpour_sys::udp::small_buffer_warning(sysctl, wanted, granted))
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Raises this process's limit of file descriptors as far as needed and allowed, and returns advice
/// about limits that are still too low. Socket buffers are not among them: binding a socket logs
/// those.
pub fn prepare(requirements: &Requirements) -> Vec<Advice> {
    if let Err(error) = raise_descriptors(requirements.descriptors.0) {
        let needed = requirements.descriptors.0;
        tracing::warn!(needed, %error, "limit of file descriptors cannot be raised");
    }
    advice(requirements, &SystemLimits::read())
}

/// Returns advice about limits that are too low, except those of socket buffers.
pub fn advice(requirements: &Requirements, limits: &SystemLimits) -> Vec<Advice> {
    [
        too_few_descriptors(requirements, limits),
        short_backlog(requirements, limits),
        short_input_queue(requirements, limits),
        little_tcp_memory(requirements, limits),
        little_udp_memory(requirements, limits),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Returns advice about socket buffers that will be smaller than the settings require.
pub fn small_buffers(requirements: &Requirements, limits: &SystemLimits) -> Vec<Advice> {
    [
        ("net.core.rmem_max", requirements.receive_buffer, limits.rmem_max),
        ("net.core.wmem_max", requirements.send_buffer, limits.wmem_max),
    ]
    .into_iter()
    .filter_map(|(sysctl, wanted, most)| {
        let (wanted, most) = (wanted?, most?);
        (most < wanted).then(|| Advice::small_buffer(sysctl, wanted, most))
    })
    .collect()
}

/// Returns the backlog, as listen(2) takes it, of a socket that serves `connections` connections. The
/// kernel cuts it to `net.core.somaxconn`.
///
/// After a restart all clients reconnect at once. A client that finds the queue full is not refused:
/// it retries after 1 s (RFC 6298 §2). So a queue for a quarter of them is enough.
pub fn backlog(connections: usize) -> u32 {
    let part = (connections / 4).clamp(1024, usize::from(u16::MAX));
    u32::try_from(part).unwrap_or(u32::MAX)
}

fn too_few_descriptors(requirements: &Requirements, limits: &SystemLimits) -> Option<Advice> {
    let (needed, settings) = &requirements.descriptors;
    let (needed, hard) = (*needed, limits.descriptors?.hard);
    if needed <= hard {
        return None;
    }
    // The kernel refuses a limit above fs.nr_open, even to root.
    let first = limits
        .nr_open
        .filter(|most| *most < needed)
        .map_or_else(String::new, |_| format!("sysctl -w fs.nr_open={needed}, then "));
    Some(Advice(format!(
        "{needed} file descriptors may be needed ({settings}) and this process may have {hard}: \
         further connections will fail; run: {first}ulimit -n {needed} (systemd: \
         LimitNOFILE={needed}, supervisord: minfds={needed})"
    )))
}

fn short_backlog(requirements: &Requirements, limits: &SystemLimits) -> Option<Advice> {
    // Each listening socket has its queue.
    let Connections { count, setting, .. } =
        requirements.connections.iter().max_by_key(|listener| listener.count)?;
    let wanted = u64::from(backlog(usize::try_from(*count).unwrap_or(usize::MAX)));
    let most = limits.somaxconn?;
    (most < wanted).then(|| {
        Advice(format!(
            "{most} connections may wait to be accepted, and {wanted} of the {count} that \
             {setting} allows may arrive at once: the rest connect a second late; run: sysctl -w \
             net.core.somaxconn={wanted}"
        ))
    })
}

/// Of [`FRAMES_PER_KEY_FRAME`] streams, one sends a key frame in any frame time.
fn short_input_queue(requirements: &Requirements, limits: &SystemLimits) -> Option<Advice> {
    let streams = requirements.streams_in;
    let wanted = streams.saturating_mul(KEY_FRAME_PACKETS) / FRAMES_PER_KEY_FRAME;
    let most = limits.netdev_max_backlog?;
    (most < wanted).then(|| {
        Advice(format!(
            "{most} packets may wait for a processor, and the key frames of {streams} streams \
             (streams.max) may bring {wanted} at once: packets may be dropped; run: sysctl -w \
             net.core.netdev_max_backlog={wanted}"
        ))
    })
}

fn little_tcp_memory(requirements: &Requirements, limits: &SystemLimits) -> Option<Advice> {
    let listeners = &requirements.connections;
    let bytes = listeners
        .iter()
        .map(|listener| listener.count.saturating_mul(listener.bytes))
        .fold(0, u64::saturating_add);
    let wanted = bytes.div_ceil(limits.page.max(1));
    let [_, pressure, _] = limits.tcp_mem?;
    (pressure < wanted).then(|| {
        let settings: Vec<_> = listeners.iter().map(|listener| listener.setting).collect();
        Advice(format!(
            "the kernel shrinks TCP buffers from {} MiB on, and the connections allowed by {} may \
             take {} MiB: viewers may stall; run: sysctl -w net.ipv4.tcp_mem='{}'",
            pressure.saturating_mul(limits.page) >> 20,
            settings.join(" and "),
            bytes >> 20,
            in_proportion(wanted)
        ))
    })
}

fn little_udp_memory(requirements: &Requirements, limits: &SystemLimits) -> Option<Advice> {
    // Linux doubles the requested size, for bookkeeping (socket(7)), and counts the double.
    let bytes =
        requirements.receive_buffer?.saturating_mul(2).saturating_mul(requirements.receivers);
    let wanted = bytes.div_ceil(limits.page.max(1));
    let [.., most] = limits.udp_mem?;
    (most < wanted).then(|| {
        Advice(format!(
            "all UDP sockets together may hold {} MiB, and rtp.recv_buffer needs {} MiB: bursts \
             may be dropped; run: sysctl -w net.ipv4.udp_mem='{}'",
            most.saturating_mul(limits.page) >> 20,
            bytes >> 20,
            in_proportion(wanted)
        ))
    })
}

/// The three numbers of `tcp_mem` or `udp_mem` around the second, spaced as the kernel does.
fn in_proportion(pages: u64) -> String {
    format!("{} {pages} {}", pages / 4 * 3, pages.saturating_mul(3).div_ceil(2))
}

fn three_numbers(text: &str) -> Option<[u64; 3]> {
    let numbers: Vec<_> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

/// Packets of a key frame of 50 KB, a fifth of 2 s of a 1 Mbit/s stream.
const KEY_FRAME_PACKETS: u64 = 45;
/// At 25 frames per second and a key frame every 2 s.
const FRAMES_PER_KEY_FRAME: u64 = 50;

#[cfg(test)]
mod tests {
    use super::*;

    /// Defaults of Debian with 4 GiB of memory.
    fn debian() -> SystemLimits {
        SystemLimits {
            descriptors: Some(Descriptors { soft: 1024, hard: 524_288 }),
            nr_open: Some(1_048_576),
            rmem_max: Some(212_992),
            wmem_max: Some(212_992),
            somaxconn: Some(4096),
            netdev_max_backlog: Some(1000),
            tcp_mem: Some([45_000, 60_000, 90_000]),
            udp_mem: Some([90_000, 120_000, 180_000]),
            page: 4096,
        }
    }

    /// Requirements of a cloud with default settings.
    fn cloud() -> Requirements {
        Requirements {
            descriptors: (19_446, "rtmp.max_connections, http.max_viewers".into()),
            connections: vec![Connections::encoders(8192), Connections::viewers(10_000)],
            receive_buffer: None,
            receivers: 0,
            send_buffer: Some(4 << 20),
            streams_in: 0,
        }
    }

    /// Requirements of an edge with default settings, except for the number of viewers.
    fn edge(viewers: u64) -> Requirements {
        Requirements {
            descriptors: (viewers + 1124, "http.max_viewers".into()),
            connections: vec![Connections::viewers(viewers)],
            receive_buffer: Some(8 << 20),
            receivers: 1,
            send_buffer: None,
            streams_in: 1000,
        }
    }

    fn advice_lines(requirements: &Requirements, limits: &SystemLimits) -> Vec<String> {
        advice(requirements, limits).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn default_settings_fit_a_default_machine_except_for_socket_buffers() {
        assert_eq!(advice_lines(&cloud(), &debian()), [""; 0]);
        assert_eq!(advice_lines(&edge(10_000), &debian()), [""; 0]);
        let lines = |requirements: &Requirements| {
            let buffers = small_buffers(requirements, &debian());
            buffers.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            lines(&edge(10_000)),
            ["the kernel gives UDP buffers of 212992 bytes instead of 8388608: bursts may be \
              dropped; run: sysctl -w net.core.rmem_max=8388608"]
        );
        let wmem = lines(&cloud());
        assert!(wmem[0].ends_with("run: sysctl -w net.core.wmem_max=4194304"), "{wmem:?}");
        assert_eq!(wmem.len(), 1);
    }

    #[test]
    fn advice_about_a_low_hard_limit_has_the_three_ways_to_raise_it() {
        let limits =
            SystemLimits { descriptors: Some(Descriptors { soft: 1024, hard: 4096 }), ..debian() };
        assert_eq!(
            advice_lines(&edge(5000), &limits),
            ["6124 file descriptors may be needed (http.max_viewers) and this process may have \
              4096: further connections will fail; run: ulimit -n 6124 (systemd: \
              LimitNOFILE=6124, supervisord: minfds=6124)"]
        );
        // The soft limit does not matter: the node raises it.
        let limits =
            SystemLimits { descriptors: Some(Descriptors { soft: 64, hard: 6124 }), ..limits };
        assert_eq!(advice_lines(&edge(5000), &limits), [""; 0]);
    }

    #[test]
    fn nr_open_is_raised_before_a_higher_descriptor_limit() {
        let requirements =
            Requirements { descriptors: (1_101_124, "http.max_viewers".into()), ..edge(10_000) };
        let lines = advice_lines(&requirements, &debian());
        let expected = "run: sysctl -w fs.nr_open=1101124, then ulimit -n 1101124 (systemd: ";
        assert!(lines[0].contains(expected), "{lines:?}");
    }

    #[test]
    fn advice_about_queues_and_memory_is_enough_to_silence_it() {
        let requirements =
            Requirements { receive_buffer: Some(512 << 20), streams_in: 2000, ..edge(20_000) };
        let lines = advice_lines(&requirements, &debian());
        let ends = [
            "sysctl -w net.core.somaxconn=5000",
            "sysctl -w net.core.netdev_max_backlog=1800",
            "sysctl -w net.ipv4.tcp_mem='60000 80000 120000'",
            "sysctl -w net.ipv4.udp_mem='196608 262144 393216'",
        ];
        assert_eq!(lines.len(), ends.len(), "{lines:?}");
        for (line, end) in lines.iter().zip(ends) {
            assert!(line.ends_with(end), "{line}");
        }
        let limits = SystemLimits {
            somaxconn: Some(5000),
            netdev_max_backlog: Some(1800),
            tcp_mem: Some([60_000, 80_000, 120_000]),
            udp_mem: Some([196_608, 262_144, 393_216]),
            ..debian()
        };
        assert_eq!(advice_lines(&requirements, &limits), [""; 0]);
    }

    #[test]
    fn unknown_limits_lead_to_no_advice() {
        let requirements = edge(1_000_000);
        assert_eq!(advice(&requirements, &SystemLimits::default()), []);
        assert_eq!(small_buffers(&requirements, &SystemLimits::default()), []);
    }

    #[test]
    fn backlog_grows_with_the_connections() {
        let cases = [(1, 1024), (8192, 2048), (10_000, 2500), (1_000_000, 65_535)];
        for (connections, expected) in cases {
            assert_eq!(backlog(connections), expected);
        }
    }

    #[test]
    fn limits_of_this_machine_are_read() {
        let limits = SystemLimits::read();
        let descriptors = limits.descriptors.expect("no limit of descriptors");
        assert!(descriptors.soft <= descriptors.hard);
        assert!(limits.page.is_power_of_two());
        // A container sees only the network settings of its namespace, and `net.core.rmem_max` is
        // not one of them.
        assert!(limits.nr_open.is_some() && limits.somaxconn.is_some(), "{limits:?}");
        assert_eq!(three_numbers("1\t2\t3\n"), Some([1, 2, 3]));
        assert_eq!(three_numbers("1 2"), None);
    }
}
