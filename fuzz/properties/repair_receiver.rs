//! The receiver of one publication: any packets, heartbeats and refusals at any time.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use bytes::Bytes;
use downpour_repair::{
    receiver::{Event, Numbering, Path, Receiver, Settings},
    rtp::{Packet, Seq, Ssrc, packet::Header},
};

use super::take;

/// Sequence numbers are delivered in order, each as a received packet or as a loss, and none remains at
/// the end. The window stays within its limit, only missing packets are requested, and timers are in
/// the future.
///
/// The first four bytes are the settings. Each further group of four is an event: kind, variant, and two bytes
/// for sequence number or time.
pub fn check(mut data: &[u8]) {
    let Some([window, latency, join, first]) = take(&mut data) else { return };
    let settings = Settings {
        // Small windows fill up sooner.
        window: 1 << (window % 11),
        latency: Duration::from_millis(u64::from(latency) * 4),
        join_latency: Duration::from_millis(u64::from(join) * 4),
        group: false,
        numbering: if window & 0x80 == 0 { Numbering::Guessed } else { Numbering::Announced },
    };
    let mut newest = Seq(u16::from(first) << 8);
    let (receiver, next) = match first {
        0 => (Receiver::new(settings), None),
        _ => (Receiver::starting_at(settings, newest), Some(newest)),
    };
    let window = settings.window;
    let mut run = Run { receiver, now: Instant::now(), window, next, received: HashSet::new() };
    let (mut packets, mut number) = (0, 0);
    while let Some([kind, variant, high, low]) = take(&mut data) {
        let argument = u16::from_be_bytes([high, low]);
        // Near the newest number, or anywhere.
        let seq = match variant & 1 {
            0 => newest.plus(usize::from(argument % 8)),
            _ => Seq(argument),
        };
        match kind % 8 {
            0..=3 => {
                number += 1;
                let path = if kind % 8 == 3 { Path::Repair } else { Path::Live(0) };
                if path == Path::Live(0) {
                    newest = seq;
                }
                run.received.insert((seq.0, number));
                packets += 1;
                let offer = path == Path::Live(0) && variant & 2 != 0;
                match offer && run.receiver.handle_next(run.now, seq, 0) {
                    true => run.delivered(&packet(seq, number)),
                    false => run.receiver.handle_packet(run.now, packet(seq, number), path),
                }
            }
            4 => _ = run.receiver.handle_heartbeat(run.now, seq),
            5 => {
                let gone = (0..usize::from(variant)).map(|i| seq.plus(i));
                run.receiver.handle_gone(run.now, gone);
            }
            6 => {
                let trip = Duration::from_millis(u64::from(argument));
                run.receiver.set_round_trip(run.now, trip, trip / 4);
            }
            _ => {
                run.now += Duration::from_millis(u64::from(variant)) + Duration::from_micros(10);
                run.receiver.handle_timeout(run.now);
            }
        }
        run.poll();
        assert_eq!(run.receiver.stats().received, packets);
    }
    run.now += settings.latency.max(settings.join_latency) + Duration::from_secs(1);
    run.finish();
}

struct Run {
    receiver: Receiver,
    now: Instant,
    window: usize,
    /// The next sequence number to deliver, once it is known.
    next: Option<Seq>,
    /// Sequence number and content of the packets that are not delivered yet.
    received: HashSet<(u16, u32)>,
}

impl Run {
    fn delivered(&mut self, packet: &Packet) {
        let seq = packet.header.seq;
        assert!(self.next.is_none_or(|next| next == seq), "{seq} is out of order");
        let known = (seq.0, packet.header.timestamp);
        assert!(self.received.remove(&known), "{seq} was never received, or is delivered twice");
        self.next = Some(seq.plus(1));
    }

    fn poll(&mut self) {
        self.receiver.handle_timeout(self.now);
        while let Some(event) = self.receiver.poll_event() {
            match event {
                Event::Packet(packet) => self.delivered(&packet),
                Event::Lost(count) => {
                    assert!(count > 0);
                    self.next = self.next.map(|next| next.plus(count as usize));
                }
                Event::Restart(_) => self.next = None,
            }
        }
        assert!(self.receiver.missing() <= self.receiver.pending());
        assert!(self.receiver.pending() <= self.window);
        while let Some(request) = self.receiver.poll_request(self.now) {
            assert!((1..=512).contains(&request.seqs.len()));
            assert!((1..=3).contains(&request.copies));
            for pair in request.seqs.windows(2) {
                assert!(pair[1].distance_from(pair[0]) > 0, "rising: {:?}", request.seqs);
            }
            if let (Some(next), Some(first)) = (self.next, request.seqs.first()) {
                let ahead = first.distance_from(next);
                assert!((0..self.window as i32).contains(&ahead), "{first} is outside the window");
            }
        }
        if let Some(timeout) = self.receiver.poll_timeout() {
            assert!(timeout > self.now, "a timer in the past");
        }
    }

    /// Checks that nothing is left once all latencies have packets.
    fn finish(&mut self) {
        self.receiver.handle_timeout(self.now);
        self.poll();
        assert_eq!((self.receiver.pending(), self.receiver.missing()), (0, 0));
        if let Some(Seq(next)) = self.next {
            assert!(self.receiver.is_done_through(Seq(next.wrapping_sub(1))));
            assert!(!self.receiver.is_done_through(Seq(next)));
        }
    }
}

/// Returns a packet; `number` distinguishes packets with the same sequence number.
fn packet(seq: Seq, number: u32) -> Packet {
    let header = Header { marker: false, payload_type: 100, seq, timestamp: number, ssrc: Ssrc(1) };
    Packet { header, payload: Bytes::new() }
}
