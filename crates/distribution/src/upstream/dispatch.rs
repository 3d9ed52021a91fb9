//! [`Upstream`]: passes datagrams, events of the repair connection and answers of the cloud's API
//! to the streams, and the streams' NACKs and reports to the cloud.
//!
//! It has no threads: the `receive` module runs it.
//!
//! # How streams get their names and ends
//!
//! | repair connection | names | ends |
//! |---|---|---|
//! | `downpour/1` | announced | announced |
//! | v0 | looked up in the cloud's API | silence of 3 s, then missing in the API's list; or silence of 10 s |
//! | being made | looked up, once a stream has had no name for 1 s | as v0 |
//! | none (disabled) | looked up | as v0 |
//!
//! While the cloud's address is not configured, it is learned from the first datagram: RTP, or the
//! announcement of a v0 cloud. A later announcement replaces it, except by another host while there
//! is a connection.

mod cloud;
mod repair_events;
mod stream_names;

pub use self::cloud::Cloud;

use std::{
    io,
    net::UdpSocket,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_util::sync::CancellationToken;

use self::cloud::Connection;
use super::{
    link_state::LinkState,
    livestat::{LiveStream, LivestatError},
    prober::ProbeMetrics,
    repair_client::{ClientError, RepairEvent, RepairHandle},
    socket::{Lookups, RtpSocket},
    stats::ReceiveMetrics,
    streams::Streams,
};
use crate::{http_client::HttpClientError, protocol::Protocol};
use downpour_media::{StreamKey, flv::Tag};
use downpour_repair::{
    control::{Nonce, Report},
    probe::{ProbeMessage, is_probe_message},
    rtp::{
        Ssrc,
        flexfec::Repair,
        packet::{HEADER_LEN, PAYLOAD_TYPE},
    },
};
use downpour_sys::recvmmsg::{GroDatagrams, RecvBatch};

/// How to receive.
pub struct Settings {
    /// The cloud. With an empty host, only the ports are used, until the cloud announces others.
    pub cloud: Cloud,
    /// Share of received packets to drop, 0..=1, to test repair.
    pub pack_loss: f64,
    /// Opens the repair connection; `None` receives without repair.
    pub connect: Option<Connect>,
    /// Fetches codec headers; `None` waits until the cloud sends them again. The streams' settings must
    /// have [`fetches_headers`](super::streams::Settings::fetches_headers) accordingly.
    pub fetch_headers: Option<FetchHeaders>,
}

/// Fetches the codec headers of a stream, and its metadata, from an RTMP server: host, port, stream.
/// The error says why there are none.
pub type FetchHeaders = Box<dyn Fn(String, u16, StreamKey) -> HeadersFuture + Send + Sync>;

/// The result of [`FetchHeaders`].
pub type HeadersFuture = Pin<Box<dyn Future<Output = Result<Vec<Tag>, String>> + Send>>;

/// Opens a repair connection to `host:port`, which sends its events to the channel, and ends when
/// the token is cancelled.
pub type Connect = Box<
    dyn Fn(&str, mpsc::Sender<RepairEvent>, CancellationToken) -> Result<RepairHandle, ClientError>
        + Send
        + Sync,
>;

/// Receives all streams of one cloud. See [`Upstream::run`].
pub struct Upstream {
    /// Sockets of RTP, then sockets of parity.
    sockets: Vec<RtpSocket>,
    /// Number of RTP sockets.
    rtp_sockets: usize,
    /// Number of RTP sockets that still work.
    rtp_left: usize,
    settings: Settings,
    streams: Streams,
    metrics: ReceiveMetrics,
    probe_metrics: ProbeMetrics,
    link: LinkState,
    /// Look-ups of the cloud's RTP address.
    rtp_lookups: Lookups,
    /// Nonce of the current connection.
    nonce: Option<Nonce>,
    cloud: Option<Cloud>,
    connection: Option<Connection>,
    /// Protocol of the current connection or the one before it.
    last_protocol: Option<Protocol>,
    /// Port of the cloud's RTMP, once known.
    rtmp_port: Option<u16>,
    header_fetches: JoinSet<(Ssrc, Result<Vec<Tag>, String>)>,
    /// Up to which time everything that arrived has been read, per socket; `None` for a broken one.
    read_until: Vec<Option<Instant>>,
    /// The same for the sockets of the control thread.
    control_until: Instant,
    name_lookup: Option<JoinHandle<Result<Vec<LiveStream>, LivestatError>>>,
    last_name_lookup: Option<Instant>,
    /// The last failure of a name look-up that was logged.
    name_lookup_failure: String,
    next_tick: Instant,
    last_report: Instant,
    /// A task or channel was created that no waker is registered with yet.
    needs_poll: bool,
    rng: SmallRng,
}

impl Upstream {
    /// Receives RTP and parity on one or two sockets, and only parity on up to two more.
    pub fn new(
        rtp: Vec<RtpSocket>,
        parity: Vec<RtpSocket>,
        settings: Settings,
        streams: Streams,
        metrics: ReceiveMetrics,
        probe_metrics: ProbeMetrics,
    ) -> Self {
        Self {
            rtp_sockets: rtp.len(),
            rtp_left: rtp.len(),
            read_until: vec![Some(Instant::now()); rtp.len() + parity.len()],
            control_until: Instant::now(),
            last_protocol: None,
            rtmp_port: None,
            header_fetches: JoinSet::new(),
            sockets: rtp.into_iter().chain(parity).collect(),
            streams,
            metrics,
            probe_metrics,
            link: LinkState::default(),
            rtp_lookups: Lookups::default(),
            nonce: None,
            cloud: None,
            connection: None,
            name_lookup: None,
            last_name_lookup: None,
            name_lookup_failure: String::new(),
            next_tick: Instant::now(),
            last_report: Instant::now(),
            needs_poll: true,
            rng: SmallRng::from_os_rng(),
            settings,
        }
    }

    /// Reports to `link` whether streams can arrive.
    #[must_use]
    pub fn with_link_state(self, link: LinkState) -> Self {
        Self { link, ..self }
    }

    /// Connects if the cloud's address is configured. Call it inside the runtime that is to run the
    /// repair client.
    pub(super) fn start(&mut self) {
        if !self.learns_cloud() {
            self.connect(self.settings.cloud.clone());
        } else if self.settings.connect.is_some() {
            self.link.disconnected(
                "the cloud's address is not known: upstream.host is empty, and no datagram of a \
                 cloud has arrived"
                    .into(),
            );
        }
    }

    /// Takes the repair connection; no other is made from now on.
    pub(super) fn take_connection(&mut self) -> Option<Connection> {
        self.settings.connect = None;
        self.connection.take()
    }

    /// Returns the sockets to read from, in the order of their indices.
    pub(super) fn sockets(&self) -> impl Iterator<Item = &Arc<UdpSocket>> {
        self.sockets.iter().map(RtpSocket::socket)
    }

    /// Prefetches the memory that [`Upstream::handle_batch`] will touch for this batch.
    pub(super) fn prefetch(&self, batch: &RecvBatch) {
        self.streams.prefetch(batch.iter().filter_map(|gro| gro.datagrams().next()));
    }

    /// Records that everything that had arrived on socket `i` at `until` has been received.
    pub(super) fn set_read_until(&mut self, i: usize, until: Instant) {
        if let Some(Some(read_until)) = self.read_until.get_mut(i) {
            *read_until = until;
        }
    }

    /// Records that the control thread has handled everything that had arrived at `until`.
    pub(super) fn set_control_until(&mut self, until: Instant) {
        self.control_until = self.control_until.max(until);
    }

    /// The time up to which everything that arrived has been handled. On a starved machine packets lie
    /// in a socket for longer than their deadlines; they are not lost.
    fn settled(&self) -> Instant {
        self.read_until.iter().flatten().fold(self.control_until, |a, b| a.min(*b))
    }

    /// Handles the streams' timeouts up to the time at which socket `i` was found empty.
    pub(super) fn handle_idle(&mut self, now: Instant, i: usize, until: Instant) {
        self.set_read_until(i, until);
        self.streams.handle_timeout_until(now, self.settled());
        self.send_nacks();
    }

    /// Receives a batch read from socket `i`, and sends the NACKs that are due.
    pub(super) fn handle_batch(&mut self, now: Instant, i: usize, batch: &RecvBatch) {
        if let Some(socket) = self.sockets.get_mut(i) {
            socket.heard(now);
        }
        for gro in batch.iter() {
            for datagram in gro.datagrams() {
                self.handle_datagram(now, i, &gro, datagram);
            }
        }
        if self.streams.saw_unknown_ssrc() {
            // Soon, because only some of its packets are held until it has a name.
            self.look_up_names(now);
        }
        self.streams.handle_timeout_until(now, self.settled());
        self.send_nacks();
    }

    /// Stops counting on broken socket `i`. Returns `false` if no RTP socket is left.
    pub(super) fn give_up(&mut self, i: usize) -> bool {
        if let Some(read_until) = self.read_until.get_mut(i) {
            *read_until = None;
        }
        if i < self.rtp_sockets {
            self.rtp_left -= 1;
            self.link.socket_broken(i);
        }
        self.rtp_left > 0
    }

    /// Handles all timeouts up to `now`: NACKs, probes, reports, periodic work.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.streams.handle_timeout_until(now, self.settled());
        if self.next_tick <= now {
            self.next_tick = now + TICK;
            self.tick(now);
        }
        self.send_nacks();
        for socket in &mut self.sockets {
            socket.probe(now, &self.probe_metrics);
        }
    }

    /// Returns when to call [`Upstream::handle_timeout`].
    pub(super) fn poll_timeout(&self) -> Instant {
        let probe = self.sockets.iter().filter_map(RtpSocket::poll_timeout).min();
        let stream = self.streams.poll_timeout();
        [stream, probe].into_iter().flatten().fold(self.next_tick, Instant::min)
    }

    /// Returns the earliest timeout of a stream, which a received batch may have changed.
    pub(super) fn poll_stream_timeout(&self) -> Option<Instant> {
        self.streams.poll_timeout()
    }

    /// `true` if [`Upstream::poll_inputs`] must be called although no waker will ask for it.
    pub(super) fn needs_poll(&self) -> bool {
        self.needs_poll
    }

    /// Takes finished look-ups and events of the repair connection; registers `cx` for the next.
    pub(super) fn poll_inputs(&mut self, cx: &mut Context<'_>) {
        self.needs_poll = false;
        if let Some(lookup) = &mut self.name_lookup
            && let Poll::Ready(answer) = Pin::new(lookup).poll(cx)
        {
            self.name_lookup = None;
            self.handle_names(answer.unwrap_or_else(|error| {
                Err(HttpClientError::Connect(io::Error::other(error)).into())
            }));
        }
        while let Poll::Ready(Some(fetched)) = self.header_fetches.poll_join_next(cx) {
            // A fetch that panicked is a bug; media is held no longer than its time.
            if let Ok((ssrc, headers)) = fetched {
                self.streams.headers_fetched(Instant::now(), ssrc, headers);
            }
        }
        while let Poll::Ready((path, nonce, cloud)) = self.rtp_lookups.poll_next(cx) {
            if self.nonce == Some(nonce) {
                self.sockets.iter_mut().for_each(|socket| socket.set_cloud(path, cloud));
            }
        }
        for _ in 0..MAX_EVENTS {
            let Some(connection) = &mut self.connection else { return };
            let Poll::Ready(event) = connection.events.poll_recv(cx) else { return };
            self.handle_event(event);
        }
        // There may be more, and no waker is registered.
        self.needs_poll = true;
    }

    fn handle_datagram(&mut self, now: Instant, i: usize, gro: &GroDatagrams<'_>, datagram: &[u8]) {
        let is_rtp = is_rtp(datagram);
        if i >= self.rtp_sockets || (!is_rtp && Repair::is_repair_packet(datagram)) {
            if !self.drops_on_purpose() {
                self.streams.handle_parity(now, Bytes::copy_from_slice(datagram));
            }
            return;
        }
        if !is_rtp && self.handle_control_datagram(i, gro, datagram) {
            return;
        }
        if is_rtp
            && self.learns_cloud()
            && self.cloud.is_none()
            && let Some(from) = gro.from()
        {
            self.learn_from_source(from.ip());
        }
        if self.drops_on_purpose() {
            return;
        }
        // The index fits: there are at most two RTP sockets.
        self.streams.handle_live(now, datagram, i as u8);
    }

    /// Takes a probe message or a v0 announcement. Returns `false` if the datagram is neither.
    fn handle_control_datagram(
        &mut self,
        i: usize,
        gro: &GroDatagrams<'_>,
        datagram: &[u8],
    ) -> bool {
        if is_probe_message(datagram) {
            if let (Some(from), Some(socket), Ok((message, _))) =
                (gro.from(), self.sockets.get(i), ProbeMessage::parse(datagram))
            {
                socket.handle_probe_message(from, message, &self.probe_metrics);
            }
            return true;
        }
        let Some((quic_port, api_port)) = parse_announcement(datagram) else { return false };
        if self.learns_cloud()
            && let Some(from) = gro.from()
        {
            let host = from.ip().to_canonical().to_string();
            self.learn(Cloud { host, quic_port, api_port, ..self.settings.cloud.clone() });
        }
        true
    }

    /// Returns `true`, and counts it, if the setting `pack_loss` drops the next packet.
    fn drops_on_purpose(&mut self) -> bool {
        let drops = self.settings.pack_loss > 0.0 && self.rng.random_bool(self.settings.pack_loss);
        if drops {
            self.metrics.pack_loss.inc();
        }
        drops
    }

    fn send_nacks(&mut self) {
        while let Some(nack) = self.streams.poll_nack() {
            match &self.connection {
                Some(connection) => connection.handle.nack(nack),
                None => self.metrics.nacks_dropped.inc(),
            }
        }
        while let Some((ssrc, seq)) = self.streams.poll_withdrawn() {
            if let Some(connection) = &self.connection {
                connection.handle.withdraw(ssrc, seq);
            }
        }
        self.fetch_headers();
    }

    /// Does the periodic work.
    fn tick(&mut self, now: Instant) {
        if let Some(connection) = &self.connection {
            let round_trip = connection.handle.rtt();
            if let Some(round_trip) = round_trip {
                self.streams.set_round_trip(now, round_trip, round_trip / 8);
            }
            if now.duration_since(self.last_report) >= REPORT_INTERVAL {
                self.last_report = now;
                let round_trip_us = round_trip.map_or(0, |rtt| rtt.as_micros() as u64);
                let streams = self.streams.reports(MAX_REPORTS);
                connection.handle.report(Report { round_trip_us, streams });
            }
        }
        self.streams.tick(now);
        self.look_up_names(now);
        self.sockets.iter_mut().for_each(|socket| socket.log_if_overdue(now));
    }
}

/// `true` if a datagram looks like RTP of wire v0.
fn is_rtp(datagram: &[u8]) -> bool {
    datagram.len() > HEADER_LEN
        && datagram[0] == VERSION_2_ONLY
        && datagram[1] & 0x7f == PAYLOAD_TYPE
}

/// Parses a v0 cloud's announcement: ASCII `0001`, QUIC port, API port. Returns both ports.
fn parse_announcement(datagram: &[u8]) -> Option<(u16, u16)> {
    let ports = datagram.strip_prefix(b"0001")?;
    let &[q0, q1, a0, a1] = ports else { return None };
    Some((u16::from_be_bytes([q0, q1]), u16::from_be_bytes([a0, a1])))
}

/// First byte of an RTP header: version 2, no padding, no extension, no CSRC.
const VERSION_2_ONLY: u8 = 2 << 6;
const TICK: Duration = Duration::from_millis(500);
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Streams per report, 600 kB at most. More streams take turns.
const MAX_REPORTS: usize = 1000;
/// Events per call, so that timeouts are not delayed. Fewer than the budget of tokio's cooperative
/// scheduling (128).
const MAX_EVENTS: usize = 64;
