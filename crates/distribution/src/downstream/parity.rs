//! One publication's parity on its way out: an encoder for each matrix that somebody is to get.

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

/// The encoders of one publication. Without any, a burst costs it one comparison.
pub(super) struct ParityOut {
    media: Ssrc,
    encoders: Vec<Protected>,
    /// Whose matrices the encoders have.
    snapshot: Arc<Snapshot>,
    made: Vec<Bytes>,
    metrics: ParityMetrics,
    measured: Instant,
    overhead: f64,
}

struct Protected {
    encoder: Encoder,
    targets: Arc<[Target]>,
    /// When the overhead was measured last.
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

    /// Protects a burst, and gives `send` what is due.
    pub(super) fn push(
        &mut self,
        now: Instant,
        burst: &Burst,
        snapshot: &Arc<Snapshot>,
        mut send: impl FnMut(Train, Arc<[Target]>),
    ) {
        self.follow(now, snapshot, &mut send);
        for protected in &mut self.encoders {
            protected.encoder.push_burst(now, burst, &mut self.made);
            hand_over(&mut self.made, &protected.targets, &self.metrics, &mut send);
        }
        self.measure(now);
    }

    /// Gives what is due where no burst comes.
    pub(super) fn handle_timeout(
        &mut self,
        now: Instant,
        snapshot: &Arc<Snapshot>,
        mut send: impl FnMut(Train, Arc<[Target]>),
    ) {
        self.follow(now, snapshot, &mut send);
        for protected in &mut self.encoders {
            protected.encoder.handle_timeout(now, &mut self.made);
            hand_over(&mut self.made, &protected.targets, &self.metrics, &mut send);
        }
    }

    /// The publication is over: gives the parity of its tail.
    pub(super) fn finish(&mut self, now: Instant, mut send: impl FnMut(Train, Arc<[Target]>)) {
        for mut protected in self.encoders.drain(..) {
            protected.encoder.flush(now, &mut self.made);
            hand_over(&mut self.made, &protected.targets, &self.metrics, &mut send);
        }
    }

    /// Whether anybody is to get parity.
    pub(super) fn is_active(&self) -> bool {
        !self.encoders.is_empty()
    }

    /// Parity packets a media packet during the last second: the most that any receiver gets.
    pub(super) fn overhead(&self) -> f64 {
        self.overhead
    }

    /// Has an encoder for each matrix of the snapshot, and no other.
    fn follow(
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
        // Who is sent no media any more may have lost its address to somebody else.
        let served: HashSet<SocketAddr> = snapshot.media.iter().map(|media| media.addr).collect();
        let is_served = |target: &&Target| {
            let media_port = target.addr.port().saturating_sub(PARITY_PORT_OFFSET);
            served.contains(&target.addr)
                || served.contains(&SocketAddr::new(target.addr.ip(), media_port))
        };
        for mut gone in before {
            gone.encoder.flush(now, &mut self.made);
            let targets = gone.targets.iter().filter(is_served).copied().collect();
            hand_over(&mut self.made, &targets, &self.metrics, send);
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

/// What parity was made, of all publications.
#[derive(Debug, Clone)]
pub(super) struct ParityMetrics {
    packets: IntCounter,
    bytes: IntCounter,
}

impl ParityMetrics {
    /// Makes the handles and registers them.
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

/// Knows whether any publication has encoders, so that a clock need not run when none has.
#[derive(Default)]
pub(super) struct ParityWatch {
    active: AtomicUsize,
    began: Notify,
}

impl ParityWatch {
    /// Waits until a publication has encoders.
    pub(super) async fn until_any(&self) {
        while self.active.load(Ordering::Acquire) == 0 {
            self.began.notified().await;
        }
    }
}

/// Whether one publication has encoders.
pub(super) struct ParityFlag {
    watch: Arc<ParityWatch>,
    is_set: Arc<AtomicBool>,
}

impl ParityFlag {
    pub(super) fn new(watch: Arc<ParityWatch>) -> Self {
        Self { watch, is_set: Arc::default() }
    }

    /// The flag, to read.
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

fn hand_over(
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
        /// To whom packets went, in the order of the encoders.
        sent: Vec<(SocketAddr, usize)>,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let metrics = ParityMetrics::register(&Registry::new()).unwrap();
            let out = ParityOut::new(now, MEDIA, metrics);
            Self { out, packetizer: Packetizer::new(MEDIA, 1120), now, sent: Vec::new() }
        }

        /// A frame of so many packets, 40 ms after the one before.
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
        let target = |port: &u16| Target { addr: addr(*port) };
        let parity = parity.iter().map(|((columns, rows), port)| {
            (Matrix::new(*columns, *rows).unwrap(), Arc::from([target(port)]))
        });
        Arc::new(Snapshot { media: media.iter().map(target).collect(), parity: parity.collect() })
    }

    #[test]
    fn encoders_come_and_go_with_those_who_want_their_parity() {
        let mut world = World::new();
        let nobody = snapshot(&[10], &[]);
        world.push(10, &nobody);
        assert!(!world.out.is_active() && world.take_sent().is_empty());

        let rows = snapshot(&[10], &[((5, 1), 12)]);
        world.push(10, &rows);
        assert_eq!(world.take_sent(), [(addr(12), 2)], "two rows, in one train");
        let first = world.out.encoders[0].encoder.ssrc();

        // Another matrix comes; the first one's open row goes on.
        let both = snapshot(&[10, 20], &[((10, 1), 20), ((5, 1), 12)]);
        world.push(3, &rows);
        world.push(2, &both);
        assert_eq!(world.take_sent(), [(addr(12), 1)]);
        assert_eq!(world.out.encoders[1].encoder.ssrc(), first);
        assert_ne!(world.out.encoders[0].encoder.ssrc(), first);
        world.push(8, &both);
        assert_eq!(world.take_sent(), [(addr(20), 1), (addr(12), 1)]);

        // The first one goes: what is open is sent to who still gets the media.
        let second = snapshot(&[10, 20], &[((10, 1), 20)]);
        world.push(1, &second);
        assert_eq!(world.take_sent(), [(addr(12), 1)]);
        // And so the second, whose receiver is gone.
        world.wait(Duration::from_millis(1), &nobody);
        assert!(!world.out.is_active() && world.take_sent().is_empty());
        assert_eq!(world.out.metrics.packets.get(), 7);
        assert!(world.out.metrics.bytes.get() > 7 * 1120);
    }

    #[test]
    fn a_pause_and_the_end_have_their_parity_too() {
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
    fn the_overhead_is_what_was_sent() {
        let mut world = World::new();
        let rows = snapshot(&[10], &[((5, 1), 12), ((10, 1), 14)]);
        (0..60).for_each(|_| world.push(5, &rows));
        assert!((world.out.overhead() - 0.2).abs() < 0.02, "{}", world.out.overhead());
        let nobody = snapshot(&[10], &[]);
        (0..60).for_each(|_| world.push(5, &nobody));
        assert_eq!(world.out.overhead(), 0.0);
    }

    #[tokio::test]
    async fn who_waits_for_encoders_sees_them_come_and_go() {
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
