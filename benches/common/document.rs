//! Documents that contain the results of a bench between markers.

use std::{fs, io, path::Path};

/// Replaces the text between `<!-- NAME -->` and `<!-- /NAME -->` by `text`.
///
/// # Errors
/// If the document cannot be read or written, or lacks the markers.
pub fn replace_section(document: &Path, name: &str, text: &str) -> io::Result<()> {
    let (begin, end) = (format!("<!-- {name} -->"), format!("<!-- /{name} -->"));
    let old = fs::read_to_string(document)?;
    let missing = || {
        let path = document.display();
        io::Error::other(format!("{path} lacks the markers {begin} and {end}"))
    };
    let (before, rest) = old.split_once(&begin).ok_or_else(missing)?;
    let (_, after) = rest.split_once(&end).ok_or_else(missing)?;
    fs::write(document, format!("{before}{begin}\n{}\n{end}{after}", text.trim_end()))
}
