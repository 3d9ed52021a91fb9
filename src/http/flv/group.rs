//! A group of viewers that keep up with their stream, served by one task.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};

use super::{
    viewer::{Closed, Viewer, WriteQueue, note_skip},
    viewers::{CaughtUp, GroupHandle, Viewers},
};
use downpour_hub::{ReadOutcome, Reader};
use downpour_sys::buffer::Buffer;

/// A group of viewers.
///
/// Per frame, the group reads the log once, concatenates the tags once, and offers the bytes to each
/// viewer in one write. A viewer whose socket does not take all of them leaves the group.
pub(super) struct Group {
    viewers: Arc<Viewers>,
    handle: Arc<GroupHandle>,
    reader: Reader,
    members: Vec<Member>,
    /// The tags of this round with their indices in the log, and their concatenated bytes.
    tags: Vec<(u64, Buffer)>,
    bytes: Vec<u8>,
    timer: Interval,
    checked: Instant,
}

struct Member {
    viewer: Viewer,
    /// Index in the log of the first tag that this viewer has not read. Matters only until the group
    /// has passed it.
    from: u64,
}

/// The result of a round.
enum Round {
    /// Wait for the next wake-up.
    Idle,
    /// There may be more to read.
    More,
    /// The stream has ended.
    Over,
}

impl Group {
    /// `number` is different for each group: it determines the phase of the group's timer.
    pub(super) fn new(
        viewers: Arc<Viewers>,
        handle: Arc<GroupHandle>,
        first: CaughtUp,
        number: u32,
    ) -> Self {
        let merge = viewers.settings.merge_write;
        let period = if merge.is_zero() { CHECK } else { merge };
        // Spreads the timers of any number of groups evenly (golden section), so that they do not all
        // write at the same time.
        let phase = period.mul_f64((f64::from(number) * 0.618_034).fract());
        let now = Instant::now();
        let mut timer = interval_at(now + phase, period);
        timer.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut group = Self {
            reader: first.reader.clone(),
            viewers,
            handle,
            members: Vec::new(),
            tags: Vec::new(),
            bytes: Vec::new(),
            timer,
            checked: now,
        };
        group.admit(first);
        group
    }

    pub(super) async fn run(mut self) {
        let merges = !self.viewers.settings.merge_write.is_zero();
        let stream = self.handle.stream().clone();
        let mut over = std::pin::pin!(stream.over());
        loop {
            tokio::select! {
                () = self.handle.arrived.notified() => {
                    for arrival in self.handle.take_inbox() {
                        self.admit(arrival);
                    }
                    continue;
                }
                () = self.reader.woken(), if !merges => {}
                // Completes once: the round below finds the end of the stream.
                () = &mut over, if merges => {}
                _ = self.timer.tick() => {
                    if self.checked.elapsed() >= CHECK {
                        self.check();
                    }
                    if self.members.is_empty() {
                        break;
                    }
                }
            }
            loop {
                match self.round().await {
                    Round::Idle => break,
                    Round::More => tokio::task::yield_now().await,
                    Round::Over => return self.end(),
                }
            }
        }
    }

    /// Adds a viewer, unless the group has read further since the viewer caught up.
    fn admit(&mut self, arrival: CaughtUp) {
        let CaughtUp { viewer, reader } = arrival;
        let Some(place) = reader.position() else {
            return self.dismiss(viewer, reader, WriteQueue::EMPTY);
        };
        if self.members.is_empty() {
            self.reader = reader;
            self.handle.set_position(Some(place));
        } else if self
            .reader
            .position()
            .is_none_or(|own| own.key_frame_seen != place.key_frame_seen || own.index > place.index)
        {
            return self.dismiss(viewer, reader, WriteQueue::EMPTY);
        }
        self.members.push(Member { viewer, from: place.index });
    }

    /// Reads the new tags, and writes them to all members.
    async fn round(&mut self) -> Round {
        let start = self.reader.position().map_or(0, |place| place.index);
        let (tags, bytes) = (&mut self.tags, &mut self.bytes);
        let outcome = self.reader.try_read_each(ROUND_BYTES, |index, tag| {
            tags.push((index, tag.framed().clone()));
        });
        match outcome {
            ReadOutcome::Read(count) => {
                tags.iter().for_each(|(_, tag)| bytes.extend_from_slice(tag));
                self.handle.set_position(self.reader.position());
                self.note_skip(count.skipped);
                self.write(start).await;
                self.tags.clear();
                self.bytes.clear();
                self.bytes.shrink_to(KEPT_BYTES.saturating_mul(self.members.len()));
                // A tag that arrived during the writes waits for the next frame, as any other.
                match count.bytes >= ROUND_BYTES || self.reader.stream().ended() {
                    true => Round::More,
                    false => Round::Idle,
                }
            }
            ReadOutcome::Pending => {
                self.handle.set_position(self.reader.position());
                Round::Idle
            }
            ReadOutcome::Ended => Round::Over,
        }
    }

