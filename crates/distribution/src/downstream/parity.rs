//! The parity of one stream: an encoder for each matrix that at least one edge asks for.
//!
//! ```text
//!        first edge with the matrix              last edge with it gone
//! none ─────────────────────────────► encoding ─────────────────────────► flushed, none
//! ```
//!
//! Invariants: one encoder per matrix of the snapshot; the open rows of an encoder survive a change
//! of its targets; parity is never sent to an address that gets no media.

use std::{
    collections::HashSet,
    mem,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use prometheus::{IntCounter, Registry, register_int_counter_with_registry};
use tokio::sync::Notify;

use crate::downstream::{
    fanout::Train,
    routes::{Snapshot, Target},
};
use downpour_repair::{
    fec::{
        Encoder, PARITY_PORT_OFFSET,
        encoder::{Settings, Stats},
    },
    rtp::{Burst, Seq, Ssrc},
};

/// The parity encoders of one stream. Without any, a burst costs one comparison.
pub(super) struct ParityOut {
    media: Ssrc,
    encoders: Vec<Protected>,
    /// The snapshot that the encoders were last synchronized with.
    snapshot: Arc<Snapshot>,
    made: Vec<Bytes>,
    metrics: ParityMetrics,
    measured: Instant,
    overhead: f64,
}

struct Protected {
    encoder: Encoder,
    targets: Arc<[Target]>,
    /// Packet counts at the last measurement of the overhead.
    counted: Stats,
}

impl ParityOut {
    pub(super) fn new(now: Instant, media: Ssrc, metrics: ParityMetrics) -> Self {
        Self {
            media,
            encoders: Vec::new(),
            snapshot: Arc::default(),
            made: Vec::new(),
            metrics,
            measured: now,
            overhead: 0.0,
        }
    }

    /// Adds a burst to the encoders and sends the parity that is complete.
    pub(super) fn push(
        &mut self,
        now: Instant,
        burst: &Burst,
        snapshot: &Arc<Snapshot>,
        mut send: impl FnMut(Train, Arc<[Target]>),
    ) {
        self.sync_encoders(now, snapshot, &mut send);
        for protected in &mut self.encoders {
            protected.encoder.push_burst(now, burst, &mut self.made);
            send_parity(&mut self.made, &protected.targets, &self.metrics, &mut send);
        }
        self.measure(now);
    }

    /// Sends the parity that is due although no burst arrived.
    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        snapshot: &Arc<Snapshot>,
        mut send: impl FnMut(Train, Arc<[Target]>),
    ) {
        self.sync_encoders(now, snapshot, &mut send);
        for protected in &mut self.encoders {
            protected.encoder.handle_timeout(now, &mut self.made);
            send_parity(&mut self.made, &protected.targets, &self.metrics, &mut send);
        }
    }

    /// Sends the parity of the last packets: the stream is over.
    pub(super) fn finish(&mut self, now: Instant, mut send: impl FnMut(Train, Arc<[Target]>)) {
        for mut protected in self.encoders.drain(..) {
            protected.encoder.flush(now, &mut self.made);
            send_parity(&mut self.made, &protected.targets, &self.metrics, &mut send);
        }
    }

    /// `true` if any edge gets parity.
    pub(super) fn is_active(&self) -> bool {
        !self.encoders.is_empty()
    }

    /// Parity packets per media packet in the last second, of the matrix with the most.
    pub(super) fn overhead(&self) -> f64 {
        self.overhead
    }

    /// Creates encoders for new matrices of the snapshot and flushes those of matrices that are gone.
    fn sync_encoders(
        &mut self,
        now: Instant,
        snapshot: &Arc<Snapshot>,
        send: &mut impl FnMut(Train, Arc<[Target]>),
    ) {
        if Arc::ptr_eq(&self.snapshot, snapshot) {
            return;
        }
        self.snapshot = snapshot.clone();
        let mut before = mem::take(&mut self.encoders);
        for (matrix, targets) in &snapshot.parity {
            let held = before.iter().position(|held| held.encoder.matrix() == *matrix);
            let protected = match held {
                Some(at) => Protected { targets: targets.clone(), ..before.swap_remove(at) },
                None => {
                    let (ssrc, first) = (Ssrc(rand::random()), Seq(rand::random()));
                    let settings = Settings::new(*matrix);
                    Protected {
                        encoder: Encoder::new(settings, now, self.media, ssrc, first),
                        targets: targets.clone(),
                        counted: Stats::default(),
                    }
                }
            };
            self.encoders.push(protected);
        }
        if before.is_empty() {
            return;
        }
        // An address that gets no media may belong to another host by now.
        let served: HashSet<SocketAddr> = snapshot.media.iter().map(|media| media.addr).collect();
        let is_served = |target: &&Target| {
            let media_port = target.addr.port().saturating_sub(PARITY_PORT_OFFSET);
            served.contains(&target.addr)
                || served.contains(&SocketAddr::new(target.addr.ip(), media_port))
        };
        for mut gone in before {
            gone.encoder.flush(now, &mut self.made);
            let targets = gone.targets.iter().filter(is_served).copied().collect();
            send_parity(&mut self.made, &targets, &self.metrics, send);
        }
    }

    fn measure(&mut self, now: Instant) {
        if now.saturating_duration_since(self.measured) < MEASURED_OVER {
            return;
        }
        self.measured = now;
        self.overhead = 0.0;
        for Protected { encoder, counted, .. } in &mut self.encoders {
            let media = encoder.stats().media - counted.media;
            let parity = encoder.stats().parity - counted.parity;
            *counted = *encoder.stats();
            self.overhead = self.overhead.max(parity as f64 / media.max(1) as f64);
        }
    }
}

