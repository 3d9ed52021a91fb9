//! Destinations: a host and a port.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs},
    str::FromStr,
};

/// A destination: `10.0.0.7:5222`, `[2001:db8::7]:5222`, a multicast group such as `239.0.0.1:5222`, or
/// `host:5222`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    host: String,
    port: u16,
}

impl Destination {
    /// The destination of an IPv4 address and a port.
    pub fn ip(address: [u8; 4], port: u16) -> Self {
        SocketAddr::from((address, port)).into()
    }

    /// The host: a name or an IP address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, not 0.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Resolves the host. A host name needs a DNS lookup, which blocks.
    ///
    /// # Errors
    /// If the lookup fails.
    pub fn resolve(&self) -> io::Result<SocketAddr> {
        lookup(&self.host, self.port)
    }
}

impl FromStr for Destination {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (host, port) = host_and_port(text).ok_or(())?;
        let specified = host.parse::<IpAddr>().map_or(!host.is_empty(), |ip| !ip.is_unspecified());
        (specified && port != 0).then(|| Self { host: host.into(), port }).ok_or(())
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

/// Splits `host:port` into the host, without brackets, and the port. The host may be empty. Returns
/// `None` if the text is malformed.
pub fn host_and_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    // `u16::from_str` alone would accept `+1`.
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

/// `true` if `host` is a host name or an IP address, without port or brackets.
pub fn is_host(host: &str) -> bool {
    host.parse::<IpAddr>().is_ok() || is_name_or_v4(host)
}

fn is_name_or_v4(host: &str) -> bool {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    // A malformed IPv4 address (`10.0.0.300`) is not a name: it would cause a DNS lookup.
    let numeric = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    !host.is_empty()
        && host.len() <= HOST_MAX
        && host.chars().all(named)
        && (!numeric || host.parse::<Ipv4Addr>().is_ok())
}

/// Resolves `host`. Prefers IPv4, as the other defaults do. A host name needs a DNS lookup, which
/// blocks.
///
/// # Errors
/// If the lookup fails or finds no address.
pub fn lookup(host: &str, port: u16) -> io::Result<SocketAddr> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok((ip, port).into());
    }
    let addresses: Vec<_> = (host, port)
        .to_socket_addrs()
        .map_err(|error| io::Error::new(error.kind(), format!("cannot look up {host}: {error}")))?
        .collect();
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

/// Most bytes of a host name (RFC 1035 §2.3.4).
const HOST_MAX: usize = 255;
