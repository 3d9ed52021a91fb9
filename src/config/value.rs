//! The types that a setting can have.

use std::{fmt::Display, ops::RangeInclusive, path::PathBuf, str::FromStr};

use super::{
    invalid::Invalid,
    record::Field,
    tree::{self, Node, Value},
};
use downpour_distribution::{AddrRange, InvalidRange, tls::Fingerprint};
use downpour_media::StreamPattern;

/// A value that a configuration file can hold.
pub trait Setting: Sized {
    /// The keys of a record, or of the records in a list; none for all other types.
    const FIELDS: &'static [Field] = &[];

    /// Reads a value from a file.
    ///
    /// # Errors
    /// The position of an invalid value, and valid values.
    fn read(node: &Node) -> Result<Self, Invalid>;

    /// Writes the value as YAML, on one line.
    fn write(&self) -> String;
}

/// A number, for the words of an error.
pub(super) trait Number {
    /// `whole number` or `number`.
    const KIND: &'static str;
}

macro_rules! whole_numbers {
    ($($ty:ty),*) => {$(
        impl Number for $ty {
            const KIND: &'static str = "whole number";
        }

        impl Setting for $ty {
            fn read(node: &Node) -> Result<Self, Invalid> {
                node.as_u64().and_then(|number| number.try_into().ok()).ok_or_else(|| {
                    Invalid::value(node, format!("a {} from 0 to {}", Self::KIND, Self::MAX))
                })
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
    fn read(node: &Node) -> Result<Self, Invalid> {
        node.as_f64()
            .filter(|number| number.is_finite())
            .ok_or_else(|| Invalid::value(node, "a number"))
    }

    fn write(&self) -> String {
        format!("{self:?}")
    }
}

impl Setting for bool {
    fn read(node: &Node) -> Result<Self, Invalid> {
        node.as_bool().ok_or_else(|| Invalid::value(node, "true or false"))
    }

    fn write(&self) -> String {
        self.to_string()
    }
}

impl Setting for String {
    fn read(node: &Node) -> Result<Self, Invalid> {
        match node.as_str() {
            Some(text) => Ok(text.into()),
            None if node.is_null() => Ok(Self::new()),
            None => Err(Invalid::value(node, "a text, in quotes if it looks like a number")),
        }
    }

    fn write(&self) -> String {
        quoted(self)
    }
}

impl Setting for PathBuf {
    fn read(node: &Node) -> Result<Self, Invalid> {
        String::read(node).map(Self::from).map_err(|_| Invalid::value(node, "a path"))
    }

    fn write(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl<T: Setting> Setting for Vec<T> {
    const FIELDS: &'static [Field] = T::FIELDS;

    fn read(node: &Node) -> Result<Self, Invalid> {
        match &node.value {
            Value::List(items) => items
                .iter()
                .enumerate()
                .map(|(i, item)| T::read(item).map_err(|fault| fault.within(format!("[{i}]"))))
                .collect(),
            _ if node.is_null() => Ok(Self::new()),
            _ => Err(Invalid::value(node, "a list such as [a, b], or [] for none")),
        }
    }

    fn write(&self) -> String {
        format!("[{}]", self.iter().map(T::write).collect::<Vec<_>>().join(", "))
    }
}

impl Setting for Option<Fingerprint> {
    fn read(node: &Node) -> Result<Self, Invalid> {
        match node.text() {
            _ if node.is_null() => Ok(None),
            Some("") => Ok(None),
            // 64 digits look like a number.
            text => text.and_then(|text| text.parse().ok()).map(Some).ok_or_else(|| {
                Invalid::value(
                    node,
                    "64 hexadecimal digits, with or without colons, as the cloud logs them",
                )
            }),
        }
    }

    fn write(&self) -> String {
        self.map_or_else(|| quoted(""), |fingerprint| format!("\"{fingerprint}\""))
    }
}

/// Settings for which `""` means none.
macro_rules! optional {
    ($($ty:ty),*) => {$(
        impl Setting for Option<$ty> {
            fn read(node: &Node) -> Result<Self, Invalid> {
                if node.is_null() || node.as_str() == Some("") {
                    return Ok(None);
                }
                <$ty>::read(node).map(Some).map_err(|mut fault| {
                    fault.message += ", or \"\" for none";
                    fault
                })
            }

            fn write(&self) -> String {
                self.as_ref().map_or_else(|| value::quoted(""), Setting::write)
            }
        }
    )*};
}
pub(super) use optional;

impl Setting for StreamPattern {
    fn read(node: &Node) -> Result<Self, Invalid> {
        parsed(node, "app/name, \"app/*\" or \"*\"")
    }

    fn write(&self) -> String {
        quoted(&self.to_string())
    }
}

impl Setting for AddrRange {
    fn read(node: &Node) -> Result<Self, Invalid> {
        let text = node.as_str().ok_or(InvalidRange::Address);
        text.and_then(str::parse).map_err(|usable| Invalid::value(node, usable))
    }

    fn write(&self) -> String {
        quoted(&self.to_string())
    }
}

macro_rules! words {
    ($(#[$attr:meta])* pub enum $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)* }
     use: $usable:literal, empty: $empty:ident) => {
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
            fn read(node: &Node) -> Result<Self, Invalid> {
                match node.as_str() {
                    $(Some($word) => Ok(Self::$variant),)*
                    // The existing edge writes "" for its default.
                    Some("") => Ok(Self::$empty),
                    _ => Err(Invalid::value(node, $usable)),
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
    use: "trace, debug, info, warn or error", empty: Info
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
    use: "auto, v0 or downpour", empty: Auto
}

/// Reads a number within bounds; the error names them.
pub(super) fn read_within<T: Setting + Number + PartialOrd + Display>(
    node: &Node,
    bounds: &RangeInclusive<T>,
) -> Result<T, Invalid> {
    T::read(node).ok().filter(|number| bounds.contains(number)).ok_or_else(|| {
        let (least, most) = (bounds.start(), bounds.end());
        Invalid::value(node, format!("a {} from {least} to {most}", T::KIND))
    })
}

/// Reads a text that parses as a `T`; `usable` describes valid texts.
pub(super) fn parsed<T: FromStr>(node: &Node, usable: impl Display) -> Result<T, Invalid> {
    node.as_str().and_then(|text| text.parse().ok()).ok_or_else(|| Invalid::value(node, usable))
}

/// Writes a text so that it is read back as it is: without quotes where that is clear to all.
pub(super) fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/');
    let word = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(plain)
        && tree::is_text(text)
        // Booleans of YAML 1.1.
        && !matches!(text, "yes" | "no" | "on" | "off" | "y" | "n");
    if word {
        return text.into();
    }
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                quoted += &format!("\\U{:08X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted + "\""
}

#[cfg(test)]
mod tests {
    use std::{fmt, net::Ipv4Addr};

    use super::*;
    use crate::config::{InterfaceAddr, ListenAddr};
    use downpour_distribution::address::Destination;

    #[test]
    fn every_type_reads_back_what_it_writes() {
        fn same<T: Setting + PartialEq + fmt::Debug>(value: T) {
            let text = format!("[{}]", value.write());
            assert_eq!(Vec::<T>::read(&tree::parse(&text).unwrap()).unwrap(), [value], "{text}");
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
}
