//! Generates parity packets from media packets.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};

use super::Matrix;
use crate::rtp::{
    Burst, Seq, Ssrc,
    flexfec::{self, OVERHEAD, Protection, Repair},
    packet::{HEADER_LEN, Header},
};

/// Configuration of an [`Encoder`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Rows and columns.
    pub matrix: Matrix,
    /// After a pause of this length, or of three mean packet intervals if that is longer, parity for
    /// the open block is sent and a new block starts.
    pub flush_after: Duration,
    /// Longest time from a row's first packet to its parity. A slow stream gets shorter rows. Columns
    /// always wait for their block.
    pub row_timeout: Duration,
}

impl Settings {
    /// Default timeouts for a matrix: `flush_after` 50 ms, `row_timeout` 100 ms.
    pub fn new(matrix: Matrix) -> Self {
        let flush_after = Duration::from_millis(50);
        Self { matrix, flush_after, row_timeout: 2 * flush_after }
    }
}

/// Generates the parity of one publication.
///
/// Methods append finished parity packets to `out`, to be sent after the media packets passed in.
/// Memory: one packet length for the open row, one per column of the open block, and one per column
/// of the previous block until it is sent.
///
/// States: *empty* → *filling* with the first packet. A full row, or `row_timeout`, sends the row's
/// parity. A full block moves its columns to `finished`, one of which is sent every D packets of the
/// next block. A pause, a gap in the sequence numbers, or [`Self::flush`] sends everything and returns
/// to *empty*. Invariant: each media packet is in at most one row and one column.
#[derive(Debug)]
pub struct Encoder {
    settings: Settings,
    media: Ssrc,
    ssrc: Ssrc,
    /// Sequence number of the next parity packet.
    next_seq: Seq,
    /// Expected sequence number of the next media packet; `None` before the first.
    expected: Option<Seq>,
    /// Parity of the open row.
    row: Option<Sum>,
    row_started: Instant,
    /// Parity of the open block's columns; empty without column parity.
    columns: Vec<Option<Sum>>,
    /// Packets in the open block.
    position: usize,
    /// Column parity of the previous block, not yet sent.
    finished: VecDeque<Sum>,
    /// When the last media packet was pushed, and its RTP timestamp.
    newest: (Instant, u32),
    /// Mean interval between packets that are not pushed at the same instant (EWMA, gain 1/8).
    interval: Duration,
    stats: Stats,
}

/// Counters since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Media packets protected.
    pub media: u64,
    /// Parity packets generated.
    pub parity: u64,
    /// Bytes of parity packets.
    pub parity_bytes: u64,
    /// Inputs that are not RTP packets, or too long to protect.
    pub malformed: u64,
    /// Discontinuities in the sequence numbers, each of which ended a block early.
    pub breaks: u64,
}

impl Encoder {
    /// Creates the encoder of the stream `media`. The parity stream is `ssrc`, starting at sequence
    /// number `first`; both should be random (RFC 3550 §5.1). An `ssrc` equal to `media` is inverted.
    pub fn new(settings: Settings, now: Instant, media: Ssrc, ssrc: Ssrc, first: Seq) -> Self {
        let columns = match settings.matrix.has_column_parity() {
            true => settings.matrix.columns(),
            false => 0,
        };
        Self {
            settings,
            media,
            ssrc: if ssrc == media { Ssrc(!ssrc.0) } else { ssrc },
            next_seq: first,
            expected: None,
            row: None,
            row_started: now,
            columns: (0..columns).map(|_| None).collect(),
            position: 0,
            finished: VecDeque::new(),
            newest: (now, 0),
            interval: Duration::ZERO,
            stats: Stats::default(),
        }
    }

    /// Protects the packets of the next burst.
    pub fn push_burst(&mut self, now: Instant, burst: &Burst, out: &mut Vec<Bytes>) {
        for packet in burst.bytes().chunks(burst.stride()) {
            self.push(now, packet, out);
        }
    }

    /// Protects the next packet, passed as the whole RTP datagram.
    pub fn push(&mut self, now: Instant, packet: &[u8], out: &mut Vec<Bytes>) {
        let (Some(word), true) = (flexfec::header_word(packet), packet.len() <= PACKET_LIMIT)
        else {
            self.stats.malformed += 1;
            return;
        };
        let seq = Seq(u16::from_be_bytes([packet[2], packet[3]]));
        self.handle_timeout(now, out);
        if self.expected.is_some_and(|expected| expected != seq) {
            self.stats.breaks += 1;
            self.flush(now, out);
        }
        self.expected = Some(seq.plus(1));
        let interval = now.saturating_duration_since(self.newest.0).min(INTERVAL_LIMIT);
        if self.stats.media > 0 && !interval.is_zero() {
            self.interval = (self.interval * 7 + interval) / 8;
        }
        self.newest = (now, word as u32);
        self.stats.media += 1;
        self.add(now, seq, word, &packet[HEADER_LEN..], out);
    }

