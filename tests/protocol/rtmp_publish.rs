//! Encoders publish to the RTMP server: every tag arrives, and refusals have a reason.

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use crate::common::{
    SOON,
    compare::{media, read_flv},
    rtmp_node::{RawEncoder, RtmpServer, ffmpeg, ffmpeg_command, make_flv},
};
use bytes::BytesMut;
use downpour::rtmp::{
    client::{ClientError, Publisher},
    listener::{Server, ServerSettings},
};
use downpour_media::flv::{Tag, TagKind};
use downpour_rtmp::chunk::{AUDIO, ChunkWriter, MessageHead, VIDEO};

#[tokio::test(flavor = "multi_thread")]
async fn server_receives_every_tag_from_ffmpeg() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("in.flv");
    make_flv(&file).await;
    let server = RtmpServer::start(ServerSettings::default());
    let url = format!("{}?token=1", server.url("live/ffmpeg"));
    for round in 1..=2 {
        let push = ["-i", file.to_str().unwrap(), "-c", "copy", "-f", "flv", &url];
        let output = ffmpeg(&push).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let received = server.recorder.ended("live/ffmpeg", round).await;
        assert_eq!(media(&received), media(&read_flv(&file)), "round {round}");
        let metadata = received.iter().find(|tag| tag.kind() == TagKind::Script).unwrap();
        assert!(metadata.body().starts_with(b"\x02\0\x0aonMetaData"));
    }
    server.recorder.recorded("live/ffmpeg", |all| assert_eq!(all[0].query, "token=1"));
    server.metric_reaches("downpour_rtmp_connections", 0.0).await;
    assert!(server.metric("downpour_rtmp_tags_total{kind=\"video\"}") >= 100.0);
    assert_eq!(server.metric("downpour_rtmp_closed_total{reason=\"protocol\"}"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_refuses_ffmpeg_as_a_player_after_its_handshake() {
    let server = RtmpServer::start(ServerSettings::default());
    let url = server.url("live/x").to_string();
    let output = ffmpeg(&["-loglevel", "debug", "-i", &url, "-f", "null", "-"]).await;
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    assert!(log.contains("this node takes publishers only"), "{log}");
    assert!(!log.contains("validating failed"), "{log}");
    server.metric_reaches("downpour_rtmp_refused_total{reason=\"play\"}", 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publisher_delivers_every_tag_unchanged() {
    let server = RtmpServer::start(ServerSettings::default());
    let mut publisher = Publisher::connect(&server.url("live/eu/ours?k=1"), SOON).await.unwrap();
    let mut sent = vec![
        Tag::new(TagKind::Script, 0, b"\x02\0\x0aonMetaData\x05").unwrap(),
        Tag::new(TagKind::Video, 0, &[0x17, 0, 0, 0, 0]).unwrap(),
    ];
    for i in 0..300u32 {
        let kind = if i % 3 == 0 { TagKind::Video } else { TagKind::Audio };
        let len = if i % 50 == 0 { 200_000 } else { 1 + i as usize * 37 };
        // Across the threshold of extended timestamps.
        let body = vec![i as u8 | 1; len];
        sent.push(Tag::new(kind, 0xff_ffff - 1000 + i * 10, &body).unwrap());
    }
    for tag in &sent {
        publisher.send(tag).await.unwrap();
    }
    publisher.close().await.unwrap();
    assert_eq!(server.recorder.ended("live/eu/ours", 1).await, sent);
    server.metric_reaches("downpour_rtmp_closed_total{reason=\"eof\"}", 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publisher_publishes_to_ffmpeg() {
    let directory = tempfile::tempdir().unwrap();
    let (file, copy) = (directory.path().join("in.flv"), directory.path().join("out.flv"));
    make_flv(&file).await;
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("rtmp://127.0.0.1:{port}/live/x");
    let receive = ["-listen", "1", "-i", &url, "-c", "copy", copy.to_str().unwrap()];
    let mut ffmpeg = ffmpeg_command(&receive);
    let ffmpeg = tokio::task::spawn_blocking(move || ffmpeg.output().unwrap());
    let deadline = Instant::now() + SOON;
    let mut publisher = loop {
        match Publisher::connect(&url.parse().unwrap(), SOON).await {
            Ok(publisher) => break publisher,
            // Not listening yet.
            Err(ClientError::Io(_)) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    };
    let tags = read_flv(&file);
    for tag in &tags {
        publisher.send(tag).await.unwrap();
    }
    publisher.close().await.unwrap();
    let output = ffmpeg.await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bodies = |tags: &[Tag]| -> Vec<Vec<u8>> {
        let frames = media(tags).into_iter().filter(|tag| !tag.is_sequence_header());
        frames.map(|tag| tag.body().to_vec()).collect()
    };
    assert_eq!(bodies(&read_flv(&copy)), bodies(&tags));
}

#[tokio::test(flavor = "multi_thread")]
async fn server_refuses_a_second_publisher_with_a_status() {
    let server = RtmpServer::start(ServerSettings::default());
    let url = server.url("live/x");
    let mut first = Publisher::connect(&url, SOON).await.unwrap();
    let refused = Publisher::connect(&url, SOON).await.unwrap_err();
    let ClientError::Rejected { code, description } = refused else { panic!("{refused}") };
    assert_eq!(code, "NetStream.Publish.BadName");
    assert_eq!(description, "live/x already has a live publisher");

    // ffmpeg shows the description to its user.
    let text = url.to_string();
    let push = ["-f", "lavfi", "-i", "sine", "-t", "5", "-c:a", "aac", "-f", "flv", &text];
    let output = ffmpeg(&push).await;
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && log.contains(&description), "{log}");

    let tag = Tag::new(TagKind::Audio, 5, &[0xaf, 1, 2]).unwrap();
    first.send(&tag).await.unwrap();
    first.close().await.unwrap();
    assert_eq!(server.recorder.ended("live/x", 1).await, [tag]);
    assert_eq!(server.metric("downpour_rtmp_refused_total{reason=\"already_live\"}"), 2.0);

    let denied = Publisher::connect(&server.url("live/y?denied"), SOON).await.unwrap_err();
    assert!(denied.to_string().contains("NetStream.Publish.Unauthorized"), "{denied}");
    // The key is free again.
    Publisher::connect(&url, SOON).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn server_reassembles_audio_chunks_within_a_video_message() {
    let server = RtmpServer::start(ServerSettings::default());
    let mut encoder = RawEncoder::publish(server.addr, "live", "x");
    let mut writer = ChunkWriter::new();
    let head = |kind, timestamp| MessageHead { kind, stream_id: 1, timestamp };
    let video = vec![0x17; 1000];
    let mut out = BytesMut::new();
    let mut message = writer.begin(6, head(VIDEO, 40), video.len()).unwrap();
    for time in [10, 20, 30] {
        assert!(writer.write_chunk(&mut message, &video, &mut out));
        writer.write(4, head(AUDIO, time), &[0xaf; 200], &mut out).unwrap();
        if time == 20 {
            writer.set_chunk_size(300, &mut out).unwrap();
        }
    }
    while writer.write_chunk(&mut message, &video, &mut out) {}
    encoder.out = out;
    encoder.send().unwrap();
    encoder.hang_up();

    let mut expected: Vec<Tag> =
        [10, 20, 30].map(|time| Tag::new(TagKind::Audio, time, &[0xaf; 200]).unwrap()).to_vec();
    expected.push(Tag::new(TagKind::Video, 40, &video).unwrap());
    assert_eq!(server.recorder.ended("live/x", 1).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_reports_an_address_in_use() {
    let server = RtmpServer::start(ServerSettings::default());
    let error = Server::bind(server.addr, ServerSettings::default()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}

#[tokio::test(flavor = "multi_thread")]
async fn node_ends_a_publication() {
    let server = RtmpServer::start(ServerSettings::default());
    let mut publisher = Publisher::connect(&server.url("live/x"), SOON).await.unwrap();
    publisher.send(&Tag::new(TagKind::Audio, 0, &[0xaf, 1]).unwrap()).await.unwrap();
    server.recorder.kick("live/x").await;
    let error = closed_error(&mut publisher).await;
    assert!(error.to_string().contains("the node ended the publication"), "{error}");
    server.recorder.ended("live/x", 1).await;
    server.metric_reaches("downpour_rtmp_closed_total{reason=\"kicked\"}", 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publication_ends_before_its_connection_closes() {
    let server = RtmpServer::start(ServerSettings::default());
    let mut encoder = RawEncoder::publish(server.addr, "live", "x");
    encoder.message(AUDIO, 3, &[0xaf, 1]);
    encoder.send().unwrap();
    server.recorder.kick("live/x").await;
    server.recorder.ended("live/x", 1).await;
    // The encoder has one second to read the reason.
    assert_eq!(server.metric("downpour_rtmp_connections"), 1.0);
    drop(encoder);
    server.metric_reaches("downpour_rtmp_connections", 0.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_notifies_encoders() {
    let mut server = RtmpServer::start(ServerSettings::default());
    let mut publisher = Publisher::connect(&server.url("live/x"), SOON).await.unwrap();
    let mut silent = RawEncoder::connect(server.addr);
    server.shutdown.cancel();
    let error = closed_error(&mut publisher).await;
    assert!(error.to_string().contains("the node is shutting down"), "{error}");
    drop(publisher);
    assert!(tokio::task::spawn_blocking(move || silent.is_closed()).await.unwrap());
    let task = server.task.take().unwrap();
    tokio::time::timeout(SOON, task).await.expect("the server ends").unwrap();
    assert_eq!(server.metric("downpour_rtmp_connections"), 0.0);
    assert_eq!(server.metric("downpour_rtmp_closed_total{reason=\"shutdown\"}"), 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn server_closes_silent_encoders() {
    let server = RtmpServer::start(ServerSettings {
        publish_timeout: Duration::from_millis(300),
        idle_timeout: Duration::from_millis(900),
        ..ServerSettings::default()
    });
    let begin = Instant::now();
    let mut idle = RawEncoder::connect(server.addr);
    let mut live = RawEncoder::publish(server.addr, "live", "x");
    tokio::task::spawn_blocking(move || {
        assert!(idle.is_closed());
        assert!(begin.elapsed() >= Duration::from_millis(300));
        assert!(live.is_closed());
        assert!(begin.elapsed() >= Duration::from_millis(900));
    })
    .await
    .unwrap();
    assert_eq!(server.metric("downpour_rtmp_closed_total{reason=\"publish_timeout\"}"), 1.0);
    assert_eq!(server.metric("downpour_rtmp_closed_total{reason=\"idle_timeout\"}"), 1.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn connection_publishes_a_key_again() {
    let server = RtmpServer::start(ServerSettings {
        publish_timeout: Duration::from_millis(400),
        ..ServerSettings::default()
    });
    let mut encoder = RawEncoder::publish(server.addr, "live", "x");
    let name = || [downpour_media::amf0::Value::Null, "x".into()];
    encoder.message(AUDIO, 3, &[0xaf, 1]);
    encoder.command(0, "FCUnpublish", 4.0, &name());
    encoder.command(1, "publish", 5.0, &name());
    encoder.message(AUDIO, 7, &[0xaf, 1]);
    encoder.command(0, "FCUnpublish", 6.0, &name());
    encoder.send().unwrap();
    assert_eq!(server.recorder.ended("live/x", 2).await.len(), 1);
    // Without a third publication the connection is closed by the same timeout as at its start.
    assert!(tokio::task::spawn_blocking(move || encoder.is_closed()).await.unwrap());
    server.metric_reaches("downpour_rtmp_closed_total{reason=\"publish_timeout\"}", 1.0).await;
}

/// Sends until the publisher reports the server's reason.
async fn closed_error(publisher: &mut Publisher) -> ClientError {
    let deadline = Instant::now() + SOON;
    loop {
        if let Err(error) = publisher.flush().await {
            return error;
        }
        assert!(Instant::now() < deadline, "no reason from the server");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
