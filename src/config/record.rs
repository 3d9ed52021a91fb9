//! Records: maps with known keys, such as `{addr: 10.0.0.7:5222, fec: auto}`, mostly in lists.

use super::{
    invalid::{Invalid, shown_key},
    tree::{Node, Value},
    value::Setting,
};

/// One key of a record, for the documentation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Field {
    /// The key.
    pub name: &'static str,
    /// Whether it may be left out.
    pub optional: bool,
    /// One line.
    pub meaning: &'static str,
}

/// A record that is being read. Each of its keys is known and set once.
pub(super) struct Fields<'a> {
    node: &'a Node,
    entries: Vec<(&'a str, &'a Node)>,
}

impl<'a> Fields<'a> {
    /// Checks that `node` is a map with no key but `known` ones.
    ///
    /// # Errors
    /// At the unknown key, or at the value if it is no map; `usable` shows a whole record.
    pub(super) fn of(node: &'a Node, known: &[&str], usable: &str) -> Result<Self, Invalid> {
        let Value::Map(entries) = &node.value else {
            return Err(Invalid::value(node, usable));
        };
        for entry in entries {
            if !known.contains(&entry.key.as_str()) {
                let name = shown_key(&entry.key);
                let rest = match nearest(&entry.key, known.iter().copied()) {
                    Some(near) => format!("did you mean {near}?"),
                    None => format!("the keys here are {}", known.join(", ")),
                };
                return Err(Invalid::new(entry.at, format!("unknown key {name}; {rest}")));
            }
        }
        let entries = entries.iter().map(|entry| (entry.key.as_str(), &entry.value)).collect();
        Ok(Self { node, entries })
    }

    /// A record of which only the key `name` is given, without braces.
    pub(super) fn short(node: &'a Node, name: &'static str) -> Self {
        Self { node, entries: vec![(name, node)] }
    }

    /// Reads a key that may be left out.
    ///
    /// # Errors
    /// If the value is not valid.
    pub(super) fn get<T: Setting>(&self, name: &str) -> Result<Option<T>, Invalid> {
        self.get_with(name, T::read)
    }

    /// Reads a key that must be there.
    ///
    /// # Errors
    /// If the key is missing or its value is not valid.
    pub(super) fn require<T: Setting>(&self, name: &str) -> Result<T, Invalid> {
        self.require_with(name, T::read)
    }

    /// As [`Self::require`], with a function that reads the value.
    pub(super) fn require_with<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Node) -> Result<T, Invalid>,
    ) -> Result<T, Invalid> {
        self.get_with(name, read)?
            .ok_or_else(|| Invalid::new(self.node.at, format!("the key {name} is missing")))
    }

    fn get_with<T>(
        &self,
        name: &str,
        read: impl FnOnce(&Node) -> Result<T, Invalid>,
    ) -> Result<Option<T>, Invalid> {
        let Some((_, value)) = self.entries.iter().find(|(key, _)| *key == name) else {
            return Ok(None);
        };
        let short = std::ptr::eq(*value, self.node);
        read(value)
            .map(Some)
            .map_err(|fault| if short { fault } else { fault.within(format!(".{name}")) })
    }
}

/// The name that `wrong` most likely stands for, if any is near enough.
pub(super) fn nearest<'a>(wrong: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A long key is no misspelling, and the distance takes quadratic time.
    if wrong.len() > KEY_MAX {
        return None;
    }
    names
        .map(|name| (strsim::osa_distance(wrong, name), name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 5 && *distance < name.len())
        .min()
        .map(|(_, name)| name)
}

