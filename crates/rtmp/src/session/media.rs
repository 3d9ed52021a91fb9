//! Media and data messages as tags.

use bytes::Buf;

use crate::chunk::{AUDIO, DATA_AMF3, Message, VIDEO};
use downpour_media::{
    amf0,
    flv::{Tag, TagKind},
};

/// An aggregate message (§7.1.6) on its way out as tags.
#[derive(Debug)]
pub struct Aggregate {
    message: Message,
    /// The message's time less the first tag's: tags in it may have a clock of their own.
    offset: Option<u32>,
    /// Parts that became no tag.
    pub ignored: u64,
}

impl Aggregate {
    pub fn new(message: Message) -> Self {
        Self { message, offset: None, ignored: 0 }
    }

    pub fn next_tag(&mut self) -> Option<Tag> {
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
        // What is left is less than a tag.
        self.ignored += u64::from(!self.message.body().is_empty());
        None
    }
}

/// A media or data message as a tag; `None` if there is nothing in it for a viewer.
pub fn into_tag(mut message: Message) -> Option<Tag> {
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

/// Bytes to cut off a data message; `None` if all of it is talk between encoder and server.
fn script_prefix(body: &[u8]) -> Option<usize> {
    match amf0::leading_string(body) {
        Some((b"@setDataFrame", rest)) => Some(body.len() - rest.len()),
        Some((b"@clearDataFrame" | b"|RtmpSampleAccess", _)) => None,
        _ => Some(0),
    }
}
