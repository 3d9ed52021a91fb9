//! Ranges of IP addresses.

use std::{fmt, net::IpAddr, str::FromStr};

/// One address, or all that share a prefix (RFC 4632 §3.1, RFC 4291 §2.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddrRange {
    base: IpAddr,
    /// Bits that must agree: 0..=32 or 0..=128.
    prefix: u8,
}

impl AddrRange {
    /// Whether an address is in the range. An IPv4 address that an IPv6 socket tells of
    /// (`::ffff:192.0.2.1`) is the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.base.is_ipv4()
            && (bits(address) ^ bits(self.base)) & mask(self.prefix) == 0
    }
}

impl FromStr for AddrRange {
    type Err = InvalidRange;

    fn from_str(text: &str) -> Result<Self, InvalidRange> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let base: IpAddr = address.parse().map_err(|_| InvalidRange::Address)?;
        let longest = length(&base);
        let prefix = match prefix {
            None => longest,
            // `parse` alone would take `+8`.
            Some(digits) => Some(digits)
                .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()))
                .and_then(|digits| digits.parse().ok())
                .filter(|prefix| *prefix <= longest)
                .ok_or(InvalidRange::Prefix(longest))?,
        };
        if bits(base) & !mask(prefix) != 0 {
            return Err(InvalidRange::HostBits);
        }
        Ok(Self { base, prefix })
    }
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix == length(&self.base) {
            true => self.base.fmt(f),
            false => write!(f, "{}/{}", self.base, self.prefix),
        }
    }
}

/// Why a text is no [`AddrRange`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRange {
    /// No IP address.
    #[error("an IP address or a prefix of some, such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32")]
    Address,
    /// A prefix length that is no number, or too long.
    #[error("a prefix length from 0 to {0} behind the slash")]
    Prefix(u8),
    /// `192.0.2.7/24`, of which one cannot tell what is meant.
    #[error("a prefix without bits behind it, as in 192.0.2.0/24, or the address without a slash")]
    HostBits,
}

fn length(address: &IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address, left-aligned.
fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()) << 96,
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The bits of a prefix.
fn mask(prefix: u8) -> u128 {
    // A shift by all 128 bits is not defined.
    u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(text: &str) -> AddrRange {
        text.parse().unwrap()
    }

    #[test]
    fn what_is_in_and_what_is_not() {
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
    fn what_is_no_range_says_what_would_be() {
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
        fn what_is_written_is_read_back_and_holds_its_base(address: u32, prefix in 0u8..=32) {
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
