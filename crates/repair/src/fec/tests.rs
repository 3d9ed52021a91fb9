//! Encoder and decoder together.

use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{Decoder, Encoder, Matrix, MatrixError, decoder, encoder};
use crate::rtp::{
    Packet, Packetizer, Seq, Ssrc,
    flexfec::{self, OVERHEAD, Protection, Repair},
    packet::{self, Header},
};
use downpour_media::flv::{Tag, TagKind};

pub(super) const MEDIA: Ssrc = Ssrc(0x1122_3344);
const PARITY: Ssrc = Ssrc(0xaabb_ccdd);

/// Returns media packet `number`. Sequence numbers start at `Seq::FIRST` and wrap after 536.
pub(super) fn media(number: usize, len: usize) -> Bytes {
    let header = Header {
        marker: number % 5 == 4,
        payload_type: packet::PAYLOAD_TYPE,
        seq: Seq::FIRST.plus(number),
        timestamp: (number / 5) as u32 * 3600,
        ssrc: MEDIA,
    };
    let payload: Vec<u8> =
        (0..len).map(|at| (number.wrapping_mul(31) + at * 7) as u8 | 1).collect();
    [&header.encode()[..], &payload].concat().into()
}

pub(super) fn encoder(matrix: Matrix, now: Instant) -> Encoder {
    Encoder::new(encoder::Settings::new(matrix), now, MEDIA, PARITY, Seq(65530))
}

fn decoder() -> Decoder {
    Decoder::new(MEDIA, decoder::Limits::default())
}

fn repair(datagram: &Bytes) -> Repair {
    Repair::parse(datagram.clone()).expect("the encoder wrote it")
}

/// Returns all datagrams sent for these packets, in order, flushed at the end.
fn sent(matrix: Matrix, packets: &[Bytes]) -> Vec<Bytes> {
    let now = Instant::now();
    let (mut encoder, mut sent) = (encoder(matrix, now), Vec::new());
    for packet in packets {
        sent.push(packet.clone());
        encoder.push(now, packet, &mut sent);
    }
    let due = encoder.poll_timeout().unwrap_or(now);
    encoder.handle_timeout(due + Duration::from_secs(1), &mut sent);
    assert_eq!(encoder.poll_timeout(), None, "all parity is sent");
    sent
}

/// Returns for each packet whether it was received or recovered, and checks its bytes.
fn received<'a>(sent: impl IntoIterator<Item = &'a Bytes>, packets: &[Bytes]) -> Vec<bool> {
    let mut decoder = decoder();
    let mut present = vec![false; packets.len()];
    let mut out = Vec::new();
    for datagram in sent {
        if Repair::is_repair_packet(datagram) {
            decoder.handle_parity(repair(datagram), &mut out);
        } else {
            out.push(datagram.clone());
            decoder.handle_media(datagram.clone(), &mut out);
        }
        for packet in out.drain(..) {
            let header = Packet::parse(packet.clone()).expect("the packet is valid").header;
            let number = header.seq.0.wrapping_sub(Seq::FIRST.0) as usize;
            assert_eq!(packet, packets[number], "recovered bytes are identical");
            present[number] = true;
        }
    }
    assert_eq!(decoder.stats().malformed, 0);
    present
}

fn is_parity(datagram: &&Bytes) -> bool {
    Repair::is_repair_packet(datagram)
}

#[test]
fn matrices_are_checked() {
    assert_eq!(Matrix::new(0, 1), Err(MatrixError::Side));
    assert_eq!(Matrix::new(5, 0), Err(MatrixError::Side));
    assert_eq!(Matrix::new(33, 1), Err(MatrixError::Side));
    assert_eq!(Matrix::new(21, 20), Err(MatrixError::Area));
    assert_eq!(Matrix::columns_only(8, 1), Err(MatrixError::OneRow));
    assert_eq!(Matrix::new(20, 20).unwrap().overhead(), 0.1);
    assert_eq!(Matrix::columns_only(8, 5).unwrap().overhead(), 0.2);
    assert_eq!(Matrix::new(5, 1).unwrap().overhead(), 0.2);
}

#[test]
fn rows_follow_at_once_and_columns_during_the_next_block() {
    let packets: Vec<Bytes> = (0..24).map(|number| media(number, 9)).collect();
    let matrix = Matrix::new(4, 3).unwrap();
    let now = Instant::now();
    let (mut encoder, mut out, mut line) = (encoder(matrix, now), Vec::new(), String::new());
    for packet in &packets {
        line.push('m');
        encoder.push(now, packet, &mut out);
        for datagram in out.drain(..) {
            line.push(match repair(&datagram).protection {
                Protection::Row { count: 4, columns_follow: true } => 'r',
                Protection::Column { stride: 4, count: 3 } => 'c',
                other => panic!("{other:?}"),
            });
        }
    }
    // The second block's packets 0, 3, 6 and 9 bring the first one's columns.
    assert_eq!(line, "mmmmrmmmmrmmmmrmcmmmrcmmmcmrmmcmmr");
}

