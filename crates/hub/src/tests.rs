mod model;

use std::{sync::atomic::Ordering, time::Duration};

use super::{
    log::{ANY_FRAME_AFTER_MS, AUDIO_ONLY_AFTER_MS, ENTRY_OVERHEAD},
    *,
};
use downpour_media::flv::{Tag, TagKind, Tracks};

#[test]
fn a_reader_starts_at_the_newest_gop_with_the_headers_in_effect_there() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    for tag in [
        script(0, 1),
        video_header(0, 1),
        audio_header(0, 1),
        key_frame(0, 1),
        inter(40, 2),
        video_header(80, 2),
        key_frame(80, 3),
        audio(90, 4),
        video_header(120, 3),
        inter(120, 5),
    ] {
        publisher.push(tag);
    }
    let mut reader = hub.subscribe("live/movie").unwrap();
    assert_eq!(
        drain(&mut reader),
        [
            script(80, 1),
            video_header(80, 2),
            audio_header(80, 1),
            key_frame(80, 3),
            audio(90, 4),
            video_header(120, 3),
            inter(120, 5),
        ]
    );
    assert_eq!(reader.try_read(&mut Vec::new(), 1), ReadOutcome::Pending);
}

#[test]
fn video_without_a_key_frame_is_waited_for() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    let mut early = hub.subscribe(&key()).unwrap();
    publisher.set_headers(headers([video_header(0, 1), audio_header(0, 1)]));
    publisher.push(audio(0, 1));
    publisher.push(inter(5, 2));
    assert_eq!(early.try_read(&mut Vec::new(), 1), ReadOutcome::Pending);
    publisher.push(key_frame(10, 3));
    let expected = [video_header(10, 1), audio_header(10, 1), key_frame(10, 3)];
    assert_eq!(drain(&mut early), expected);
    assert_eq!(drain(&mut hub.subscribe(&key()).unwrap()), expected);
}

#[test]
fn a_stream_without_video_is_joined_a_little_back() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(audio_header(0, 1));
    for i in 0..100 {
        publisher.push(audio(i * 23, i as u8));
    }
    let tags = drain(&mut hub.subscribe(&key()).unwrap());
    assert_eq!(tags[0], audio_header(tags[1].timestamp(), 1));
    assert!((1..=500).contains(&(99 * 23 - tags[1].timestamp())), "{tags:?}");
    assert_eq!(tags.last(), Some(&audio(99 * 23, 99)));
}

#[test]
fn a_reader_that_began_with_audio_gets_no_frames_before_a_key_frame() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    let mut reader = hub.subscribe(&key()).unwrap();
    publisher.push(audio(0, 1));
    assert_eq!(drain(&mut reader), [audio(0, 1)]);
    publisher.push(inter(10, 2));
    publisher.push(video_header(20, 1));
    publisher.push(inter(30, 3));
    publisher.push(key_frame(40, 4));
    publisher.push(inter(50, 5));
    assert_eq!(drain(&mut reader), [video_header(20, 1), key_frame(40, 4), inter(50, 5)]);
}

#[test]
fn a_reader_over_its_backlog_skips_to_the_newest_key_frame_and_is_counted() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(video_header(0, 1));
    publisher.push(key_frame(0, 0));
    let limit = MaxLag { max_ms: 100, ..MaxLag::UNLIMITED };
    let mut reader = hub.subscribe(&key()).unwrap().with_max_lag(limit);
    assert_eq!(drain(&mut reader).len(), 2);
    for i in 1..=4 {
        publisher.push(inter(i * 40, i as u8));
    }
    // Over the limit, but there is no key frame ahead to skip to.
    assert!(matches!(
        reader.try_read(&mut Vec::new(), 1),
        ReadOutcome::Read(ReadCount { tags: 1, skipped: 0, .. })
    ));
    publisher.push(key_frame(200, 9));
    let mut out = Vec::new();
    let outcome = reader.try_read(&mut out, usize::MAX);
    assert!(matches!(outcome, ReadOutcome::Read(ReadCount { skipped: 3, tags: 1, .. })));
    assert_eq!(out, [key_frame(200, 9)]);
    assert_eq!(publisher.stream().counters().skipped_tags.load(Ordering::Relaxed), 3);
}

