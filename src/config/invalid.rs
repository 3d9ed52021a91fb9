//! What is wrong with a value, and how errors show values and keys.

use std::fmt;

use super::tree::{Node, Place, Value, is_text};

/// What is wrong, where, and in which part of the value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invalid {
    /// Where the fault begins.
    pub at: Place,
    /// The way from the key to the part at fault, such as `[1].addr`; "" for the value itself.
    pub path: String,
    /// The fault and the remedy.
    pub message: String,
}

impl Invalid {
    /// A fault of the value itself.
    pub fn new(at: Place, message: impl Into<String>) -> Self {
        Self { at, path: String::new(), message: message.into() }
    }

    /// The value is not valid; `usable` describes valid values, such as `true or false`.
    pub fn value(node: &Node, usable: impl fmt::Display) -> Self {
        let problem =
            if node.is_null() { "has no value".into() } else { format!("{node} is not valid") };
        Self::new(node.at, format!("{problem}; use {usable}"))
    }

    /// The same fault, seen from the value around it.
    pub fn within(mut self, step: impl fmt::Display) -> Self {
        self.path = format!("{step}{}", self.path);
        self
    }
}

/// Shows a value in an error: in flow style on one line, cut when long, control characters escaped.
impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = String::new();
        show(self, &mut shown);
        f.write_str(&cut(&shown))
    }
}

fn show(node: &Node, out: &mut String) {
    match &node.value {
        // The rest is cut off.
        _ if out.len() > 4 * SHOWN_MAX => {}
        Value::Scalar { .. } if node.is_null() => *out += "nothing",
        Value::Scalar { text, plain: true } if !is_text(text) => *out += text,
        Value::Scalar { text, .. } => {
            let start: String = text.chars().take(SHOWN_MAX + 1).collect();
            *out += &format!("{start:?}");
        }
        Value::List(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                *out += if index == 0 { "" } else { ", " };
                show(item, out);
            }
            out.push(']');
        }
        Value::Map(entries) => {
            out.push('{');
            for (index, entry) in entries.iter().enumerate() {
                *out += if index == 0 { "" } else { ", " };
                *out += &format!("{}: ", shown_key(&entry.key));
                show(&entry.value, out);
            }
            out.push('}');
        }
    }
}

/// A key in an error: on one line, cut when long, control characters escaped.
pub(super) fn shown_key(key: &str) -> String {
    let start: String = key.chars().take(SHOWN_MAX + 1).collect();
    cut(&start.escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'"))
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into(),
    }
}

/// Characters of a value that an error shows.
const SHOWN_MAX: usize = 80;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tree::parse;

    #[test]
    fn long_and_odd_values_are_shown_on_one_short_line() {
        let shown = |text: &str| parse(text).unwrap().to_string();
        let long = format!("[{}]", "\"x\\n\", ".repeat(1000));
        assert_eq!(shown(&long).chars().count(), SHOWN_MAX + 1);
        assert!(!shown(&long).contains('\n'));
        assert_eq!(
            shown("{a: [1, b, ~], \"c\\td\": 'e'}"),
            "{a: [1, \"b\", nothing], c\\td: \"e\"}"
        );
        assert_eq!(shown_key(&"k".repeat(100)).chars().count(), SHOWN_MAX + 1);
    }
}