    /// Counts the tags that each member missed when the reader skipped `skipped` tags. Members that
    /// were ahead of the group have read some of them.
    fn note_skip(&self, skipped: u64) {
        let Some((join, _)) = self.tags.first().filter(|_| skipped > 0) else { return };
        let start = join.saturating_sub(skipped);
        let missed = self.members.iter().map(|member| join.saturating_sub(member.from.max(start)));
        let (stream, metrics) = (self.reader.stream(), &self.viewers.metrics);
        note_skip(stream, missed.sum(), self.members.len(), metrics);
    }

    /// Offers the tags of this round to each member. Yields to other tasks every [`TURN_BYTES`].
    async fn write(&mut self, start: u64) {
        let mut sent = 0;
        let mut next = 0;
        while let Some(member) = self.members.get_mut(next) {
            if sent >= TURN_BYTES {
                self.viewers.metrics.bytes.inc_by(std::mem::take(&mut sent) as u64);
                tokio::task::yield_now().await;
                continue;
            }
            let begin = match member.from > start {
                true => length(self.tags.iter().take_while(|(index, _)| *index < member.from)),
                false => 0,
            };
            let due = self.bytes.get(begin..).unwrap_or_default();
            if due.is_empty() {
                next += 1;
                continue;
            }
            match member.viewer.offer(due) {
                Ok(written) => {
                    sent += written;
                    if written == due.len() {
                        next += 1;
                        continue;
                    }
                    let viewer = self.members.swap_remove(next).viewer;
                    let tags = self.tags.iter().map(|(_, tag)| tag.clone()).collect();
                    let queue = WriteQueue::new(tags, begin + written);
                    self.dismiss(viewer, self.reader.clone(), queue);
                }
                Err(closed) => self.close(next, &closed),
            }
        }
        self.viewers.metrics.bytes.inc_by(sent as u64);
    }

    /// Closes members whose client has left: without tags to write, nothing else shows that.
    fn check(&mut self) {
        self.checked = Instant::now();
        let mut next = 0;
        while let Some(member) = self.members.get_mut(next) {
            match member.viewer.check_all() {
                Ok(()) => next += 1,
                Err(closed) => self.close(next, &closed),
            }
        }
    }

    fn close(&mut self, member: usize, reason: &Closed) {
        self.handle.left();
        self.members.swap_remove(member).viewer.close(reason, &self.viewers.metrics);
    }

    /// Removes a viewer from the group: it continues in a separate task.
    fn dismiss(&self, viewer: Viewer, reader: Reader, queue: WriteQueue) {
        self.handle.left();
        self.viewers.serve_alone(viewer, reader, queue);
    }

    fn end(mut self) {
        for Member { viewer, .. } in self.members.drain(..) {
            viewer.close(&Closed::Ended, &self.viewers.metrics);
        }
    }
}

/// Viewers that are still in the inbox continue alone, however the group ended.
impl Drop for Group {
    fn drop(&mut self) {
        for CaughtUp { viewer, reader } in self.viewers.retire(&self.handle) {
            self.viewers.serve_alone(viewer, reader, WriteQueue::EMPTY);
        }
    }
}

fn length<'a>(tags: impl Iterator<Item = &'a (u64, Buffer)>) -> usize {
    tags.map(|(_, tag)| tag.len()).sum()
}

