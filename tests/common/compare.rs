//! Compares pushed and pulled tags.

use std::{fs::File, path::Path};

use downpour_media::flv::{FlvTags, Tag, TagKind};

/// Reads all tags of a file, which must not end inside a tag.
#[track_caller]
pub fn read_flv(path: &Path) -> Vec<Tag> {
    let (tags, truncated) = read_flv_prefix(path);
    assert!(!truncated, "{} ends inside a tag", path.display());
    tags
}

/// Reads the whole tags of a file. Also returns whether it ends inside a tag.
#[track_caller]
pub fn read_flv_prefix(path: &Path) -> (Vec<Tag>, bool) {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut reader = FlvTags::new(file);
    let tags: Vec<_> = reader
        .by_ref()
        .map(|tag| tag.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
        .collect();
    (tags, reader.is_truncated())
}

/// How timestamps must match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timestamps {
    /// They are the same.
    Exact,
    /// They differ by one constant.
    Rebased,
}

/// Asserts that `pulled` is codec headers and then every audio and video tag of `pushed`, byte for
/// byte and in order, from a key frame (without video: from an audio tag) to the end.
///
/// Returns the index in `pushed`, without script tags, at which `pulled` begins.
#[track_caller]
pub fn assert_same_to_the_end(pushed: &[Tag], pulled: &[Tag], timestamps: Timestamps) -> usize {
    let joined = Joined::new(pushed, pulled);
    let from = joined.find(timestamps);
    let (pushed, pulled) = (&joined.pushed[from..], joined.body());
    if let Some(at) = first_difference(pushed, pulled, timestamps) {
        panic!(
            "tag {at} after the first key frame differs ({} pushed, {} pulled):\n{}",
            pushed.len(),
            pulled.len(),
            excerpt(pushed, pulled, at)
        );
    }
    joined.assert_headers(from);
    from
}

/// Asserts the same of a viewer that left, or whose node died, before the end.
#[track_caller]
pub fn assert_same_while_it_lasted(pushed: &[Tag], pulled: &[Tag], timestamps: Timestamps) {
    let joined = Joined::new(pushed, pulled);
    let from = joined.find(timestamps);
    let pushed = &joined.pushed[from..];
    let pulled = joined.body();
    assert!(pulled.len() <= pushed.len(), "more tags pulled than pushed");
    if let Some(at) = first_difference(&pushed[..pulled.len()], pulled, timestamps) {
        panic!("tag {at} after the first key frame differs:\n{}", excerpt(pushed, pulled, at));
    }
    joined.assert_headers(from);
}

/// Asserts that `pulled` is headers and then tags of `pushed` in order, with gaps. Returns the length
/// of each gap in tags.
#[track_caller]
pub fn assert_same_with_gaps(pushed: &[Tag], pulled: &[Tag]) -> Vec<usize> {
    let joined = Joined::new(pushed, pulled);
    let mut next = joined.find(Timestamps::Exact);
    let mut gaps = Vec::new();
    for tag in joined.body() {
        let skipped = joined.pushed[next..].iter().position(|pushed| pushed == tag);
        let skipped = skipped.unwrap_or_else(|| panic!("{tag:?} is out of order or damaged"));
        if skipped > 0 {
            gaps.push(skipped);
        }
        next += skipped + 1;
    }
    gaps
}

/// Pushed tags and one viewer's pulled tags, without script tags.
struct Joined {
    pushed: Vec<Tag>,
    pulled: Vec<Tag>,
    /// Index in `pulled` of the first tag that is not a codec header.
    start: usize,
}

impl Joined {
    #[track_caller]
    fn new(pushed: &[Tag], pulled: &[Tag]) -> Self {
        let (pushed, pulled) = (media(pushed), media(pulled));
        let start = pulled.iter().position(|tag| !tag.is_sequence_header());
        let start = start.unwrap_or_else(|| panic!("no frame in {} tags", pulled.len()));
        let has_video = pushed.iter().any(|tag| tag.kind() == TagKind::Video);
        let first = &pulled[start];
        assert!(!has_video || first.is_key_frame(), "it begins with {first:?}, not a key frame");
        Self { pushed, pulled, start }
    }

    fn body(&self) -> &[Tag] {
        &self.pulled[self.start..]
    }

    /// Returns the index in `pushed` of the first frame of `pulled`. Bodies may repeat (silence), so
    /// this is the index with the longest match.
    #[track_caller]
    fn find(&self, timestamps: Timestamps) -> usize {
        let body = self.body();
        (0..self.pushed.len())
            .filter(|at| same(&self.pushed[*at], &body[0], timestamps, 0))
            .max_by_key(|at| {
                first_difference(&self.pushed[*at..], body, timestamps).unwrap_or(usize::MAX)
            })
            .unwrap_or_else(|| {
                panic!(
                    "the first frame, {:?}, was never pushed; pushed were\n{:#?}",
                    body[0],
                    &self.pushed[..self.pushed.len().min(10)]
                )
            })
    }

