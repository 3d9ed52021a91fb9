//! Micro-benchmarks of single parts, without sockets: `cargo bench --bench micro`. `-- --quick`
//! takes about a minute.

use std::{
    collections::VecDeque,
    hint::black_box,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use criterion::{
    BatchSize, BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
    measurement::WallTime,
};
use downpour_media::flv::{FILE_HEADER, FlvReader, Tag, TagKind};
use downpour_repair::{
    history::History,
    receiver::{Event, Path, Receiver, Settings},
    rtp::{Burst, Depacketizer, Packet, Packetizer, Seq, Ssrc, packet::Header},
};
use downpour_rtmp::chunk::{AUDIO, ChunkReader, ChunkWriter, MessageHead, VIDEO};
use rand::{Rng, SeedableRng, rngs::SmallRng};

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = packetize, depacketize, history, chunks, receive, frame_tags, read_flv
}
criterion_main!(benches);

/// Splits a tag into RTP packets.
fn packetize(c: &mut Criterion) {
    let mut group = c.benchmark_group("packetize");
    for (name, len) in SIZES {
        let tag = tag(0, len);
        let mut packetizer = Packetizer::new(SSRC, PAYLOAD);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(name, |b| b.iter(|| packetizer.packetize(black_box(&tag))));
    }
}

/// Reassembles a tag from RTP packets in order.
fn depacketize(c: &mut Criterion) {
    let mut group = c.benchmark_group("depacketize");
    for (name, len) in SIZES {
        let burst = Packetizer::new(SSRC, PAYLOAD).packetize(&tag(0, len));
        let packets = packets(&burst);
        let mut depacketizer = Depacketizer::new();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(name, |b| {
            b.iter(|| {
                let tags = packets.iter().filter_map(|packet| depacketizer.packet(packet));
                assert_eq!(tags.count(), 1);
            });
        });
    }
}

/// The ring buffer of sent packets: push, look up, expire.
fn history(c: &mut Criterion) {
    let mut group = c.benchmark_group("history");
    let bursts = second_of_bursts(&mut Packetizer::new(SSRC, PAYLOAD));
    let packets = bursts.iter().map(Burst::count).sum::<usize>() as u64;
    history_push(&mut group, packets);
    history_look_up(&mut group);
    history_expire(&mut group, &bursts, packets);
}

/// Pushes a second of bursts into a full ring. `packets` is their number.
fn history_push(group: &mut Group<'_>, packets: u64) {
    group.throughput(Throughput::Elements(packets));
    for (name, max_packets, step) in [
        ("push, bounded by packets", 5000, Duration::ZERO),
        ("push, bounded by age", 1 << 15, Duration::from_millis(15)),
    ] {
        let mut packetizer = Packetizer::new(SSRC, PAYLOAD);
        let mut ring = History::new(max_packets, Duration::from_secs(3));
        let mut now = Instant::now();
        let mut push = |ring: &mut History, bursts: Vec<Burst>| {
            for burst in bursts {
                now += step;
                ring.push(now, burst);
            }
        };
        // The ring is full before the measurement.
        for _ in 0..60 {
            push(&mut ring, second_of_bursts(&mut packetizer));
        }
        group.bench_function(name, |b| {
            b.iter_batched(
                || second_of_bursts(&mut packetizer),
                |bursts| push(&mut ring, bursts),
                BatchSize::LargeInput,
            );
        });
    }
}

/// Looks up 1000 random packets of a ring of 4900.
fn history_look_up(group: &mut Group<'_>) {
    let now = Instant::now();
    let mut ring = History::new(5000, Duration::from_secs(3600));
    let mut packetizer = Packetizer::new(SSRC, PAYLOAD);
    while ring.len() < 4900 {
        let bursts = second_of_bursts(&mut packetizer);
        bursts.into_iter().for_each(|burst| ring.push(now, burst));
    }
    let newest = ring.newest_seq().expect("the ring has packets");
    let mut rng = SmallRng::seed_from_u64(1);
    let wanted: Vec<_> =
        (0..1000).map(|_| Seq(newest.0.wrapping_sub(rng.random_range(0..4800)))).collect();
    group.throughput(Throughput::Elements(wanted.len() as u64));
    group.bench_function("look-up", |b| {
        b.iter(|| assert!(wanted.iter().all(|seq| black_box(ring.packet(*seq)).is_some())));
    });
}

/// Expires a ring that has `bursts`, in all `packets` packets. Clones share the bursts' memory.
fn history_expire(group: &mut Group<'_>, bursts: &[Burst], packets: u64) {
    let now = Instant::now();
    group.throughput(Throughput::Elements(packets));
    group.bench_function("expire a second", |b| {
        b.iter_batched(
            || {
                let mut ring = History::new(1 << 15, Duration::from_secs(3));
                bursts.iter().for_each(|burst| ring.push(now, burst.clone()));
                ring
            },
            |mut ring| {
                ring.expire(now + Duration::from_secs(4));
                ring
            },
            BatchSize::LargeInput,
        );
    });
}

