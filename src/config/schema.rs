//! How a role's settings are written down once and used for everything: the struct, its defaults,
//! reading a file, the sample, the documentation.
//!
//! [`settings!`] lists the sections of a role's file and their keys. A [`Visitor`] is shown each
//! key with its value; reading a file and listing all keys are two visitors.

use std::{fmt, ops::RangeInclusive};

use super::{
    Role,
    invalid::Invalid,
    parse::Given,
    record::Field,
    tree::Node,
    value::{Number, Setting, read_within},
};

/// A role's settings, as the `settings!` block makes them.
pub trait Settings: Default + Clone {
    /// The role that they configure.
    const ROLE: Role;
    /// The file's name in the working directory.
    const FILE: &'static str;
    /// Keys of the existing Go system that are accepted and have no effect.
    const RETIRED: &'static [&'static str];

    /// Shows every section and key to `visitor`, in the order of the file.
    fn visit(&mut self, visitor: &mut dyn Visitor);

    /// Adjusts defaults that depend on which keys the file has. Called once all keys are read.
    fn settle(&mut self, given: &Given);

    /// Checks values against each other.
    ///
    /// # Errors
    /// The keys that contradict each other, and how to resolve it.
    fn check(&self) -> Result<(), Conflict>;

    /// Returns a sentence for each setting that is accepted but has no effect, or is dangerous.
    fn warnings(&self) -> Vec<String>;

    /// Lists all sections and keys with their present values.
    fn sections(&self) -> Vec<Section> {
        let mut listing = Listing(Vec::new());
        self.clone().visit(&mut listing);
        listing.0
    }
}

/// Is shown every key of a role's settings.
pub trait Visitor {
    /// A section begins; its keys follow.
    fn section(&mut self, name: &'static str, about: &'static str);

    /// A key of the section that began last.
    fn key(&mut self, key: &Spec, value: &mut dyn Slot);
}

/// What is fixed about a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// The section that it stands in.
    pub section: &'static str,
    /// Its name within the section.
    pub name: &'static str,
    /// Names at the top level of the file that mean the same key.
    pub aliases: &'static [&'static str],
    /// When a change takes effect.
    pub reload: Reload,
    /// One line.
    pub meaning: &'static str,
}

impl Spec {
    /// The key's name in errors and documents: `rtmp.addr`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }
}

/// When a changed value takes effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// On reload, while the node runs.
    Live,
    /// When the node is started again.
    Restart,
}

impl fmt::Display for Reload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Live => "live",
            Self::Restart => "restart",
        })
    }
}

/// A key's value, whatever its type.
pub trait Slot {
    /// Takes the value from a file.
    ///
    /// # Errors
    /// As [`Setting::read`].
    fn assign(&mut self, node: &Node) -> Result<(), Invalid>;

    /// Writes the value as YAML, on one line.
    fn written(&self) -> String;

    /// The bounds of a number: `1 to 1000`.
    fn range(&self) -> Option<String>;

    /// The keys of a record, or of the records in a list.
    fn fields(&self) -> &'static [Field];
}

impl<T: Setting> Slot for T {
    fn assign(&mut self, node: &Node) -> Result<(), Invalid> {
        *self = T::read(node)?;
        Ok(())
    }

    fn written(&self) -> String {
        self.write()
    }

    fn range(&self) -> Option<String> {
        None
    }

    fn fields(&self) -> &'static [Field] {
        T::FIELDS
    }
}

/// A number with bounds.
pub(super) struct Bounded<'a, T> {
    pub value: &'a mut T,
    pub bounds: RangeInclusive<T>,
}

impl<T: Setting + Number + PartialOrd + fmt::Display> Slot for Bounded<'_, T> {
    fn assign(&mut self, node: &Node) -> Result<(), Invalid> {
        *self.value = read_within(node, &self.bounds)?;
        Ok(())
    }

    fn written(&self) -> String {
        self.value.write()
    }

    fn range(&self) -> Option<String> {
        Some(format!("{} to {}", self.bounds.start(), self.bounds.end()))
    }

    fn fields(&self) -> &'static [Field] {
        &[]
    }
}