/// Bytes written per viewer and round; whole tags, so it may be more.
const ROUND_BYTES: usize = 256 * 1024;
/// Bytes that a group writes to all its members before it yields: the kernel copies them in about a
/// millisecond. Frames under 4 KB to a full group stay below it.
const TURN_BYTES: usize = 1024 * 1024;
/// Bytes of buffer per viewer that a group keeps between rounds. There may be many groups of one
/// viewer.
const KEPT_BYTES: usize = 4 * 1024;
/// Interval at which a group checks for viewers that have left, and sends audio that no video frame
/// has followed.
const CHECK: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, sync::atomic::Ordering};

    use prometheus::Registry;
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::{
        http::{HttpMetrics, ViewerSettings, connection::play_request, flv::viewer::Connection},
        net::Slot,
    };
    use downpour_hub::{Admission, Hub, LogLimits, MaxLag, Publisher, admission};
    use downpour_media::flv::{Tag, TagKind};

    #[tokio::test]
    async fn skip_counts_less_for_a_viewer_ahead_of_its_group() {
        let mut site = Site::new();
        site.publisher.push(video_header());
        site.push(0..3);
        let mut group = site.group().await;
        site.push(3..8);
        let ahead = site.arrival().await;
        group.admit(ahead);
        assert_eq!(group.members.len(), 2);
        // The group is 3 s behind, with a maximum of 2 s: it skips to frame 75.
        site.push(8..76);
        assert!(matches!(group.round().await, Round::Idle));
        let skipped = (75 - 3) + (75 - 8);
        assert_eq!(site.viewers.metrics.skipped_tags.get(), skipped);
        let counters = site.publisher.stream().counters();
        assert_eq!(counters.skipped_tags.load(Ordering::Relaxed), skipped);
    }

    #[tokio::test]
    async fn long_rounds_yield_to_other_tasks() {
        // Bytes per frame, and the minimum and maximum of yields while 20 viewers are sent it.
        for (frame_bytes, least, most) in [(1_000, 0, 0), (200_000, 3, 20)] {
            let mut site = Site::new();
            site.frame_bytes = frame_bytes;
            site.push(0..1);
            let mut group = site.group().await;
            for _ in 1..20 {
                let arrival = site.arrival().await;
                group.admit(arrival);
            }
            site.push(1..2);
            let mut turns = 0;
            {
                let mut round = std::pin::pin!(group.round());
                let round = std::future::poll_fn(|context| {
                    let poll = round.as_mut().poll(context);
                    turns += usize::from(poll.is_pending());
                    poll
                });
                assert!(matches!(round.await, Round::Idle));
            }
            assert!((least..=most).contains(&turns), "{turns} turns for {frame_bytes} bytes");
            let sent = site.viewers.metrics.bytes.get();
            assert!(sent >= 20 * frame_bytes as u64, "{sent} bytes were sent");
            assert_eq!(group.members.len(), 20);
        }
    }

    /// A stream of 25 frames per second, and its viewers.
    struct Site {
        viewers: Arc<Viewers>,
        admission: Admission,
        publisher: Publisher,
        /// The client ends of the viewers' connections.
        clients: Vec<TcpStream>,
        frame_bytes: usize,
    }

    impl Site {
        fn new() -> Self {
            let hub = Hub::new(LogLimits { max_bytes: 64 << 20, max_age: 60_000 });
            let settings = ViewerSettings {
                backlog: MaxLag { max_ms: 2_000, max_bytes: u64::MAX },
                ..ViewerSettings::default()
            };
            let metrics = HttpMetrics::register(&Registry::new()).unwrap();
            let viewers = Arc::new(Viewers::new(settings, metrics));
            let publisher = hub.publish("live/movie".parse().unwrap()).unwrap();
            let admission = Admission::new(hub, admission::Settings::default());
            Self { viewers, admission, publisher, clients: Vec::new(), frame_bytes: 100 }
        }

        fn push(&mut self, frames: std::ops::Range<u32>) {
            for frame in frames {
                let mut body = vec![0; self.frame_bytes];
                body[..2].copy_from_slice(&[if frame % 25 == 0 { 0x17 } else { 0x27 }, 1]);
                self.publisher.push(Tag::new(TagKind::Video, frame * 40, &body).unwrap());
            }
        }

        /// A viewer that has read the log to its end.
        async fn arrival(&mut self) -> CaughtUp {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let address = listener.local_addr().unwrap();
            let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
            let (socket, peer) = accepted.unwrap();
            socket2::SockRef::from(&socket).set_send_buffer_size(1 << 20).unwrap();
            self.clients.push(client.unwrap());
            let (stream, metrics) = (self.publisher.stream(), &self.viewers.metrics);
            let playback = self.admission.play(play_request(peer, stream.key(), "")).await.unwrap();
            let connection = Connection::new(peer, Slot::alone(), metrics);
            let viewer = Viewer::new(socket, connection, playback, metrics);
            let mut reader = stream.subscribe().with_max_lag(self.viewers.settings.backlog);
            while let ReadOutcome::Read(_) = reader.try_read_each(usize::MAX, |_, _| {}) {}
            CaughtUp { viewer, reader }
        }

        async fn group(&mut self) -> Group {
            let first = self.arrival().await;
            let handle = Arc::new(GroupHandle::new(
                self.publisher.stream().clone(),
                first.reader.position(),
            ));
            Group::new(self.viewers.clone(), handle, first, 0)
        }
    }

    fn video_header() -> Tag {
        Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap()
    }
}
