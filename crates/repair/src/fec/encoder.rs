//! Media packets in, parity packets out.

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

/// What an encoder is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// The rows and columns.
    pub matrix: Matrix,
    /// After so long without a packet, or three times as long as packets are apart if that is
    /// longer, what is there gets its parity, and a new block begins.
    pub flush_after: Duration,
    /// The longest that a packet waits for its row's parity, where the row takes longer to fill: a
    /// shorter row for a slow stream. Columns wait for their block.
    pub row_within: Duration,
}

impl Settings {
    /// For a matrix: 50 ms, and 100 ms.
    pub fn new(matrix: Matrix) -> Self {
        let flush_after = Duration::from_millis(50);
        Self { matrix, flush_after, row_within: 2 * flush_after }
    }
}

/// Makes the parity of one publication.
///
/// It holds one packet's length for the row, one a column of the open block, and one a column of
/// the last block until its parity is sent. What it makes goes to the end of an `out` that the
/// caller hands in and sends from, behind the media that went in.
#[derive(Debug)]
pub struct Encoder {
    settings: Settings,
    media: Ssrc,
    ssrc: Ssrc,
    /// The next parity packet's number.
    next_seq: Seq,
    /// The next media packet's number, once there was one.
    expected: Option<Seq>,
    row: Option<Sum>,
    row_since: Instant,
    /// The open block's, empty without column parity.
    columns: Vec<Option<Sum>>,
    /// Packets in the open block.
    position: usize,
    /// The last block's columns, to be sent.
    finished: VecDeque<Sum>,
    /// When the last media packet came, and its RTP time.
    newest: (Instant, u32),
    /// The mean time between packets that do not come together.
    pause: Duration,
    stats: Stats,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Media packets protected.
    pub media: u64,
    /// Parity packets made.
    pub parity: u64,
    /// Their bytes.
    pub parity_bytes: u64,
    /// What was pushed and is no packet, or too long for one.
    pub malformed: u64,
    /// Times that media packets were not in order, so that the block had to end early.
    pub breaks: u64,
}

impl Encoder {
    /// Protects the stream `media` by the stream `ssrc`, whose first packet has the number `first`.
    /// Both should be random (RFC 3550 §5.1); an `ssrc` that is the media's is inverted.
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
            row_since: now,
            columns: (0..columns).map(|_| None).collect(),
            position: 0,
            finished: VecDeque::new(),
            newest: (now, 0),
            pause: Duration::ZERO,
            stats: Stats::default(),
        }
    }

    /// Protects the next packets.
    pub fn push_burst(&mut self, now: Instant, burst: &Burst, out: &mut Vec<Bytes>) {
        for packet in burst.bytes().chunks(burst.stride()) {
            self.push(now, packet, out);
        }
    }

    /// Protects the next packet: header and payload, as it is sent.
    pub fn push(&mut self, now: Instant, packet: &[u8], out: &mut Vec<Bytes>) {
        let (Some(word), true) = (flexfec::word(packet), packet.len() <= PACKET_LIMIT) else {
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
        let pause = now.saturating_duration_since(self.newest.0).min(PAUSE_LIMIT);
        if self.stats.media > 0 && !pause.is_zero() {
            self.pause = (self.pause * 7 + pause) / 8;
        }
        self.newest = (now, word as u32);
        self.stats.media += 1;
        self.add(now, seq, word, &packet[HEADER_LEN..], out);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Vec<Bytes>) {
        if self.flush_at().is_some_and(|due| due <= now) {
            self.flush(now, out);
        }
        if self.row_at().is_some_and(|due| due <= now) {
            self.end_row(now, out);
        }
    }

    /// Sends the parity of whatever has none yet, and begins a new block.
    pub fn flush(&mut self, now: Instant, out: &mut Vec<Bytes>) {
        self.end_row(now, out);
        while let Some(column) = self.finished.pop_front() {
            self.send(now, column, out);
        }
        // Packets that are alone in their column stand side by side: they share a row.
        let mut alone: Option<Sum> = None;
        for at in 0..self.columns.len() {
            match self.columns[at].take() {
                Some(column) if column.count > 1 => self.send(now, column, out),
                Some(column) => match &mut alone {
                    Some(row) => row.merge(column),
                    None => alone = Some(Sum { stride: 1, ..column }),
                },
                None => {}
            }
        }
        if let Some(row) = alone.filter(|_| !self.settings.matrix.has_row_parity()) {
            self.send(now, row, out);
        }
        self.position = 0;
    }

    /// When [`Self::handle_timeout`] is to be called, if anything waits.
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.flush_at(), self.row_at()].into_iter().flatten().min()
    }

    /// The rows and columns.
    pub fn matrix(&self) -> Matrix {
        self.settings.matrix
    }

    /// The parity's own stream.
    pub fn ssrc(&self) -> Ssrc {
        self.ssrc
    }

    /// Counts since the start.
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
                self.row_since = now;
            }
            Sum::add_to(&mut self.row, 1, seq, word, body);
        }
        // One column's parity every D packets: the last leaves before the next block is full.
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
            // A row is a block.
            self.position = 0;
        }
    }

    fn send(&mut self, now: Instant, mut sum: Sum, out: &mut Vec<Bytes>) {
        let count = sum.count;
        let protection = match sum.stride {
            // The one column of a block without others, too.
            1 => {
                Protection::Row { count, columns_follow: self.settings.matrix.has_column_parity() }
            }
            stride => Protection::Column { stride, count },
        };
        // RFC 8627: the time of sending, here on the media's clock.
        let waited = now.saturating_duration_since(self.newest.0).as_millis() as u32;
        let timestamp = self.newest.1.wrapping_add(waited.wrapping_mul(CLOCK_KHZ));
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
        let waits = self.row.is_some() || self.position > 0 || !self.finished.is_empty();
        waits.then(|| self.newest.0 + self.settings.flush_after.max(self.pause * 3))
    }

    fn row_at(&self) -> Option<Instant> {
        self.row.as_ref().map(|_| self.row_since + self.settings.row_within)
    }
}

/// A stream that pauses for longer is not waited for.
const PAUSE_LIMIT: Duration = Duration::from_millis(300);

/// A parity packet while it is made: the XOR of what it protects, behind room for its headers.
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
                // Most packets of a tag are equally long: seldom grown.
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

/// No datagram on a path of 1500 bytes is longer, and its parity must fit too.
const PACKET_LIMIT: usize = 1500 - 28 - (OVERHEAD - HEADER_LEN);
/// RTP ticks a millisecond (RFC 3551 §5).
const CLOCK_KHZ: u32 = 90;