/// Values that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conflict {
    /// The paths of the keys, the one most likely at fault first.
    pub keys: Vec<&'static str>,
    /// The fault and the remedy.
    pub message: String,
}

impl Conflict {
    /// A conflict between `keys`.
    pub fn new(keys: &[&'static str], message: impl Into<String>) -> Self {
        Self { keys: keys.to_vec(), message: message.into() }
    }
}

/// A section and its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its name in the file.
    pub name: &'static str,
    /// What it is about, on one line.
    pub about: &'static str,
    /// In the order of the struct.
    pub keys: Vec<Key>,
}

/// A key and its present value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// What is fixed about it.
    pub spec: Spec,
    /// Its value as YAML, on one line.
    pub value: String,
    /// The bounds of a number: `1 to 1000`.
    pub range: Option<String>,
    /// The keys of a record, or of the records in a list.
    pub fields: &'static [Field],
}

/// All keys, without the sections.
pub(super) fn keys(sections: &[Section]) -> impl Iterator<Item = &Key> {
    sections.iter().flat_map(|section| &section.keys)
}

struct Listing(Vec<Section>);

impl Visitor for Listing {
    fn section(&mut self, name: &'static str, about: &'static str) {
        self.0.push(Section { name, about, keys: Vec::new() });
    }

    fn key(&mut self, key: &Spec, value: &mut dyn Slot) {
        if let Some(section) = self.0.last_mut() {
            section.keys.push(Key {
                spec: *key,
                value: value.written(),
                range: value.range(),
                fields: value.fields(),
            });
        }
    }
}

