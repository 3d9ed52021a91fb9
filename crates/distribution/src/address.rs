//! Where to send: a host and a port.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs},
    str::FromStr,
};

/// Where to send: `10.0.0.7:5222`, `[2001:db8::7]:5222`, a group such as `239.0.0.1:5222`, or
/// `host:5222`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    host: String,
    port: u16,
}

impl Destination {
    /// An IPv4 address and port.
    pub fn ip(address: [u8; 4], port: u16) -> Self {
        SocketAddr::from((address, port)).into()
    }

    /// The part in front of the port, without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, not 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address to send to; looks a host name up, which blocks.
    ///
    /// # Errors
    /// If the name is not found.
    pub fn resolve(&self) -> io::Result<SocketAddr> {
        lookup(&self.host, self.port)
    }
}

impl FromStr for Destination {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (host, port) = host_and_port(text).ok_or(())?;
        let somewhere = host.parse::<IpAddr>().map_or(!host.is_empty(), |ip| !ip.is_unspecified());
        (somewhere && port != 0).then(|| Self { host: host.into(), port }).ok_or(())
    }
}

impl From<SocketAddr> for Destination {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_address(f, &self.host, self.port)
    }
}

/// The host, without brackets, and the port of `host:port`; the host may be empty.
pub fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    // `parse` alone would take `+1`.
    if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let port = port.parse().ok()?;
    if let Some(v6) = host.strip_prefix('[') {
        let v6 = v6.strip_suffix(']')?;
        v6.parse::<std::net::Ipv6Addr>().ok()?;
        return Some((v6, port));
    }
    (host.is_empty() || is_name_or_v4(host)).then_some((host, port))
}

/// Whether `host` is a name or an address, without port or brackets.
pub fn is_host(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok() || is_name_or_v4(host)
}

fn is_name_or_v4(host: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    // Digits and dots that are no address (`10.0.0.300`) would go to a name server.
    let numeric = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    !host.is_empty()
        && host.len() <= HOST_MAX
        && host.chars().all(named)
        && (!numeric || host.parse::<Ipv4Addr>().is_ok())
}

/// The first address of `host`, IPv4 if it has one; looks a name up, which blocks.
///
/// # Errors
/// If the name is not found.
pub fn lookup(host: &str, port: u16) -> io::Result<SocketAddr> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok((ip, port).into());
    }
    let addresses: Vec<_> = (host, port)
        .to_socket_addrs()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot look up {host}: {error}")))?
        .collect();
    // IPv4 first, which the rest of the defaults speak.
    let first = addresses.iter().find(|address| address.is_ipv4()).or(addresses.first());
    first
        .copied()
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("{host} has no address")))
}

/// Writes `host:port`, with brackets around an IPv6 address.
///
/// # Errors
/// Those of the formatter.
pub fn write_address(f: &mut fmt::Formatter<'_>, host: &str, port: u16) -> fmt::Result {
    if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
}

/// Bytes of a host name (RFC 1035 §2.3.4).
const HOST_MAX: usize = 255;
