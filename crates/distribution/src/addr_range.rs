//! Ranges of IP addresses.

use std::{fmt, net::IpAddr, str::FromStr};

use ipnet::IpNet;

/// One IP address, or all addresses with a common prefix (RFC 4632 §3.1, RFC 4291 §2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddrRange(IpNet);

impl AddrRange {
    /// `true` if `address` is in the range. An IPv4-mapped IPv6 address (`::ffff:192.0.2.1`, from a
    /// dual-stack socket) counts as the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.0.contains(&address.to_canonical())
    }
}

impl FromStr for AddrRange {
    type Err = InvalidRange;

    /// Parses an address, or an address and a prefix length. Unlike [`IpNet`], refuses bits behind the
    /// prefix.
    fn from_str(text: &str) -> Result<Self, InvalidRange> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| InvalidRange::Address)?;
        let host = IpNet::from(address);
        let range = match prefix {
            None => host,
            // `u8::from_str` alone would accept `+8`.
            Some(digits) => Some(digits)
                .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .and_then(|prefix| IpNet::new(address, prefix).ok())
                .ok_or(InvalidRange::Prefix(host.max_prefix_len()))?,
        };
        if range.network() != address {
            return Err(InvalidRange::HostBits);
        }
        Ok(Self(range))
    }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.prefix_len() == self.0.max_prefix_len() {
            true => self.0.addr().fmt(f),
            false => self.0.fmt(f),
        }
    }
}

/// Why a text is not an [`AddrRange`]. The message names what is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRange {
    /// The text has no valid IP address.
    #[error("an IP address or a prefix, such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")]
    Address,
    /// The prefix length is not a number, or exceeds this maximum.
    #[error("a prefix length from 0 to {0} behind the slash")]
    Prefix(u8),
    /// Bits behind the prefix are set, as in `192.0.2.7/24`, which is ambiguous.
    #[error("a prefix whose other bits are 0, as in 192.0.2.0/24, or an address without a slash")]
    HostBits,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(text: &str) -> AddrRange {
        text.parse().unwrap()
    }

    #[test]
    fn a_range_contains_the_addresses_with_its_prefix() {
        for (text, inside, outside) in [
            ("192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.6"),
            ("192.0.2.7", "::ffff:192.0.2.7", "::ffff:192.0.2.8"),
            ("0.0.0.0/0", "203.0.113.9", "::1"),
            ("::/0", "2001:db8::1", "0.0.0.0"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
            ("10.128.0.0/9", "10.255.0.1", "10.127.255.255"),
        ] {
            assert!(range(text).contains(inside.parse().unwrap()), "{text} {inside}");
            assert!(!range(text).contains(outside.parse().unwrap()), "{text} {outside}");
            assert_eq!(range(text).to_string(), text);
        }
        assert_eq!(range("192.0.2.7/32").to_string(), "192.0.2.7");
    }

    #[test]
    fn invalid_text_names_the_expected_form() {
        for text in ["", "/", "host", "192.0.2", "192.0.2.0:80", "[::1]", "192.0.2.300/8"] {
            assert_eq!(text.parse::<AddrRange>(), Err(InvalidRange::Address), "{text}");
        }
        for text in ["10.0.0.0/33", "10.0.0.0/", "10.0.0.0/+8", "10.0.0.0/8/8", "10.0.0.0/x"] {
            assert_eq!(text.parse::<AddrRange>(), Err(InvalidRange::Prefix(32)), "{text}");
        }
        assert_eq!("::/129".parse::<AddrRange>(), Err(InvalidRange::Prefix(128)));
        for text in ["192.0.2.7/24", "2001:db8::1/32", "0.0.0.1/0"] {
            assert_eq!(text.parse::<AddrRange>(), Err(InvalidRange::HostBits), "{text}");
        }
    }

    proptest! {
        #[test]
        fn display_and_parse_round_trip(address: u32, prefix in 0u8..=32) {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            let base = IpAddr::from((address & mask).to_be_bytes());
            let range: AddrRange = format!("{base}/{prefix}").parse().unwrap();
            prop_assert_eq!(range.to_string().parse::<AddrRange>().unwrap(), range);
            prop_assert!(range.contains(IpAddr::from(address.to_be_bytes())));
            if prefix > 0 {
                let other = IpAddr::from((address ^ 1 << (32 - prefix)).to_be_bytes());
                prop_assert!(!range.contains(other));
            }
        }
    }
}
