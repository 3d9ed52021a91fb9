//! Admission of publishers and players, decided in one place for every protocol.
//!
//! A publication, from the request to its end:
//!
//! ```text
//! publish(Request) ── policies ── claim of the key ─► Waiting ── first audio or video ─► Live ─► Ended
//!                  └─► Refusal                          └────── dropped, revoked, taken over ──────┘
//! ```
//!
//! With [`Settings::publish_grace`], a dropped publication leaves its stream Held. The next publication of
//! the key, or one that takes it over, continues the stream: readers and taps notice a pause only. The
//! key is kept for the encoder that lost its connection (same address or query); after `unpublish` any
//! encoder may have it.
//!
//! Invariants: a key is claimed by one source at a time; a stream is in the hub only while its
//! publication is live; once a revocation or a take-over returns, the old publication is over.
//!
//! Each publication has one lock, which is held while a tag is pushed, while the stream starts and
//! while it ends. Behind it the lock of all claims may be taken, never the other way round.

mod playback;

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use downpour_media::{
    StreamKey,
    flv::{Tag, TagKind},
};
use parking_lot::{Mutex, RwLock};
use tokio::{runtime::Handle, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use self::playback::Playing;
pub use self::playback::{Playback, PlaybackInfo};
use crate::{
    Hub, PublicationInfo, Publisher,
    claims::{Claim, ClaimError, EndReason, Holder, Replaced, Rival},
    unix_ms,
};

/// Admits publishers and players of all protocols. Cloning shares it.
#[derive(Clone)]
pub struct Admission {
    shared: Arc<Shared>,
}

struct Shared {
    hub: Hub,
    settings: Settings,
    /// Ends held streams; `None` outside of a runtime, where no stream is held.
    runtime: Option<Handle>,
    policies: RwLock<Vec<Arc<dyn Policy>>>,
    counters: Counters,
    /// One permit per player.
    permits: Arc<Semaphore>,
    playbacks: Mutex<HashMap<u64, Arc<Playing>>>,
    next_playback: AtomicU64,
}

/// Limits of admission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// A publisher that has sent nothing for this long loses its key to the next one.
    pub publisher_silence: Duration,
    /// How long a stream waits for an encoder after its publication ended; zero ends it at once, and on
    /// a take-over. Counted from the last tag.
    pub publish_grace: Duration,
    /// Keys claimed at one time, by publishers and by sources of the node.
    pub max_streams: usize,
    /// Players at one time, of all protocols.
    pub max_players: usize,
    /// How long a player waits for its stream to start.
    pub stream_wait: Duration,
}

impl Default for Settings {
    /// 5 s of silence, no grace, 1000 streams, 10,000 players, a wait of 2 s.
    fn default() -> Self {
        Self {
            publisher_silence: Duration::from_secs(5),
            publish_grace: Duration::ZERO,
            max_streams: 1000,
            max_players: 10_000,
            stream_wait: Duration::from_secs(2),
        }
    }
}

/// A peer's request to publish or to play.
#[derive(Debug, Clone)]
pub struct Request {
    /// To publish or to play.
    pub action: Action,
    /// The stream's name.
    pub key: StreamKey,
    /// The protocol, for policies and logs, in small letters: `rtmp`, `http-flv`.
    pub protocol: &'static str,
    /// The peer's address.
    pub peer: SocketAddr,
    /// The query of the URL, without `?`; may be empty.
    pub query: String,
    /// Whether the transport is encrypted.
    pub encrypted: bool,
    /// Cancelled when the publication or playback is revoked or taken over; its connection must then
    /// close. A player that polls [`Playback::is_revoked`] needs none.
    pub revoked: Option<CancellationToken>,
}

/// The action of a [`Request`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Send a stream.
    Publish,
    /// Receive a stream.
    Play,
}

/// Why a request is refused. Each protocol answers in its own words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Another source holds the key.
    #[error("{0} already has a live publisher")]
    AlreadyLive(StreamKey),
    /// The peer may not do this.
    #[error("not allowed: {0}")]
    Unauthorized(String),
    /// A limit of the node is reached.
    #[error("the node is full: {0}")]
    Full(String),
    /// The stream is not live and did not start in time.
    #[error("the stream {0} is not live")]
    NotLive(StreamKey),
}

/// A future of a policy's decision.
pub type Decision<'a> = Pin<Box<dyn Future<Output = Result<(), Refusal>> + Send + 'a>>;

/// A rule that admits or refuses publishers and players: keys, signed URLs, hooks, a directory.
pub trait Policy: Send + Sync {
    /// Decides about a request before it is answered or announced. Other requests do not wait for the
    /// decision. The protocol drops the future when its time for a decision is over, or the node ends;
    /// HTTP also when the viewer disconnects.
    ///
    /// # Errors
    /// The [`Refusal`] that the peer gets.
    fn decide<'a>(&'a self, request: &'a Request) -> Decision<'a>;
}