#[test]
fn a_gop_longer_than_the_log_leaves_readers_waiting_for_the_next_key_frame() {
    let hub = Hub::new(LogLimits { max_bytes: 10 * (ENTRY_OVERHEAD + 22), max_age: 60_000 });
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(key_frame(0, 0));
    let (mut fast, mut slow) = (hub.subscribe(&key()).unwrap(), hub.subscribe(&key()).unwrap());
    drain(&mut fast);
    drain(&mut slow);
    for i in 1..=50 {
        publisher.push(inter(i * 40, i as u8));
        assert_eq!(drain(&mut fast), [inter(i * 40, i as u8)]);
    }
    let (tags, bytes) = publisher.stream().held();
    assert!(tags <= 10 && bytes <= 10 * (ENTRY_OVERHEAD + 22));
    let mut late = hub.subscribe(&key()).unwrap();
    assert_eq!(drain(&mut late), []);
    assert_eq!(drain(&mut slow), []);
    publisher.push(key_frame(3000, 51));
    for reader in [&mut fast, &mut slow, &mut late] {
        assert_eq!(drain(reader), [key_frame(3000, 51)]);
    }
    assert_eq!(publisher.stream().counters().skipped_tags.load(Ordering::Relaxed), 50);
}

#[test]
fn a_stream_keeps_its_newest_gop_and_what_slow_readers_have_still_to_read() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    let push_gop = |publisher: &mut Publisher, start: u32| {
        publisher.push(key_frame(start, 0));
        (1..10).for_each(|i| publisher.push(inter(start + 40 * i, 0)));
    };
    push_gop(&mut publisher, 0);
    push_gop(&mut publisher, 400);
    assert_eq!(publisher.stream().held().0, 10);
    let mut slow = publisher.stream().subscribe();
    assert_eq!(
        slow.try_read(&mut Vec::new(), 1),
        ReadOutcome::Read(ReadCount {
            tags: 1,
            bytes: key_frame(400, 0).framed().len(),
            skipped: 0,
        })
    );
    push_gop(&mut publisher, 800);
    assert_eq!(publisher.stream().held().0, 19, "all but the tag that the reader has read");
    let behind = slow.clone();
    // A reader that waits for its first read starts at the newest key frame, and needs nothing before.
    let _joining = publisher.stream().subscribe();
    assert_eq!(drain(&mut slow).len(), 19);
    push_gop(&mut publisher, 1200);
    assert_eq!(publisher.stream().held().0, 29, "the clone has read nothing since");
    drop(behind);
    assert_eq!(drain(&mut slow).len(), 10);
    push_gop(&mut publisher, 1600);
    assert_eq!(publisher.stream().held().0, 10, "the reader keeps up");
    for start in (2000..).step_by(400).take(1000) {
        push_gop(&mut publisher, start);
    }
    assert!(publisher.stream().held().0 > 100, "it has stopped");
    drain(&mut slow);
    push_gop(&mut publisher, 402_000);
    assert_eq!(publisher.stream().held().0, 10);
}

#[test]
fn age_is_media_time_across_the_wrap_and_across_jumps() {
    let hub = Hub::new(LogLimits { max_bytes: usize::MAX, max_age: 1_000 });
    let mut publisher = hub.publish(key()).unwrap();
    // Behind a reader that has stopped.
    let mut stopped = publisher.stream().subscribe();
    let start = u32::MAX - 990;
    for i in 0..100 {
        publisher.push(audio(start.wrapping_add(i * 20), 0));
        if i == 0 {
            assert!(matches!(stopped.try_read(&mut Vec::new(), 1), ReadOutcome::Read(_)));
        }
    }
    // Up to a second, of which a thirty-second part goes at a time.
    let held = publisher.stream().held().0;
    assert!((49..=51).contains(&held), "{held}");
    // An encoder that starts over from 0 and one whose clock jumps forget at most the past.
    publisher.push(audio(0, 1));
    publisher.push(audio(20, 2));
    assert_eq!(publisher.stream().held().0, held + 2);
    publisher.push(audio(4_000_000, 3));
    publisher.push(audio(4_000_020, 4));
    assert_eq!(publisher.stream().held().0, 2);
}

#[test]
fn audio_and_video_hours_apart_keep_their_gop() {
    for apart in [5_000, 3_600_000, 1 << 31] {
        let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 3_000 });
        let mut publisher = hub.publish(key()).unwrap();
        let mut running = hub.subscribe(&key()).unwrap().waking_with_video();
        let (mut wakes, mut read) = (0, Vec::new());
        publisher.push(audio_header(0, 1));
        publisher.push(video_header(apart, 1));
        for i in 0..150 {
            let video = if i % 50 == 0 { key_frame } else { inter };
            publisher.push(video(apart + i * 40, i as u8));
            publisher.push(audio(i * 40 + 10, i as u8));
            wakes += u32::from(running.wake.has_changed().unwrap());
            running.wake.mark_unchanged();
            read.extend(drain(&mut running));
        }
        assert_eq!(wakes, 150);
        assert_eq!(read.len(), 2 + 300);
        let late = drain(&mut hub.subscribe(&key()).unwrap());
        assert_eq!(late.len(), 2 + 100);
        assert!(late[2].is_key_frame());
    }
}

