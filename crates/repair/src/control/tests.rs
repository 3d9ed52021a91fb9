//! Messages, framing and reports together.

use proptest::prelude::*;

use super::*;
use crate::{
    receiver::{DELAY_BOUNDS_MS, Histogram, MAX_PATHS, Stats},
    rtp::{Seq, Ssrc},
};
use downpour_media::PublicationId;
use downpour_media::flv::{Tag, TagKind};

fn main_headers() -> [Tag; 2] {
    [
        Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0, 1]).unwrap(),
        Tag::new(TagKind::Audio, 9, &[0xaf, 0, 0x12]).unwrap(),
    ]
}

fn info() -> StreamInfo {
    StreamInfo {
        key: "live/movie".parse().unwrap(),
        ssrc: Ssrc(0xdead_beef),
        publication: Some(PublicationId(0xab)),
        start_unix_ms: 1_700_000_000_000,
        headers: main_headers().into_iter().collect(),
        gop_start: Some(Seq(65000)),
        newest: None,
    }
}

#[test]
fn messages_have_the_json_of_the_wire_document() {
    let json = serde_json::to_value(CloudMessage::StreamUp(info())).unwrap();
    assert_eq!(
        json,
        serde_json::json!({
            "type": "stream_up", "key": "live/movie", "ssrc": 0xdead_beef_u32,
            "publication": "00000000000000ab",
            "start_unix_ms": 1_700_000_000_000_u64,
            "headers": {
                "video": "0900000600000000000000170000000001",
                "audio": "0800000300000900000000af0012",
                "metadata": null,
            },
            "gop_start": 65000, "newest": null,
        })
    );
    let welcome = Welcome { version: 1, node: "c".into(), nonce: Nonce([0xa1; 16]), rtp_port: 9 };
    assert_eq!(
        serde_json::to_value(CloudMessage::Welcome(welcome)).unwrap()["nonce"],
        "a1".repeat(16)
    );
}

fn cue() -> Tag {
    Tag::new(TagKind::Script, 40, b"\x02\x00\x0aonCuePoint\x05").unwrap()
}

#[test]
fn stream_data_is_a_script_tag_of_bounded_length() {
    let json =
        serde_json::to_value(CloudMessage::StreamData { ssrc: Ssrc(9), tag: cue() }).unwrap();
    let hex = "1200000e0000280000000002000a6f6e437565506f696e7405";
    assert_eq!(json, serde_json::json!({ "type": "stream_data", "ssrc": 9, "tag": hex }));
    let parse = |tag: &Tag| {
        let json = serde_json::json!({
            "type": "stream_data", "ssrc": 9, "tag": hex::encode(tag.unit())
        });
        serde_json::from_value::<CloudMessage>(json)
    };
    assert!(parse(&cue()).is_ok());
    assert!(parse(&Tag::new(TagKind::Video, 0, &[0x17, 1]).unwrap()).is_err());
    let script = |len| Tag::new(TagKind::Script, 0, &vec![2; len - Tag::HEADER_LEN]).unwrap();
    assert!(parse(&script(MAX_DATA_LEN)).is_ok());
    assert!(parse(&script(MAX_DATA_LEN + 1)).is_err());
}

