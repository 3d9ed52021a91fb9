//! The RTMP player with other servers.

use std::{net::TcpListener, time::Instant};

use crate::common::{
    SOON,
    compare::{media, read_flv},
    rtmp_node::{ffmpeg_command, make_flv},
};
use downpour::rtmp::client::{ClientError, Player, fetch_headers};
use downpour_media::flv::Tag;

#[tokio::test(flavor = "multi_thread")]
async fn player_receives_every_tag_from_ffmpeg() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("in.flv");
    make_flv(&file).await;
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("rtmp://127.0.0.1:{port}/live/x");
    let serve = ["-i", file.to_str().unwrap(), "-c", "copy", "-f", "flv", "-listen", "1", &url];
    let mut ffmpeg = ffmpeg_command(&serve).stderr(std::process::Stdio::null()).spawn().unwrap();

    let deadline = Instant::now() + SOON;
    let mut player = loop {
        match Player::connect(&url.parse().unwrap(), SOON).await {
            Ok(player) => break player,
            // Not listening yet.
            Err(ClientError::Io(_)) if Instant::now() < deadline => {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    };
    let mut received = Vec::new();
    while let Some(tag) = tokio::time::timeout(SOON, player.next()).await.expect("a tag").unwrap() {
        received.push(tag);
    }
    assert_eq!(media(&received), media(&read_flv(&file)));
    assert!(player.next().await.unwrap().is_none());
    player.close().await.unwrap();
    let _ = ffmpeg.kill();
    ffmpeg.wait().unwrap();
}

/// As an edge does that joins a stream of a Go cloud late.
#[tokio::test(flavor = "multi_thread")]
async fn codec_headers_are_fetched_from_a_server() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("in.flv");
    make_flv(&file).await;
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("rtmp://127.0.0.1:{port}/live/x");
    let file_name = file.to_str().unwrap();
    let serve = ["-re", "-i", file_name, "-c", "copy", "-f", "flv", "-listen", "1", &url];
    let mut ffmpeg = ffmpeg_command(&serve).stderr(std::process::Stdio::null()).spawn().unwrap();
    let deadline = Instant::now() + SOON;
    let fetched = loop {
        match fetch_headers(&url.parse().unwrap()).await {
            Ok(fetched) => break fetched,
            // Not listening yet.
            Err(ClientError::Io(_)) if Instant::now() < deadline => {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    };
    let _ = ffmpeg.kill();
    ffmpeg.wait().unwrap();
    let headers = |tags: &[Tag]| -> Vec<_> {
        tags.iter().filter(|tag| tag.is_sequence_header()).map(|tag| tag.body().to_vec()).collect()
    };
    assert_eq!(headers(&fetched), headers(&read_flv(&file)));
}

#[tokio::test(flavor = "multi_thread")]
async fn player_times_out_with_a_silent_server() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("rtmp://{}/live/x", listener.local_addr().unwrap()).parse().unwrap();
    let error = Player::connect(&url, std::time::Duration::from_millis(100)).await.unwrap_err();
    assert!(matches!(error, ClientError::Timeout(_)), "{error}");
    drop(listener);
    let error = Player::connect(&url, SOON).await.unwrap_err();
    assert!(matches!(error, ClientError::Io(_)), "{error}");
}