/// Makes a record's struct and its [`Setting`] from one list of keys.
///
/// ```text
/// pub struct Target("{addr: \"10.0.0.7:5222\"}", short: addr) {
///     /// The meaning, which the documentation shows on one line.
///     addr: Destination;
///     /// A key with a default may be left out.
///     fec: Option<Fec> = None;
/// }
/// ```
/// The text shows a whole record, for errors. With `short`, a plain value is a record of which
/// only that key is given.
macro_rules! record {
    (
        $(#[$attr:meta])*
        pub struct $name:ident($usable:literal $(, short: $short:ident)?) {
            $(
                $(#[doc = $meaning:literal])+
                $field:ident: $ty:ty $(= $default:expr)?;
            )*
        }
    ) => {
        $(#[$attr])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $($(#[doc = $meaning])+ pub $field: $ty,)*
        }

        impl $crate::config::Setting for $name {
            const FIELDS: &'static [$crate::config::record::Field] = &[
                $($crate::config::record::Field {
                    name: stringify!($field),
                    optional: $crate::config::record::record!(@optional $($default)?),
                    meaning: concat!($($meaning),+).trim_ascii(),
                },)*
            ];

            fn read(
                node: &$crate::config::tree::Node,
            ) -> Result<Self, $crate::config::Invalid> {
                use $crate::config::record::Fields;
                let fields = match &node.value {
                    $($crate::config::tree::Value::Scalar { .. } if !node.is_null() => {
                        Fields::short(node, stringify!($short))
                    })?
                    _ => Fields::of(node, &[$(stringify!($field)),*], $usable)?,
                };
                Ok(Self {
                    $($field: $crate::config::record::record!(
                        @read fields, stringify!($field) $(, $default)?
                    ),)*
                })
            }

            fn write(&self) -> String {
                let mut keys: Vec<(&str, String)> = Vec::new();
                $($crate::config::record::record!(@write keys, self.$field, $ty $(, $default)?, {
                    (stringify!($field), $crate::config::Setting::write(&self.$field))
                });)*
                $(if let [(stringify!($short), value)] = &keys[..] {
                    return value.clone();
                })?
                let keys: Vec<_> = keys.iter().map(|(key, value)| format!("{key}: {value}")).collect();
                format!("{{{}}}", keys.join(", "))
            }
        }
    };
    (@optional) => { false };
    (@optional $default:expr) => { true };
    (@read $fields:ident, $name:expr) => { $fields.require($name)? };
    (@read $fields:ident, $name:expr, $default:expr) => {
        $fields.get($name)?.unwrap_or_else(|| $default)
    };
    (@write $keys:ident, $value:expr, $ty:ty, { $pair:expr }) => { $keys.push($pair) };
    (@write $keys:ident, $value:expr, $ty:ty, $default:expr, { $pair:expr }) => {
        let default: $ty = $default;
        if $value != default {
            $keys.push($pair);
        }
    };
}
pub(super) use record;

/// Bytes of an unknown key for which a suggestion is looked up.
const KEY_MAX: usize = 64;

#[cfg(test)]
#[allow(unreachable_pub, reason = "the macros declare public types")]
mod tests {
    use super::*;
    use crate::config::tree;

    record! {
        /// A job.
        pub struct Job("{name: a, tries: 3}") {
            /// Its name.
            name: String;
            /// Attempts.
            tries: u64 = 1;
            /// What it follows.
            after: Vec<String> = Vec::new();
        }
    }

    fn read(text: &str) -> Result<Vec<Job>, (usize, usize, String)> {
        Vec::read(&tree::parse(text).unwrap()).map_err(|fault| {
            (fault.at.line, fault.at.column, format!("{}: {}", fault.path, fault.message))
        })
    }

    #[test]
    fn a_record_reads_back_what_it_writes() {
        let jobs = read("- {name: a}\n- name: b\n  tries: 2\n  after: [a, 'c, d']\n").unwrap();
        assert_eq!(jobs[0], Job { name: "a".into(), tries: 1, after: Vec::new() });
        assert_eq!(jobs[1].after, ["a", "c, d"]);
        assert_eq!(jobs.write(), "[{name: a}, {name: b, tries: 2, after: [a, \"c, d\"]}]");
        assert_eq!(read(&jobs.write()).unwrap(), jobs);
        assert_eq!(read("").unwrap(), []);
    }

    #[test]
    fn faults_name_the_item_and_the_key_at_their_place() {
        for (text, line, column, message) in [
            ("- {name: a}\n- {tries: 2}", 2, 3, "[1]: the key name is missing"),
            ("- name: a\n  tires: 2", 2, 3, "[0]: unknown key tires; did you mean tries?"),
            (
                "- name: a\n  xyz: 2",
                2,
                3,
                "[0]: unknown key xyz; the keys here are name, tries, after",
            ),
            (
                "- name: a\n- name: b\n  tries: many\n",
                3,
                10,
                "[1].tries: \"many\" is not valid; use a whole number from 0 to 18446744073709551615",
            ),
            (
                "- {name: b, after: [c, [d]]}",
                1,
                24,
                "[0].after[1]: [\"d\"] is not valid; use a text, in quotes if it looks like a number",
            ),
            ("- a", 1, 3, "[0]: \"a\" is not valid; use {name: a, tries: 3}"),
            ("-\n", 1, 2, "[0]: has no value; use {name: a, tries: 3}"),
            (
                "{name: a}",
                1,
                1,
                ": {name: \"a\"} is not valid; use a list such as [a, b], or [] for none",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), (line, column, message.into()), "{text}");
        }
    }

    #[test]
    fn only_a_near_name_is_suggested() {
        let names = ["addr", "max_connections", "max"];
        for (wrong, near) in [
            ("adr", Some("addr")),
            ("max_connection", Some("max_connections")),
            ("maxconections", Some("max_connections")),
            ("mxa", Some("max")),
            ("x", None),
            ("cheese", None),
        ] {
            assert_eq!(nearest(wrong, names.into_iter()), near, "{wrong}");
        }
        assert_eq!(nearest(&"a".repeat(KEY_MAX + 1), names.into_iter()), None);
    }
}
