//! How the edge shows the cloud where one of its RTP sockets is.

use std::time::{Duration, Instant};

use prometheus::{
    IntCounterVec, IntGaugeVec, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_gauge_vec_with_registry,
};

use downpour_repair::{
    control::Nonce,
    probe::{ProbeMessage, mark},
};

/// One path: when to probe, and what to answer. `Instant`s in, messages out.
#[derive(Debug)]
pub struct Prober {
    path: u8,
    session: Option<Session>,
}

/// As long as one connection to the cloud lasts.
#[derive(Debug)]
struct Session {
    nonce: Nonce,
    began: Instant,
    interval: Duration,
    next: Instant,
    up: bool,
    /// When anything last came to the socket.
    heard: Option<Instant>,
    complained: bool,
}

impl Prober {
    /// A path that is not probed yet.
    pub fn new(path: u8) -> Self {
        Self { path, session: None }
    }

    /// The cloud said welcome: probe from now on.
    pub fn start(&mut self, now: Instant, nonce: Nonce) {
        let (interval, next) = (PROBE_EVERY, now);
        let (up, heard, complained) = (false, None, false);
        self.session = Some(Session { nonce, began: now, interval, next, up, heard, complained });
    }

    /// The connection to the cloud is gone, and with it the nonce.
    pub fn stop(&mut self) {
        self.session = None;
    }

    /// Something came to the socket.
    pub fn heard(&mut self, now: Instant) {
        if let Some(session) = &mut self.session {
            session.heard = Some(now);
        }
    }

    /// The cloud says that RTP goes to this path.
    pub fn path_up(&mut self, now: Instant) {
        if let Some(session) = &mut self.session {
            session.up = true;
            session.next = now + RECHECK_EVERY;
        }
    }

    /// The proof that a challenge asks for; `None` if it is not for this path, or not the cloud's.
    pub fn handle_challenge(&self, message: ProbeMessage) -> Option<ProbeMessage> {
        let ProbeMessage::Challenge { path, mark: part, cookie } = message else { return None };
        let nonce = self.session.as_ref()?.nonce;
        (path == self.path && part == mark(&nonce)).then_some(ProbeMessage::Proof {
            path,
            nonce,
            cookie,
        })
    }

    /// The probe to send, if one is due.
    ///
    /// Until the path is up they come quickly, then slower. After that they keep a NAT's mapping
    /// and the cloud's interest alive; a silent path is probed more often, because a NAT may have
    /// given it another address.
    pub fn poll_probe(&mut self, now: Instant) -> Option<ProbeMessage> {
        let path = self.path;
        let session = self.session.as_mut().filter(|session| session.next <= now)?;
        session.interval = match session.up {
            false => (session.interval * 3 / 2).min(PROBE_AT_LEAST_EVERY),
            true if session.is_silent(now) => RECHECK_EVERY,
            true => KEEP_ALIVE_EVERY,
        };
        session.next = now + session.interval;
        Some(ProbeMessage::Probe { path, nonce: session.nonce })
    }

    /// When [`Prober::poll_probe`] has something next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.session.as_ref().map(|session| session.next)
    }

    /// Whether the path should be up by now and is not: true once a connection.
    pub fn is_overdue(&mut self, now: Instant) -> bool {
        let Some(session) = &mut self.session else { return false };
        let late = now.saturating_duration_since(session.began) >= OVERDUE_AFTER;
        let overdue = late && !session.up && !session.complained;
        session.complained |= overdue;
        overdue
    }

    /// Whether the cloud sends RTP here.
    pub fn is_up(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.up)
    }

    /// Which path it is, on the wire.
    pub fn path(&self) -> u8 {
        self.path
    }
}

impl Session {
    fn is_silent(&self, now: Instant) -> bool {
        self.heard.is_none_or(|at| now.saturating_duration_since(at) >= SILENT_AFTER)
    }
}

/// What probing counts.
#[derive(Clone)]
pub struct ProbeMetrics {
    sent: IntCounterVec,
    up: IntGaugeVec,
}