#[test]
fn a_gop_stays_in_the_log_however_long_it_lasts() {
    let hub = Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 1_000 });
    let mut publisher = hub.publish(key()).unwrap();
    let _watched = publisher.stream().subscribe();
    publisher.push(video_header(0, 1));
    publisher.push(key_frame(0, 0));
    for i in 1..1500 {
        publisher.push(inter(i * 40, i as u8));
        publisher.push(audio(i * 40, i as u8));
    }
    let tags = drain(&mut hub.subscribe(&key()).unwrap());
    assert_eq!(tags.len(), 2 + 2 * 1499);
    assert_eq!(tags[1], key_frame(0, 0));
    // The next one makes it superfluous.
    publisher.push(key_frame(60_000, 0));
    assert!(publisher.stream().held().0 <= 51);
}

#[test]
fn without_a_key_frame_in_the_log_audio_comes_at_once_and_video_after_a_time() {
    let hub = Hub::new(LogLimits { max_bytes: 200 * (ENTRY_OVERHEAD + 22), max_age: 60_000 });
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(audio_header(0, 1));
    publisher.push(video_header(0, 1));
    publisher.push(key_frame(0, 0));
    let mut push = |frames: std::ops::Range<u32>| {
        for i in frames {
            publisher.push(inter(i * 40, i as u8));
            publisher.push(audio(i * 40, i as u8));
        }
    };
    push(1..500);
    let mut reader = hub.subscribe(&key()).unwrap();
    let joined = drain(&mut reader);
    assert!(joined[0].is_header() && joined[1].is_header());
    assert!(joined[2..].iter().all(|tag| tag.kind() == TagKind::Audio));
    let back = 499 * 40 - joined[2].timestamp();
    assert!(back <= 520, "starts {back} ms back");
    // Frames come 4 s after the first one that was left out.
    let begins = (joined[2].timestamp() + ANY_FRAME_AFTER_MS as u32) / 40;
    push(500..begins - 1);
    assert!(drain(&mut reader).iter().all(|tag| tag.kind() == TagKind::Audio));
    push(begins - 1..begins + 3);
    let frames = drain(&mut reader).iter().filter(|tag| tag.kind() == TagKind::Video).count();
    assert!((2..=4).contains(&frames), "{frames}");
    push(begins + 3..begins + 5);
    assert_eq!(drain(&mut reader).len(), 4);
}

#[test]
fn a_key_frame_ends_the_wait_of_a_reader_that_began_with_audio() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    publisher.set_headers(headers([video_header(0, 1)]));
    for i in 0..50 {
        publisher.push(inter(i * 40, i as u8));
        publisher.push(audio(i * 40, i as u8));
    }
    let mut reader = hub.subscribe(&key()).unwrap();
    assert!(drain(&mut reader).iter().all(|tag| tag.is_header() || tag.kind() == TagKind::Audio));
    publisher.push(key_frame(2000, 1));
    publisher.push(inter(2040, 2));
    assert_eq!(drain(&mut reader), [key_frame(2000, 1), inter(2040, 2)]);
}

#[test]
fn video_alone_without_key_frames_starts_at_any_frame_after_a_time() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(video_header(0, 1));
    let mut reader = hub.subscribe(&key()).unwrap();
    for i in 0..=100 {
        assert_eq!(drain(&mut reader), [], "{i}");
        publisher.push(inter(i * 40, i as u8));
    }
    assert_eq!(drain(&mut reader), [video_header(4000, 1), inter(4000, 100)]);
    publisher.push(inter(4040, 101));
    assert_eq!(drain(&mut reader), [inter(4040, 101)]);
}

#[test]
fn radio_with_a_picture_starts_with_the_picture_and_the_newest_audio() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(video_header(0, 1));
    publisher.push(key_frame(0, 7));
    for i in 0..600 {
        publisher.push(audio(i * 40, i as u8));
    }
    let tags = drain(&mut hub.subscribe(&key()).unwrap());
    let start = tags[2].timestamp();
    assert_eq!(tags[..2], [video_header(start, 1), key_frame(start, 7)]);
    assert!(tags[2..].iter().all(|tag| tag.kind() == TagKind::Audio));
    assert!(599 * 40 - start <= 500);
}