/// Counters of admission since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Publishers that took a key over from a silent one.
    pub takeovers: AtomicU64,
    /// Publications that continued the stream of an earlier one.
    pub resumed: AtomicU64,
    /// Players that have ended.
    pub playbacks_ended: AtomicU64,
}

impl Admission {
    /// Admits every peer to `hub`, within the limits of `settings`. `publish_grace` needs a tokio runtime,
    /// the one that this is called in.
    pub fn new(hub: Hub, settings: Settings) -> Self {
        let permits = Arc::new(Semaphore::new(settings.max_players.min(Semaphore::MAX_PERMITS)));
        let shared = Shared {
            hub,
            settings,
            runtime: Handle::try_current().ok(),
            policies: RwLock::default(),
            counters: Counters::default(),
            permits,
            playbacks: Mutex::default(),
            next_playback: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Adds a policy. A request must be admitted by all policies.
    pub fn add_policy(&self, policy: Arc<dyn Policy>) {
        self.shared.policies.write().push(policy);
    }

    /// The hub of the streams that are admitted.
    pub fn hub(&self) -> &Hub {
        &self.shared.hub
    }

    /// Counters since the start.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Admits a publication and claims its key, for all protocols.
    ///
    /// # Errors
    /// [`Refusal::AlreadyLive`] while another source holds the key and is not silent,
    /// [`Refusal::Full`] at the limit of streams, and the refusals of policies.
    pub async fn publish(&self, request: Request) -> Result<Publication, Refusal> {
        self.decide(&request).await?;
        let Request { key, peer, revoked, query, .. } = request;
        let settings = self.shared.settings;
        let live = Arc::new(Live {
            peer,
            revoked,
            encoder: Rival { address: peer.ip(), query },
            since: Instant::now(),
            newest_ns: AtomicU64::new(0),
            held_for: AtomicU8::new(HELD_FOR_NOBODY),
            state: Mutex::new(State::Waiting { metadata: None, publisher: None }),
        });
        let claims = &self.shared.hub.shared.claims;
        let holder = (live.clone() as Arc<dyn Holder>, &live.encoder, settings.publisher_silence);
        let (claim, replaced) = claims
            .claim_for(&key, Some(holder), settings.max_streams)
            .map_err(|error| match error {
                ClaimError::AlreadyLive(error) => Refusal::AlreadyLive(error.0),
                ClaimError::Full => {
                    Refusal::Full(format!("max_streams is {}", settings.max_streams))
                }
            })?;
        if let Some(replaced) = replaced {
            self.replace(&key, peer, &live, replaced);
        }
        Ok(Publication { shared: self.shared.clone(), key, live, claim: Some(claim) })
    }

    /// Ends the publication that `live` has replaced. Its stream goes to `live`, unless there is no
    /// grace.
    fn replace(&self, key: &StreamKey, peer: SocketAddr, live: &Live, replaced: Replaced) {
        let Replaced { holder, silent } = replaced;
        let Shared { settings, counters, .. } = &*self.shared;
        let publisher = match settings.publish_grace.is_zero() {
            true => {
                holder.end(EndReason::TakenOver);
                None
            }
            false => holder.hand_over(),
        };
        if silent >= settings.publisher_silence {
            counters.takeovers.fetch_add(1, Ordering::Relaxed);
            let (old_peer, silent_s) = (holder.peer(), silent.as_secs());
            tracing::warn!(stream = %key, %peer, %old_peer, silent_s, "publisher replaced a silent one");
        }
        if publisher.is_some() {
            counters.resumed.fetch_add(1, Ordering::Relaxed);
            let silent_ms = silent.as_millis() as u64;
            let old_peer = holder.peer();
            tracing::info!(stream = %key, %peer, %old_peer, silent_ms, "stream continues with a new publication");
        }
        // The encoder gets its answer after this, so there is no tag yet.
        if let State::Waiting { publisher: slot, .. } = &mut *live.state.lock() {
            *slot = publisher;
        }
    }

    /// Admits a player, and waits for its stream to start.
    ///
    /// # Errors
    /// [`Refusal::Full`] at the limit of players, [`Refusal::NotLive`] if the stream has not started
    /// in time, and the refusals of policies.
    pub async fn play(&self, request: Request) -> Result<Playback, Refusal> {
        self.decide(&request).await?;
        let full = || {
            let limit = self.shared.settings.max_players;
            Refusal::Full(format!("max_viewers is {limit}"))
        };
        if self.shared.permits.available_permits() == 0 {
            return Err(full());
        }
        let Request { key, peer, protocol, revoked, .. } = request;
        let hub = &self.shared.hub;
        let wanted = hub.want(&key);
        let deadline = tokio::time::Instant::now() + self.shared.settings.stream_wait;
        let Some(stream) = hub.wait_for(&key, deadline).await else {
            return Err(Refusal::NotLive(key));
        };
        // Only now: requests for streams that are not there take nobody's place.
        let permit = self.shared.permits.clone().try_acquire_owned().map_err(|_| full())?;
        let id = self.shared.next_playback.fetch_add(1, Ordering::Relaxed);
        let is_revoked = AtomicBool::new(false);
        let playing = Arc::new(Playing { stream, peer, protocol, revoked, is_revoked });
        self.shared.playbacks.lock().insert(id, playing.clone());
        let admission = self.clone();
        Ok(Playback { playing, id, admission, _permit: permit, _wanted: wanted })
    }

    async fn decide(&self, request: &Request) -> Result<(), Refusal> {
        let policies = self.shared.policies.read().clone();
        for policy in policies {
            policy.decide(request).await?;
        }
        Ok(())
    }

    /// Ends the publication on `key` and frees the key. Returns `false` if there is none. Waits while a
    /// tag is being pushed, so a [`Sink`](crate::Sink) or [`Tap`](crate::Tap) must not call it.
    pub fn revoke_publication(&self, key: &StreamKey) -> bool {
        self.shared.hub.shared.claims.end(key)
    }

    /// Ends all publications as [`Admission::revoke_publication`] does. Returns their number.
    pub fn end_all(&self) -> usize {
        self.shared.hub.shared.claims.end_all()
    }

    /// All playbacks, in no order.
    pub fn playbacks(&self) -> Vec<PlaybackInfo> {
        let playbacks = self.shared.playbacks.lock();
        let info = |(id, playing): (&u64, &Arc<Playing>)| PlaybackInfo {
            id: *id,
            key: playing.stream.key().clone(),
            peer: playing.peer,
            protocol: playing.protocol,
        };
        playbacks.iter().map(info).collect()
    }

    /// Ends a playback, within about a second. Returns `false` if there is none with this id.
    pub fn revoke_playback(&self, id: u64) -> bool {
        let playing = self.shared.playbacks.lock().get(&id).cloned();
        let Some(playing) = playing else { return false };
        playing.is_revoked.store(true, Ordering::Release);
        if let Some(revoked) = &playing.revoked {
            revoked.cancel();
        }
        true
    }
}

impl fmt::Debug for Admission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admission").field("settings", &self.shared.settings).finish_non_exhaustive()
    }
}

