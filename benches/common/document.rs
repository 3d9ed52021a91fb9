//! Documents that hold what a bench came to, between markers.

use std::{fs, io, path::Path};

/// Puts `text` between `<!-- NAME -->` and `<!-- /NAME -->` in place of what stands there.
///
/// # Errors
/// If the document cannot be read or written, or has lost its markers.
pub fn put(document: &Path, name: &str, text: &str) -> io::Result<()> {
    let (begin, end) = (format!("<!-- {name} -->"), format!("<!-- /{name} -->"));
    let old = fs::read_to_string(document)?;
    let missing = || {
        let path = document.display();
        io::Error::other(format!("{path} lost the markers {begin} and {end}"))
    };
    let (before, rest) = old.split_once(&begin).ok_or_else(missing)?;
    let (_, after) = rest.split_once(&end).ok_or_else(missing)?;
    fs::write(document, format!("{before}{begin}\n{}\n{end}{after}", text.trim_end()))
}