    /// Asserts that the leading headers are those in effect at `from`, each once.
    #[track_caller]
    fn assert_headers(&self, from: usize) {
        for kind in [TagKind::Video, TagKind::Audio] {
            let of_kind = |tag: &&Tag| tag.kind() == kind && tag.is_sequence_header();
            let pulled: Vec<_> = self.pulled[..self.start].iter().filter(of_kind).collect();
            let pushed = self.pushed[..from].iter().rev().find(of_kind);
            assert!(pulled.len() <= 1, "{} leading {kind:?} headers", pulled.len());
            assert_eq!(
                pulled.first().map(|tag| tag.body()),
                pushed.map(|tag| tag.body()),
                "the leading {kind:?} header"
            );
        }
    }
}

/// Asserts that `received` has the video and the audio bodies of `sent`, each kind in order. An encoder
/// may change the interleaving and the timestamps of a file. Audio from before the first key frame may
/// be missing, because a recording starts there. End-of-sequence tags are ignored, because encoders add
/// and drop them.
#[track_caller]
pub fn assert_same_bodies(sent: &[Tag], received: &[Tag]) {
    let of_kind = |tags: &[Tag], kind: TagKind| -> Vec<Tag> {
        let of_kind = |tag: &&Tag| tag.kind() == kind && !is_end_of_sequence(tag);
        tags.iter().filter(of_kind).cloned().collect()
    };
    let first_key_frame = sent.iter().find(|tag| tag.is_key_frame()).map(Tag::timestamp);
    for kind in [TagKind::Video, TagKind::Audio] {
        let (mut sent, mut received) = (of_kind(sent, kind), of_kind(received, kind));
        if kind == TagKind::Audio && !sent.is_empty() {
            assert_eq!(sent.remove(0).body(), received.remove(0).body(), "the audio header");
            let missing = sent.len().saturating_sub(received.len());
            let early = sent.iter().filter(|tag| Some(tag.timestamp()) <= first_key_frame).count();
            assert!(missing <= early, "{missing} audio tags are missing");
            sent.drain(..missing);
        }
        let differs = (0..sent.len().max(received.len()))
            .find(|at| sent.get(*at).map(Tag::body) != received.get(*at).map(Tag::body));
        assert_eq!(differs, None, "{kind:?} body differs");
    }
}

/// Returns the body of the first script tag.
pub fn metadata(tags: &[Tag]) -> Option<&[u8]> {
    tags.iter().find(|tag| tag.kind() == TagKind::Script).map(Tag::body)
}

/// Returns the audio and video tags.
pub fn media(tags: &[Tag]) -> Vec<Tag> {
    tags.iter().filter(|tag| tag.kind() != TagKind::Script).cloned().collect()
}

/// AVC "end of sequence" (FLV 10.1 §E.4.3.1, `AVCPacketType` 2).
fn is_end_of_sequence(tag: &Tag) -> bool {
    tag.kind() == TagKind::Video && tag.body().starts_with(&[0x17, 2])
}

fn first_difference(pushed: &[Tag], pulled: &[Tag], timestamps: Timestamps) -> Option<usize> {
    let offset = match (pushed.first(), pulled.first()) {
        (Some(pushed), Some(pulled)) => pulled.timestamp().wrapping_sub(pushed.timestamp()),
        _ => 0,
    };
    let longest = pushed.len().max(pulled.len());
    (0..longest).find(|at| match (pushed.get(*at), pulled.get(*at)) {
        (Some(pushed), Some(pulled)) => {
            let offset = if timestamps == Timestamps::Exact { 0 } else { offset };
            !same(pushed, pulled, Timestamps::Exact, offset)
        }
        _ => true,
    })
}

fn same(pushed: &Tag, pulled: &Tag, timestamps: Timestamps, offset: u32) -> bool {
    pushed.kind() == pulled.kind()
        && pushed.body() == pulled.body()
        && (timestamps == Timestamps::Rebased
            || pushed.timestamp().wrapping_add(offset) == pulled.timestamp())
}

fn excerpt(pushed: &[Tag], pulled: &[Tag], at: usize) -> String {
    let around = at.saturating_sub(3)..at + 6;
    let line = |tags: &[Tag], at: usize| match tags.get(at) {
        Some(tag) => format!("{tag:?}"),
        None => "-".to_owned(),
    };
    around.map(|at| format!("{at:6}  {:28} {}\n", line(pushed, at), line(pulled, at))).collect()
}
