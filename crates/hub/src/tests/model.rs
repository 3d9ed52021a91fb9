//! What a reader gets from arbitrary streams, beside a list of all tags.

use std::collections::VecDeque;

use proptest::{collection::vec, prelude::*};

use super::*;

proptest! {
    /// Whatever is pushed and however slowly it is read: tags come in order, gaps are reported
    /// exactly and end at a key frame, and a decoder always has the headers in effect.
    #[test]
    fn a_reader_sees_a_decodable_subsequence(
        ops in vec(op(), 1..300),
        max_tags in 4usize..40,
        max_ms in 50u64..4_000,
        start in any::<u32>(),
    ) {
        let limits =
            LogLimits { max_bytes: max_tags * (ENTRY_OVERHEAD + 24), max_age: 3_000 };
        let hub = Hub::new(limits);
        let mut publisher = Some(hub.publish(key()).unwrap());
        let mut slow = Model::new(
            hub.subscribe(&key()).unwrap()
                .with_max_lag(MaxLag { max_ms, ..MaxLag::UNLIMITED }),
        );
        let mut fast = Model::new(hub.subscribe(&key()).unwrap());
        let mut pushed = Vec::new();
        let mut timestamp = start;
        for op in ops {
            match op {
                Op::Push(what, step) => {
                    timestamp = timestamp.wrapping_add(step);
                    let tag = match what {
                        0 => video_header(timestamp, (step % 3) as u8),
                        1 => audio_header(timestamp, (step % 3) as u8),
                        2 => script(timestamp, (step % 3) as u8),
                        3 | 4 => key_frame(timestamp, 0),
                        5..9 => audio(timestamp, 0),
                        _ => inter(timestamp, 0),
                    };
                    pushed.push(tag.clone());
                    if let Some(publisher) = &mut publisher {
                        publisher.push(tag);
                    }
                    fast.read(&pushed, usize::MAX);
                    prop_assert_eq!(fast.skipped, 0);
                }
                Op::Read(bytes) => slow.read(&pushed, bytes),
            }
        }
        drop(publisher.take());
        for model in [&mut slow, &mut fast] {
            model.read(&pushed, usize::MAX);
            prop_assert_eq!(model.reader.try_read(&mut Vec::new(), 1), ReadOutcome::Ended);
            prop_assert_eq!(model.reader.progress.cursor as usize, pushed.len());
            if !model.lost {
                model.read(&pushed, 1);
            }
        }
    }
}

/// Follows a reader in the list of all tags that were pushed.
struct Model {
    reader: Reader,
    next: Option<usize>,
    key_frame_seen: bool,
    given: Headers,
    skipped: u64,
    /// Timestamp of the first frame that was left out for want of a key frame.
    waiting_since: Option<u32>,
    /// Lost its place and found none until the end.
    lost: bool,
}

impl Model {
    fn new(reader: Reader) -> Self {
        Self {
            reader,
            next: None,
            key_frame_seen: false,
            given: Headers::default(),
            skipped: 0,
            waiting_since: None,
            lost: false,
        }
    }

    fn read(&mut self, pushed: &[Tag], max_bytes: usize) {
        // Frames that nothing can decode may have followed the last tag that was given.
        let cursor = self.reader.progress.cursor as usize;
        if let Some(next) = &mut self.next {
            for tag in &pushed[*next..cursor] {
                assert!(!self.key_frame_seen && is_frame(tag));
                self.waiting_since.get_or_insert(tag.timestamp());
            }
            *next = cursor;
        }
        let before = self.reader.stream().counters.skipped_tags.load(Ordering::Relaxed);
        let mut out = VecDeque::new();
        let ReadOutcome::Read(count) = self.reader.try_read(&mut out, max_bytes) else {
            let after = self.reader.stream().counters.skipped_tags.load(Ordering::Relaxed);
            self.lost |= after > before;
            return;
        };
        assert_eq!(count.tags, out.len());
        assert_eq!(count.bytes, out.iter().map(|tag| tag.framed().len()).sum::<usize>());
        self.skipped += count.skipped;
        if self.next.is_none() || count.skipped > 0 {
            while out.front().is_some_and(is_header) {
                self.given.learn(&out.pop_front().unwrap());
            }
            let copied = |tag: &Tag| !pushed.iter().any(|pushed| same(pushed, tag));
            let still = match out.front().is_some_and(|tag| tag.is_key_frame() && copied(tag)) {
                true => out.pop_front(),
                false => None,
            };
            let resume = out.front().expect("headers never come alone");
            // Only in the absence of key frames may it be another one.
            self.key_frame_seen = resume.kind() == TagKind::Video || still.is_some();
            self.waiting_since = None;
            let index = pushed.iter().rposition(|tag| same(tag, resume)).unwrap();
            if let Some(next) = self.next {
                assert_eq!(index as u64, next as u64 + count.skipped);
            }
            if let Some(still) = still {
                let shown = pushed[..index].iter().rfind(|tag| is_frame(tag)).unwrap();
                assert_eq!((still.body(), still.timestamp()), (shown.body(), resume.timestamp()));
            }
            let held = &pushed[pushed.len() - self.reader.stream().held().0..];
            assert!(
                resume.is_key_frame()
                    || pushed[..index].iter().all(|tag| tag.kind() != TagKind::Video)
                    || video_is_long_ago(&pushed[..=index])
                    || !held.iter().any(Tag::is_key_frame)
            );
            self.next = Some(index);
        }
        let mut next = self.next.unwrap();
        for tag in out {
            while !same(&pushed[next], &tag) {
                assert!(!self.key_frame_seen, "{tag:?} where {:?} was due", pushed[next]);
                assert!(is_frame(&pushed[next]));
                self.waiting_since.get_or_insert(pushed[next].timestamp());
                next += 1;
            }
            if is_frame(&tag) && !self.key_frame_seen {
                let waited =
                    self.waiting_since.map_or(0, |since| tag.timestamp().wrapping_sub(since));
                assert!(tag.is_key_frame() || u64::from(waited) >= ANY_FRAME_AFTER_MS);
                self.key_frame_seen = true;
            }
            if is_header(&tag) {
                self.given.learn(&tag);
            } else {
                let mut due = Headers::default();
                pushed[..next].iter().for_each(|tag| {
                    due.learn(tag);
                });
                assert_eq!(self.given.at(0), due.at(0));
            }
            next += 1;
        }
        self.next = Some(next);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Push(u8, u32),
    Read(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u8..16, 0u32..200).prop_map(|(what, step)| Op::Push(what, step)),
        1 => (1usize..400).prop_map(Op::Read),
    ]
}

/// The same tag, not an equal one: the log shares memory with what was pushed.
fn same(a: &Tag, b: &Tag) -> bool {
    a.framed().as_ptr() == b.framed().as_ptr()
}

fn is_header(tag: &Tag) -> bool {
    tag.is_header()
}

/// A frame of video.
fn is_frame(tag: &Tag) -> bool {
    tag.kind() == TagKind::Video && !is_header(tag)
}

fn video_is_long_ago(tags: &[Tag]) -> bool {
    let at = tags.last().map_or(0, Tag::timestamp);
    tags.iter()
        .rfind(|tag| tag.kind() == TagKind::Video)
        .is_some_and(|tag| u64::from(at.wrapping_sub(tag.timestamp())) > AUDIO_ONLY_AFTER_MS)
}
