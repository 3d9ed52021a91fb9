//! What the settings need of the machine, and what to type where it gives less.
//!
//! [`Requirements`] come from the settings and [`SystemLimits`] from the machine; what does not fit is a
//! [`Advice`], which is told in the log at start and by `downpour check`.

use std::fmt;

pub use downpour_sys::rlimit::{Descriptors, raise_descriptors};

/// What a node may come to need under its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirements {
    /// File descriptors, and the settings that they are for.
    pub descriptors: (u64, &'static str),
    /// TCP connections at one time, and the setting that says so.
    pub connections: (u64, &'static str),
    /// Bytes of one UDP socket's receive buffer; `None` if none is asked for.
    pub receive_buffer: Option<u64>,
    /// Sockets that have it.
    pub receivers: u64,
    /// Bytes of one UDP socket's send buffer; `None` if none is asked for.
    pub send_buffer: Option<u64>,
    /// Streams that arrive over UDP.
    pub streams_in: u64,
}

/// What the machine allows; `None` where it does not say, as in a container.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SystemLimits {
    /// `RLIMIT_NOFILE` of this process.
    pub descriptors: Option<Descriptors>,
    /// `fs.nr_open`: the most that `RLIMIT_NOFILE` can be.
    pub nr_open: Option<u64>,
    /// `net.core.rmem_max`: bytes that a receive buffer may have.
    pub rmem_max: Option<u64>,
    /// `net.core.wmem_max`: bytes that a send buffer may have.
    pub wmem_max: Option<u64>,
    /// `net.core.somaxconn`: connections that may wait to be accepted.
    pub somaxconn: Option<u64>,
    /// `net.core.netdev_max_backlog`: packets that may wait for a processor.
    pub netdev_max_backlog: Option<u64>,
    /// `net.ipv4.tcp_mem`, in pages: no pressure below the first, pressure from the second, no
    /// more than the third.
    pub tcp_mem: Option<[u64; 3]>,
    /// `net.ipv4.udp_mem`, the same.
    pub udp_mem: Option<[u64; 3]>,
    /// Bytes of a page.
    pub page: u64,
}

