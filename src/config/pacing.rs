//! Pacing in a cloud's file: `off`, or a factor.

use serde_yaml::Value;

use super::Setting;
use downpour_distribution::downstream::fanout::{PaceFactor, Pacing};

impl Setting for Pacing {
    fn read(value: &Value) -> Result<Self, String> {
        let read = match value {
            Value::String(word) if word == "off" => Some(Self::Off),
            // In YAML 1.1 `off` is this.
            Value::Bool(false) => Some(Self::Off),
            Value::Mapping(entries) if entries.len() == 1 => entries
                .get("factor")
                .and_then(Value::as_f64)
                .and_then(PaceFactor::new)
                .map(Self::Factor),
            _ => None,
        };
        read.ok_or_else(|| {
            format!("off, or {{factor: {} to {}}}", PaceFactor::LEAST, PaceFactor::MOST)
        })
    }

    fn write(&self) -> String {
        match self {
            Self::Off => "off".into(),
            Self::Factor(factor) => format!("{{factor: {:?}}}", factor.get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_off_or_a_factor_within_its_limits() {
        let read = |yaml: &str| Pacing::read(&serde_yaml::from_str(yaml).unwrap());
        let factor = |factor| Ok(Pacing::Factor(PaceFactor::new(factor).unwrap()));
        for (yaml, pacing) in [
            ("off", Ok(Pacing::Off)),
            ("false", Ok(Pacing::Off)),
            ("{factor: 1.5}", factor(1.5)),
            ("{factor: 3}", factor(3.0)),
            ("{factor: 100}", factor(100.0)),
        ] {
            let got = read(yaml);
            assert_eq!(got, pacing, "{yaml}");
            assert_eq!(read(&got.unwrap().write()), pacing, "{yaml}");
        }
        for yaml in [
            "on",
            "2",
            "{}",
            "{factor: 1.4}",
            "{factor: 101}",
            "{factor: .nan}",
            "{factor: x}",
            "{factor: 2, rate: 3}",
            "[2]",
            "~",
        ] {
            assert_eq!(read(yaml).unwrap_err(), "off, or {factor: 1.5 to 100}", "{yaml}");
        }
    }
}
