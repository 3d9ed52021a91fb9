//! RTP packets and their reassembly into tags.

use bytes::Bytes;
use downpour_media::flv::{Tag, TagKind};
use downpour_repair::rtp::{Depacketizer, Packet, Packetizer, Seq, Ssrc, packet::HEADER_LEN};

use super::{Random, flv::check_tag, memory, take, take_up_to};

/// The first byte selects the meaning of the rest: one packet, packets and losses, or tags to send.
pub fn check(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    match choice % 3 {
        0 => check_packet(data),
        1 => {
            let (_, held) = memory::peak(|| check_depacketizer(data));
            // A datagram of twelve bytes takes about two hundred bytes of memory.
            assert!(held <= 32 * data.len() + (16 << 10), "{held} held for {}", data.len());
        }
        _ => check_identity(choice, data),
    }
}

/// An encoded header parses to the same value, also with CSRC list, extension and padding. A header
/// without them is encoded to the same bytes.
fn check_packet(data: &[u8]) {
    let Ok(packet) = Packet::parse(Bytes::copy_from_slice(data)) else { return };
    let encoded = [&packet.header.encode()[..], &packet.payload].concat();
    let plain = data[0] == 0x80;
    assert!(plain == (encoded == data), "only a plain header round-trips to the same bytes");
    let mut random = Random::of(data);
    let (csrcs, words, padding) = (random.below(16), random.below(5), 1 + random.below(40));
    let mut full = encoded.clone();
    full[0] |= 0x30 | csrcs as u8;
    let extension = [&[0xbe, 0xde, 0, words as u8][..], &[0xa5; 16][..words * 4]].concat();
    full.splice(HEADER_LEN..HEADER_LEN, [vec![0x5a; csrcs * 4], extension].concat());
    full.resize(full.len() + padding - 1, 0);
    full.push(padding as u8);
    assert_eq!(Packet::parse(full.into()).as_ref(), Ok(&packet));
    assert_eq!(Packet::parse(encoded.into()), Ok(packet));
}

/// Every tag consists of the bytes of the last packets, and every packet is part of a tag or counted as
/// discarded or malformed. Two bytes precede each packet: its length, or a number of lost packets.
fn check_depacketizer(mut data: &[u8]) {
    let joining = take(&mut data) == Some([1]);
    let mut depacketizer = if joining { Depacketizer::joining() } else { Depacketizer::new() };
    // Packets and bytes of the tag in progress.
    let (mut held, mut bytes) = (0, Vec::new());
    while let Some(word) = take(&mut data) {
        let word = u16::from_be_bytes(word);
        if word & 0x8000 != 0 {
            let lost = u64::from(word & 0xff) + 1;
            depacketizer.lost(lost);
            let damage = depacketizer.take_damage().expect("a loss is damage");
            assert_eq!((damage.packets, damage.discarded, damage.malformed), (lost, held, 0));
            (held, bytes) = (0, Vec::new());
            assert!(!depacketizer.at_boundary());
            continue;
        }
        let datagram = take_up_to(&mut data, usize::from(word & 0x7ff));
        let Ok(packet) = Packet::parse(Bytes::copy_from_slice(datagram)) else { continue };
        held += 1;
        bytes.extend_from_slice(&packet.payload);
        let tag = depacketizer.packet(&packet);
        let damage = depacketizer.take_damage();
        assert_eq!(tag.is_some(), packet.header.marker && damage.is_none());
        if let Some(tag) = &tag {
            check_tag(tag);
            // The stream id of the tag is 0.
            bytes[8..11].fill(0);
            assert_eq!(tag.unit(), bytes);
            assert!(depacketizer.at_boundary());
        } else if let Some(damage) = damage {
            assert_eq!((damage.packets, damage.discarded + damage.malformed), (0, held));
            assert_eq!(depacketizer.at_boundary(), packet.header.marker);
        } else {
            assert!(!depacketizer.at_boundary(), "a partial tag is held");
            continue;
        }
        (held, bytes) = (0, Vec::new());
    }
}

/// Tags survive packetizing and reassembly, also for a receiver that joins.
fn check_identity(choice: u8, mut data: &[u8]) {
    // 0 to 1275: beyond both bounds.
    let payload_max = usize::from(choice) * 5;
    let mut packetizer = Packetizer::new(Ssrc(7), payload_max);
    let (mut depacketizer, mut joining) = (Depacketizer::new(), Depacketizer::joining());
    let mut seq = Seq::FIRST;
    while let Some([kind, t0, t1, high, low]) = take(&mut data) {
        let kind = [TagKind::Audio, TagKind::Video, TagKind::Script][usize::from(kind % 3)];
        let timestamp = u32::from_be_bytes([t0, 0xff, 0xff, t1]);
        let len = u16::from_be_bytes([high, low]) % 4096;
        let body = take_up_to(&mut data, len.into());
        let tag = Tag::new(kind, timestamp, body).expect("shorter than the limit");
        let burst = packetizer.packetize(&tag);
        assert_eq!(burst.first_seq(), seq);
        let mut tags = Vec::new();
        for index in 0..burst.count() {
            assert_eq!(depacketizer.at_boundary(), index == 0);
            let datagram = burst.packet(index).expect("below the packet count");
            assert!(
                datagram.len()
                    <= HEADER_LEN
                        + payload_max.clamp(Packetizer::PAYLOAD_LEAST, Packetizer::PAYLOAD_LIMIT)
            );
            let packet = Packet::parse(datagram).expect("encoded by the packetizer");
            assert_eq!(packet.header.seq, seq);
            tags.extend([depacketizer.packet(&packet), joining.packet(&packet)]);
            seq = seq.plus(1);
        }
        let tags: Vec<Tag> = tags.into_iter().flatten().collect();
        assert_eq!(tags, [tag.clone(), tag]);
        assert_eq!((depacketizer.take_damage(), joining.take_damage()), (None, None));
    }
    assert_eq!(packetizer.next_seq(), seq);
}
