//! Parses a file's text into checked settings, or returns an error of one line with a position.

use std::{
    collections::{HashMap, HashSet},
    path::Path,
};

use super::{
    CloudConfig, ConfigError, EdgeConfig, Loaded, Role,
    invalid::shown_key,
    record::nearest,
    sample,
    schema::{self, Section, Settings, Slot, Spec, Visitor},
    tree::{self, Entry, Node, Place, Value},
};

/// Which sections and keys a file has.
#[derive(Debug, Default)]
pub struct Given {
    sections: HashSet<String>,
    /// By the key's path: its name as written and where its value begins.
    keys: HashMap<String, (String, Place)>,
}

impl Given {
    /// `true` if the file has this section, even an empty one.
    pub fn has_section(&self, name: &str) -> bool {
        self.sections.contains(name)
    }

    /// `true` if the file has this key, under any of its names.
    pub fn has_key(&self, path: &str) -> bool {
        self.keys.contains_key(path)
    }
}

/// Reads and checks a file's text.
pub(super) fn parse<T: Settings>(file: &Path, text: &str) -> Result<Loaded<T>, ConfigError> {
    let fail = |at: Place, message| Err(ConfigError::new(file, Some(at), message));
    if sample::is_cut_off(text) {
        let message = format!(
            "the file ends in the middle: its last line, `{}`, is missing; restore the file, or \
             remove its first line",
            sample::LAST_LINE
        );
        return fail(Place { line: text.lines().count().max(1), column: 1 }, message);
    }
    let root = match tree::parse(text) {
        Ok(root) => root,
        Err(fault) => return fail(fault.at, fault.message),
    };
    let entries = match &root.value {
        Value::Map(entries) => &entries[..],
        _ if root.is_null() => &[],
        _ => return fail(root.at, "the file must hold lines of the form `key: value`".into()),
    };
    let mut config = T::default();
    let known = config.sections();
    let mut reader = Reader::new(entries, &known);
    config.visit(&mut reader);
    let (given, retired) = match reader.finish::<T>(&known) {
        Ok(read) => read,
        Err((at, message)) => return fail(at, message),
    };
    config.settle(&given);
    if let Err(conflict) = config.check() {
        let written = conflict.keys.iter().find_map(|key| given.keys.get(*key));
        let name = written.map(|(name, _)| &name[..]).or(conflict.keys.first().copied());
        return Err(ConfigError::new(
            file,
            written.map(|(_, at)| *at),
            format!("{}: {}", name.unwrap_or_default(), conflict.message),
        ));
    }
    let warnings = config.warnings().into_iter().map(|w| format!("{}: {w}", file.display()));
    let retired = retired.into_iter().map(|(at, key)| {
        format!("{}:{at}: {key} has no effect and can be removed", file.display())
    });
    let empty = entries
        .is_empty()
        .then(|| format!("{}: the file has no keys: each of them has its default", file.display()));
    let of_livego = given.keys.iter().filter(|(_, (name, _))| LIVEGO.contains(&&name[..]));
    let mut of_livego: Vec<_> = of_livego.map(|(path, (name, at))| (*at, name, path)).collect();
    of_livego.sort();
    let of_livego = of_livego.into_iter().map(|(at, name, path)| {
        format!("{}:{at}: {name} is livego's name; it sets {path}", file.display())
    });
    let warnings = empty.into_iter().chain(retired).chain(of_livego).chain(warnings).collect();
    Ok(Loaded { config, file: Some(file.to_owned()), notes: Vec::new(), warnings })
}

/// Names of `livego.yaml` that are not those of a Go node's own file.
const LIVEGO: &[&str] = &["level", "flv_archive", "flv_dir"];

/// Counts a file's keys that a role knows.
pub(super) fn known_keys<T: Settings>(entries: &[Entry]) -> usize {
    let mut reader = Reader::new(entries, &T::default().sections());
    let all = reader.top.len() + reader.nested.len();
    T::default().visit(&mut reader);
    let retired = reader.top.keys().filter(|key| T::RETIRED.contains(key)).count();
    all - reader.top.len() - reader.nested.len() + retired
}

/// Gives every key of the settings its value from the file.
struct Reader<'a> {
    /// Keys of sections that nothing has read yet, by section and key.
    nested: HashMap<(&'a str, &'a str), &'a Entry>,
    /// Keys outside of sections that nothing has read yet.
    top: HashMap<&'a str, &'a Entry>,
    given: Given,
    faults: Vec<Fault>,
}

/// What is wrong and where; the first in the file is the least.
type Fault = (Place, String);

/// A key without effect.
type Retired<'a> = (Place, &'a str);

