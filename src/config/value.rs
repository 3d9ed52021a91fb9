//! The types that a setting can have.

use std::{
    fmt, io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use serde_yaml::Value;

use downpour_distribution::{
    AddrRange, InvalidRange,
    address::{Destination, host_and_port, lookup, write_address},
    tls::Fingerprint,
};
use downpour_media::StreamPattern;

/// A value that a configuration file can hold.
pub trait Setting: Sized {
    /// Takes a value from a file. The error says what would be right: `true or false`.
    fn read(value: &Value) -> Result<Self, String>;

    /// The value as YAML, on one line.
    fn write(&self) -> String;
}

/// A number, for the words of an error.
pub trait Number {
    /// `whole number` or `number`.
    const KIND: &'static str;
}

macro_rules! whole_numbers {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            const KIND: &'static str = "whole number";
        }

        impl Setting for $ty {
            fn read(value: &Value) -> Result<Self, String> {
                value
                    .as_u64()
                    .and_then(|number| number.try_into().ok())
                    .ok_or_else(|| format!("a {} from 0 to {}", Self::KIND, Self::MAX))
            }

            fn write(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

whole_numbers!(u8, u16, u32, u64, usize);

impl Number for f64 {
    const KIND: &'static str = "number";
}

impl Setting for f64 {
    fn read(value: &Value) -> Result<Self, String> {
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| "a number".into())
    }

    fn write(&self) -> String {
        format!("{self:?}")
    }
}

impl Setting for bool {
    fn read(value: &Value) -> Result<Self, String> {
        value.as_bool().ok_or_else(|| "true or false".into())
    }

    fn write(&self) -> String {
        self.to_string()
    }
}

impl Setting for String {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            Value::Null => Ok(Self::new()),
            _ => Err("a text, in quotes if it looks like a number".into()),
        }
    }

    fn write(&self) -> String {
        quoted(self)
    }
}

impl Setting for PathBuf {
    fn read(value: &Value) -> Result<Self, String> {
        String::read(value).map(Self::from).map_err(|_| "a path".into())
    }

    fn write(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl<T: Setting> Setting for Vec<T> {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Sequence(items) => items
                .iter()
                .map(T::read)
                .collect::<Result<_, _>>()
                .map_err(|wanted| format!("a list in which each item is {wanted}")),
            Value::Null => Ok(Self::new()),
            _ => Err("a list such as [a, b], or [] for none".into()),
        }
    }

    fn write(&self) -> String {
        format!("[{}]", self.iter().map(T::write).collect::<Vec<_>>().join(", "))
    }
}

/// Where to listen: `:4242` (every IPv4 address), `0.0.0.0:4242`, `[::]:4242` (every IPv6 and IPv4
/// address) or `host:4242`. Port 0 takes a free one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddr {
    host: String,
    port: u16,
}

impl ListenAddr {
    /// Every IPv4 address, on this port.
    pub const fn any(port: u16) -> Self {
        Self { host: String::new(), port }
    }

    /// The part in front of the port without brackets; `None` for `:4242`.
    pub fn host(&self) -> Option<&str> {
        Some(&self.host[..]).filter(|host| !host.is_empty())
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The address to bind; looks a host name up, which blocks.
    ///
    /// # Errors
    /// If the name is not found.
    pub fn resolve(&self) -> io::Result<SocketAddr> {
        match self.host() {
            None => Ok((Ipv4Addr::UNSPECIFIED, self.port).into()),
            Some(host) => lookup(host, self.port),
        }
    }
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
    fn read(value: &Value) -> Result<Self, String> {
        value
            .as_str()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| "an address such as :4242, 0.0.0.0:4242, [::]:4242 or host:4242".into())
    }

    fn write(&self) -> String {
        plain_or_quoted(self.to_string())
    }
}

impl Setting for Destination {
    fn read(value: &Value) -> Result<Self, String> {
        value
            .as_str()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| "an address such as 10.0.0.7:5222, 239.0.0.1:5222 or host:5222".into())
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
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(Self(None)),
            Value::String(text) if text.is_empty() => Ok(Self(None)),
            _ => value
                .as_str()
                .and_then(|text| text.parse().ok())
                .map(|ip| Self(Some(ip)))
                .ok_or_else(|| {
                    "an IPv4 address of the interface, such as 192.168.1.10, or \"\"".into()
                }),
        }
    }

    fn write(&self) -> String {
        self.0.map_or_else(|| quoted(""), |ip| ip.to_string())
    }
}

impl Setting for Option<Fingerprint> {
    fn read(value: &Value) -> Result<Self, String> {
        match value {
            Value::Null => Ok(None),
            Value::String(text) if text.is_empty() => Ok(None),
            _ => value.as_str().and_then(|text| text.parse().ok()).map(Some).ok_or_else(|| {
                "64 hexadecimal digits, with or without colons, as the cloud prints them".into()
            }),
        }
    }

    fn write(&self) -> String {
        self.map_or_else(|| quoted(""), |fingerprint| format!("\"{fingerprint}\""))
    }
}

macro_rules! optional_addresses {
    ($($ty:ty),*) => {$(
        impl Setting for Option<$ty> {
            fn read(value: &Value) -> Result<Self, String> {
                match value {
                    Value::Null => Ok(None),
                    Value::String(text) if text.is_empty() => Ok(None),
                    _ => <$ty>::read(value)
                        .map(Some)
                        .map_err(|wanted| format!("{wanted}, or \"\" for none")),
                }
            }

            fn write(&self) -> String {
                self.as_ref().map_or_else(|| quoted(""), Setting::write)
            }
        }
    )*};
}

optional_addresses!(ListenAddr, Destination);