#[test]
fn a_parity_packet_has_the_flexfec_format() {
    let packets = [media(0, 3), media(1, 5)];
    let sent = sent(Matrix::new(2, 1).unwrap(), &packets);
    let repair = repair(&sent[2]);
    assert_eq!(sent.len(), 3);
    assert_eq!(repair.header.ssrc, PARITY);
    assert_eq!(repair.header.seq, Seq(65530));
    assert_eq!((repair.media, repair.base), (MEDIA, Seq::FIRST));
    assert_eq!(repair.protection, Protection::Row { count: 2, columns_follow: false });
    let word = |packet| flexfec::header_word(packet).unwrap();
    assert_eq!(repair.word, word(&packets[0]) ^ word(&packets[1]));
    assert_eq!(repair.body.len(), 5);
    assert_eq!(sent[2].len(), OVERHEAD + 5);
    assert_eq!(repair.encode(), sent[2]);
}

#[test]
fn losses_in_the_packetizers_bursts_are_recovered() {
    let mut packetizer = Packetizer::new(MEDIA, 1120);
    let now = Instant::now();
    let mut encoder = encoder(Matrix::new(10, 10).unwrap(), now);
    let (mut packets, mut parity) = (Vec::new(), Vec::new());
    for (time, len) in [(0, 40_000), (20, 300), (40, 7_000), (60, 50), (80, 63_000)] {
        let burst = packetizer.packetize(&Tag::new(TagKind::Video, time, &vec![7; len]).unwrap());
        encoder.push_burst(now, &burst, &mut parity);
        packets.extend((0..burst.count()).map(|index| burst.packet(index).unwrap()));
    }
    encoder.flush(now, &mut parity);
    // Every tenth packet, and ten consecutive ones.
    let lost = |number: usize| {
        number % 10 == 3 && !(30..50).contains(&number) || (35..45).contains(&number)
    };
    let got = packets.iter().enumerate().filter(|(number, _)| !lost(*number));
    let sent: Vec<_> = got.map(|(_, packet)| packet).chain(&parity).collect();
    assert_eq!(received(sent, &packets), vec![true; packets.len()]);
}

#[test]
fn a_pause_flushes_parity_of_the_last_packets() {
    let matrix = Matrix::new(10, 10).unwrap();
    let (start, ms) = (Instant::now(), Duration::from_millis);
    let (mut encoder, mut out) = (encoder(matrix, start), Vec::new());
    for number in 0..13 {
        encoder.push(start + ms(number), &media(number as usize, 100), &mut out);
    }
    assert_eq!(out.len(), 1, "parity of the full row");
    assert_eq!(encoder.poll_timeout(), Some(start + ms(12 + 50)));
    encoder.handle_timeout(start + ms(61), &mut out);
    assert_eq!(out.len(), 1);
    encoder.handle_timeout(start + ms(62), &mut out);
    let protections: Vec<_> = out.iter().map(|datagram| repair(datagram).protection).collect();
    let row = |count| Protection::Row { count, columns_follow: true };
    let column = Protection::Column { stride: 10, count: 2 };
    assert_eq!(protections, [row(10), row(3), column, column, column]);
    // 50 ms after the last packet, on the media's clock.
    assert_eq!(repair(&out[1]).header.timestamp, 2 * 3600 + 50 * 90);
    assert_eq!(encoder.poll_timeout(), None);
    assert_eq!(encoder.stats().parity, 5);
}

#[test]
fn a_slow_stream_gets_shorter_rows() {
    let (start, ms) = (Instant::now(), Duration::from_millis);
    let (mut encoder, mut out) = (encoder(Matrix::new(10, 1).unwrap(), start), Vec::new());
    for number in 0..30 {
        encoder.push(start + ms(number * 30), &media(number as usize, 100), &mut out);
    }
    // A row starts at 0, is due at 100 ms, and is sent before the packet of 120 ms.
    let counts: Vec<_> = out.iter().map(|datagram| repair(datagram).protection.count()).collect();
    assert_eq!(counts, [4; 7]);
}