impl<'a> Reader<'a> {
    fn new(entries: &'a [Entry], known: &[Section]) -> Self {
        let mut reader = Self {
            nested: HashMap::new(),
            top: HashMap::new(),
            given: Given::default(),
            faults: Vec::new(),
        };
        for entry in entries {
            let section = known.iter().any(|section| section.name == entry.key);
            let alias = schema::keys(known).any(|key| key.spec.aliases.contains(&&entry.key[..]));
            match &entry.value.value {
                Value::Map(keys) if section => {
                    reader.given.sections.insert(entry.key.clone());
                    let keys = keys.iter().map(|key| ((&entry.key[..], &key.key[..]), key));
                    reader.nested.extend(keys);
                }
                _ if section && entry.value.is_null() => {
                    reader.given.sections.insert(entry.key.clone());
                }
                // `streams` is a section, and was a list before there were sections.
                _ if section && !alias => {
                    let message = format!(
                        "{}: {} is not valid; use a section, with keys and values below it",
                        entry.key, entry.value
                    );
                    reader.faults.push((entry.value.at, message));
                }
                _ => {
                    reader.top.insert(&entry.key, entry);
                }
            }
        }
        reader
    }

    /// Which keys there are and which of them have no effect, or the first fault of the file.
    fn finish<T: Settings>(
        mut self,
        known: &[Section],
    ) -> Result<(Given, Vec<Retired<'a>>), Fault> {
        let (mut retired, unknown): (Vec<_>, Vec<_>) =
            self.top.into_iter().partition(|(key, _)| T::RETIRED.contains(key));
        let unknown = unknown.into_iter().map(|(key, entry)| (None, key, entry.at));
        let nested = self.nested.into_iter();
        let nested = nested.map(|((section, key), entry)| (Some(section), key, entry.at));
        self.faults.extend(
            unknown
                .chain(nested)
                .map(|(section, key, at)| (at, unknown_key::<T>(known, section, key))),
        );
        if let Some(first) = self.faults.into_iter().min() {
            return Err(first);
        }
        retired.sort_by_key(|(_, entry)| entry.at);
        Ok((self.given, retired.into_iter().map(|(key, entry)| (entry.at, key)).collect()))
    }
}

impl Visitor for Reader<'_> {
    fn section(&mut self, _: &'static str, _: &'static str) {}

    fn key(&mut self, key: &Spec, value: &mut dyn Slot) {
        let nested = self.nested.remove(&(key.section, key.name));
        let mut found: Vec<(String, &Entry)> =
            nested.into_iter().map(|entry| (key.path(), entry)).collect();
        for alias in key.aliases {
            found.extend(self.top.remove(alias).map(|entry| ((*alias).to_owned(), entry)));
        }
        found.sort_by_key(|(_, entry)| entry.at);
        if let [(first, one), (second, other), ..] = &found[..] {
            let message = format!(
                "{second} is set twice, first in line {} as {first}; remove one",
                one.at.line
            );
            self.faults.push((other.at, message));
        }
        if let Some((name, entry)) = found.into_iter().next() {
            self.assign(key, name, &entry.value, value);
        }
    }
}

impl Reader<'_> {
    fn assign(&mut self, key: &Spec, name: String, node: &Node, value: &mut dyn Slot) {
        if let Err(fault) = value.assign(node) {
            self.faults.push((fault.at, format!("{name}{}: {}", fault.path, fault.message)));
        }
        self.given.keys.insert(key.path(), (name, node.at));
    }
}

fn unknown_key<T: Settings>(known: &[Section], section: Option<&str>, key: &str) -> String {
    let (other, others) = match T::ROLE {
        Role::Cloud => (Role::Edge, EdgeConfig::default().sections()),
        Role::Edge => (Role::Cloud, CloudConfig::default().sections()),
    };
    let (role, shown) = (T::ROLE, shown_key(key));
    let path = section.map_or(shown.clone(), |section| format!("{section}.{shown}"));
    let belongs_to_other = match section {
        Some(_) => schema::keys(&others).any(|known| known.spec.path() == path),
        None => {
            others.iter().any(|section| section.name == key)
                || schema::keys(&others).any(|known| known.spec.aliases.contains(&key))
        }
    };
    if belongs_to_other {
        return format!(
            "unknown key {path}; it belongs in the file of {}, and this is the file of {}",
            other.with_article(),
            role.with_article()
        );
    }
    match suggestion(known, section, key) {
        Some(suggestion) => format!("unknown key {path}; did you mean {suggestion}?"),
        None => format!("unknown key {path}; docs/configuration.md lists the {role}'s keys"),
    }
}

fn suggestion(known: &[Section], section: Option<&str>, key: &str) -> Option<String> {
    let own = known.iter().find(|known| Some(known.name) == section);
    if let Some(own) = own
        && let Some(near) = nearest(key, own.keys.iter().map(|key| key.spec.name))
    {
        return Some(format!("{}.{near}", own.name));
    }
    // A key outside of its section, or under its flat name in a section.
    let exact = |known: &&schema::Key| {
        let spec = known.spec;
        spec.name == key || spec.path() == key || section.is_some() && spec.aliases.contains(&key)
    };
    let near_at_top = || {
        let aliases = schema::keys(known).flat_map(|key| key.spec.aliases.iter().copied());
        nearest(key, known.iter().map(|section| section.name).chain(aliases))
    };
    match schema::keys(known).find(exact) {
        Some(known) => Some(format!("{}: {{{}: …}}", known.spec.section, known.spec.name)),
        None if section.is_none() => near_at_top().map(str::to_owned),
        None => None,
    }
}
