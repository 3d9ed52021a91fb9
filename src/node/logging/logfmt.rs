//! Fields of a log line as `key=value`, quoted so that a logfmt parser reads them.

use std::fmt::{self, Debug, Write};

use tracing::field::{Field, Visit};
use tracing_subscriber::{
    field::RecordFields,
    fmt::{FormatFields, format::Writer},
};

use super::repeats;

/// Writes the message and then the fields.
pub(super) struct Logfmt;

impl<'writer> FormatFields<'writer> for Logfmt {
    fn format_fields<R: RecordFields>(&self, writer: Writer<'writer>, fields: R) -> fmt::Result {
        let mut visitor = Fields { writer, first: true, result: Ok(()) };
        fields.record(&mut visitor);
        let left_out = repeats::left_out();
        if left_out > 0 {
            visitor.add("left_out", &left_out.to_string(), false);
        }
        visitor.result
    }
}

struct Fields<'writer> {
    writer: Writer<'writer>,
    first: bool,
    result: fmt::Result,
}

impl Fields<'_> {
    fn add(&mut self, name: &str, value: &str, always_quoted: bool) {
        let space = if std::mem::take(&mut self.first) { "" } else { " " };
        let wrote = write!(self.writer, "{space}").and_then(|()| match name {
            "message" => write_escaped(&mut self.writer, value, false),
            _ if always_quoted || needs_quotes(value) => {
                write!(self.writer, "{name}=\"")?;
                write_escaped(&mut self.writer, value, true)?;
                self.writer.write_char('"')
            }
            _ => write!(self.writer, "{name}={value}"),
        });
        self.result = self.result.and(wrote);
    }
}

impl Visit for Fields<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value, true);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field.name(), &format!("{value:?}"), false);
    }
}

/// `true` if a value without quotes would not be read back as one value.
fn needs_quotes(value: &str) -> bool {
    value.is_empty() || value.contains([' ', '"', '=', '\\']) || value.contains(char::is_control)
}

/// Control characters are escaped: names come from the network, and must not fake a line or colour a
/// terminal.
fn write_escaped(out: &mut impl Write, text: &str, in_quotes: bool) -> fmt::Result {
    for c in text.chars() {
        match c {
            '"' | '\\' if in_quotes => write!(out, "\\{c}")?,
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => {
                write!(out, "{}", c.escape_default())?;
            }
            c => out.write_char(c)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_are_not_one_word_are_quoted() {
        for (value, quoted) in [
            ("live/movie", false),
            ("[::1]:80", false),
            ("é", false),
            ("", true),
            ("the client left", true),
            ("a=b", true),
            ("a\"b", true),
            ("a\nb", true),
        ] {
            assert_eq!(needs_quotes(value), quoted, "{value:?}");
        }
    }

    #[test]
    fn control_characters_are_escaped() {
        let mut out = String::new();
        write_escaped(&mut out, "a\"b\\c\nd\u{1b}[31m", true).unwrap();
        assert_eq!(out, "a\\\"b\\\\c\\nd\\u{1b}[31m");
    }
}