/// Counters of the parity of all streams.
#[derive(Debug, Clone)]
pub(super) struct ParityMetrics {
    packets: IntCounter,
    bytes: IntCounter,
}

impl ParityMetrics {
    /// Creates the counters and registers them.
    ///
    /// # Errors
    /// If their names are taken.
    pub(super) fn register(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            packets: register_int_counter_with_registry!(
                "downpour_fec_packets_total",
                "Parity packets made, each counted once however many edges it goes to",
                registry
            )?,
            bytes: register_int_counter_with_registry!(
                "downpour_fec_bytes_total",
                "Bytes of parity packets made",
                registry
            )?,
        })
    }
}

/// Number of streams with encoders, so that the parity timer sleeps while there are none.
#[derive(Default)]
pub(super) struct ParityWatch {
    active: AtomicUsize,
    began: Notify,
}

impl ParityWatch {
    /// Waits until a stream has encoders.
    pub(super) async fn until_any(&self) {
        while self.active.load(Ordering::Acquire) == 0 {
            self.began.notified().await;
        }
    }
}

/// `true` while one stream has encoders. Dropping it clears it.
pub(super) struct ParityFlag {
    watch: Arc<ParityWatch>,
    is_set: Arc<AtomicBool>,
}

impl ParityFlag {
    pub(super) fn new(watch: Arc<ParityWatch>) -> Self {
        Self { watch, is_set: Arc::default() }
    }

    /// A reader of the flag.
    pub(super) fn reader(&self) -> Arc<AtomicBool> {
        self.is_set.clone()
    }

