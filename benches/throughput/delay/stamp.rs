//! The stamp in a tag's body.

use downpour_media::flv::TagKind;

/// The number of a tag and the time of its write to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// From 0, per stream and kind of tag.
    pub number: u64,
    /// Nanoseconds of the monotonic clock.
    pub sent: u64,
}

/// Returns a body of at least `len` bytes: the header of an H.264 or AAC frame, then the stamp.
pub fn body(kind: TagKind, key: bool, len: usize, stamp: Stamp) -> Vec<u8> {
    let mut body = vec![0; len.max(HEAD + 16)];
    let head = match (kind, key) {
        (TagKind::Video, true) => [0x17, 1, 0, 0, 0],
        (TagKind::Video, false) => [0x27, 1, 0, 0, 0],
        _ => [0xaf, 1, 0, 0, 0],
    };
    body[..HEAD].copy_from_slice(&head);
    body[HEAD..HEAD + 8].copy_from_slice(&stamp.number.to_be_bytes());
    body[HEAD + 8..HEAD + 16].copy_from_slice(&stamp.sent.to_be_bytes());
    body
}

/// Reads the kind and the stamp of a frame; `None` for a sequence header.
pub fn read(body: &[u8]) -> Option<(TagKind, Stamp)> {
    let kind = match body.get(..2)? {
        [0x17 | 0x27, 1] => TagKind::Video,
        [0xaf, 1] => TagKind::Audio,
        _ => return None,
    };
    let number = body.get(HEAD..)?.first_chunk().copied().map(u64::from_be_bytes)?;
    let sent = body.get(HEAD + 8..)?.first_chunk().copied().map(u64::from_be_bytes)?;
    Some((kind, Stamp { number, sent }))
}

const HEAD: usize = 5;
