//! Pacing in a file: `off`, or a factor.

use super::{
    Setting,
    invalid::Invalid,
    record::Fields,
    tree::{Node, Value},
    value::read_within,
};
use downpour_distribution::downstream::fanout::{PaceFactor, Pacing};

impl Setting for Pacing {
    fn read(node: &Node) -> Result<Self, Invalid> {
        let usable =
            || format!("off, targets, or {{factor: {} to {}}}", PaceFactor::MIN, PaceFactor::MAX);
        // `off` is a boolean in YAML 1.1, and some tools write it as one.
        match (node.as_str(), node.as_bool(), &node.value) {
            (Some("off"), ..) | (_, Some(false), _) => Ok(Self::Off),
            (Some("targets"), ..) => Ok(Self::Targets),
            (.., Value::Map(_)) => {
                let bounds = PaceFactor::MIN..=PaceFactor::MAX;
                let factor = Fields::of(node, &["factor"], &usable())?
                    .require_with("factor", |node| read_within(node, &bounds))?;
                PaceFactor::new(factor)
                    .map(Self::Factor)
                    .ok_or_else(|| Invalid::value(node, usable()))
            }
            _ => Err(Invalid::value(node, usable())),
        }
    }

    fn write(&self) -> String {
        match self {
            Self::Off => "off".into(),
            Self::Targets => "targets".into(),
            Self::Factor(factor) => format!("{{factor: {:?}}}", factor.get()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tree;

    #[test]
    fn pacing_is_off_or_a_factor_within_its_limits() {
        let read = |yaml: &str| {
            Pacing::read(&tree::parse(yaml).unwrap())
                .map_err(|fault| format!("{}: {}", fault.path, fault.message))
        };
        let factor = |factor| Ok(Pacing::Factor(PaceFactor::new(factor).unwrap()));
        for (yaml, pacing) in [
            ("off", Ok(Pacing::Off)),
            ("false", Ok(Pacing::Off)),
            ("targets", Ok(Pacing::Targets)),
            ("{factor: 1.5}", factor(1.5)),
            ("{factor: 3}", factor(3.0)),
            ("{factor: 100}", factor(100.0)),
        ] {
            let got = read(yaml);
            assert_eq!(got, pacing, "{yaml}");
            assert_eq!(read(&got.unwrap().write()), pacing, "{yaml}");
        }
        for (yaml, expected) in [
            ("on", ": \"on\" is not valid; use off, targets, or {factor: 1.5 to 100}"),
            ("2", ": 2 is not valid; use off, targets, or {factor: 1.5 to 100}"),
            ("{}", ": the key factor is missing"),
            ("{factor: 1.4}", ".factor: 1.4 is not valid; use a number from 1.5 to 100"),
            ("{factor: 101}", ".factor: 101 is not valid; use a number from 1.5 to 100"),
            ("{factor: .nan}", ".factor: .nan is not valid; use a number from 1.5 to 100"),
            ("{factor: x}", ".factor: \"x\" is not valid; use a number from 1.5 to 100"),
            ("{factor: 2, rate: 3}", ": unknown key rate; the keys here are factor"),
            ("[2]", ": [2] is not valid; use off, targets, or {factor: 1.5 to 100}"),
            ("~", ": has no value; use off, targets, or {factor: 1.5 to 100}"),
        ] {
            assert_eq!(read(yaml).unwrap_err(), expected, "{yaml}");
        }
    }
}