/// Makes a role's struct, its defaults and its [`Settings`] from one list.
///
/// ```text
/// pub struct CloudConfig(Role::Cloud, "config.yaml", retired: ["enable_sr"]) {
///     /// What the section is about, on one line.
///     rtmp {
///         /// The key's meaning, on one line.
///         restart max_connections -> rtmp_max_connections: usize = 8192,
///             in 1..=1_000_000, also [rtmp_max_connections];
///         ..a_group: GroupConfig = GroupConfig::default(), flat;
///     }
/// }
/// ```
/// A key begins with `live` or `restart`, see [`Reload`]. `max_connections` is its name in the
/// section, `rtmp_max_connections` the struct's field. The bounds are optional. `also` lists the
/// names at the top level of the file that mean the same key, and stay for ever. A section may end
/// with the keys of a [`group!`]: `flat` accepts the group's `also` names, `nested` does not.
/// `settle`, `check` and `warnings` are inherent functions of the struct.
macro_rules! settings {
    (
        $(#[$attr:meta])*
        pub struct $name:ident($role:expr, $file:literal, retired: $retired:expr) {
            $(
                $(#[doc = $about:literal])+
                $section:ident {
                    $(
                        $(#[doc = $meaning:literal])+
                        $reload:ident $key:ident -> $field:ident: $ty:ty = $default:expr
                            $(, in $bounds:expr)? $(, also [$($alias:ident),*])?;
                    )*
                    $(..$group:ident: $group_ty:ty = $group_default:expr, $aliases:ident;)?
                }
            )*
        }
    ) => {
        $(#[$attr])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $(
                $(
                    $(#[doc = $meaning])+
                    $(#[doc = concat!("\n\nRange: `", stringify!($bounds), "`.")])?
                    pub $field: $ty,
                )*
                $(
                    #[doc = concat!("The section `", stringify!($section), "`.")]
                    pub $group: $group_ty,
                )?
            )*
        }

        impl $name {
            /// Reads `path`, or the default file of the working directory. If the file is missing,
            /// the defaults are used and written there.
            ///
            /// # Errors
            /// One line: the file, line and column, the key, and valid values.
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

            /// Returns the sample file: the defaults, every key with its meaning.
            pub fn sample() -> String {
                $crate::config::sample::sample(&Self::default())
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($($field: $default,)* $($group: $group_default,)?)* }
            }
        }

        impl $crate::config::Settings for $name {
            const ROLE: $crate::config::Role = $role;
            const FILE: &'static str = $file;
            const RETIRED: &'static [&'static str] = &$retired;

            fn visit(&mut self, visitor: &mut dyn $crate::config::schema::Visitor) {
                use $crate::config::schema::visit_key;
                $(
                    let section = stringify!($section);
                    visitor.section(section, concat!($($about),+).trim_ascii());
                    $(visit_key!(
                        visitor, section, $reload $key self.$field, true,
                        concat!($($meaning),+), [$($bounds)?], [$($($alias)*)?]
                    );)*
                    $(self.$group.visit(
                        section, $crate::config::schema::aliased!($aliases), visitor
                    );)?
                )*
            }

            fn settle(&mut self, given: &$crate::config::parse::Given) {
                $name::settle(self, given);
            }

            fn check(&self) -> Result<(), $crate::config::Conflict> {
                $name::check(self)
            }

            fn warnings(&self) -> Vec<String> {
                $name::warnings(self)
            }
        }
    };
}
pub(super) use settings;

/// Makes a struct of keys that several roles have, for a section of [`settings!`].
///
/// Its keys are written as there.
macro_rules! group {
    (
        $(#[$attr:meta])*
        pub struct $name:ident {
            $(
                $(#[doc = $meaning:literal])+
                $reload:ident $key:ident -> $field:ident: $ty:ty = $default:expr
                    $(, in $bounds:expr)? $(, also [$($alias:ident),*])?;
            )*
        }
    ) => {
        $(#[$attr])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $(
                $(#[doc = $meaning])+
                $(#[doc = concat!("\n\nRange: `", stringify!($bounds), "`.")])?
                pub $field: $ty,
            )*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $name {
            /// Shows the keys to `visitor` as part of `section`, with or without their aliases.
            pub(super) fn visit(
                &mut self,
                section: &'static str,
                aliases: bool,
                visitor: &mut dyn $crate::config::schema::Visitor,
            ) {
                use $crate::config::schema::visit_key;
                $(visit_key!(
                    visitor, section, $reload $key self.$field, aliases,
                    concat!($($meaning),+), [$($bounds)?], [$($($alias)*)?]
                );)*
            }
        }
    };
}
pub(super) use group;

/// Shows one key to a visitor; a part of [`settings!`] and [`group!`].
macro_rules! visit_key {
    (
        $visitor:ident, $section:ident, $reload:ident $key:ident $self:ident.$field:ident,
        $aliases:expr, $meaning:expr, $bounds:tt, [$($alias:ident)*]
    ) => {{
        let aliases: &[&str] = &[$(stringify!($alias)),*];
        let spec = $crate::config::schema::Spec {
            section: $section,
            name: stringify!($key),
            aliases: if $aliases { aliases } else { &[] },
            reload: visit_key!(@reload $reload),
            meaning: $meaning.trim_ascii(),
        };
        $visitor.key(&spec, visit_key!(@slot &mut $self.$field, $bounds));
    }};
    (@reload live) => { $crate::config::Reload::Live };
    (@reload restart) => { $crate::config::Reload::Restart };
    (@slot $value:expr, []) => { $value };
    (@slot $value:expr, [$bounds:expr]) => {
        &mut $crate::config::schema::Bounded { value: $value, bounds: $bounds }
    };
}
pub(super) use visit_key;

/// Whether a group's aliases hold in a role's file; a part of [`settings!`].
macro_rules! aliased {
    (flat) => {
        true
    };
    (nested) => {
        false
    };
}
pub(super) use aliased;
