//! How a role's settings are written down once and used for everything.

use serde_yaml::Value;

use super::Role;

/// A role's settings, as the [`settings!`](super::schema) block makes them.
pub trait Settings: Default + Sized {
    /// Whose they are.
    const ROLE: Role;
    /// The file's name in the working directory.
    const FILE: &'static str;
    /// Keys of the existing Go system that are accepted and do nothing here.
    const RETIRED: &'static [&'static str];

    /// All keys with their values now, in the order of the struct.
    fn sections(&self) -> Vec<Section>;

    /// Sets one key: `None` if it is unknown, an error that says what would be right.
    fn set(&mut self, key: &str, value: &Value) -> Option<Result<(), String>>;

    /// Whether the values go together: the key at fault and what is wrong.
    fn check(&self) -> Result<(), (&'static str, String)>;

    /// What is accepted but does nothing, as whole sentences.
    fn warnings(&self) -> Vec<String>;
}

/// Keys that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What they are about.
    pub title: &'static str,
    /// In the order of the struct.
    pub keys: Vec<Key>,
}

/// One key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// As it stands in the file.
    pub name: &'static str,
    /// Its value as YAML, on one line.
    pub value: String,
    /// One line.
    pub meaning: &'static str,
}

/// All keys, without the sections.
pub(super) fn keys(sections: &[Section]) -> impl Iterator<Item = &Key> {
    sections.iter().flat_map(|section| &section.keys)
}

/// The sample file: the defaults, every key with its meaning.
pub(super) fn sample<T: Settings>() -> String {
    let mut text = format!(
        "# The {} node's settings, each at its default; docs/configuration.md says more.\n",
        T::ROLE
    );
    for section in T::default().sections() {
        text += &format!("\n## {}\n", section.title);
        for key in section.keys {
            text += &format!("# {}\n{}: {}\n", key.meaning, key.name, key.value);
        }
    }
    text
}

/// A document with the role's tables put between the lines `<!-- cloud settings -->` (or `edge`)
/// and `<!-- end -->`.
#[cfg(test)]
pub(super) fn with_table<T: Settings>(document: &str) -> String {
    let begin = format!("<!-- {} settings -->\n", T::ROLE);
    let (before, rest) = document.split_once(&begin).expect("the document has the role's marker");
    let (_, after) = rest.split_once("<!-- end -->").expect("the marker has its end");
    let mut table = String::new();
    for section in T::default().sections() {
        table +=
            &format!("\n### {}\n\n| key | default | meaning |\n|---|---|---|\n", section.title);
        for key in section.keys {
            let meaning = key.meaning.replace('|', "\\|");
            table += &format!("| `{}` | `{}` | {meaning} |\n", key.name, key.value);
        }
    }
    format!("{before}{begin}{table}\n<!-- end -->{after}")
}

/// Makes a role's struct, its defaults and its [`Settings`] from one list.
///
/// ```text
/// pub struct CloudConfig(Role::Cloud, "config.yaml", retired: []) {
///     "A section" {
///         /// The meaning, which the sample puts on one line.
///         key: Type = default, in least..=most;
///     }
/// }
/// ```
/// The bounds are optional. `check` and `warnings` are inherent functions of the struct.
macro_rules! settings {
    (
        $(#[$attr:meta])*
        pub struct $name:ident($role:expr, $file:literal, retired: $retired:expr) {
            $($section:literal {
                $(
                    $(#[doc = $meaning:literal])+
                    $key:ident: $ty:ty = $default:expr $(, in $bounds:expr)?;
                )*
            })*
        }
    ) => {
        $(#[$attr])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $($($(#[doc = $meaning])+ pub $key: $ty,)*)*
        }

        impl $name {
            /// Reads `path`, or the default file of the working directory. When no path is given
            /// and that file is missing, the defaults are used and written there.
            ///
            /// # Errors
            /// One line: the file, the line, the key, and what would be right.
            pub fn load(
                path: Option<&std::path::Path>,
            ) -> Result<$crate::config::Loaded<Self>, $crate::config::ConfigError> {
                $crate::config::load(path, std::path::Path::new($file))
            }

            /// Checks a text; `file` is named in errors.
            ///
            /// # Errors
            /// As [`Self::load`].
            pub fn parse(
                file: &std::path::Path,
                text: &str,
            ) -> Result<$crate::config::Loaded<Self>, $crate::config::ConfigError> {
                $crate::config::parse(file, text)
            }

            /// The sample file: the defaults, every key with its meaning.
            pub fn sample() -> String {
                $crate::config::schema::sample::<Self>()
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($($key: $default,)*)* }
            }
        }

        impl $crate::config::Settings for $name {
            const ROLE: $crate::config::Role = $role;
            const FILE: &'static str = $file;
            const RETIRED: &'static [&'static str] = &$retired;

            fn sections(&self) -> Vec<$crate::config::Section> {
                vec![$($crate::config::Section {
                    title: $section,
                    keys: vec![$($crate::config::Key {
                        name: stringify!($key),
                        value: $crate::config::Setting::write(&self.$key),
                        meaning: concat!($($meaning),+).trim_ascii(),
                    },)*],
                },)*]
            }

            fn set(&mut self, key: &str, value: &serde_yaml::Value) -> Option<Result<(), String>> {
                match key {
                    $($(stringify!($key) => {
                        let read = <$ty as $crate::config::Setting>::read(value);
                        $(let read = $crate::config::schema::within(read, &$bounds);)?
                        Some(read.map(|value| self.$key = value))
                    })*)*
                    _ => None,
                }
            }

            fn check(&self) -> Result<(), (&'static str, String)> {
                $name::check(self)
            }

            fn warnings(&self) -> Vec<String> {
                $name::warnings(self)
            }
        }
    };
}
pub(super) use settings;

/// Holds a number to its bounds, and names them whatever is wrong.
pub(super) fn within<T: PartialOrd + std::fmt::Display + super::value::Number>(
    read: Result<T, String>,
    bounds: &std::ops::RangeInclusive<T>,
) -> Result<T, String> {
    read.ok()
        .filter(|value| bounds.contains(value))
        .ok_or_else(|| format!("a {} from {} to {}", T::KIND, bounds.start(), bounds.end()))
}