/// Parses RTMP chunks: one second of interleaved audio and video, in reads of 16 KiB.
fn chunks(c: &mut Criterion) {
    let mut group = c.benchmark_group("chunk parse");
    for chunk_size in [128, 4096] {
        let (bytes, messages) = interleaved(chunk_size);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::new("interleaved", chunk_size), |b| {
            b.iter(|| {
                let mut reader = ChunkReader::new(16 << 20);
                let mut found = 0;
                for mut read in bytes.chunks(16 << 10) {
                    while let Some(message) = reader.read(&mut read).expect("valid chunks") {
                        black_box(message);
                        found += 1;
                    }
                }
                assert_eq!(found, messages);
            });
        });
    }
}

/// An edge's receiver, which reorders packets and requests lost ones. Ten seconds of 1 Mbit/s.
fn receive(c: &mut Criterion) {
    let mut group = c.benchmark_group("receiver");
    let mut packetizer = Packetizer::new(SSRC, PAYLOAD);
    let bursts: Vec<_> = (0..10).flat_map(|_| second_of_bursts(&mut packetizer)).collect();
    let packets: Vec<_> = bursts.iter().flat_map(packets).collect();
    let datagrams: Vec<_> = bursts
        .iter()
        .flat_map(|burst| (0..burst.count()).filter_map(|index| burst.packet(index)))
        .collect();
    group.throughput(Throughput::Elements(packets.len() as u64));
    group.bench_function("in order, fast path", |b| {
        b.iter(|| assert_eq!(run_next(&datagrams), bursts.len()));
    });
    for (name, percent) in [("in order, through the window", 0), ("5 % lost and repaired", 5)] {
        let mut rng = SmallRng::seed_from_u64(2);
        // The first and the last packet arrive: a receiver starts at the first packet that arrives,
        // and detects a gap by the next packet.
        let last = packets.len() - 1;
        let lost: Vec<_> = (0..packets.len())
            .map(|index| index != 0 && index != last && rng.random_range(0..100) < percent)
            .collect();
        group.bench_function(name, |b| {
            b.iter_batched(
                || packets.clone(),
                |packets| assert_eq!(run_receiver(packets, &lost), lost.len()),
                BatchSize::LargeInput,
            );
        });
    }
}

/// The fast path of an edge: the next packet of a stream without gaps goes straight into its tag.
/// Unlike the other cases it includes the copy of the payload.
fn run_next(datagrams: &[Bytes]) -> usize {
    let mut now = Instant::now();
    let first = Packet::parse(datagrams[0].clone()).expect("valid RTP");
    let mut receiver = Receiver::starting_at(Settings::default(), first.header.seq);
    let mut depacketizer = Depacketizer::new();
    let mut tags = 0;
    for datagram in datagrams {
        now += Duration::from_millis(1);
        let (header, payload) = Header::parse(datagram).expect("valid RTP");
        assert!(receiver.handle_next(now, header.seq, 0));
        tags += usize::from(depacketizer.payload(&header, &datagram[payload]).is_some());
    }
    tags
}

/// Feeds the packets to a receiver, 1 ms apart, and the requested ones 20 ms after the request.
/// Returns the number of packets that it delivered.
fn run_receiver(packets: Vec<Packet>, lost: &[bool]) -> usize {
    let mut now = Instant::now();
    let first = packets[0].header.seq;
    let mut receiver = Receiver::starting_at(Settings::default(), first);
    receiver.set_round_trip(now, ROUND_TRIP, Duration::from_millis(1));
    let mut answers: VecDeque<(Instant, Packet)> = VecDeque::new();
    let mut delivered = 0;
    let held: Vec<Option<Packet>> =
        packets.iter().zip(lost).map(|(packet, lost)| lost.then(|| packet.clone())).collect();
    let mut arriving = packets.into_iter().zip(lost);
    loop {
        now += Duration::from_millis(1);
        match arriving.next() {
            Some((packet, false)) => receiver.handle_packet(now, packet, Path::Live(0)),
            Some((_, true)) => {}
            None if answers.is_empty() && receiver.missing() == 0 => return delivered,
            None => {}
        }
        while answers.front().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, packet)) = answers.pop_front() {
                receiver.handle_packet(now, packet, Path::Repair);
            }
        }
        if receiver.poll_timeout().is_some_and(|at| at <= now) {
            receiver.handle_timeout(now);
            while let Some(request) = receiver.poll_request(now) {
                let requested = request
                    .seqs
                    .iter()
                    .filter_map(|seq| held[usize::from(seq.0.wrapping_sub(first.0))].clone());
                answers.extend(requested.map(|packet| (now + ROUND_TRIP, packet)));
            }
        }
        while let Some(event) = receiver.poll_event() {
            delivered += usize::from(matches!(event, Event::Packet(_)));
        }
    }
}