#[test]
fn a_gap_in_the_sequence_numbers_starts_a_new_block() {
    let now = Instant::now();
    let (mut encoder, mut out) = (encoder(Matrix::new(4, 4).unwrap(), now), Vec::new());
    for number in [0, 1, 2, 5, 6, 7, 8] {
        encoder.push(now, &media(number, 50), &mut out);
    }
    let protected: Vec<_> = out
        .iter()
        .map(|datagram| (repair(datagram).base, repair(datagram).protection.count()))
        .collect();
    assert_eq!(protected, [(Seq::FIRST, 3), (Seq::FIRST.plus(5), 4)]);
    assert_eq!((encoder.stats().breaks, encoder.stats().media), (1, 7));
    encoder.push(now, &[0x80; 11], &mut out);
    encoder.push(now, &[0x80; 1500], &mut out);
    assert_eq!((encoder.stats().malformed, out.len()), (2, 2));
}

#[test]
fn useless_and_unrecoverable_parity_is_counted() {
    let packets: Vec<Bytes> = (0..6000).map(|number| media(number, 20)).collect();
    let sent = sent(Matrix::new(5, 1).unwrap(), &packets[..10]);
    let parity: Vec<_> = sent.iter().filter(is_parity).map(repair).collect();
    let (mut decoder, mut out) = (decoder(), Vec::new());
    decoder.handle_parity(parity[0].clone(), &mut out);
    assert_eq!(decoder.stats().unrecoverable, 1, "no media yet");
    for packet in &packets[..5] {
        decoder.handle_media(packet.clone(), &mut out);
    }
    decoder.handle_parity(parity[0].clone(), &mut out);
    assert_eq!(decoder.stats().useless, 1, "no packet is missing");
    decoder.handle_parity(parity[1].clone(), &mut out);
    decoder.handle_parity(parity[1].clone(), &mut out);
    assert_eq!(decoder.stats().useless, 2, "duplicate parity");
    decoder.handle_parity(Repair { media: Ssrc(1), ..parity[1].clone() }, &mut out);
    assert_eq!(decoder.stats().malformed, 1);
    for packet in &packets[10..5000] {
        decoder.handle_media(packet.clone(), &mut out);
    }
    assert_eq!(decoder.stats().unrecoverable, 2, "parity left the window");
    decoder.handle_parity(parity[1].clone(), &mut out);
    assert_eq!(decoder.stats().unrecoverable, 3, "parity older than the window");
    assert_eq!((decoder.stats().recovered, out.len()), (0, 0));
}

#[test]
fn corrupted_parity_recovers_nothing() {
    let packets: Vec<Bytes> = (0..5).map(|number| media(number, 20 + number)).collect();
    let good = repair(&sent(Matrix::new(5, 1).unwrap(), &packets)[5]);
    let short = Repair { body: good.body.slice(..23), ..good.clone() };
    let long = Repair { body: [&good.body[..], &[1]].concat().into(), ..good.clone() };
    let absurd = Repair { word: good.word ^ 0x0000_0f00_0000_0000, ..good.clone() };
    let other_type = Repair { word: good.word ^ 0x0001_0000_0000_0000, ..good.clone() };
    for bad in [short, long, absurd, other_type] {
        let (mut decoder, mut out) = (decoder(), Vec::new());
        for packet in [&packets[0], &packets[1], &packets[3], &packets[4]] {
            decoder.handle_media(packet.clone(), &mut out);
        }
        decoder.handle_parity(bad, &mut out);
        assert_eq!((decoder.stats().malformed, out.len()), (1, 0));
        decoder.handle_parity(good.clone(), &mut out);
        assert_eq!(out, packets[2..3]);
    }
}

/// A recovered packet may move the window, so that other parity expires during recovery.
#[test]
fn waiting_bytes_stay_exact_during_recovery() {
    let now = Instant::now();
    let mut rng = SmallRng::seed_from_u64(6);
    for round in 0..2000 {
        let limits = decoder::Limits { packets: 5 + round % 12, ..decoder::Limits::default() };
        let (mut encoder, mut decoder) =
            (encoder(Matrix::new(2, 3).unwrap(), now), Decoder::new(MEDIA, limits));
        let (mut in_flight, mut out) = (Vec::new(), Vec::new());
        for number in 0..300 {
            let packet = media(number, 10 + number % 90);
            in_flight.push(packet.clone());
            encoder.push(now, &packet, &mut in_flight);
            while in_flight.len() > 6 {
                // Strongly reordered, with 30 % loss.
                let datagram = in_flight.swap_remove(rng.random_range(0..6));
                if rng.random_bool(0.3) {
                    continue;
                }
                match Repair::is_repair_packet(&datagram) {
                    true => decoder.handle_parity(repair(&datagram), &mut out),
                    false => decoder.handle_media(datagram, &mut out),
                }
            }
        }
        assert!(decoder.held_bytes() <= limits.packet_bytes + limits.parity_bytes);
        assert!(!out.is_empty());
    }
}

