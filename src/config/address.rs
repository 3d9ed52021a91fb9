//! Addresses in a configuration file: to listen on, to send to, and of a network interface.

use std::{
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    str::FromStr,
};

use downpour_distribution::address::{Destination, host_and_port, lookup, write_address};

use super::{
    invalid::Invalid,
    tree::Node,
    value::{self, Setting, optional},
};

/// Where to listen: `:4242` or `[::]:4242` (every IPv6 and IPv4 address), `0.0.0.0:4242` (every IPv4
/// address) or `host:4242`. Port 0 takes a free one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddr {
    host: String,
    port: u16,
}

impl ListenAddr {
    /// Every address, on this port.
    pub const fn any(port: u16) -> Self {
        Self { host: String::new(), port }
    }

    /// The host without brackets; `None` for `:4242`.
    pub fn host(&self) -> Option<&str> {
        Some(&self.host[..]).filter(|host| !host.is_empty())
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `true` if a socket on this address and one on `other` would get the same packets or connections.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let is_any = |addr: &Self| {
            addr.host.is_empty() || addr.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified())
        };
        self.port != 0
            && self.port == other.port
            && (is_any(self) || is_any(other) || self.host == other.host)
    }

    /// Returns the address to bind: every address is `[::]`, which takes IPv4, too, or `0.0.0.0` on a
    /// machine without IPv6. Looks up a host name, which blocks.
    ///
    /// # Errors
    /// If the name is not found.
    pub fn resolve(&self) -> io::Result<SocketAddr> {
        match self.host() {
            None if has_ipv6() => Ok((Ipv6Addr::UNSPECIFIED, self.port).into()),
            None => Ok((Ipv4Addr::UNSPECIFIED, self.port).into()),
            Some(host) => lookup(host, self.port),
        }
    }
}

fn has_ipv6() -> bool {
    UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok()
}

impl FromStr for ListenAddr {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (host, port) = host_and_port(text).ok_or(())?;
        Ok(Self { host: host.into(), port })
    }
}

impl From<SocketAddr> for ListenAddr {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().to_string(), port: address.port() }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_address(f, &self.host, self.port)
    }
}

impl Setting for ListenAddr {
    fn read(node: &Node) -> Result<Self, Invalid> {
        value::parsed(node, "an address such as :4242, 0.0.0.0:4242, [::]:4242 or host:4242")
    }

    fn write(&self) -> String {
        plain_or_quoted(self.to_string())
    }
}

impl Setting for Destination {
    fn read(node: &Node) -> Result<Self, Invalid> {
        value::parsed(node, "an address such as 10.0.0.7:5222, 239.0.0.1:5222 or host:5222")
    }

    fn write(&self) -> String {
        plain_or_quoted(self.to_string())
    }
}

/// The network interface for multicast, named by one of its IPv4 addresses; none is the system's
/// choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InterfaceAddr(pub Option<Ipv4Addr>);

impl Setting for InterfaceAddr {
    fn read(node: &Node) -> Result<Self, Invalid> {
        match node.as_str() {
            None if node.is_null() => Ok(Self(None)),
            Some("") => Ok(Self(None)),
            _ => value::parsed(
                node,
                "an IPv4 address of the interface, such as 192.168.1.10, or \"\"",
            )
            .map(|ip| Self(Some(ip))),
        }
    }

    fn write(&self) -> String {
        self.0.map_or_else(|| value::quoted(""), |ip| ip.to_string())
    }
}

optional!(ListenAddr, Destination);

/// An address in brackets would be a list.
fn plain_or_quoted(address: String) -> String {
    if address.starts_with('[') { format!("\"{address}\"") } else { address }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tree;

    #[test]
    fn listen_addresses_take_the_four_forms() {
        for (text, host, bound) in [
            (":4242", None, if has_ipv6() { "[::]:4242" } else { "0.0.0.0:4242" }),
            ("0.0.0.0:4242", Some("0.0.0.0"), "0.0.0.0:4242"),
            ("[::]:4242", Some("::"), "[::]:4242"),
            ("localhost:80", Some("localhost"), "127.0.0.1:80"),
            ("127.0.0.1:0", Some("127.0.0.1"), "127.0.0.1:0"),
        ] {
            let address: ListenAddr = text.parse().unwrap();
            assert_eq!(address.host(), host);
            assert_eq!(address.to_string(), text);
            assert_eq!(address.resolve().unwrap().to_string(), bound);
            let node = tree::parse(&address.write()).unwrap();
            assert_eq!(ListenAddr::read(&node).unwrap(), address);
        }
        for text in [
            "",
            ":",
            "4242",
            "a:",
            "a:b",
            ":65536",
            ":+1",
            "::1:80",
            "[::1]80",
            "[::1:80",
            "a b:1",
            "10.0.0.300:1",
            "[fe80::1%eth0]:1",
            "a:1:2",
        ] {
            assert!(text.parse::<ListenAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn addresses_on_one_port_overlap_if_one_of_them_is_every_address() {
        for (a, b, overlap) in [
            (":80", ":80", true),
            (":80", ":81", false),
            (":0", ":0", false),
            (":80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "[::]:80", true),
            ("127.0.0.1:80", "127.0.0.1:80", true),
            ("127.0.0.1:80", "127.0.0.2:80", false),
        ] {
            let [a, b] = [a, b].map(|text| text.parse::<ListenAddr>().unwrap());
            assert_eq!(a.overlaps(&b), overlap, "{a} {b}");
        }
    }

    #[test]
    fn a_destination_is_a_place_to_send_to() {
        for text in ["10.0.0.7:5222", "239.0.0.1:5222", "edge-1.example:5222", "[::1]:5222"] {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
        for text in [":5222", "0.0.0.0:5222", "[::]:5222", "10.0.0.7:0", "10.0.0.7"] {
            assert!(text.parse::<Destination>().is_err(), "{text}");
        }
        let name: Destination = "no-such-host.invalid:1".parse().unwrap();
        assert!(name.resolve().is_err());
    }
}
