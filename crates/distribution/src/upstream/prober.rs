//! Path validation, edge side: proves to the cloud that RTP may be sent to a socket's address.
//!
//! # States
//!
//! | state | event | next state |
//! |---|---|---|
//! | idle | welcome | validating: probes after 0, 75 ms, … with growing pauses up to 1 s |
//! | validating | challenge | validating; the proof is sent |
//! | validating | path up | up: one probe after 1 s, then one per 5 s (per 1 s while nothing arrives) |
//! | validating, up | connection lost | idle |
//!
//! A challenge is answered in the up state too: a NAT may have given the path another address.

use std::time::{Duration, Instant};

use prometheus::{
    IntCounterVec, IntGaugeVec, Opts, Registry, register_int_counter_vec_with_registry,
    register_int_gauge_vec_with_registry,
};

use downpour_repair::{
    control::Nonce,
    probe::{ProbeMessage, nonce_prefix},
};

/// Prober of one path. Sans-IO: time and challenges in, messages out.
#[derive(Debug)]
pub struct Prober {
    path: u8,
    session: Option<Session>,
}

/// State during one connection to the cloud.
#[derive(Debug)]
struct Session {
    nonce: Nonce,
    started: Instant,
    interval: Duration,
    /// When the next probe is due.
    next: Instant,
    up: bool,
    /// When a datagram last arrived on the socket.
    heard: Option<Instant>,
    /// Whether [`Prober::is_overdue`] has returned `true`.
    overdue: bool,
}

impl Prober {
    /// Creates the prober of path `path`, idle.
    pub fn new(path: u8) -> Self {
        Self { path, session: None }
    }

    /// Starts to probe, with the nonce of the cloud's welcome.
    pub fn start(&mut self, now: Instant, nonce: Nonce) {
        self.session = Some(Session {
            nonce,
            started: now,
            interval: FIRST_INTERVAL,
            next: now,
            up: false,
            heard: None,
            overdue: false,
        });
    }

    /// Stops to probe: the connection, and with it the nonce, is gone.
    pub fn stop(&mut self) {
        self.session = None;
    }

    /// Records that a datagram arrived on the socket.
    pub fn heard(&mut self, now: Instant) {
        if let Some(session) = &mut self.session {
            session.heard = Some(now);
        }
    }

    /// Records that the cloud sends RTP to this path.
    pub fn path_up(&mut self, now: Instant) {
        if let Some(session) = &mut self.session {
            session.up = true;
            session.next = now + RECHECK_INTERVAL;
        }
    }

    /// Returns the proof for a challenge; `None` if it is for another path, or not from the cloud.
    pub fn handle_challenge(&self, message: ProbeMessage) -> Option<ProbeMessage> {
        let ProbeMessage::Challenge { path, nonce_prefix: prefix, cookie } = message else {
            return None;
        };
        let nonce = self.session.as_ref()?.nonce;
        (path == self.path && prefix == nonce_prefix(&nonce)).then_some(ProbeMessage::Proof {
            path,
            nonce,
            cookie,
        })
    }

    /// Returns the probe to send, if one is due.
    ///
    /// Once the path is up, probes keep the NAT mapping and the cloud's subscription alive. A
    /// silent path is probed more often, because a NAT may have given it another address.
    pub fn poll_probe(&mut self, now: Instant) -> Option<ProbeMessage> {
        let path = self.path;
        let session = self.session.as_mut().filter(|session| session.next <= now)?;
        session.interval = match session.up {
            false => (session.interval * 3 / 2).min(MAX_INTERVAL),
            true if session.is_silent(now) => RECHECK_INTERVAL,
            true => KEEP_ALIVE_INTERVAL,
        };
        session.next = now + session.interval;
        Some(ProbeMessage::Probe { path, nonce: session.nonce })
    }

    /// Returns when the next probe is due.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.session.as_ref().map(|session| session.next)
    }

    /// `true` if the path should be up by now and is not; once per connection.
    pub fn is_overdue(&mut self, now: Instant) -> bool {
        let Some(session) = &mut self.session else { return false };
        let late = now.saturating_duration_since(session.started) >= OVERDUE_AFTER;
        let overdue = late && !session.up && !session.overdue;
        session.overdue |= overdue;
        overdue
    }

    /// `true` if the cloud sends RTP to this path.
    pub fn is_up(&self) -> bool {
        self.session.as_ref().is_some_and(|session| session.up)
    }

    /// Returns the path's number on the wire.
    pub fn path(&self) -> u8 {
        self.path
    }
}

