//! Lists the tags of an FLV file, then its duration and metadata.
//!
//! ```console
//! $ cargo run -p downpour-media --example flv_info -- movie.flv
//! ```

use std::{env, error::Error, fs::File, process::ExitCode};

use downpour_media::{
    amf0::{Decoder, Value},
    flv::{FlvTags, Tag, TagKind},
};

fn main() -> ExitCode {
    let Some(path) = env::args().nth(1) else {
        eprintln!("usage: flv_info FILE.flv");
        return ExitCode::from(2);
    };
    match list(&path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{path}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list(path: &str) -> Result<(), Box<dyn Error>> {
    let mut tags = FlvTags::new(File::open(path)?);
    let (mut first, mut last, mut count) = (None, 0, 0);
    for tag in &mut tags {
        let tag = tag?;
        let kind = format!("{:?}", tag.kind());
        println!("{:>9} ms  {kind:6} {:>8} bytes{}", tag.timestamp(), tag.body().len(), note(&tag));
        if tag.is_metadata() {
            print_metadata(&tag);
        }
        first.get_or_insert(tag.timestamp());
        last = tag.timestamp().max(last);
        count += 1;
    }
    let seconds = f64::from(last - first.unwrap_or(last)) / 1000.0;
    println!("{count} tags, {seconds:.3} s");
    if tags.is_truncated() {
        println!("the file ends inside a tag");
    }
    Ok(())
}

fn note(tag: &Tag) -> &'static str {
    match tag.kind() {
        _ if tag.is_sequence_header() => "  sequence header",
        TagKind::Video if tag.is_key_frame() => "  key frame",
        TagKind::Script if tag.is_metadata() => "  onMetaData",
        _ => "",
    }
}

/// Prints the properties of `onMetaData`: a string, then an object or array.
fn print_metadata(tag: &Tag) {
    let values = Decoder::new(tag.body()).skip(1).flatten();
    for (name, value) in values.flat_map(|value| value.properties().unwrap_or_default().to_vec()) {
        match value {
            Value::Number(number) => println!("{:>14} {name} = {number}", ""),
            Value::String(text) => println!("{:>14} {name} = {text:?}", ""),
            Value::Boolean(flag) => println!("{:>14} {name} = {flag}", ""),
            _ => {}
        }
    }
}