impl SystemLimits {
    /// Those of this machine and this process.
    pub fn take() -> Self {
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

/// One thing that the machine gives too little of: what that leads to, and what to type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advice(String);

impl Advice {
    /// The kernel gives UDP sockets smaller buffers than were asked for. `sysctl` is the setting
    /// that bounds them.
    pub fn small_buffer(sysctl: &str, wanted: u64, granted: u64) -> Self {
        Self(downpour_sys::udp::small_buffer_warning(sysctl, wanted, granted))
    }
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Raises this process's limit of file descriptors to what is needed, as far as it may, and gives
/// what is too small all the same. Binding a socket tells its buffers itself.
pub fn prepare(needs: &Requirements) -> Vec<Advice> {
    if let Err(error) = raise_descriptors(needs.descriptors.0) {
        tracing::warn!(%error, "the limit of file descriptors cannot be raised");
    }
    advice(needs, &SystemLimits::take())
}

/// What is too small, but for the buffers of sockets.
pub fn advice(needs: &Requirements, readings: &SystemLimits) -> Vec<Advice> {
    [
        too_few_descriptors(needs, readings),
        short_backlog(needs, readings),
        short_input_queue(needs, readings),
        little_tcp_memory(needs, readings),
        little_udp_memory(needs, readings),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Buffers of sockets that will be smaller than the settings ask.
pub fn small_buffers(needs: &Requirements, readings: &SystemLimits) -> Vec<Advice> {
    [
        ("net.core.rmem_max", needs.receive_buffer, readings.rmem_max),
        ("net.core.wmem_max", needs.send_buffer, readings.wmem_max),
    ]
    .into_iter()
    .filter_map(|(sysctl, wanted, most)| {
        let (wanted, most) = (wanted?, most?);
        (most < wanted).then(|| Advice::small_buffer(sysctl, wanted, most))
    })
    .collect()
}

/// How many of so many connections a listening socket lets wait to be accepted: the argument of
/// listen(2), which the kernel cuts to `net.core.somaxconn`.
///
/// After a restart all of them come back at once. Who finds the queue full is not refused but tries
/// again after 1 s (RFC 6298 §2), so that a part of all is enough.
pub fn backlog(connections: usize) -> u32 {
    let part = (connections / 4).clamp(1024, usize::from(u16::MAX));
    u32::try_from(part).unwrap_or(u32::MAX)
}

fn too_few_descriptors(needs: &Requirements, readings: &SystemLimits) -> Option<Advice> {
    let (needed, settings) = needs.descriptors;
    let hard = readings.descriptors?.hard;
    if needed <= hard {
        return None;
    }
    // The kernel refuses a limit over this one, even to root.
    let first = readings
        .nr_open
        .filter(|most| *most < needed)
        .map_or_else(String::new, |_| format!("sysctl -w fs.nr_open={needed}, then "));
    Some(Advice(format!(
        "{needed} file descriptors may be needed ({settings}) and this process may have {hard}: \
         connections over that will fail; run: {first}ulimit -n {needed} (systemd: \
         LimitNOFILE={needed}, supervisord: minfds={needed})"
    )))
}

fn short_backlog(needs: &Requirements, readings: &SystemLimits) -> Option<Advice> {
    let (connections, setting) = needs.connections;
    let wanted = u64::from(backlog(usize::try_from(connections).unwrap_or(usize::MAX)));
    let most = readings.somaxconn?;
    (most < wanted).then(|| {
        Advice(format!(
            "{most} connections may wait to be accepted, and {wanted} of those that {setting} \
             allows may come at once: the others come a second late; run: sysctl -w \
             net.core.somaxconn={wanted}"
        ))
    })
}

/// One stream in [`FRAMES_PER_KEY_FRAME`] sends a key frame in the same frame time as another.
fn short_input_queue(needs: &Requirements, readings: &SystemLimits) -> Option<Advice> {
    let streams = needs.streams_in;
    let wanted = streams.saturating_mul(KEY_FRAME_PACKETS) / FRAMES_PER_KEY_FRAME;
    let most = readings.netdev_max_backlog?;
    (most < wanted).then(|| {
        Advice(format!(
            "{most} packets may wait for a processor, and the key frames of {streams} streams \
             (max_streams) may bring {wanted} at once: they may be dropped; run: sysctl -w \
             net.core.netdev_max_backlog={wanted}"
        ))
    })
}

fn little_tcp_memory(needs: &Requirements, readings: &SystemLimits) -> Option<Advice> {
    let (connections, setting) = needs.connections;
    let wanted = connections.saturating_mul(CONNECTION_BYTES).div_ceil(readings.page.max(1));
    let [_, pressure, _] = readings.tcp_mem?;
    (pressure < wanted).then(|| {
        let bytes = pressure.saturating_mul(readings.page) >> 20;
        Advice(format!(
            "the kernel makes TCP's buffers small from {bytes} MiB on, and the connections that \
             {setting} allows may take {} MiB: viewers may stall; run: sysctl -w \
             net.ipv4.tcp_mem='{}'",
            connections.saturating_mul(CONNECTION_BYTES) >> 20,
            in_proportion(wanted)
        ))
    })
}

fn little_udp_memory(needs: &Requirements, readings: &SystemLimits) -> Option<Advice> {
    // Linux doubles what is asked, for its own bookkeeping (socket(7)), and counts that.
    let bytes = needs.receive_buffer?.saturating_mul(2).saturating_mul(needs.receivers);
    let wanted = bytes.div_ceil(readings.page.max(1));
    let [.., most] = readings.udp_mem?;
    (most < wanted).then(|| {
        Advice(format!(
            "all UDP sockets together may hold {} MiB, and udp_recv_buffer asks for {} MiB: bursts \
             may be dropped; run: sysctl -w net.ipv4.udp_mem='{}'",
            most.saturating_mul(readings.page) >> 20,
            bytes >> 20,
            in_proportion(wanted)
        ))
    })
}

/// The three numbers of `tcp_mem` or `udp_mem` as the kernel itself spaces them, around the
/// second.
fn in_proportion(pages: u64) -> String {
    format!("{} {pages} {}", pages / 4 * 3, pages.saturating_mul(3).div_ceil(2))
}

fn three_numbers(text: &str) -> Option<[u64; 3]> {
    let numbers: Vec<_> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    numbers.try_into().ok()
}

/// Packets of a key frame of 50 KB, a fifth of what a stream of 1 Mbit/s sends in 2 s.
const KEY_FRAME_PACKETS: u64 = 45;
/// At 25 frames a second and a key frame every 2 s.
const FRAMES_PER_KEY_FRAME: u64 = 50;
/// Kernel memory of a connection whose peer keeps up: a frame or two on their way. One that does
/// not may take all of `net.ipv4.tcp_wmem`.
const CONNECTION_BYTES: u64 = 16 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// As a Debian of 4 GiB comes.
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

    /// A cloud's by default.
    fn cloud() -> Requirements {
        Requirements {
            descriptors: (9316, "rtmp_max_connections"),
            connections: (8192, "rtmp_max_connections"),
            receive_buffer: None,
            receivers: 0,
            send_buffer: Some(4 << 20),
            streams_in: 0,
        }
    }

    /// An edge's by default, for so many viewers.
    fn edge(viewers: u64) -> Requirements {
        Requirements {
            descriptors: (viewers + 1124, "max_viewers"),
            connections: (viewers, "max_viewers"),
            receive_buffer: Some(8 << 20),
            receivers: 1,
            send_buffer: None,
            streams_in: 1000,
        }
    }

    fn told(needs: &Requirements, readings: &SystemLimits) -> Vec<String> {
        advice(needs, readings).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_defaults_fit_a_usual_machine_but_for_the_buffers() {
        assert_eq!(told(&cloud(), &debian()), [""; 0]);
        assert_eq!(told(&edge(10_000), &debian()), [""; 0]);
        let lines = |needs: &Requirements| {
            let buffers = small_buffers(needs, &debian());
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
    fn too_low_a_hard_limit_is_told_with_all_three_lines_to_type() {
        let readings =
            SystemLimits { descriptors: Some(Descriptors { soft: 1024, hard: 4096 }), ..debian() };
        assert_eq!(
            told(&edge(5000), &readings),
            ["6124 file descriptors may be needed (max_viewers) and this process may have 4096: \
              connections over that will fail; run: ulimit -n 6124 (systemd: LimitNOFILE=6124, \
              supervisord: minfds=6124)"]
        );
        // The soft limit is raised, so that it does not matter.
        let readings =
            SystemLimits { descriptors: Some(Descriptors { soft: 64, hard: 6124 }), ..readings };
        assert_eq!(told(&edge(5000), &readings), [""; 0]);
    }

    #[test]
    fn a_limit_over_the_kernels_own_is_raised_first() {
        let needs = Requirements { descriptors: (1_101_124, "max_viewers"), ..edge(10_000) };
        let lines = told(&needs, &debian());
        let expected = "run: sysctl -w fs.nr_open=1101124, then ulimit -n 1101124 (systemd: ";
        assert!(lines[0].contains(expected), "{lines:?}");
    }

    #[test]
    fn queues_and_memory_are_measured_by_the_settings() {
        let needs =
            Requirements { receive_buffer: Some(512 << 20), streams_in: 2000, ..edge(20_000) };
        let lines = told(&needs, &debian());
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
        // What is typed is enough.
        let readings = SystemLimits {
            somaxconn: Some(5000),
            netdev_max_backlog: Some(1800),
            tcp_mem: Some([60_000, 80_000, 120_000]),
            udp_mem: Some([196_608, 262_144, 393_216]),
            ..debian()
        };
        assert_eq!(told(&needs, &readings), [""; 0]);
    }

    #[test]
    fn a_machine_that_tells_nothing_is_not_judged() {
        let needs = edge(1_000_000);
        assert_eq!(advice(&needs, &SystemLimits::default()), []);
        assert_eq!(small_buffers(&needs, &SystemLimits::default()), []);
    }

    #[test]
    fn a_backlog_grows_with_the_connections() {
        let cases = [(1, 1024), (8192, 2048), (10_000, 2500), (1_000_000, 65_535)];
        for (connections, expected) in cases {
            assert_eq!(backlog(connections), expected);
        }
    }

    #[test]
    fn this_machine_tells_its_limits() {
        let readings = SystemLimits::take();
        let descriptors = readings.descriptors.expect("no limit of descriptors");
        assert!(descriptors.soft <= descriptors.hard);
        assert!(readings.page.is_power_of_two());
        // Of the network's, a container may see only its own: `net.core.rmem_max` is not among them.
        assert!(readings.nr_open.is_some() && readings.somaxconn.is_some(), "{readings:?}");
        assert_eq!(three_numbers("1\t2\t3\n"), Some([1, 2, 3]));
        assert_eq!(three_numbers("1 2"), None);
    }
}
