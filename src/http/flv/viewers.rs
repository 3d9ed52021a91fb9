//! All viewers of a node. Viewers that keep up are served in groups, the others one per task.
//!
//! ```text
//! join ─► alone: catches up ──── caught up ───► in a group (one task, one reader)
//!              ▲                                     │
//!              └── socket full, or group ahead ──────┘
//! alone or in a group ─► closed: stream ended, client closed, timeout, revoked, cut
//! ```
//!
//! - A viewer is in one task at a time: its own, or that of its [`Group`].
//! - A group's `members` counts its viewers and those in its inbox, at most [`GROUP_VIEWERS`].

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Notify};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::{
    group::Group,
    viewer::{Counted, Viewer, ViewerSettings, WriteQueue},
};
use crate::http::HttpMetrics;
use downpour_hub::{Position, Reader, Stream};
use downpour_media::StreamKey;

/// All viewers of a node.
pub(in crate::http) struct Viewers {
    pub(in crate::http) settings: ViewerSettings,
    pub(in crate::http) metrics: HttpMetrics,
    groups: Mutex<HashMap<StreamKey, Vec<Arc<GroupHandle>>>>,
    tasks: TaskTracker,
    cut: CancellationToken,
    /// Number of the next group.
    next_group: AtomicU32,
}

/// A viewer that has read the log to its end, and its reader.
pub(in crate::http) struct CaughtUp {
    pub(in crate::http) viewer: Viewer,
    pub(in crate::http) reader: Reader,
}

/// Handle of a viewer group: inbox, number of members, decode state.
pub(in crate::http) struct GroupHandle {
    stream: Arc<Stream>,
    inbox: Mutex<Vec<CaughtUp>>,
    /// Notified when a viewer is added to the inbox.
    pub(in crate::http) arrived: Notify,
    /// Viewers of the group and of the inbox.
    members: AtomicUsize,
    /// See [`decode_state`].
    decode_state: AtomicUsize,
}

impl Viewers {
    pub(in crate::http) fn new(settings: ViewerSettings, metrics: HttpMetrics) -> Self {
        Self {
            settings,
            metrics,
            groups: Mutex::default(),
            tasks: TaskTracker::new(),
            cut: CancellationToken::new(),
            next_group: AtomicU32::new(0),
        }
    }

    /// Starts to serve a viewer: the response's head, then the stream from its newest group of
    /// pictures on.
    pub(in crate::http) fn join(self: &Arc<Self>, viewer: Viewer, stream: &Arc<Stream>) {
        let mut reader = stream.subscribe().waking_with_video().with_max_lag(self.settings.backlog);
        let viewers = self.clone();
        let behind = Counted::new(&self.metrics.viewers_behind);
        self.spawn(async move {
            let greeted = match viewer.greet(viewers.settings.write_timeout).await {
                Ok(()) => viewer.file_header(&mut reader).await,
                Err(closed) => Err(closed),
            };
            match greeted {
                Ok(header) => viewers.catch_up(viewer, reader, header, behind).await,
                Err(closed) => viewer.close(&closed, &viewers.metrics),
            }
        });
    }

    /// Serves a viewer in a separate task: writes `queue`, then the tags from `reader`, until it has
    /// caught up.
    pub(in crate::http) fn serve_alone(
        self: &Arc<Self>,
        viewer: Viewer,
        reader: Reader,
        queue: WriteQueue,
    ) {
        let viewers = self.clone();
        let behind = Counted::new(&self.metrics.viewers_behind);
        self.spawn(async move { viewers.catch_up(viewer, reader, queue, behind).await });
    }

