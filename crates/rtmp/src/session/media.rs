//! Media and data messages to tags.

use bytes::Buf;

use crate::chunk::{AUDIO, DATA_AMF3, Message, VIDEO};
use downpour_media::{
    amf0,
    flv::{Tag, TagKind},
};

/// An aggregate message (§7.1.6), split into tags one by one.
#[derive(Debug)]
pub(super) struct Aggregate {
    message: Message,
    /// Timestamp of the message minus that of its first tag: the tags may use another clock.
    offset: Option<u32>,
    /// Parts that could not be converted into tags.
    pub ignored: u64,
}

impl Aggregate {
    /// An aggregate at its first tag.
    pub(super) fn new(message: Message) -> Self {
        Self { message, offset: None, ignored: 0 }
    }

    /// Returns the next tag, or `None` at the end of the message.
    pub(super) fn next_tag(&mut self) -> Option<Tag> {
        while let Some((&head, rest)) =
            self.message.body().split_first_chunk::<{ Tag::HEADER_LEN }>()
        {
            let [kind, s0, s1, s2, t0, t1, t2, t3, ..] = head;
            let len = u32::from_be_bytes([0, s0, s1, s2]) as usize;
            let time = u32::from_be_bytes([t3, t0, t1, t2]);
            let Some(mut body) = rest.get(..len) else { break };
            let offset =
                *self.offset.get_or_insert_with(|| self.message.timestamp.wrapping_sub(time));
            let kind = TagKind::from_type(kind);
            if kind == Some(TagKind::Script) {
                body.advance(script_prefix(body).unwrap_or(len));
            }
            let tag = match kind {
                Some(kind) if !body.is_empty() => {
                    Tag::new(kind, time.wrapping_add(offset), body).ok()
                }
                _ => None,
            };
            self.message.skip(Tag::HEADER_LEN + len + Tag::TRAILER_LEN);
            match tag {
                Some(_) => return tag,
                None => self.ignored += 1,
            }
        }
        // A rest shorter than a tag.
        self.ignored += u64::from(!self.message.body().is_empty());
        None
    }
}

/// Converts a media or data message into a tag. Returns `None` if it has no content for viewers.
pub(super) fn into_tag(mut message: Message) -> Option<Tag> {
    let kind = match message.kind {
        AUDIO => TagKind::Audio,
        VIDEO => TagKind::Video,
        _ => TagKind::Script,
    };
    if kind == TagKind::Script {
        if message.kind == DATA_AMF3 && message.body().first() == Some(&0) {
            message.skip(1);
        }
        message.skip(script_prefix(message.body())?);
    }
    if message.body().is_empty() {
        return None;
    }
    message.into_tag(kind).ok()
}

/// Returns the length of the prefix to remove from a data message, or `None` if the whole message
/// is addressed to the server.
fn script_prefix(body: &[u8]) -> Option<usize> {
    match amf0::leading_string(body) {
        Some((b"@setDataFrame", rest)) => Some(body.len() - rest.len()),
        Some((b"@clearDataFrame" | b"|RtmpSampleAccess", _)) => None,
        _ => Some(0),
    }
}