    pub(super) fn set(&self, active: bool) {
        if self.is_set.load(Ordering::Relaxed) == active {
            return;
        }
        self.is_set.store(active, Ordering::Release);
        if active {
            self.watch.active.fetch_add(1, Ordering::AcqRel);
            self.watch.began.notify_one();
        } else {
            self.watch.active.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Drop for ParityFlag {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// Counts the parity packets in `made` and sends them.
fn send_parity(
    made: &mut Vec<Bytes>,
    targets: &Arc<[Target]>,
    metrics: &ParityMetrics,
    send: &mut impl FnMut(Train, Arc<[Target]>),
) {
    if made.is_empty() {
        return;
    }
    metrics.packets.inc_by(made.len() as u64);
    metrics.bytes.inc_by(made.iter().map(|packet| packet.len() as u64).sum());
    for train in Train::collect(made.drain(..)) {
        send(train, targets.clone());
    }
}

/// Period over which the overhead is measured.
const MEASURED_OVER: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_media::flv::{Tag, TagKind};
    use downpour_repair::{fec::Matrix, rtp::Packetizer};

    const MEDIA: Ssrc = Ssrc(9);

    struct World {
        out: ParityOut,
        packetizer: Packetizer,
        now: Instant,
        /// Addresses and numbers of packets sent, in the order of the encoders.
        sent: Vec<(SocketAddr, usize)>,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let metrics = ParityMetrics::register(&Registry::new()).unwrap();
            let out = ParityOut::new(now, MEDIA, metrics);
            Self { out, packetizer: Packetizer::new(MEDIA, 1120), now, sent: Vec::new() }
        }

        /// Pushes a frame of `packets` packets, 40 ms after the previous one.
        fn push(&mut self, packets: usize, snapshot: &Arc<Snapshot>) {
            self.now += Duration::from_millis(40);
            let tag = Tag::new(TagKind::Video, 0, &vec![7; packets * 1120 - 20]).unwrap();
            let burst = self.packetizer.packetize(&tag);
            assert_eq!(burst.count(), packets);
            let sent = &mut self.sent;
            self.out.push(self.now, &burst, snapshot, |train, to| note(sent, &train, &to));
        }

        fn wait(&mut self, time: Duration, snapshot: &Arc<Snapshot>) {
            self.now += time;
            let sent = &mut self.sent;
            self.out.handle_timeout(self.now, snapshot, |train, to| note(sent, &train, &to));
        }

        fn take_sent(&mut self) -> Vec<(SocketAddr, usize)> {
            mem::take(&mut self.sent)
        }
    }

    fn note(sent: &mut Vec<(SocketAddr, usize)>, train: &Train, targets: &[Target]) {
        sent.extend(targets.iter().map(|target| (target.addr, train.packets())));
    }

    fn addr(port: u16) -> SocketAddr {
        ([10, 0, 0, 1], port).into()
    }

    fn snapshot(media: &[u16], parity: &[((u8, u8), u16)]) -> Arc<Snapshot> {
        let target = |port: &u16| Target::from(addr(*port));
        let parity = parity.iter().map(|((columns, rows), port)| {
            (Matrix::new(*columns, *rows).unwrap(), Arc::from([target(port)]))
        });
        let media = media.iter().map(target).collect();
        Arc::new(Snapshot { media, parity: parity.collect(), ..Snapshot::default() })
    }

    #[test]
    fn encoders_live_as_long_as_an_edge_wants_their_matrix() {
        let mut world = World::new();
        let nobody = snapshot(&[10], &[]);
        world.push(10, &nobody);
        assert!(!world.out.is_active() && world.take_sent().is_empty());

        let rows = snapshot(&[10], &[((5, 1), 12)]);
        world.push(10, &rows);
        assert_eq!(world.take_sent(), [(addr(12), 2)], "two rows, in one train");
        let first = world.out.encoders[0].encoder.ssrc();

        // A second matrix is added; the open row of the first one continues.
        let both = snapshot(&[10, 20], &[((10, 1), 20), ((5, 1), 12)]);
        world.push(3, &rows);
        world.push(2, &both);
        assert_eq!(world.take_sent(), [(addr(12), 1)]);
        assert_eq!(world.out.encoders[1].encoder.ssrc(), first);
        assert_ne!(world.out.encoders[0].encoder.ssrc(), first);
        world.push(8, &both);
        assert_eq!(world.take_sent(), [(addr(20), 1), (addr(12), 1)]);

        // The first one is removed: its open row goes to the edge, which still gets the media.
        let second = snapshot(&[10, 20], &[((10, 1), 20)]);
        world.push(1, &second);
        assert_eq!(world.take_sent(), [(addr(12), 1)]);
        // The second one is removed with its edge: nothing is sent.
        world.wait(Duration::from_millis(1), &nobody);
        assert!(!world.out.is_active() && world.take_sent().is_empty());
        assert_eq!(world.out.metrics.packets.get(), 7);
        assert!(world.out.metrics.bytes.get() > 7 * 1120);
    }

    #[test]
    fn parity_is_sent_in_a_pause_and_at_the_end() {
        let mut world = World::new();
        let rows = snapshot(&[10], &[((5, 1), 12)]);
        world.push(2, &rows);
        world.wait(Duration::from_millis(20), &rows);
        assert_eq!(world.take_sent(), []);
        world.wait(Duration::from_millis(40), &rows);
        assert_eq!(world.take_sent(), [(addr(12), 1)]);
        world.push(1, &rows);
        let (now, sent) = (world.now, &mut world.sent);
        world.out.finish(now, |train, to| note(sent, &train, &to));
        assert_eq!(world.take_sent(), [(addr(12), 1)]);
        assert!(!world.out.is_active());
    }

    #[test]
    fn the_overhead_is_parity_per_media_packet() {
        let mut world = World::new();
        let rows = snapshot(&[10], &[((5, 1), 12), ((10, 1), 14)]);
        (0..60).for_each(|_| world.push(5, &rows));
        assert!((world.out.overhead() - 0.2).abs() < 0.02, "{}", world.out.overhead());
        let nobody = snapshot(&[10], &[]);
        (0..60).for_each(|_| world.push(5, &nobody));
        assert_eq!(world.out.overhead(), 0.0);
    }

    #[tokio::test]
    async fn the_parity_timer_waits_until_a_stream_has_encoders() {
        let watch = Arc::new(ParityWatch::default());
        let flags = [(); 2].map(|()| ParityFlag::new(watch.clone()));
        let any = async |within| tokio::time::timeout(within, watch.until_any()).await.is_ok();
        assert!(!any(Duration::ZERO).await);
        flags.iter().for_each(|flag| flag.set(true));
        assert!(any(Duration::from_secs(5)).await);
        flags[0].set(false);
        assert!(any(Duration::from_secs(5)).await);
        drop(flags);
        assert!(!any(Duration::ZERO).await);
    }
}