#[test]
fn memory_is_bounded_for_any_input() {
    let limits =
        decoder::Limits { packets: 500, packet_bytes: 200_000, parity: 40, parity_bytes: 30_000 };
    let mut decoder = Decoder::new(MEDIA, limits);
    let mut rng = SmallRng::seed_from_u64(5);
    let mut out = Vec::new();
    for round in 0..50_000_usize {
        if rng.random_bool(0.3) {
            let number = if rng.random_bool(0.9) { round } else { rng.random_range(0..1 << 16) };
            decoder.handle_media(media(number, rng.random_range(0..1400)), &mut out);
        } else {
            let mut bytes = vec![0x81, flexfec::PAYLOAD_TYPE];
            bytes.resize(OVERHEAD + rng.random_range(0..1488), 0);
            rng.fill(&mut bytes[16..]);
            bytes[12..16].copy_from_slice(&MEDIA.0.to_be_bytes());
            bytes[16] = bytes[16] & 0x3f | 0x40;
            if rng.random_bool(0.7) {
                let near = Seq::FIRST.plus(round).0.to_be_bytes();
                bytes[24..26].copy_from_slice(&near);
            }
            let Ok(repair) = Repair::parse(bytes.into()) else { continue };
            decoder.handle_parity(repair, &mut out);
        }
        assert!(decoder.held_bytes() <= 200_000 + 30_000 + 1500);
        assert!(decoder.window_len() <= 500 && decoder.waiting_len() <= 40);
        out.clear();
    }
    let stats = decoder.stats();
    assert!(stats.unrecoverable > 1000 && stats.malformed > 0, "{stats:?}");
}

#[test]
fn one_forged_packet_does_not_exclude_the_stream() {
    let packets: Vec<Bytes> = (0..400).map(|number| media(number, 20)).collect();
    let sent = sent(Matrix::new(5, 1).unwrap(), &packets);
    let (mut decoder, mut out) = (decoder(), Vec::new());
    decoder.handle_media(media(20_000, 20), &mut out);
    for datagram in sent.iter().filter(|datagram| **datagram != packets[302]) {
        match Repair::is_repair_packet(datagram) {
            true => decoder.handle_parity(repair(datagram), &mut out),
            false => decoder.handle_media(datagram.clone(), &mut out),
        }
    }
    assert_eq!(out, packets[302..303]);
}

fn any_matrix() -> impl Strategy<Value = Matrix> {
    (1u8..=20, 1u8..=20, any::<bool>()).prop_filter_map("too large", |(columns, rows, both)| {
        match both || rows == 1 {
            true => Matrix::new(columns, rows).ok(),
            false => Matrix::columns_only(columns, rows).ok(),
        }
    })
}

proptest! {
    #[test]
    fn one_loss_per_row_is_recovered(
        columns in 1u8..=20, rows in 1u8..=20, seed: u64, count in 1usize..900,
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let packets: Vec<_> =
            (0..count).map(|number| media(number, rng.random_range(0..80))).collect();
        let sent = sent(Matrix::new(columns, rows).unwrap(), &packets);
        let rows: Vec<_> = sent.iter().filter(is_parity).map(repair).filter(|repair| {
            repair.protection.stride() == 1
        }).collect();
        let lost: Vec<Seq> = rows.iter().map(|row| {
            row.base.plus(rng.random_range(0..row.protection.count()))
        }).filter(|seq| *seq != Seq::FIRST).collect();
        // The first packet sets the position of the window.
        let got = sent.iter().filter(|datagram| {
            let seq = Packet::parse((*datagram).clone()).unwrap().header.seq;
            is_parity(datagram) || !lost.contains(&seq)
        });
        prop_assert_eq!(received(got, &packets), vec![true; count]);
    }

    #[test]
    fn columns_recover_a_burst_as_long_as_a_row(
        columns in 1u8..=20, rows in 2u8..=20, both: bool, from: u16, len in 1usize..=20, seed: u64,
    ) {
        let matrix = match both {
            true => Matrix::new(columns, rows),
            false => Matrix::columns_only(columns, rows),
        };
        let Ok(matrix) = matrix else { return Ok(()) };
        let mut rng = SmallRng::seed_from_u64(seed);
        let count = 3 * matrix.area();
        let packets: Vec<_> =
            (0..count).map(|number| media(number, rng.random_range(0..40))).collect();
        let from = 1 + usize::from(from) % (count - 1);
        let burst = from..from + len.min(matrix.columns());
        let sent = sent(matrix, &packets);
        let lost: Vec<_> = packets.get(burst.start..burst.end.min(count)).unwrap().to_vec();
        let got = sent.iter().filter(|datagram| !lost.contains(datagram));
        prop_assert_eq!(received(got, &packets), vec![true; count]);
    }

    #[test]
    fn a_single_loss_before_a_pause_is_recovered(
        matrix in any_matrix(), count in 2usize..120, lost: u16,
    ) {
        let packets: Vec<_> = (0..count).map(|number| media(number, number % 60)).collect();
        let lost = &packets[1 + usize::from(lost) % (count - 1)];
        let sent = sent(matrix, &packets);
        prop_assert_eq!(
            received(sent.iter().filter(|datagram| *datagram != lost), &packets),
            vec![true; count]
        );
    }

    #[test]
    fn order_and_duplicates_do_not_matter(
        matrix in any_matrix(), count in 2usize..300, seed: u64, loss in 0.0f64..0.3,
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let packets: Vec<_> =
            (0..count).map(|number| media(number, rng.random_range(0..60))).collect();
        let sent = sent(matrix, &packets);
        let got: Vec<_> = sent.iter().enumerate()
            .filter(|(at, _)| *at == 0 || !rng.random_bool(loss))
            .map(|(_, datagram)| datagram).collect();
        let expected = received(got.iter().copied(), &packets);
        let mut mixed: Vec<_> = got[1..].iter().chain(&got[got.len() / 2..]).copied().collect();
        for at in 1..mixed.len() {
            mixed.swap(at, rng.random_range(at.saturating_sub(20)..=at));
        }
        prop_assert_eq!(received(got[..1].iter().copied().chain(mixed), &packets), expected);
    }
}