#[test]
fn unknown_types_and_fields_are_ignored() {
    let parse = |json: &str| serde_json::from_str::<EdgeMessage>(json);
    assert_eq!(parse(r#"{"type":"dance","to":"music"}"#).unwrap(), EdgeMessage::Unknown);
    let hello = parse(r#"{"type":"hello","version":2,"node":"e","mood":"good"}"#).unwrap();
    assert!(matches!(hello, EdgeMessage::Hello(Hello { version: 2, token: None, .. })));
    assert!(parse(r#"{"type":"hello","version":1}"#).is_err());
    assert!(parse(r#"{"type":"subscribe","streams":["a/b/*/c"]}"#).is_err());
}

#[test]
fn lengths_out_of_range_are_refused_from_the_prefix() {
    for (head, length) in [([0u8; 4], 0), ([0, 0, 1, 1], 257), ([0xff; 4], u32::MAX as usize)] {
        let mut reader = ControlReader::new(256);
        reader.push(&head);
        assert_eq!(
            reader.next_message::<EdgeMessage>(),
            Err(ControlError::Length { length, max: 256 })
        );
    }
}

#[test]
fn an_oversized_header_is_left_out() {
    let mut info = info();
    let mut metadata = b"\x02\x00\x0aonMetaData".to_vec();
    metadata.resize(200_000, 0);
    assert!(info.headers.learn(&Tag::new(TagKind::Script, 0, &metadata).unwrap()));
    let frame = encode_control(&CloudMessage::StreamUp(info.clone())).unwrap();
    let mut reader = ControlReader::new(MAX_CONTROL_LEN);
    reader.push(&frame);
    info.headers = main_headers().into_iter().collect();
    assert_eq!(reader.next_message(), Ok(Some(CloudMessage::StreamUp(info))));
}

#[test]
fn headers_of_many_tracks_fit_in_a_message_and_old_nodes_read_the_main_ones() {
    let second = Tag::new(TagKind::Audio, 9, b"\x95\x00mp4a\x01\x12\x10").unwrap();
    let mut info = info();
    assert!(info.headers.learn(&second));
    let json = serde_json::to_value(CloudMessage::StreamUp(info.clone())).unwrap();
    assert_eq!(json["headers"]["audio"], "0800000300000900000000af0012");
    assert_eq!(json["headers"]["more"], serde_json::json!([hex::encode(second.unit())]));
    let read: CloudMessage = serde_json::from_value(json).unwrap();
    assert_eq!(read, CloudMessage::StreamUp(info.clone()));
    for id in 2..60 {
        let body = [&b"\x95\x00mp4a"[..], &[id], &[0x12; 40_000]].concat();
        info.headers.learn(&Tag::new(TagKind::Audio, 0, &body).unwrap());
    }
    let frame = encode_control(&CloudMessage::StreamUp(info.clone())).unwrap();
    let mut reader = ControlReader::new(MAX_CONTROL_LEN);
    reader.push(&frame);
    let Ok(Some(CloudMessage::StreamUp(read))) = reader.next_message() else {
        panic!("no message")
    };
    assert_eq!(
        (read.headers.video(), read.headers.audio()),
        (info.headers.video(), info.headers.audio())
    );
    assert!((10..20).contains(&read.headers.iter().count()));
}

#[test]
fn every_part_of_a_split_report_fits_in_a_message() {
    let full = Histogram { counts: [u64::MAX; DELAY_BOUNDS_MS.len() + 1], sum_us: u64::MAX };
    let mut worst = Stats { delays: full, waits: full, ..Stats::default() }.report(Ssrc(0));
    worst.paths = [PathReport { received: u64::MAX, lost: u64::MAX, gaps: u64::MAX }; MAX_PATHS];
    worst.repaired = [u64::MAX; 3];
    worst.counters_mut().into_iter().for_each(|count| *count = u64::MAX);
    for count in [0, 1, MAX_REPORTED, MAX_REPORTED + 1, 3000] {
        let stream = |i| StreamReport { ssrc: u32::MAX - i as u32, ..worst.clone() };
        let streams = (0..count).map(stream).collect();
        let report = Report { round_trip_us: u64::MAX, streams };
        let parts: Vec<_> = report.clone().split().collect();
        assert_eq!(parts.len(), count.div_ceil(MAX_REPORTED).max(1));
        for part in &parts {
            let frame = encode_control(&EdgeMessage::Report(part.clone())).unwrap();
            assert!(frame.len() < MAX_EDGE_MESSAGE / 2, "{}", frame.len());
            assert_eq!(part.round_trip_us, u64::MAX);
        }
        let parts = parts.into_iter().flat_map(|part| part.streams);
        assert_eq!(parts.collect::<Vec<_>>(), report.streams);
    }
}

proptest! {
    #[test]
    fn messages_survive_any_split_of_the_stream(cuts in prop::collection::vec(0usize..600, 0..12)) {
        let sent = [
            CloudMessage::StreamUp(info()),
            CloudMessage::StreamEnd { ssrc: Ssrc(1), last_seq: None },
            CloudMessage::StreamData { ssrc: Ssrc(1), tag: cue() },
            CloudMessage::Closing {},
            CloudMessage::StreamUpdate { ssrc: Ssrc(1), headers: info().headers },
        ];
        let bytes: Vec<u8> =
            sent.iter().flat_map(|message| encode_control(message).unwrap()).collect();
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let (mut reader, mut received) = (ControlReader::new(MAX_CONTROL_LEN), Vec::new());
        for range in cuts.windows(2) {
            reader.push(&bytes[range[0]..range[1]]);
            while let Some(message) = reader.next_message::<CloudMessage>().unwrap() {
                received.push(message);
            }
        }
        prop_assert_eq!(&received[..], &sent[..]);
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut reader = ControlReader::new(MAX_CONTROL_LEN);
        reader.push(&bytes);
        while let Ok(Some(_)) = reader.next_message::<EdgeMessage>() {}
    }
}