impl Session {
    fn is_silent(&self, now: Instant) -> bool {
        self.heard.is_none_or(|at| now.saturating_duration_since(at) >= SILENT_AFTER)
    }
}

/// Metrics of path validation. Cloning shares them.
#[derive(Clone)]
pub struct ProbeMetrics {
    sent: IntCounterVec,
    up: IntGaugeVec,
}

impl ProbeMetrics {
    /// Registers the metrics.
    ///
    /// # Errors
    /// If one of the names is registered already.
    pub fn register(registry: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            sent: register_int_counter_vec_with_registry!(
                Opts::new("downpour_edge_probes_total", "Datagrams sent for path validation"),
                &["kind"],
                registry
            )?,
            up: register_int_gauge_vec_with_registry!(
                Opts::new("downpour_edge_path_up", "1 if the cloud sends RTP to this path"),
                &["path"],
                registry
            )?,
        })
    }

    /// Counts a message; `sent` is `false` if sending it failed.
    pub fn count(&self, message: &ProbeMessage, sent: bool) {
        let kind = match (message, sent) {
            (_, false) => "failed",
            (ProbeMessage::Proof { .. }, _) => "proof",
            _ => "probe",
        };
        self.sent.with_label_values(&[kind]).inc();
    }

    /// Sets the gauge of a path.
    pub fn set_up(&self, prober: &Prober) {
        let path = prober.path().to_string();
        self.up.with_label_values(&[&path]).set(prober.is_up().into());
    }
}

/// Grows by half before each pause, the first included.
const FIRST_INTERVAL: Duration = Duration::from_millis(50);
/// Longest pause while validating.
const MAX_INTERVAL: Duration = Duration::from_secs(1);
/// In practice, NATs keep a UDP mapping for at least 30 s (RFC 4787 §4.3 requires 2 minutes).
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const RECHECK_INTERVAL: Duration = Duration::from_secs(1);
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

    /// Returns the number of probes in each of the next seconds.
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
    fn probes_slow_down_until_the_path_is_up_and_then_keep_it_alive() {
        let now = Instant::now();
        let mut prober = Prober::new(0);
        assert_eq!(prober.poll_probe(now), None);
        prober.start(now, NONCE);
        assert_eq!(prober.poll_timeout(), Some(now));
        assert_eq!(probes(&mut prober, now, 5, false), [6, 1, 1, 1, 1]);
        assert!(prober.is_overdue(now + ms(5000)));
        assert!(!prober.is_overdue(now + ms(6000)), "reported once per connection");
        prober.path_up(now + ms(5000));
        let later = now + ms(5001);
        assert_eq!(probes(&mut prober, later, 12, true).iter().sum::<usize>(), 3);
        assert_eq!(probes(&mut prober, later + ms(17_000), 5, false), [1; 5], "silence");
        prober.stop();
        assert_eq!(prober.poll_timeout(), None);
        assert!(!prober.is_up());
    }

    #[test]
    fn only_challenges_of_the_cloud_are_answered() {
        let mut prober = Prober::new(1);
        let challenge = |path, nonce| ProbeMessage::Challenge {
            path,
            nonce_prefix: nonce_prefix(&nonce),
            cookie: Cookie(9),
        };
        assert_eq!(prober.handle_challenge(challenge(1, NONCE)), None);
        prober.start(Instant::now(), NONCE);
        let proof = ProbeMessage::Proof { path: 1, nonce: NONCE, cookie: Cookie(9) };
        assert_eq!(prober.handle_challenge(challenge(1, NONCE)), Some(proof));
        assert_eq!(prober.handle_challenge(challenge(0, NONCE)), None);
        assert_eq!(prober.handle_challenge(challenge(1, Nonce([6; 16]))), None);
        assert_eq!(prober.handle_challenge(proof), None);
    }
}
