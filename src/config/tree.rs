//! A YAML text as a tree in which every key and every value knows its line and column.
//!
//! Errors must point into the file, inside nested sections and list items too, and serde's data
//! model carries no positions. The tree is built from the events of a YAML 1.2 parser; serde_yaml
//! resolves the scalars. Supported are one document, plain keys, the core schema's scalars, anchors and
//! aliases.

use std::{collections::HashMap, fmt};

use granit_parser::{Event, Parser, ScalarStyle, ScanError, Tag};
use serde_yaml::Value as Scalar;

use super::invalid::{Invalid, shown_key};

/// A line and a column in characters, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value and where it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Where it begins; the key's place for a value that is left out.
    pub at: Place,
    /// What it is.
    pub value: Value,
}

/// What a node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A text, number, boolean or nothing.
    Scalar {
        /// As written, after quotes and escapes are resolved.
        text: String,
        /// `true` if it has no quotes, so that it may be a number, a boolean or nothing.
        plain: bool,
    },
    /// A list.
    List(Vec<Node>),
    /// A section or a record.
    Map(Vec<Entry>),
}

/// A key with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key begins.
    pub at: Place,
    /// Its value.
    pub value: Node,
}

impl Node {
    /// `true` for `null`, `~` and a value that is left out.
    pub fn is_null(&self) -> bool {
        matches!(self.resolve(), Some(Scalar::Null))
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        self.resolve()?.as_bool()
    }

    /// A whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        self.resolve()?.as_u64()
    }

    /// A number.
    pub fn as_f64(&self) -> Option<f64> {
        self.resolve()?.as_f64()
    }

    /// A text: in quotes, or without them if it is no number, no boolean and not nothing.
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, plain } if !plain || is_text(text) => Some(text),
            _ => None,
        }
    }

    /// A scalar as written, whatever it looks like.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar { text, .. } => Some(text),
            _ => None,
        }
    }

    /// What a scalar without quotes stands for.
    fn resolve(&self) -> Option<Scalar> {
        match &self.value {
            Value::Scalar { text, plain: true } => Some(resolve(text)),
            _ => None,
        }
    }

    /// Levels of lists and maps, 0 for a scalar.
    fn depth(&self) -> usize {
        match &self.value {
            Value::Scalar { .. } => 0,
            Value::List(items) => 1 + items.iter().map(Self::depth).max().unwrap_or(0),
            Value::Map(entries) => {
                1 + entries.iter().map(|entry| entry.value.depth()).max().unwrap_or(0)
            }
        }
    }

    /// Bytes of memory, roughly.
    fn size(&self) -> usize {
        NODE_SIZE
            + match &self.value {
                Value::Scalar { text, .. } => text.len(),
                Value::List(items) => items.iter().map(Self::size).sum(),
                Value::Map(entries) => {
                    entries.iter().map(|entry| entry.key.len() + entry.value.size()).sum()
                }
            }
    }
}

/// `true` if `text` without quotes is a text.
pub(super) fn is_text(text: &str) -> bool {
    resolve(text).is_string()
}

/// What `text` without quotes stands for, as serde_yaml reads it.
fn resolve(text: &str) -> Scalar {
    // The parser has found one scalar. If serde_yaml parses a collection, the scalar is a string.
    match serde_yaml::from_str(text) {
        Ok(Scalar::Sequence(_) | Scalar::Mapping(_) | Scalar::Tagged(_)) | Err(_) => {
            Scalar::String(text.to_owned())
        }
        Ok(scalar) => scalar,
    }
}

