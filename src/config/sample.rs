//! The sample files and the tables of `docs/configuration.md`.

use super::schema::{Key, Reload, Settings};

/// Returns a file with the values of `settings` and the description of every key.
pub(super) fn sample<T: Settings>(settings: &T) -> String {
    let mut text = format!(
        "{FIRST_LINE}\n\
         # The {} node's settings, each at its default; docs/configuration.md says more.\n\
         # A change takes effect after a restart, except for keys that are marked (live).\n",
        T::ROLE
    );
    for section in settings.sections() {
        text += &format!("\n# {}\n{}:\n", section.about, section.name);
        for key in section.keys {
            let live = if key.spec.reload == Reload::Live { " (live)" } else { "" };
            text += &format!("  # {}{live}\n  {}: {}\n", meaning(&key), key.spec.name, key.value);
        }
    }
    text + "\n" + LAST_LINE + "\n"
}

/// `true` if the text begins as a sample does and does not end as one: it was cut off.
pub(super) fn is_cut_off(text: &str) -> bool {
    let is_sample = text.lines().next().is_some_and(|line| line.trim_end() == FIRST_LINE);
    is_sample && text.trim_end().lines().next_back() != Some(LAST_LINE)
}

/// The mark that a file is a sample, perhaps edited.
const FIRST_LINE: &str =
    "# If the last line of this file is missing, it was cut off and is not read.";
/// The mark that it is whole.
pub(super) const LAST_LINE: &str = "# The end of the settings.";

/// The meaning and, for a number, its range.
fn meaning(key: &Key) -> String {
    let range = key.range.as_ref().map(|range| format!(" Range: {range}."));
    format!("{}{}", key.spec.meaning, range.unwrap_or_default())
}

/// Returns a document with the role's tables between the lines `<!-- cloud settings -->` (or
/// `edge`) and `<!-- end -->`.
#[cfg(test)]
pub(super) fn with_table<T: Settings>(document: &str) -> String {
    let begin = format!("<!-- {} settings -->\n", T::ROLE);
    let (before, rest) = document.split_once(&begin).expect("the document has the role's marker");
    let (_, after) = rest.split_once("<!-- end -->").expect("the marker has its end");
    let mut table = String::new();
    for section in T::default().sections() {
        table += &format!(
            "\n### {} `{}`\n\n{}\n\n\
             | key | default | change | flat name | meaning |\n|---|---|---|---|---|\n",
            T::ROLE,
            section.name,
            section.about
        );
        for key in section.keys {
            let path = key.spec.path();
            let names: Vec<_> = key.spec.aliases.iter().map(|name| format!("`{name}`")).collect();
            let (names, meaning) = (names.join(", "), meaning(&key).replace('|', "\\|"));
            let reload = key.spec.reload;
            table += &format!("| `{path}` | `{}` | {reload} | {names} | {meaning} |\n", key.value);
            for field in key.fields {
                let default = if field.optional { "may be left out" } else { "required" };
                table += &format!(
                    "| `{path}[].{}` | {default} | {reload} | | {} |\n",
                    field.name,
                    field.meaning.replace('|', "\\|")
                );
            }
        }
    }
    format!("{before}{begin}{table}\n<!-- end -->{after}")
}