/// One admitted publication. Dropping it ends the stream and frees the key, or holds both for the
/// encoder as long as [`Settings::publish_grace`] says.
///
/// After a take-over or a revocation it drops all tags that are pushed.
pub struct Publication {
    shared: Arc<Shared>,
    key: StreamKey,
    live: Arc<Live>,
    /// `None` once it has ended.
    claim: Option<Claim>,
}

impl Publication {
    /// Takes the next tag, in the order of arrival. Script tags come without `@setDataFrame`.
    ///
    /// The stream starts with the first audio or video tag.
    pub fn push(&mut self, tag: Tag) {
        let now = Instant::now();
        self.live.note_tag(now);
        let mut state = self.live.state.lock();
        match &mut *state {
            State::Live { publisher } => publisher.push_at(now, tag),
            State::Waiting { metadata, .. } if tag.kind() == TagKind::Script => {
                if tag.is_metadata() {
                    *metadata = Some(tag);
                }
            }
            State::Waiting { metadata, publisher } => {
                let metadata = metadata.take();
                // Behind the lock, so that a revocation does not return while the stream starts.
                let mut publisher = match publisher.take() {
                    Some(mut publisher) => {
                        publisher.splice();
                        publisher
                    }
                    None => self.start(&tag, metadata.clone()),
                };
                metadata.into_iter().chain([tag]).for_each(|tag| publisher.push_at(now, tag));
                *state = State::Live { publisher };
            }
            State::Held { .. } | State::Ended => {}
        }
    }

    /// Starts the stream. Media time 0 is the tag's timestamp before now.
    fn start(&self, first: &Tag, metadata: Option<Tag>) -> Publisher {
        let start = unix_ms().saturating_sub(u64::from(first.timestamp()));
        let mut info = PublicationInfo::starting_at(start);
        info.headers = metadata.into_iter().collect();
        self.shared.hub.start(self.key.clone(), info, None).with_timestamp_repair()
    }

    /// Ends the publication because its encoder said so. With a grace, the stream waits for the next one,
    /// and any encoder may be that.
    pub fn unpublish(mut self) {
        self.leave(HELD_FOR_ANYONE);
    }

    /// Ends the publication and its stream at once.
    pub fn end(mut self) {
        self.live.finish();
        self.claim = None;
    }