/// Reads a text. An empty one is a node that is null.
pub(super) fn parse(text: &str) -> Result<Node, Invalid> {
    let options = granit_parser::options! {
        flow_nesting_limit: NESTING_MAX,
        block_nesting_limit: NESTING_MAX,
    };
    let mut builder = Builder::default();
    for event in Parser::new_from_str_with_options(text, options) {
        let (event, span) = event.map_err(|error| not_yaml(text, &error))?;
        let at = Place { line: span.start.line().max(1), column: span.start.col() + 1 };
        let event = match event {
            // The parser reports `~` for a value that is left out.
            Event::Scalar(_, style, anchor, tag) if span.start.index() == span.end.index() => {
                Event::Scalar("".into(), style, anchor, tag)
            }
            event => event,
        };
        builder.event(event, at)?;
    }
    let empty = || Node {
        at: Place { line: 1, column: 1 },
        value: Value::Scalar { text: String::new(), plain: true },
    };
    Ok(builder.root.unwrap_or_else(empty))
}

fn not_yaml(text: &str, error: &ScanError) -> Invalid {
    let at = Place { line: error.marker().line().max(1), column: error.marker().col() + 1 };
    // To YAML a bracket begins a list.
    let bracket = |line: &str| {
        let value = line.split_once(": ").map_or("", |(_, value)| value.trim_start());
        value.starts_with('[') && (value.starts_with("[:") || value.contains("]:"))
    };
    let hint = match text.lines().take(at.line).skip(at.line.saturating_sub(2)).any(bracket) {
        true => "; an address in brackets needs quotes: \"[::]:4242\"",
        false => "",
    };
    Invalid::new(at, format!("this is not YAML: {}{hint}", error.info()))
}

/// Puts the parser's events together.
#[derive(Default)]
struct Builder {
    root: Option<Node>,
    documents: usize,
    /// Lists and maps that have begun and not ended.
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    /// Bytes of all nodes so far.
    size: usize,
}

struct Open {
    at: Place,
    anchor: usize,
    items: Items,
}

enum Items {
    List(Vec<Node>),
    Map { entries: Vec<Entry>, key: Option<(String, Place)>, lines: HashMap<String, usize> },
}

impl Builder {
    fn event(&mut self, event: Event<'_>, at: Place) -> Result<(), Invalid> {
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(Invalid::new(at, "a second document begins here; remove it"));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let text_tag = scalar_tag(tag.as_deref(), at)?;
                let plain = style == ScalarStyle::Plain && !text_tag;
                let value = Value::Scalar { text: text.into_owned(), plain };
                self.add(Node { at, value }, anchor)?;
            }
            Event::SequenceStart(_, anchor, tag) => {
                collection_tag(tag.as_deref(), "seq", at)?;
                self.open.push(Open { at, anchor, items: Items::List(Vec::new()) });
            }
            Event::MappingStart(_, anchor, tag) => {
                collection_tag(tag.as_deref(), "map", at)?;
                let (entries, key, lines) = (Vec::new(), None, HashMap::new());
                self.open.push(Open { at, anchor, items: Items::Map { entries, key, lines } });
            }
            Event::SequenceEnd | Event::MappingEnd => {
                if let Some(Open { at, anchor, items }) = self.open.pop() {
                    let value = match items {
                        Items::List(items) => Value::List(items),
                        Items::Map { entries, .. } => Value::Map(entries),
                    };
                    self.add(Node { at, value }, anchor)?;
                }
            }
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor) else {
                    return Err(Invalid::new(at, "this alias lies inside its own anchor"));
                };
                // The tree is walked, copied and dropped recursively.
                if self.open.len() + node.depth() > NESTING_MAX {
                    return Err(Invalid::new(at, "lists and sections are nested too deeply"));
                }
                self.size += node.size();
                self.check_size(at)?;
                let node = Node { at, value: self.anchors[&anchor].value.clone() };
                self.add(node, 0)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, mut node: Node, anchor: usize) -> Result<(), Invalid> {
        self.size += NODE_SIZE;
        if let Value::Scalar { text, .. } = &node.value {
            self.size += text.len();
        }
        if anchor != 0 {
            self.size += node.size();
            self.check_size(node.at)?;
            self.anchors.insert(anchor, node.clone());
        }
        self.check_size(node.at)?;
        let mut twice = None;
        match self.open.last_mut().map(|open| &mut open.items) {
            None => self.root = Some(node),
            Some(Items::List(items)) => items.push(node),
            Some(Items::Map { entries, key: key @ Some(_), .. }) => {
                if let Some((key, at)) = key.take() {
                    if matches!(&node.value, Value::Scalar { text, plain: true } if text.is_empty())
                    {
                        node.at = at;
                    }
                    entries.push(Entry { key, at, value: node });
                }
            }
            Some(Items::Map { key, lines, .. }) => {
                let Value::Scalar { text, .. } = node.value else {
                    return Err(Invalid::new(node.at, "a key must be one word"));
                };
                twice = lines.insert(text.clone(), node.at.line).map(|line| (line, node.at));
                *key = Some((text, node.at));
            }
        }
        match twice {
            Some((line, at)) => Err(Invalid::new(
                at,
                format!("{} is set twice, first in line {line}; remove one", self.path()),
            )),
            None => Ok(()),
        }
    }

    /// The keys and indexes that lead to the newest key: `rtmp.addr` or `jobs[1].name`.
    fn path(&self) -> String {
        let mut path = String::new();
        for open in &self.open {
            match &open.items {
                Items::List(items) => path += &format!("[{}]", items.len()),
                Items::Map { key: Some((key, _)), .. } => {
                    path += if path.is_empty() { "" } else { "." };
                    path += &shown_key(key);
                }
                Items::Map { .. } => {}
            }
        }
        path
    }

    /// Aliases let a short text stand for a huge tree.
    fn check_size(&self, at: Place) -> Result<(), Invalid> {
        match self.size > SIZE_MAX {
            true => Err(Invalid::new(at, "the file holds too many values")),
            false => Ok(()),
        }
    }
}

