//! Who watches: viewers that keep up are written to in groups, the others each at its own pace.
//!
//! A group ([`Group`]) has a task and a cursor in the stream's log. A viewer that cannot take all
//! that its group writes leaves it for a task of its own, and comes back once it has caught up.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
};

use tokio::{runtime::Handle, sync::Notify};
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

use super::{
    group::Group,
    metrics::HttpMetrics,
    viewer::{Batch, Counted, Viewer, ViewerSettings},
};
use downpour_hub::{Position, Reader, Stream};
use downpour_media::StreamKey;

/// All viewers of a node.
pub(super) struct Viewers {
    pub(super) settings: ViewerSettings,
    pub(super) metrics: HttpMetrics,
    groups: Mutex<HashMap<StreamKey, Vec<Arc<GroupHandle>>>>,
    tasks: TaskTracker,
    cut: CancellationToken,
    /// Groups that ever were.
    serial: AtomicU32,
}

/// A viewer that has read all there was, and its reader.
pub(super) struct CaughtUp {
    pub(super) viewer: Viewer,
    pub(super) reader: Reader,
}

/// Where viewers come to a group.
pub(super) struct GroupHandle {
    stream: Arc<Stream>,
    arrivals: Mutex<Vec<CaughtUp>>,
    pub(super) came: Notify,
    /// Viewers of the group, those included that have just come.
    members: AtomicUsize,
    kind: AtomicUsize,
}

impl Viewers {
    pub(super) fn new(settings: ViewerSettings, metrics: HttpMetrics) -> Self {
        Self {
            settings,
            metrics,
            groups: Mutex::default(),
            tasks: TaskTracker::new(),
            cut: CancellationToken::new(),
            serial: AtomicU32::new(0),
        }
    }

    /// Begins with a viewer: the response's head, the newest group of pictures, and on.
    pub(super) fn join(self: &Arc<Self>, viewer: Viewer, stream: &Arc<Stream>) {
        let reader = stream.subscribe().waking_with_video().with_max_lag(self.settings.backlog);
        let audience = self.clone();
        let behind = Counted::new(&self.metrics.viewers_behind);
        self.spawn(async move {
            match viewer.greet(audience.settings.write_timeout).await {
                Ok(()) => audience.catch_up(viewer, reader, Batch::beginning(), behind).await,
                Err(closed) => viewer.close(&closed, &audience.metrics),
            }
        });
    }

    /// Lets a viewer go on by itself: `batch` first, and then what `reader` reads, until it has
    /// caught up.
    pub(super) fn serve_alone(self: &Arc<Self>, viewer: Viewer, reader: Reader, batch: Batch) {
        let audience = self.clone();
        let behind = Counted::new(&self.metrics.viewers_behind);
        self.spawn(async move { audience.catch_up(viewer, reader, batch, behind).await });
    }

    /// Waits until nobody watches any more. Nobody may come from now on.
    pub(super) async fn gone(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Cuts everyone off when it is dropped.
    pub(super) fn cut_at_end(&self) -> DropGuard {
        self.cut.clone().drop_guard()
    }

    /// Cuts everyone off.
    pub(super) async fn cut(&self) {
        self.cut.cancel();
        self.gone().await;
    }

    /// Takes a group off the list; gives the viewers that have come to it and were not seen yet.
    pub(super) fn retire(&self, desk: &Arc<GroupHandle>) -> Vec<CaughtUp> {
        let mut groups = self.groups();
        if let Some(of_key) = groups.get_mut(desk.stream.key()) {
            of_key.retain(|other| !Arc::ptr_eq(other, desk));
            if of_key.is_empty() {
                groups.remove(desk.stream.key());
            }
        }
        desk.arrivals()
    }

    async fn catch_up(
        self: &Arc<Self>,
        mut viewer: Viewer,
        mut reader: Reader,
        batch: Batch,
        behind: Counted,
    ) {
        let done = viewer.catch_up(&mut reader, batch, &self.settings, &self.metrics).await;
        match done {
            Ok(()) => {
                drop(behind);
                self.assign_group(CaughtUp { viewer, reader });
            }
            Err(closed) => viewer.close(&closed, &self.metrics),
        }
    }

    /// Brings a viewer that has caught up to a group of its stream, a new one if need be.
    fn assign_group(self: &Arc<Self>, arrival: CaughtUp) {
        let stream = arrival.reader.stream();
        let kind = kind(arrival.reader.position());
        let mut groups = self.groups();
        let of_key = groups.entry(stream.key().clone()).or_default();
        let fits = |desk: &&Arc<GroupHandle>| {
            Arc::ptr_eq(&desk.stream, stream)
                && desk.kind.load(Ordering::Relaxed) == kind
                && desk.members.load(Ordering::Relaxed) < GROUP_VIEWERS
        };
        if let Some(desk) = of_key.iter().find(fits) {
            desk.members.fetch_add(1, Ordering::Relaxed);
            desk.queue().push(arrival);
            desk.came.notify_one();
            return;
        }
        let desk = Arc::new(GroupHandle::new(stream.clone(), arrival.reader.position()));
        of_key.push(desk.clone());
        drop(groups);
        let number = self.serial.fetch_add(1, Ordering::Relaxed);
        let group = Group::new(self.clone(), desk, arrival, number);
        self.spawn(group.run());
    }

    /// Runs `work` until its end, or until [`Viewers::cut`].
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        // Without a runtime, which is the case while it shuts down, there is nothing to be served.
        let Ok(runtime) = Handle::try_current() else { return };
        let cut = self.cut.clone();
        let work = async move {
            let _witness = PanicLog;
            cut.run_until_cancelled(work).await;
        };
        self.tasks.spawn_on(work, &runtime);
    }

    fn groups(&self) -> MutexGuard<'_, HashMap<StreamKey, Vec<Arc<GroupHandle>>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl GroupHandle {
    /// That of a group whose first viewer is at `place`.
    pub(super) fn new(stream: Arc<Stream>, place: Option<Position>) -> Self {
        Self {
            stream,
            arrivals: Mutex::default(),
            came: Notify::new(),
            members: AtomicUsize::new(1),
            kind: AtomicUsize::new(kind(place)),
        }
    }

    /// The viewers that have come and were not seen yet.
    pub(super) fn arrivals(&self) -> Vec<CaughtUp> {
        std::mem::take(&mut *self.queue())
    }

    pub(super) fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Tells that a viewer has left the group.
    pub(super) fn left(&self) {
        self.members.fetch_sub(1, Ordering::Relaxed);
    }

    /// Tells where the group is, so that only those come to it who read what it reads.
    pub(super) fn stand_at(&self, place: Option<Position>) {
        self.kind.store(kind(place), Ordering::Relaxed);
    }

    fn queue(&self) -> MutexGuard<'_, Vec<CaughtUp>> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Logs an error when the task that holds it panics: connections were lost to a bug.
struct PanicLog;

impl Drop for PanicLog {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a task of HTTP connections panicked; they are closed");
        }
    }
}

/// Readers at one place read the same from there on only if they agree on whether a key frame has
/// been read; one that has lost its place agrees with nobody.
fn kind(place: Option<Position>) -> usize {
    place.map_or(0, |place| 1 + usize::from(place.key_frame_seen))
}

/// Viewers in one group: enough that what a group does once costs next to nothing for each, few
/// enough that one stream's viewers keep several cores busy and that a round, at most some 2 ms in one
/// go, does not hold up another stream's for long.
pub(super) const GROUP_VIEWERS: usize = 256;