impl ProbeMetrics {
    /// Makes the handles and registers them.
    ///
    /// # Errors
    /// If their names are taken.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            sent: register_int_counter_vec_with_registry!(
                Opts::new("downpour_edge_probes_total", "Datagrams sent to prove an RTP address"),
                &["kind"],
                registry
            )?,
            up: register_int_gauge_vec_with_registry!(
                Opts::new("downpour_edge_path_up", "Whether the cloud sends RTP to this path"),
                &["path"],
                registry
            )?,
        })
    }

    /// A message goes out, or fails to.
    pub fn count(&self, message: &ProbeMessage, sent: bool) {
        let kind = match (message, sent) {
            (_, false) => "failed",
            (ProbeMessage::Proof { .. }, _) => "proof",
            _ => "probe",
        };
        self.sent.with_label_values(&[kind]).inc();
    }

    /// Sets how a path stands.
    pub fn set_up(&self, prober: &Prober) {
        let path = prober.path().to_string();
        self.up.with_label_values(&[&path]).set(prober.is_up().into());
    }
}

/// The first probe's successor comes after one and a half of these.
const PROBE_EVERY: Duration = Duration::from_millis(50);
const PROBE_AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// NATs forget UDP mappings after 30 s at the earliest in practice (RFC 4787 §4.3 wants 2 minutes).
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(5);
const RECHECK_EVERY: Duration = Duration::from_secs(1);
const SILENT_AFTER: Duration = Duration::from_secs(1);
const OVERDUE_AFTER: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use downpour_repair::probe::Cookie;

    const NONCE: Nonce = Nonce([5; 16]);

    fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// How many probes are due in each of the next seconds.
    fn probes(prober: &mut Prober, from: Instant, seconds: u64, heard: bool) -> Vec<usize> {
        let second = |second: u64, prober: &mut Prober| {
            (0..1000u64)
                .filter(|millis| {
                    let now = from + ms(1000 * second + millis);
                    if heard {
                        prober.heard(now);
                    }
                    prober.poll_probe(now).is_some()
                })
                .count()
        };
        (0..seconds).map(|i| second(i, prober)).collect()
    }

    #[test]
    fn it_probes_quickly_then_slower_and_keeps_alive_once_up() {
        let now = Instant::now();
        let mut prober = Prober::new(0);
        assert_eq!(prober.poll_probe(now), None);
        prober.start(now, NONCE);
        assert_eq!(prober.poll_timeout(), Some(now));
        assert_eq!(probes(&mut prober, now, 5, false), [6, 1, 1, 1, 1]);
        assert!(prober.is_overdue(now + ms(5000)) && !prober.is_overdue(now + ms(6000)));
        prober.path_up(now + ms(5000));
        let later = now + ms(5001);
        assert_eq!(probes(&mut prober, later, 12, true).iter().sum::<usize>(), 3);
        assert_eq!(probes(&mut prober, later + ms(17_000), 5, false), [1; 5], "silence");
        prober.stop();
        assert_eq!((prober.poll_timeout(), prober.is_up()), (None, false));
    }

    #[test]
    fn it_proves_itself_to_the_cloud_alone() {
        let mut prober = Prober::new(1);
        let challenge =
            |path, nonce| ProbeMessage::Challenge { path, mark: mark(&nonce), cookie: Cookie(9) };
        assert_eq!(prober.handle_challenge(challenge(1, NONCE)), None);
        prober.start(Instant::now(), NONCE);
        let proof = ProbeMessage::Proof { path: 1, nonce: NONCE, cookie: Cookie(9) };
        assert_eq!(prober.handle_challenge(challenge(1, NONCE)), Some(proof));
        assert_eq!(prober.handle_challenge(challenge(0, NONCE)), None);
        assert_eq!(prober.handle_challenge(challenge(1, Nonce([6; 16]))), None);
        assert_eq!(prober.handle_challenge(proof), None);
    }
}