/// `true` if the tag makes a scalar a text, whatever it looks like.
fn scalar_tag(tag: Option<&Tag>, at: Place) -> Result<bool, Invalid> {
    match tag.map(|tag| (tag.core_suffix(), tag.handle(), tag.suffix())) {
        None | Some((Some("bool" | "float" | "int" | "null"), ..)) => Ok(false),
        Some((Some("str"), ..)) => Ok(true),
        Some(_) => Err(unknown_tag(at)),
    }
}

fn collection_tag(tag: Option<&Tag>, expected: &str, at: Place) -> Result<(), Invalid> {
    match tag {
        Some(tag) if tag.core_suffix() != Some(expected) => Err(unknown_tag(at)),
        _ => Ok(()),
    }
}

fn unknown_tag(at: Place) -> Invalid {
    Invalid::new(at, "a tag (`!…`) stands before this value; remove it")
}

/// Levels of lists and sections.
const NESTING_MAX: usize = 32;
/// Bytes of memory that a node takes beside its text, roughly.
const NODE_SIZE: usize = 64;
/// Bytes of memory that a file's tree takes at most.
const SIZE_MAX: usize = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        let fault = parse(text).unwrap_err();
        format!("{}: {}", fault.at, fault.message)
    }

    #[test]
    fn scalars_follow_the_core_schema() {
        let read = |text: &str| parse(text).unwrap();
        for (text, number) in [
            ("0", Some(0)),
            ("+7", Some(7)),
            ("0x1F", Some(31)),
            ("0o17", Some(15)),
            ("0b11", Some(3)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("-1", None),
            ("007", None),
            ("1_000", None),
            ("0x", None),
            ("0x+1", None),
            ("\"7\"", None),
            ("!!str 7", None),
            ("!!int 7", Some(7)),
        ] {
            assert_eq!(read(text).as_u64(), number, "{text}");
        }
        for (text, number) in [
            ("1.5", Some(1.5)),
            ("-2e3", Some(-2000.0)),
            (".5", Some(0.5)),
            ("3", Some(3.0)),
            ("1e", None),
            ("infinity", None),
            ("00.5", Some(0.5)),
            ("'1.5'", None),
        ] {
            assert_eq!(read(text).as_f64(), number, "{text}");
        }
        for (text, word) in [
            ("yes", Some("yes")),
            ("007", Some("007")),
            ("'true'", Some("true")),
            ("\"\"", Some("")),
            (":4242", Some(":4242")),
            ("true", None),
            ("1e3", None),
            (".nan", None),
            ("~", None),
            // Out of the range of a whole number.
            ("-18446744073709551616", Some("-18446744073709551616")),
        ] {
            assert_eq!(read(text).as_str(), word, "{text}");
        }
        assert_eq!((read("True").as_bool(), read("'true'").as_bool()), (Some(true), None));
        assert!(read("").is_null() && read("null").is_null() && !read("''").is_null());
    }

    #[test]
    fn keys_and_values_know_their_places_in_both_styles() {
        let text = "a: 1\nb:\n  - é: {c: 2, d: [3, 4]}\n    e: |\n      x\nf:\n";
        let root = parse(text).unwrap();
        let mut places = Vec::new();
        fn walk(node: &Node, places: &mut Vec<String>) {
            places.push(node.at.to_string());
            match &node.value {
                Value::Scalar { .. } => {}
                Value::List(items) => items.iter().for_each(|item| walk(item, places)),
                Value::Map(entries) => {
                    for entry in entries {
                        places.push(format!("{} {}", entry.key, entry.at));
                        walk(&entry.value, places);
                    }
                }
            }
        }
        walk(&root, &mut places);
        let expected = "1:1|a 1:1|1:4|b 2:1|3:3|3:5|é 3:5|3:8|c 3:9|3:12|d 3:15|3:18|3:19|3:22|\
                        e 4:5|5:7|f 6:1|6:1";
        assert_eq!(places.join("|"), expected);
    }

    #[test]
    fn aliases_are_copies_within_limits() {
        let root = parse("a: &x [1, 2]\nb: *x\n").unwrap();
        let Value::Map(entries) = &root.value else { panic!("{root}") };
        assert_eq!(entries[0].value.value, entries[1].value.value);
        assert_eq!(entries[1].value.at, Place { line: 2, column: 4 });

        // Each line is twenty times as large as the one before.
        let mut text = "a0: &a0 [x]\n".to_owned();
        for i in 1..9 {
            let items = vec![format!("*a{}", i - 1); 20].join(", ");
            text += &format!("a{i}: &a{i} [{items}]\n");
        }
        assert!(fault(&text).ends_with("the file holds too many values"), "{}", fault(&text));
        // Each line is nested one level deeper than the one before.
        let mut text = "a0: &a0 [x]\n".to_owned();
        for i in 1..10_000 {
            text += &format!("a{i}: &a{i} [*a{}]\n", i - 1);
        }
        assert!(fault(&text).starts_with("32:"), "{}", fault(&text));
        assert!(fault(&text).ends_with("nested too deeply"), "{}", fault(&text));
        assert!(fault(&"[".repeat(10_000)).contains("recursion limit exceeded"));
        assert!(parse("&x [*x]").is_err());
    }

    #[test]
    fn what_a_configuration_cannot_use_is_refused() {
        for (text, expected) in [
            ("a: 1\n---\nb: 2\n", "2:1: a second document begins here; remove it"),
            ("? [a]\n: b\n", "1:3: a key must be one word"),
            ("a: !secret b\n", "1:12: a tag (`!…`) stands before this value; remove it"),
            ("a: *b\n", "1:4: this is not YAML: while parsing node, found unknown anchor"),
            ("a: [1\n", "1:4: this is not YAML: unclosed bracket"),
            ("a: 1\n\tb: 2\n", "1:4: this is not YAML: while scanning a plain scalar, found a tab"),
        ] {
            assert!(fault(text).starts_with(expected), "{text}: {}", fault(text));
        }
    }
}