#[test]
fn headers_of_further_tracks_reach_late_readers_and_replace_none() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    let second = Tag::new(TagKind::Audio, 0, b"\x95\x00mp4a\x01\x12\x10").unwrap();
    let command = Tag::new(TagKind::Video, 0, &[0x57, 0]).unwrap();
    let empty = Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0]).unwrap();
    publisher.push(video_header(0, 1));
    publisher.push(audio_header(0, 1));
    for tag in [&second, &command, &empty] {
        publisher.push(tag.clone());
    }
    publisher.push(key_frame(40, 1));
    assert_eq!(
        drain(&mut hub.subscribe(&key()).unwrap()),
        [video_header(40, 1), audio_header(40, 1), second.with_timestamp(40), key_frame(40, 1)]
    );
}

#[test]
fn tracks_are_settled_when_both_are_there_or_after_a_second() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    let reader = hub.subscribe(&key()).unwrap();
    publisher.push(script(0, 1));
    publisher.push(key_frame(0, 1));
    let (video, audio_tag) = (Tracks { video: true, audio: false }, audio(1040, 1));
    assert_eq!((reader.tracks(), reader.settled_tracks()), (video, None));
    publisher.push(inter(960, 1));
    assert_eq!(reader.settled_tracks(), None);
    publisher.push(inter(1000, 1));
    assert_eq!(reader.settled_tracks(), Some(video));
    publisher.push(audio_tag);
    assert_eq!(reader.settled_tracks(), Some(Tracks::BOTH));
    drop(publisher);
    let mut publisher = hub.publish(key()).unwrap();
    publisher.set_headers(headers([video_header(0, 1), audio_header(0, 1)]));
    assert_eq!(hub.subscribe(&key()).unwrap().settled_tracks(), Some(Tracks::BOTH));
}

#[test]
fn timestamps_of_an_encoder_stay_continuous() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap().with_timestamp_repair();
    let mut reader = hub.subscribe(&key()).unwrap();
    publisher.push(key_frame(0, 1));
    publisher.push(inter(40, 2));
    publisher.push(inter(3_600_080, 3));
    publisher.push(inter(3_600_120, 4));
    let expected = [key_frame(0, 1), inter(40, 2), inter(80, 3), inter(120, 4)];
    assert_eq!(drain(&mut reader), expected);
}

#[test]
fn one_publisher_at_a_time_and_readers_drain_before_the_end() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    assert_eq!(hub.publish(key()).err(), Some(AlreadyLive(key())));
    publisher.push(key_frame(0, 1));
    let mut reader = hub.subscribe(&key()).unwrap();
    let mut late = publisher.stream().subscribe();
    drop(publisher);
    assert!(hub.stream(&key()).is_none());
    let _second = hub.publish(key()).unwrap();
    for reader in [&mut reader, &mut late] {
        assert_eq!(drain(reader), [key_frame(0, 1)]);
        assert_eq!(reader.try_read(&mut Vec::new(), 1), ReadOutcome::Ended);
    }
    assert_eq!(hub.len(), 1);
}

#[test]
fn headers_set_after_the_first_tag_go_to_running_readers() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(video_header(0, 1));
    publisher.push(key_frame(7, 1));
    let mut reader = hub.subscribe(&key()).unwrap();
    drain(&mut reader);
    publisher.set_headers(headers([script(0, 1), video_header(0, 2), audio_header(0, 1)]));
    publisher.set_headers(headers([script(0, 1)]));
    assert_eq!(drain(&mut reader), [script(7, 1), audio_header(7, 1)]);
    assert_eq!(publisher.stream().headers().video(), Some(&video_header(0, 1)));
}

#[tokio::test]
async fn readers_and_early_viewers_are_woken() {
    let hub = hub();
    let soon = tokio::time::Instant::now() + Duration::from_millis(20);
    assert!(hub.wait_for("live/movie", soon).await.is_none());
    let far = tokio::time::Instant::now() + Duration::from_secs(20);
    let waiting = tokio::spawn({
        let hub = hub.clone();
        async move {
            let mut reader = hub.wait_for("live/movie", far).await.unwrap().subscribe();
            let mut out = Vec::new();
            while reader.read(&mut out, usize::MAX).await.is_ok() {}
            out
        }
    });
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(key_frame(0, 1));
    tokio::task::yield_now().await;
    publisher.push(inter(40, 2));
    let holds_it = publisher.stream().clone();
    while Arc::strong_count(&holds_it) < 3 {
        tokio::task::yield_now().await;
    }
    drop(publisher);
    assert_eq!(waiting.await.unwrap(), [key_frame(0, 1), inter(40, 2)]);
}