    /// Waits until all tasks have ended. Only they may spawn further ones from now on.
    pub(in crate::http) async fn gone(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Returns a guard that cuts all connections when it is dropped.
    pub(in crate::http) fn cut_at_end(&self) -> DropGuard {
        self.cut.clone().drop_guard()
    }

    /// Cuts all connections.
    pub(in crate::http) async fn cut(&self) {
        self.cut.cancel();
        self.gone().await;
    }

    /// Removes a group from the list. Returns the viewers in its inbox.
    pub(in crate::http) fn retire(&self, handle: &Arc<GroupHandle>) -> Vec<CaughtUp> {
        let mut groups = self.groups.lock();
        if let Some(of_key) = groups.get_mut(handle.stream.key()) {
            of_key.retain(|other| !Arc::ptr_eq(other, handle));
            if of_key.is_empty() {
                groups.remove(handle.stream.key());
            }
        }
        handle.take_inbox()
    }

    async fn catch_up(
        self: &Arc<Self>,
        mut viewer: Viewer,
        mut reader: Reader,
        queue: WriteQueue,
        behind: Counted,
    ) {
        let done = viewer.catch_up(&mut reader, queue, &self.settings, &self.metrics).await;
        match done {
            Ok(()) => {
                drop(behind);
                self.assign_group(CaughtUp { viewer, reader });
            }
            Err(closed) => viewer.close(&closed, &self.metrics),
        }
    }

    /// Adds a viewer that has caught up to a group of its stream. Starts a new group if none fits.
    fn assign_group(self: &Arc<Self>, arrival: CaughtUp) {
        let stream = arrival.reader.stream();
        let decode_state = decode_state(arrival.reader.position());
        let mut groups = self.groups.lock();
        let of_key = groups.entry(stream.key().clone()).or_default();
        let fits = |handle: &&Arc<GroupHandle>| {
            Arc::ptr_eq(&handle.stream, stream)
                && handle.decode_state.load(Ordering::Relaxed) == decode_state
                && handle.members.load(Ordering::Relaxed) < GROUP_VIEWERS
        };
        if let Some(handle) = of_key.iter().find(fits) {
            handle.members.fetch_add(1, Ordering::Relaxed);
            handle.inbox.lock().push(arrival);
            handle.arrived.notify_one();
            return;
        }
        let handle = Arc::new(GroupHandle::new(stream.clone(), arrival.reader.position()));
        of_key.push(handle.clone());
        drop(groups);
        let number = self.next_group.fetch_add(1, Ordering::Relaxed);
        let group = Group::new(self.clone(), handle, arrival, number);
        self.spawn(group.run());
    }

    /// Spawns a task that runs `work` to its end, or until [`Viewers::cut`].
    pub(in crate::http) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        // There is no runtime while it shuts down, and nothing to serve then.
        let Ok(runtime) = Handle::try_current() else { return };
        let cut = self.cut.clone();
        let work = async move {
            let _panic_log = PanicLog;
            cut.run_until_cancelled(work).await;
        };
        self.tasks.spawn_on(work, &runtime);
    }
}

impl GroupHandle {
    /// The handle of a group whose first viewer is at `place`.
    pub(in crate::http) fn new(stream: Arc<Stream>, place: Option<Position>) -> Self {
        Self {
            stream,
            inbox: Mutex::default(),
            arrived: Notify::new(),
            members: AtomicUsize::new(1),
            decode_state: AtomicUsize::new(decode_state(place)),
        }
    }

    /// Takes the viewers out of the inbox.
    pub(in crate::http) fn take_inbox(&self) -> Vec<CaughtUp> {
        std::mem::take(&mut *self.inbox.lock())
    }

    pub(in crate::http) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Counts a viewer that has left the group.
    pub(in crate::http) fn left(&self) {
        self.members.fetch_sub(1, Ordering::Relaxed);
    }

    /// Publishes the group's position, so that only viewers that read the same tags are added to it.
    pub(in crate::http) fn set_position(&self, place: Option<Position>) {
        self.decode_state.store(decode_state(place), Ordering::Relaxed);
    }
}

/// Logs an error if the task that holds it panics: a bug that closes connections.
struct PanicLog;

impl Drop for PanicLog {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("HTTP task panicked; its connections are closed");
        }
    }
}

/// Readers at the same position read the same tags only if both or neither have read a key frame:
/// 1 if none was read, 2 if one was, and 0 for a reader that has lost its position.
fn decode_state(place: Option<Position>) -> usize {
    place.map_or(0, |place| 1 + usize::from(place.key_frame_seen))
}

/// Viewers per group: enough that the work per group costs next to nothing per viewer, and few enough
/// that the viewers of one stream use several cores and that a round, about 2 ms at most, does not
/// delay other streams.
pub(in crate::http) const GROUP_VIEWERS: usize = 256;
