//! Forward error correction in a cloud's file: `off`, `auto`, or a matrix.

use std::fmt;

use serde_yaml::{Mapping, Value};

use super::Setting;
use downpour_distribution::address::Destination;
use downpour_repair::fec::{Fec, Matrix};

impl Setting for Fec {
    fn read(value: &Value) -> Result<Self, String> {
        let read = match value {
            Value::String(word) if word == "off" => Some(Self::Off),
            Value::String(word) if word == "auto" => Some(Self::Auto),
            // In YAML 1.1 `off` is this.
            Value::Bool(false) => Some(Self::Off),
            Value::Mapping(sides) => matrix(sides).map(Self::Fixed),
            _ => None,
        };
        read.ok_or_else(wanted)
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

/// One entry of `client_addr_list`: `10.0.0.7:5222`, or `{addr: 10.0.0.7:5222, fec: auto}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientAddr {
    /// Where RTP goes.
    pub addr: Destination,
    /// Parity for it, if not what `fec` says for all.
    pub fec: Option<Fec>,
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

impl Setting for ClientAddr {
    fn read(value: &Value) -> Result<Self, String> {
        let Value::Mapping(entry) = value else {
            return Destination::read(value).map(Into::into).map_err(|wanted| {
                format!("{wanted}, or a mapping such as {{addr: \"10.0.0.7:5222\", fec: auto}}")
            });
        };
        let (mut addr, mut fec) = (None, None);
        for (key, value) in entry {
            match key.as_str() {
                Some("addr") => addr = Some(Destination::read(value)?),
                Some("fec") => {
                    let read = Fec::read(value);
                    fec = Some(read.map_err(|wanted| format!("a mapping whose fec is {wanted}"))?);
                }
                _ => return Err("a mapping of addr and fec, and nothing else".into()),
            }
        }
        let addr = addr.ok_or("a mapping that has an addr")?;
        Ok(Self { addr, fec })
    }

    fn write(&self) -> String {
        match self.fec {
            None => self.addr.write(),
            // In braces, what is not quoted ends at the first colon and space, not here.
            Some(fec) => format!("{{addr: \"{}\", fec: {}}}", self.addr, fec.write()),
        }
    }
}

fn matrix(sides: &Mapping) -> Option<Matrix> {
    let side = |name| u8::try_from(sides.get(name)?.as_u64()?).ok();
    let (columns, rows) = (side("columns")?, side("rows")?);
    (sides.len() == 2).then(|| Matrix::new(columns, rows).ok()).flatten()
}

fn wanted() -> String {
    format!(
        "off, auto, or {{columns: 1 to {0}, rows: 1 to {0}}} whose product is at most {1}",
        Matrix::SIDE_LIMIT,
        Matrix::AREA_LIMIT
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<T: Setting>(yaml: &str) -> Result<T, String> {
        T::read(&serde_yaml::from_str(yaml).unwrap())
    }

    #[test]
    fn it_is_off_auto_or_a_matrix_within_its_limits() {
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
        for yaml in [
            "on",
            "true",
            "10",
            "{}",
            "[10, 5]",
            "{columns: 10}",
            "{columns: 33, rows: 1}",
            "{columns: 0, rows: 5}",
            "{columns: 32, rows: 32}",
            "{columns: 300, rows: 1}",
            "{columns: 10, rows: -1}",
            "{columns: 10, rows: 5, depth: 1}",
            "~",
        ] {
            let error = read::<Fec>(yaml).unwrap_err();
            assert!(error.starts_with("off, auto, or {columns: 1 to 32"), "{yaml}: {error}");
        }
    }

    #[test]
    fn an_address_may_have_its_own() {
        for (yaml, addr, fec) in [
            ("10.0.0.7:5222", "10.0.0.7:5222", None),
            ("{addr: 10.0.0.7:5222}", "10.0.0.7:5222", None),
            ("{addr: '[::1]:5222', fec: off}", "[::1]:5222", Some(Fec::Off)),
            ("{fec: auto, addr: 'edge:5222'}", "edge:5222", Some(Fec::Auto)),
        ] {
            let got = read::<ClientAddr>(yaml).unwrap();
            assert_eq!((got.to_string(), got.fec), (addr.into(), fec));
            assert_eq!(read::<ClientAddr>(&got.write()), Ok(got));
        }
        for (yaml, expected) in [
            ("10.0.0.7", "or a mapping such as {addr: \"10.0.0.7:5222\", fec: auto}"),
            ("{fec: auto}", "a mapping that has an addr"),
            ("{addr: x}", "an address such as"),
            ("{addr: 'x:1', fec: on}", "a mapping whose fec is off, auto, or"),
            ("{addr: 'x:1', fce: on}", "addr and fec, and nothing else"),
        ] {
            let error = read::<ClientAddr>(yaml).unwrap_err();
            assert!(error.contains(expected), "{yaml}: {error}");
        }
    }
}
