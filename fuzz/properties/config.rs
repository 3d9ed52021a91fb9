//! The text of a configuration file.

use std::{fmt::Debug, path::Path};

use downpour::config::{CloudConfig, ConfigError, EdgeConfig, Loaded, Role, Settings};

/// A valid configuration survives a round trip; an invalid one yields an error of one line with a
/// position in the text.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    Role::detect(text);
    check_as(text, CloudConfig::parse);
    check_as(text, EdgeConfig::parse);
}

fn check_as<T: Settings + PartialEq + Debug>(
    text: &str,
    parse: fn(&Path, &str) -> Result<Loaded<T>, ConfigError>,
) {
    let file = Path::new("fuzz.yaml");
    match parse(file, text) {
        Ok(loaded) => {
            let mut again = String::new();
            for section in loaded.config.sections() {
                again += &format!("{}:\n", section.name);
                for key in section.keys {
                    again += &format!("  {}: {}\n", key.spec.name, key.value);
                }
            }
            match parse(file, &again) {
                Ok(same) => assert_eq!(same.config, loaded.config, "from {again}"),
                Err(error) => panic!("{error} in\n{again}"),
            }
        }
        Err(error) => {
            let line = error.to_string();
            assert!(!line.contains('\n') && line.starts_with("fuzz.yaml:"), "{line:?}");
            if let Some((line, column)) = error.position() {
                // YAML has more kinds of line breaks.
                let breaks = text.matches(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count();
                assert!((1..=breaks + 2).contains(&line), "line {line}");
                assert!((1..=text.len() + 1).contains(&column), "column {column}");
            }
        }
    }
}