#[tokio::test]
async fn audio_rides_along_with_video() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    let mut reader = hub.subscribe(&key()).unwrap().waking_with_video();
    let mut woken = |publisher: &mut Publisher, tag: Tag| {
        publisher.push(tag);
        let woken = reader.wake.has_changed().unwrap();
        reader.wake.mark_unchanged();
        woken
    };
    // Without video, each tag wakes.
    assert!(woken(&mut publisher, audio_header(0, 1)));
    assert!(woken(&mut publisher, audio(0, 1)));
    assert!(woken(&mut publisher, audio(1, 2)));
    assert!(woken(&mut publisher, video_header(10, 1)));
    assert!(woken(&mut publisher, key_frame(10, 1)));
    for at in [20, 43, 59] {
        assert!(!woken(&mut publisher, audio(at, 1)), "{at}");
    }
    assert!(woken(&mut publisher, inter(59, 2)));
    // The next frame is late, or does not come.
    assert!(!woken(&mut publisher, audio(108, 1)));
    assert!(woken(&mut publisher, audio(109, 2)));
    assert!(!woken(&mut publisher, audio(132, 3)));
    // Headers do not wait.
    assert!(woken(&mut publisher, script(133, 1)));
    // The video is gone for long: this is a stream of audio now.
    assert!(woken(&mut publisher, audio(10_059, 4)));
    assert!(!woken(&mut publisher, audio(10_059, 5)));
    assert!(woken(&mut publisher, audio(10_060, 6)));
    assert!(woken(&mut publisher, audio(10_061, 7)));
    let read = drain(&mut reader);
    assert_eq!(read.last(), Some(&audio(10_061, 7)));
    drop(publisher);
    reader.woken().await;
    reader.stream().over().await;
    assert_eq!(reader.try_read(&mut Vec::new(), 1), ReadOutcome::Ended);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_wake_is_lost_to_readers_that_come_and_go() {
    let hub = hub();
    let mut publisher = hub.publish(key()).unwrap();
    publisher.push(key_frame(0, 0));
    for i in 1..2_000u32 {
        let stream = publisher.stream().clone();
        let reading = tokio::spawn(async move {
            let mut reader = stream.subscribe();
            if i % 2 == 0 {
                reader = reader.waking_with_video();
            }
            let mut out = Vec::new();
            while !out.contains(&inter(i, 1)) {
                reader.read(&mut out, usize::MAX).await.unwrap();
            }
        });
        if i % 3 == 0 {
            tokio::task::yield_now().await;
        }
        publisher.push(inter(i, 1));
        let read = tokio::time::timeout(Duration::from_secs(20), reading).await;
        read.expect("woken").unwrap();
        if i % 100 == 0 {
            publisher.push(key_frame(i, 0));
        }
    }
}

fn drain(reader: &mut Reader) -> Vec<Tag> {
    let mut out = Vec::new();
    while let ReadOutcome::Read(_) = reader.try_read(&mut out, 1) {}
    out
}

fn headers<const N: usize>(tags: [Tag; N]) -> Headers {
    tags.into_iter().collect()
}

fn hub() -> Hub {
    Hub::new(LogLimits { max_bytes: 1 << 20, max_age: 60_000 })
}

fn key() -> StreamKey {
    "live/movie".parse().unwrap()
}

fn video_header(timestamp: u32, id: u8) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[0x17, 0, 0, 0, 0, id]).unwrap()
}

fn audio_header(timestamp: u32, id: u8) -> Tag {
    Tag::new(TagKind::Audio, timestamp, &[0xaf, 0, id]).unwrap()
}

fn script(timestamp: u32, id: u8) -> Tag {
    let body = [&b"\x02\x00\x0aonMetaData"[..], &[id]].concat();
    Tag::new(TagKind::Script, timestamp, &body).unwrap()
}

fn key_frame(timestamp: u32, id: u8) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[0x17, 1, 0, 0, 0, id]).unwrap()
}

fn inter(timestamp: u32, id: u8) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[0x27, 1, 0, 0, 0, id]).unwrap()
}

fn audio(timestamp: u32, id: u8) -> Tag {
    Tag::new(TagKind::Audio, timestamp, &[0xaf, 1, id]).unwrap()
}