    /// Ends the publication. Holds its stream if there is one and a grace.
    fn leave(&mut self, held_for: u8) {
        let Some(claim) = self.claim.take() else { return };
        let left = self.shared.settings.publish_grace.saturating_sub(self.live.silent_for());
        let runtime = self.shared.runtime.as_ref().filter(|_| !left.is_zero());
        let Some(runtime) = runtime else { return self.live.finish() };
        {
            let mut state = self.live.state.lock();
            *state = match std::mem::replace(&mut *state, State::Ended) {
                State::Live { publisher } | State::Waiting { publisher: Some(publisher), .. } => {
                    self.live.held_for.store(held_for, Ordering::Release);
                    State::Held { _publisher: publisher, _claim: claim }
                }
                _ => return,
            };
        }
        let held_ms = left.as_millis() as u64;
        tracing::info!(stream = %self.key, held_ms, "stream waits for its encoder to come back");
        let live = self.live.clone();
        runtime.spawn(async move {
            tokio::time::sleep(left).await;
            live.expire();
        });
    }

    /// The stream's name.
    pub fn key(&self) -> &StreamKey {
        &self.key
    }
}

impl Drop for Publication {
    fn drop(&mut self) {
        self.leave(HELD_FOR_ITS_ENCODER);
    }
}

/// The part of a publication that others can end.
struct Live {
    peer: SocketAddr,
    revoked: Option<CancellationToken>,
    encoder: Rival,
    since: Instant,
    /// When the newest tag arrived, in nanoseconds after `since`. Not behind the lock: claims read it
    /// while a tag is pushed.
    newest_ns: AtomicU64,
    /// Who may continue the stream: [`HELD_FOR_NOBODY`] and so on. Not behind the lock, as `newest_ns`.
    held_for: AtomicU8,
    state: Mutex<State>,
}

enum State {
    /// Only script tags have arrived. `publisher` is that of the stream to continue, if any.
    Waiting { metadata: Option<Tag>, publisher: Option<Publisher> },
    /// The stream is in the hub.
    Live { publisher: Publisher },
    /// The publication has ended, and its stream waits for the next one.
    Held { _publisher: Publisher, _claim: Claim },
    /// Dropped, taken over or revoked.
    Ended,
}

impl Live {
    fn note_tag(&self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.since).as_nanos() as u64;
        self.newest_ns.store(elapsed, Ordering::Relaxed);
    }

    fn finish(&self) {
        // The publisher is dropped behind the lock: a second caller waits until the stream is over.
        *self.state.lock() = State::Ended;
    }
}

impl Live {
    fn silent_for(&self) -> Duration {
        let newest = Duration::from_nanos(self.newest_ns.load(Ordering::Relaxed));
        self.since.elapsed().saturating_sub(newest)
    }

    /// Has the connection closed, unless it has ended the publication itself: it may publish again.
    fn close_connection(&self) {
        if let Some(revoked) = &self.revoked
            && self.held_for.load(Ordering::Acquire) == HELD_FOR_NOBODY
        {
            revoked.cancel();
        }
    }

    /// Ends the stream if no encoder has continued it.
    fn expire(&self) {
        let mut state = self.state.lock();
        if matches!(*state, State::Held { .. }) {
            *state = State::Ended;
        }
    }
}

impl Holder for Live {
    fn peer(&self) -> SocketAddr {
        self.peer
    }

    fn yields_to(&self, rival: &Rival, silence: Duration) -> Option<Duration> {
        let silent = self.silent_for();
        let yields = match self.held_for.load(Ordering::Acquire) {
            HELD_FOR_ANYONE => true,
            HELD_FOR_ITS_ENCODER => rival.is(&self.encoder),
            _ => silent >= silence,
        };
        yields.then_some(silent)
    }

    fn hand_over(&self) -> Option<Publisher> {
        self.close_connection();
        // The claim of a held stream is dropped behind the lock, which frees nothing: the key has a new
        // holder.
        match std::mem::replace(&mut *self.state.lock(), State::Ended) {
            State::Live { publisher } | State::Held { _publisher: publisher, .. } => {
                Some(publisher)
            }
            State::Waiting { publisher, .. } => publisher,
            State::Ended => None,
        }
    }

    fn end(&self, reason: EndReason) {
        tracing::debug!(?reason, "publication ended by the node");
        self.close_connection();
        self.finish();
    }
}

/// The publication has not ended; it yields to any encoder once it is silent.
const HELD_FOR_NOBODY: u8 = 0;
/// Its connection was lost.
const HELD_FOR_ITS_ENCODER: u8 = 1;
/// Its encoder ended it.
const HELD_FOR_ANYONE: u8 = 2;

#[cfg(test)]
mod tests;