impl Setting for StreamPattern {
    fn read(value: &Value) -> Result<Self, String> {
        value
            .as_str()
            .and_then(|text| text.parse().ok())
            .ok_or_else(|| "app/name, \"app/*\" or \"*\"".into())
    }

    fn write(&self) -> String {
        quoted(&self.to_string())
    }
}

impl Setting for AddrRange {
    fn read(value: &Value) -> Result<Self, String> {
        let text = value.as_str().ok_or_else(|| InvalidRange::Address.to_string())?;
        text.parse().map_err(|error: InvalidRange| error.to_string())
    }

    fn write(&self) -> String {
        quoted(&self.to_string())
    }
}

macro_rules! words {
    ($(#[$attr:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }
     wanted: $wanted:literal, empty: $empty:ident) => {
        $(#[$attr])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[$doc])* $variant,)*
        }

        impl $name {
            /// The word in the file.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $word,)*
                }
            }
        }

        impl Setting for $name {
            fn read(value: &Value) -> Result<Self, String> {
                match value.as_str() {
                    $(Some($word) => Ok(Self::$variant),)*
                    // The existing edge writes "" for its default.
                    Some("") => Ok(Self::$empty),
                    _ => Err($wanted.into()),
                }
            }

            fn write(&self) -> String {
                self.as_str().into()
            }
        }
    };
}

words! {
    /// How much is logged.
    pub enum LogLevel {
        /// Every packet.
        Trace = "trace",
        /// Every decision.
        Debug = "debug",
        /// What an operator follows.
        Info = "info",
        /// What an operator should look at.
        Warn = "warn",
        /// What does not work.
        Error = "error",
    }
    wanted: "trace, debug, info, warn or error", empty: Info
}

words! {
    /// How an edge asks for lost packets.
    pub enum RepairProtocol {
        /// `downpour/1`, and v0 where the cloud speaks only that.
        Auto = "auto",
        /// The existing Go cloud's service.
        V0 = "v0",
        /// `downpour/1` and nothing else.
        Downpour = "downpour",
    }
    wanted: "auto, v0 or downpour", empty: Auto
}

/// A value as an error shows it: on one line, cut when long, and without control characters.
pub(super) fn shown(value: &Value) -> String {
    let text = match value {
        Value::Null => "nothing".into(),
        Value::String(text) => format!("{text:?}"),
        // JSON is the one-line form of YAML; a value that has none (a map with odd keys) is named.
        other => serde_json::to_string(other).unwrap_or_else(|_| "this".into()),
    };
    let text = text.replace("\",\"", "\", \"");
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// JSON's quotes are YAML's double quotes.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/');
    let word = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(plain)
        && !matches!(text, "true" | "false" | "null" | "yes" | "no" | "on" | "off" | "y" | "n");
    if word { text.into() } else { serde_json::Value::from(text).to_string() }
}

/// An address in brackets would be a list.
fn plain_or_quoted(address: String) -> String {
    if address.starts_with('[') { format!("\"{address}\"") } else { address }
}

/// Characters of a wrong value that an error shows.
const SHOWN_MAX: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listen_addresses_take_the_four_forms() {
        for (text, host, bound) in [
            (":4242", None, "0.0.0.0:4242"),
            ("0.0.0.0:4242", Some("0.0.0.0"), "0.0.0.0:4242"),
            ("[::]:4242", Some("::"), "[::]:4242"),
            ("localhost:80", Some("localhost"), "127.0.0.1:80"),
            ("127.0.0.1:0", Some("127.0.0.1"), "127.0.0.1:0"),
        ] {
            let address: ListenAddr = text.parse().unwrap();
            assert_eq!(address.host(), host);
            assert_eq!(address.to_string(), text);
            assert_eq!(address.resolve().unwrap().to_string(), bound);
            let yaml: Value = serde_yaml::from_str(&address.write()).unwrap();
            assert_eq!(ListenAddr::read(&yaml).unwrap(), address);
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

    #[test]
    fn what_is_written_is_read_back() {
        fn same<T: Setting + PartialEq + fmt::Debug>(value: T) {
            let yaml: Value = serde_yaml::from_str(&format!("k: {}", value.write())).unwrap();
            assert_eq!(T::read(&yaml["k"]).unwrap(), value);
        }
        for text in
            ["", "*", "a b", "true", "null", "1e3", "0x1f", "a: b", "# c", "\"\\\n\t", "é", "~"]
        {
            same(text.to_string());
            same(vec![text.to_string(), text.to_string()]);
            same(PathBuf::from(text));
        }
        same(0.0);
        same(0.001);
        same(u64::MAX);
        same(InterfaceAddr(Some(Ipv4Addr::LOCALHOST)));
        same(InterfaceAddr(None));
        same(None::<Fingerprint>);
        same(None::<Destination>);
        same(Some("[::1]:5222".parse::<Destination>().unwrap()));
        same(Some(ListenAddr::any(5224)));
        same(Some("a1".repeat(32).parse::<Fingerprint>().unwrap()));
        same(["*", "live/*", "live/a"].map(|p| p.parse::<StreamPattern>().unwrap()).to_vec());
        same(
            ["192.0.2.0/24", "::1", "2001:db8::/32"]
                .map(|r| r.parse::<AddrRange>().unwrap())
                .to_vec(),
        );
        same(LogLevel::Warn);
        same(RepairProtocol::Downpour);
    }

    #[test]
    fn long_and_odd_values_are_shown_on_one_short_line() {
        let value = Value::String("x\n".repeat(1000));
        assert!(shown(&value).chars().count() == SHOWN_MAX + 1 && !shown(&value).contains('\n'));
        let odd: Value = serde_yaml::from_str("{[1, 2]: 3}").unwrap();
        assert_eq!(shown(&odd), "this");
    }
}