/// Returns the share of media lost after recovery on a path with the loss rate `loss` and the mean
/// burst length `burst` (Gilbert model; 1 is independent loss).
pub(super) fn residual(matrix: Matrix, loss: f64, burst: f64, seed: u64) -> f64 {
    const PACKETS: usize = 100_000;
    let mut rng = SmallRng::seed_from_u64(seed);
    let now = Instant::now();
    let (mut encoder, mut decoder) = (encoder(matrix, now), decoder());
    let (mut parity, mut out, mut bad, mut present) = (Vec::new(), Vec::new(), false, 0);
    let begin = loss / (burst * (1.0 - loss));
    let mut is_lost = move || {
        bad = match burst {
            1.0 => rng.random_bool(loss),
            _ if bad => !rng.random_bool(1.0 / burst),
            _ => rng.random_bool(begin),
        };
        bad
    };
    for number in 0..PACKETS {
        let packet = media(number, 4);
        encoder.push(now, &packet, &mut parity);
        if number == 0 || !is_lost() {
            present += 1;
            decoder.handle_media(packet, &mut out);
        }
        for parity in parity.drain(..) {
            if !is_lost() {
                decoder.handle_parity(repair(&parity), &mut out);
            }
        }
        present += out.drain(..).count();
    }
    1.0 - present as f64 / PACKETS as f64
}

#[test]
fn residual_loss_matches_the_model() {
    let rows = |columns| Matrix::new(columns, 1).unwrap();
    let square = Matrix::new(10, 10).unwrap();
    let columns = Matrix::columns_only(8, 8).unwrap();
    // Independent loss p, parity over n: a lost packet is unrecoverable if any of n others is lost.
    let model = |p: f64, n: i32| p * (1.0 - (1.0 - p).powi(n));
    for loss in [0.01, 0.05, 0.1] {
        for (matrix, n) in [(rows(5), 5), (rows(10), 10), (columns, 8)] {
            let (actual, model) = (residual(matrix, loss, 1.0, 7), model(loss, n));
            let near = (actual - model).abs() < 0.1 * model + 1.5e-4;
            assert!(near, "{matrix:?} {loss}: {actual} instead of {model}");
        }
    }
    for (loss, most) in [(0.01, 2e-5), (0.05, 1e-3), (0.1, 0.03)] {
        let left = residual(square, loss, 1.0, 7);
        assert!(left < most, "{loss}: {left}");
    }
    // Bursts of 8: rows are useless, ten columns help, twenty help more.
    for (loss, most) in [(0.01, 0.007), (0.05, 0.035), (0.1, 0.09)] {
        assert!(residual(rows(5), loss, 8.0, 7) > 0.9 * loss);
        let (left, wide) =
            (residual(square, loss, 8.0, 7), residual(Matrix::new(20, 5).unwrap(), loss, 8.0, 7));
        assert!(wide < left && left < most, "{loss}: {wide} {left}");
    }
}
