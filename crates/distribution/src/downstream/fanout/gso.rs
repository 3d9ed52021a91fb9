//! State of UDP segmentation offload (GSO, udp(7)) of one socket.

use std::{collections::HashSet, io, net::SocketAddr, time::Instant};

use super::{FanoutMetrics, udp_sender::LOG_INTERVAL};
use downpour_sys::LogLimit;

/// Where GSO works, as far as one sender knows.
///
/// | state | entered when |
/// |---|---|
/// | on | the socket supports GSO ([`GsoState::max_segments`] > 1) |
/// | off for a target | the kernel refuses to segment a message to it: a tunnel, a small MTU |
/// | off (for good) | the kernel refuses [`MAX_REFUSALS`] messages in a row |
///
/// A message's segment size is normally a control message. If the socket is exclusive, and enough
/// messages in a row want the same size, that size becomes the socket's option instead, which makes
/// each call 5 to 8 % cheaper. The first refusal while the option is set ends that for good.
pub(super) struct GsoState {
    /// Most datagrams per message; 1 while GSO is off.
    pub(super) max_segments: usize,
    /// Targets to which the kernel refuses to segment.
    refused_targets: HashSet<SocketAddr>,
    /// Refused messages since the last one that was segmented.
    refusals: usize,
    /// `true` while the segment size may be set as the socket's option.
    may_set_option: bool,
    /// The segment size of the latest messages that differs from the option, and their number.
    wanted: (u16, usize),
    log: LogLimit,
}

impl GsoState {
    /// `max_segments` is 1 on a socket without GSO. `is_exclusive` is `true` if nobody else sends from
    /// the socket.
    pub(super) fn new(max_segments: usize, is_exclusive: bool) -> Self {
        Self {
            max_segments: max_segments.max(1),
            refused_targets: HashSet::new(),
            refusals: 0,
            may_set_option: is_exclusive,
            wanted: (0, 0),
            log: LogLimit::every(LOG_INTERVAL),
        }
    }

    /// `true` if messages to `to` are segmented by the kernel.
    #[inline]
    pub(super) fn is_on_for(&self, to: SocketAddr) -> bool {
        self.max_segments > 1
            && (self.refused_targets.is_empty() || !self.refused_targets.contains(&to))
    }

    /// Counts a message whose `segment` is not the socket's option. Returns `true` if it is time to set
    /// that option.
    pub(super) fn wants_option(&mut self, segment: u16) -> bool {
        if !self.may_set_option {
            return false;
        }
        let (wanted, times) = self.wanted;
        self.wanted = (segment, if wanted == segment { times + 1 } else { 1 });
        self.wanted.1 > OPTION_THRESHOLD
    }

    /// Sets the segment size by control message only, from now on.
    pub(super) fn forbid_option(&mut self) {
        self.may_set_option = false;
    }

    /// The kernel has segmented a message.
    #[inline]
    pub(super) fn accepted(&mut self) {
        self.refusals = 0;
    }

    /// The kernel has refused to segment a message to `to`.
    pub(super) fn refused(&mut self, to: SocketAddr, error: &io::Error, metrics: &FanoutMetrics) {
        metrics.gso_refused.inc();
        self.refusals += 1;
        if self.refused_targets.len() >= MAX_REFUSED_TARGETS {
            self.refused_targets.clear();
        }
        if self.refused_targets.insert(to)
            && let Some(missed) = self.log.due(Instant::now())
        {
            tracing::warn!(target = %to, %error, missed, "GSO refused; sending single datagrams to the target");
        }
        if self.refusals >= MAX_REFUSALS && self.max_segments > 1 {
            self.max_segments = 1;
            self.refused_targets = HashSet::new();
            metrics.gso_sockets.dec();
            tracing::warn!(refusals = self.refusals, "GSO switched off; sending single datagrams");
        }
    }
}

/// `true` if `error` may mean that the kernel cannot segment a message.
///
/// EIO: the interface lacks checksum offload. EINVAL, and since Linux 6.14 (2025) EMSGSIZE: a segment
/// exceeds the MTU. EMSGSIZE is also the error of a single datagram that is too long.
pub(super) fn is_gso_error(error: &io::Error) -> bool {
    let error = error.raw_os_error();
    matches!(error, Some(libc::EIO | libc::EINVAL | libc::ENOTSUP | libc::EMSGSIZE))
}

/// Most targets without GSO that are remembered. When there are more, all are tried again.
const MAX_REFUSED_TARGETS: usize = 4096;
/// Refusals in a row after which GSO is switched off.
pub(super) const MAX_REFUSALS: usize = 16;
/// Messages in a row with one segment size after which it becomes the socket's option.
pub(super) const OPTION_THRESHOLD: usize = 64;