    /// Sends the parity that is due at `now`.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Vec<Bytes>) {
        if self.flush_at().is_some_and(|due| due <= now) {
            self.flush(now, out);
        }
        if self.row_at().is_some_and(|due| due <= now) {
            self.end_row(now, out);
        }
    }

    /// Sends all outstanding parity and starts a new block.
    pub fn flush(&mut self, now: Instant, out: &mut Vec<Bytes>) {
        self.end_row(now, out);
        while let Some(column) = self.finished.pop_front() {
            self.send(now, column, out);
        }
        // Columns with a single packet are adjacent: their parity is merged into one row.
        let mut singles: Option<Sum> = None;
        for at in 0..self.columns.len() {
            match self.columns[at].take() {
                Some(column) if column.count > 1 => self.send(now, column, out),
                Some(column) => match &mut singles {
                    Some(row) => row.merge(column),
                    None => singles = Some(Sum { stride: 1, ..column }),
                },
                None => {}
            }
        }
        if let Some(row) = singles.filter(|_| !self.settings.matrix.has_row_parity()) {
            self.send(now, row, out);
        }
        self.position = 0;
    }

    /// Returns when to call [`Self::handle_timeout`], or `None` if no parity is outstanding.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.flush_at(), self.row_at()].into_iter().flatten().min()
    }

    /// Returns the matrix.
    pub fn matrix(&self) -> Matrix {
        self.settings.matrix
    }

    /// Returns the SSRC of the parity stream.
    pub fn ssrc(&self) -> Ssrc {
        self.ssrc
    }

    /// Returns the counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    fn add(&mut self, now: Instant, seq: Seq, word: u64, body: &[u8], out: &mut Vec<Bytes>) {
        let matrix = self.settings.matrix;
        let column = self.position % matrix.columns();
        if matrix.has_column_parity() {
            Sum::add_to(&mut self.columns[column], matrix.columns(), seq, word, body);
        }
        if matrix.has_row_parity() {
            if self.row.is_none() {
                self.row_started = now;
            }
            Sum::add_to(&mut self.row, 1, seq, word, body);
        }
        // One column every D packets: the last is sent before the next block is full.
        let due = self.position.is_multiple_of(matrix.rows());
        self.position += 1;
        if column + 1 == matrix.columns() {
            self.end_row(now, out);
        }
        if let Some(column) = due.then(|| self.finished.pop_front()).flatten() {
            self.send(now, column, out);
        }
        if self.position == matrix.area() {
            self.finished.extend(self.columns.iter_mut().filter_map(Option::take));
            self.position = 0;
        }
    }

    fn end_row(&mut self, now: Instant, out: &mut Vec<Bytes>) {
        if let Some(row) = self.row.take() {
            self.send(now, row, out);
        }
        if !self.settings.matrix.has_column_parity() {
            // Without columns, a row is a block.
            self.position = 0;
        }
    }

    fn send(&mut self, now: Instant, mut sum: Sum, out: &mut Vec<Bytes>) {
        let count = sum.count;
        let protection = match sum.stride {
            // Also the only column of a block of one column.
            1 => {
                Protection::Row { count, columns_follow: self.settings.matrix.has_column_parity() }
            }
            stride => Protection::Column { stride, count },
        };
        // RFC 8627: the time of transmission, here on the media's clock.
        let elapsed = now.saturating_duration_since(self.newest.0).as_millis() as u32;
        let timestamp = self.newest.1.wrapping_add(elapsed.wrapping_mul(CLOCK_KHZ));
        let repair = Repair {
            header: Header {
                marker: false,
                payload_type: flexfec::PAYLOAD_TYPE,
                seq: self.next_seq,
                timestamp,
                ssrc: self.ssrc,
            },
            media: self.media,
            base: sum.base,
            protection,
            word: sum.word,
            body: Bytes::new(),
        };
        sum.bytes[..OVERHEAD].copy_from_slice(&repair.encode_headers());
        self.next_seq = self.next_seq.plus(1);
        self.stats.parity += 1;
        self.stats.parity_bytes += sum.bytes.len() as u64;
        out.push(sum.bytes.freeze());
    }

    fn flush_at(&self) -> Option<Instant> {
        let is_open = self.row.is_some() || self.position > 0 || !self.finished.is_empty();
        is_open.then(|| self.newest.0 + self.settings.flush_after.max(self.interval * 3))
    }

    fn row_at(&self) -> Option<Instant> {
        self.row.as_ref().map(|_| self.row_started + self.settings.row_timeout)
    }
}

/// Longest interval that counts in the mean.
const INTERVAL_LIMIT: Duration = Duration::from_millis(300);

/// A parity packet in progress: space for its headers, then the XOR of the protected packets.
#[derive(Debug)]
struct Sum {
    base: Seq,
    stride: u8,
    count: u8,
    word: u64,
    bytes: BytesMut,
}

impl Sum {
    fn add_to(slot: &mut Option<Self>, stride: usize, seq: Seq, word: u64, body: &[u8]) {
        match slot {
            Some(sum) => sum.add(word, body),
            None => {
                // Most packets of a tag are equally long, so the buffer rarely grows.
                let mut bytes = BytesMut::with_capacity(OVERHEAD + body.len());
                bytes.resize(OVERHEAD, 0);
                bytes.extend_from_slice(body);
                *slot = Some(Self { base: seq, stride: stride as u8, count: 1, word, bytes });
            }
        }
    }

    fn add(&mut self, word: u64, body: &[u8]) {
        self.count += 1;
        self.word ^= word;
        let len = OVERHEAD + body.len();
        if self.bytes.len() < len {
            self.bytes.resize(len, 0);
        }
        flexfec::xor(&mut self.bytes[OVERHEAD..], body);
    }

    fn merge(&mut self, other: Self) {
        self.add(other.word, &other.bytes[OVERHEAD..]);
    }
}

/// Longest protected packet in bytes: its parity must fit in an MTU of 1500 bytes too.
const PACKET_LIMIT: usize = 1500 - 28 - (OVERHEAD - HEADER_LEN);
/// RTP clock in kHz (RFC 3551 §5).
const CLOCK_KHZ: u32 = 90;
