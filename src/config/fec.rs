//! Forward error correction in a file: `off`, `auto`, or a matrix; and the addresses that may have
//! a setting each.

use std::fmt;

use super::{
    Setting,
    invalid::Invalid,
    record::{Fields, record},
    tree::{Node, Value},
    value::read_within,
};
use downpour_distribution::address::Destination;
use downpour_repair::fec::{Fec, Matrix};

impl Setting for Fec {
    fn read(node: &Node) -> Result<Self, Invalid> {
        // `off` is a boolean in YAML 1.1, and some tools write it as one.
        match (node.as_str(), node.as_bool(), &node.value) {
            (Some("off"), ..) | (_, Some(false), _) => Ok(Self::Off),
            (Some("auto"), ..) => Ok(Self::Auto),
            (.., Value::Map(_)) => matrix(node).map(Self::Fixed),
            _ => Err(Invalid::value(node, usable())),
        }
    }

    fn write(&self) -> String {
        match self {
            Self::Off => "off".into(),
            Self::Auto => "auto".into(),
            Self::Fixed(matrix) => {
                format!("{{columns: {}, rows: {}}}", matrix.columns(), matrix.rows())
            }
        }
    }
}

record! {
    /// An address that gets every stream without asking.
    pub struct ClientAddr(
        "an address such as 10.0.0.7:5222, or {addr: 10.0.0.7:5222, fec: auto}", short: addr
    ) {
        /// Where RTP goes: 10.0.0.7:5222, host:5222, or a group such as 239.0.0.1:5222.
        addr: Destination;
        /// Parity for this address; the section's fec if left out.
        fec: Option<Fec> = None;
    }
}

impl From<Destination> for ClientAddr {
    fn from(addr: Destination) -> Self {
        Self { addr, fec: None }
    }
}

impl fmt::Display for ClientAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.addr.fmt(f)
    }
}

impl Setting for Option<Fec> {
    fn read(node: &Node) -> Result<Self, Invalid> {
        if node.is_null() { Ok(None) } else { Fec::read(node).map(Some) }
    }

    fn write(&self) -> String {
        self.as_ref().map_or_else(|| "null".into(), Setting::write)
    }
}

fn matrix(node: &Node) -> Result<Matrix, Invalid> {
    let sides = Fields::of(node, &["columns", "rows"], "{columns: 10, rows: 5}")?;
    let side = |name| sides.require_with(name, |node| read_within(node, &(1..=Matrix::SIDE_LIMIT)));
    Matrix::new(side("columns")?, side("rows")?).map_err(|_| Invalid::value(node, usable()))
}

fn usable() -> String {
    format!(
        "off, auto, or {{columns: 1 to {0}, rows: 1 to {0}}} whose product is at most {1}",
        Matrix::SIDE_LIMIT,
        Matrix::AREA_LIMIT
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tree;

    fn read<T: Setting>(yaml: &str) -> Result<T, String> {
        T::read(&tree::parse(yaml).unwrap())
            .map_err(|fault| format!("{}: {}", fault.path, fault.message))
    }

    #[test]
    fn fec_is_off_auto_or_a_matrix_within_its_limits() {
        let matrix = |columns, rows| Ok(Fec::Fixed(Matrix::new(columns, rows).unwrap()));
        for (yaml, fec) in [
            ("off", Ok(Fec::Off)),
            ("false", Ok(Fec::Off)),
            ("auto", Ok(Fec::Auto)),
            ("{columns: 10, rows: 5}", matrix(10, 5)),
            ("{rows: 1, columns: 32}", matrix(32, 1)),
        ] {
            let got = read::<Fec>(yaml);
            assert_eq!(got, fec, "{yaml}");
            assert_eq!(read::<Fec>(&got.unwrap().write()), fec, "{yaml}");
        }
        for (yaml, expected) in [
            ("on", ": \"on\" is not valid; use off, auto, or {columns: 1 to 32"),
            ("true", ": true is not valid; use off, auto"),
            ("10", ": 10 is not valid; use off, auto"),
            ("{}", ": the key columns is missing"),
            ("[10, 5]", ": [10, 5] is not valid; use off, auto"),
            ("{columns: 10}", ": the key rows is missing"),
            (
                "{columns: 33, rows: 1}",
                ".columns: 33 is not valid; use a whole number from 1 to 32",
            ),
            ("{columns: 0, rows: 5}", ".columns: 0 is not valid"),
            ("{columns: 32, rows: 32}", ": {columns: 32, rows: 32} is not valid; use off, auto"),
            ("{columns: 300, rows: 1}", ".columns: 300 is not valid"),
            ("{columns: 10, rows: -1}", ".rows: -1 is not valid"),
            ("{columns: 10, rows: 5, depth: 1}", ": unknown key depth; the keys here are columns"),
            ("~", ": has no value; use off, auto"),
        ] {
            let error = read::<Fec>(yaml).unwrap_err();
            assert!(error.starts_with(expected), "{yaml}: {error}");
        }
    }

    #[test]
    fn an_address_may_have_a_fec_setting() {
        for (yaml, addr, fec, written) in [
            ("10.0.0.7:5222", "10.0.0.7:5222", None, "10.0.0.7:5222"),
            ("{addr: 10.0.0.7:5222}", "10.0.0.7:5222", None, "10.0.0.7:5222"),
            (
                "{addr: '[::1]:5222', fec: off}",
                "[::1]:5222",
                Some(Fec::Off),
                "{addr: \"[::1]:5222\", fec: off}",
            ),
            (
                "{fec: auto, addr: 'edge:5222'}",
                "edge:5222",
                Some(Fec::Auto),
                "{addr: edge:5222, fec: auto}",
            ),
        ] {
            let got = read::<ClientAddr>(yaml).unwrap();
            assert_eq!((got.to_string(), got.fec), (addr.into(), fec));
            assert_eq!(got.write(), written);
            assert_eq!(read::<ClientAddr>(written), Ok(got));
        }
        for (yaml, expected) in [
            ("10.0.0.7", ": \"10.0.0.7\" is not valid; use an address such as"),
            ("[]", ": [] is not valid; use an address such as 10.0.0.7:5222, or {addr:"),
            ("{fec: auto}", ": the key addr is missing"),
            ("{addr: x}", ".addr: \"x\" is not valid; use an address such as"),
            ("{addr: 'x:1', fec: on}", ".fec: \"on\" is not valid; use off, auto, or"),
            ("{addr: 'x:1', fce: on}", ": unknown key fce; did you mean fec?"),
        ] {
            let error = read::<ClientAddr>(yaml).unwrap_err();
            assert!(error.starts_with(expected), "{yaml}: {error}");
        }
    }
}