/// Makes a framed tag of a body: with a copy, and in place.
fn frame_tags(c: &mut Criterion) {
    let mut group = c.benchmark_group("tag");
    for (name, len) in SIZES {
        let body = body(len);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::new("new", name), |b| {
            b.iter(|| Tag::new(TagKind::Video, 40, black_box(&body)));
        });
        // In place, the time does not depend on the length.
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("from_buffer", name), |b| {
            b.iter_batched(
                || {
                    let mut buffer = Tag::buffer_for(len);
                    buffer.put_slice(&body);
                    buffer
                },
                |buffer| Tag::from_buffer(TagKind::Video, 40, buffer),
                BatchSize::SmallInput,
            );
        });
    }
}

/// Parses one second of FLV, in reads of 16 KiB.
fn read_flv(c: &mut Criterion) {
    let mut file = BytesMut::from(&FILE_HEADER[..]);
    let tags = second_of_tags();
    tags.iter().for_each(|tag| file.extend_from_slice(tag.framed()));
    let mut group = c.benchmark_group("flv");
    group.throughput(Throughput::Bytes(file.len() as u64));
    group.bench_function("read", |b| {
        b.iter(|| {
            let mut reader = FlvReader::new();
            let mut found = 0;
            for read in file.chunks(16 << 10) {
                reader.push(read);
                while let Some(tag) = reader.next_tag().expect("valid FLV") {
                    black_box(tag);
                    found += 1;
                }
            }
            assert_eq!(found, tags.len());
        });
    });
}

/// One second at about 1 Mbit/s: a key frame, 24 other frames, and an audio frame per 23 ms.
fn second_of_tags() -> Vec<Tag> {
    let mut tags = Vec::new();
    for frame in 0..25 {
        tags.push(tag(frame * 40, if frame == 0 { 25_000 } else { 3_800 }));
        tags.push(audio(frame * 40));
        if frame % 4 != 3 {
            tags.push(audio(frame * 40 + 23));
        }
    }
    tags
}

fn second_of_bursts(packetizer: &mut Packetizer) -> Vec<Burst> {
    second_of_tags().iter().map(|tag| packetizer.packetize(tag)).collect()
}

/// [`second_of_tags`] as chunks, with audio messages between the chunks of video messages. Returns
/// the chunks and the number of messages.
fn interleaved(chunk_size: u32) -> (Bytes, usize) {
    let mut writer = ChunkWriter::new();
    let mut out = BytesMut::new();
    writer.set_chunk_size(chunk_size, &mut out).expect("a valid chunk size");
    let tags = second_of_tags();
    let mut audio: VecDeque<_> = tags.iter().filter(|tag| tag.kind() == TagKind::Audio).collect();
    let mut messages = 0;
    for video in tags.iter().filter(|tag| tag.kind() == TagKind::Video) {
        let mut message =
            writer.begin(6, head(VIDEO, video), video.body().len()).expect("a short message");
        while writer.write_chunk(&mut message, video.body(), &mut out) {
            let due = |tag: &&&Tag| tag.timestamp() < video.timestamp() + 40;
            if audio.front().filter(due).is_some()
                && let Some(tag) = audio.pop_front()
            {
                writer.write(4, head(AUDIO, tag), tag.body(), &mut out).expect("a short message");
                messages += 1;
            }
        }
        messages += 1;
    }
    (out.freeze(), messages)
}

fn head(kind: u8, tag: &Tag) -> MessageHead {
    MessageHead { kind, stream_id: 1, timestamp: tag.timestamp() }
}

fn packets(burst: &Burst) -> Vec<Packet> {
    let packets = (0..burst.count()).filter_map(|index| burst.packet(index));
    packets.map(|datagram| Packet::parse(datagram).expect("valid RTP")).collect()
}

fn tag(timestamp: u32, len: usize) -> Tag {
    Tag::new(TagKind::Video, timestamp, &body(len)).expect("a short body")
}

fn audio(timestamp: u32) -> Tag {
    let mut body = body(340);
    body[..2].copy_from_slice(&[0xaf, 1]);
    Tag::new(TagKind::Audio, timestamp, &body).expect("a short body")
}

/// The body of a video frame, not of a sequence header.
fn body(len: usize) -> Vec<u8> {
    let mut body: Vec<u8> = (0..len).map(|at| at as u8).collect();
    body[..2].copy_from_slice(&[0x27, 1]);
    body
}

/// Lengths in bytes: an AAC frame of 128 kbit/s, a frame of 1 and of 5 Mbit/s, and a key frame of
/// 20 Mbit/s.
const SIZES: [(&str, usize); 4] =
    [("audio, 340 B", 340), ("4 KB", 4_000), ("25 KB", 25_000), ("key frame, 250 KB", 250_000)];
const SSRC: Ssrc = Ssrc(7);
/// Default of `rtp_payload_max`.
const PAYLOAD: usize = 1120;
const ROUND_TRIP: Duration = Duration::from_millis(20);

type Group<'a> = BenchmarkGroup<'a, WallTime>;
