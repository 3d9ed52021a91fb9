use std::{
    sync::{
        atomic::AtomicUsize,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
};

use super::*;
use crate::{LogLimits, OnDemand, ReadOutcome, Sink, Stream, Tap};

const LIMITS: LogLimits = LogLimits { max_bytes: 1 << 20, max_age: 60_000 };

fn admission(settings: Settings) -> Admission {
    Admission::new(Hub::new(LIMITS), settings)
}

fn key(name: &str) -> StreamKey {
    name.parse().unwrap()
}

fn request(action: Action, name: &str) -> Request {
    Request {
        action,
        key: key(name),
        protocol: "test",
        peer: "127.0.0.1:1".parse().unwrap(),
        query: String::new(),
        encrypted: false,
        revoked: Some(CancellationToken::new()),
    }
}

fn cancelled(request: &Request) -> bool {
    request.revoked.as_ref().unwrap().is_cancelled()
}

fn frame(timestamp: u32, first: u8) -> Tag {
    Tag::new(TagKind::Video, timestamp, &[first, 1, 0, 0, 0, 9]).unwrap()
}

fn metadata() -> Tag {
    Tag::new(TagKind::Script, 40, b"\x02\x00\x0aonMetaData\x05").unwrap()
}

async fn publish(admission: &Admission, name: &str) -> Result<Publication, Refusal> {
    admission.publish(request(Action::Publish, name)).await
}

#[tokio::test]
async fn a_stream_starts_with_its_first_media_and_has_its_metadata() {
    let admission = admission(Settings::default());
    let mut publication = publish(&admission, "live/a").await.unwrap();
    publication.push(metadata());
    assert!(admission.hub().is_empty());
    publication.push(frame(1000, 0x17));
    let stream = admission.hub().streams().pop().unwrap();
    assert_eq!(stream.headers().metadata().unwrap().body(), metadata().body());
    let age = unix_ms() - stream.start_unix_ms();
    assert!((1000..10_000).contains(&age), "media time 0 was a second before: {age}");
    drop(publication);
    assert!(admission.hub().is_empty());
    assert!(stream.ended());
}

#[tokio::test]
async fn captions_do_not_replace_the_metadata() {
    let admission = admission(Settings::default());
    let mut publication = publish(&admission, "live/a").await.unwrap();
    publication.push(metadata());
    publication.push(frame(0, 0x17));
    publication.push(Tag::new(TagKind::Script, 40, b"\x02\x00\x0aonTextData\x05").unwrap());
    let stream = admission.hub().streams().pop().unwrap();
    assert_eq!(stream.headers().metadata().unwrap().body(), metadata().body());
    assert_eq!(stream.counters().script_tags.load(Ordering::Relaxed), 2);
}

#[tokio::test]
async fn a_key_belongs_to_one_source_of_any_kind() {
    let admission = admission(Settings::default());
    let other_source = admission.hub().publish(key("live/a")).unwrap();
    let refused = publish(&admission, "live/a").await.err();
    assert_eq!(refused, Some(Refusal::AlreadyLive(key("live/a"))));
    drop(other_source);
    let publication = publish(&admission, "live/a").await.unwrap();
    assert!(admission.hub().publish(key("live/a")).is_err(), "claimed before its first media");
    drop(publication);
    assert!(admission.hub().publish(key("live/a")).is_ok());
}

fn with_grace(grace: Duration) -> Admission {
    admission(Settings { publish_grace: grace, ..Settings::default() })
}

fn from(address: &str, query: &str) -> Request {
    let peer = SocketAddr::new(address.parse().unwrap(), 1);
    Request { peer, query: query.into(), ..request(Action::Publish, "live/a") }
}

#[tokio::test]
async fn an_encoder_that_comes_back_continues_its_stream_and_its_clock() {
    let admission = with_grace(Duration::from_secs(60));
    let mut publication = admission.publish(from("10.0.0.1", "k=1")).await.unwrap();
    publication.push(frame(7000, 0x17));
    let stream = admission.hub().streams().pop().unwrap();
    let (mut reader, mut tags) = (stream.subscribe(), Vec::new());
    assert!(matches!(reader.try_read(&mut tags, usize::MAX), ReadOutcome::Read(_)));
    drop(publication);
    assert!(!stream.ended());
    // The key is kept for its encoder.
    for stranger in [from("10.0.0.2", ""), from("10.0.0.2", "k=2")] {
        let refused = admission.publish(stranger).await.err();
        assert_eq!(refused, Some(Refusal::AlreadyLive(key("live/a"))));
    }
    // It comes back from another address, sends nothing, and comes again from the first one.
    drop(admission.publish(from("10.0.0.3", "k=1")).await.unwrap());
    drop(admission.publish(from("10.0.0.3", "")).await.unwrap());
    assert!(!stream.ended());
    let mut again = admission.publish(from("10.0.0.3", "other=2")).await.unwrap();
    again.push(metadata());
    again.push(frame(0, 0x17));
    again.push(frame(40, 0x27));
    assert_eq!(admission.hub().streams().pop().unwrap().id(), stream.id());
    assert!(matches!(reader.try_read(&mut tags, usize::MAX), ReadOutcome::Read(_)));
    let times: Vec<_> = tags.iter().map(|tag| (tag.kind(), tag.timestamp())).collect();
    let expected = [
        (TagKind::Video, 7000),
        (TagKind::Script, 7040),
        (TagKind::Video, 7040),
        (TagKind::Video, 7080),
    ];
    assert_eq!(times, expected);
    assert_eq!(admission.counters().resumed.load(Ordering::Relaxed), 3);
    assert_eq!(admission.counters().takeovers.load(Ordering::Relaxed), 0);
    // An operator ends it at once.
    drop(again);
    assert!(admission.revoke_publication(&key("live/a")));
    assert!(stream.ended());
    assert!(admission.publish(from("10.0.0.9", "")).await.is_ok());
}

#[tokio::test]
async fn a_key_that_its_encoder_gave_up_is_free_and_its_stream_goes_on() {
    let admission = with_grace(Duration::from_secs(60));
    let first = from("10.0.0.1", "");
    let mut publication = admission.publish(first.clone()).await.unwrap();
    publication.push(frame(0, 0x17));
    let stream = admission.hub().streams().pop().unwrap();
    publication.unpublish();
    assert!(!stream.ended());
    // Again on the same connection, which stays.
    let mut again = admission.publish(first.clone()).await.unwrap();
    again.push(frame(0, 0x17));
    again.unpublish();
    assert!(!cancelled(&first));
    let mut other = admission.publish(from("10.0.0.2", "")).await.unwrap();
    other.push(frame(0, 0x17));
    assert!(!stream.ended());
    other.end();
    assert!(stream.ended());
    assert!(admission.hub().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stream_whose_encoder_stays_away_ends_after_the_grace() {
    // Paused time moves on only once all tasks wait, so the grace is over when `over` returns.
    let admission = with_grace(Duration::from_secs(5));
    let mut publication = publish(&admission, "live/a").await.unwrap();
    publication.push(frame(0, 0x17));
    let stream = admission.hub().streams().pop().unwrap();
    drop(publication);
    assert!(!stream.ended());
    let began = tokio::time::Instant::now();
    stream.over().await;
    assert!((4000..=5000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
    assert!(admission.hub().is_empty());
    assert!(admission.hub().publish(key("live/a")).is_ok(), "the key is free");
}

#[tokio::test]
async fn a_silent_publisher_hands_its_stream_over() {
    let silence = Duration::from_millis(20);
    let settings = Settings {
        publisher_silence: silence,
        publish_grace: Duration::from_secs(60),
        ..Settings::default()
    };
    let admission = admission(settings);
    let mut first = admission.publish(from("10.0.0.1", "")).await.unwrap();
    first.push(frame(0, 0x17));
    let stream = admission.hub().streams().pop().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut second = loop {
        if let Ok(second) = admission.publish(from("10.0.0.2", "")).await {
            break second;
        }
        assert!(Instant::now() < deadline);
        tokio::task::yield_now().await;
    };
    second.push(frame(0, 0x17));
    // What the first still sends, and its end, change nothing.
    first.push(frame(40, 0x27));
    drop(first);
    assert!(!stream.ended());
    assert_eq!(stream.counters().video_tags.load(Ordering::Relaxed), 2);
    assert_eq!(admission.counters().takeovers.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_second_publisher_is_refused_until_the_first_is_silent() {
    let settings = Settings { publisher_silence: Duration::from_millis(50), ..Settings::default() };
    let admission = admission(settings);
    let first = request(Action::Publish, "live/a");
    let mut publication = admission.publish(first.clone()).await.unwrap();
    let before = Instant::now();
    publication.push(frame(0, 0x17));
    let old = admission.hub().streams().pop().unwrap();
    let mut second = loop {
        match publish(&admission, "live/a").await {
            Ok(second) => break second,
            Err(refused) => assert_eq!(refused, Refusal::AlreadyLive(key("live/a"))),
        }
        assert!(before.elapsed() < Duration::from_secs(20));
        tokio::task::yield_now().await;
    };
    assert!(before.elapsed() >= settings.publisher_silence);
    assert!(cancelled(&first));
    assert!(old.ended());
    assert_eq!(admission.counters().takeovers.load(Ordering::Relaxed), 1);
    second.push(frame(0, 0x17));
    // The first connection has not noticed yet; its tags and its end change nothing.
    publication.push(frame(40, 0x27));
    drop(publication);
    let live = admission.hub().streams();
    assert_eq!(live.len(), 1);
    assert_ne!(live[0].id(), old.id());
    assert!(publish(&admission, "live/a").await.is_err());
}

#[tokio::test]
async fn streams_and_players_are_limited() {
    let limits = Settings { max_streams: 1, max_players: 1, ..Settings::default() };
    let admission = admission(limits);
    let mut publication = publish(&admission, "live/a").await.unwrap();
    assert!(matches!(publish(&admission, "live/b").await, Err(Refusal::Full(_))));
    publication.push(frame(0, 0x17));
    let player = admission.play(request(Action::Play, "live/a")).await.unwrap();
    let refused = admission.play(request(Action::Play, "live/a")).await.err();
    assert!(matches!(refused, Some(Refusal::Full(_))), "{refused:?}");
    drop(player);
    assert!(admission.play(request(Action::Play, "live/a")).await.is_ok());
}

struct Secret;

impl Policy for Secret {
    fn decide<'a>(&'a self, request: &'a Request) -> Decision<'a> {
        Box::pin(async move {
            tokio::task::yield_now().await;
            match request.query == "key=1" {
                true => Ok(()),
                false => Err(Refusal::Unauthorized(format!("{:?}", request.action))),
            }
        })
    }
}

#[tokio::test]
async fn policies_are_awaited_for_both_actions_before_the_key_is_claimed() {
    let admission = admission(Settings::default());
    admission.add_policy(Arc::new(Secret));
    let refused = publish(&admission, "live/a").await.err();
    assert_eq!(refused, Some(Refusal::Unauthorized("Publish".into())));
    let query = "key=1".to_owned();
    let allowed = Request { query: query.clone(), ..request(Action::Publish, "live/a") };
    let mut publication = admission.publish(allowed).await.unwrap();
    publication.push(frame(0, 0x17));
    let refused = admission.play(request(Action::Play, "live/a")).await.err();
    assert_eq!(refused, Some(Refusal::Unauthorized("Play".into())));
    let allowed = Request { query, ..request(Action::Play, "live/a") };
    assert!(admission.play(allowed).await.is_ok());
}

#[tokio::test]
async fn publications_and_playbacks_can_be_revoked() {
    let admission = admission(Settings::default());
    let publish = request(Action::Publish, "live/a");
    let mut publication = admission.publish(publish.clone()).await.unwrap();
    publication.push(frame(0, 0x17));
    let play = request(Action::Play, "live/a");
    let playback = admission.play(play.clone()).await.unwrap();
    let [info] = &admission.playbacks()[..] else { panic!("one playback") };
    assert_eq!((info.id, &info.key, info.protocol), (playback.id(), &key("live/a"), "test"));
    assert!(!playback.is_revoked());
    assert!(admission.revoke_playback(playback.id()));
    assert!(playback.is_revoked() && cancelled(&play));
    assert!(!admission.revoke_playback(playback.id() + 1));
    assert!(admission.revoke_publication(&key("live/a")));
    assert!(cancelled(&publish));
    assert!(playback.stream().ended());
    assert!(!admission.revoke_publication(&key("live/b")));
    drop(playback);
    assert_eq!(admission.playbacks(), []);
}

#[tokio::test]
async fn ending_all_leaves_no_stream() {
    let admission = admission(Settings::default());
    let mut publications = Vec::new();
    for name in ["live/a", "live/b"] {
        let mut publication = publish(&admission, name).await.unwrap();
        publication.push(frame(0, 0x17));
        publications.push(publication);
    }
    assert_eq!(admission.end_all(), 2);
    assert!(admission.hub().is_empty());
}

#[derive(Default)]
struct Starts {
    wanted: AtomicUsize,
    unwanted: AtomicUsize,
    hub: Mutex<Option<Hub>>,
    running: Mutex<Vec<Publisher>>,
}

impl OnDemand for Starts {
    fn wanted(&self, key: &StreamKey) {
        self.wanted.fetch_add(1, Ordering::Relaxed);
        if let Some(hub) = &*self.hub.lock() {
            self.running.lock().push(hub.publish(key.clone()).unwrap());
        }
    }

    fn unwanted(&self, key: &StreamKey) {
        self.unwanted.fetch_add(1, Ordering::Relaxed);
        self.running.lock().retain(|publisher| publisher.stream().key() != key);
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_on_demand_runs_while_somebody_plays() {
    let admission = admission(Settings::default());
    let source = Arc::new(Starts::default());
    admission.hub().add_on_demand(source.clone());
    let counts = || {
        let [wanted, unwanted] = [&source.wanted, &source.unwanted];
        (wanted.load(Ordering::Relaxed), unwanted.load(Ordering::Relaxed))
    };
    // The stream does not start in time.
    let refused = admission.play(request(Action::Play, "live/a")).await.err();
    assert_eq!(refused, Some(Refusal::NotLive(key("live/a"))));
    assert_eq!(counts(), (1, 1));

    *source.hub.lock() = Some(admission.hub().clone());
    let first = admission.play(request(Action::Play, "live/a")).await.unwrap();
    let second = admission.play(request(Action::Play, "live/a")).await.unwrap();
    assert_eq!(counts(), (2, 1));
    drop(first);
    assert_eq!(counts(), (2, 1));
    let stream = second.stream().clone();
    drop(second);
    assert_eq!(counts(), (2, 2));
    assert!(stream.ended());
}

/// Records its calls.
#[derive(Clone)]
struct Notes(&'static str, Arc<Mutex<Vec<String>>>);

impl Sink for Notes {
    fn stream_up(&self, stream: &Arc<Stream>) -> Option<Box<dyn Tap>> {
        let has_metadata = stream.headers().metadata().is_some();
        self.1.lock().push(format!("{} up {} {has_metadata}", self.0, stream.key()));
        (self.0 != "reader").then(|| Box::new(NotesTap(self.clone(), stream.clone())) as _)
    }
}

struct NotesTap(Notes, Arc<Stream>);

impl Tap for NotesTap {
    fn push(&mut self, _: Instant, tag: &Tag) {
        let logged = self.1.held().0;
        self.0.1.lock().push(format!("{} {} {logged}", self.0.0, tag.timestamp()));
    }
}

impl Drop for NotesTap {
    fn drop(&mut self) {
        self.0.1.lock().push(format!("{} end {}", self.0.0, self.1.ended()));
    }
}

#[tokio::test]
async fn taps_see_each_tag_in_the_order_of_their_sinks_and_before_the_log() {
    let admission = admission(Settings::default());
    let notes = Arc::default();
    for name in ["first", "reader", "second"] {
        admission.hub().add_sink(Arc::new(Notes(name, Arc::clone(&notes))));
    }
    let mut publication = publish(&admission, "live/a").await.unwrap();
    publication.push(metadata());
    publication.push(frame(7, 0x17));
    let mut reader = admission.hub().subscribe(&key("live/a")).unwrap();
    assert!(matches!(reader.try_read(&mut Vec::new(), 1), ReadOutcome::Read(_)));
    drop(publication);
    let expected = [
        "first up live/a true",
        "reader up live/a true",
        "second up live/a true",
        "first 40 0",
        "second 40 0",
        "first 7 1",
        "second 7 1",
        "first end false",
        "second end false",
    ];
    assert_eq!(*notes.lock(), expected);
}

/// Its taps signal and wait once each time they push or end.
struct Gate {
    entered: SyncSender<&'static str>,
    resume: Arc<Mutex<Receiver<()>>>,
}

impl Gate {
    fn add_to(hub: &Hub) -> (Receiver<&'static str>, SyncSender<()>) {
        let (entered, entries) = sync_channel(8);
        let (resumer, resume) = sync_channel(8);
        hub.add_sink(Arc::new(Self { entered, resume: Arc::new(Mutex::new(resume)) }));
        (entries, resumer)
    }
}

impl Sink for Gate {
    fn stream_up(&self, _: &Arc<Stream>) -> Option<Box<dyn Tap>> {
        Some(Box::new(GateTap(self.entered.clone(), self.resume.clone())))
    }
}

struct GateTap(SyncSender<&'static str>, Arc<Mutex<Receiver<()>>>);

impl GateTap {
    fn pass(&self, at: &'static str) {
        if self.0.send(at).is_ok() {
            let _ = self.1.lock().recv();
        }
    }
}

impl Tap for GateTap {
    fn push(&mut self, _: Instant, _: &Tag) {
        self.pass("push");
    }
}

impl Drop for GateTap {
    fn drop(&mut self) {
        self.pass("end");
    }
}

/// Runs `work` on a thread and fails if it takes 20 s.
fn within_deadline<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = sync_channel(1);
    thread::spawn(move || done.send(work()));
    result.recv_timeout(Duration::from_secs(20)).expect("no deadlock")
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

#[test]
fn claims_do_not_wait_for_a_publication_that_is_pushing() {
    let admission = admission(Settings::default());
    let (entries, resume) = Gate::add_to(admission.hub());
    let mut publication = block_on(publish(&admission, "live/a")).unwrap();
    let pushing = thread::spawn(move || publication.push(frame(0, 0x17)));
    assert_eq!(entries.recv(), Ok("push"));
    let refused = within_deadline({
        let admission = admission.clone();
        move || {
            let same_key = block_on(publish(&admission, "live/a")).err();
            block_on(publish(&admission, "live/b")).unwrap();
            same_key
        }
    });
    assert_eq!(refused, Some(Refusal::AlreadyLive(key("live/a"))));
    drop(resume);
    pushing.join().unwrap();
}

#[test]
fn a_revocation_waits_for_the_end_that_another_thread_has_begun() {
    let admission = admission(Settings::default());
    let (entries, resume) = Gate::add_to(admission.hub());
    let mut publication = block_on(publish(&admission, "live/a")).unwrap();
    resume.send(()).unwrap();
    publication.push(frame(0, 0x17));
    assert_eq!(entries.recv(), Ok("push"));
    let stream = admission.hub().stream("live/a").unwrap();
    let dropping = thread::spawn(move || drop(publication));
    assert_eq!(entries.recv(), Ok("end"));
    let (started, starts) = sync_channel(1);
    let revoking = thread::spawn({
        let (admission, stream) = (admission.clone(), stream.clone());
        move || {
            started.send(()).unwrap();
            (admission.revoke_publication(&key("live/a")), stream.ended())
        }
    });
    starts.recv().unwrap();
    // Without the wait, the revocation returns in this time, while the tap still blocks the end.
    thread::sleep(Duration::from_millis(50));
    assert!(!stream.ended());
    drop(resume);
    assert_eq!(revoking.join().unwrap(), (true, true));
    dropping.join().unwrap();
}

#[tokio::test]
async fn a_revoked_publication_frees_its_key_and_is_no_take_over() {
    let admission = admission(Settings { max_streams: 1, ..Settings::default() });
    let mut revoked = publish(&admission, "live/a").await.unwrap();
    revoked.push(frame(0, 0x17));
    assert!(admission.revoke_publication(&key("live/a")));
    assert!(!admission.revoke_publication(&key("live/a")));
    assert_eq!(admission.end_all(), 0);
    let mut next = publish(&admission, "live/a").await.unwrap();
    assert_eq!(admission.counters().takeovers.load(Ordering::Relaxed), 0);
    next.push(frame(0, 0x17));
    revoked.push(frame(40, 0x17));
    drop(revoked);
    assert_eq!(admission.hub().len(), 1);
    assert!(publish(&admission, "live/a").await.is_err(), "the next publication keeps its claim");
}
