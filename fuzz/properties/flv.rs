//! FLV files and live bodies.

use downpour_media::flv::{FlvError, FlvReader, FlvTags, FlvWriter, Tag};

use super::{memory, pieces};

/// The tags do not depend on the split of the input, the file reader yields the same tags, and a file
/// written from them contains them again. Memory is proportional to the input.
pub fn check(data: &[u8]) {
    let (whole, held) = memory::peak(|| read([data]));
    assert!(held <= 8 * data.len() + (16 << 10), "{held} bytes held for {}", data.len());
    assert_eq!(read(pieces(data)), whole);

    let (tags, error, inside) = whole;
    let mut file = FlvTags::new(data);
    let from_file: Vec<_> = file.by_ref().collect();
    let good: Vec<&Tag> = from_file.iter().filter_map(|tag| tag.as_ref().ok()).collect();
    assert_eq!(good, tags.iter().collect::<Vec<_>>());
    assert_eq!(from_file.iter().filter(|tag| tag.is_err()).count(), usize::from(error.is_some()));
    assert!(error.is_some() || file.is_truncated() == inside);

    let mut writer = FlvWriter::new(Vec::new()).expect("writing to memory");
    for tag in &tags {
        check_tag(tag);
        writer.write(tag).expect("writing to memory");
    }
    let again = read([&writer.into_inner()[..]]);
    assert_eq!(again, (tags, None, false));
}

/// Checks the invariants of any tag.
pub fn check_tag(tag: &Tag) {
    let same = Tag::new(tag.kind(), tag.timestamp(), tag.body()).expect("the same length");
    assert_eq!(same.framed(), tag.framed());
    let same = Tag::from_unit(tag.unit().into()).expect("the unit of a tag is valid");
    assert_eq!(&same, tag);
    let later = tag.with_timestamp(tag.timestamp().wrapping_add(1 << 24));
    assert_eq!((later.kind(), later.body()), (tag.kind(), tag.body()));
    assert!(later.timestamp() != tag.timestamp());
    assert!(!(tag.is_key_frame() && tag.is_sequence_header()));
}

fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Tag>, Option<FlvError>, bool) {
    let (mut reader, mut tags) = (FlvReader::new(), Vec::new());
    for piece in pieces {
        reader.push(piece);
        loop {
            match reader.next_tag() {
                Ok(Some(tag)) => tags.push(tag),
                Ok(None) => break,
                Err(error) => {
                    assert_eq!(reader.next_tag(), Err(error.clone()), "the first error is final");
                    return (tags, Some(error), true);
                }
            }
        }
    }
    (tags, None, reader.is_inside_tag())
}
